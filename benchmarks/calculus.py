"""
The Gaussian calculus: what a plan does to every spatial frequency, in milliseconds; the oracle of `gaussian.py`.

For Gaussian images with independent frequencies every sampler is linear in each of them: the clean estimate is a gain
times the noisy value, a step is A x + B x0 + C x0_before + S z, and enlarging is a frequency response with aliases. So
the power that a whole plan delivers is a recursion on variances; nothing is sampled. It is exact for one level; over
several it leaves out that enlarging makes frequencies depend on each other: at most a percent of an octave.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from spectra import frequency_bins, octaves

SOLVERS = ("ddim", "ddpm", "dpmsolver++", "sde-dpmsolver++")


def solver_of(scheduler: SchedulerMixin) -> str:
    """
    The name of a diffusers scheduler's solver in `SOLVERS`.

    Raises:
        ValueError: for a scheduler whose steps the calculus does not know.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    respaced = any(config.get(name) for name in ("use_lu_lambdas", "use_karras_sigmas", "use_exponential_sigmas"))
    if kind == "DDPMScheduler" and config.variance_type.startswith("fixed_small"):
        return "ddpm"
    if kind == "DDIMScheduler" and config.set_alpha_to_one and config.timestep_spacing == "leading":
        return "ddim"
    midpoint = kind == "DPMSolverMultistepScheduler" and config.solver_type == "midpoint" and not respaced
    if midpoint and config.solver_order == 2:
        if config.algorithm_type in SOLVERS and config.final_sigmas_type == "zero":
            return config.algorithm_type
    raise ValueError(
        f"scheduler={kind}: expected DDPMScheduler (fixed_small), DDIMScheduler (leading, set_alpha_to_one) or "
        "DPMSolverMultistepScheduler of order 2 (dpmsolver++ or sde-dpmsolver++, midpoint, no other sigmas): the steps "
        "that the calculus knows"
    )


def half_log_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """log(a / s) with a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar), at every training time; float64, falling."""
    alphas_cumprod = alphas_cumprod.detach().cpu().double()
    return 0.5 * (alphas_cumprod.log() - torch.log1p(-alphas_cumprod))


