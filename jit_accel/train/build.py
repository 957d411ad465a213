"""From settings to a trainer: device, data, resolved configuration, output folder, checkpoint to continue."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from jit_accel.base.console import say, warn
from jit_accel.base.devices import DTYPES, chosen_precision, device_name, is_good_at_bf16
from jit_accel.base.errors import UserError
from jit_accel.base.processes import on_all, on_main, process_group
from jit_accel.config.checks import image_size
from jit_accel.config.completion import Plan, default_output_dir, plan_run, resolve, warnings_for
from jit_accel.config.settings import STREAMING, Config, DataConfig
from jit_accel.data.batches.holdout import HeldOut, split_holdout
from jit_accel.data.batches.workers import cores_per_process
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.model import hub
from jit_accel.model.checkpoints import complete_checkpoints, find_checkpoint, read_run
from jit_accel.model.loading import build_network, build_pipeline
from jit_accel.model.objective import Objective
from jit_accel.monitor.log import METRICS_FILE
from jit_accel.monitor.monitor import Monitor
from jit_accel.monitor.trackers import build_trackers
from jit_accel.train.averages import Ema
from jit_accel.train.feed import Feed
from jit_accel.train.initial_weights import Initial, read_initial, tune
from jit_accel.train.optimizers import build_optimizers, lr_at
from jit_accel.train.record import describe_data
from jit_accel.train.sample_quality import SampleQuality
from jit_accel.train.samples import SampleSheets
from jit_accel.train.state import RunFacts
from jit_accel.train.trainer import Trainer
from jit_accel.train.validation import Validation


def start(config: Config) -> int:
    """Build everything and train. Returns the exit code."""
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("jit_accel").setLevel(logging.ERROR)
    config = expand_paths(config)
    check_output_dir(config)
    config, checkpoint = choose_checkpoint(config)
    accumulation = config.optim.gradient_accumulation_steps or env_int("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)
    precision = chosen_precision(config.performance.mixed_precision)
    accelerator = build_accelerator(config, accumulation, precision)
    with process_group(accelerator):
        if config.hub.push_to_hub:  # found out now, not after days of training
            on_main(accelerator, lambda: hub.check_login(config.hub.hub_model_id))
        # The main process chooses, so that all load the same.
        (checkpoint,) = broadcast_object_list([checkpoint])
        config, initial = read_weights(config, checkpoint, accelerator)
        source, held_out = open_data(config, accelerator)
        trainer = build_trainer(config, source, accelerator, accumulation, precision, held_out, initial)
        with contextlib.closing(trainer.feed):
            if checkpoint:
                trainer.resume(checkpoint)
            elif config.run.resume == "auto":
                trainer.say(f"--resume auto: no checkpoint in {trainer.output_dir} yet, starting anew.")
            if config.run.dry_run:
                return dry_run(trainer)
            exit_code = trainer.run()
        if exit_code == 0 and config.hub.push_to_hub and accelerator.is_main_process:
            hub.share(trainer.output_dir / "pipeline", config.hub)  # last, so that nobody waits for the network
        return exit_code


def expand_paths(config: Config) -> Config:
    output_dir = os.path.expanduser(config.run.output_dir or default_output_dir(config))
    return config.updated(output_dir=output_dir, resume=os.path.expanduser(config.run.resume))


def choose_checkpoint(config: Config) -> tuple[Config, Path | None]:
    """The checkpoint to go on from, if any, and the settings with its averages where the user named none.

    The default averages depend on the length of the run, which may be another one now. What came from the source of
    `--init_from` is the checkpoint's, since the source need not be there any more.
    """
    checkpoint = find_checkpoint(Path(config.run.output_dir), config.run.resume)
    if checkpoint is None:
        return config, None
    saved, given = read_run(checkpoint)["settings"], config.flat()
    names = ("ema_decays", *(("model", "img_size", "noise_scale", "guidance_scale") if config.tune.init_from else ()))
    kept = {name: saved[name] for name in names if given[name] is None}
    if "ema_decays" in kept:
        kept["ema_decays"] = tuple(kept["ema_decays"])
    return config.updated(**kept), checkpoint


def read_weights(config: Config, checkpoint: Path | None, accelerator: Accelerator) -> tuple[Config, Initial | None]:
    """The weights to start from, if they are needed, and the settings with what these leave no choice about.

    Raises:
        UserError: on all processes, whichever met something.
    """
    tune = config.tune
    if tune.init_from is None or (checkpoint and not tune.lora_rank):
        return config, None

    def read() -> tuple[Config, Initial]:
        initial = read_initial(tune.init_from)
        return initial.settled(config), initial

    return on_all(accelerator, read, in_turn=True)


def open_data(config: Config, accelerator: Accelerator) -> tuple[Source, HeldOut | None]:
    """The images to train on, and those held out, if any; the same of both on all processes.

    Raises:
        UserError: on all processes, whichever met something.
    """
    source, held_out = on_all(accelerator, lambda: open_and_split(config, accelerator), in_turn=True)
    num_held_out = len(held_out.keys) if held_out else 0
    counts, identities, held_counts = zip(*gather_object([(source.num_images, source.fingerprint, num_held_out)]))
    if problem := disagreement(config.data, counts, identities):
        raise problem
    if held_out and not sum(held_counts):
        if accelerator.is_main_process:
            warn("no image of the holdout can be read, or none was found: there is no val/loss.")
        held_out = None
    return source, held_out


def open_and_split(config: Config, accelerator: Accelerator) -> tuple[Source, HeldOut | None]:
    data = config.data
    source = open_images(
        data.data_path,
        data_format=data.data_format,
        image_column=data.image_column,
        label_column=data.label_column,
        streaming=STREAMING[data.streaming],
    )
    if not data.holdout:
        return source, None
    return split_holdout(
        source,
        data.holdout,
        max_images=config.run.val_images,
        img_size=image_size(config),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def disagreement(data: DataConfig, counts: tuple[int | None, ...], identities: tuple[str, ...]) -> UserError | None:
    """The error where processes would not train on the same images, of which these are number and fingerprint."""
    found = list(zip(counts, identities))
    other = next((rank for rank, finding in enumerate(found) if finding != found[0]), None)
    if other is None:
        return None
    trained = ", ".join(
        f"process {rank} trains on {'?' if counts[rank] is None else f'{counts[rank]:,}'} ({identities[rank][:8]})"
        for rank in (0, other)
    )
    about, value = ("holdout", f"{data.holdout:g}") if data.holdout else ("data_path", data.data_path)
    return UserError(
        f"the processes do not find the same images ({trained}): make sure that all machines have the same files and "
        "can read all of them, then start again.",
        about=about,
        value=value,
    )


def build_trainer(
    config: Config,
    source: Source,
    accelerator: Accelerator,
    accumulation: int,
    precision: str,
    held_out: HeldOut | None = None,
    initial: Initial | None = None,
) -> Trainer:
    """Resolve the settings against data and devices, say what will happen, and build the trainer."""
    if initial and config.tune.lora_rank:
        initial.labels_for(source)  # of other classes it says so better than `resolve` would
    if initial and source.is_labelled and config.sample.guidance_scale is None:
        config = config.updated(guidance_scale=initial.guidance_scale)
    optim = replace(config.optim, gradient_accumulation_steps=accumulation)
    plan = plan_run(optim, num_images=source.num_images, world_size=accelerator.num_processes)
    config = resolve(
        config,
        plan,
        is_labelled=source.is_labelled,
        data_classes=max(source.num_classes or 0, len(source.class_names)) or None,
        gradient_accumulation_steps=accumulation,
        mixed_precision=precision,
        num_workers=default_num_workers(source) if config.data.num_workers is None else config.data.num_workers,
    )
    if config.optim.optimizer == "muon" and accelerator.distributed_type.value == "FSDP":
        raise UserError(
            "needs whole matrices, which FSDP splits: use --optimizer adamw.", about="optimizer", value="muon"
        )
    if config.optim.optimizer == "muon" and precision == "fp16":
        raise UserError(
            "does not go with --mixed_precision fp16: use bf16 or no, or adamw.", about="optimizer", value="muon"
        )
    trainer = assemble(config, plan, source, accelerator, held_out, initial)
    if accelerator.is_main_process:
        introduce(trainer, config, source)
    return trainer


def assemble(
    config: Config,
    plan: Plan,
    source: Source,
    accelerator: Accelerator,
    held_out: HeldOut | None,
    initial: Initial | None,
) -> Trainer:
    """Build the parts of a run from its resolved settings."""
    optim, run, output_dir = config.optim, config.run, Path(config.run.output_dir)

    def tell(message: str) -> None:
        if accelerator.is_main_process:
            say(message)

    torch.manual_seed(run.seed)  # the same initial weights on every process
    model = build_network(config)
    tuning = tune(model, config.tune, config.objective.noise_scale, source, initial, tell)
    if config.performance.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.performance.compile:
        model.compile_repeated_blocks()
    optimizers = build_optimizers(
        model, optimizer=optim.optimizer, weight_decay=optim.weight_decay, adam_betas=optim.adam_betas
    )
    # Nothing else is prepared: see "Accelerate" in docs/architecture.md.
    model, *optimizers = accelerator.prepare(model, *optimizers)
    network = accelerator.unwrap_model(model)
    averages = Ema(network, optim.ema_decays)
    class_names = [*tuning.class_names, *map(str, range(len(tuning.class_names), config.model.num_classes))]
    pipeline = build_pipeline(network, config, class_names)
    pipeline.set_progress_bar_config(disable=True)
    how = {"seed": run.seed, "num_inference_steps": config.sample.num_inference_steps, "batch_size": optim.batch_size}
    quality = None
    if config.evaluation.eval_every_steps:
        quality = SampleQuality(
            pipeline, averages, accelerator, source, config.evaluation, output_dir=output_dir, **how
        )
    feed = Feed(config, source, accelerator)
    return Trainer(
        accelerator,
        plan,
        run=run,
        sample=config.sample,
        evaluation=config.evaluation,
        facts=RunFacts(
            {
                "world_size": accelerator.num_processes,
                "global_batch_size": plan.global_batch_size,
                "settings": config.recorded(),
                "data": describe_data(source),
                "class_names": class_names,
                "fingerprint": source.fingerprint,
                "base_identity": tuning.base_identity,
            },
            accelerator.is_main_process,
        ),
        model=model,
        optimizers=optimizers,
        averages=averages,
        objective=Objective(**{field.name: getattr(config.objective, field.name) for field in fields(Objective)}),
        learning_rate_at=partial(
            lr_at,
            learning_rate=optim.learning_rate,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
            schedule=optim.lr_schedule,
            min_learning_rate=optim.min_learning_rate,
        ),
        max_grad_norm=optim.max_grad_norm,
        max_bad_images=config.data.max_bad_images,
        tuning=tuning,
        feed=feed,
        monitor=Monitor(
            accelerator,
            feed,
            network,
            averages,
            plan=plan,
            output_dir=output_dir,
            tracking=config.tracking,
            health=config.health,
            log_every_steps=run.log_every_steps,
            precision=config.performance.mixed_precision,
            is_untrained=config.tune.init_from is None,
        ),
        sheets=SampleSheets(pipeline, averages, accelerator, **how),
        validation=Validation(held_out, accelerator, optim.batch_size) if held_out else None,
        quality=quality,
    )


def introduce(trainer: Trainer, config: Config, source: Source) -> None:
    """Say in a few lines what is about to run, and what of it will not work."""
    plan, accelerator = trainer.plan, trainer.accelerator
    parameters = sum(p.numel() for p in trainer.network.parameters())
    trained = sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    adapter = f", {trained:,} of them trained (LoRA of rank {config.tune.lora_rank})" if trained < parameters else ""
    validation = trainer.validation
    held_out = f"; val/loss on {validation.num_images} of those held out" if validation else ""
    epochs = f" ({plan.epoch_of(plan.total_steps):.4g} epochs)" if plan.num_images else ""
    say(
        f"Data:   {describe_data(source)}, {config.data.img_size} px{held_out}\n"
        f"Model:  {config.model.model}, {parameters:,} parameters{adapter}, predicts {config.objective.prediction}, "
        f"loss in {config.objective.loss_space}\n"
        f"Device: {accelerator.num_processes} x {device_name(accelerator.device)}, "
        f"precision {config.performance.mixed_precision}\n"
        f"Run:    {plan.total_steps:,} steps{epochs} of {plan.global_batch_size} images, "
        f"learning rate {config.optim.learning_rate:.3g}, {config.optim.optimizer}, "
        f"ema {' '.join(config.optim.ema_decays)} → {config.run.output_dir}",
    )
    for message in [*warnings_for(config, plan), *data_warnings(source, accelerator.num_processes)]:
        warn(message)
    for message in device_warnings(config, accelerator.device):
        warn(message)


def data_warnings(source: Source, num_processes: int) -> list[str]:
    """What this source cannot promise."""
    if not source.streaming or source.images.sizes is not None or num_processes == 1:
        return []
    return [
        f"{source.name} does not tell how many images its files hold: no image is lost or repeated, also by a resume, "
        "but processes begin a new epoch when their own share is read, so that epochs overlap. Prepared data "
        "(python -m jit_accel.prepare), local files and Parquet have exact epochs."
    ]


def device_warnings(config: Config, device: torch.device) -> list[str]:
    """What makes this device slower than it could be, each with its remedy."""
    found = []
    precision, good_at_bf16 = config.performance.mixed_precision, is_good_at_bf16(device)
    if precision == "no" and good_at_bf16:
        found.append("training in float32; --mixed_precision bf16 is faster on this device.")
    if precision == "bf16" and not good_at_bf16:
        found.append("this device only emulates bf16, up to a hundred times slower: use --mixed_precision no.")
    share = cores_per_process()
    if device.type == "cpu" and "OMP_NUM_THREADS" in os.environ and torch.get_num_threads() < share:
        found.append(
            f"training uses {torch.get_num_threads()} of {share} cores: set OMP_NUM_THREADS={share}, which "
            "`accelerate launch` sets to 1 unless --num_cpu_threads_per_process says otherwise."
        )
    return found


def check_output_dir(config: Config) -> None:
    """Make sure that the run can write, and that it overwrites nobody's work.

    Raises:
        UserError: not writable, or it holds another run.
    """
    folder, resume = Path(config.run.output_dir), config.run.resume
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, say
        raise UserError(
            f"cannot be written to ({error.strerror}): give another.", about="output_dir", value=folder
        ) from None
    held = [
        *(path for path in (folder / METRICS_FILE,) if path.exists() and path.stat().st_size),
        *folder.glob("pipeline/model_index.json"),
        *complete_checkpoints(folder / "checkpoints"),
    ]
    resumed = Path(resume).resolve()
    continues_here = resume == "auto" or (resume != "none" and folder.resolve() in (resumed, *resumed.parents))
    if held and not continues_here:
        raise UserError(
            f"holds another run ({held[-1].relative_to(folder)}): add --resume auto to "
            "continue it, or give another folder.",
            about="output_dir",
            value=folder,
        )
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{existing} is not a folder that can be written to: give another.", about="output_dir", value=folder
        )
    if not config.run.dry_run:
        try:  # the folder itself is made where training begins, after all that may be refused
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise UserError(
                f"cannot be written to ({error.strerror}): give another.", about="output_dir", value=folder
            ) from None


def dry_run(trainer: Trainer) -> int:
    """One forward and backward; nothing is written."""
    loss = trainer.loss(trainer.feed.next()).mean()
    trainer.accelerator.backward(loss)
    trainer.say(f"Dry run: loss {loss.item():.4f} after one forward and backward. Everything is in place.")
    return 0


def build_accelerator(config: Config, accumulation: int, precision: str) -> Accelerator:
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    return Accelerator(
        mixed_precision=precision,
        log_with=build_trackers(config.tracking, Path(config.run.output_dir)) or None,
        # As a plugin: the environment of `accelerate launch` overrides the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        fsdp_plugin=build_fsdp_plugin(precision),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # The others wait while the main process writes a checkpoint of many gigabytes.
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
        ],
    )


def build_fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """FSDP as accelerate's configuration asks for it, but with sums and outputs in float32.

    Accelerate's own policy reduces gradients in bf16 and casts the inputs, and t in bf16 is wrong.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("fsdp_version 1: accelerate's configuration must say fsdp_version: 2 (FSDP2).")
    if precision == "no":
        return FullyShardedDataParallelPlugin()
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[precision],
        reduce_dtype=torch.float32,
        output_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def env_int(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() and int(value) > 0 else default


def default_num_workers(source: Source) -> int:
    """One core of each process's share is left to the training itself; more than eight rarely help.

    Pixels that need no decoding come faster without workers, whose batches travel through shared memory.
    """
    return max(0, min(8, cores_per_process() - 1)) if source.is_encoded else 0
