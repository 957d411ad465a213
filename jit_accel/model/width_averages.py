"""Power-function averages of any relative width, put together after the training from a few that were stored in it.

    averages/step_00000500-width_0.05.safetensors

At step t the weights of step s count in proportion to s^gamma, so that the width of this profile is a fixed share of
the run so far (Karras et al., arXiv 2312.02696, section 3.1). A profile that nobody tracked is a combination of stored
ones, by least squares (section 3.2, appendix C.3). A width is named `width_0.05` wherever an average has a name.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

from jit_accel.base.console import warn
from jit_accel.base.errors import UserError
from jit_accel.config.groups import problem_of_width, width_of
from jit_accel.model.checkpoints import named_damage, step_of
from jit_accel.model.manifest import STATE, damage_of, files_of, part_of_file, read_manifest
from jit_accel.model.tensor_files import stored_tensors

AVERAGES_FOLDER = "averages"  # in a run's
DOUBTFUL_FIT, WRONG_FIT = 0.1, 0.5  # relative errors of a profile: a warning, an error
SHOWN_WIDTHS = [i / 100 for i in range(1, 29)]  # what is tried to say which fit


@lru_cache
def gamma_of(width: float) -> float:
    """Return the exponent of the profile whose standard deviation is `width` times its length, in (0, MOST_WIDTH)."""
    # width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), equation 3 of section 3.1, as a polynomial
    length = width**-2
    return float(numpy.roots([1, 7, 16 - length, 12 - length]).real.max())


def decay_of_width(width: float, step: int) -> float:
    """Return the decay of the update after the optimizer step that brought the count to `step` (1, 2, ...)."""
    # With it the weights of step s count exactly the integral of the profile over (s - 1, s].
    return (1 - 1 / step) ** (gamma_of(width) + 1)


@dataclass(frozen=True)
class Profile:
    """The shares of the steps in an average of this width at `step`: a density over (0, step]."""

    step: int
    width: float


@dataclass(frozen=True)
class Fit:
    """Factors of stored averages, whose sum is 1, for another one; `error`: of the profile, relative, L2."""

    factors: tuple[float, ...]
    error: float


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> numpy.ndarray:
    """Return the integrals of the products of profiles, (len(first), len(second)) in float64."""

    def columns(profiles: Sequence[Profile]) -> tuple[numpy.ndarray, numpy.ndarray]:
        return numpy.array([float(p.step) for p in profiles]), numpy.array([gamma_of(p.width) for p in profiles])

    (s, a), (t, b) = columns(first), columns(second)
    s, a = s[:, None], a[:, None]
    low, high, later = numpy.minimum(s, t), numpy.maximum(s, t), numpy.where(s < t, b, a)
    # int_0^low (a+1) x^a / s^(a+1) * (b+1) x^b / t^(b+1) dx
    return (a + 1) * (b + 1) / (a + b + 1) * (low / high) ** later / high


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """Return the combination of stored profiles that is nearest to the one wanted, among those whose integral is 1.

    That they sum to 1 keeps weights exact that no longer change, however few are stored.
    """
    if wanted in stored:
        return Fit(tuple(float(profile == wanted) for profile in stored), 0.0)
    products, sought = inner_products(stored, stored), inner_products(stored, [wanted])[:, 0]
    norm = inner_products([wanted], [wanted])[0, 0]
    # Profiles of nearly the same step are nearly the same: in units of their lengths, and without what is lost in them.
    length = numpy.sqrt(numpy.diag(products))
    sides = numpy.stack([sought / length, 1 / length], 1)
    scaled = products / numpy.outer(length, length)
    free, even = (numpy.linalg.lstsq(scaled, sides, rcond=1e-12)[0] / length[:, None]).T
    factors = free + even * (1 - free.sum()) / even.sum()
    square = (norm - 2 * factors @ sought + factors @ products @ factors) / norm
    return Fit(tuple(map(float, factors)), math.sqrt(max(0.0, square)))


def snapshot_path(output_dir: Path, step: int, name: str) -> Path:
    """Return the file of the average `name` of this step, in a run's folder."""
    return output_dir / AVERAGES_FOLDER / f"step_{step:08d}-{name}.safetensors"


