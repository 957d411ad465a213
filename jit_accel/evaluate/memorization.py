"""Memorization: the training images nearest to generated ones, beside those nearest to held-out real images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from jit_accel.base.console import redacted, say
from jit_accel.base.devices import full_float32
from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.base.files import atomic_file, disk_errors
from jit_accel.base.image_rows import as_pictures, draw_rows
from jit_accel.base.processes import gather_rows, on_all, on_main
from jit_accel.config.presets import sides_of
from jit_accel.evaluate.features import MAIN, FeatureNetwork, Layers
from jit_accel.evaluate.image_sets import ImageSet, Share, in_bytes
from jit_accel.evaluate.settings import INCEPTION

SHEET_FILE, SHOWN = "nearest.png", 8
MOST_SIDE, COMPARED_SIDE = 64, 32  # pixels: of the pictures that are kept, and as they are compared
# Memorized is what is nearer to a training image than a third of the distance from the second nearest (Yoon et al.
# 2023; Gu et al., 2310.02664), or so near that it is the same image, which the training images may hold twice.
RATIO, SAME = 1 / 3, 0.01
FEATURES, PIXELS = "features", "pixels"
SHUFFLE_SEED = 2020


@dataclass(frozen=True)
class Looks:
    """The looks of some images: features float32 (n, D), pictures uint8 (n, C, h, w) of at most 64 pixels a side."""

    features: Tensor
    pictures: Tensor

    def points(self, device: torch.device) -> dict[str, Tensor]:
        """Return what they are compared by, float32 (n, d): features, and pixels at 32 a side, from 0 to 1."""
        pixels = reduced(self.pictures, COMPARED_SIDE).flatten(1)
        return {FEATURES: self.features.to(device).float(), PIXELS: pixels.to(device).float() / 255}


def reduced(images: Tensor, most_side: int) -> Tensor:
    """Return images uint8 (B, C, H, W) of at most so many pixels a side, each the mean of those it stands for."""
    height, width = images.shape[-2:]
    if (factor := max(height, width) / most_side) <= 1:
        return images
    size = max(1, round(height / factor)), max(1, round(width / factor))
    return F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)


class LooksTally:
    """Keeps the looks of `most` images at most, drawn at random from those of numbers below `num_images`.

    size: of the features. shape: (C, H, W) of the images.
    """

    def __init__(self, num_images: int, most: int, size: int, shape: Sequence[int]):
        self.is_kept = torch.zeros(num_images, dtype=torch.bool)
        self.is_kept[np.random.RandomState(SHUFFLE_SEED).permutation(num_images)[:most]] = True
        nothing = reduced(torch.zeros(1, *shape, dtype=torch.uint8), MOST_SIDE)[:0]
        self.kept = [(torch.empty(0, dtype=torch.int64), torch.empty(0, size), nothing)]

    def add(self, numbers: Tensor, images: Tensor, layers: Layers) -> None:
        """Add images uint8 (B, C, H, W) of these numbers, int64 (B,) on the CPU, and their features."""
        chosen = (numbers < len(self.is_kept)) & self.is_kept[numbers.clamp(max=len(self.is_kept) - 1)]
        pictures = reduced(images[chosen.to(images.device)], MOST_SIDE).cpu()
        self.kept.append((numbers[chosen], layers[MAIN][chosen.to(layers[MAIN].device)].float().cpu(), pictures))

    def finish(self, accelerator) -> Looks:
        """Return those of all processes, in the order of their numbers, the same on all."""
        numbers, features, pictures = (gather_rows(torch.cat(parts), accelerator) for parts in zip(*self.kept))
        order = numbers.argsort()
        return Looks(features[order], pictures[order])


class Nearest:
    """The distances of points from the nearest two of others that come in batches, and the picture of the nearest.

    points: float32 (n, d). distances: float32 (n, 2), the nearer one first.
    """

    def __init__(self, points: Tensor, like: Tensor):
        self.points = points
        self.distances = torch.full((len(points), 2), torch.inf, device=points.device)
        self.pictures = torch.zeros(len(points), *like.shape[1:], dtype=torch.uint8)

    def add(self, points: Tensor, pictures: Tensor) -> None:
        """Compare with points (B, d), of these pictures on the CPU."""
        with full_float32():
            every = torch.cat([self.distances, torch.cdist(self.points, points)], 1)
        self.distances, places = every.topk(2, largest=False)
        nearer = (places[:, 0] >= 2).cpu()
        self.pictures[nearer] = pictures[places[:, 0].cpu()[nearer] - 2]

    def merge(self, accelerator) -> None:
        """Take the nearest of all processes; the pictures stay this one's, and `picture_of` finds the right ones."""
        every = gather_rows(self.distances[None].cpu(), accelerator).permute(1, 0, 2).flatten(1)
        self.distances, places = every.topk(2, largest=False)
        self.process_of = places[:, 0] // 2

    def pictures_of(self, rows: Tensor, accelerator) -> Tensor:
        """Return the pictures of the nearest, of these rows; after `merge`, on all processes together."""
        of_each = gather_rows(self.pictures[rows][None], accelerator)
        return of_each[self.process_of[rows], torch.arange(len(rows))]


