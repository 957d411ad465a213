"""The errors that stop a run before it does harm."""

from __future__ import annotations

from pathlib import Path

from jit_accel.base.errors import UserError
from jit_accel.monitor.monitor import NotFinite


def not_finite_error(found: NotFinite, last: Path | None) -> UserError:
    """Return the error for a metric that is not finite, where `last` is the last checkpoint, if any."""
    good = f"the last good checkpoint is {last}" if last else "there is none yet"
    return UserError(
        f"{found.key} is {found.value} at step {found.step}: training stopped and no checkpoint was overwritten; "
        f"{good}.",
        remedy="Lower --learning_rate, set --max_grad_norm 1, or use --mixed_precision bf16 or no, then go on with "
        "--resume auto.",
    )


def bad_images_error(count: int, max_share: float, names: list[str]) -> UserError:
    """Return the error for more broken images than the share of the data that may be, all of which have these names."""
    return UserError(
        f"{count} images cannot be decoded, more than that share; the first: {'; '.join(names[:3])}.",
        about="max_bad_images",
        value=f"{max_share:g}",
        remedy="Repair or remove them, or raise the share; the run is saved and goes on with --resume auto.",
    )
