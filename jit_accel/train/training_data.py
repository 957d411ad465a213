"""The images to train on, and those held out, the same on all processes."""

from accelerate import Accelerator
from accelerate.utils import gather_object

from jit_accel.base.console import warn
from jit_accel.base.errors import UserError
from jit_accel.base.processes import on_all
from jit_accel.config.settings import STREAMING, DataConfig
from jit_accel.data.batches.holdout import HeldOut, split_holdout
from jit_accel.data.formats.sources import Source, open_images


def open_data(
    data: DataConfig, *, img_size: int, val_images: int, accelerator: Accelerator, given: Source | None = None
) -> tuple[Source, HeldOut | None]:
    """Open the images to train on, unless they are given, and at most `val_images` held out; on all processes the same.

    Raises:
        UserError: on all processes, whichever raised it.
    """

    def open_and_split() -> tuple[Source, HeldOut | None]:
        source = given or open_images(
            data.data_path,
            data_format=data.data_format,
            image_column=data.image_column,
            label_column=data.label_column,
            streaming=STREAMING[data.streaming],
        )
        if not data.holdout:
            return source, None
        share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        return split_holdout(source, data.holdout, max_images=val_images, img_size=img_size, **share)

    source, held_out = on_all(accelerator, open_and_split, in_turn=True)
    counts = gather_object([len(held_out.keys) if held_out else 0])
    if held_out and not sum(counts):
        if accelerator.is_main_process:
            warn("no image of the holdout can be read, or none was found: there is no val/loss.")
        held_out = None
    found = gather_object([(source.num_images, source.fingerprint)])
    other = next((rank for rank, finding in enumerate(found) if finding != found[0]), None)
    if other is None:
        return source, held_out
    ranks = (0, other)
    trained = ", ".join(f"process {rank} trains on {found[rank][0]:,} ({found[rank][1][:8]})" for rank in ranks)
    about, value = ("holdout", f"{data.holdout:g}") if data.holdout else ("data_path", data.data_path)
    raise UserError(
        f"the processes do not find the same images ({trained}): make sure that all machines have the same files and "
        "can read all of them, then start again.",
        about=about,
        value=value,
    )
