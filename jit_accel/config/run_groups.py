"""The groups of settings of a run beside its experiment: where it goes, and what is seen, measured and shared of it."""

from dataclasses import dataclass
from typing import Literal

# Accelerate's own for --report_to; a package has the tracker's name, with - for _.
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "aim", "comet_ml", "clearml", "dvclive", "swanlab")
Method = Literal["heun", "euler", "ab2", "etd2"]  # as `SOLVERS`


@dataclass(frozen=True)
class RunConfig:
    output_dir: str | None = None
    """Checkpoints, samples, pipeline (default: runs/ + wandb_name, or a name made of data, model, size and seed; with a
    number behind it where that holds another run)."""
    resume: str = "none"
    """none; auto = newest checkpoint of output_dir, if any; or the path of a checkpoint."""
    seed: int = 0
    """Everything random follows from it."""
    save_every_steps: int = 2000
    """Interval of the checkpoints; the end of the run always makes one. 0 = only there."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay; the newest that finite steps have followed stays as well."""
    log_every_steps: int = 10
    """Interval at which metrics leave the device."""
    val_every_steps: int = 1000
    """Interval of val/loss, where there is a holdout; the end of the run always has one. 0 = only there."""
    val_images: int = 1024
    """How many images of the holdout val/loss is measured on."""
    max_stall_minutes: float = 10.0
    """End a run of several processes in which none goes on for so long, and name the one that lags (0: never). So long
    they also wait for each other to come."""
    profile_steps: str | None = None
    """Profile these steps, such as 10:15 (10 to 14): a trace for Chrome and Perfetto in output_dir/profile, and a
    table of where the time goes (default: none)."""
    dry_run: bool = False
    """Two steps, what time and memory the run will take, then exit; writes nothing."""


@dataclass(frozen=True)
class SheetConfig:
    sample_every_steps: int = 2000
    """Interval of the sample sheets (PNG, fixed noise, EMA weights); the end always makes one. 0 = only there."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the samples, and the pipeline's default (default: 2; 1, which is none, without labels
    and with conditions)."""
    guidance_on: Literal["label", "condition", "both"] = "both"
    """What that guidance leaves out to compare with: the label, the condition (also numbers) or both."""
    method: Method | None = None
    """Solver of the ODE for the samples, and the pipeline's default (default: etd2, of second order at one call of the
    network a step; the paper's is heun)."""
    num_inference_steps: int | None = None
    """Steps of that solver, and the pipeline's default (default: 25; of heun, as in the paper, and euler 50)."""


@dataclass(frozen=True)
class EvalConfig:
    eval_every_steps: int = 0
    """Interval of eval/...: distance of images of the averaged weights from real ones; also at the end. 0 = never."""
    eval_images: int = 5000
    """How many images to generate each time, without and with guidance; compare only distances of equally many."""
    eval_reference: str | None = None
    """The real images: as data_path, or a file of jit_accel.evaluate --make_reference (default: the training's)."""
    eval_features: str = "inception"
    """Network whose features are compared: inception (FID), or efficientnet_lite0, whose package brings its weights."""
    eval_feature_weights: str | None = None
    """File of the Inception weights (default: the one in torch hub's cache)."""
    eval_num_inference_steps: int | None = None
    """Steps of the ODE solver for these images (default: those of the samples)."""
    paired_every_steps: int | None = None
    """Interval of val/psnr, val/ssim and val/mae: scores of what the averaged weights make of held-out conditions;
    also at the end. 0 = never (default: with a condition, a holdout and the extra eval, val_every_steps)."""
    paired_images: int = 64
    """How many images of the holdout to score."""


@dataclass(frozen=True)
class TrackingConfig:
    use_wandb: bool = False
    """Log to Weights & Biases (WANDB_MODE=offline works without a network)."""
    wandb_project: str = "jit-diffusion"
    """Project to log to."""
    wandb_name: str | None = None
    """Name of the run, and of its folder (default: WANDB_NAME, else generated)."""
    wandb_entity: str | None = None
    """Team or user (default: WANDB_ENTITY, else the login's)."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run, to filter runs by (default: none)."""
    wandb_notes: str | None = None
    """A longer description of the run (default: none)."""
    wandb_group: str | None = None
    """Runs of one group are shown together, such as the seeds of one setting (default: none)."""
    wandb_log_model: bool = False
    """Send the finished pipeline folder to W&B, as the artifact model-ID with the aliases latest and step_N."""
    wandb_aliases: tuple[str, ...] = ()
    """Further aliases of that artifact, such as best (default: none)."""
    wandb_watch: Literal["gradients", "parameters", "all"] | None = None
    """Send histograms of them to W&B, at step 1 and every tenth interval of log_every_steps (default: none)."""
    wandb_class_images: bool = False
    """Send the images of each sample sheet to W&B one by one too, by their class."""
    report_to: tuple[str, ...] = ()
    """More trackers: tensorboard, mlflow, ..., or package.module:Class, a GeneralTracker of yours (default: none)."""
    html_report: bool = True
    """Rebuild report.html (curves, samples, settings) on the way, in a hundredth of the time, and at the end."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of all trackers asked for."""
        return tuple(dict.fromkeys(("wandb",) * self.use_wandb + self.report_to))


@dataclass(frozen=True)
class HealthConfig:
    health_loss_jump: float = 3.0
    """Report losses (the mean of five) above this many times the median of the 100 before. 0 = never, as below."""
    health_max_grad_norm: float = 100.0
    """Report gradient norms (before clipping) above this as exploding."""
    health_min_grad_norm: float = 0.001
    """Report gradient norms below this as vanishing."""
    health_flat_steps: int = 1000
    """Report a loss that has not fallen by a tenth this many steps after the start, and after each as many more."""
    health_max_wait: float = 0.05
    """Report a training that waits for data for more than this share of its time."""
    health_patch_grid: float = 1.5
    """Report sample sheets whose jumps between patches are more than this many times their least so far."""
    health_min_contrast: float = 6.0
    """Report sample sheets of pixels that deviate by less than this, of 255, in the second half of a training."""
    health_max_saturated: float = 0.5
    """Report sample sheets with this share more values at 0 or 255 in one channel, in the second half of a training."""


@dataclass(frozen=True)
class HubConfig:
    push_to_hub: bool = False
    """Upload the pipeline folder to the Hugging Face Hub at the end (log in before: hf auth login, or HF_TOKEN)."""
    hub_model_id: str | None = None
    """Where to: owner/name (default: none; pushing needs it)."""
    hub_private: bool = False
    """Make the repository a private one, where it does not exist yet."""