def stored_snapshots(output_dir: Path) -> dict[Profile, Path]:
    """Return the averages that are stored in a run's folder, in the order of their steps."""
    found = {}
    for path in sorted((output_dir / AVERAGES_FOLDER).glob("step_*.safetensors")):
        name = re.fullmatch(r"step_(\d+)-(.+)", path.stem)
        if name and (width := width_of(name[2])):
            found[Profile(int(name[1]), width)] = path
    return found


def sources_of(checkpoint: Path) -> dict[Profile, list[Path]]:
    """Return what averages at a checkpoint can be made of, and its files: what the run stored before it, and its own.

    Raises `OSError` or `ValueError` where the checkpoint is damaged.
    """
    place = checkpoint.resolve()
    parts = {part_of_file(name) for name in read_manifest(checkpoint)["files"]}
    own = {part: width for part in sorted(parts) if (width := width_of(part.removeprefix("ema_")))}
    stored = stored_snapshots(place.parent.parent) if own and place.parent.name == "checkpoints" else {}
    step = step_of(place) or json.loads((checkpoint / STATE).read_bytes())["step"]  # of a folder that was renamed
    before = {profile: [path] for profile, path in stored.items() if profile.step < step}
    return before | {Profile(step, width): files_of(checkpoint, part) for part, width in own.items()}


def fit_to(checkpoint: Path, name: str) -> tuple[dict[Profile, list[Path]], Fit]:
    """Return what the average `name`, a width, is made of at a checkpoint, and how.

    Raises `UserError` about `ema_width`: no such width, nothing to make it of, or too little.
    """
    width = width_of(name)
    wrong = partial(UserError, about="ema_width", value=f"{width:g}")
    if problem := problem_of_width(width):
        raise wrong(problem)
    with named_damage(checkpoint, "model"):
        sources = sources_of(checkpoint)
    if not sources:
        remedy = "train with --average_snapshots, such as 500, or choose one of its averages with --ema."
        raise wrong(f"the run of {checkpoint} stored no averages to make others of: {remedy}")
    stored, step = list(sources), max(profile.step for profile in sources)
    found = fit(stored, Profile(step, width))
    if found.error > WRONG_FIT:
        good = [other for other in SHOWN_WIDTHS if fit(stored, Profile(step, other)).error <= DOUBTFUL_FIT]
        count = len({profile.step for profile in stored})
        rule = f"what is stored of {count} step{'s' * (count > 1)} gives its profile with an error of {found.error:.0%}"
        remedy = f"widths of {good[0]:g} to {good[-1]:g} fit, and a smaller --average_snapshots stores more."
        raise wrong(f"{rule}, too few: {remedy}")
    return sources, found


def load_average(checkpoint: Path, name: str, about: str) -> dict[str, Tensor]:
    """Return the weights of the average `name`, a width, at a checkpoint, float32; one is in memory at a time.

    Errors as of `fit_to`; of files that are damaged, one about the setting `about`. Warns of a doubtful fit.
    """
    sources, found = fit_to(checkpoint, name)
    if found.error > DOUBTFUL_FIT:
        rule = f"the profile of {name} is made of {len(sources)} stored averages with an error of {found.error:.0%}"
        warn(f"{rule}: its weights may differ from a tracked average's; a smaller --average_snapshots stores more.")
    used = [(files, factor) for files, factor in zip(sources.values(), found.factors) if factor]
    if any(files[0].parent == checkpoint for files, _ in used) and (damage := damage_of(checkpoint, parts=())):
        raise UserError(f"is damaged and cannot be read: {damage}: give another.", about=about, value=checkpoint)
    opened = []
    for files, factor in used:
        with named_damage(files[0], about):
            opened.append((files[0], stored_tensors(files), factor))
    weights = {}
    for key in opened[-1][1]:
        total = torch.zeros(opened[-1][1][key].shape, dtype=torch.float64)
        for file, tensors, factor in opened:
            with named_damage(file, about):
                total += factor * tensors[key].whole()
        weights[key] = total.float()
    return weights
