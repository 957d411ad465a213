"""A pipeline from whatever holds one: a pipeline folder, a run, a checkpoint, a Hub id."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from jit_accel.base.errors import UserError, message_of, nearest
from jit_accel.config.settings import UNAVERAGED, Config
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.checkpoints import complete_checkpoints, is_complete, read_run
from jit_accel.model.lora import identity_of, merged, refuse_other_base
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.transformer import JiTTransformer2DModel, build_model

# What diffusers, safetensors and torch make of folders that are broken, cut off or of other sizes than they say.
BROKEN = (OSError, ValueError, SafetensorError, KeyError, TypeError, AttributeError, RuntimeError)


def build_network(config: Config) -> JiTTransformer2DModel:
    """The network of these (resolved) settings, with new weights."""
    return build_model(
        config.model.model,
        img_size=config.data.img_size,
        num_classes=config.model.num_classes,
        proj_dropout=config.model.proj_dropout,
        attn_dropout=config.model.attn_dropout,
    )


def build_pipeline(network: JiTTransformer2DModel, config: Config, class_names) -> JiTPipeline:
    """The pipeline of a network that is or was trained with these (resolved) settings."""
    objective = config.objective
    scheduler = JiTScheduler(
        prediction_type=objective.prediction, t_eps=objective.t_eps, noise_scale=objective.noise_scale
    )
    return JiTPipeline(
        transformer=network,
        scheduler=scheduler,
        class_names=class_names,
        guidance_scale=config.sample.guidance_scale,
    )


def load_pipeline(
    path: str, ema: str | None = None, torch_dtype: torch.dtype = torch.float32, about: str = "model"
) -> JiTPipeline:
    """Load a pipeline on the CPU.

    Args:
        path: a pipeline folder; a run's output folder (its pipeline, or its newest checkpoint); a checkpoint; a Hub id.
        ema: decay of the averaged weights to take from the checkpoint, or "model" for the weights themselves.
            None: what is in the pipeline folder, and of a checkpoint the first average.
        about: the setting that names the path, for errors.

    Raises:
        UserError: nothing of that kind is there, or it has no such average.
    """
    folder = Path(path).expanduser()
    if ema is None:
        for candidate in (folder, folder / "pipeline"):
            if (candidate / INDEX_FILE).is_file():
                return _cast(load_folder(candidate, about), torch_dtype)
    if checkpoint := find_checkpoint_in(folder):
        return _cast(pipeline_of_checkpoint(checkpoint, ema, about), torch_dtype)
    if ema is not None:
        raise UserError(
            f"{path} has no checkpoint to take averages from: give the output folder of a run, or leave "
            "the flag out to use the weights of the pipeline folder.",
            about="ema",
            value=ema,
        )
    if folder.exists() or path.count("/") != 1:
        raise UserError(
            "holds no pipeline (model_index.json) and no checkpoint: give a pipeline folder, the output folder of a "
            "run, or owner/name of the Hub.",
            about=about,
            value=path,
        )
    try:
        return _cast(JiTPipeline.from_pretrained(path), torch_dtype)
    except BROKEN as error:
        raise UserError(
            f"is no folder here, and cannot be had from the Hub ({_first(error)}).", about=about, value=path
        ) from None


def load_folder(folder: Path, about: str = "model") -> JiTPipeline:
    """The pipeline in a folder that has a `model_index.json`.

    Raises:
        UserError: it is broken.
    """
    try:
        pipeline = JiTPipeline.from_pretrained(folder)
        missing = [name for name, tensor in pipeline.transformer.state_dict().items() if tensor.is_meta]
        if missing:  # diffusers only warns of them
            raise KeyError(f"{len(missing)} weights are missing, such as {missing[0]}")
    except BROKEN as error:
        raise UserError(
            f"the pipeline cannot be loaded ({_first(error)}): get it again, or give another.",
            about=about,
            value=folder,
        ) from None
    return pipeline


def _first(error: Exception) -> str:
    """The first line of an error that others have written, which may go on for pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def _cast(pipeline: JiTPipeline, dtype: torch.dtype) -> JiTPipeline:
    # diffusers warns of modules to keep in float32, of which there are none
    return pipeline if pipeline.dtype == dtype else pipeline.to(dtype)


def find_checkpoint_in(folder: Path) -> Path | None:
    """The folder itself if it is a checkpoint, else the newest of the run whose output folder it is."""
    if is_complete(folder):
        return folder
    found = complete_checkpoints(folder / "checkpoints")
    return found[-1] if found else None


def averages_of(checkpoint: Path) -> list[str]:
    """Names of the averaged weights that a checkpoint holds, the run's first one first."""
    return list(read_run(checkpoint)["settings"]["ema_decays"])


def pipeline_of_checkpoint(checkpoint: Path, ema: str | None = None, about: str = "model") -> JiTPipeline:
    """The pipeline of a checkpoint with its averaged weights `ema` (None: the first), or with "model" its own.

    Raises:
        UserError: it has no such weights, or they cannot be read; `about` is the setting that names the checkpoint.
    """
    run = read_run(checkpoint)
    config = Config.of_record(run["settings"])
    averages = averages_of(checkpoint)
    ema = averages[0] if ema is None else ema
    if ema not in (UNAVERAGED, *averages):
        choices = (*averages, UNAVERAGED)
        raise UserError(f"{checkpoint} has {', '.join(choices)}.{nearest(ema, choices)}", about="ema", value=ema)
    with torch.device("meta"):
        network = build_network(config)
    stem = UNAVERAGED if ema == UNAVERAGED else f"ema_{ema}"
    file = checkpoint / f"{stem}.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot be read ({_first(error)}): give another checkpoint.", about=about, value=file
        ) from None
    if config.tune.lora_rank:
        weights = merged(base_of(checkpoint, run), weights, config.tune.lora_alpha / config.tune.lora_rank)
    network.load_state_dict(weights, strict=True, assign=True)
    return build_pipeline(network.eval(), config, run.get("class_names"))


def base_of(checkpoint: Path, run: dict) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint of an adapter stands on, from where its run had them.

    Raises:
        UserError: they are not there any more, or others.
    """
    path = run["settings"]["init_from"]
    try:
        base = load_pipeline(path, about="init_from").transformer.state_dict()
    except UserError as error:
        raise UserError(f"{checkpoint} is an adapter for {message_of(error)}") from None
    refuse_other_base(checkpoint, run, path, identity_of(base))
    return base
