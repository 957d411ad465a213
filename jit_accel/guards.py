"""What must stop a run before it does harm."""

from __future__ import annotations

import math
from pathlib import Path

from jit_accel.checkpoint import find_checkpoint
from jit_accel.errors import UserError

# Before this many images a share of them says little.
MIN_IMAGES_JUDGED = 1000


def stop_if_not_finite(rows: list[dict], keys: tuple[str, ...], output_dir: Path) -> None:
    """Raise `UserError` at the first of these metrics that is infinite or not a number."""
    for row in rows:
        for key in keys:
            if not math.isfinite(row[key]):
                last = find_checkpoint(output_dir, "auto")
                good = f"the last good checkpoint is {last}" if last else "there is none yet"
                raise UserError(
                    f"{key} is {row[key]} at step {row['step']}: training stopped and no checkpoint was overwritten; "
                    f"{good}. Lower --learning_rate, set --max_grad_norm 1, or use --mixed_precision bf16 or no, "
                    "then go on with --resume auto."
                )


def has_too_many_bad_images(bad_images: int, max_share: float, images_seen: int, num_images: int | None) -> bool:
    """Whether more than `max_share` of the data cannot be decoded, judged on what was seen or on a whole epoch."""
    return bad_images > max_share * max(images_seen, num_images or MIN_IMAGES_JUDGED)
