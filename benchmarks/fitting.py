"""
Step times of every level fitted to the data's own power spectrum, by the Gaussian calculus.

What it fits keeps every octave of Gaussian images with a perfect network. With a trained network such plans are among
the worst that were measured (README.md, "Does the calculus rank a trained network's plans?"), so pyrdiff offers none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from calculus import LevelSteps, Modes, delivered, half_log_snr, perfect_response, solver_of
from diffusers import SchedulerMixin
from spectra import Spectra

from pyrdiff.pipelines.pipeline_pyramidal import PyramidalPlan
from pyrdiff.plan import CLIP

# The schedulers of diffusers that run the solvers, the clean estimate clipped to [-1, 1].
CLIPPED = {**CLIP, "solver_order": 2, "solver_type": "midpoint"}
SCHEDULERS = {
    "ddpm": ["DDPMScheduler", {}],
    "dpmsolver++": ["DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **CLIPPED}],
    "sde-dpmsolver++": ["DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **CLIPPED}],
}


@dataclass
class FittedPlan:
    """
    Attributes:
        plan: For `pipeline(plan=...)`: resolutions, the times of every level, and what runs them.
        octaves: Share of the data's power that the calculus finds in 1, 2, 3-4, 5-8 ... cycles per image; 1 is right.
        score: Mean over octaves and colours of (sqrt(P / v) - 1)^2; 0 is right.
        nfe_eq: Network calls, by area, in calls at the top level.
    """

    plan: dict
    octaves: list[float]
    score: float
    nfe_eq: float


def level_steps(
    plan: PyramidalPlan, schedulers: Sequence[SchedulerMixin | None], alphas_cumprod: torch.Tensor
) -> list[LevelSteps]:
    """
    A pipeline's plan as the calculus takes it.

    Args:
        plan: What `pipeline.plan(...)` returns.
        schedulers: (of the lowest level, of those above; None for the same).
        alphas_cumprod: Of the noise process, [training steps].

    Raises:
        ValueError: for a scheduler that the calculus does not know, or a level whose size the network is not run at.
    """
    grid, schedulers = half_log_snr(alphas_cumprod), (schedulers[0], schedulers[1] or schedulers[0])
    for level in plan.levels:
        if level.network_size != level.size:
            raise ValueError(f"level {level.size}: expected a size that the network runs at, not {level.network_size}")
    return [
        LevelSteps(level.size, solver_of(schedulers[min(index, 1)]), grid[torch.tensor(level.timesteps).long()])
        for index, level in enumerate(plan.levels)
    ]


def octave_shares(levels: Sequence[LevelSteps], spectra: Spectra) -> torch.Tensor:
    """
    Power that a plan delivers at its last level as a share of the data's, for Gaussian images with these spectra and
    the best possible network.

    Args:
        levels: Low to high; each size must be one of `spectra.sizes`.

    Returns:
        float64 [octaves, C]: mean share over the frequencies of 1, 2, 3-4, 5-8 ... cycles per image, by colour axis.
    """
    power, truth, modes = _top(levels, spectra)
    return modes.octave_means(power / truth)


class _Top(NamedTuple):
    """The top level of a plan: the power that it delivers and that of the data, both [C, M], and their modes."""

    power: torch.Tensor
    truth: torch.Tensor
    modes: Modes


def _top(levels: Sequence[LevelSteps], spectra: Spectra) -> _Top:
    for level in levels:
        if tuple(level.size) not in spectra.sizes:
            raise ValueError(f"level {level.size}: expected one of the measured sizes {spectra.sizes}")
    places = [spectra.sizes.index(tuple(level.size)) for level in levels]
    known = [spectra.modes(place) for place in places]
    return _Top(delivered(levels, perfect_response(known)), known[-1], Modes.of(*levels[-1].size))


def score(levels: Sequence[LevelSteps], spectra: Spectra) -> torch.Tensor:
    """Mean over octaves and colours of (sqrt(P / v) - 1)^2, of power P delivered and variance v; 0 is right."""
    power, truth, modes = _top(levels, spectra)
    return modes.octave_means(((power / truth).sqrt() - 1).square()).mean()


def fit(
    spectra: Spectra,
    alphas_cumprod: torch.Tensor,
    calls: Sequence[int],
    solver: str | Sequence[str] = "dpmsolver++",
    iterations: int = 60,
) -> FittedPlan:
    """
    Fits the step times of every level, and with them the noise that the higher levels start from, so that each octave
    gets the power that the data have in it. That holds for Gaussian images and a perfect network; for a trained
    network it proposes and a bench decides: few-step plans may be right in power and wrong in structure.

    Args:
        spectra: Of the data, as many levels as the plan has: several for a pyramid, one for sampling at one size. For a
            residual (super-resolution) give the spectrum of the residuals, scaled as they are trained.
        alphas_cumprod: Of the noise process, [training steps].
        calls: Network calls at each level, low to high.
        solver: "ddpm", "dpmsolver++" or "sde-dpmsolver++": one for all levels, or (lowest, those above).
        iterations: Of L-BFGS.

    Raises:
        ValueError: unless there is one number of calls, 1 to the training steps, for each level, a known solver, and a
            process that never reaches pure noise or none.
    """
    solvers = [solver] * 2 if isinstance(solver, str) else list(solver)
    if len(solvers) != 2 or not set(solvers) <= set(SCHEDULERS):
        raise ValueError(f"solver={solver!r}: expected one or two of {sorted(SCHEDULERS)}")
    most = len(alphas_cumprod)
    if len(calls) != len(spectra.sizes) or not all(isinstance(n, int) and 1 <= n <= most for n in calls):
        raise ValueError(f"calls={list(calls)}: expected 1 to {most} for each of the {len(spectra.sizes)} levels")
    if not 0 < float(alphas_cumprod.min()) <= float(alphas_cumprod.max()) < 1:
        raise ValueError(f"alphas_cumprod ends at {float(alphas_cumprod[-1])}: expected values between 0 and 1")
    grid = half_log_snr(alphas_cumprod)
    low, high = float(grid[-1]), float(grid[0])
    solver_at = [solvers[min(index, 1)] for index in range(len(calls))]

    def positions(numbers: torch.Tensor, index: int) -> torch.Tensor:
        """Rising log(a / s) of a level's calls from free numbers; the lowest level begins at pure noise."""
        gaps = torch.softmax(numbers, 0).cumsum(0)[: calls[index]]
        if index == 0:
            gaps = torch.cat((gaps.new_zeros(1), gaps[:-1]))
        return low + (high - low) * gaps

    def build(parameters):
        return [
            LevelSteps(size, solver_at[index], positions(numbers, index))
            for index, (size, numbers) in enumerate(zip(spectra.sizes, parameters, strict=True))
        ]

    parameters = []
    for index, count in enumerate(calls):
        start = torch.zeros(count + 1, dtype=torch.float64)
        start[0] = math.log(0.6 * count) if index else 0.0  # higher levels begin a third of the way up
        start[-1] = -2.0
        parameters.append(start.requires_grad_())
    optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    best = (math.inf, parameters)

    def closure():
        nonlocal best
        optimizer.zero_grad()
        value = score(build(parameters), spectra)
        value.backward()
        if value.item() < best[0]:  # a line search may end far from where it began
            best = (value.item(), [numbers.detach().clone() for numbers in parameters])
        return value

    optimizer.step(closure)
    with torch.no_grad():
        times = [_training_times(level.log_snr, grid) for level in build(best[1])]
        levels = [
            LevelSteps(size, name, grid[torch.tensor(part)])
            for size, name, part in zip(spectra.sizes, solver_at, times, strict=True)
        ]
        octaves, reached = octave_shares(levels, spectra).mean(1).tolist(), float(score(levels, spectra))
    top = math.prod(spectra.sizes[-1])
    plan = {
        "resolutions": [list(size) for size in spectra.sizes],
        "spacing": times,
        "scheduler": SCHEDULERS[solvers[0]],
        "refine_scheduler": SCHEDULERS[solvers[1]],
    }
    cost = sum(n * math.prod(size) / top for n, size in zip(calls, spectra.sizes, strict=True))
    return FittedPlan(plan, octaves, reached, cost)


def _training_times(log_snr: torch.Tensor, grid: torch.Tensor) -> list[int]:
    """The nearest training times, each once, falling."""
    times = [int((grid - value).abs().argmin()) for value in log_snr]
    for index in range(1, len(times)):
        times[index] = min(times[index], times[index - 1] - 1)
    return [max(time, len(times) - 1 - index) for index, time in enumerate(times)]
