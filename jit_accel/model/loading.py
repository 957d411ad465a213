"""A pipeline from whatever holds one, a folder, a run, a checkpoint or a Hub id; and the defaults of a folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging

from jit_accel.base.errors import UserError, check_places, lookup, message_of, nearest
from jit_accel.base.files import write_text
from jit_accel.config.groups import (
    UNAVERAGED,
    ConditionConfig,
    ModelConfig,
    ObjectiveConfig,
    problem_of_width,
    width_name,
    width_of,
)
from jit_accel.config.presets import AUGMENT_SIZE, Size
from jit_accel.config.run_groups import SheetConfig
from jit_accel.config.settings import Config
from jit_accel.model.call_arguments import DEFAULTS, checked_default
from jit_accel.model.carried_code import INDEX_FILE, json_text
from jit_accel.model.checkpoints import BROKEN, find_checkpoint_in, load_tensors, named_damage, read_run
from jit_accel.model.lora import merged, refuse_other_base
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.saved_weights import only_variant, weights_fingerprint
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.transformer import JiTTransformer2DModel, build_model
from jit_accel.model.width_averages import load_average

PIPELINE_FOLDER = "pipeline"  # in a run's


def build_network(
    model: ModelConfig,
    condition: ConditionConfig,
    img_size: Size,
    vectors: Mapping | None = None,
    has_several_labels: bool = False,
    is_augmented: bool = False,
) -> JiTTransformer2DModel:
    """Return the network of these settings, complete ones, with new weights; `vectors` as of `JiTPipeline`."""
    return build_model(
        model.model,
        img_size,
        model.num_classes,
        in_channels=model.in_channels,
        proj_dropout=model.proj_dropout,
        attn_dropout=model.attn_dropout,
        condition_channels=condition.condition_channels,
        condition_bottleneck=condition.condition_bottleneck,
        condition_inject=condition.condition_inject,
        vector_sizes=list(vectors["sizes"]) if vectors else None,
        has_several_labels=has_several_labels,
        augment_size=AUGMENT_SIZE if is_augmented else None,
    )


def build_pipeline(
    network: JiTTransformer2DModel,
    objective: ObjectiveConfig,
    class_names: list[str] | None,
    sample: SheetConfig,
    vectors: Mapping | None = None,
    value_range: tuple[float, float] | None = None,
) -> JiTPipeline:
    """Return the pipeline of a network that is or was trained with these settings."""
    network.pipeline_settings = {}  # of the pipeline that weights to start from came from
    scheduler = JiTScheduler(objective.prediction, objective.t_eps, objective.noise_scale, path=objective.path)
    own = {"guidance_scale": sample.guidance_scale, "guidance_on": sample.guidance_on}
    own |= {"vectors": vectors, "value_range": value_range, "method": sample.method}
    if sample.method is not None:  # of older runs the steps are those of their sheets alone
        own["num_inference_steps"] = sample.num_inference_steps
    return JiTPipeline(network, scheduler, class_names, **own)


def load_pipeline(
    model: str | os.PathLike,
    ema: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    about: str = "model",
    *,
    ema_width: float | None = None,
) -> JiTPipeline:
    """Load a trained model as a pipeline, on the CPU and ready for inference.

    Args:
        model: a pipeline folder; a run's output folder (its pipeline, or its newest checkpoint); a checkpoint; or
            owner/name of the Hub.
        ema: decay of the averaged weights to take from the checkpoint, such as "0.9999" or "auto", or "model" for the
            weights themselves. None: the weights in the pipeline folder, and of a checkpoint the first average.
        torch_dtype: of the weights; the ODE is float32 always.
        about: the setting that names it, for errors.
        ema_width: relative width, 0.001 or more and below 0.288, of a power-function average (arXiv 2312.02696) that is
            made of what the run stored with `average_snapshots`, in place of `ema`, which takes "width_0.05" as well.

    Raises `UserError`: nothing of that kind is there, it is broken, or it has no such average, nor what to make it of.

    Example:
        >>> pipe = load_pipeline("runs/flowers", ema="0.9999").to("cuda")
        >>> pipe("daisy").images[0].save("daisy.png")
    """
    check_places({about: str(model)})
    ema = average_name(ema, ema_width)
    path, folder = str(model), Path(model).expanduser()
    exported = find_pipeline_in(folder) if ema is None else None
    checkpoint = None if exported else find_checkpoint_in(folder)
    if checkpoint:
        pipeline = pipeline_of_checkpoint(checkpoint, ema, about)
    elif ema is not None:
        rule = f"{path} has no checkpoint to take averages from: give the output folder of a run, or leave "
        rule += "the flag out to use the weights of the pipeline folder."
        raise UserError(rule, **_named(ema))
    elif not exported and (folder.exists() or path.count("/") != 1):
        rule = "holds no pipeline (model_index.json) and no checkpoint: give a pipeline folder, the output folder of a "
        raise UserError(f"{rule}run, or owner/name of the Hub.", about=about, value=path)
    else:
        try:
            variant = only_variant(exported / "transformer") if exported else None
            pipeline = JiTPipeline.from_pretrained(exported or path, variant=variant)
            missing = [name for name, tensor in pipeline.transformer.state_dict().items() if tensor.is_meta]
            if missing:  # diffusers only warns of them
                raise KeyError(f"{len(missing)} weights are missing, such as {missing[0]}")
        except UserError as error:  # of the network, which does not know where it lies
            raise UserError(error.rule, about=about, value=exported or path) from None
        except BROKEN as error:
            rule = f"is no folder here, and cannot be had from the Hub ({_first_line(error)})."
            if exported:
                rule = f"the pipeline cannot be loaded ({_first_line(error)}): get it again, or give another."
            raise UserError(rule, about=about, value=exported or path) from None
    # diffusers warns of modules to keep in float32, of which there are none
    return pipeline if pipeline.dtype == torch_dtype else pipeline.to(torch_dtype)


def average_name(ema: str | None, ema_width: float | None) -> str | None:
    """Return the name of the average that one of two settings says, if any. UserError: both do, or no width is one."""
    if ema_width is None:
        return ema
    if ema is not None:
        rule = f"says which average is taken, as --ema {ema} does: give one of them."
        raise UserError(rule, about="ema_width", value=f"{ema_width:g}")
    if (problem := problem_of_width(ema_width)) is not None:
        raise UserError(problem, about="ema_width", value=f"{ema_width:g}")
    return width_name(ema_width)


def _named(ema: str) -> dict[str, str]:
    """Return the setting that names an average, and its value, as `UserError` takes them."""
    width = width_of(ema)
    return {"about": "ema", "value": ema} if width is None else {"about": "ema_width", "value": f"{width:g}"}


def load_quietly(
    model: str, ema: str | None, device: torch.device, compile: bool, guide: str | None = None
) -> JiTPipeline:
    """Load a pipeline for many batches: on the device, compiled if asked to, with its guide, and without a word."""
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    pipeline = load_pipeline(model, ema).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if compile:
        pipeline.transformer.compile_repeated_blocks()
    if guide is not None:
        try:
            pipeline.guide = load_pipeline(guide, about="guide")
        except ValueError as error:
            raise UserError(str(error).removeprefix("guide: "), about="guide", value=guide) from None
    return pipeline


def find_pipeline_in(folder: Path) -> Path | None:
    """Return the folder itself if it is a pipeline's, else that of the run whose output folder it is."""
    return next((place for place in (folder, folder / PIPELINE_FOLDER) if (place / INDEX_FILE).is_file()), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def averages_of(checkpoint: Path) -> list[str]:
    """Return the names of the averaged weights that a checkpoint holds, the run's first one first."""
    with named_damage(checkpoint, "model"):
        return list(read_run(checkpoint)["settings"]["ema_decays"])


def pipeline_of_checkpoint(checkpoint: Path, ema: str | None = None, about: str = "model") -> JiTPipeline:
    """Return the pipeline of a checkpoint with its averaged weights `ema` (None: the first), or with "model" its own.

    Raises `UserError` about the setting `about` where it has no such weights, or they cannot be read.
    """
    with named_damage(checkpoint, about):
        run = read_run(checkpoint)
        config, choices = Config.of_record(run["settings"]), (*averages_of(checkpoint), UNAVERAGED)
        ema = choices[0] if ema is None else ema
        if width_of(ema) is None and ema not in choices:
            raise UserError(f"{checkpoint} has {', '.join(choices)}.{nearest(ema, choices)}", about="ema", value=ema)
        with torch.device("meta"):
            facts = run.get("vectors"), run.get("has_several_labels", False), config.technique.augment > 0
            network = build_network(config.model, config.condition, config.data.img_size, *facts)
        if width_of(ema) is None:
            weights = load_tensors(checkpoint, UNAVERAGED if ema == UNAVERAGED else f"ema_{ema}", about)
        else:
            weights = load_average(checkpoint, ema, about)
        if config.tune.lora_rank:
            weights = merged(base_of(checkpoint, run), weights, config.tune.lora_alpha / config.tune.lora_rank)
        network.load_state_dict(weights, strict=True, assign=True)
        how = run.get("class_names"), config.sample, run.get("vectors"), config.data.value_range
        return build_pipeline(network.eval(), config.objective, *how)


def base_of(checkpoint: Path, run: dict) -> dict[str, torch.Tensor]:
    """Return the weights that a checkpoint of an adapter stands on. Raises `UserError` if its run's are not there."""
    path = run["settings"]["init_from"]
    try:
        base = load_pipeline(path, about="init_from").transformer.state_dict()
    except UserError as error:
        raise UserError(f"{checkpoint} is an adapter for {message_of(error)}") from None
    if not run["settings"].get("augment"):  # what it adds to a network is nothing, and was left out
        base = {name: tensor for name, tensor in base.items() if not name.startswith("augment_embedder.")}
    refuse_other_base(checkpoint, run, path, weights_fingerprint(base))
    return base


def write_defaults(folder: str | os.PathLike, **settings) -> None:
    """Write what calls of a saved pipeline use that do not say otherwise, whole or not at all.

    Settings are guidance_scale, guidance_interval, num_inference_steps, method and time_shift; None is as if never
    written. Raises `UserError`: the folder is no pipeline, there is no such setting, or its value makes no sense.

    Example:
        >>> write_defaults("output/pipeline", guidance_scale=2.4, guidance_interval=(0.1, 1.0))
    """
    file = Path(folder) / INDEX_FILE
    if not file.is_file():
        raise UserError(f"{folder}: holds no {INDEX_FILE}: give the folder of a saved pipeline.")
    index = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        lookup(DEFAULTS, name, "settings")
        try:
            index[name] = checked_default(name, value)
        except ValueError as error:
            raise UserError(str(error)) from None
    write_text(file, json_text(index))
