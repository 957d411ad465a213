"""The groups of settings, each with its default and what `--help` says of it, below."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from jit_accel.config.presets import settle_size

DEFAULT_MODEL = "JiT-B/16"
# More is a slip of the finger; it would end in an overflow, or without memory.
MOST_STEPS, MOST_IMAGES, MOST_PIXELS = 10_000, 10_000_000, 16_384
MOST_CHANNELS = 64
MOST_CLASSES, MOST_WORKERS = 1_000_000, 1024  # processes that decode
UNAVERAGED = "model"  # in place of a decay: the weights themselves
# Relative widths of the averages that snapshots are kept of, and the widest that a power function has.
SNAPSHOT_WIDTHS, MOST_WIDTH = (0.05, 0.1), 0.288  # arXiv 2312.02696, section 3
DECAY_FRACTION = 0.2  # of wsd
STREAMING = {"auto": None, "true": True, "false": False}


RawType = Literal["uint8", "uint16", "int16", "int32", "float16", "float32", "float64"]


def width_name(width: float) -> str:
    """Return the name that a power-function average of this relative width has beside the decays."""
    return f"width_{width:.6g}"


def width_of(name: str) -> float | None:
    """Return the relative width of the average of this name; None for a decay, and any other name."""
    match = re.fullmatch(r"width_(\d+(?:\.\d+)?(?:e-\d+)?)", name)
    return float(match[1]) if match else None


def problem_of_width(width: float) -> str | None:
    """Return what is wrong with the relative width of an average; None where nothing is."""
    if 0.001 <= width < MOST_WIDTH:
        return None
    return f"must be 0.001 or more and below {MOST_WIDTH}, the widths that power-function averages have."


def problem_of_separator(separator: str | None, label_column: str | None) -> str | None:
    """Return what is wrong with a `label_separator`; None where nothing is."""
    if separator is None:
        return None
    if not separator.strip() and separator != " ":
        return "is empty: give what stands between labels, such as ';'."
    if label_column is None:
        return "says what is in the cells of a column: name it with --label_column."
    return None


def problem_of_raw(shape: tuple[int, ...], dtype: str | None) -> tuple[str, str] | None:
    """Return which of `raw_shape` and `raw_dtype` is wrong, and the rule; None where none is."""
    if not shape and dtype is None:
        return None
    if not shape:
        return "raw_dtype", "is the type of bare bytes, whose shape is not given: add --raw_shape, such as 256 256 3."
    if len(shape) not in (2, 3) or min(shape) < 1:
        return "raw_shape", "must be H W, H W C or C H W, whole numbers from 1 on, such as 256 256 3."
    if dtype is None:
        return "raw_shape", "needs the type of the numbers: add --raw_dtype, such as uint16."
    if dtype not in get_args(RawType):
        return "raw_dtype", f"is no type of numbers here; choose from {', '.join(get_args(RawType))}."
    return None


@dataclass(frozen=True)
class DataConfig:
    data_path: str
    """Images: a folder of class folders, a flat folder, what jit_accel.prepare made of them, Parquet files, WebDataset
    tars, URLs of these (https://host/shard-{000..009}.tar), a Hub id (owner/name:config@revision), builtin:NAME."""
    data_format: str = "auto"
    """What data_path is, where looking does not tell: folder, parquet, webdataset, saved, prepared, hub, builtin."""
    image_column: str | None = None
    """Column of the images (default: the one that holds images)."""
    label_column: str | None = None
    """Column of the class labels, also in metadata.csv, or of lists of them, for images with several (default: label,
    cls, ... where present; else unlabelled)."""
    label_separator: str | None = None
    """What stands between labels in the cells of label_column, where these hold several, in metadata.csv and its kin,
    such as ";"; JSON lists are read too (default: a cell is one label)."""
    raw_shape: tuple[int, ...] = ()
    """Shape of images that are bare bytes in a table, with no file format: H W, H W C or C H W (default: none are)."""
    raw_dtype: RawType | None = None
    """Type of their numbers, the low byte first (default: none; required with raw_shape)."""
    vector_column: tuple[str, ...] = ()
    """Columns of numbers, or of lists of them, that the network is given as conditions (default: none)."""
    split: str | None = None
    """Split to train on, where the data has several: train, train+validation, all, ... (default: train)."""
    renumber_labels: bool = False
    """Number the labels that occur 0, 1, 2, ..., where they begin at 1 or leave gaps."""
    streaming: Literal["auto", "true", "false"] = "auto"
    """Read in order instead of at random (auto: Parquet, WebDataset and Hub data stream, the rest does not)."""
    shuffle_buffer: int = 1024
    """Images of a lane of a stream that are shuffled together; held undecoded, about 256 MiB at most."""
    lanes: int | None = None
    """Parts of a stream that are read side by side, on which its order depends (default: about eight a process)."""
    img_size: int | tuple[int, int] | None = None
    """Side of the square training images in pixels, or their height and width (default: 16 patches, or that of
    init_from)."""
    horizontal_flip: bool = True
    """Mirror every second image, at random. Switch off for digits and text."""
    crop: Literal["center", "random"] = "center"
    """Where a picture is cut whose sides have another ratio than the images: in its middle, or elsewhere each time."""
    num_workers: int | None = None
    """Decoding processes per training process (default: by the number of cores)."""
    value_range: tuple[float, float] | None = None
    """Values of the data that become -1 and 1; needed for floats (default: 0 255, and 0 65535 of 16 bits)."""
    max_bad_images: float = 0.01
    """Stop when more than this share of the images cannot be decoded."""
    holdout: float | str = 0.0
    """Share of the images to keep from the training, by a hash of their content, for val/loss; such as 0.02. Or the
    split that val/loss is measured on, such as validation."""

    __post_init__ = settle_size


@dataclass(frozen=True)
class ConditionConfig:
    condition_from: str | None = None
    """Make the condition of each image from the image itself: downscale:4, grey, blur:2.0, noise:0.1, mask:0.5 or
    jpeg:20 (default: no condition)."""
    condition_path: str | None = None
    """Folder with the condition of each image, a picture of the same relative name with any ending of images (default:
    none)."""
    condition_column: str | None = None
    """Column of the conditions: pictures, or in metadata.csv their paths; in tar files the ending, such as cond.png
    (default: none)."""
    condition_channels: int = 0
    """Channels of the condition (default: from the data)."""
    condition_inject: Literal["add", "tokens"] = "add"
    """Add the condition's tokens to the image's, where it is aligned with the image; or put them before these."""
    condition_bottleneck: int | None = None
    """Width of a bottleneck between the condition's pixels and its tokens (default: none)."""


@dataclass(frozen=True)
class ModelConfig:
    model: str | None = None
    """Size and patch: JiT-{Ti,S,B,L,H,G}/PATCH (default: JiT-B/16, or that of init_from)."""
    num_classes: int | None = None
    """Number of classes (default: from the data)."""
    in_channels: int = 3
    """Channels of the images: 1 for grey, 3 for colour, to which pictures are converted; others are those of arrays."""
    proj_dropout: float | None = None
    """Dropout after attention and inside the MLP, middle half of the blocks (default: the size's, 0.2 for H, G)."""
    attn_dropout: float = 0.0
    """Dropout on the attention weights, middle half of the blocks."""


@dataclass(frozen=True)
class TuneConfig:
    init_from: str | None = None
    """Start from these weights instead of random ones: a pipeline folder, a run, a checkpoint, a Hub id. What fits is
    kept; what does not (another number of classes, another patch size) is listed (default: random weights)."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank on init_from's frozen weights (default: none); checkpoints hold only it."""
    lora_alpha: float | None = None
    """The adapter is scaled by alpha / rank (default: the rank)."""
    lora_dropout: float = 0.0
    """Dropout of the adapter's input."""
    lora_targets: tuple[str, ...] | None = None
    """Linear layers to adapt, by the ends of their names (default: attn.qkv attn.proj mlp.w12 mlp.w3)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    prediction: Literal["x", "e", "v"] = "x"
    """What the network predicts: clean image, noise or velocity."""
    loss_space: Literal["x", "e", "v"] = "v"
    """Where the squared error is taken."""
    P_mean: float = -0.8
    """Mean of logit(t); lower is noisier."""
    P_std: float = 0.8
    """Standard deviation of logit(t)."""
    noise_scale: float | None = None
    """Standard deviation of the noise (default: img_size / 256, at least 1, and of a rectangle that
    of the square of its area; at init_from's img_size, its own)."""
    t_eps: float = 0.05
    """Lower bound of 1 - t (and of t) where it divides."""
    path: Literal["noise", "bridge"] = "noise"
    """Where the path to the image starts: at noise; or, for a bridge, at the condition, which has its channels."""
    label_drop_prob: float = 0.1
    """Share of labels replaced by "no class", for classifier-free guidance."""
    model_guidance: float = 1.0
    """Scale of a guidance on labels that the network learns, so that samples need none: one call of it a step. 1: none.
    A step costs a forward pass more."""
    condition_drop_prob: float = 0.1
    """Share of conditions, pictures or numbers, replaced by a learned "none", for guidance on the condition."""


@dataclass(frozen=True)
class AuxConfig:
    aux_loss: tuple[str, ...] = ()
    """Losses to add, of the prediction as x, each with its weight: l1=0.5 ssim=0.2 charbonnier=0.1 features=0.05;
    or of other images of the batch, contrastive=0.05; or of tokens, layersync=0.2.
    Behind it :STEP, from which on, and @LOW-HIGH, the t at which it acts: l1=0.5:2000@0.3-1.0 (default: none)."""
    aux_features: str = "efficientnet_lite0"
    """Network whose features the loss of that name compares; as eval_features."""
    aux_feature_weights: str | None = None
    """File of its weights (default: its own)."""


@dataclass(frozen=True)
class TechniqueConfig:
    augment: float = 0.0
    """Scale, rotate, stretch, shift and flip images of small data sets, each with this probability, such as 0.12, and
    mirror every second; the network is told, so that samples have none of it. Not for images with conditions."""
    token_routing: float = 0.0
    """Share of the image's tokens, others in each micro-batch, that training leads past the middle blocks, such as 0.5:
    cheaper steps, for images of 256 tokens and more."""


@dataclass(frozen=True)
class OptimConfig:
    batch_size: int = 32
    """Images per process and micro-step."""
    gradient_accumulation_steps: int | None = None
    """Micro-steps per optimizer step (default: accelerate's configuration, else 1)."""
    epochs: float | None = None
    """Length of the run in passes over the data (default: 200; or give max_steps)."""
    max_steps: int | None = None
    """Length of the run in optimizer steps (default: that of epochs)."""
    optimizer: str = "adamw"
    """adamw, or muon (Muon on the blocks' matrices, AdamW on the rest)."""
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """By what Muon scales the update of a matrix: 0.2 sqrt(max(rows, columns)), so that AdamW's rates suit it, or
    sqrt(max(1, rows / columns)), which wants higher ones."""
    learning_rate: float | None = None
    """Peak learning rate (default: below 50 million images 3e-4, muon 1e-3, from trained weights 1e-4; else the paper's
    5e-5 x global batch / 256)."""
    lr_schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """What follows the warm-up; wsd: warm-up, a stable phase at the peak, and a decay at the run's end."""
    decay_fraction: float | None = None
    """Share of the run's steps, the last ones, in which wsd decays (default: 0.2)."""
    warmup_epochs: float | None = None
    """Linear warm-up from 0 (default: 5 epochs, at most a tenth of the run)."""
    warmup_steps: int | None = None
    """The same in optimizer steps (default: those of warmup_epochs)."""
    min_learning_rate: float = 0.0
    """Where cosine and wsd end."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never on biases, norms and embeddings."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    max_grad_norm: float = 1.0
    """Clip the gradient's L2 norm; 0 = never, as in the paper."""
    ema_decays: tuple[str, ...] | None = None
    """Decays of the averages; auto = memory of a tenth of the run (default: auto, and the paper's in long runs)."""
    average_snapshots: int = 0
    """Track two further averages, and store them at this interval of steps, to make averages of any width of them
    after the training, by --ema_width of jit_accel.evaluate and jit_accel.convert. 0 = never."""

    @property
    def tracked_widths(self) -> tuple[str, ...]:
        """Names of the averages that are tracked for snapshots."""
        return tuple(map(width_name, SNAPSHOT_WIDTHS)) if self.average_snapshots else ()

    @property
    def num_averages(self) -> int:
        """Copies of the weights that are averages."""
        return len(self.ema_decays) + len(self.tracked_widths)


@dataclass(frozen=True)
class PerformanceConfig:
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast (default: accelerate's configuration, else what is faster on this device)."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""
    compile: bool = False
    """torch.compile each block: faster steps after a slower start."""
