"""Super-resolution by diffusion of what the enlarged input lacks (paper S: SR4), or of the image itself (SR3)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput

from pyrdiff.parts.checks import (
    Generators,
    Size,
    check_count,
    check_scheduler,
    check_size,
    check_strength,
    check_switch,
    is_count,
    is_number,
)
from pyrdiff.parts.estimates import CleanEstimate, prediction_type, signal_and_noise, unclipped
from pyrdiff.parts.images import read_images
from pyrdiff.parts.jumps import check_calls
from pyrdiff.parts.noise import white_noise
from pyrdiff.parts.operators import SeparableOperator, project_onto
from pyrdiff.parts.plans import check_not_beside_plan, given, plan_scheduler, read_plan
from pyrdiff.parts.sampling import SamplingPipeline
from pyrdiff.parts.settings import is_whole
from pyrdiff.parts.steps import LevelSteps, Spacing, check_start_above_zero, lay_out_steps, takes
from pyrdiff.parts.windows import Tiling, WindowedNetwork
from pyrdiff.parts.wrappers import network_takes, plain


@dataclass
class ResidualSRCost:
    """What a call costs: the output's size (height, width), the time of every network call, and their number."""

    size: tuple[int, int]
    timesteps: list[float]
    nfe_eq: float


@dataclass
class ResidualSRPipelineOutput(BaseOutput):
    """
    Args:
        images: The enlarged images, input by input, `num_samples` of each: PIL, a numpy array
            [B * num_samples, H, W, C] in [0, 1], or a tensor [B * num_samples, C, H, W] ("pt" in [0, 1], "latent" in
            [-1, 1], not clipped).
        consistency: float32 [B * num_samples]: mean absolute difference between the input and the output made smaller
            again (bicubic, as Pillow does it), in the [0, 1] range of the input.
        mean: The mean of each input's samples, in the same form, B of them; `None` for one sample.
        uncertainty: float32 [B, 1, H, W]: the samples' standard deviation (of n, divided by n - 1), its root mean
            square over the channels, in the [0, 1] range; `None` for one sample.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    consistency: torch.Tensor
    mean: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None


class ResidualArguments(NamedTuple):
    """The arguments of a call that say its steps, with their defaults: what a plan may set."""

    num_inference_steps: int | None = None
    strength: float = 1.0
    spacing: Spacing = "scheduler"
    eta: float | None = None


@dataclass(frozen=True)
class DiffusedTarget:
    """
    What is diffused, in [-1, 1] images [B, C, H, W]: the residual of eq. 9 times a scale, or the image itself.

    Args:
        upsampled: The enlarged input.
        scale: `residual_scale` of the scheduler's config; `None` where the image itself is diffused.
    """

    upsampled: torch.Tensor
    scale: float | None

    @classmethod
    def of(cls, scheduler: SchedulerMixin, upsampled: torch.Tensor) -> "DiffusedTarget":
        image = scheduler.config["prediction_target"] == "image"
        return cls(upsampled, None if image else scheduler.config["residual_scale"])

    def diffused(self, images: torch.Tensor) -> torch.Tensor:
        return images if self.scale is None else (images - self.upsampled) * self.scale

    def compose(self, diffused: torch.Tensor) -> torch.Tensor:
        """Eq. 9: the image of what is diffused."""
        return diffused if self.scale is None else diffused / self.scale + self.upsampled


class ResidualSRPipeline(SamplingPipeline, DiffusionPipeline):
    r"""
    Enlarges images by conditional diffusion: from noise to a residual that is added to the enlarged input (eq. 9), or
    to the image itself. What is diffused is said by the scheduler's config, `prediction_target` and `residual_scale`.

    Parameters:
        unet: A network called as unet(sample, noise_level, low_res), noise_level being sqrt(gamma).
        scheduler: A `CosineResidualScheduler`, or a scheduler of diffusers made by `from_config` of its config. Its own
            clipping is left out; see `clip_sample`.
        plans (`dict`, *optional*): Named plans for `plan=`: {name: {argument of a call: value}} for
            `num_inference_steps`, `strength`, `spacing` and `eta`, and in it, as "scheduler", [class of diffusers,
            {setting: value}] to run it with instead. One named "default" is what a call without `num_inference_steps`
            and `plan` uses.
    """

    TARGET = ("prediction_target", "residual_scale")
    PLAN_ARGUMENTS = ResidualArguments._fields

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, plans: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(plans=plans)
        if not (network_takes(unet, "noise_level") and network_takes(unet, "low_res")):
            raise ValueError(
                f"unet={type(plain(unet)).__name__}: expected a network that takes `noise_level` and `low_res`, such "
                "as ResidualSRUNet2DModel"
            )
        self._check_process(scheduler)
        if plans is not None and not isinstance(plans, dict):
            raise ValueError(f"plans={plans!r}: expected {{name: {{argument: value}}}}")
        for plan in plans or {}:
            self._lay_out(plan, ResidualArguments())

    @staticmethod
    def upsample(low: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """
        The images [B, C, h, w] at another size (height, width), float32: bicubic with Pillow's kernel, also where it
        makes them smaller. Not clamped. What the training residuals are relative to.
        """
        if size[1] == 1:  # torch 2.13 mixes up the rows of images that become one pixel wide
            return F.interpolate(low.float().mT.contiguous(), size[::-1], mode="bicubic", antialias=True).mT
        return F.interpolate(low.float(), size, mode="bicubic", antialias=True)

    def cost(
        self,
        image_size: Size,
        scale_factor: int | None = None,
        num_inference_steps: int | None = None,
        strength: float = 1.0,
        spacing: Literal["scheduler", "log_snr"] | Sequence[int] = "scheduler",
        plan: str | dict | None = None,
    ) -> ResidualSRCost:
        """What a call for an input of this size with these arguments costs (see `__call__`); no network is run."""
        size = self._output_size(check_size("image_size", image_size), scale_factor)
        steps, _ = self._lay_out(plan, ResidualArguments(num_inference_steps, strength, spacing))
        return ResidualSRCost(size, steps.times, float(len(steps)))

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list,
        scale_factor: int | None = None,
        num_inference_steps: int | None = None,
        strength: float = 1.0,
        spacing: Literal["scheduler", "log_snr"] | Sequence[int] = "scheduler",
        eta: float | None = None,
        plan: str | dict | None = None,
        num_samples: int = 1,
        detail: float | None = None,
        restore: float | None = None,
        hard_consistency: bool = False,
        color_fix: bool = False,
        clip_sample: bool = True,
        tile: int | None = None,
        tile_overlap: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ResidualSRPipelineOutput | tuple:
        r"""
        Args:
            image: One or several images of one size: PIL in mode RGB or L, a list of them, numpy [H, W, C] or
                [B, H, W, C] in [0, 1], or a tensor [C, h, w] or [B, C, h, w] in [0, 1].
            scale_factor: Output's sides over input's, one of the network's `scale_factors`; by default the largest. Of
                a network that names none, any whole number from 2 up.
            num_inference_steps: Network calls; a second-order scheduler makes an odd number. By default the plan
                "default" if there is one, its entries replaced by those given here, and else 100 calls, or as many as
                there are training steps up to `strength`.
            strength: Share in (0, 1] of the noise process that is run. Below 1 it starts from the enlarged input (for a
                residual: from 0) noised so far, as CCDF does.
            spacing: How the steps are placed: as the scheduler does, uniformly in log-SNR, or the times themselves,
                descending whole numbers from T - 1 (or the `strength` of it) down.
            eta: For schedulers whose `step` takes it: the share of DDIM's noise, in [0, 1]. `None`: their own default.
            plan: A plan of the pipeline by its name (`pipeline.config.plans`), or one as a dict, in place of the four
                arguments above, which are then left at their defaults.
            num_samples: Samples of each input. They come input by input.
            detail: How much detail a network that was trained so makes up: from 0, the nearest to the truth and smooth,
                to 1, the default, as sharp as it can.
            restore: How much blur, noise and JPEG such a network undoes: from 0, the default, for inputs that were only
                made smaller, to 1.
            hard_consistency: Whether to project the output until bicubic shrinking turns it into the input up to
                rounding, as far as images in [0, 1] can; it is then clipped in every form.
            color_fix: Whether to shift each channel of each output so that its mean, before clipping, is the input's.
            clip_sample: Whether each clean estimate is kept where the image that it makes is in [-1, 1].
            tile: Side of the square windows of the output that the network sees at a time, for images that do not fit
                as a whole. The noise is of the whole image and the windows blend in every step. Halved when memory runs
                out.
            tile_overlap: Pixels that neighbouring windows share at least; by default a quarter of `tile`.
            generator: One generator, or one an input: the samples of an input then do not depend on the other inputs.
                They draw from it in turn, so they are different, and depend on how many they are.
            output_type: "pil", "np" and "pt" in [0, 1], or "latent" in [-1, 1].
            return_dict: Whether to return a `ResidualSRPipelineOutput` or a tuple (images, consistency, mean,
                uncertainty).
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": ...}) after each step, the latents
                being what is diffused; may return changed tensors. Setting `pipeline._interrupt = True` ends the run.

        Raises:
            ValueError: for arguments out of range, before any network call.
        """
        low = read_images(image, self._channels)
        size = self._output_size(tuple(low.shape[-2:]), scale_factor)
        steps, chosen = self._lay_out(plan, ResidualArguments(num_inference_steps, strength, spacing, eta))
        check_count("num_samples", num_samples)
        switches = {"hard_consistency": hard_consistency, "color_fix": color_fix, "clip_sample": clip_sample}
        for name, value in switches.items():
            check_switch(name, value)
        self._check_request(len(low), generator, output_type, callback_on_step_end_tensor_inputs)
        tiling = Tiling.checked(tile, tile_overlap, self._size_multiple)
        told = self._told(detail=detail, restore=restore)
        network = WindowedNetwork(partial(self._network, **told), self._size_multiple, tiling)
        estimates = self._estimates(steps)

        device = self._execution_device
        low = low.to(device, torch.float32)
        upsampled = self.upsample(2 * low - 1, size).repeat_interleave(num_samples, 0)
        target = DiffusedTarget.of(steps.scheduler, upsampled)
        latents = self._begin(
            target, steps, chosen.strength, self._noise(upsampled.shape, num_samples, generator, device)
        )
        if isinstance(generator, list):  # the samples of an input draw from its generator in turn
            generator = [one for one in generator for _ in range(num_samples)]
        with self._running(len(steps), callback_on_step_end, callback_on_step_end_tensor_inputs) as run:
            for timestep, estimate in run.going(zip(steps.timesteps, estimates, strict=True)):
                sample = steps.scheduler.scale_model_input(latents, timestep)
                noise_level = torch.full((len(sample),), estimate.signal, device=device)
                prediction = network.predict(sample, noise_level, upsampled)
                if clip_sample:
                    prediction = self._clipped(prediction, sample, estimate, target)
                output = prediction if self._takes_variance(steps.scheduler) else prediction[:, : self._channels]
                latents = steps.step(output, timestep, latents, generator, chosen.eta)
                latents = run.after_step(timestep, latents)

        images, low = target.compose(latents), low.repeat_interleave(num_samples, 0)  # eq. 9
        if color_fix:
            images = images + (2 * low - 1).mean((-2, -1), keepdim=True) - images.mean((-2, -1), keepdim=True)
        if hard_consistency:
            shrinking = SeparableOperator.named("bicubic", size, tuple(low.shape[-2:]), self._channels)
            images = project_onto(images, low, shrinking)
        output = self._output(images, low, num_samples, output_type)
        if not return_dict:
            return (output.images, output.consistency, output.mean, output.uncertainty)
        return output

    def _network(self, sample: torch.Tensor, level: torch.Tensor, low_res: torch.Tensor, **told: float) -> torch.Tensor:
        dtype = plain(self.unet).dtype
        return self.unet(sample.to(dtype), level, low_res=low_res.to(dtype), **told, return_dict=False)[0].float()

    def _told(self, **arguments: float | None) -> dict[str, float]:
        """What the network is told beside the images, of the arguments that were given."""
        for name, value in arguments.items():
            if value is None:
                continue
            if not network_takes(self.unet, name):
                kind = type(plain(self.unet)).__name__
                raise ValueError(f"{name}={value!r}: expected None, since the network takes none, a {kind}")
            if not (is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name}={value!r}: expected a number in [0, 1]")
        return {name: float(value) for name, value in arguments.items() if value is not None}

    @staticmethod
    def _noise(shape: torch.Size, num_samples: int, generator: Generators, device: torch.device) -> torch.Tensor:
        """Noise of the output's shape, input by input from its own generator if there are several."""
        if not isinstance(generator, list):
            return white_noise(shape, generator=generator, device=device)
        samples = (num_samples, *shape[1:])
        return torch.cat([white_noise(samples, generator=one, device=device) for one in generator])

    @staticmethod
    def _begin(target: DiffusedTarget, steps: LevelSteps, strength: float, noise: torch.Tensor) -> torch.Tensor:
        """Noise; below the full strength the enlarged input (a residual of 0), noised so far."""
        if strength == 1:
            return noise * steps.scheduler.init_noise_sigma
        return steps.renoise(target.diffused(target.upsampled), noise)

    def _clipped(
        self, prediction: torch.Tensor, sample: torch.Tensor, estimate: CleanEstimate, target: DiffusedTarget
    ) -> torch.Tensor:
        """The prediction whose clean estimate makes an image in [-1, 1]; a variance behind it stays."""
        output, variance = prediction[:, : self._channels], prediction[:, self._channels :]
        images = target.compose(estimate.clean(sample, output)).clamp(-1, 1)
        return torch.cat((estimate.output(sample, target.diffused(images)), variance), dim=1)

    def _output(
        self, images: torch.Tensor, low: torch.Tensor, num_samples: int, output_type: str
    ) -> ResidualSRPipelineOutput:
        """
        Args:
            images: [B * num_samples, C, H, W] in [-1, 1], not clipped.
            low: The inputs [B * num_samples, C, h, w] in [0, 1].
        """
        size, clipped, mean, uncertainty = tuple(images.shape[-2:]), images.clamp(-1, 1), None, None
        difference = self.upsample(clipped, tuple(low.shape[-2:])) - (2 * low - 1)
        if num_samples > 1:
            mean = (images if output_type == "latent" else clipped).unflatten(0, (-1, num_samples)).mean(1)
            mean = self._to_output(mean, size, output_type)
            uncertainty = (clipped / 2).unflatten(0, (-1, num_samples)).var(1).mean(1, keepdim=True).sqrt()
        return ResidualSRPipelineOutput(
            images=self._to_output(images, size, output_type),
            consistency=difference.abs().flatten(1).mean(1) / 2,
            mean=mean,
            uncertainty=uncertainty,
        )

    @staticmethod
    def _takes_variance(scheduler: SchedulerMixin) -> bool:
        """Whether a step takes the network's second half of channels: ancestral steps with a learned variance do."""
        ancestral = takes(type(scheduler).__init__, "prediction_target") or isinstance(
            scheduler, (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler)
        )
        return ancestral and scheduler.config.get("variance_type") in ("learned", "learned_range")

    def _estimates(self, steps: LevelSteps) -> list[CleanEstimate]:
        """
        The clean estimate of each step. Many schedulers know the noise level only of the step that they are at, so a
        copy takes the steps once with nothing in them.
        """
        rehearsal = LevelSteps(copy.deepcopy(steps.scheduler), steps.timesteps)
        nothing = torch.zeros(1, self._channels, 1, 1)
        output = torch.cat([nothing] * (2 if self._takes_variance(steps.scheduler) else 1), dim=1)
        estimates = []
        for timestep in rehearsal.timesteps:
            rehearsal.scheduler.scale_model_input(nothing, timestep)
            signal, noise = signal_and_noise(rehearsal.scheduler, timestep)
            if signal == 0 and prediction_type(rehearsal.scheduler) == "epsilon":
                raise ValueError(
                    f"{type(steps.scheduler).__name__} starts where no signal is left (time {float(timestep):g}): "
                    "expected strength below 1, or a network that predicts v"
                )
            estimates.append(CleanEstimate.at(rehearsal.scheduler, signal, noise))
            rehearsal.step(output, timestep, nothing, torch.Generator())
        return estimates

    # Arguments and plans.

    def _lay_out(self, plan: str | dict | None, arguments: ResidualArguments) -> tuple[LevelSteps, ResidualArguments]:
        """The steps of a call, with a scheduler of their own, and its arguments; raises for what cannot run."""
        if plan is not None:
            check_not_beside_plan(plan, arguments)
        elif arguments.num_inference_steps is None and "default" in (self.config.plans or {}):
            plan = "default"
        named = read_plan({} if plan is None else plan, self.config.plans, self.PLAN_ARGUMENTS, ("scheduler",))
        arguments = ResidualArguments(**{**named.arguments, **given(arguments)})
        scheduler = self._scheduler_of(named.schedulers.get("scheduler"))
        if arguments.eta is not None:
            self._check_eta(arguments.eta, scheduler)
        check_strength("strength", arguments.strength)
        calls, spacing = self._calls(arguments, scheduler.config.num_train_timesteps)
        steps = lay_out_steps(scheduler, calls, arguments.strength, spacing, "num_inference_steps")
        if scheduler.config.num_train_timesteps > 1:
            check_start_above_zero(steps, "num_inference_steps", calls)
        check_calls(plain(self.unet).config, steps.times, self.config.plans or ())
        return steps, arguments

    @staticmethod
    def _calls(arguments: ResidualArguments, train_steps: int) -> tuple[int, Spacing]:
        """Network calls and their spacing; where times are given, these say how many."""
        calls, strength, spacing = arguments.num_inference_steps, arguments.strength, arguments.spacing
        if calls is not None:
            check_count("num_inference_steps", calls)
        if isinstance(spacing, str):
            if spacing not in ("scheduler", "log_snr"):
                raise ValueError(f"spacing={spacing!r}: expected 'scheduler', 'log_snr' or a list of times")
            return calls or max(min(100, int(strength * train_steps)), 1), spacing
        if not isinstance(spacing, (list, tuple)) or not all(is_whole(time) for time in spacing):
            raise ValueError(f"spacing={spacing!r}: expected a list of descending whole numbers")
        if calls not in (None, len(spacing)):
            raise ValueError(f"num_inference_steps={calls} with {len(spacing)} times in spacing: expected as many")
        if max(spacing, default=0) > strength * train_steps:
            raise ValueError(f"spacing={spacing}: expected times up to {strength * train_steps:g}, for {strength=}")
        return len(spacing), spacing

    @staticmethod
    def _check_eta(eta: float, scheduler: SchedulerMixin) -> None:
        if not (is_number(eta) and 0 <= eta <= 1):
            raise ValueError(f"eta={eta!r}: expected None or a number in [0, 1]")
        if not takes(scheduler.step, "eta"):
            raise ValueError(
                f"eta={eta}: {type(scheduler).__name__} does not take it; expected None, or a scheduler such as "
                "CosineResidualScheduler or DDIMScheduler"
            )

    def _scheduler_of(self, entry: list | None) -> SchedulerMixin:
        """
        The pipeline's scheduler without its clipping; or for a plan's [class, settings] one of diffusers over the same
        noise process, with the same target and spacing of steps.
        """
        if entry is None:
            scheduler = unclipped(self.scheduler)
        else:
            fixed = {"clip_sample": False, "thresholding": False}
            scheduler = plan_scheduler(
                "scheduler", entry, self.scheduler, kept=("variance_type", "timestep_spacing"), fixed=fixed
            )
            config = self.scheduler.config
            scheduler.register_to_config(**{name: config[name] for name in self.TARGET if name in config})
        self._check_process(scheduler)
        return scheduler

    def _check_process(self, scheduler: SchedulerMixin) -> None:
        """Refuses a scheduler that does not say what is diffused, or that the network does not fit."""
        check_scheduler("scheduler", scheduler)
        name, config, channels = type(scheduler).__name__, scheduler.config, self._channels
        target = config.get("prediction_target")
        scale = config.get("residual_scale") if target == "residual" else 1.0
        if target not in ("residual", "image"):
            raise ValueError(
                f"scheduler={name} with prediction_target={target!r} in its config: expected 'residual' or 'image'; "
                f"make it by {name}.from_config(scheduler.config) of a CosineResidualScheduler"
            )
        if not (is_number(scale) and scale > 0):
            raise ValueError(f"scheduler={name} with residual_scale={scale!r}: expected a finite number above 0")
        prediction_type(scheduler)
        made = plain(self.unet).config.get("out_channels") or channels
        if made not in (channels, 2 * channels):
            raise ValueError(f"unet makes {made} channels of {channels}: expected as many, or twice as many")
        if self._takes_variance(scheduler) and made != 2 * channels:
            raise ValueError(
                f"scheduler={name} with variance_type={config.get('variance_type')!r}: expected a unet with "
                f"out_channels={2 * channels}, got {made}; or 'fixed_small' or 'fixed_large'"
            )

    def _output_size(self, small: tuple[int, int], scale_factor: int | None) -> tuple[int, int]:
        """(height, width) of the output."""
        trained = plain(self.unet).config.get("scale_factors")
        if scale_factor is None:
            if not trained:
                raise ValueError("scale_factor=None: expected a whole number, since the network's config names none")
            scale_factor = max(trained)
        if not is_count(scale_factor) or scale_factor < 2:
            raise ValueError(f"scale_factor={scale_factor!r}: expected a whole number from 2 up")
        if trained and scale_factor not in trained:
            raise ValueError(f"scale_factor={scale_factor}: expected one of {sorted(trained)}, as it was trained for")
        return tuple(side * scale_factor for side in small)
