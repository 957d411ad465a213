"""How fast the data path is here, by stage and in all, and whether that feeds a training on this machine.

python benchmarks/loader.py --data_path photos --model JiT-B/16
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jit_accel.base.devices import DTYPES, chosen_device, chosen_precision, device_name
from jit_accel.base.errors import UserError, message_of
from jit_accel.config.groups import STREAMING, OptimConfig
from jit_accel.config.presets import forward_macs, parse_model_name
from jit_accel.data import Source, open_images
from jit_accel.data.batches.order import default_kind, image_indices
from jit_accel.data.batches.ready_batches import batches, waiting_advice
from jit_accel.data.batches.workers import num_cores, worker_memory_gib
from jit_accel.data.reading.decode import center_crop, plain_jpeg, to_rgb
from jit_accel.data.reading.images import Stream
from jit_accel.model.precision import BlockWork, times_of
from jit_accel.model.transformer import build_model
from jit_accel.train.forecast import cost_of_step, try_block

# Images/s of JiT-B/16 at 256 px, bf16 and compiled, on one H100; other models by their arithmetic.
REFERENCE_MODEL, REFERENCE_SIZE, REFERENCE_RATE = "JiT-B/16", 256, 2600
_SAMPLE_BYTES, _SAMPLE_IMAGES = 2**28, 1024  # kept from one stage for the next


def main(argv: list[str] | None = None) -> int:
    """Measure as the command line says, print the result. Returns the exit code: 0 done, 2 something to put right."""
    args = parse_args(argv)
    try:
        check(args)
        report = measure(args)
    except UserError as error:
        print(f"error: {message_of(error)}", file=sys.stderr, flush=True)
        return 2
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/loader.py",
        description="How fast images are read, decoded and brought to the device, and whether that feeds a training.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data_path", required=True, help="as in training")
    add("--data_format", default="auto", help="as in training")
    add("--image_column", help="as in training")
    add("--label_column", help="as in training")
    add("--streaming", choices=STREAMING, default="auto", help="as in training")
    add("--img_size", type=int, default=256, help="side of the images in pixels (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="images a batch (default: %(default)s)")
    add("--model", default=REFERENCE_MODEL, help="the model to be fed (default: %(default)s)")
    add(
        "--num_workers", type=int, help="measure this number of workers only (default: 0, 1, 2, 4, ... up to the cores)"
    )
    add("--h100s", type=int, help="say what this number of H100 GPUs would need too, for a machine that is planned")
    add("--seconds", type=float, default=10.0, help="for each stage and number of workers (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file as well")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail only after the measurement.

    Raises:
        UserError: a value out of range, a model that does not go with the image size, a file that cannot be written.
    """
    _, patch_size = parse_model_name(args.model)
    for name, least in (("img_size", 1), ("batch_size", 1), ("num_workers", 0), ("h100s", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"must be at least {least}.", about=name, value=value)
    if not 0 < args.seconds < math.inf:
        raise UserError("must be more than 0.", about="seconds", value=f"{args.seconds:g}")
    if args.img_size % patch_size:
        near = max(1, round(args.img_size / patch_size)) * patch_size
        raise UserError(
            f"must be a multiple of the patch size {patch_size} ({args.model}): use {near}.",
            about="img_size",
            value=args.img_size,
        )
    if args.json is not None:
        try:
            args.json.touch()
        except OSError as error:
            raise UserError(
                f"cannot be written ({error.strerror}): give another file.", about="json", value=args.json
            ) from None


def measure(args: argparse.Namespace) -> dict:
    """Measure and print. Returns all figures."""
    device, cores = chosen_device(), num_cores()
    need = images_per_s_trained(args.model, args.img_size, args.batch_size, device)
    torch.set_num_threads(1)
    how = {"img_size": args.img_size, "batch_size": args.batch_size, "device": device, "seconds": args.seconds}
    source = open_images(
        args.data_path,
        data_format=args.data_format,
        image_column=args.image_column,
        label_column=args.label_column,
        streaming=STREAMING[args.streaming],
    )
    count = "" if source.num_images is None else f", {source.num_images:,} images"
    say(f"Data: {source.name} ({source.format}{count}), {args.img_size} px, page cache as it happens to be\n")
    stages = measure_stages(source, **how)
    print_stages(stages, device)
    say(f"\n{'workers':>9} {'images/s':>9}   whole loader, batches of {args.batch_size}")
    runs = []
    for num_workers in worker_counts(cores) if args.num_workers is None else [args.num_workers]:
        runs.append(measure_loader(source, num_workers, **how))
        say(f"{num_workers:9} {runs[-1].images_per_s:9,.0f}")
    print_memory(runs[-1])
    name = "CPU" if device.type == "cpu" else device_name(device)
    say(
        f"\n{args.model} at {args.img_size} px takes about {in_digits(need)} images/s on this {name}: an estimate by "
        "one of its blocks, tried here."
    )
    counts = {1, 1 if device.type == "cpu" else torch.accelerator.device_count()}
    verdicts = {f"{count} {name}": verdict(count, need, runs, cores, name) for count in sorted(counts)}
    if args.h100s:
        each = images_per_s_of_h100(args.model, args.img_size)
        verdicts[f"{args.h100s} H100"] = verdict(args.h100s, each, runs, cores, "H100")
    for text, _ in verdicts.values():
        say(text)
    if not all(suffices for _, suffices in verdicts.values()):
        say(f"What helps: {remedy(source, args.data_path, cores)}")
    return {
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "device": str(device),
        "cores": cores,
        "num_images": source.num_images,
        "stages_images_per_s": stages.rates,
        "bytes_per_image": stages.bytes_per_image,
        "loader": [asdict(run) for run in runs],
        "needed_images_per_s_per_device": need,
        "verdicts": {devices: text for devices, (text, _) in verdicts.items()},
    }


def say(text: str) -> None:
    print(text, flush=True)


def worker_counts(cores: int) -> list[int]:
    """0, 1, 2, 4, ... and all cores."""
    return sorted({0, cores, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)})


