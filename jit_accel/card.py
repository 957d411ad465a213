"""The model card of a pipeline folder: what it is, how to use it, how good it is, how it was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from jit_accel.config import EvalConfig, HealthConfig, HubConfig, TrackingConfig
from jit_accel.pipeline import JiTPipeline
from jit_accel.redact import redacted

CARD_FILE = "README.md"
CARD_PICTURE = "samples.png"
EVALUATION_FILE = "evaluation.json"
PLACEHOLDER = "path/to/this/folder"  # until the folder has a repository
TAGS = ["jit", "pixel-space-diffusion", "diffusion", "jit_accel"]
BODY = """# {title}

A JiT pixel-space diffusion transformer ([arXiv 2511.13720](https://arxiv.org/abs/2511.13720)){origin}.
{picture}
```python
import torch
from jit_accel import JiTPipeline

pipe = JiTPipeline.from_pretrained("{place}")
image = pipe({example}, generator=torch.Generator().manual_seed(0)).images[0]
image.save("sample.png")
```

Without jit_accel, the folder's own code does: `DiffusionPipeline.from_pretrained("{place}", custom_pipeline="{place}",
trust_remote_code=True)` of diffusers in place of `JiTPipeline.from_pretrained("{place}")`.

Classes: {names}.

<!-- results -->
<!-- /results -->

## {made}

{sentence}

| setting | value |
| --- | --- |
{settings}
"""
# Paths and names of the machine or the team are nobody's business once the folder is shared.
# How a run was watched and shared says nothing about its weights.
LEFT_OUT = (
    *("data_path", "output_dir", "resume", "dry_run", "init_from"),
    *(field.name for group in (EvalConfig, TrackingConfig, HealthConfig, HubConfig) for field in fields(group)),
)
# Settings of an evaluation that belong beside its numbers.
EVALUATION_SETTINGS = (
    *("ema", "guidance_scale", "guidance_interval", "method", "num_inference_steps", "num_images", "features"),
    "reference",
)
MOST_RESULTS = 20


def training_card(pipeline: JiTPipeline, record: Mapping, decay: str) -> str:
    """The card of a training's result.

    Args:
        record: the run's settings and facts.
        decay: name of the moving average that the weights are.
    """
    images = f"{record['num_images']:,}" if record["num_images"] else "streamed"
    data = str(record["data_path"]).rstrip("/").rpartition("/")[2]
    return _card(
        pipeline,
        title=f"{record['model']}, {record['img_size']} px",
        origin=f",\ntrained with jit_accel on {images} images of `{_inline(data)}` for {record['total_steps']:,} steps",
        has_picture=True,
        made="Training",
        sentence=f"Weights: moving average with decay `{decay}`. The samples above: "
        f"guidance {record['guidance_scale']},\nHeun, {record['num_inference_steps']} steps.",
        settings={name: value for name, value in record.items() if name not in LEFT_OUT},
    )


def conversion_card(pipeline: JiTPipeline, name: str, set_name: str, facts: Mapping) -> str:
    """The card of a pipeline whose weights were converted from a checkpoint."""
    config, scheduler = pipeline.transformer.config, pipeline.scheduler.config
    sampling = {"prediction": scheduler.prediction_type, "noise_scale": scheduler.noise_scale, "t_eps": scheduler.t_eps}
    sampling |= {name: pipeline.config[name] for name in ("guidance_scale", "guidance_interval")}
    return _card(
        pipeline,
        title=f"{name}, {config.img_size} px",
        origin="",
        has_picture=False,
        made="Origin",
        sentence=f"Converted with `python -m jit_accel.convert`. Weights: {_inline(set_name)}.",
        settings={**{k: v for k, v in config.items() if not k.startswith("_")}, **sampling, **facts},
    )


def _card(
    pipeline: JiTPipeline, title: str, origin: str, has_picture: bool, made: str, sentence: str, settings: Mapping
) -> str:
    names = pipeline.config.class_names or []
    shown = ", ".join(map(_inline, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    body = BODY.format(
        title=title,
        origin=origin,
        picture=f"\n![samples]({CARD_PICTURE})\n" if has_picture else "",
        place=PLACEHOLDER,
        example=json.dumps(names[:1], ensure_ascii=False) if names else "[0]",
        names=shown or f"{pipeline.transformer.config.num_classes} numbers, without names",
        made=made,
        sentence=sentence,
        settings="\n".join(_rows(settings)),
    )
    data = ModelCardData(library_name="diffusers", pipeline_tag="unconditional-image-generation", tags=TAGS)
    return redacted(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _rows(settings: Mapping) -> Iterable[str]:
    for name, value in settings.items():
        # Whatever has a slash may be a path, but for the model's name.
        if value is not None and (name == "model" or not {"/", "\\"} & set(str(value))):
            yield f"| {name} | {_inline(value)} |"


def _inline(value) -> str:
    """Text that stays inside its line and its cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def refresh_card(folder: Path, repo_id: str | None = None) -> None:
    """Bring the card of a pipeline folder up to date: results of `evaluation.json`, and its repository's name.

    What people have written into it stays. A folder without a card gets one.

    Raises:
        ValueError: its front matter is not YAML.
        OSError: it cannot be read or written.
    """
    path = folder / CARD_FILE
    card = ModelCard(path.read_text(encoding="utf-8") if path.exists() else _bare_card(folder))
    text = card.text
    if repo_id:
        text = re.sub(r'((?:Pipeline\.from_pretrained\(|custom_pipeline=)")[^"]*(")', rf"\g<1>{repo_id}\g<2>", text)
    records = read_evaluations(folder / EVALUATION_FILE)
    if records:
        block = f"<!-- results -->\n{results_table(records)}\n<!-- /results -->"
        marked = re.compile(r"<!-- results -->.*?<!-- /results -->", re.DOTALL)
        text = marked.sub(lambda _: block, text) if marked.search(text) else f"{text.rstrip()}\n\n{block}\n"
        card.data.model_name = repo_id.partition("/")[2] if repo_id else card.data.model_name or "JiT"
        card.data.eval_results = evaluation_results(records) or None
    if (folder / CARD_PICTURE).exists() and CARD_PICTURE not in text:
        text = text.replace("\n```python", f"\n![samples]({CARD_PICTURE})\n\n```python", 1)
    card.text = text
    if not path.exists() or card.content != path.read_text(encoding="utf-8"):
        path.write_text(card.content, encoding="utf-8")


def _bare_card(folder: Path) -> str:
    """A card for a folder that came without one, from its configuration files alone."""
    network = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("class_names") or []
    names = [names[number] for number in sorted(names, key=int)] if isinstance(names, dict) else names
    data = ModelCardData(library_name="diffusers", pipeline_tag="unconditional-image-generation", tags=TAGS)
    body = BODY.format(
        title=f"JiT, {network['img_size']} px",
        origin="",
        picture="",
        place=PLACEHOLDER,
        example=json.dumps(names[:1], ensure_ascii=False) if names else "[0]",
        names=", ".join(map(_inline, names[:20])) or f"{network['num_classes']} numbers, without names",
        made="Network",
        sentence="Its configuration:",
        settings="\n".join(_rows({k: v for k, v in network.items() if not k.startswith("_")})),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def read_evaluations(path: Path) -> list[dict]:
    """The records of an `evaluation.json`, the newest last; what is not one of them is passed over."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    records = records if isinstance(records, list) else [records]
    kept = []
    for record in records:
        if isinstance(record, dict) and isinstance(record.get("metrics"), dict):
            settings = record.get("settings")  # beside the numbers, or in a mapping of their own
            numbers = {str(k): v for k, v in record["metrics"].items() if _is_number(v)}
            one = {"metrics": numbers, "settings": settings if isinstance(settings, dict) else record}
            kept += [one] if numbers else []
    return kept[-MOST_RESULTS:]


def forget_places(path: Path) -> None:
    """Leave of absolute paths in a JSON file only the last part: where something was is nobody's business."""

    def forgotten(value):
        if isinstance(value, dict):
            return {name: forgotten(part) for name, part in value.items()}
        if isinstance(value, list):
            return [forgotten(part) for part in value]
        is_place = isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]", value)
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_place else value

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if forgotten(content) != content:
        temporary = path.with_name(f"tmp_{path.name}")
        temporary.write_text(json.dumps(forgotten(content), indent=1, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _evaluation_settings(settings: Mapping) -> dict[str, str]:
    """What belongs beside the numbers; of paths only the last part."""
    shown = {name: settings[name] for name in EVALUATION_SETTINGS if settings.get(name) is not None}
    shown = {name: " to ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for name, v in shown.items()}
    return {name: redacted(value).rstrip("/").rpartition("/")[2] for name, value in shown.items()}


def results_table(records: list[dict]) -> str:
    """The evaluations as a section of the card, one row each."""
    settings = [_evaluation_settings(record["settings"]) for record in records]
    columns = [name for name in EVALUATION_SETTINGS if any(name in row for row in settings)]
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    lines = [columns + metrics, ["---"] * (len(columns) + len(metrics))]
    for record, row in zip(records, settings):
        numbers = [f"{record['metrics'][name]:.5g}" if name in record["metrics"] else "" for name in metrics]
        lines.append([_inline(row.get(name, "")) for name in columns] + numbers)
    return "## Results\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def evaluation_results(records: list[dict]) -> list[EvalResult]:
    """The Fréchet distances, as the Hub's `model-index` wants them."""
    found = []
    for record in records:
        settings = _evaluation_settings(record["settings"])
        reference = settings.get("reference", "unknown")
        details = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "reference")
        for name, value in record["metrics"].items():
            if re.search(r"fid|fr[eé]chet|(?:^|_)fd(?:_|$)", name, re.IGNORECASE):
                found.append(
                    EvalResult(
                        task_type="unconditional-image-generation",
                        dataset_type=re.sub(r"[^\w.-]+", "-", reference) or "unknown",
                        dataset_name=reference or "unknown",
                        metric_type=name,
                        metric_value=value,
                        metric_name=f"{name} ({details})" if details else name,
                    )
                )
    return found
