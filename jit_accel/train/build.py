"""From settings to a trainer: device, data, resolved configuration, output folder, checkpoint to continue."""

import contextlib
import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from jit_accel.base.console import say, warn
from jit_accel.base.devices import device_name, has_bf16, kind_of
from jit_accel.base.errors import StopRequest, UserError
from jit_accel.base.folder_lock import FolderLock
from jit_accel.base.host import denormals_flushed, keep_heap
from jit_accel.base.processes import SharedStop, end_with_launcher, grace_s, on_all, on_main, process_group
from jit_accel.base.watchdog import Watchdog
from jit_accel.config.checks import image_size
from jit_accel.config.completion import complete, rate_in_words, started
from jit_accel.config.facts import Facts, Plan
from jit_accel.config.identity import experiment_of, in_folder, is_named, run_folder
from jit_accel.config.presets import in_pixels, parse_model_name, sides_of
from jit_accel.config.settings import Config
from jit_accel.data.batches.degradations import Degradation, check_size, degradation_of
from jit_accel.data.batches.holdout import HeldOut
from jit_accel.data.batches.order import default_lanes
from jit_accel.data.batches.workers import cores_per_process
from jit_accel.data.formats.sources import Source
from jit_accel.model import hub
from jit_accel.model.checkpoints import find_checkpoint, read_run, sound_checkpoint
from jit_accel.model.loading import PIPELINE_FOLDER, build_network, build_pipeline
from jit_accel.model.objective import Objective
from jit_accel.model.precision import BlockTimes, BlockWork, settle_accelerator
from jit_accel.model.transformer import JiTTransformer2DModel
from jit_accel.monitor.log import leave_failure, read_failure
from jit_accel.monitor.monitor import Monitor
from jit_accel.monitor.trackers import build_trackers
from jit_accel.train.accelerator import asked_of_dynamo, build_accelerator, settle_buckets
from jit_accel.train.averages import Ema
from jit_accel.train.examples import choose_examples
from jit_accel.train.feed import Feed, Validation, open_data
from jit_accel.train.further_losses import build_aux_losses
from jit_accel.train.initial_weights import Initial, Tuning, read_initial, tune
from jit_accel.train.optimizers import build_optimizers, make_moments
from jit_accel.train.output_folder import check_output_dir, choose_folder, release
from jit_accel.train.pair_quality import PairQuality
from jit_accel.train.results import describe_data
from jit_accel.train.samples import SampleMeasure, SampleQuality, SampleSheets
from jit_accel.train.state import RunFacts
from jit_accel.train.trainer import Trainer


def start(config: Config, source: Source | None = None, objective: type[Objective] | None = None) -> int:
    """Build everything and train. Returns the exit code. Arguments as of `fit`."""
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("jit_accel").setLevel(logging.ERROR)
    folder, resume = Path(run_folder(config)), os.path.expanduser(config.run.resume)
    check_output_dir(folder, resume, config.data.data_path)
    find_checkpoint(folder, resume)  # one that is not there is found out before all else
    grace_s()  # which may be no number
    end_with_launcher()
    trackers = build_trackers(config.tracking, folder)
    how = config.performance.mixed_precision, config.optim.gradient_accumulation_steps, trackers
    limit_s = 60 * config.run.max_stall_minutes
    keep_heap()
    with (
        denormals_flushed(),  # before gloo starts its threads, which add up gradients
        contextlib.ExitStack() as held,
        process_group(build_accelerator(*how, limit_s)) as accelerator,
    ):
        held.callback(release, folder)
        check_world(accelerator.num_processes)
        # The main process chooses, so that all load the same.
        (output_dir,) = broadcast_object_list([str(folder)])
        config = in_folder(config, output_dir)
        with Watchdog(accelerator, limit_s) as watch:
            if config.hub.push_to_hub:  # found out now, not after days of training
                on_main(accelerator, lambda: hub.check_login(config.hub.hub_model_id))
            if not config.run.dry_run:
                hold(Path(output_dir), accelerator, held, watch)
            exit_code = _train(config, accelerator, watch, source, objective or Objective)
        if exit_code == 0 and config.hub.push_to_hub and accelerator.is_main_process:
            hub.share(folder / PIPELINE_FOLDER, config.hub)  # last, so that nobody waits for the network
        return exit_code


