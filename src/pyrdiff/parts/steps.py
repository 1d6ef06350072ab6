"""The steps of one level: a scheduler, respaced to run only the last part of its noise process."""

import copy
import inspect
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import SchedulerMixin

from pyrdiff.parts.checks import Generators

Spacing = str | Sequence[int]  # "scheduler", "log_snr", or descending times


@dataclass(frozen=True)
class LevelSteps:
    """
    A scheduler of its own that is ready for the steps of one level, and the time of every network call.

    Args:
        scheduler: A copy, so that laying out steps changes nothing of the pipeline.
        timesteps: [calls], descending, on the CPU: schedulers read their times as numbers, which would wait for a GPU.
    """

    scheduler: SchedulerMixin
    timesteps: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def times(self) -> list[float]:
        return [float(time) for time in self.timesteps]

    def on(self, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The time of every call twice: on the CPU for the scheduler, and beside the sample for the network."""
        return zip(self.timesteps, self.timesteps.to(device, non_blocking=True), strict=True)

    def renoise(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The images [B, C, H, W] noised up to the first time (paper P, eq. 2)."""
        time = self.timesteps[:1].to(images.device, non_blocking=True)
        # By a copy: schedulers move their tables to the images for good, and the steps would read them from a GPU.
        return copy.copy(self.scheduler).add_noise(images, noise, time.expand(len(images)))

    def step(
        self,
        output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: Generators,
        eta: float | None = None,
    ) -> torch.Tensor:
        """The next sample [B, C, H, W]."""
        options = {} if eta is None else {"eta": eta}
        if takes(self.scheduler.step, "generator"):
            options["generator"] = generator
        return self.scheduler.step(output, timestep, sample, **options, return_dict=False)[0]


def takes(function, argument: str) -> bool:
    """Whether a function has this argument."""
    return argument in inspect.signature(function).parameters


def lay_out_steps(
    scheduler: SchedulerMixin, calls: int, strength: float, spacing: Spacing, calls_name: str
) -> LevelSteps:
    """
    The steps from `strength` of the noise process down to no noise.

    Args:
        scheduler: Is copied, not changed.
        calls: Network calls. A second-order scheduler calls the network twice a step but for the last, so it makes an
            odd number.
        strength: Share in (0, 1] of the noise process.
        spacing: "scheduler": as the scheduler places its last steps; "log_snr": evenly in log-SNR; or the times.
        calls_name: What the argument `calls` is called where the user gave it.

    Raises:
        ValueError: for steps that the scheduler cannot make.
    """
    scheduler = plainly_clipping(copy.deepcopy(scheduler))
    train_steps = scheduler.config.num_train_timesteps
    steps = (calls + 1) // 2 if scheduler.order == 2 else calls
    if isinstance(spacing, str) and steps > strength * train_steps:
        raise ValueError(
            f"{calls_name}={calls}: expected at most {int(strength * train_steps)}, the training steps up to the noise "
            f"that the level starts from (strength {strength})"
        )
    if spacing == "scheduler":
        begin = _respace(scheduler, steps, strength)
    else:
        begin = 0
        _place(scheduler, _times(scheduler, steps, strength, spacing))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return LevelSteps(scheduler, scheduler.timesteps[begin:])


def plainly_clipping(scheduler: SchedulerMixin) -> SchedulerMixin:
    """
    The scheduler, told how to clip its clean estimate to [-1, 1] if it has `thresholding` with `sample_max_value=1`.

    Diffusers looks for a quantile and clamps it between 1 and `sample_max_value`. Where both are 1 the result is the
    same to the last bit without sorting all values of an image, which at 256x256 takes ten times as long as the rest.
    """
    if scheduler.config.get("thresholding") and scheduler.config.get("sample_max_value") == 1:
        scheduler._threshold_sample = clipped_to_one
    return scheduler


def clipped_to_one(sample: torch.Tensor) -> torch.Tensor:
    """A clean estimate of any shape, kept in [-1, 1]."""
    return sample.clamp(-1, 1)


def _respace(scheduler: SchedulerMixin, steps: int, strength: float) -> int:
    """Gives the scheduler the fewest steps whose last `steps` begin within the strength; returns where they begin."""
    limit, order = strength * scheduler.config.num_train_timesteps, scheduler.order

    def starts_within(total: int) -> bool:
        try:
            scheduler.set_timesteps(total)
        except ValueError as error:
            raise ValueError(f"{type(scheduler).__name__} does not take {total} steps: {error}") from error
        return float(scheduler.timesteps[order * (total - steps)]) <= limit

    totals = range(steps, scheduler.config.num_train_timesteps)
    total = steps + bisect_left(totals, True, key=starts_within)
    scheduler.set_timesteps(total)
    begin = order * (total - steps)
    if len(scheduler.timesteps[begin:]) != order * (steps - 1) + 1:
        raise ValueError(
            f"{type(scheduler).__name__} does not take as many steps as it is asked for: expected another, such as "
            "DPMSolverMultistepScheduler"
        )
    return begin


def _times(scheduler: SchedulerMixin, steps: int, strength: float, spacing: Spacing) -> list[int]:
    if spacing == "log_snr":
        return log_snr_times(scheduler.alphas_cumprod, steps, strength)
    if isinstance(spacing, str):
        raise ValueError(f"spacing={spacing!r}: expected 'scheduler', 'log_snr' or one list of times a level")
    times, last = list(spacing), scheduler.config.num_train_timesteps - 1
    if not times or times != sorted(set(times), reverse=True) or times[0] > last or times[-1] < 0:
        raise ValueError(f"spacing={times}: expected descending times from {last} to 0")
    return times


def _place(scheduler: SchedulerMixin, times: list[int]) -> None:
    if not takes(scheduler.set_timesteps, "timesteps"):
        raise ValueError(
            f"spacing: {type(scheduler).__name__} places its steps itself; expected 'scheduler', or a scheduler whose "
            "`set_timesteps` takes `timesteps`, such as DPMSolverMultistepScheduler"
        )
    scheduler.set_timesteps(timesteps=times)


def log_snr_times(alphas_cumprod: torch.Tensor, steps: int, strength: float) -> list[int]:
    """`steps` training times, descending to 0, as evenly spaced in log(alpha_bar / (1 - alpha_bar)) as can be."""
    alphas_cumprod = alphas_cumprod.cpu().double().clamp(1e-8, 1 - 1e-8).numpy()
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
    start = max(round(strength * len(log_snr)), steps) - 1
    wanted = np.linspace(log_snr[start], log_snr[0], steps)
    times = [int(np.abs(log_snr - value).argmin()) for value in wanted]
    for index in range(1, steps):
        times[index] = min(times[index], times[index - 1] - 1)
    return [max(time, steps - 1 - index) for index, time in enumerate(times)]


def check_start_above_zero(steps: LevelSteps, name: str, calls: int) -> None:
    """A level must start at some noise: its first step would otherwise do nothing."""
    if steps.times[0] == 0:
        raise ValueError(
            f"{name}={calls}: {type(steps.scheduler).__name__} would start at time 0, where there is no noise; "
            "expected 2 or more, or timestep_spacing='trailing' in its config"
        )
