"""The noise process of SR4 (paper S) and of SR3: cosine or linear steps, run on the residual or on the image."""

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from pyrdiff.parts.sources import KeepsSource


@dataclass
class CosineResidualSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: [B, C, H, W], the sample at the previous timestep.
        pred_original_sample: [B, C, H, W], the clean estimate: a scaled residual (see `compose`), or an image.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class CosineResidualScheduler(KeepsSource, SchedulerMixin, ConfigMixin):
    """
    Diffusion of what a low-resolution image lacks (paper S; gamma_t there is `alphas_cumprod[t]` here, and its step t
    is timestep t - 1). Where the settings coincide, steps are those of diffusers' `DDPMScheduler` and `DDIMScheduler`,
    but for one: after the last step no noise is left, also where it is not timestep 0. `from_config(scheduler.config)`
    of a solver of diffusers has the same alphas_cumprod.

    Args:
        num_train_timesteps: Steps of the noise process (paper: 500; SR3: 2000).
        beta_schedule: "cosine" (section 5.2; diffusers' "squaredcos_cap_v2", the name that the config keeps, since
            diffusers' solvers read it) or "linear".
        prediction_target: What the diffusion runs on: the "residual" (eq. 9) or the "image" (SR3).
        prediction_type: What the network predicts of it: "epsilon" (eq. 6), "sample" or "v_prediction".
        variance_type: Of the noise of an ancestral step: beta_t ("fixed_large", eq. 7), beta~_t ("fixed_small", eq. 5),
            or between the two as the network says ("learned_range", section 5.3: the second half of its channels).
        residual_scale: The residual is multiplied by this before it is diffused: 1 / std of the training residuals (see
            `fit_residual_scale`); 1 is the paper's.
        beta_start, beta_end: Ends of the linear schedule (SR3's public code: 1e-6 and 1e-2 at 2000 steps).
        trained_betas: Betas in (0, 1) to use instead; their number is then `num_train_timesteps`.
        timestep_spacing: How fewer steps are placed: "linspace", "leading" or "trailing", as in `DDPMScheduler`.
        clip_sample: Whether a step clips its clean estimate to +-`clip_sample_range`, in the units of what is diffused:
            1 bounds every image, 2 * `residual_scale` every residual.

    Example:
        >>> scheduler = CosineResidualScheduler(residual_scale=8.0)
        >>> high, upsampled = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.25)
        >>> residual = scheduler.residual(high, upsampled)  # 8 * (high - upsampled)
        >>> residual.unique().item(), scheduler.compose(residual, upsampled).unique().item()
        (2.0, 0.5)
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    CHOICES = {
        "beta_schedule": ("cosine", "squaredcos_cap_v2", "linear"),
        "prediction_target": ("residual", "image"),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "variance_type": ("fixed_small", "fixed_large", "learned_range"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
    }

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 500,
        beta_schedule: Literal["cosine", "linear"] = "cosine",
        prediction_target: Literal["residual", "image"] = "residual",
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small",
        residual_scale: float = 1.0,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        trained_betas: np.ndarray | Sequence[float] | None = None,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ):
        for name, choices in self.CHOICES.items():
            if self.config[name] not in choices:
                raise ValueError(f"{name}={self.config[name]!r}: expected one of {choices}")
        if not (0 < residual_scale < math.inf):
            raise ValueError(f"residual_scale={residual_scale}: expected a finite number above 0")
        if prediction_target == "image" and residual_scale != 1:
            raise ValueError(f"residual_scale={residual_scale} with prediction_target='image': expected 1")
        if not (0 < clip_sample_range < math.inf):
            raise ValueError(f"clip_sample_range={clip_sample_range}: expected a finite number above 0")
        if trained_betas is not None:
            self.betas = torch.as_tensor(np.asarray(trained_betas, dtype=np.float32))
            if self.betas.ndim != 1 or not len(self.betas) or not ((self.betas > 0) & (self.betas < 1)).all():
                raise ValueError(f"trained_betas={trained_betas}: expected a list of numbers in (0, 1)")
        elif not self._is_count(num_train_timesteps):
            raise ValueError(f"num_train_timesteps={num_train_timesteps!r}: expected a whole number from 1 up")
        elif beta_schedule == "linear":
            if not 0 < beta_start <= beta_end < 1:
                raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}: expected 0 < start <= end < 1")
            self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
        else:
            self.betas = betas_for_alpha_bar(num_train_timesteps)
        # Solvers of diffusers are made from this config, so it says the noise process in diffusers' words and counts
        # no setting as a default that another class may replace by its own (1000 steps, clipping, steps that begin at
        # the last timestep, where a cosine schedule leaves no signal for a noise prediction to say anything of).
        self.register_to_config(
            num_train_timesteps=len(self.betas),
            beta_schedule="linear" if beta_schedule == "linear" else "squaredcos_cap_v2",
            _use_default_values=[],
        )
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self._gammas = torch.cat([torch.ones(1), self.alphas_cumprod])  # from timestep -1 up
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(len(self.betas) - 1, -1, -1)
        self._steps: dict[int, tuple] | None = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @staticmethod
    def _is_count(value) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """This class and those of diffusers that read the same noise process from its config."""
        known = super()._get_compatibles()
        return [cls, *(kind for kind in known if "trained_betas" in inspect.signature(kind.__init__).parameters)]

    # What is diffused.

    def residual(self, high: torch.Tensor, upsampled: torch.Tensor) -> torch.Tensor:
        """
        What is diffused, of images `high` [B, C, H, W] in [-1, 1] and their enlarged low-resolution images, of the same
        shape and range: the residual of eq. 9 times `residual_scale`; for `prediction_target="image"`, `high` itself.
        """
        self._check_pair("high", high, upsampled)
        return high if self.config.prediction_target == "image" else (high - upsampled) * self.config.residual_scale

    def compose(self, residual: torch.Tensor, upsampled: torch.Tensor) -> torch.Tensor:
        """
        Eq. 9: images [B, C, H, W], in [-1, 1] up to the network's error (not clipped). Undoes `residual` but for four
        roundings, at most 7 eps / 2 for images in [-1, 1]: 4.2e-7 in float32, 0.03 in bfloat16.
        """
        self._check_pair("residual", residual, upsampled)
        if self.config.prediction_target == "image":
            return residual
        return residual / self.config.residual_scale + upsampled

    @staticmethod
    def _check_pair(name: str, first: torch.Tensor, upsampled: torch.Tensor) -> None:
        if first.shape != upsampled.shape:
            raise ValueError(f"upsampled has shape {tuple(upsampled.shape)}: expected {name}'s {tuple(first.shape)}")

    @staticmethod
    def fit_residual_scale(residuals: Iterable[torch.Tensor]) -> float:
        """The `residual_scale` of unscaled residuals (high - upsampled, any shapes): 1 / std over all, in one pass."""
        count, total, squares = 0, 0.0, 0.0
        for residual in residuals:
            values = residual.detach().double()
            count, total = count + values.numel(), total + values.sum().item()
            squares += values.square().sum().item()
        variance = squares / count - (total / count) ** 2 if count else 0.0
        if not 0 < variance < math.inf:
            raise ValueError(f"residuals: {count} values of variance {variance}; expected some, finite, not all equal")
        return variance**-0.5

    # The forward process.

    def noise_level(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        """sqrt(gamma), float32, shaped as `timesteps` (-1 to T - 1; 1 at -1): what SR3's and SR4's network sees."""
        return self._gamma(timesteps).sqrt()

    def _gamma(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        timesteps = torch.as_tensor(timesteps)
        if timesteps.device.type == "cpu" and not ((timesteps >= -1) & (timesteps < len(self))).all():
            raise ValueError(f"timesteps={timesteps.tolist()}: expected whole numbers from -1 to {len(self) - 1}")
        if self._gammas.device != timesteps.device:  # kept where it is used, so that a training step waits for no GPU
            self._gammas = self._gammas.to(timesteps.device)
        return self._gammas[timesteps.long() + 1]

    def sample_noise_level(self, timesteps: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Noise levels for training, float32 [B], each uniform between those of its timestep and the one before it."""
        low, high = self.noise_level(timesteps), self.noise_level(timesteps - 1)
        source = generator.device if generator is not None else low.device
        return low + (high - low) * torch.rand(low.shape, generator=generator, device=source).to(low.device)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Eq. 1, and eq. 2 with sqrt(1 - gamma) where the text has (1 - gamma): `original_samples` (residuals or images)
        and `noise` [B, C, H, W], at `timesteps` or at a `noise_level` sqrt(gamma), either [B].
        """
        signal, sigma = self._signal_and_noise(original_samples, timesteps, noise_level)
        return signal * original_samples + sigma * noise

    def get_velocity(
        self,
        sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What a "v_prediction" network predicts; arguments as those of `add_noise`, `sample` being the clean one."""
        signal, sigma = self._signal_and_noise(sample, timesteps, noise_level)
        return signal * noise - sigma * sample

    def _signal_and_noise(self, sample: torch.Tensor, timesteps, noise_level) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(gamma) and sqrt(1 - gamma), each [B, 1, ...] in the sample's dtype, rounded once."""
        if (timesteps is None) == (noise_level is None):
            raise ValueError(f"timesteps={timesteps}, noise_level={noise_level}: expected one of the two")
        if noise_level is None:
            gamma = self._gamma(timesteps)
            signal, sigma = gamma.sqrt(), (1 - gamma).sqrt()
        else:
            signal = torch.as_tensor(noise_level, dtype=torch.float32)
            sigma = ((1 - signal) * (1 + signal)).sqrt()  # no cancellation near 1
        shape = (-1, *[1] * (sample.ndim - 1))
        return tuple(part.to(sample.device, sample.dtype).reshape(shape) for part in (signal, sigma))

    # The reverse process.

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """The sample as it is: schedulers that scale it are interchangeable with this one."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """The steps to run: so many, placed by `timestep_spacing`, or at these descending `timesteps` in [0, T - 1]."""
        total, spacing = len(self), self.config.timestep_spacing
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}, timesteps={timesteps}: expected one of the two"
            )
        if timesteps is not None:
            times = [int(time) for time in timesteps]
            if times != list(timesteps) or not times or times != sorted(set(times), reverse=True):
                raise ValueError(f"timesteps={list(timesteps)}: expected descending whole numbers")
            if times[0] >= total or times[-1] < 0:
                raise ValueError(f"timesteps={times}: expected numbers from {total - 1} to 0")
        elif not self._is_count(num_inference_steps) or num_inference_steps > total:
            raise ValueError(f"num_inference_steps={num_inference_steps!r}: expected a whole number from 1 to {total}")
        elif spacing == "linspace":
            times = np.linspace(0, total - 1, num_inference_steps).round()[::-1].astype(int).tolist()
        elif spacing == "leading":
            times = (np.arange(num_inference_steps)[::-1] * (total // num_inference_steps)).tolist()
        else:
            parts = np.arange(num_inference_steps) * (total / num_inference_steps)
            times = ((total - parts).round().astype(int) - 1).tolist()
        # Coefficients as Python numbers, so that a step waits for no GPU; in float32, as diffusers computes them, since
        # 1 - gamma_t / gamma_prev cancels and float64 would not coincide with `DDPMScheduler` to 1e-6.
        gamma = self.alphas_cumprod.cpu()[times]
        gamma_prev = torch.cat([gamma[1:], torch.ones(1)])
        alpha = gamma / gamma_prev
        small = ((1 - gamma_prev) / (1 - gamma) * (1 - alpha)).clamp(min=1e-20)
        columns = (
            gamma**0.5,
            (1 - gamma) ** 0.5,
            gamma_prev**0.5,
            1 - gamma_prev,
            gamma_prev**0.5 * (1 - alpha) / (1 - gamma),  # eq. 4, of the clean estimate
            alpha**0.5 * (1 - gamma_prev) / (1 - gamma),  # eq. 4, of the sample
            small**0.5,  # the spread of eq. 5, sqrt(beta~)
            (1 - alpha).clamp(min=1e-20) ** 0.5,  # and of eq. 7, sqrt(beta)
        )
        rows = zip(*(column.tolist() for column in columns), strict=True)
        self._steps = dict(zip(times, zip([*times[1:], -1], rows, strict=True), strict=True))
        self.num_inference_steps = len(times)
        self.timesteps = torch.tensor(times, device=device)

    def previous_timestep(self, timestep: int) -> int:
        """The timestep that a step leads to (before `set_timesteps`: of the training process); -1 after the last."""
        return int(timestep) - 1 if self._steps is None else self._step(timestep)[0]

    def _step(self, timestep) -> tuple[int, tuple]:
        if self._steps is None:
            raise ValueError("timesteps are not set: expected a call of `set_timesteps` before `step`")
        if int(timestep) not in self._steps:
            raise ValueError(f"timestep={timestep}: expected one of `timesteps`, {sorted(self._steps, reverse=True)}")
        return self._steps[int(timestep)]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> CosineResidualSchedulerOutput | tuple:
        """
        One reverse step, in float32 or better; the results have the sample's dtype. Only a `timestep` that is itself
        on a GPU is waited for.

        Args:
            model_output: [B, C, H, W]; for "learned_range" [B, 2C, H, W], the variance's place in [-1, 1] last.
            timestep: One of `timesteps`.
            sample: [B, C, H, W], what is diffused, at that timestep.
            eta: `None` for an ancestral step (eq. 3 to 7); in [0, 1] for DDIM's (its eq. 12 and 16), deterministic at
                0. Its noise is then a share of beta~, whatever `variance_type` is.
            generator: One, or one for each image.
            return_dict: Whether to return an output object or the tuple (prev_sample, pred_original_sample).
        """
        prev_timestep, coefficients = self._step(timestep)
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: expected None or a number in [0, 1]")
        learned = self.config.variance_type == "learned_range"
        expected = (len(sample), sample.shape[1] * (2 if learned else 1), *sample.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}: expected {expected} for a sample of shape "
                f"{tuple(sample.shape)} and variance_type={self.config.variance_type!r}"
            )
        dtype, work = sample.dtype, torch.promote_types(sample.dtype, torch.float32)
        sample, (prediction, *fraction) = sample.to(work), model_output.to(work).split(sample.shape[1], dim=1)

        # 1. The coefficients of this step (see `set_timesteps`).
        signal, sigma, signal_prev, noise_share_prev, of_original, of_sample, small, large = coefficients

        # 2. The clean estimate: eq. 2 solved for y_0.
        if self.config.prediction_type == "epsilon":
            original, noise = (sample - sigma * prediction) / signal, prediction
        elif self.config.prediction_type == "sample":
            original, noise = prediction, (sample - signal * prediction) / sigma
        else:
            original, noise = signal * sample - sigma * prediction, signal * prediction + sigma * sample

        # 3. Clip it, if asked to.
        if self.config.clip_sample:
            original = original.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

        # 4. The spread: a share of eq. 5's (DDIM, eq. 16), or between eq. 5's and eq. 7's in the logarithm, or either.
        if eta is not None:
            spread = eta * small
        elif learned:
            share = (fraction[0] + 1) / 2
            spread = (share * math.log(large) + (1 - share) * math.log(small)).exp()
        else:
            spread = large if self.config.variance_type == "fixed_large" else small

        # 5. The mean: eq. 4 with the estimate for y_0, or eq. 12 of DDIM.
        if eta is None:
            prev_sample = of_original * original + of_sample * sample
        else:
            prev_sample = signal_prev * original + max(noise_share_prev - spread**2, 0.0) ** 0.5 * noise

        # 6. Noise, but not after the last step.
        if prev_timestep >= 0 and eta != 0:
            white = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=work)
            prev_sample = prev_sample + spread * white

        prev_sample, original = prev_sample.to(dtype), original.to(dtype)
        if not return_dict:
            return prev_sample, original
        return CosineResidualSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)
