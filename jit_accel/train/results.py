"""What a `Trainer` leaves at its end: sample sheet, loss curve, pipeline folder, adapter."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.utils import broadcast_object_list

from jit_accel.base.errors import UserError
from jit_accel.model.checkpoints import whole_tensors
from jit_accel.monitor.log import read_metrics
from jit_accel.monitor.report_process import REPORT_FILE
from jit_accel.train.export import draw_loss_curve, export_pipeline, is_export_of


def leave_results(trainer) -> None:
    """Write them, unless an earlier start has, and name them; all processes together.

    Raises:
        UserError: on all processes, where the disk does not take them.
    """
    output_dir = trainer.output_dir
    sheet = output_dir / "samples" / f"step_{trainer.step:08d}.png"
    curve, pipeline_dir = output_dir / "loss_curve.png", output_dir / "pipeline"
    # The main process decides: the others may see another state of a shared file system.
    (is_exported,) = broadcast_object_list([is_export_of(pipeline_dir, sheet)])
    if not is_exported:
        trainer.sample()
        is_main, decay = trainer.accelerator.is_main_process, trainer.config.optim.ema_decays[0]
        weights = whole_tensors(trainer.ema.averages[decay], keep=is_main)
        if adapter := trainer.tuning.adapter:
            _on_main(trainer, lambda: adapter.save(weights, output_dir / "lora"))
            weights = trainer.tuning.plain_weights(trainer.network, weights, is_main)
        pipeline, record = trainer.samples.pipeline(), trainer.record
        _on_main(trainer, lambda: draw_loss_curve(read_metrics(output_dir), curve))
        _on_main(trainer, lambda: export_pipeline(pipeline, weights, pipeline_dir, sheet, record, decay))
    trainer.say(f"Samples:    {sheet}\nLoss curve: {curve}\nPipeline:   {pipeline_dir}")
    if trainer.config.tracking.html_report:
        trainer.say(f"Report:     {output_dir / REPORT_FILE}")
    if bad_images := trainer.feed.all_bad_images():
        trainer.say(f"Skipped {len(bad_images)} images that cannot be decoded:")
        trainer.say("\n".join(f"  {name}" for name in bad_images))


def _on_main(trainer, write: Callable[[], None]) -> None:
    """Write on the main process; where that fails, all end alike."""
    (problem,) = broadcast_object_list([trainer.checkpointer.try_on_writer(write)])
    if problem:
        raise UserError(
            f"cannot be written to ({problem}). The training is complete and its "
            "last checkpoint is saved: make room, and the same command with --resume auto writes the rest.",
            about="output_dir",
            value=trainer.output_dir,
        )