def signal_and_noise(log_snr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a and s, with a^2 + s^2 = 1, from log(a / s)."""
    return torch.sigmoid(2 * log_snr).sqrt(), torch.sigmoid(-2 * log_snr).sqrt()


def step_coefficients(solver: str, log_snr: torch.Tensor) -> torch.Tensor:
    """
    Every step of a solver as x' = A x + B x0 + C x0_before + S z, z standard normal. The last step gives x0 itself.

    Args:
        solver: One of `SOLVERS`.
        log_snr: float64 [n], log(a / s) at the network's calls, rising. Gradients flow through.

    Returns:
        [n, 4]: A, B, C, S of each step.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: expected one of {SOLVERS}")
    a, s = signal_and_noise(log_snr)
    rows = []
    for i in range(len(log_snr) - 1):
        h = log_snr[i + 1] - log_snr[i]
        zero = torch.zeros_like(h)
        if solver == "ddpm":  # DDPM eq. 7: the posterior's mean and variance
            kept = torch.exp(-2 * h)  # s'^2 a^2 / (s^2 a'^2), the share of x's noise that stays
            rows.append((kept * a[i + 1] / a[i], a[i + 1] * (1 - kept), zero, s[i + 1] * (1 - kept).sqrt()))
            continue
        noisy = solver == "sde-dpmsolver++"
        shrink = torch.exp(-2 * h if noisy else -h)
        A = s[i + 1] / s[i] * (torch.exp(-h) if noisy else 1)
        B, C = a[i + 1] * (1 - shrink), zero
        if solver != "ddim" and i > 0:  # multistep: the slope of x0 since the call before
            slope = 0.5 * B * h / (log_snr[i] - log_snr[i - 1])
            B, C = B + slope, -slope
        rows.append((A, B, C, s[i + 1] * (1 - shrink).sqrt() if noisy else zero))
    last = log_snr.new_tensor([0.0, 1.0, 0.0, 0.0])
    return torch.stack([*(torch.stack(row) for row in rows), last])


@dataclass
class Modes:
    """
    The spatial frequencies of an image, one for each that is not a mirror of another.

    Attributes:
        size: (height, width).
        rows, columns: int [M], cycles per image of each mode, 0 to half the side.
        count: float64 [M], how many frequencies a mode stands for; they sum to height x width.
        bins: int [M], those of `spectra.frequency_bins`.
    """

    size: tuple[int, int]
    rows: torch.Tensor
    columns: torch.Tensor
    count: torch.Tensor
    bins: torch.Tensor

    @classmethod
    def of(cls, height: int, width: int) -> "Modes":
        def axis(side):
            k = torch.arange(side // 2 + 1)
            return k, torch.where((k == 0) | (2 * k == side), 1, 2)

        (rows, row_count), (columns, column_count) = axis(height), axis(width)
        rows, columns = (part.flatten() for part in torch.meshgrid(rows, columns, indexing="ij"))
        count = (row_count[:, None] * column_count[None]).flatten().double()
        return cls((height, width), rows, columns, count, frequency_bins(height, width)[rows, columns])

    def octaves(self) -> list[torch.Tensor]:
        """Masks [M] of 1, 2, 3-4, 5-8 ... cycles per image, up to half the shorter side."""
        return [(self.bins >= bins.start) & (self.bins < bins.stop) for bins in octaves(min(self.size))]

    def octave_means(self, values: torch.Tensor) -> torch.Tensor:
        """Means of values [C, M] over the frequencies of each octave, [octaves, C]."""
        means = [(values[:, m] * self.count[m]).sum(1) / self.count[m].sum() for m in self.octaves()]
        return torch.stack(means)


def enlarging_response(low: int, high: int) -> torch.Tensor:
    """
    What bicubic enlarging does along one axis: the power that each frequency gets from each frequency of the smaller
    image, its passband, its aliases and the image's borders included.

    Returns:
        float64 [high // 2 + 1, low // 2 + 1]; a frequency of the smaller image stands for its mirror too.
    """
    points = torch.eye(low, dtype=torch.float64)[:, None, :, None]  # an image for each pixel
    enlarged = F.interpolate(points, (high, 1), mode="bicubic", align_corners=False)[:, 0, :, 0]
    waves = torch.fft.fft(torch.fft.ifft(enlarged, dim=0, norm="ortho"), dim=1, norm="ortho").abs().square().T
    half = low // 2 + 1
    mirrored = torch.cat((waves[:, :1], waves[:, 1:].flip(1)), dim=1)  # column j holds frequency -j
    single = torch.tensor([k == 0 or 2 * k == low for k in range(half)])
    both = torch.where(single, waves[:, :half], waves[:, :half] + mirrored[:, :half])
    return both[: high // 2 + 1]


def enlarge(power: torch.Tensor, low: tuple[int, int], high: tuple[int, int]) -> torch.Tensor:
    """Variance of the modes of images enlarged from `low` to `high`, from those of the smaller ones [..., M]."""
    rows, columns = (enlarging_response(*sides) for sides in zip(low, high, strict=True))
    grid = power.unflatten(-1, (low[0] // 2 + 1, low[1] // 2 + 1))
    return (rows @ grid @ columns.T).flatten(-2)


# (level, log(a / s) of one call) -> gain [..., M] of the clean estimate over the noisy image
Response = Callable[[int, torch.Tensor], torch.Tensor]


def perfect_response(spectra: Sequence[torch.Tensor]) -> Response:
    """The best clean estimate: gain a v / (a^2 v + s^2) for variance v [..., M] of each level."""

    def response(level, log_snr):
        a, s = signal_and_noise(log_snr)
        return a * spectra[level] / (a**2 * spectra[level] + s**2)

    return response


@dataclass
class LevelSteps:
    """What the calculus needs of one level: its size, its solver, and log(a / s) of its calls (float64 [n], rising)."""

    size: tuple[int, int]
    solver: str
    log_snr: torch.Tensor


def delivered(levels: Sequence[LevelSteps], response: Response) -> torch.Tensor:
    """
    The variance that a plan gives each mode of its last level.

    Args:
        levels: Low to high.
        response: The network; see `perfect_response`.

    Returns:
        float64 [..., M] for `Modes.of(*levels[-1].size)`. Gradients flow from it to the levels' `log_snr`.
    """
    power = None
    for index, level in enumerate(levels):
        if power is None:
            power = torch.ones_like(response(index, level.log_snr[0]))
        else:
            a, s = signal_and_noise(level.log_snr[0])
            power = a**2 * enlarge(power, levels[index - 1].size, level.size) + s**2
        # Second moments of x and of the clean estimate of the call before.
        xx, xp, pp = power, torch.zeros_like(power), torch.zeros_like(power)
        for log_snr, (A, B, C, S) in zip(level.log_snr, step_coefficients(level.solver, level.log_snr), strict=True):
            gain = response(index, log_snr)
            g = A + B * gain
            xx, xp, pp = g**2 * xx + 2 * g * C * xp + C**2 * pp + S**2, gain * (g * xx + C * xp), gain**2 * xx
        power = xx
    return power
