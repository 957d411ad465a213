"""The JiT transformer (arXiv 2511.13720) as a diffusers model: a plain ViT on raw pixel patches."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from jit_accel.base.errors import UserError
from jit_accel.config.presets import Size, check_sizes, grid_of, parse_model_name, plain_size, swiglu_width
from jit_accel.model.embeddings import (
    ConditionEmbedding,
    LabelEmbedding,
    PatchEmbedding,
    PatchProjection,
    TimestepEmbedding,
    VectorEmbedding,
)
from jit_accel.model.functional import (
    attention_in_bf16,
    call_frugally,
    gated_silu,
    modulated_rms_norm,
    normalised_and_rotated,
    position_table,
    rope_table,
    suits_bf16_attention,
)
from jit_accel.model.saved_weights import SavedWeightsMixin


class RMSNorm(nn.Module):
    """A norm, fused with the modulation behind it.

    The weight is used inside a call alone: hooks bring it to the device for the time of a call (offloading).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulated_rms_norm(x, self.weight, shift, scale)


class RotatedRMSNorm(RMSNorm):
    """A norm of queries or keys, fused with their rotation."""

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        return normalised_and_rotated(x, self.weight, rope, dtype)


class AttentionProcessor:
    """The computation of an `Attention`, by the kernel that diffusers' `set_attention_backend` names here."""

    _attention_backend = None  # PyTorch's SDPA, or what diffusers is set to

    def __call__(self, attn: "Attention", x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = call_frugally(attn.qkv, x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        dropout = attn.attn_dropout if attn.training else 0.0
        attend = functools.partial(dispatch_attention_fn, dropout_p=dropout, backend=self._attention_backend)
        is_cpu, dtype = v.device.type == "cpu", v.dtype
        if suits_bf16_attention(v) and not dropout and self._uses_sdpa():
            attend = attention_in_bf16
        elif is_cpu:  # where SDPA is faster in float32, and autocast would choose bf16
            dtype = torch.float32
        q, k = attn.q_norm(q, rope, dtype), attn.k_norm(k, rope, dtype)
        with torch.autocast("cpu", enabled=False) if is_cpu else contextlib.nullcontext():
            out = attend(q, k, v.to(dtype))
        return attn.proj_dropout(attn.proj(out.flatten(2).to(x.dtype)))

    def _uses_sdpa(self) -> bool:
        """Return whether nobody has named another kernel, here or for all of diffusers."""
        named = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        return named == AttentionBackendName.NATIVE


class Attention(nn.Module, AttentionModuleMixin):
    _supports_qkv_fusion = False  # it is one matrix already

    def __init__(self, hidden_size: int, num_heads: int, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.q_norm = RotatedRMSNorm(hidden_size // num_heads)
        self.k_norm = RotatedRMSNorm(hidden_size // num_heads)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj_dropout = nn.Dropout(proj_dropout)
        self.set_processor(AttentionProcessor())

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return self.processor(self, x, rope)


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, mlp_ratio: float, dropout: float):
        super().__init__()
        inner = swiglu_width(hidden_size, mlp_ratio)
        self.w12 = nn.Linear(hidden_size, 2 * inner)
        self.w3 = nn.Linear(inner, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return call_frugally(self.w3, self.dropout(gated_silu(call_frugally(self.w12, x))))


class JiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, attn_dropout, proj_dropout)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, mlp_ratio, proj_dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, T, D) float32 from x (B, T, D) float32 and the condition c (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        attended = self.attn(self.norm1(x, shift1, scale1), rope)
        x = torch.addcmul(x, gate1, attended)
        mixed = self.mlp(self.norm2(x, shift2, scale2))
        return torch.addcmul(x, gate2, mixed)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm_final = RMSNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x, shift, scale))


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
    ):
        super().__init__()
        check_sizes(img_size, patch_size, hidden_size, num_heads)
        self.gradient_checkpointing = False
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
        pixels = sample.to(y_emb.dtype)
        x = self.x_embedder(pixels) + position_table(config.hidden_size, grid, trained_grid, device)
        condition_grid = None
        if config.condition_channels:
            x, condition_grid = self._with_condition(x, pixels, condition_image, condition_mask)

        head_dim = config.hidden_size // config.num_heads
        prefix = 0
        for i, block in enumerate(self.blocks):
            if i == config.in_context_start and config.in_context_len > 0:
                prefix = config.in_context_len
                x = torch.cat([(y_token + self.in_context_posemb).to(x.dtype), x], dim=1)
            rope = rope_table(head_dim, grid, trained_grid, prefix, device, condition_grid)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c, rope)
            else:
                x = block(x, c, rope)

        patches = self.final_layer(x[:, x.shape[1] - grid[0] * grid[1] :], c)
        p = config.patch_size
        image = patches.unflatten(2, (p, p, -1)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
        image = image.reshape(batch, -1, height, width)
        return Transformer2DModelOutput(sample=image) if return_dict else (image,)

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