def print_stages(stages: Stages, device) -> None:
    say(f"{'one core':>9} {'images/s':>9}")
    for name, rate in stages.rates.items():
        note = f"   {rate * stages.bytes_per_image / 1e6:,.0f} MB/s" if name == "read" else ""
        say(f"{name:>9} {rate:9,.0f}{note}")
    if "to device" not in stages.rates:
        say(f"{'to device':>9} {'–':>9}   the device is this {device.type.upper()}")
    say(f"{'all':>9} {stages.together:9,.0f}   one after the other")
    if stages.bad_images:
        say(f"{stages.bad_images} images of the sample cannot be decoded")


def print_memory(run: EndToEnd) -> None:
    if run.memory_start_gib is not None and run.memory_end_gib is not None:
        say(
            f"\nMemory of the largest of {run.num_workers} workers: {run.memory_start_gib:.2f} GiB at the start, "
            f"{run.memory_end_gib:.2f} GiB after {run.images:,} images of all (shared and file pages not counted)"
        )


def images_per_s_trained(model: str, img_size: int, batch_size: int, device: torch.device) -> float:
    """What this device trains a second with all cores, from a block of the model that is tried."""
    optim = OptimConfig(batch_size=batch_size, ema_decays=("auto",))
    with torch.device("meta"):
        network = build_model(model, img_size=img_size, num_classes=1)
    sizes = network.config
    work = BlockWork.of(sizes, sizes.patch_size, img_size, img_size, batch_size, trains=True)
    dtype = DTYPES.get(chosen_precision() or times_of(work).faster)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    trial = try_block(network.config, batch_size, device, autocast, optim)
    return batch_size / cost_of_step(trial, network, optim, 1, stay=False).seconds