def hold(output_dir: Path, accelerator: Accelerator, held: contextlib.ExitStack, watch: Watchdog) -> None:
    """Hold the run's folder for all processes until `held` is closed. `UserError`: it is another's, or not shared."""
    lock = FolderLock(output_dir)
    lock.on_write = watch.go_on
    on_main(accelerator, lambda: held.enter_context(lock.held()))
    (token,) = broadcast_object_list([lock.token])
    on_all(accelerator, lambda: held.enter_context(lock.shared(token)))
    earlier = read_failure(output_dir)

    def leave(reason: str) -> None:
        if accelerator.is_main_process or read_failure(output_dir) in (None, earlier):  # the main one knows more
            leave_failure(output_dir, reason)

    watch.output_dir, watch.leave = output_dir, leave


def _train(
    config: Config, accelerator: Accelerator, watch: Watchdog, source: Source | None, objective: type[Objective]
) -> int:
    """Build the run and train, or try two steps. Returns the exit code."""
    folder, is_dry = Path(config.run.output_dir), config.run.dry_run
    resume = os.path.expanduser(config.run.resume)
    checkpoint = sound_checkpoint(accelerator, folder, resume, may_rename=not is_dry)
    trainer = build_trainer(config, accelerator, watch, checkpoint, source, objective)
    with contextlib.closing(trainer.feed):
        if checkpoint:
            on_all(accelerator, lambda: trainer.resume(checkpoint))
        elif resume == "auto":
            trainer.say(f"--resume auto: no checkpoint in {folder} yet, starting anew.")
        if is_dry:
            return trainer.dry_run()
        trainer.look_ahead()
        return trainer.run()


def check_world(num_processes: int) -> None:
    """Raise `UserError` where a launcher started several processes, and Accelerate takes each for a run of its own."""
    world = os.environ.get("WORLD_SIZE", "1") if "LOCAL_RANK" in os.environ else "1"
    if num_processes == 1 and world != "1":
        raise UserError(
            f"{world} processes were started, which know nothing of each other and would write into one folder: "
            "without a GPU for each set ACCELERATE_USE_CPU=true, or start one process."
        )


def placed(config: Config) -> Config:
    """Return the settings with the run's folder, which for a run without a name depends on those that are there."""
    folder = Path(run_folder(config))
    if not is_named(config):
        folder = choose_folder(folder, os.path.expanduser(config.run.resume), experiment_of(config))
    return in_folder(config, folder)


