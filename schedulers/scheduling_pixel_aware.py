"""The pixel-aware noise process (paper X): every pixel has a rate of its own, the brighter the faster."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, logging

from pyrdiff.parts.algorithm_1 import Algorithm1
from pyrdiff.parts.batch import beside
from pyrdiff.parts.noise import white_noise
from pyrdiff.parts.settings import check_choices, check_positive, check_whole, is_whole
from pyrdiff.parts.sources import KeepsSource
from pyrdiff.parts.timesteps import chosen_timesteps

Timestep = int | float | torch.Tensor  # a number, or one for each image, [B]

pixel_aware_logger = logging.get_logger(__name__)


@dataclass
class PixelAwareSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: [B, C, H, W], the sample at the earlier timestep.
        pred_original_sample: [B, C, H, W], the clean estimate, in [epsilon, 1] up to the network's error.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class PixelAwareScheduler(KeepsSource, Algorithm1, SchedulerMixin, ConfigMixin):
    r"""
    Diffusion whose rate differs from pixel to pixel (paper X). Images are in [epsilon, 1] (see `to_range`). Timesteps
    are the paper's: i = 0 is the clean image and i = T is noise. Numbers between whole timesteps are allowed.

    With the brightness a that the rate follows, r = gamma * (a + floor) and u = i / T:

        alpha_bar_i = exp(-r * u ** ramp_power)                                        (eq. 9: floor 0, ramp_power 1)
        x_i = sqrt(alpha_bar_i) * x_0 + sqrt(1 - alpha_bar_i) * noise                  (eq. 3)

    With `mode="structure"`, a is a *structure* that a `ScaleAutoencoder` decodes, so it is known when sampling, too.
    The chain is then an ordinary Gaussian one, and the reverse step, in posterior form, is exact. With `mode="paper"`,
    a is the image itself, which must be estimated when sampling, and algorithm 1 is integrated as printed
    (`step_paper`). This diverges: what a step adds is divided by sqrt(alpha_bar) in the end, so a pixel's error has a
    standard deviation of about exp(gamma * x_0 / 2).

    Everything is computed in logarithms with `expm1`, so that float32 suffices for gamma up to 60.

    Args:
        num_train_timesteps: T (paper: 200 with gamma 20, 500 with gamma 50).
        gamma: The rate of a pixel of brightness 1 without floor.
        floor: Added to the brightness, so that dark pixels become noise as well; gamma * floor from 2 up suffices. The
            default is 0.1, and 0 as in the paper in mode "paper".
        ramp_power: The default is 3, and 1 as in the paper in mode "paper". With 1 the first step already has noise of
            0.31 at brightness 1. 2 is the paper's appendix B.
        epsilon: The darkest value of an image.
        eta: The share of a posterior step's noise that is fresh: 1 for ancestral steps, 0 for deterministic ones.
        residual_std: RMS of image minus structure, for `precondition` and `prior_sample`. The trainer measures it.
        mode: "structure" or "paper", see above.
        schedule: "pixel", or "uniform" for the rate gamma / 2 at every pixel (an ablation).

    Raises:
        ValueError: for a setting out of range.

    Example:
        >>> scheduler = PixelAwareScheduler(num_train_timesteps=200, gamma=20.0)
        >>> structure = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)  # a dark and a bright pixel
        >>> scheduler.rate(structure).flatten().tolist()  # gamma * (brightness + floor)
        [2.0, 22.0]
        >>> scheduler.log_alpha_bar(scheduler.rate(structure), 100).flatten().tolist()  # -rate * (100 / 200) ** 3
        [-0.25, -2.75]
    """

    _compatibles = []
    order = 1
    CHOICES = {"mode": ("structure", "paper"), "schedule": ("pixel", "uniform")}
    BY_MODE = {"structure": {"floor": 0.1, "ramp_power": 3.0}, "paper": {"floor": 0.0, "ramp_power": 1.0}}
    ENOUGH = 2.0  # gamma * floor from which x_T tells about 0.001 nats a pixel of the image, or less
    MOST = 80.0  # the largest rate: its exp is a float32

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 200,
        gamma: float = 20.0,
        floor: float | None = None,
        ramp_power: float | None = None,
        epsilon: float = 4e-3,
        eta: float = 1.0,
        residual_std: float = 0.1,
        mode: Literal["structure", "paper"] = "structure",
        schedule: Literal["pixel", "uniform"] = "pixel",
    ):
        check_choices(self.config, self.CHOICES)
        floor = self.BY_MODE[mode]["floor"] if floor is None else floor
        ramp_power = self.BY_MODE[mode]["ramp_power"] if ramp_power is None else ramp_power
        # No setting counts as a default that `from_config` may replace by its own.
        self.register_to_config(floor=floor, ramp_power=ramp_power, _use_default_values=[])
        check_whole(self.config, "num_train_timesteps")
        check_positive(self.config, "ramp_power", "residual_std")
        if not 0 <= floor < math.inf:
            raise ValueError(f"floor={floor}: expected a number from 0 up")
        if not 0 < gamma * (1 + floor) <= self.MOST:
            raise ValueError(f"gamma={gamma}, floor={floor}: expected gamma * (1 + floor) above 0, up to {self.MOST}")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon={epsilon}: expected a number between 0 and 1")
        self._check_eta(eta)
        if mode == "structure" and schedule == "pixel" and gamma * floor < self.ENOUGH:
            self._warn_of_gap()
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps, 0, -1)

    def _warn_of_gap(self) -> None:
        gamma, floor, darkest = self.config.gamma, self.config.floor, torch.tensor(self.config.epsilon).double()
        left = self.image_scale(darkest)
        pixel_aware_logger.warning(
            f"gamma={gamma}, floor={floor}: dark pixels keep {left.item():.0%} of their variance at the last step, "
            f"{self._gap(darkest, left).item():.3g} nats a pixel from N(0, I), so the noise still shows the image; "
            f"gamma * floor from {self.ENOUGH:g} up closes the gap (see `prior_gap_report`)"
        )

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [cls]

    @staticmethod
    def _check_eta(eta: float) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: expected a number in [0, 1]")

    # Ranges.

    def to_range(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images of any shape from [0, 1] to [epsilon, 1]."""
        return self.config.epsilon + (1 - self.config.epsilon) * images

    def from_range(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images of any shape from [epsilon, 1] to [0, 1]. Nothing is clipped."""
        return (images - self.config.epsilon) / (1 - self.config.epsilon)

    def check_images(self, name: str, images: torch.Tensor) -> None:
        """Raises `ValueError` unless all values are in [epsilon, 1], up to rounding. Waits for a GPU."""
        if not images.is_floating_point():
            raise ValueError(
                f"{name} has dtype {images.dtype}: expected floating point, in [{self.config.epsilon:g}, 1]"
            )
        lowest, highest = images.amin().item(), images.amax().item()
        slack = max(1e-6, self.config.epsilon * torch.finfo(images.dtype).eps)  # of epsilon itself in bfloat16
        if not (self.config.epsilon - slack <= lowest and highest <= 1 + slack):
            raise ValueError(
                f"{name} has values from {lowest:.3g} to {highest:.3g}: expected [{self.config.epsilon:g}, 1]; "
                "`to_range` maps images in [0, 1] to it"
            )

    # The process: rates, and what follows from them.

    def rate(self, structure: torch.Tensor) -> torch.Tensor:
        """r of a structure, of any shape, in [epsilon, 1]: gamma * (structure + floor), or gamma / 2 if uniform."""
        if self.config.schedule == "uniform":
            return torch.full_like(structure, self.config.gamma / 2)
        return self.config.gamma * (structure + self.config.floor)

    def image_scale(self, original: torch.Tensor) -> torch.Tensor:
        """x_delta of an image (eq. 7), of the same shape: exp(-r), the signal's power that is left at i = T."""
        return (-self.rate(original)).exp()

    def log_alpha_bar(self, rate: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """log(alpha_bar_i), eq. 9, of a rate [B, ...] at a timestep in [0, T], a number or [B]."""
        return -rate * self._ramp(timestep, rate)

    def _ramp(self, timestep: Timestep, like: torch.Tensor) -> torch.Tensor | float:
        """(i / T) ** ramp_power, shaped to be multiplied with `like` [B, ...]."""
        if isinstance(timestep, torch.Tensor):
            if timestep.device.type == "cpu":  # checking elsewhere would wait for a GPU
                self._check_timestep(timestep.amin().item(), timestep.amax().item())
            u = timestep.to(like.device, torch.promote_types(like.dtype, torch.float32)) / len(self)
            if u.ndim and len(u) not in (1, len(like)):
                raise ValueError(f"timestep has shape {tuple(timestep.shape)}: expected a number or ({len(like)},)")
            return ((beside(u, like) if u.ndim else u) ** self.config.ramp_power).to(like.dtype)
        self._check_timestep(timestep, timestep)
        return (timestep / len(self)) ** self.config.ramp_power

    def _check_timestep(self, lowest: float, highest: float) -> None:
        if not (0 <= lowest and highest <= len(self)):
            value = lowest if lowest == highest else f"{lowest}..{highest}"
            raise ValueError(f"timestep={value}: expected numbers from 0 to {len(self)}")

    def _signal_and_noise(self, rate: torch.Tensor, timestep: Timestep) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(alpha_bar_i) and sqrt(1 - alpha_bar_i), the factors of eq. 3, each shaped as the rate."""
        log = self.log_alpha_bar(rate, timestep)
        return (log / 2).exp(), (-torch.expm1(log)).sqrt()

    def _rate_of(self, structure: torch.Tensor | None, original: torch.Tensor) -> torch.Tensor:
        """The rate of the structure, or of the image itself if there is no structure (eq. 9)."""
        if structure is not None and structure.shape != original.shape:
            raise ValueError(f"structure has shape {tuple(structure.shape)}: expected {tuple(original.shape)}")
        return self.rate(original if structure is None else structure)

    def snr(self, original: torch.Tensor, timestep: Timestep, structure: torch.Tensor | None = None) -> torch.Tensor:
        """x_0 ** 2 * alpha_bar / (1 - alpha_bar) (eq. 11) of images [B, ...]; infinite at timestep 0."""
        log = self.log_alpha_bar(self._rate_of(structure, original), timestep)
        return original**2 / torch.expm1(-log)

    def rho(self, rate: torch.Tensor, timestep: Timestep, earlier_timestep: Timestep) -> torch.Tensor:
        """
        Correlation of the noises at two timesteps i >= j of one chain, shaped as the rate [B, ...]: sqrt(S_j / S_i)
        with S = 1 / alpha_bar - 1. E[noise_j | x_i, x_0] is rho times the noise at i.
        """
        late, early = self._ramp(timestep, rate), self._ramp(earlier_timestep, rate)
        square = (-rate * (late - early)).exp() * torch.expm1(-rate * early) / torch.expm1(-rate * late)
        return square.clamp(0, 1).sqrt()

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: Timestep,
        structure: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        x_i of images [B, C, H, W] in [epsilon, 1] and `noise` of the same shape (eq. 3), at timesteps i, a number or
        [B]. The rate follows `structure`, by default the images themselves (eq. 9).

        Raises:
            ValueError: for shapes that do not fit, timesteps beyond [0, T] or, on the CPU, values beyond [epsilon, 1].
        """
        if original_samples.device.type == "cpu":
            self.check_images("original_samples", original_samples)
        signal, sigma = self._signal_and_noise(self._rate_of(structure, original_samples), timesteps)
        return signal * original_samples + sigma * noise

    def get_velocity(
        self,
        sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: Timestep,
        structure: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * sample. Arguments as of `add_noise`."""
        signal, sigma = self._signal_and_noise(self._rate_of(structure, sample), timesteps)
        return signal * noise - sigma * sample

    def sample_path(
        self,
        original: torch.Tensor,
        timesteps: Sequence[int],
        structure: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        States of one chain at several timesteps, distributed as if all steps between them were taken. The noise part of
        x_j is sqrt(alpha_bar_j) times a Brownian motion at S_j = 1 / alpha_bar_j - 1, so no other step is computed.

        Args:
            original: [B, C, H, W] in [epsilon, 1].
            timesteps: Ascending numbers from above 0 up to T.
            structure: As for `add_noise`.
            generator: One, or one for each image.

        Returns:
            The states, and their noises of eq. 3, each [len(timesteps), B, C, H, W].
        """
        times = [float(time) for time in timesteps]
        if not times or times != sorted(set(times)) or times[0] <= 0 or times[-1] > len(self):
            raise ValueError(f"timesteps={list(timesteps)}: expected ascending numbers above 0, up to {len(self)}")
        self.check_images("original", original)
        rate = self._rate_of(structure, original)
        samples, noises, motion, before = [], [], torch.zeros_like(original), 0.0
        for time in times:
            ramp = self._ramp(time, rate)
            white = white_noise(original.shape, generator=generator, device=original.device, dtype=original.dtype)
            increment = (rate * before).exp() * torch.expm1(rate * (ramp - before))
            motion = motion + increment.sqrt() * white
            noises.append(motion / torch.expm1(rate * ramp).sqrt())
            signal, sigma = self._signal_and_noise(rate, time)
            samples.append(signal * original + sigma * noises[-1])
            before = ramp
        return torch.stack(samples), torch.stack(noises)

    # What a network predicts, and what follows from its prediction in closed form.

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """The sample as it is; `precondition` makes what a network sees."""
        return sample

    def precondition(
        self, sample: torch.Tensor, timestep: Timestep, structure: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        EDM's preconditioning pixel by pixel, for images of spread `residual_std` about their structure.

        Returns:
            (input, skip, scale), each [B, C, H, W]. The clean estimate is skip + scale * network(input).
        """
        log = self.log_alpha_bar(self._rate_of(structure, sample), timestep)
        signal, noise_power, power = (log / 2).exp(), -torch.expm1(log), self.config.residual_std**2
        variance = signal**2 * power + noise_power
        deviation = sample - signal * structure
        skip = structure + signal * power / variance * deviation
        return deviation / variance.sqrt(), skip, self.config.residual_std * (noise_power / variance).sqrt()

    def noise_of(
        self,
        sample: torch.Tensor,
        clean: torch.Tensor,
        timestep: Timestep,
        structure: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise of eq. 3 in a sample [B, C, H, W], if `clean` is its image."""
        signal, sigma = self._signal_and_noise(self._rate_of(structure, clean), timestep)
        return (sample - signal * clean) / sigma

    def tied_noise(
        self,
        sample: torch.Tensor,
        clean: torch.Tensor,
        timestep: Timestep,
        steps: Sequence[int],
        structure: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Z^j for the steps j asked for, [len(steps), B, C, H, W]: the expected noises at j given a sample at timestep i
        and its clean estimate. They are rho_ji times the noise at i, and 0 for j > i (the mask of eq. 14).
        """
        self._check_steps(steps)
        rate, noise = self._rate_of(structure, clean), self.noise_of(sample, clean, timestep, structure)
        at = torch.as_tensor(timestep, dtype=torch.float32).to(sample.device, non_blocking=True).expand(len(sample))
        noises = []
        for step in steps:
            mask = beside((at >= step).to(rate.dtype), rate)
            noises.append(self.rho(rate, at, at.clamp(max=step)) * noise * mask)
        return torch.stack(noises)

    def trajectory(
        self,
        clean: torch.Tensor,
        noises: torch.Tensor,
        steps: Sequence[int],
        structure: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The states [len(steps), B, C, H, W] of eq. 3 that an image and noises [len(steps), B, C, H, W] make."""
        self._check_steps(steps)
        if len(noises) != len(steps):
            raise ValueError(f"noises has shape {tuple(noises.shape)}: expected {len(steps)} first, one for each step")
        rate, states = self._rate_of(structure, clean), []
        for step, noise in zip(steps, noises, strict=True):
            signal, sigma = self._signal_and_noise(rate, step)
            states.append(signal * clean + sigma * noise)
        return torch.stack(states)

    def _check_steps(self, steps: Sequence[int]) -> None:
        for step in steps:
            if not is_whole(step) or not 1 <= step <= len(self):
                raise ValueError(f"steps={step!r}: expected whole numbers from 1 to {len(self)}")

    # The reverse process.

    def prior_sample(
        self, structure: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """x_T [B, C, H, W] of a structure, distributed as x_T of images of spread `residual_std` about it."""
        log = self.log_alpha_bar(self.rate(structure), len(self))
        white = white_noise(structure.shape, generator=generator, device=structure.device, dtype=structure.dtype)
        spread = (log.exp() * self.config.residual_std**2 - torch.expm1(log)).sqrt()
        return (log / 2).exp() * structure + spread * white

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """The steps to run: so many, evenly spaced from T down, or these `timesteps`, descending from T to 1."""
        times = chosen_timesteps(num_inference_steps, timesteps, 1, len(self))
        if times is None:
            times = [round(len(self) * k / num_inference_steps) for k in range(num_inference_steps, 0, -1)]
        self.num_inference_steps = len(times)
        self.timesteps = torch.tensor(times, device=device)
        self._next = dict(zip(times, [*times[1:], 0], strict=True))

    def previous_timestep(self, timestep: int) -> int:
        """The timestep that a step leads to (before `set_timesteps`: of the training process); 0 after the last."""
        if self.num_inference_steps is None:
            return int(timestep) - 1
        if int(timestep) not in self._next:
            raise ValueError(f"timestep={timestep}: expected one of `timesteps`, {list(self._next)}")
        return self._next[int(timestep)]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        structure: torch.Tensor | None = None,
        prev_timestep: int | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PixelAwareSchedulerOutput | tuple:
        """
        One reverse step to any earlier timestep k, in posterior form: no division by sqrt(alpha_bar), so an error of
        the clean estimate arrives as it is and nothing grows. With the noise e of the sample and rho of i and k:

            x_k = sqrt(alpha_bar_k) * clean
                  + sqrt(1 - alpha_bar_k) * (sqrt(1 - eta^2 (1 - rho^2)) * e + eta * sqrt(1 - rho^2) * fresh noise)

        which is eq. 4's posterior at eta = 1 and DDIM at eta = 0.

        Args:
            model_output: [B, C, H, W], the clean estimate.
            timestep: i, in [1, T].
            sample: [B, C, H, W], x_i.
            structure: What the rate follows; by default the clean estimate, as in the paper, from epsilon up.
            prev_timestep: k, in [0, i); by default the next of `timesteps`. At 0 the result is the clean estimate.
            eta: By default the config's.
            generator: One, or one for each image.
            return_dict: Whether to return an output object or the tuple (prev_sample, pred_original_sample).
        """
        prev = self.previous_timestep(timestep) if prev_timestep is None else prev_timestep
        if not 0 <= prev < timestep:
            raise ValueError(f"prev_timestep={prev}: expected a number from 0 to below timestep={int(timestep)}")
        if model_output.shape != sample.shape:
            raise ValueError(f"model_output has shape {tuple(model_output.shape)}: expected {tuple(sample.shape)}")
        eta = self._eta(eta)
        dtype, work = sample.dtype, torch.promote_types(sample.dtype, torch.float32)
        clean, sample = model_output.to(work), sample.to(work)
        if prev == 0:
            prev_sample = clean
        else:
            # 1. The rate, and the sample's noise (eq. 3).
            structure = clean.clamp(min=self.config.epsilon) if structure is None else structure.to(work)
            rate, noise = self._rate_of(structure, clean), self.noise_of(sample, clean, timestep, structure)

            # 2. The share of that noise that stays, and the fresh noise.
            noise = (1 - eta**2 + (eta * self.rho(rate, timestep, prev)) ** 2).sqrt() * noise
            if eta > 0:
                white = white_noise(sample.shape, generator=generator, device=sample.device, dtype=work)
                noise = noise + eta * self._fresh_power(rate, timestep, prev).sqrt() * white

            # 3. The clean estimate with this noise at k (eq. 3).
            signal, sigma = self._signal_and_noise(rate, prev)
            prev_sample = signal * clean + sigma * noise
        prev_sample, clean = prev_sample.to(dtype), clean.to(dtype)
        if not return_dict:
            return prev_sample, clean
        return PixelAwareSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean)

    def _fresh_power(self, rate: torch.Tensor, timestep: int | torch.Tensor, prev_timestep: int) -> torch.Tensor:
        """1 - rho ** 2, which cancels where rho is near 1 and is therefore computed by itself."""
        late, early = self._ramp(timestep, rate), self._ramp(prev_timestep, rate)
        return torch.expm1(-rate * (late - early)) / torch.expm1(-rate * late)

    def _eta(self, eta: float | None) -> float:
        """The eta that was given, or the config's."""
        eta = self.config.eta if eta is None else eta
        self._check_eta(eta)
        return eta

    # What x_T tells of the image.

    @staticmethod
    def _gap(value: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in nats, of pixels with `left` = alpha_bar_T."""
        return 0.5 * (-left + value**2 * left - torch.log1p(-left))

    def prior_gap_report(self, images: torch.Tensor) -> dict[str, float]:
        """
        How far x_T of images is from N(0, I), where the paper starts, if the images themselves set the rates.

        Args:
            images: [B, C, H, W] in [epsilon, 1].

        Returns:
            KL(q(x_T | x_0) || N(0, I)) in nats: `kl_per_pixel` and `kl_per_image`, the means over all pixels and over
            the images, and `worst_pixel`, the largest of a pixel.

        Raises:
            ValueError: for another shape, no images, or values beyond [epsilon, 1].
        """
        if images.ndim != 4 or not images.numel():
            raise ValueError(f"images has shape {tuple(images.shape)}: expected [B, C, H, W]")
        self.check_images("images", images)
        pixels = images.cpu().double().clamp(self.config.epsilon, 1)
        gap = self._gap(pixels, self.image_scale(pixels))
        mean = gap.mean().item()
        return {"kl_per_pixel": mean, "kl_per_image": mean * images[0].numel(), "worst_pixel": gap.max().item()}
