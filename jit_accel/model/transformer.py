"""The JiT transformer (arXiv 2511.13720) as a diffusers model: a plain ViT on raw pixel patches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from jit_accel.base.errors import UserError
from jit_accel.config.presets import Size, check_sizes, grid_of, parse_model_name, plain_size, routed_blocks
from jit_accel.model.blocks import FinalLayer, JiTBlock
from jit_accel.model.embeddings import (
    ConditionEmbedding,
    LabelEmbedding,
    PatchEmbedding,
    PatchProjection,
    TimestepEmbedding,
    VectorEmbedding,
)
from jit_accel.model.functional import position_table, rope_of_kept, rope_table, split_tokens
from jit_accel.model.saved_weights import SavedWeightsMixin


class JiTTransformer2DModel(SavedWeightsMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """JiT: predicts the clean image from a noised one, its time t and its class.

    Parameter names are the reference's (without `net.`). The residual stream is float32 also where the
    weights, or autocast's matmuls, are bf16. Sizes that do not fit together raise `ValueError`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JiTBlock"]  # noqa: RUF012 (diffusers' own class attributes)
    _repeated_blocks = ["JiTBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["embedder", "in_context_posemb", "norm", "final_layer"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        bottleneck_dim: int,
        in_context_len: int,
        in_context_start: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        in_channels: int = 3,
        condition_channels: int = 0,
        condition_bottleneck: int | None = None,
        condition_inject: str = "add",
        vector_sizes: Sequence[int] = (),
        has_several_labels: bool = False,
        augment_size: int = 0,
    ):
        super().__init__()
        check_sizes(img_size, patch_size, hidden_size, num_heads)
        self.gradient_checkpointing = False
        self.tokens_after: dict[int, Tensor | None] = {}  # the image's, of the blocks with these numbers, once called
        self.t_embedder = TimestepEmbedding(hidden_size)
        self.y_embedder = LabelEmbedding(num_classes, hidden_size)
        self.x_embedder = PatchEmbedding(patch_size, in_channels, bottleneck_dim, hidden_size)
        if in_context_len > 0:
            self.in_context_posemb = nn.Parameter(torch.zeros(1, in_context_len, hidden_size))
        middle, dropouts = range(depth // 4, depth // 4 * 3), (attn_dropout, proj_dropout)
        self.blocks = nn.ModuleList(
            JiTBlock(hidden_size, num_heads, mlp_ratio, *(dropouts if i in middle else (0.0, 0.0)))
            for i in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        if condition_channels:
            self.condition_embedder = ConditionEmbedding(
                patch_size, condition_channels, condition_bottleneck, hidden_size
            )
        if vector_sizes:
            self.vector_embedder = VectorEmbedding(vector_sizes, hidden_size, in_context_len)
        if augment_size:
            self.augment_embedder = nn.Linear(augment_size, hidden_size, bias=False)  # nothing of zeros, as in EDM
        self.reset_parameters()

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Take the sizes of a `config.json`, but not its `auto_map`. Raises `UserError` for those of another JiT."""
        if "sample_size" in config_dict:
            raise UserError(
                "is the JiT proposed for diffusers (its pull request 13098), whose weights have other names: "
                "`python -m jit_accel.convert --input FOLDER --output NEW` makes a pipeline of it."
            )
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Compile each block, as diffusers does, but with static shapes unless `dynamic` is given.

        The blocks see two lengths, without and with the in-context tokens; one kernel for both is slower.
        """
        kwargs.setdefault("dynamic", False)
        # Each batch size has graphs of its own: beyond torch's limit, 8, what comes next would not be compiled.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        super().compile_repeated_blocks(*args, **kwargs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights (as the reference does): the network starts as the zero function."""
        for module in self.modules():
            if isinstance(module, nn.Linear | PatchProjection):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if self.config.in_context_len > 0:
            nn.init.normal_(self.in_context_posemb, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.config.condition_channels and self.config.condition_inject == "add":
            nn.init.zeros_(self.condition_embedder.proj2.weight)
        if self.config.vector_sizes:
            nn.init.zeros_(self.vector_embedder.mlp[2].weight)
        if self.config.augment_size:
            nn.init.zeros_(self.augment_embedder.weight)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        condition_image: Tensor | None = None,
        condition_mask: Tensor | None = None,
        vectors: Tensor | None = None,
        vector_mask: Tensor | None = None,
        augmentation: Tensor | None = None,
        kept_tokens: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the prediction `sample` (B, C, H, W) of x, e or v, whichever the network was trained for.

        Args:
            sample: (B, C, H, W), the noised image z; `ValueError` unless H and W are multiples of the patch size.
            timestep: (B,) or a scalar, t from 0 (noise) to 1 (clean); never bf16, too coarse near 1.
            class_labels: (B,) in [0, num_classes]; `num_classes`, or None, is "no class". Or (B, k): several classes,
                filled up by -1.
            condition_image: (B, condition_channels, H, W) in [-1, 1], or None for no condition.
            condition_mask: (B,), False where an image's condition is left out; None: all are given.
            vectors, vector_mask: (B, n), the numbers of all columns, standardised, and as for conditions.
            augmentation: (B, augment_size), how each image was augmented, in training; None: none was.
            kept_tokens: (K,), in training, the numbers of the image's tokens, in order, that go through all blocks; the
                others are led past those in the middle (`routed_blocks`). None: all go.
        """
        config = self.config
        batch, _, height, width = sample.shape
        if height % config.patch_size or width % config.patch_size:
            rule = f"cannot be cut into patches: make both sides a multiple of {config.patch_size}"
            raise ValueError(f"an image of {height} x {width} pixels {rule}")
        grid = grid_of((height, width), config.patch_size)
        trained_grid = grid_of(config.img_size, config.patch_size)
        device = sample.device
        t = torch.as_tensor(timestep, dtype=torch.float32, device=device).expand(batch)
        if class_labels is None:
            class_labels = torch.full((batch,), config.num_classes, device=device)

        # Computed in what layers return: weights may be stored in another dtype, as quantised ones are.
        y_emb = self.y_embedder(class_labels)
        c, y_token = self.t_embedder(t, y_emb.dtype) + y_emb, y_emb[:, None]
        if config.vector_sizes:
            c, y_token = self.vector_embedder(c, y_token, vectors, vector_mask)
        if config.augment_size:
            if augmentation is None:
                augmentation = c.new_zeros(batch, config.augment_size)
            c = c + self.augment_embedder(augmentation.to(c.dtype))
        pixels = sample.to(y_emb.dtype)
        x = self.x_embedder(pixels) + position_table(config.hidden_size, grid, trained_grid, device)
        condition_grid = None
        if config.condition_channels:
            x, condition_grid = self._with_condition(x, pixels, condition_image, condition_mask)

        x = self._through_blocks(x, c, y_token, grid, condition_grid, kept_tokens)
        patches = self.final_layer(split_tokens(x, grid[0] * grid[1])[1], c)
        p = config.patch_size
        image = patches.unflatten(2, (p, p, -1)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
        image = image.reshape(batch, -1, height, width)
        return Transformer2DModelOutput(sample=image) if return_dict else (image,)

    def _through_blocks(
        self,
        x: Tensor,
        c: Tensor,
        y_token: Tensor,
        grid: tuple[int, int],
        condition_grid: tuple[int, int] | None,
        kept_tokens: Tensor | None,
    ) -> Tensor:
        """Return the tokens (B, T, D) after all blocks; on the way those in context come before them."""
        config = self.config
        trained_grid = grid_of(config.img_size, config.patch_size)
        head_dim = config.hidden_size // config.num_heads
        prefix, tokens, routed = 0, grid[0] * grid[1], range(0)
        if kept_tokens is not None:
            routed = routed_blocks(config.depth)
        for i, block in enumerate(self.blocks):
            if i == routed.start and routed:
                x, whole = split_tokens(x, tokens)
                x = torch.cat([x, whole[:, kept_tokens]], dim=1)
            if i == routed.stop and routed:
                x, kept = split_tokens(x, len(kept_tokens))
                x = torch.cat([x, whole.index_copy(1, kept_tokens, kept)], dim=1)
            if i == config.in_context_start and config.in_context_len > 0:
                prefix = config.in_context_len
                x = torch.cat([(y_token + self.in_context_posemb).to(x.dtype), x], dim=1)
            rope = rope_table(head_dim, grid, trained_grid, prefix, x.device, condition_grid)
            if i in routed:
                rope = rope_of_kept(rope, tokens, kept_tokens)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c, rope)
            else:
                x = block(x, c, rope)
            if i in self.tokens_after:
                self.tokens_after[i] = split_tokens(x, tokens)[1]
        return x

    def _with_condition(
        self, x: Tensor, pixels: Tensor, condition: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[int, int] | None]:
        """Return the tokens with those of the condition added, or before them: then also the condition's grid."""
        config, (batch, _, *size) = self.config, pixels.shape
        is_added = config.condition_inject == "add"
        if condition is None:
            condition = pixels.new_zeros(batch, config.condition_channels, *size)
            mask = torch.zeros(batch, dtype=torch.bool, device=x.device)
        wanted = (batch, config.condition_channels, *(size if is_added else condition.shape[2:]))
        if condition.shape != wanted or any(side % config.patch_size for side in wanted[2:]):
            rule = f"give {wanted}, sides that are multiples of the patch, {config.patch_size}"
            raise ValueError(f"condition_image has the shape {tuple(condition.shape)}: {rule}")
        if mask is None:
            mask = torch.ones(batch, dtype=torch.bool, device=x.device)
        tokens = self.condition_embedder(condition.to(pixels.dtype), mask)
        if is_added:
            return x + tokens, None
        grid = grid_of(condition.shape[2:], config.patch_size)
        trained_grid = grid_of(config.img_size, config.patch_size)
        tokens = tokens + position_table(config.hidden_size, grid, trained_grid, x.device)
        return torch.cat([tokens, x], dim=1), grid


def build_model(name: str, img_size: Size, num_classes: int, **sizes) -> JiTTransformer2DModel:
    """Return a freshly initialised model of a name such as `JiT-B/16`; of `sizes` None means the preset's."""
    preset, patch_size = parse_model_name(name)
    sizes = asdict(preset) | {name: size for name, size in sizes.items() if size is not None}
    size = plain_size(img_size)
    sizes["img_size"] = list(size) if isinstance(size, tuple) else size  # a list, as in files
    return JiTTransformer2DModel(patch_size=patch_size, num_classes=num_classes, **sizes)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off for the block, and back to what it was: a trainer samples from the network it trains."""
    trained = [part for part in module.modules() if part.training]  # a part may be frozen
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True