def build_trainer(
    config: Config,
    accelerator: Accelerator,
    watch: Watchdog,
    checkpoint: Path | None = None,
    source: Source | None = None,
    objective: type[Objective] = Objective,
) -> Trainer:
    """Open data and weights, complete the settings, build the run; a process's `UserError` is raised on all of them."""
    initial, tuning, device = None, config.tune, accelerator.device
    if tuning.init_from is not None and (checkpoint is None or tuning.lora_rank):
        initial = on_all(accelerator, lambda: read_initial(tuning.init_from), in_turn=True)
    run = read_run(checkpoint) if checkpoint else {}
    saved = run.get("settings", {})
    weights = initial.start if initial else None
    known = started(config, saved, weights)
    how = {"img_size": image_size(known), "val_images": config.run.val_images, "in_channels": known.model.in_channels}
    how["standards"] = initial and initial.pipeline.config.vectors
    source, held_out = open_data(config.data, config.condition, accelerator=accelerator, given=source, begun=run, **how)
    if initial and tuning.lora_rank:
        initial.labels_for(source)  # of other classes it says so better than `complete` would
    times = settle_precision(known, accelerator, saved if run.get("device") in (None, kind_of(device)) else {})
    degradation = degradation_to_learn(known)
    num_units = int(np.count_nonzero(source.images.sizes)) if source.streaming else 0
    is_limited = device.type == "cpu" and "OMP_NUM_THREADS" in os.environ
    facts = Facts(
        num_images=source.num_images,
        num_classes=max(source.num_classes or 0, len(source.class_names)) or None,
        is_labelled=source.is_labelled,
        condition_channels=degradation.channels(config.model.in_channels) if degradation else source.condition_channels,
        has_vectors=source.vectors is not None,
        has_scores=find_spec("torchmetrics") is not None,
        value_range=source.pixels.value_range,
        is_encoded=source.is_encoded,
        processes=accelerator.num_processes,
        accumulation=accelerator.gradient_accumulation_steps,
        precision=accelerator.mixed_precision,
        has_bf16=has_bf16(device),
        is_good_at_bf16=times.faster == "bf16" if times else device.type != "cpu" and has_bf16(device),
        lanes=default_lanes(num_units, accelerator.num_processes, config.optim.batch_size) if num_units else None,
        cores=cores_per_process(),
        threads=torch.get_num_threads() if is_limited else None,
        saved=saved,
        start=weights,
    )
    given = config
    config, plan, warnings = complete(given, facts)
    trainer = assemble(config, plan, source, accelerator, watch, held_out, initial, objective, experiment_of(given))
    if accelerator.is_main_process:
        if trainer.tuning.notes:
            say(trainer.tuning.notes)
        validated = trainer.validation.num_images if trainer.validation else 0
        rate = rate_in_words(given, config, plan, is_resumed=bool(saved))
        introduce(config, plan, source, accelerator, trainer.network, validated, rate, times)
        for message in warnings:
            warn(message)
    return trainer


def degradation_to_learn(config: Config) -> Degradation | None:
    """Return what makes the conditions of these settings. UserError where it makes none of such images."""
    if config.condition.condition_from is None:
        return None
    degradation = degradation_of(config.condition.condition_from)
    check_size(degradation, sides_of(image_size(config)))
    return degradation


def settle_precision(config: Config, accelerator: Accelerator, before: Mapping[str, Any]) -> BlockTimes | None:
    """Let a CPU compute as is asked for, else as the run did `before`, else in what is faster; return the times."""
    (preset, patch_size), size = parse_model_name(config.model.model), image_size(config)
    work = BlockWork.of(preset, patch_size, *sides_of(size), config.optim.batch_size, trains=True)
    kept = before.get("mixed_precision")
    return settle_accelerator(accelerator, config.performance.mixed_precision, work, kept)


def assemble(
    config: Config,
    plan: Plan,
    source: Source,
    accelerator: Accelerator,
    watch: Watchdog,
    held_out: HeldOut | None,
    initial: Initial | None,
    objective: type[Objective],
    experiment: str,
) -> Trainer:
    """Build the parts of a run from its resolved settings."""
    run = config.run
    model, tuning = build_model(config, source, initial)
    # Nothing else is prepared: see "Accelerate" in docs/architecture.md.
    optimizers = build_optimizers(model, config.optim, torch.distributed.group.WORLD)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    make_moments(optimizers)
    settle_buckets(model, config.optim.batch_size, accelerator)
    network = accelerator.unwrap_model(model)
    averages = Ema(network, config.optim.ema_decays, config.optim.tracked_widths)
    class_names = [*tuning.class_names, *map(str, range(len(tuning.class_names), config.model.num_classes))]
    kept = source.vector_record, config.data.value_range
    pipeline = build_pipeline(network, config.objective, class_names, config.sample, *kept)
    pipeline.set_progress_bar_config(disable=True)
    how = {"seed": run.seed, "batch_size": config.optim.batch_size}
    stop = StopRequest()
    stops = SharedStop(accelerator, stop)
    sampled = {"pipeline": pipeline, "averages": averages, "accelerator": accelerator, "settings": config.sample, **how}
    sampled["stops"] = stops
    made_from = config.condition.condition_from
    examples = choose_examples(source, held_out, config.data.img_size, made_from, tuning.labels_of)
    feed = Feed(config.data, made_from, source, accelerator, config.technique, network.config, **how)
    validation = Validation(held_out, accelerator, config.optim.batch_size, made_from) if held_out else None
    measures = build_measures(config, source, validation, tuning, sampled)
    shown = {"tracking": config.tracking, "health": config.health, "log_every_steps": run.log_every_steps}
    monitor = Monitor(
        accelerator,
        feed,
        network,
        averages,
        plan=plan,
        output_dir=Path(run.output_dir),
        **shown,
        precision=config.performance.mixed_precision,
        is_untrained=config.tune.init_from is None,
    )
    stops.on_look = watch.go_on
    return Trainer(
        accelerator=accelerator,
        plan=plan,
        settings=run,
        optim=config.optim,
        facts=RunFacts.of(config.recorded(), plan, source, accelerator, class_names, tuning.adapter, experiment),
        model=model,
        optimizers=optimizers,
        averages=averages,
        objective=objective(**vars(config.objective), no_class=network.config.num_classes),
        aux=build_aux_losses(config.aux, config.objective, plan.total_steps, accelerator, run.seed, network),
        tuning=tuning,
        feed=feed,
        monitor=monitor,
        stop=stop,
        stops=stops,
        watch=watch,
        sheets=SampleSheets(**sampled, examples=examples),
        validation=validation,
        measures=measures,
    )


