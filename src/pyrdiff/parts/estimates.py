"""The clean estimate that a network's prediction stands for (paper P, eq. 9), and the way back."""

from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What the network predicts, as the scheduler's config says it.

    Raises:
        ValueError: if the clean estimate is not a linear function of it.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"scheduler={type(scheduler).__name__} predicts {kind!r}: expected 'epsilon', 'sample' or 'v_prediction'"
        )
    return kind


@dataclass(frozen=True)
class CleanEstimate:
    """
    Eq. 9 at one noise level, for every kind of prediction: the clean image is
    sample_weight * sample + output_weight * output.

    Args:
        signal, noise: a and s of sample = a * clean + s * noise, as the network sees it; a^2 + s^2 = 1.
        sample_weight, output_weight: What the clean estimate is made of.
    """

    signal: float
    noise: float
    sample_weight: float
    output_weight: float

    @classmethod
    def at(cls, scheduler: SchedulerMixin, signal: float, noise: float) -> "CleanEstimate":
        kind = prediction_type(scheduler)
        if kind == "sample":
            return cls(signal, noise, 0.0, 1.0)
        if kind == "v_prediction":
            return cls(signal, noise, signal, -noise)
        return cls(signal, noise, 1 / signal, -noise / signal)

    def clean(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return self.sample_weight * sample + self.output_weight * output

    def output(self, sample: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """The prediction whose clean estimate this is."""
        return (clean - self.sample_weight * sample) / self.output_weight


def signal_and_noise(scheduler: SchedulerMixin, timestep: torch.Tensor) -> tuple[float, float]:
    """a and s of x_t = a x_0 + s noise, as the network sees it; asked of the scheduler, whatever its scale.

    Raises:
        ValueError: if the scheduler has lost track of its noise level.
    """
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    pairs = (scheduler.add_noise(*pair, timestep.reshape(1)) for pair in ((one, zero), (zero, one)))
    signal, noise = (scheduler.scale_model_input(value, timestep).item() for value in pairs)
    if abs(signal**2 + noise**2 - 1) > 0.01:
        raise ValueError(
            f"{type(scheduler).__name__} does not say which noise level its steps are at: expected another"
        )
    return signal, noise


def unclipped(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, or one like it that does not clip the clean estimate: the pipeline does that itself."""
    clips = {name: False for name in ("clip_sample", "thresholding") if scheduler.config.get(name)}
    return type(scheduler).from_config(scheduler.config, **clips) if clips else scheduler
