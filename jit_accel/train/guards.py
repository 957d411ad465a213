"""What must stop a run before it does harm."""

from __future__ import annotations

from pathlib import Path

from jit_accel.base.errors import UserError
from jit_accel.model.checkpoints import find_checkpoint
from jit_accel.monitor.monitor import NotFinite


def stop_if_not_finite(found: NotFinite | None, output_dir: Path) -> None:
    """Raise `UserError` where a metric is not finite."""
    if found is None:
        return
    last = find_checkpoint(output_dir, "auto")
    good = f"the last good checkpoint is {last}" if last else "there is none yet"
    raise UserError(
        f"{found.key} is {found.value} at step {found.step}: training stopped and no checkpoint was overwritten; "
        f"{good}. Lower --learning_rate, set --max_grad_norm 1, or use --mixed_precision bf16 or no, "
        "then go on with --resume auto."
    )


def has_too_many_bad_images(bad_images: int, max_share: float, images_seen: int, num_images: int) -> bool:
    """Whether more than `max_share` of the data cannot be decoded, judged on what was seen or on a whole epoch."""
    return bad_images > max_share * max(images_seen, num_images)
