"""What an evaluation costs beside making the images and looking at them with the feature network.

    python benchmarks/evaluation.py --reference builtin:fashion_mnist
    python benchmarks/evaluation.py --reference photos --model JiT-B/16 --img_size 256 --features inception

The network is untrained, which costs the same. Bookkeeping is all else: float64 sums while images are made, and the
formulas at the end, whose cost does not grow with the number of images once that reaches --max_features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

from jit_accel.base.devices import chosen_precision
from jit_accel.evaluate.evaluator import Evaluator
from jit_accel.evaluate.features import FeatureNetwork, load_features
from jit_accel.evaluate.settings import chosen_metrics
from jit_accel.evaluate.statistics import Collector
from jit_accel.model.generation import SamplerSettings
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.precision import BlockWork, settle_accelerator
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.transformer import build_model


def clocked(owner: type, name: str, part: str, seconds: dict[str, float]) -> None:
    """Add the time of every call of a method to `seconds[part]`."""
    method: Callable = getattr(owner, name)

    def timed(*args, **kwargs):
        start = time.perf_counter()
        result = method(*args, **kwargs)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds[part] += time.perf_counter() - start
        return result

    setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--model", default="JiT-Ti/7")
    parser.add_argument("--img_size", type=int, default=28)
    parser.add_argument("--features", default="efficientnet_lite0")
    parser.add_argument("--feature_weights")
    parser.add_argument("--metrics", nargs="*", default=[])
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--max_features", type=int, default=10_000)
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision=chosen_precision() or "no")
    network = load_features(args.features, accelerator.device, args.feature_weights)
    metrics = chosen_metrics(args.features, tuple(args.metrics))
    evaluator = Evaluator(network, accelerator, metrics, max_features=args.max_features)
    evaluator.show_progress = True
    reference = evaluator.load_reference(args.reference, args.img_size)
    transformer = build_model(args.model, img_size=args.img_size, num_classes=10).eval().to(accelerator.device)
    sizes, side = transformer.config, args.img_size
    work = BlockWork.of(sizes, sizes.patch_size, side, side, evaluator.batch_size, trains=False)
    settle_accelerator(accelerator, None, work)
    pipeline = JiTPipeline(transformer, JiTScheduler(noise_scale=1.0))
    pipeline.set_progress_bar_config(disable=True)
    seconds = dict.fromkeys(("images", "features", "sums", "formulas"), 0.0)
    clocked(FeatureNetwork, "__call__", "features", seconds)
    clocked(Collector, "add", "sums", seconds)
    clocked(Collector, "finish", "sums", seconds)
    clocked(Evaluator, "compare", "formulas", seconds)
    start = time.perf_counter()
    found = evaluator.measure_pipeline(
        pipeline, reference, args.num_images, SamplerSettings(args.num_inference_steps, args.guidance_scale)
    )
    seconds["images"] = time.perf_counter() - start - sum(seconds.values())
    print(f"{args.model}, {args.img_size} px, {args.num_images:,} images; {', '.join(found)}")
    for part, value in seconds.items():
        print(f"  {part:9} {value:8.2f} s  {value / seconds['images']:7.2%} of generation")
    print(f"  bookkeeping {(seconds['sums'] + seconds['formulas']) / seconds['images']:.2%} of generation")


if __name__ == "__main__":
    main()
