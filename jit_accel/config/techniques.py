"""Techniques for better training: what does not go together, and what they are not made for."""

from collections.abc import Iterator
from types import SimpleNamespace

from jit_accel.base.errors import UserError
from jit_accel.config.groups import DECAY_FRACTION, TechniqueConfig

MANY_TOKENS = 256  # with fewer, leading some past the blocks was not tried by its authors


def contradictions_of_techniques(s: SimpleNamespace) -> Iterator[tuple[str, str]]:
    """Yield the setting to blame, and the rule with the remedy, for each way in which settings do not fit together."""
    if any(loss.startswith("contrastive") for loss in s.aux_loss):
        if s.loss_space != "v":
            yield (
                "aux_loss",
                f"contrastive is subtracted from an error of velocities, not of {s.loss_space}: use --loss_space v.",
            )
        if s.batch_size == 1:
            yield "batch_size", "--aux_loss contrastive needs another image in the micro-batch: use 2 or more."
    if s.token_routing and any(loss.startswith("layersync") for loss in s.aux_loss):
        yield "token_routing", "leaves tokens out that --aux_loss layersync compares: choose one of them."
    if s.augment and s.lora_rank is not None:
        yield "augment", "needs weights beside those of --lora_rank, to be told: leave one of them out."
    if s.muon_scale != "match_rms_adamw" and s.optimizer != "muon":
        yield "muon_scale", f"is of Muon, and --optimizer {s.optimizer} is used: choose muon, or leave it out."
    if s.decay_fraction is not None and s.lr_schedule != "wsd":
        yield "decay_fraction", f"is of --lr_schedule wsd, and {s.lr_schedule} is used: choose wsd, or leave it out."
    share = DECAY_FRACTION if s.decay_fraction is None else s.decay_fraction
    if s.lr_schedule == "wsd" and s.max_steps and (s.warmup_steps or 0) > s.max_steps - round(share * s.max_steps):
        rule = (
            f"the run has {s.max_steps:,} steps, and the last {share:.0%} of them are wsd's decay: shorten the warm-up."
        )
        yield "warmup_steps", rule


def refuse_condition(technique: TechniqueConfig, channels: int) -> None:
    """Raise `UserError` for what does not go with pictures, of so many channels, as conditions."""
    if channels and technique.augment:
        rule = "would change the images and not their conditions: leave it out, or train without a condition."
        raise UserError(rule, about="augment", value=technique.augment)


def warnings_of_techniques(technique: TechniqueConfig, tokens: int) -> Iterator[str]:
    """Yield what is not made for images of so few tokens."""
    if technique.token_routing and tokens < MANY_TOKENS:
        few = f"{MANY_TOKENS} tokens and more; these have {tokens}"
        yield f"--token_routing is for images of {few}: it may cost quality."