@torch.inference_mode()
def nearest_training(
    queries: Looks, parts: Iterable[tuple[Tensor, Tensor]], network: FeatureNetwork, accelerator
) -> dict[str, Nearest]:
    """Return the nearest training images of queries, by features and by pixels.

    parts: features and images, uint8 (B, C, H, W), of this process's share of the training images.
    """
    found = {space: Nearest(points, queries.pictures) for space, points in queries.points(network.device).items()}

    def compare() -> None:
        for features, images in parts:
            looks = Looks(features, reduced(images, MOST_SIDE).cpu())
            for space, points in looks.points(network.device).items():
                found[space].add(points, looks.pictures)

    on_all(accelerator, compare)
    for nearest in found.values():
        nearest.merge(accelerator)
    return found


def is_memorized(distances: Tensor, same: float) -> Tensor:
    """Return bool (n,) of distances (n, 2) from the nearest two training images; below `same` images are equal."""
    return (distances[:, 0] <= RATIO * distances[:, 1]) | (distances[:, 0] <= same)


def nearer_share(distances: Tensor, others: Tensor) -> float:
    """Return the probability that one of `distances` (n,) is below one of `others` (m,); equal ones count half."""
    distances, others = distances.contiguous(), others.sort().values
    above = len(others) - torch.searchsorted(others, distances, right=True)
    not_below = len(others) - torch.searchsorted(others, distances)
    return float((above + not_below).double().mean() / 2 / len(others))


def memorization(
    generated: dict[str, Tensor], held_out: dict[str, Tensor]
) -> tuple[dict[str, float], dict[str, float], Tensor]:
    """Return the numbers of generated and of held-out images, and the rows of the former, the most like a copy first.

    Both are distances (n, 2) from the nearest two training images by what they are compared by. `copying` is the
    statistic of Meehan et al. (2004.05675): how probably a generated image is nearer to the training images than a
    held-out one is, 0.5 where nothing is copied.
    """
    made, real, ratios = {}, {}, torch.tensor(torch.inf)
    for space, of_made in generated.items():
        of_real = held_out[space]
        usual = float(of_real[:, 0].median())
        end = "" if space == FEATURES else f"_{space}"
        for values, distances in ((made, of_made), (real, of_real)):
            values["memorized" + end] = float(is_memorized(distances, SAME * usual).double().mean())
        if space == FEATURES:
            made["copying"] = nearer_share(of_made[:, 0], of_real[:, 0])
        ratios = ratios.minimum(of_made[:, 0] / of_made[:, 1].clamp(min=SAME * usual + 1e-12))
    return made, real, ratios.argsort()