def in_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def images_per_s_of_h100(model: str, img_size: int) -> float:
    """What one H100 trains a second, from the matrix products of the model and of one that was measured."""
    return REFERENCE_RATE * _macs(REFERENCE_MODEL, REFERENCE_SIZE) / _macs(model, img_size)


def _macs(model: str, img_size: int) -> int:
    preset, patch_size = parse_model_name(model)
    return forward_macs(preset, patch_size, img_size, img_size)


def verdict(count: int, need_each: float, runs: list[EndToEnd], cores: int, name: str) -> tuple[str, bool]:
    """What the measured loaders mean for so many devices fed by this machine, and whether they suffice.

    Each device's process has its own workers: those of all of them share the cores.
    """
    need = count * need_each
    text = f"{count} {name}{'s need' if count > 1 else ' needs'} {in_digits(need)} images/s: "
    fitting = [run.num_workers for run in runs if run.images_per_s >= need]
    if fitting:
        workers = math.ceil(min(fitting) / count)
        return f"{text}--num_workers {workers} suffices.", True
    best = max(run.images_per_s for run in runs)
    per_core = max(run.images_per_s / max(1, run.num_workers) for run in runs)
    return (
        f"{text}the data path of this machine ({cores} cores) reaches {best:,.0f} and limits the training to "
        f"{best / need:.0%}; about {math.ceil(need / per_core):,} cores would do."
    ), False


def remedy(source: Source, data_path: str, cores: int) -> str:
    return waiting_advice(
        data_path,
        num_workers=cores,
        cores=cores,
        is_remote=getattr(source.images, "is_remote", False),
        is_encoded=source.is_encoded,
        is_prepared=source.format == "prepared",
    )


@dataclass
class Stages:
    """Images/s of one core by stage, in their order; a stage that does not exist here is left out."""

    rates: dict[str, float] = field(default_factory=dict)
    bytes_per_image: float = 0.0
    bad_images: int = 0

    @property
    def together(self) -> float:
        """Images/s of one core that does all of it, one after the other."""
        return 1 / sum(1 / rate for rate in self.rates.values())


@dataclass(frozen=True)
class EndToEnd:
    """What a loader of `num_workers` workers delivers; memory of the largest worker, in GiB."""

    num_workers: int
    images_per_s: float
    images: int
    memory_start_gib: float | None
    memory_end_gib: float | None


def measure_stages(source: Source, *, img_size: int, batch_size: int, device: torch.device, seconds: float) -> Stages:
    """Measure one stage after the other, each for about `seconds`, with images of the one before.

    Raises:
        UserError: no image can be decoded.
    """
    stages = Stages()
    if source.is_encoded and getattr(source.images.columns, "raw_size", None) is None:
        encoded = _timed(stages, "read", _encoded(source, batch_size), seconds, size=len)
        stages.bytes_per_image = float(np.mean([len(data) for data in encoded]))
        pictures = _timed(stages, "decode", _each(_decode, encoded, stages), seconds, size=_picture_bytes)
        squares = _timed(stages, "crop", _each(lambda picture: _crop(picture, img_size), pictures, stages), seconds)
    else:  # reading gives pixels
        squares = _timed(stages, "read", _pixels(source, img_size, batch_size), seconds)
        stages.bytes_per_image = squares[0].nbytes
    batches = _timed(stages, "collate", _batches(squares, batch_size), seconds, images=batch_size)
    if device.type != "cpu":
        _timed(stages, "to device", _each(lambda batch: _copy(batch, device), batches, stages), seconds, batch_size)
    return stages


def measure_loader(
    source: Source, num_workers: int, *, img_size: int, batch_size: int, device: torch.device, seconds: float
) -> EndToEnd:
    """Take batches for about `seconds`, after the start of the workers and what they had prefetched."""
    loader = batches(source, img_size=img_size, batch_size=batch_size, device=device, num_workers=num_workers)
    try:
        for _ in range(1 + 2 * num_workers):
            next(loader)
        memory_gib = worker_memory_gib()
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or not images:
            next(loader)
            images += batch_size
        elapsed_s = time.perf_counter() - start
        return EndToEnd(num_workers, images / elapsed_s, images, memory_gib, worker_memory_gib())
    finally:
        loader.close()