def build_measures(
    config: Config, source: Source, validation: Validation | None, tuning: Tuning, sampled: dict[str, Any]
) -> dict[str, SampleMeasure]:
    """Return what is measured of samples on the way, by the names of the occasions."""
    wanted, found = config.evaluation, {}
    sampled = {**sampled, "output_dir": Path(config.run.output_dir)}
    if wanted.eval_every_steps:
        found["evaluate"] = SampleQuality(wanted, source, every=wanted.eval_every_steps, **sampled)
    if wanted.paired_every_steps and validation:
        known = validation.held_out, validation.degradation, source.vectors, tuning.labels_of
        found["score"] = PairQuality(*known, wanted.paired_images, every=wanted.paired_every_steps, **sampled)
    return found


def build_model(config: Config, source: Source, initial: Initial | None) -> tuple[JiTTransformer2DModel, Tuning]:
    """Return the network with its first weights, the same on every process, and how it stands to those of `initial`."""
    torch.manual_seed(config.run.seed)
    facts = source.vector_record, source.most_labels is not None, config.technique.augment > 0
    model = build_network(config.model, config.condition, config.data.img_size, *facts)
    tuning = tune(model, config.tune, config.objective.noise_scale, source, initial)
    if config.performance.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    settings = asked_of_dynamo()
    if config.performance.compile or settings:
        model.compile_repeated_blocks(**settings)
    return model, tuning


def introduce(
    config: Config,
    plan: Plan,
    source: Source,
    accelerator: Accelerator,
    network: torch.nn.Module,
    validated: int,
    rate: str,
    times: BlockTimes | None,
) -> None:
    """Say in a few lines what is about to run: with a loss of `validated` images held out, and `rate` in words.

    times: those that the precision was chosen by.
    """
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    adapter = f", {trained:,} of them trained (LoRA of rank {config.tune.lora_rank})" if trained < parameters else ""
    held_out = f"; val/loss on {validated} of those held out" if validated else ""
    why = f" ({times.in_words()})" if times else ""
    say(
        f"Data:   {describe_data(source)}, {in_pixels(config.data.img_size)} px{held_out}\n"
        f"Model:  {config.model.model}, {parameters:,} parameters{adapter}, predicts {config.objective.prediction}, "
        f"loss in {' and '.join((config.objective.loss_space, *config.aux.aux_loss))}\n"
        f"Device: {accelerator.num_processes} x {device_name(accelerator.device)}, "
        f"precision {config.performance.mixed_precision}{why}\n"
        f"Run:    {plan.total_steps:,} steps ({plan.epoch_of(plan.total_steps):.4g} epochs) of "
        f"{plan.global_batch_size} images, "
        f"learning rate {rate} after {plan.warmup_steps:,} steps of warm-up, {config.optim.optimizer}, "
        f"ema {' '.join(config.optim.ema_decays)} → {config.run.output_dir}",
    )