class MemorizationCheck:
    """Compares the images of one or more measurements with training images, all in one pass over these."""

    def __init__(self, evaluator, training: ImageSet, held_out: ImageSet):
        """Raise `UserError` for held-out images that are the training images."""
        if held_out.fingerprint and held_out.fingerprint == training.fingerprint:
            rule = "holds the same images as --reference, which are to be those of the training: give others."
            raise UserError(rule, about="held_out", value=held_out.name)
        self.evaluator, self.training, self.held_out = evaluator, training, held_out
        self.made: list[LooksTally] = []

    def watch(self, num_images: int) -> None:
        """Keep the images that the evaluator measures next."""
        self.made.append(self._tally(num_images))
        self.evaluator.seen = self.made[-1].add

    def complete(self, found: Sequence[dict], sheet: Path) -> None:
        """Add the numbers to the records of the measurements, and draw a sheet of the first one's images."""
        evaluator, accelerator = self.evaluator, self.evaluator.accelerator
        evaluator.seen = None
        sets = [tally.finish(accelerator) for tally in self.made] + [self._looks_of_held_out()]
        queries = Looks(*(torch.cat([getattr(one, name) for one in sets]) for name in ("features", "pictures")))
        nearest = nearest_training(queries, self._training_parts(), evaluator.network, accelerator)
        ends = np.cumsum([0, *(len(one.features) for one in sets)])
        of_held_out = {space: one.distances[ends[-2] :] for space, one in nearest.items()}
        for record, start, end in reversed([*zip(found, ends, ends[1:-1])]):
            generated = {space: one.distances[start:end] for space, one in nearest.items()}
            made, real, order = memorization(generated, of_held_out)
            record["metrics"] |= {_named(name, evaluator.network.name): value for name, value in made.items()}
            count = len(sets[-1].features)
            record["held_out"] = {"images": redacted(self.held_out.name), "num_images": count, **real}
        shown = order[:SHOWN]  # of the first
        rows = {"generated": queries.pictures[shown]}
        rows |= {f"by {space}": one.pictures_of(shown, accelerator) for space, one in nearest.items()}
        on_main(accelerator, lambda: _draw(rows, sheet))
        if accelerator.is_main_process:
            shares = f"{real['memorized']:.2%} are memorized by features, {real['memorized_pixels']:.2%} by pixels"
            say(f"Held out:  {redacted(self.held_out.name)}, {count:,} images; of these {shares}")

    def _tally(self, num_images: int) -> LooksTally:
        network, held_out = self.evaluator.network, self.held_out
        shape = held_out.pixels.channels, *sides_of(held_out.img_size)
        return LooksTally(num_images, self.evaluator.max_features, network.sizes[MAIN], shape)

    def _looks_of_held_out(self) -> Looks:
        tally = self._tally(self.held_out.num_images)
        with renamed_settings(data_path="held_out"):
            on_all(self.evaluator.accelerator, lambda: self._read(self.held_out, tally.add))
        looks = tally.finish(self.evaluator.accelerator)
        if not len(looks.features):
            raise UserError("has no images that can be read.", about="held_out", value=self.held_out.name)
        return looks

    def _read(self, images: ImageSet, use) -> None:
        for share, pictures in self._shares(images):
            use(share.numbers, pictures, self.evaluator.network(pictures))

    def _training_parts(self) -> Iterable[tuple[Tensor, Tensor]]:
        for _, pictures in self._shares(self.training):
            yield self.evaluator.network(pictures)[MAIN], pictures

    def _shares(self, images: ImageSet) -> Iterable[tuple[Share, Tensor]]:
        accelerator = self.evaluator.accelerator
        place = self.evaluator.batch_size, accelerator.process_index, accelerator.num_processes
        is_silent = not (self.evaluator.show_progress and accelerator.is_main_process)
        with tqdm(total=images.num_images // place[2], unit="image", leave=False, disable=is_silent) as progress:
            for share in images.shares(*place):
                if len(share.numbers):
                    yield share, in_bytes(share.images, images.pixels)
                progress.update(len(share.numbers))


def _named(name: str, features: str) -> str:
    return name if features == INCEPTION or name.endswith(PIXELS) else f"{name}_{features}"


def _draw(rows: dict[str, Tensor], path: Path) -> None:
    pictures = [(name, as_pictures(some.permute(0, 2, 3, 1).numpy())) for name, some in rows.items()]
    with disk_errors("output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            draw_rows(pictures).save(temporary, format="PNG")
    say(f"Sheet:     {path}")
