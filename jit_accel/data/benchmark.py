"""How fast the data path is here, by stage and in all, and how many GPUs that feeds.

python -m jit_accel.data.benchmark --data_path photos --model JiT-B/16
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jit_accel.base.errors import UserError, message_of
from jit_accel.config.presets import forward_macs, parse_model_name
from jit_accel.config.settings import STREAMING

if TYPE_CHECKING:
    from jit_accel.data.batches.stages import EndToEnd, Stages
    from jit_accel.data.formats.source import Source

# Images/s of JiT-B/16 at 256 px, bf16 and compiled, on one H100; other models by their arithmetic.
REFERENCE_MODEL, REFERENCE_SIZE, REFERENCE_RATE = "JiT-B/16", 256, 2600
GPU_COUNTS = (1, 8)


def main(argv: list[str] | None = None) -> int:
    """Measure as the command line says, print the result. Returns the exit code: 0 done, 2 something to mend."""
    args = parse_args(argv)
    try:
        check(args)
        report = measure(args)
    except UserError as error:
        print(f"error: {message_of(error)}", file=sys.stderr, flush=True)
        return 2
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jit_accel.data.benchmark",
        description="How fast images are read, decoded and brought to the device, and how many GPUs that feeds.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data_path", required=True, help="as in training")
    add("--data_format", default="auto", help="as in training")
    add("--image_column", help="as in training")
    add("--label_column", help="as in training")
    add("--streaming", choices=STREAMING, default="auto", help="as in training")
    add("--img_size", type=int, default=256, help="side of the images in pixels (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="images a batch (default: %(default)s)")
    add("--model", default=REFERENCE_MODEL, help="the model to be fed (default: %(default)s)")
    add(
        "--num_workers", type=int, help="measure this number of workers only (default: 0, 1, 2, 4, ... up to the cores)"
    )
    add("--seconds", type=float, default=10.0, help="for each stage and number of workers (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file as well")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail only after the measurement.

    Raises:
        UserError: a value out of range, a model that does not go with the image size, a file that cannot be written.
    """
    from jit_accel.config.presets import parse_model_name

    _, patch_size = parse_model_name(args.model)
    for name, least in (("img_size", 1), ("batch_size", 1), ("num_workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"must be at least {least}.", about=name, value=value)
    if not 0 < args.seconds < math.inf:
        raise UserError("must be more than 0.", about="seconds", value=f"{args.seconds:g}")
    if args.img_size % patch_size:
        near = max(1, round(args.img_size / patch_size)) * patch_size
        raise UserError(
            f"must be a multiple of the patch size {patch_size} ({args.model}): use {near}.",
            about="img_size",
            value=args.img_size,
        )
    if args.json is not None:
        try:
            args.json.touch()
        except OSError as error:
            raise UserError(
                f"cannot be written ({error.strerror}): give another file.", about="json", value=args.json
            ) from None


def measure(args: argparse.Namespace) -> dict:
    """Measure and print. Returns all figures."""
    import torch

    from jit_accel.base.devices import chosen_device
    from jit_accel.data.batches.stages import measure_loader, measure_stages
    from jit_accel.data.batches.workers import num_cores
    from jit_accel.data.formats.sources import open_images

    torch.set_num_threads(1)
    device, cores = chosen_device(), num_cores()
    how = {"img_size": args.img_size, "batch_size": args.batch_size, "device": device, "seconds": args.seconds}
    source = open_images(
        args.data_path,
        data_format=args.data_format,
        image_column=args.image_column,
        label_column=args.label_column,
        streaming=STREAMING[args.streaming],
    )
    count = "" if source.num_images is None else f", {source.num_images:,} images"
    say(f"Data: {source.name} ({source.format}{count}), {args.img_size} px, page cache as it happens to be\n")
    stages = measure_stages(source, **how)
    print_stages(stages, device)
    say(f"\n{'workers':>9} {'images/s':>9}   whole loader, batches of {args.batch_size}")
    runs = []
    for num_workers in worker_counts(cores) if args.num_workers is None else [args.num_workers]:
        runs.append(measure_loader(source, num_workers, **how))
        say(f"{num_workers:9} {runs[-1].images_per_s:9,.0f}")
    print_memory(runs[-1])
    need = images_per_s_needed(args.model, args.img_size)
    say(
        f"\n{args.model} at {args.img_size} px takes about {need:,.0f} images/s on an H100: an estimate by its "
        f"arithmetic, from the {REFERENCE_RATE:,} of {REFERENCE_MODEL} at {REFERENCE_SIZE} px."
    )
    verdicts = {gpus: verdict(gpus, need, runs, cores) for gpus in GPU_COUNTS}
    for text, _ in verdicts.values():
        say(text)
    if not all(suffices for _, suffices in verdicts.values()):
        say(f"What helps: {remedy(source, args.data_path, cores)}")
    return {
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "device": str(device),
        "cores": cores,
        "num_images": source.num_images,
        "stages_images_per_s": stages.rates,
        "bytes_per_image": stages.bytes_per_image,
        "loader": [asdict(run) for run in runs],
        "needed_images_per_s_per_gpu": need,
        "verdicts": {gpus: text for gpus, (text, _) in verdicts.items()},
    }


def say(text: str) -> None:
    print(text, flush=True)


def worker_counts(cores: int) -> list[int]:
    """0, 1, 2, 4, ... and all cores."""
    return sorted({0, cores, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)})


def print_stages(stages: Stages, device) -> None:
    say(f"{'one core':>9} {'images/s':>9}")
    for name, rate in stages.rates.items():
        note = f"   {rate * stages.bytes_per_image / 1e6:,.0f} MB/s" if name == "read" else ""
        say(f"{name:>9} {rate:9,.0f}{note}")
    if "to device" not in stages.rates:
        say(f"{'to device':>9} {'–':>9}   the device is this {device.type.upper()}")
    say(f"{'all':>9} {stages.together:9,.0f}   one after the other")
    if stages.bad_images:
        say(f"{stages.bad_images} images of the sample cannot be decoded")


def print_memory(run: EndToEnd) -> None:
    if run.memory_start_gib is not None and run.memory_end_gib is not None:
        say(
            f"\nMemory of the largest of {run.num_workers} workers: {run.memory_start_gib:.2f} GiB at the start, "
            f"{run.memory_end_gib:.2f} GiB after {run.images:,} images of all (shared and file pages not counted)"
        )


def images_per_s_needed(model: str, img_size: int) -> float:
    """What one H100 trains a second, from the matrix products of the model and of one that was measured."""
    return REFERENCE_RATE * _macs(REFERENCE_MODEL, REFERENCE_SIZE) / _macs(model, img_size)


def _macs(model: str, img_size: int) -> int:
    preset, patch_size = parse_model_name(model)
    return forward_macs(preset, patch_size, img_size, img_size)


def verdict(gpus: int, need_each: float, runs: list[EndToEnd], cores: int) -> tuple[str, bool]:
    """What the measured loaders mean for so many GPUs fed by this machine, and whether they suffice.

    Each GPU's process has its own workers: those of all of them share the cores.
    """
    need = gpus * need_each
    text = f"{gpus} GPU{'s need' if gpus > 1 else ' needs'} {need:,.0f} images/s: "
    fitting = [run.num_workers for run in runs if run.images_per_s >= need]
    if fitting:
        workers = math.ceil(min(fitting) / gpus)
        return f"{text}--num_workers {workers} suffices.", True
    best = max(run.images_per_s for run in runs)
    per_core = max(run.images_per_s / max(1, run.num_workers) for run in runs)
    return (
        f"{text}the data path of this machine ({cores} cores) reaches {best:,.0f} and limits the training to "
        f"{best / need:.0%}; about {math.ceil(need / per_core):,} cores would do."
    ), False


def remedy(source: Source, data_path: str, cores: int) -> str:
    from jit_accel.data.batches.waiting import waiting_advice

    return waiting_advice(
        data_path,
        num_workers=cores,
        cores=cores,
        is_remote=getattr(source.images, "is_remote", False),
        is_encoded=source.is_encoded,
        is_prepared=source.format == "prepared",
    )


if __name__ == "__main__":
    sys.exit(main())
