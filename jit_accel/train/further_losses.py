"""The losses of a training beside its objective's, with the network whose features one of them compares."""

from accelerate import Accelerator
from torch import Tensor, nn

from jit_accel.base.console import warn
from jit_accel.base.errors import renamed_settings
from jit_accel.base.processes import on_all
from jit_accel.config.groups import AuxConfig, ObjectiveConfig
from jit_accel.evaluate.features import load_features
from jit_accel.model.aux_losses import FEATURES, AuxLosses, Features, aux_losses_of


def build_aux_losses(
    aux: AuxConfig,
    objective: ObjectiveConfig,
    total_steps: int,
    accelerator: Accelerator,
    seed: int,
    network: nn.Module,
) -> AuxLosses:
    """Return the losses that are asked for, of a run of so many steps.

    UserError for one that cannot be, and for features that cannot be had.
    """
    losses = aux_losses_of(aux.aux_loss)
    for loss in losses:
        if loss.from_step > total_steps and accelerator.is_main_process:
            warn(f"--aux_loss {loss.name} begins with step {loss.from_step:,}, and the run ends with {total_steps:,}.")
    features = load_for_loss(aux, accelerator) if FEATURES in [loss.name for loss in losses] else None
    return AuxLosses(losses, objective.prediction, objective.t_eps, features, seed, network)


def load_for_loss(aux: AuxConfig, accelerator: Accelerator) -> Features:
    """Return a function from images in [-1, 1] to the features of the network that the settings name."""
    name, device, weights = aux.aux_features, accelerator.device, aux.aux_feature_weights
    with renamed_settings(features="aux_features", feature_weights="aux_feature_weights"):
        network = on_all(accelerator, lambda: load_features(name, device, weights), in_turn=True)

    def features(images: Tensor) -> Tensor:
        return network.with_gradient((images + 1) * 127.5)

    return features
