"""`--equal time`: how many steps of each setting last as long as the base's, by short runs on this machine."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from jit_accel.base.console import say
from jit_accel.base.errors import UserError
from jit_accel.compare.experiment import Experiment, median_step_s
from jit_accel.compare.settings import Arm
from jit_accel.config.completion import Facts, plan_run
from jit_accel.config.groups import OptimConfig
from jit_accel.report.runs import read_settings

ROUNDS = 2  # in turn, so that a machine that becomes slower meanwhile does so for all
LEAST_LOGGED = 20  # times of steps that a round logs


def settle_lengths(
    experiment: Experiment, arms: Sequence[Arm], time_steps: int, train: Callable[[str, list[str], Path], None]
) -> None:
    """Measure the steps of the base and of the settings whose length is not known yet, and save their lengths.

    train: trains in a folder by flags; its first argument says of what. Raises what that raises, `UserError`
    where a run has logged no times, and `OSError`.
    """
    base = arms[0]
    unknown = [arm for arm in arms[1:] if arm.name not in experiment.lengths]
    if not unknown:
        return
    place = experiment.folder / "timing"
    folders = {arm.name: [place / arm.name / f"round{number}" for number in range(ROUNDS)] for arm in (base, *unknown)}
    for number in range(ROUNDS):
        for arm in (base, *unknown):
            folder = folders[arm.name][number]
            train(f"{arm.name}, {time_steps} steps for their time", _flags_of_timing(arm, time_steps, folder), folder)
    base_steps = base.recorded["max_steps"] or _steps_of_epochs(base, folders[base.name][0])
    times = {name: _step_s(name, these) for name, these in folders.items()}
    for arm in unknown:
        steps = max(1, round(base_steps * times[base.name] / times[arm.name]))
        found = {"steps": steps, "step_s": times[arm.name], "base_step_s": times[base.name]}
        experiment.lengths[arm.name] = found
        say(
            f"{arm.name}: {steps:,} steps of {times[arm.name]:.3g} s last as long as {base_steps:,} of {base.name}, "
            f"{times[base.name]:.3g} s each."
        )
    experiment.save()
    shutil.rmtree(place, ignore_errors=True)


def _flags_of_timing(arm: Arm, time_steps: int, folder: Path) -> list[str]:
    never = dict.fromkeys(("save_every_steps", "sample_every_steps", "val_every_steps", "eval_every_steps"), 0)
    quiet = {"use_wandb": "false", "report_to": "none", "html_report": "false", "num_inference_steps": 1}
    often = max(1, time_steps // LEAST_LOGGED)
    more = {"max_steps": time_steps, "log_every_steps": often, "seed": 0, "resume": "auto", "output_dir": folder}
    return arm.flags(**never, **quiet, **more)


def _step_s(name: str, folders: Sequence[Path]) -> float:
    step_s = median_step_s(*folders)
    if step_s is None:
        raise UserError(f"{name}: its short runs have logged no times of steps: give more --time_steps.")
    return step_s


def _steps_of_epochs(base: Arm, folder: Path) -> int:
    """Return the steps of the base's epochs, by the data and the batch of its short run."""
    record = read_settings(folder)
    try:
        images, batch = int(record["num_images"]), int(record["global_batch_size"])
    except (KeyError, TypeError, ValueError):
        raise UserError("how many steps its epochs have is not known here: give --max_steps.", about="epochs") from None
    optim = OptimConfig(batch_size=batch, epochs=base.recorded["epochs"])
    return plan_run(optim, Facts(num_images=images)).total_steps
