"""The model card of a pipeline folder: what it is, how to use it, how good it is, how it was made."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from jit_accel.base.console import redacted
from jit_accel.base.files import write_text
from jit_accel.config.groups import UNAVERAGED, width_of
from jit_accel.config.presets import in_pixels
from jit_accel.config.run_groups import EvalConfig, HealthConfig, HubConfig, TrackingConfig
from jit_accel.model.call_arguments import checked_names, is_number
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.vector_arguments import usual_row

CARD_FILE = "README.md"
CARD_PICTURE = "samples.png"
EVALUATION_FILE = "evaluation.json"
PLACEHOLDER = "path/to/this/folder"  # until the folder has a repository
UNNAMED = "JiT"  # the model's name in its results until then
IN_USE = re.compile(r"<!-- use -->.*?<!-- /use -->", re.DOTALL)
RESULTS = re.compile(r"<!-- results -->.*?<!-- /results -->", re.DOTALL)
PLACE = re.compile(r'((?:Pipeline\.from_pretrained\(|custom_pipeline=)")([^"]*)(")')
TAGS = ["jit", "pixel-space-diffusion", "diffusion", "jit_accel"]
BODY = """# {title}

A JiT pixel-space diffusion transformer ([arXiv 2511.13720](https://arxiv.org/abs/2511.13720)){origin}.
{picture}
<!-- use -->
```python
import torch
from jit_accel import JiTPipeline
{imports}
pipe = JiTPipeline.from_pretrained("{place}")
image = pipe({example}, generator=torch.Generator().manual_seed(0)).images[0]
{save}
```

Without jit_accel, the folder's own code does: `DiffusionPipeline.from_pretrained("{place}", custom_pipeline="{place}",
trust_remote_code=True)` of diffusers in place of `JiTPipeline.from_pretrained("{place}")`.
<!-- /use -->

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
    *("ema", "guidance_scale", "guidance_interval", "guide", "method", "num_inference_steps", "time_shift"),
    *("num_images", "features"),
    *("reference", "pairs", "condition_from", "scored"),
)
# Values under these keys are places, whatever they look like: only their last part is shown.
PLACES = ("model", "guide", "images", "reference", "pairs", "feature_weights", "make_reference", "output")
MOST_RESULTS = 20
FRECHET = re.compile(r"fid|fr[eé]chet|(?:^|_)fd(?:_|$)", re.IGNORECASE)
LOW, HIGH = "_low", "_high"  # behind a metric's name: the ends of its interval
TASK = "unconditional-image-generation"


def training_card(pipeline: JiTPipeline, record: Mapping, decay: str) -> str:
    """Return the card of a training's result, by its settings and facts and the name of its moving average."""
    images = f"{record['num_images']:,}" if record["num_images"] else "streamed"
    data = str(record["data_path"]).rstrip("/").rpartition("/")[2]
    return _card(
        pipeline.transformer.config,
        pipeline.config,
        title=f"{record['model']}, {in_pixels(record['img_size'])} px",
        origin=f",\ntrained with jit_accel on {images} images of `{_inline(data)}` for {record['total_steps']:,} steps",
        picture=f"\n![samples]({CARD_PICTURE})\n",
        made="Training",
        sentence=f"Weights: {weights_in_words(decay)}. The samples above: "
        f"guidance {record['guidance_scale']},\n{record.get('method') or 'heun'}, "
        f"{record['num_inference_steps']} steps.",
        settings={name: value for name, value in record.items() if name not in LEFT_OUT},
    )


def weights_in_words(average: str) -> str:
    """Return what the weights of a name are: a decay's, a width's, or the unaveraged ones."""
    if width := width_of(average):
        return f"power-function average of relative width {width:g}"
    return "those of the last step" if average == UNAVERAGED else f"moving average with decay `{average}`"


def conversion_card(pipeline: JiTPipeline, name: str, set_name: str, facts: Mapping) -> str:
    """Return the card of a pipeline whose weights were converted from a checkpoint."""
    config, objective = pipeline.transformer.config, pipeline.config.objective
    sampling = {"prediction": objective["prediction_type"]}
    sampling |= {name: objective[name] for name in ("noise_scale", "t_eps")}
    sampling |= {name: pipeline.config[name] for name in ("guidance_scale", "guidance_interval")}
    return _card(
        config,
        pipeline.config,
        title=f"{name}, {in_pixels(config.img_size)} px",
        made="Origin",
        sentence=f"Converted with `python -m jit_accel.convert`. Weights: {_inline(set_name)}.",
        settings={**{k: v for k, v in config.items() if not k.startswith("_")}, **sampling, **facts},
    )


def _bare_card(folder: Path) -> str:
    """Return a card for a folder that came without one, from its configuration files alone."""
    network = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    return _card(
        network,
        json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")),
        title=f"JiT, {in_pixels(network['img_size'])} px",
        made="Network",
        sentence="Its configuration:",
        settings={name: value for name, value in network.items() if not name.startswith("_")},
    )


def _card(network: Mapping, own: Mapping, *, settings: Mapping, **texts: str) -> str:
    """Return a card from the configurations of network and pipeline, and the texts of `BODY` that are not the same for
    all.
    """
    num_classes, names = network["num_classes"], checked_names(own.get("class_names"), network["num_classes"]) or []
    shown = ", ".join(map(_inline, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    numbers = f"{num_classes} numbers, without names" if num_classes else "none"
    example = json.dumps(names[:1] or [0], ensure_ascii=False) if num_classes else "[None]"
    imports = ""
    if network.get("condition_channels"):
        imports, example = "from PIL import Image\n", f'{example}, condition_image=Image.open("condition.png")'
    if columns := own.get("vectors"):
        example += f", vectors={json.dumps(usual_row(columns), ensure_ascii=False)}"
    save = 'image.save("sample.png")'
    if network.get("in_channels", 3) not in (1, 3) or own.get(
        "value_range"
    ):  # arrays, in the data's units if it has any
        imports, example = f"import numpy as np\n{imports}", f'{example}, output_type="np"'
        save = 'np.save("sample.npy", image)'
    # Whatever has a slash may be a path, but for the model's name.
    rows = [
        f"| {name} | {_inline(value)} |"
        for name, value in settings.items()
        if value is not None and (name == "model" or not {"/", "\\"} & set(str(value)))
    ]
    texts = {"origin": "", "picture": "", **texts, "settings": "\n".join(rows)}
    body = BODY.format(place=PLACEHOLDER, imports=imports, example=example, save=save, names=shown or numbers, **texts)
    data = ModelCardData(library_name="diffusers", pipeline_tag=TASK, tags=TAGS)
    return redacted(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _inline(value) -> str:
    """Return text that stays inside its line and its cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def refresh_card(folder: Path, repo_id: str | None = None) -> None:
    """Bring the card of a pipeline folder up to date: results of `evaluation.json`, and its repository's name.

    What people have written into it stays. A folder without a card gets one. Raises `ValueError` where its front matter
    is not YAML, and `OSError`.
    """
    path = folder / CARD_FILE
    before = path.read_text(encoding="utf-8") if path.exists() else None
    card = ModelCard(_bare_card(folder) if before is None else before)
    text, named = card.text, {None, UNNAMED}
    if repo_id:  # only in the card's own lines on how to use the model; what people wrote elsewhere is theirs
        places = [match[2] for block in IN_USE.finditer(text) for match in PLACE.finditer(block[0])]
        named |= {place.rpartition("/")[2] for place in places}
        text = IN_USE.sub(lambda block: PLACE.sub(lambda match: f"{match[1]}{repo_id}{match[3]}", block[0]), text)
    records = read_evaluations(folder / EVALUATION_FILE)
    if records:
        block = f"<!-- results -->\n{results_table(records)}\n<!-- /results -->"
        text = RESULTS.sub(lambda _: block, text) if RESULTS.search(text) else f"{text.rstrip()}\n\n{block}\n"
        if card.data.model_name in named:  # and not a name that somebody has chosen
            card.data.model_name = repo_id.rpartition("/")[2] if repo_id else UNNAMED
        others = [result for result in card.data.eval_results or () if not _is_ours(result)]
        card.data.eval_results = [*others, *evaluation_results(records)] or None
    if (folder / CARD_PICTURE).exists() and CARD_PICTURE not in text:
        text = text.replace("\n<!-- use -->", f"\n![samples]({CARD_PICTURE})\n\n<!-- use -->", 1)
    card.text = text
    if card.content != before:
        write_text(path, card.content)


def read_evaluations(path: Path) -> list[tuple[dict[str, str], dict[str, float]]]:
    """Return settings and numbers of each record of an `evaluation.json`, the newest last; what is none is left out."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    kept = []
    for record in records if isinstance(records, list) else [records]:
        is_wanted = isinstance(record, dict) and record.get("on_card", True)
        if is_wanted and isinstance(record.get("metrics"), dict):
            numbers = {str(k): v for k, v in record["metrics"].items() if is_number(v)}
            settings = record.get("settings")  # beside the numbers, or in a mapping of their own
            settings = settings if isinstance(settings, dict) else record
            shown = {name: settings[name] for name in EVALUATION_SETTINGS if settings.get(name) is not None}
            if shown.get("time_shift") == 1:  # equal steps, as they all were before
                del shown["time_shift"]
            for name, value in shown.items():
                shown[name] = " to ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            kept += [(without_places(shown), numbers)] if numbers else []
    return kept[-MOST_RESULTS:]


def without_places(value, name: str = ""):
    """Return a JSON value without secrets, and with only the last part of each place: the rest is nobody's business.

    `name` is the key that the value stands under.
    """
    if isinstance(value, dict):
        return {name: without_places(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [without_places(part, name) for part in value]
    if not isinstance(value, str):
        return value
    text = redacted(value)
    if name not in PLACES and not re.match(r"[/~\\]|[A-Za-z]:[/\\]", value):
        return text
    bare = re.split(r"[?#]", text)[0] if "://" in value else text
    return re.split(r"[/\\]", bare.rstrip("/\\"))[-1]


def results_table(records: list[tuple[dict, dict]]) -> str:
    """Return the evaluations as a section of the card, one row each."""
    columns = [name for name in EVALUATION_SETTINGS if any(name in settings for settings, _ in records)]
    metrics = list(dict.fromkeys(name for _, numbers in records for name in numbers if not name.endswith((LOW, HIGH))))
    lines = [columns + metrics, ["---"] * (len(columns) + len(metrics))]
    for settings, numbers in records:
        shown = [f"{numbers[name]:.5g}{interval_of(numbers, name)}" if name in numbers else "" for name in metrics]
        lines.append([_inline(settings.get(name, "")) for name in columns] + shown)
    return "## Results\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval_of(found: Mapping[str, float], name: str) -> str:
    """Return the interval of a metric in words; "" where there is none."""
    ends = [found.get(name + end) for end in (LOW, HIGH)]
    return "" if None in ends else " [{:.5g}, {:.5g}]".format(*ends)


def evaluation_results(records: list[tuple[dict, dict]]) -> Iterator[EvalResult]:
    """Yield the Fréchet distances as the Hub's `model-index` wants them."""
    for settings, numbers in records:
        reference = settings.get("reference") or "unknown"
        details = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "reference")
        for name in numbers:
            if not FRECHET.search(name) or name.endswith((LOW, HIGH)):
                continue
            yield EvalResult(
                task_type=TASK,
                dataset_type=re.sub(r"[^\w.-]+", "-", reference),
                dataset_name=reference,
                metric_type=name,
                metric_value=numbers[name],
                metric_name=f"{name} ({details})" if details else name,
            )


def _is_ours(result: EvalResult) -> bool:
    """Return whether `evaluation_results` made it; what people have added to the card stays there."""
    kind, name = result.metric_type, result.metric_name or ""
    return result.task_type == TASK and (name == kind or name.startswith(f"{kind} (")) and bool(FRECHET.search(kind))