def _num_bytes(array: np.ndarray) -> int:
    return array.nbytes


def _timed(
    stages: Stages, name: str, results: Iterator, seconds: float, images: int = 1, size: Callable = _num_bytes
) -> list:
    """Draw `results` for `seconds`, each of `images` images, note the rate, and return the first of them."""
    kept, kept_bytes, count = [], 0, 0
    start = time.perf_counter()
    for result in results:
        count += images
        if kept_bytes < _SAMPLE_BYTES and len(kept) < _SAMPLE_IMAGES:
            kept.append(result)
            kept_bytes += size(result)
        if time.perf_counter() - start >= seconds:
            break
    if not kept:
        raise UserError("none of the images that were tried can be decoded: repair the data.", about="data_path")
    stages.rates[name] = count / (time.perf_counter() - start)
    return kept


def _each(action: Callable, items: list, stages: Stages) -> Iterator:
    """The results of `action` on `items`, over and over; what cannot be decoded is dropped for good."""
    good = []
    for item in items:
        try:
            result = action(item)
        except Exception:  # decoders raise anything on damaged files
            stages.bad_images += 1
        else:
            good.append(item)
            yield result
    yield from (action(item) for item in itertools.cycle(good))


def _indices(n: int, batch_size: int) -> Iterator[np.ndarray]:
    """Batches of indices in the order of a training."""
    for start in itertools.count(0, batch_size):
        yield image_indices(0, np.arange(start, start + batch_size), n, default_kind(n))


def _encoded(source: Source, batch_size: int) -> Iterator[bytes]:
    """The bytes of the images, over and over; none where a file cannot be read."""
    images, columns = source.images, source.images.columns
    if isinstance(images, Stream):
        units = itertools.cycle(range(images.num_units))
        values = (row[columns.image] for unit in units for row in images.rows(unit))
    else:
        batches = (images.dataset[indices.tolist()] for indices in _indices(len(images), batch_size))
        values = (value for batch in batches for value in batch[columns.image])
    for value in values:
        data, _ = columns.image_of(value)
        if isinstance(data, str):
            try:
                data = Path(data).read_bytes()
            except OSError:
                data = None
        yield data or b""


def _pixels(source: Source, img_size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Images of a store that needs no decoding."""
    if source.is_encoded:  # bare pixels in a table
        side = source.images.columns.raw_size
        yield from (np.frombuffer(data, np.uint8).reshape(3, side, side) for data in _encoded(source, batch_size))
    for indices in _indices(len(source.images), batch_size):
        batch = np.empty((len(indices), 3, img_size, img_size), np.uint8)
        source.images.read(indices, batch)
        yield from batch


def _decode(data: bytes) -> Image.Image:
    plain = plain_jpeg(io.BytesIO(data))
    if plain is not None:
        return Image.fromarray(plain)
    with Image.open(io.BytesIO(data)) as image:
        picture = to_rgb(image)
        picture.load()
        return picture


def _crop(picture: Image.Image, img_size: int) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(center_crop(picture, img_size)).transpose(2, 0, 1))


def _picture_bytes(picture: Image.Image) -> int:
    return 3 * picture.width * picture.height


def _batches(squares: list[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Batches of copies."""
    endless = itertools.cycle(squares)
    while True:
        images = np.empty((batch_size, *squares[0].shape), np.uint8)
        for place, square in zip(range(batch_size), endless):
            images[place] = square
        yield images


def _copy(images: np.ndarray, device: torch.device) -> torch.Tensor:
    pinned = torch.from_numpy(images)
    moved = (pinned.pin_memory() if device.type == "cuda" else pinned).to(device)
    torch.accelerator.synchronize()
    return moved


if __name__ == "__main__":
    sys.exit(main())
