"""JiT on one page: the paper's training (arXiv 2511.13720) in plain torch, with the public names of jit_accel.

    python examples/train_on_one_page.py photos --img_size 64 --patch_size 8 --steps 5000

The network sees a noised image z = t x + (1 - t) e and predicts the clean image x; the loss compares velocities.
`python -m jit_accel.train` takes the same steps (a test compares their losses) and adds what a long training needs:
several GPUs, mixed precision, checkpoints, a holdout, curves, and a word about whatever goes wrong.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch

import jit_accel as jit

T_EPS = 0.05  # 1 / (1 - t) diverges as t -> 1 (Table 9 of the paper)


def build_network(img_size: int, patch_size: int, num_classes: int) -> jit.JiTTransformer2DModel:
    """Return a JiT-Ti with new weights; the paper's JiT-B has 12 blocks, 768 channels, 12 heads, bottleneck 128."""
    return jit.JiTTransformer2DModel(
        img_size=img_size,
        patch_size=patch_size,
        hidden_size=192,
        depth=4,
        num_heads=3,
        bottleneck_dim=64,  # a patch passes through so few channels on its way in
        in_context_len=4,  # copies of the class embedding, put before the patches ...
        in_context_start=1,  # ... of the second block
        num_classes=num_classes,
    )


def learning_rate_at(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Return the rate of step number `step` (from 0): a linear warm-up, then a cosine down to 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def velocity_loss(network, x: torch.Tensor, t: torch.Tensor, e: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the losses (B,) of clean images x (B, 3, H, W) in [-1, 1], times t (B,) and noise e like x."""
    time = t.view(-1, 1, 1, 1)
    z = time * x + (1 - time) * e
    x_predicted = network(z, t, labels).sample
    # Both velocities are (x - z) / (1 - t): of the clean image, and of the predicted one.
    until_clean = (1 - time).clamp_min(T_EPS)
    v_predicted, v = (x_predicted - z) / until_clean, (x - z) / until_clean
    return (v_predicted - v).square().mean(dim=(1, 2, 3))


def train(
    network,
    batches,
    *,
    steps: int,
    warmup_steps: int,
    learning_rate: float,
    noise_scale: float = 1.0,
    label_drop_prob: float = 0.1,
    seed: int = 0,
) -> Iterator[float]:
    """Train the network, and yield each step's loss; at the end the network has the average of its weights.

    Time, noise and the dropped label of an image follow from the seed and from the image's position in the run alone.
    """
    draws = jit.Objective(noise_scale=noise_scale, label_drop_prob=label_drop_prob, P_mean=-0.8, P_std=0.8)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    weights = [p.detach() for p in network.parameters()]
    average = [weight.clone() for weight in weights]
    network.train()
    for step in range(steps):
        batch = next(batches)
        x, positions = batch.images, batch.positions
        t = draws.times(seed, positions).to(x.device)  # logit-normal: sigmoid(P_std n + P_mean)
        e = draws.noise(seed, positions, like=x)  # N(0, noise_scale^2)
        labels = draws.dropped(seed, positions, batch.labels, network.config.num_classes)  # for guidance

        loss = velocity_loss(network, x, t, e, labels).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, warmup_steps, learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        # An average with a memory of a tenth of the run so far (arXiv 2312.02696); the paper has 0.9999 and others.
        decay = min(0.9999, max(0.0, 1 - 10 / (step + 1)))
        torch._foreach_lerp_(average, weights, 1 - decay)
        yield loss.item()
    torch._foreach_copy_(weights, average)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_path", help="images: a folder of class folders, Parquet files, a Hub id, ...")
    parser.add_argument("--img_size", type=int, default=64)
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--output", default="one_page", help="folder of the pipeline")
    args = parser.parse_args()

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    source = jit.open_images(args.data_path)
    batches = jit.batches(source, img_size=args.img_size, batch_size=args.batch_size, seed=0, device=device)
    torch.manual_seed(0)
    network = build_network(args.img_size, args.patch_size, source.num_classes).to(device)
    losses = train(network, batches, steps=args.steps, warmup_steps=args.steps // 10, learning_rate=args.learning_rate)
    for step, loss in enumerate(losses, start=1):
        if step % 100 == 0 or step == args.steps:
            print(f"step {step:,}: loss {loss:.4f}", flush=True)

    pipe = jit.JiTPipeline(network.eval(), jit.JiTScheduler(), class_names=list(source.class_names) or None)
    pipe.save_pretrained(args.output)
    labels = list(range(min(8, source.num_classes)))
    for number, image in enumerate(pipe(labels, guidance_scale=2.0, num_inference_steps=50).images):
        image.save(f"{args.output}/sample_{number}.png")


if __name__ == "__main__":
    main()
