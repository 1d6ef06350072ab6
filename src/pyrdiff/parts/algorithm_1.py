"""Algorithm 1 of pixel-aware diffusion (paper X), as printed and as a sum."""

from typing import Literal, NamedTuple

import torch

from pyrdiff.parts.noise import white_noise


class PaperStep(NamedTuple):
    """What line 9 of algorithm 1 needs of step j, each shaped as the rate."""

    alpha: torch.Tensor
    beta: torch.Tensor  # 1 - alpha
    alpha_bar: torch.Tensor
    noise_power: torch.Tensor  # 1 - alpha_bar
    variance: torch.Tensor  # of the fresh noise, eq. 4

    def factor(self, reading: Literal["A", "B"]) -> torch.Tensor:
        """The factor of Z^j: that of eq. 4, or as line 9 is printed."""
        return self.beta / self.noise_power.sqrt() if reading == "A" else self.beta.sqrt()


class Algorithm1:
    """
    Put in front of `SchedulerMixin`: the paper's sampler, for a scheduler with rates, `log_alpha_bar` and its ramp.

    No Z^j depends on the state, so nothing takes back what a step adds, and its share of the result is divided by
    sqrt(alpha_bar).
    """

    def _paper_step(self, rate: torch.Tensor, step: int) -> PaperStep:
        log, log_prev = self.log_alpha_bar(rate, step), self.log_alpha_bar(rate, step - 1)
        log_alpha = -rate * (self._ramp(step, rate) - self._ramp(step - 1, rate))  # log - log_prev loses digits
        beta, noise_power = -torch.expm1(log_alpha), -torch.expm1(log)
        variance = -torch.expm1(log_prev) / noise_power * beta
        return PaperStep(log_alpha.exp(), beta, log.exp(), noise_power, variance)

    def _check_reading(self, reading: str) -> None:
        if reading not in ("A", "B"):
            raise ValueError(f"reading={reading!r}: expected 'A' or 'B'")

    def step_paper(
        self,
        noise: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        structure: torch.Tensor,
        reading: Literal["A", "B"] = "A",
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Line 9 of algorithm 1, from step j to j - 1.

        Args:
            noise: Z^j, [B, C, H, W].
            timestep: j, a whole number in [1, T].
            sample: [B, C, H, W], x_j.
            structure: [B, C, H, W], the image that the rates follow: exact, or estimated.
            reading: "A": Z^j is the noise of eq. 3 and its factor (1 - alpha_j) / sqrt(1 - alpha_bar_j), as in eq. 4
                and 15. "B", as line 9 is printed: Z^j is the noise of one step (eq. 2), its factor sqrt(1 - alpha_j).
            eta: Factor on the fresh noise, by default the config's; 1 is the paper's.
            generator: One, or one for each image.
        """
        self._check_reading(reading)
        self._check_steps([timestep])
        eta = self._eta(eta)
        step = self._paper_step(self._rate_of(structure, sample), timestep)
        prev_sample = (sample - step.factor(reading) * noise) / step.alpha.sqrt()
        if eta > 0 and timestep > 1:
            white = white_noise(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            prev_sample = prev_sample + eta * step.variance.sqrt() * white
        return prev_sample

    def collapse(
        self,
        noises: torch.Tensor,
        sample: torch.Tensor,
        structure: torch.Tensor,
        reading: Literal["A", "B"] = "A",
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        All of algorithm 1's steps from i to 0 at once: since no Z^j depends on the state, its result is a weighted sum
        of them and one Gaussian,

            x_0 = x_i / sqrt(alpha_bar_i) - sum_j w_j Z^j + eta * sqrt(V_i) * noise

        with line 9's factors in w_j = factor_j / sqrt(alpha_bar_j), and V_i = sum_{j=2..i} variance_j / alpha_bar_{j-1}
        (see `fresh_variance`).

        Args:
            noises: Z^1 ... Z^i, [i, B, C, H, W].
            sample: [B, C, H, W], x_i.
            structure, reading, eta, generator: As for `step_paper`.
        """
        self._check_reading(reading)
        if noises.ndim != sample.ndim + 1 or not 1 <= len(noises) <= len(self):
            raise ValueError(
                f"noises has shape {tuple(noises.shape)}: expected [i, *{tuple(sample.shape)}], i to {len(self)}"
            )
        eta = self._eta(eta)
        rate, total = self._rate_of(structure, sample), torch.zeros_like(sample)
        for j, noise in enumerate(noises, start=1):
            step = self._paper_step(rate, j)
            total += step.factor(reading) / step.alpha_bar.sqrt() * noise
        image = sample * (rate * self._ramp(len(noises), rate) / 2).exp() - total
        if eta > 0 and len(noises) > 1:
            white = white_noise(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            image = image + eta * self.fresh_variance(rate, len(noises)).sqrt() * white
        return image

    def fresh_variance(self, rate: torch.Tensor, timestep: int) -> torch.Tensor:
        """V_i: the variance that algorithm 1's own noise has at x_0, shaped as the rate; up to 1 / alpha_bar_i - 1."""
        self._check_steps([timestep])
        total = torch.zeros_like(rate)
        for step in range(2, timestep + 1):
            total += self._paper_step(rate, step).variance * (-self.log_alpha_bar(rate, step - 1)).exp()
        return total
