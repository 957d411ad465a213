"""The sampler's ODE as a diffusers scheduler: from noise (t = 0) to a clean image (t = 1)."""

import copy
import inspect
import math
from collections.abc import Collection, Mapping
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from jit_accel.base.errors import nearest
from jit_accel.model.solvers import SOLVERS
from jit_accel.model.spaces import PATHS, SPACES, convert, in_float32, noised

OBJECTIVE = ("prediction_type", "t_eps", "noise_scale", "path")  # of a `JiTScheduler`


def checked_choice(setting: str, name: str, choices: Collection[str]) -> str:
    """Return a name that is one of the choices. Raises `ValueError` for any other."""
    if name not in choices:
        rule = f"unknown; choose from {', '.join(choices)}.{nearest(str(name), choices)}"
        raise ValueError(f"{setting} {name!r}: {rule}")
    return name


class JiTScheduler(SchedulerMixin, ConfigMixin):
    """One of `SOLVERS` in equal steps of t; the last step of Heun is Euler's, and the first of those with a history.

    A model call at each of `timesteps`, in order, each followed by `step`. With Heun the sample between the two
    calls of a step (`mid_step`) is the Euler guess at the step's end: hand it back as the next sample.

    Args:
        prediction_type: what the network predicts: x (clean image), e (noise) or v (velocity).
        t_eps: floor of 1 - t (of t, for e) in the conversion to a velocity, which etd2 does without.
        noise_scale: standard deviation of the noise the network was trained with.
        solver: a name of `SOLVERS`, where `set_timesteps` does not say.
        path: where the trajectory starts: at "noise", or, for a "bridge", at the condition.

    Raises `ValueError` for an unknown prediction type, solver or path.
    """

    @register_to_config
    def __init__(
        self,
        prediction_type: str = "x",
        t_eps: float = 0.05,
        noise_scale: float = 1.0,
        solver: str = "heun",
        path: str = "noise",
    ):
        checked_choice("prediction_type", prediction_type, SPACES)
        checked_choice("path", path, PATHS)
        checked_choice("solver", solver, SOLVERS)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self._forget(solver)

    def _forget(self, method: str) -> None:
        self.method = method
        self._calls: list[tuple[float, float, bool]] = []  # (t, step size, is Heun's second call)
        self._next_call = 0
        self._start: tuple[Tensor, Tensor] | None = None  # of a Heun step: sample and velocity
        self.forget_history()

    def forget_history(self) -> None:
        """Let the next step be as the first: for callers whose field jumps here, as where guidance sets in."""
        self._history: tuple[float, Tensor] | None = None  # t of the call before, and what the solver keeps of it

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [cls]  # diffusers looks for names in its own package

    @property
    def init_noise_sigma(self) -> float:
        return self.config.noise_scale

    @property
    def order(self) -> int:
        """Model calls a step (but the last) of the current solver."""
        return SOLVERS[self.method].calls

    @property
    def mid_step(self) -> bool:
        """True between the two model calls of one Heun step."""
        return self._start is not None

    @property
    def next_time(self) -> float:
        """The t of the sample that the next model call is given; 1 after the last call."""
        return self._calls[self._next_call][0] if self._next_call < len(self._calls) else 1.0

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        method: str | None = None,
        skip_steps: int = 0,
        time_shift: float = 1.0,
    ) -> None:
        """Start a new trajectory of `num_inference_steps` steps, of which the first `skip_steps` are left out.

        Heun calls the model twice for each step but the last, the others once. Steps are equal in t, but for a
        `time_shift` s other than 1: finer towards the noise above it, towards the image below (`time_grid`).

        Raises `ValueError` for fewer than one step, an unknown method and a shift that is not positive.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps {num_inference_steps} must be at least 1; the paper takes 50")
        self._forget(checked_choice("method", method or self.config.solver, SOLVERS))
        self.num_inference_steps = num_inference_steps
        self.num_steps = num_inference_steps - skip_steps  # of this trajectory
        times = time_grid(num_inference_steps, time_shift)
        for i, (t, t_next) in list(enumerate(pairwise(times)))[skip_steps:]:
            self._calls.append((t, t_next - t, False))
            if self.method == "heun" and i < num_inference_steps - 1:  # at t = 1 a prediction of x has no velocity
                self._calls.append((t_next, t_next - t, True))
        self.call_times = [t for t, _, _ in self._calls]  # `timesteps` on the host
        self.timesteps = torch.tensor(self.call_times, dtype=torch.float32, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Return the sample of the next model call, `prev_sample`: float32 whatever the inputs are (float64 stays).

        Args:
            model_output: (B, 3, H, W), of the kind `prediction_type`.
            timestep: the entry of `timesteps` whose turn it is; the position is counted here, not looked up,
                because Heun visits each t twice.
            sample: (B, 3, H, W), what the model was given.

        Raises `ValueError` where no timestep is left, or none was set.
        """
        if self._next_call >= len(self._calls):
            raise ValueError("step() without a timestep left: call set_timesteps(n) before each trajectory")
        t, step_size, second = self._calls[self._next_call]
        self._next_call += 1
        sample = in_float32(sample)
        # 1/(1-t), and 1/t for e, diverge at the ends; t_eps is the paper's clamp (2511.13720, Algorithm 2).
        kind, solver = self.config.prediction_type, SOLVERS[self.method]
        v = convert(in_float32(model_output), sample, t, kind, solver.space, self.config.t_eps)
        if solver.advance is not None:
            moved = solver.advance(sample, v, t, self.next_time, self._history)
            self._history = t, v
        elif second:
            start, start_velocity = self._start
            moved, self._start = start + (step_size / 2) * (start_velocity + v), None
        else:
            if self._next_call < len(self._calls) and self._calls[self._next_call][2]:
                self._start = sample, v
            moved = sample + step_size * v
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `z = t x + (1 - t) e` of x (B, 3, H, W), noise e that is already scaled, and t (B,) in [0, 1]."""
        return noised(original_samples, noise, timesteps.to(original_samples))

    def __len__(self) -> int:
        return len(self.timesteps)


def checked_shift(value: float) -> float:
    """Return a shift of time, a positive number. Raises `ValueError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"time_shift {value!r} must be a positive number: 1 is equal steps, 3 finer ones at the noise")
    return float(value)


def time_grid(num_steps: int, shift: float = 1.0) -> list[float]:
    """Return the ends of steps from t = 0 to 1, equal ones or such that (1 - t) / t is `shift` times theirs.

    SD3, arXiv 2403.03206, section 5.3.2. Raises `ValueError` for a shift that is not positive.
    """
    # The float32 grid of the reference, so that t falls on the same side of a guidance interval's end.
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float32, device="cpu")
    shift = checked_shift(shift)
    return (t if shift == 1 else t / (t + shift * (1 - t))).tolist()


def objective_of(config: Mapping) -> dict:
    """Return what a scheduler's settings say of its network; the path only where it is not that from noise."""
    found = {name: config[name] for name in OBJECTIVE if name in config}
    return {name: value for name, value in found.items() if (name, value) != ("path", "noise")}  # which is older


def is_own(scheduler) -> bool:
    """Return True for a `JiTScheduler`, also one whose code a folder brought."""
    return hasattr(type(scheduler), "next_time")


class FlowMatchDriver(JiTScheduler):
    """A flow-matching scheduler of diffusers, driven as a `JiTScheduler` is.

    Its sigma is 1 - t. It moves z / noise_scale, since it reckons with noise of deviation 1, and is given the velocity
    towards the noise. The objective is what a `JiTScheduler` takes; a stochastic one draws from the generator.
    """

    def __init__(self, scheduler: SchedulerMixin, objective: Mapping, generator=None):
        super().__init__(**objective)
        self.driven, self.name, self._generator = scheduler, type(scheduler).__name__, generator

    @property
    def mid_step(self) -> bool:
        return self._next_call < len(self._calls) and not getattr(self.driven, "state_in_first_order", True)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device=None,
        method: str | None = None,
        skip_steps: int = 0,
        time_shift: float = 1.0,
    ):
        """Start a new trajectory on the scheduler's own grid. Raises `ValueError` for one that follows no such flow."""
        for name, value, own in (("method", method, (None, self.name)), ("time_shift", time_shift, (1,))):
            if value not in own:
                raise ValueError(f"{name} {value!r}: the pipeline's scheduler is {self.name}: leave the {name} out")
        scheduler, config = self.driven, self.driven.config
        is_flow = config.get("use_flow_sigmas") or "FlowMatch" in str(type(scheduler).__mro__)
        sigmas = []
        if is_flow and not config.get("use_dynamic_shifting"):
            if "prediction_type" in config:  # it is given this, whatever the network predicts
                scheduler.register_to_config(prediction_type="flow_prediction")
            scheduler.set_timesteps(num_inference_steps, device=device)
            sigmas = scheduler.sigmas.tolist()
        if not sigmas or sigmas != sorted(sigmas, reverse=True) or sigmas[0] > 1 or not self._arrives(sigmas):
            choices = "FlowMatchEulerDiscreteScheduler, or UniPC or DPM++ with use_flow_sigmas=True"
            rule = "does not lead from noise to image by t x + (1 - t) e with its settings: take JiTScheduler, "
            raise ValueError(f"scheduler {self.name} {rule}{choices} (no dynamic shifting, no other sigmas)")
        self._forget(self.config.solver)
        self._extra = self._draws(self._generator)
        first = skip_steps * scheduler.order
        scheduler.set_begin_index(first)
        self.call_times = [1 - sigma for sigma in sigmas[first:-1]]
        self._calls = list(zip(self.call_times, scheduler.timesteps[first:]))
        self.num_steps = math.ceil(len(self._calls) / scheduler.order)
        self.timesteps = torch.tensor(self.call_times, dtype=torch.float32, device=device)

    def _draws(self, generator) -> dict:
        return {"generator": generator} if "generator" in inspect.signature(self.driven.step).parameters else {}

    def _arrives(self, sigmas: list[float]) -> bool:
        """Return True where the steps end at the image, black, if the network knows it: some settings give NaN."""
        scheduler = copy.deepcopy(self.driven)
        sample = torch.ones(1, 1, 1, 1, device=scheduler.timesteps.device)
        scheduler.set_begin_index(0)
        extra = self._draws(torch.Generator().manual_seed(0))
        for sigma, timestep in zip(sigmas, scheduler.timesteps):
            sample = scheduler.step(sample / sigma, timestep, sample, return_dict=False, **extra)[0]
        return abs(sample.item()) <= max(2 * sigmas[-1], 0.05)

    def step(self, model_output: Tensor, timestep, sample: Tensor, return_dict: bool = True):
        """Return the sample of the next model call, as `JiTScheduler.step` does."""
        (t, own_timestep), scale = self._calls[self._next_call], self.config.noise_scale
        self._next_call += 1
        sample = in_float32(sample)
        v = convert(in_float32(model_output), sample, t, self.config.prediction_type, "v", self.config.t_eps)
        moved = self.driven.step(-v / scale, own_timestep, sample / scale, return_dict=False, **self._extra)[0] * scale
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)
