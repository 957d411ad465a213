"""The sizes of JiT. A new size is a row here."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jit_accel.base.errors import UserError, lookup, shown

AUGMENT_SIZE = 9  # numbers that say how an image was augmented
TIME_FEATURES = 256  # sinusoidal features of the time t
LONG_ATTENTION = 64  # tokens from which a CPU's attention is faster in bf16
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as in Pillow's mode L

Size = int | Sequence[int]  # of images in pixels: the side of a square, or height and width


def sides_of(size: Size) -> tuple[int, int]:
    """Return the height and width of a size. Raises `ValueError` for other counts of numbers."""
    if type(size) is int or not isinstance(size, Sequence):  # the former is sooner, and asked of each image
        return size, size
    if len(size) != 2:
        raise ValueError(f"img_size {shown(size)}: give the side of a square, or height and width")
    return size[0], size[1]


def grid_of(size: Size, patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of an image's patches."""
    height, width = sides_of(size)
    return height // patch_size, width // patch_size


def plain_size(size: Size) -> int | tuple[int, int]:
    """Return a size in the one form that is recorded: a square's side, or (height, width)."""
    height, width = sides_of(size)
    return height if height == width else (height, width)


def settle_size(settings) -> None:
    """Give the `img_size` of new settings, which may be open, that form."""
    if settings.img_size is not None:
        object.__setattr__(settings, "img_size", plain_size(settings.img_size))


def in_pixels(size: Size) -> str:
    """Return a size in words: `64` of a square, else `64x96`."""
    return "x".join(map(str, size)) if isinstance(size, Sequence) else str(size)


def sizes_near(size: Size, multiple: int) -> str | None:
    """Return the nearest sizes whose sides are multiples of this, as flags take them; None where the size is one."""
    if not any(side % multiple for side in sides_of(size)):
        return None
    lower = [side // multiple * multiple for side in sides_of(size)]
    upper = [-(-side // multiple) * multiple for side in sides_of(size)]
    written = (plain_size(sides) if isinstance(size, int) else sides for sides in (lower, upper) if all(sides))
    return " or ".join(map(shown, written))


def usual_noise_scale(size: Size) -> float:
    """Return the noise's scale for images of this size: as for a square of the same area (2511.13720)."""
    return max(1.0, math.sqrt(math.prod(sides_of(size))) / 256)


@dataclass(frozen=True)
class Preset:
    depth: int
    hidden_size: int
    num_heads: int
    bottleneck_dim: int
    in_context_start: int
    in_context_len: int = 32
    in_channels: int = 3
    mlp_ratio: float = 4.0
    proj_dropout: float = 0.0  # 2511.13720: 0.2 for H and G
    condition_channels: int = 0  # of a picture that is a condition; 0 for none
    condition_bottleneck: int | None = None
    condition_inject: str = "add"
    vector_sizes: tuple[int, ...] = ()  # how many numbers each column of them has


PRESETS = {
    "JiT-Ti": Preset(4, 192, 3, 64, 1, in_context_len=4),  # ours, for laptops
    "JiT-S": Preset(12, 384, 6, 96, 4, in_context_len=16),  # ours
    "JiT-B": Preset(12, 768, 12, 128, 4),
    "JiT-L": Preset(24, 1024, 16, 128, 8),
    "JiT-H": Preset(32, 1280, 16, 256, 10, proj_dropout=0.2),
    "JiT-G": Preset(40, 1664, 16, 256, 10, proj_dropout=0.2),
}


def parse_model_name(name: str) -> tuple[Preset, int]:
    """Split `JiT-B/16` into its preset and patch size; `UserError` if the size is unknown, or no patch size follows."""
    size, _, patch = name.partition("/")
    preset = lookup(PRESETS, size, "model")
    if not re.fullmatch(r"[1-9]\d{0,4}", patch):
        raise UserError(
            f"the name is SIZE/PATCH, as in {size}/4: add the patch size in pixels.", about="model", value=name
        )
    return preset, int(patch)


def check_sizes(img_size: Size, patch_size: int, hidden_size: int, num_heads: int) -> None:
    """Raise `ValueError` for sizes of a network that do not fit together."""
    if near := sizes_near(img_size, patch_size):
        raise ValueError(f"img_size {img_size} must be a multiple of patch_size {patch_size}: use {near}")
    if hidden_size % num_heads:
        near = min(range(1, hidden_size + 1), key=lambda n: (hidden_size % n != 0, abs(n - num_heads)))
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}: use {near} heads")
    if hidden_size // num_heads % 4:
        rule = "but rotary embedding of rows and columns turns pairs in each half of a head: make it a multiple of 4"
        given = f"hidden_size / num_heads is {hidden_size // num_heads}"
        raise ValueError(f"{given}, {rule}, as hidden_size {num_heads * 64} does")


def routed_blocks(depth: int) -> range:
    """Return the blocks that tokens may be led past in training: the 3rd to the 8th of 12, as TREAD's (2501.04765)."""
    return range(max(1, depth // 6), depth - max(1, depth // 3))


def swiglu_width(hidden_size: int, mlp_ratio: float) -> int:
    return int(int(hidden_size * mlp_ratio) * 2 / 3)


def forward_macs(preset: Preset, patch_size: int, height: int, width: int) -> int:
    """Return the multiply-adds of the matmuls of one image's forward pass; FLOPs are 2x this, with backward 6x.

    Counted: every Linear and patch projection (the modulation and the time embedding once an image, the rest
    once a token) and attention's two products. Elementwise work, norms and softmax are not. The network's `config`
    does as well as a preset.
    """
    dim, tokens = preset.hidden_size, (height // patch_size) * (width // patch_size)
    pixels = patch_size * patch_size * preset.in_channels
    macs = TIME_FEATURES * dim + dim * dim
    macs += tokens * preset.bottleneck_dim * (pixels + dim)
    if preset.condition_channels:
        given, narrow = patch_size * patch_size * preset.condition_channels, preset.condition_bottleneck
        macs += tokens * (narrow * (given + dim) if narrow else given * dim)
    if preset.vector_sizes:
        macs += (sum(preset.vector_sizes) + dim * vector_outputs(preset.vector_sizes, preset.in_context_len)) * dim
    length = block_tokens(preset, tokens)
    for i in range(preset.depth):
        macs += block_macs(preset, length + (preset.in_context_len if i >= preset.in_context_start else 0))
    return macs + 2 * dim * dim + tokens * dim * pixels


def vector_outputs(sizes: Sequence[int], in_context_len: int) -> int:
    """Return how many vectors the network makes of columns of numbers: one, and one for each column in context."""
    return 1 + (len(sizes) if in_context_len else 0)


def block_tokens(preset: Preset, tokens: int) -> int:
    """Return the tokens that a block sees beside those in context, of an image of this many."""
    is_doubled = preset.condition_channels and preset.condition_inject == "tokens"
    return 2 * tokens if is_doubled else tokens


def block_macs(preset: Preset, length: int) -> int:
    """Multiply-adds of one block, of an image of this many tokens, counted as by `forward_macs`."""
    dim = preset.hidden_size
    macs_per_token = 4 * dim * dim + 3 * dim * swiglu_width(dim, preset.mlp_ratio) + 2 * length * dim
    return 6 * dim * dim + length * macs_per_token
