"""What a checkpoint holds of a `Trainer`: all that its next steps follow from."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from jit_accel.base.console import warn
from jit_accel.model.checkpoints import (
    load_optimizer_tensors,
    load_tensors,
    optimizer_tensors,
    read_state,
    refuse_other_run,
)
from jit_accel.model.lora import refuse_other_base
from jit_accel.train.record import WITHOUT_EFFECT, changed_settings, describe_data


def trained_weights(trainer) -> dict[str, Tensor]:
    """All of the network, or only the adapter where one is trained."""
    return {name: weight for name, weight in trainer.network.state_dict().items() if name in trainer.ema.params}


def save_state(trainer) -> Path:
    """Write a checkpoint of this step, all processes together. Returns its path.

    Raises:
        UserError: on all processes, where the disk does not take it.
    """
    averages = {f"ema_{decay}": average for decay, average in trainer.ema.averages.items()}
    optimizer = optimizer_tensors(trainer.network, trainer.optimizers)
    tensors = {"model": trained_weights(trainer), **averages, "optimizer": optimizer}
    scaler = trainer.accelerator.scaler
    state = {
        **trainer.feed.state(),
        "monitor": trainer.monitor.state_dict(),
        "world_size": trainer.accelerator.num_processes,
        "global_batch_size": trainer.plan.global_batch_size,
        "scaler": scaler.state_dict() if scaler else None,
        "settings": trainer.config.recorded(),
        "data": describe_data(trainer.source),
        "class_names": trainer.samples.class_names,
        "fingerprint": trainer.source.fingerprint,
        "base_identity": trainer.tuning.base_identity,
    }
    return trainer.checkpointer.save(trainer.step, tensors, state)


def resume_state(trainer, path: Path) -> None:
    """Continue exactly where the checkpoint was written.

    Raises:
        UserError: it belongs to another model, size, data set or seed.
    """
    state, settings, plan = read_state(path), trainer.config.recorded(), trainer.plan
    refuse_other_run(path, state, settings, describe_data(trainer.source), trainer.source.fingerprint)
    if trainer.tuning.adapter:
        refuse_other_base(path, state, trainer.config.tune.init_from, trainer.tuning.base_identity)
    load_tensors(path, "model", trained_weights(trainer))
    for decay, average in trainer.ema.averages.items():
        load_tensors(path, f"ema_{decay}", average)
    load_optimizer_tensors(path, trainer.network, trainer.optimizers)
    if trainer.accelerator.scaler and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.feed.load_state(state)
    trainer.step = state["step"]
    images_seen = trainer.step * plan.global_batch_size
    trainer.monitor.load_state_dict(state.get("monitor") or {"epochs": {"images_seen": images_seen}, "health": None})
    if state["global_batch_size"] != plan.global_batch_size and trainer.accelerator.is_main_process:
        warn(
            f"the global batch was {state['global_batch_size']} images and is now {plan.global_batch_size}: "
            "--epochs and the learning rate's schedule count as if the whole run had the new one."
        )
    changed = changed_settings(state["settings"], settings)
    trainer.is_other_training = bool(changed_settings(state["settings"], settings, WITHOUT_EFFECT))
    trainer.say(f"Resumed from {path} at step {trainer.step:,}" + (f" with {changed}" if changed else ""))
