"""The settings of `jit_accel.prepare`; imports no torch, so that `--help` answers at once."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from jit_accel.base.errors import UserError, check_ranges, shown, within
from jit_accel.config.groups import MOST_CHANNELS, MOST_WORKERS, RawType, problem_of_raw, problem_of_separator
from jit_accel.config.presets import settle_size, sides_of

SHARD_BYTES = 2**28
MOST_PIXELS_TO_STORE = 1_000_000  # a side, whose bytes are then held against the room on the disk
FEWEST_SHARDS = 16  # for streams to shuffle and for workers to share, where there are images enough
FEWEST_IMAGES_A_SHARD = 128
LOSSY = ("jpeg", "webp")
DEFAULT_QUALITY = 95

# Bytes a pixel, to choose the number of shards by
_BYTES_PER_PIXEL = {"uint8": 3.0, "uint16": 6.0, "int16": 6.0, "float32": 12.0, "png": 1.5, "jpeg": 0.6, "webp": 0.3}

# Settings that older stores do not have, as they are where they change nothing
_LATER = {
    "renumber_labels": False,
    "condition_column": None,
    "vector_column": (),
    "raw_shape": (),
    "raw_dtype": None,
    "label_separator": None,
    "in_channels": 3,
    "value_range": None,
}


@dataclass(frozen=True)
class PrepareConfig:
    """Turn images into training shards: cropped to one size, shuffled once, fast to read."""

    data_path: str | None = None
    """Images: a folder of class folders, a flat folder, Parquet files, WebDataset tars, a Hub id, builtin:NAME, or
    what this program made (required, unless verify is given)."""
    output_dir: str | None = None
    """New folder for the shards (required, unless verify is given)."""
    img_size: int | tuple[int, int] = 256
    """Side of the square images in pixels, or their height and width."""
    format: Literal["uint8", "uint16", "int16", "float32", "raw", "jpeg", "png", "webp"] | None = None
    """uint8, float32: memory-mapped pixels, random access, the fastest to read (default: uint8; float32 of 16 bits and
    floats, of which uint16 and int16 round what was scaled, in half the size). The others are Parquet, streamed: raw
    pixels; JPEG (without chroma subsampling), about a fifth of their size; PNG, lossless, half; WebP, a tenth."""
    quality: int | None = None
    """Quality of JPEG and WebP, 1 to 100 (default: 95); WebP of 100 is lossless."""
    data_format: str = "auto"
    """Kind of data_path, where looking does not show it: folder, parquet, webdataset, saved, prepared, hub,
    builtin."""
    image_column: str | None = None
    """Column of the images (default: the one that holds images)."""
    label_column: str | None = None
    """Column of the class labels, or of lists of them (default: label, cls, ... where present; else one class)."""
    label_separator: str | None = None
    """What stands between labels in the cells of label_column, where these hold several, in metadata.csv and its kin,
    such as ";"; JSON lists are read too (default: a cell is one label)."""
    raw_shape: tuple[int, ...] = ()
    """Shape of images that are bare bytes in a table, with no file format: H W, H W C or C H W (default: none are)."""
    raw_dtype: RawType | None = None
    """Type of their numbers, the low byte first (default: none; required with raw_shape)."""
    vector_column: tuple[str, ...] = ()
    """Columns of numbers, or of lists of them, to keep as conditions (default: none)."""
    in_channels: int = 3
    """Channels of the images: 1 for grey, 3 for colour, to which pictures are converted; others are those of arrays."""
    value_range: tuple[float, float] | None = None
    """Values of the data that become -1 and 1 in a training; needed for floats (default: 0 255, and 0 65535 of 16
    bits)."""
    condition_path: str | None = None
    """Folder with the condition of each image, a picture of the same relative name with any ending of images (default:
    none)."""
    condition_column: str | None = None
    """Column of the conditions: pictures, or in metadata.csv their paths; in tar files the ending, such as cond.png
    (default: none)."""
    split: str | None = None
    """Split to prepare, where the data has several: train, train+validation, all, ... (default: train)."""
    renumber_labels: bool = False
    """Number the labels that occur 0, 1, 2, ..., where they begin at 1 or leave gaps."""
    resize: Literal["exact", "fast"] = "exact"
    """exact: ADM's centre crop, as in training. fast: JPEGs are decoded at reduced size where that is enough, and the
    centre alone is scaled, in one step. Photos of 500 px to 256: 1.3 times as fast, the same pixels but for rounding;
    of 1,280 px: 2.3 times, mean error 0.6 of 255, 49 dB; of 1,280 px to 64: 4 times, 1.4 of 255, 44 dB. Fine patterns
    can be off by 5 in the mean, 30 dB."""
    seed: int = 0
    """Seed of the order in which the images are stored."""
    shard_images: int | None = None
    """Images a shard (default: about 256 MiB, and 16 shards where there are enough images)."""
    num_workers: int | None = None
    """Processes (default: the number of cores). The result does not depend on it."""
    verify: str | None = None
    """Instead of preparing, compare the checksums of this folder with its index.json (default: none)."""

    __post_init__ = settle_size

    def recorded(self, source_fingerprint: str) -> dict:
        """Return what the result depends on."""
        left_out = ("data_path", "data_format", "split", "condition_path", "output_dir", "num_workers", "verify")
        settings = {name: value for name, value in asdict(self).items() if name not in left_out}
        for name, usual in _LATER.items():
            if settings[name] == usual:  # as if there were no such setting, which older stores do not have
                del settings[name]
        return {**settings, "quality": self.resolved_quality, "source_fingerprint": source_fingerprint}

    @property
    def resolved_quality(self) -> int | None:
        return (self.quality or DEFAULT_QUALITY) if self.format in LOSSY else None

    def images_a_shard(self, num_images: int, channels: int = 3, number_bytes: int = 1) -> int:
        """Return how many of `num_images` images go into one shard, where each has so many channels.

        number_bytes: of one number, where they are stored as they are decoded.
        """
        if self.shard_images is not None:
            return self.shard_images
        size = 3.0 * number_bytes if self.format == "raw" else _BYTES_PER_PIXEL[self.format or "uint8"]
        num_bytes = num_images * size * math.prod(sides_of(self.img_size)) * channels / 3
        by_bytes = -(-int(num_bytes) // SHARD_BYTES)
        shards = max(by_bytes, min(FEWEST_SHARDS, num_images // FEWEST_IMAGES_A_SHARD), 1)
        return -(-num_images // shards)


RANGES = [
    *within(1, MOST_PIXELS_TO_STORE, "img_size"),
    *within(1, MOST_WORKERS, "num_workers"),
    ("shard_images", lambda v: v >= 1, "at least 1"),
    ("quality", lambda v: 1 <= v <= 100, "from 1 to 100"),
    ("seed", lambda v: 0 <= v < 2**63, "0 or more and at most a 63-bit number"),
    *within(1, MOST_CHANNELS, "in_channels"),
    ("value_range", lambda v: -math.inf < v[0] < v[1] < math.inf, "two numbers, the smaller one first"),
]


def check(config: PrepareConfig) -> None:
    """Raise `UserError` for settings that are missing, out of range, or contradict each other."""
    if config.verify is not None:
        if config.data_path is not None or config.output_dir is not None:
            rule = "compares checksums and prepares nothing: leave --data_path and --output_dir out."
            raise UserError(rule, about="verify")
        return
    for flag in ("data_path", "output_dir"):
        if not getattr(config, flag):
            raise UserError("not given; preparing needs --data_path and --output_dir.", about=flag)
    check_ranges(vars(config), RANGES)
    if rule := problem_of_separator(config.label_separator, config.label_column):
        raise UserError(rule, about="label_separator", value=config.label_separator)
    if problem := problem_of_raw(config.raw_shape, config.raw_dtype):
        about, rule = problem
        raise UserError(rule, about=about, value=shown(getattr(config, about)))
    if config.quality is not None and config.format not in LOSSY:
        rule = f"--format {config.format or 'uint8'} has none: leave the flag out."
        raise UserError(rule, about="quality", value=config.quality)
