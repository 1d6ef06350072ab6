"""Super-resolution by diffusion of what the enlarged input lacks (paper S: SR4), or of the image itself (SR3)."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

from pyrdiff.parts.saving import StandaloneSaving

logger = logging.get_logger(__name__)

Size = int | tuple[int, int]


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


class WindowedNetwork:
    """
    A network's prediction for an image that may be too large for it: by windows that overlap and blend.

    Args:
        network: Called as network(sample [B, C, H, W], noise level [B], enlarged input [B, C, H, W]).
        multiple: Sides that the network takes are multiples of this; others are padded by reflection.
        tile, overlap: Side of the windows and what neighbours share at least, multiples of `multiple`; no tile: whole.
    """

    def __init__(self, network: Callable, multiple: int, tile: int | None, overlap: int | None):
        self.network, self.multiple, self.tile, self.overlap = network, multiple, tile, overlap

    def predict(self, sample: torch.Tensor, level: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
        """The prediction for [B, C, H, W], float32, with as many channels as the network makes."""
        height, width = sample.shape[-2:]
        padding = (0, -width % self.multiple, 0, -height % self.multiple)
        if any(padding):
            sample, low_res = (F.pad(image, padding, mode="reflect") for image in (sample, low_res))
        while True:
            try:
                return self._predict(sample, level, low_res)[..., :height, :width]
            except RuntimeError as error:
                self._halve(error, sample)
            if sample.is_cuda:
                torch.cuda.empty_cache()

    def _predict(self, sample: torch.Tensor, level: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
        rows, columns = (self._windows(length) for length in sample.shape[-2:])
        if len(rows) == len(columns) == 1:
            return self.network(sample, level, low_res)
        blended = None
        for row, a in rows:
            for column, b in columns:
                piece = self.network(sample[..., row, column], level, low_res[..., row, column])
                if blended is None:
                    blended = piece.new_zeros(*piece.shape[:2], *sample.shape[-2:])
                blended[..., row, column] += piece * (a[:, None] * b).to(piece)
        return blended

    def _windows(self, length: int) -> list[tuple[slice, torch.Tensor]]:
        """Places of the windows along one side, and their weights; a pixel's weights sum to 1."""
        side = min(self.tile or length, length)
        count = 1 if side == length else math.ceil((length - self.overlap) / (side - self.overlap))
        places = torch.linspace(0, length - side, count) / self.multiple
        places = [int(place) * self.multiple for place in places.round()]
        weights, share = torch.zeros(count, length, dtype=torch.float64), max(self.overlap or 0, 1)
        inside = torch.arange(side, dtype=torch.float64) + 0.5
        for weight, place in zip(weights, places, strict=True):
            before = inside if place > 0 else torch.full_like(inside, share)
            after = side - inside if place < length - side else torch.full_like(inside, share)
            near = torch.minimum(before, after).clamp(max=share) / share
            weight[place : place + side] = torch.sin(math.pi / 2 * near) ** 2
        weights = (weights / weights.sum(0)).float()
        return [(slice(p, p + side), weight[p : p + side]) for p, weight in zip(places, weights, strict=True)]

    def _halve(self, error: RuntimeError, image: torch.Tensor) -> None:
        """Halves the windows if memory ran out; raises what else went wrong."""
        if not ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error)):
            raise error
        side = min(self.tile or math.inf, max(image.shape[-2:])) // 2 // self.multiple * self.multiple
        if side < 2 * self.multiple:
            raise error
        self.tile, self.overlap = side, max(side // 4 // self.multiple, 1) * self.multiple
        logger.warning(f"out of memory: the network goes on with windows of {side}x{side}")


class ResidualSRPipeline(StandaloneSaving, DiffusionPipeline):
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

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]
    TARGET = ("prediction_target", "residual_scale")
    NOISE_PROCESS = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    PLAN_ARGUMENTS = ("num_inference_steps", "strength", "spacing", "eta")

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, plans: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(plans=plans)
        takes = inspect.signature(self._plain(unet).forward).parameters
        if not {"noise_level", "low_res"} <= set(takes):
            raise ValueError(
                f"unet={type(self._plain(unet)).__name__}: expected a network that takes `noise_level` and `low_res`, "
                "such as ResidualSRUNet2DModel"
            )
        self._check_process(scheduler)
        if plans is not None and not isinstance(plans, dict):
            raise ValueError(f"plans={plans!r}: expected {{name: {{argument: value}}}}")
        for plan in plans or {}:
            self._timesteps(*self._arguments(None, 1.0, "scheduler", None, plan))

    @staticmethod
    def _check_scheduler(name: str, part) -> None:
        if not (hasattr(part, "add_noise") and hasattr(part, "alphas_cumprod")):
            raise ValueError(
                f"{name}={type(part).__name__}: expected a scheduler with `add_noise` and `alphas_cumprod`, such "
                "as DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler or "
                "HeunDiscreteScheduler"
            )

    @property
    def num_timesteps(self) -> int:
        """Network calls of the last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @staticmethod
    def upsample(low: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """
        The images [B, C, h, w] at another size (height, width), float32: bicubic with Pillow's kernel, also where it
        makes them smaller. Not clamped. What the training residuals are relative to.
        """
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
        size = self._output_size(self._pair("image_size", image_size), scale_factor)
        scheduler, arguments = self._arguments(num_inference_steps, strength, spacing, None, plan)
        times = [float(time) for time in self._timesteps(scheduler, arguments)]
        return ResidualSRCost(size, times, float(len(times)))

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
        # 1. Check, and lay out the steps.
        low = self._low_res(image)
        size = self._output_size(tuple(low.shape[-2:]), scale_factor)
        scheduler, arguments = self._arguments(num_inference_steps, strength, spacing, eta, plan)
        strength, eta = arguments["strength"], arguments["eta"]
        self._check_inputs(
            len(low), num_samples, generator, output_type, callback_on_step_end_tensor_inputs,
            hard_consistency=hard_consistency, color_fix=color_fix, clip_sample=clip_sample,
        )  # fmt: skip
        network = WindowedNetwork(self._network, self._size_multiple(), *self._tiling(tile, tile_overlap))
        noise_levels = self._noise_levels(scheduler, self._timesteps(scheduler, arguments))
        # Schedulers read their times as numbers, so these stay on the CPU, where that waits for no GPU.
        timesteps = self._timesteps(scheduler, arguments)
        self._interrupt, self._num_timesteps = False, len(timesteps)

        # 2. The enlarged input, and the start: noise, or the enlarged input (a residual of 0) noised.
        device, channels = self._execution_device, self._channels()
        low = 2 * low.to(device, torch.float32) - 1
        upsampled = self.upsample(low, size).repeat_interleave(num_samples, 0)
        rows = len(upsampled)
        if isinstance(generator, list):
            shape = (num_samples, channels, *size)
            noise = torch.cat([randn_tensor(shape, generator=each, device=device) for each in generator])
            generator = [each for each in generator for _ in range(num_samples)]
        else:
            noise = randn_tensor((rows, channels, *size), generator=generator, device=device)
        if strength == 1:
            latents = noise * scheduler.init_noise_sigma
        else:
            start = self._diffused(upsampled, upsampled, scheduler)
            latents = scheduler.add_noise(start, noise, timesteps[:1].expand(rows).to(device))

        # 3. The reverse process.
        step_arguments = {} if eta is None else {"eta": eta}
        if "generator" in inspect.signature(scheduler.step).parameters:
            step_arguments["generator"] = generator
        with self.progress_bar(total=len(timesteps)) as progress:
            for step, (timestep, (signal, noise_level)) in enumerate(zip(timesteps, noise_levels, strict=True)):
                if self.interrupt:
                    continue
                sample = scheduler.scale_model_input(latents, timestep)
                prediction = network.predict(sample, torch.full((rows,), signal, device=device), upsampled)
                output, variance = prediction[:, :channels], prediction[:, channels:]
                if clip_sample:
                    # Eq. 2 solved for the clean estimate, c0 * sample + c1 * output for every kind of prediction.
                    c0, c1 = self._clean_from(scheduler, signal, noise_level)
                    images = self._compose(c0 * sample + c1 * output, upsampled, scheduler).clamp(-1, 1)
                    output = (self._diffused(images, upsampled, scheduler) - c0 * sample) / c1
                if self._takes_variance(scheduler):
                    output = torch.cat((output, variance), dim=1)
                latents = scheduler.step(output, timestep, latents, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    changed = callback_on_step_end(self, step, timestep, tensors) or {}
                    latents = changed.pop("latents", latents)
                progress.update()

        # 4. Eq. 9, and from [-1, 1] to what was asked for.
        images = self._compose(latents, upsampled, scheduler)
        inputs = low.repeat_interleave(num_samples, 0)
        if color_fix:
            images = images + (inputs.mean((-2, -1), keepdim=True) - images.mean((-2, -1), keepdim=True))
        if hard_consistency:
            images = self._consistent(images, inputs)
        clipped = images.clamp(-1, 1)
        consistency = (self.upsample(clipped, inputs.shape[-2:]) - inputs).abs().flatten(1).mean(1) / 2
        mean = uncertainty = None
        if num_samples > 1:
            mean = (images if output_type == "latent" else clipped).unflatten(0, (-1, num_samples)).mean(1)
            mean = self._to_output(mean, size, output_type)
            uncertainty = (clipped / 2).unflatten(0, (-1, num_samples)).var(1).mean(1, keepdim=True).sqrt()
        images = self._to_output(images, size, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, consistency, mean, uncertainty)
        return ResidualSRPipelineOutput(images=images, consistency=consistency, mean=mean, uncertainty=uncertainty)

    # What is diffused (eq. 9). The scheduler's own methods are not there for a solver of diffusers.

    @staticmethod
    def _diffused(images: torch.Tensor, upsampled: torch.Tensor, scheduler) -> torch.Tensor:
        config = scheduler.config
        return images if config["prediction_target"] == "image" else (images - upsampled) * config["residual_scale"]

    @staticmethod
    def _compose(diffused: torch.Tensor, upsampled: torch.Tensor, scheduler) -> torch.Tensor:
        config = scheduler.config
        return diffused if config["prediction_target"] == "image" else diffused / config["residual_scale"] + upsampled

    def _network(self, sample: torch.Tensor, level: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
        dtype = self.unet.dtype
        return self.unet(sample.to(dtype), level, low_res=low_res.to(dtype), return_dict=False)[0].float()

    def _takes_variance(self, scheduler) -> bool:
        """Whether a step takes the network's second half of channels: ancestral steps with a learned variance do."""
        known = inspect.signature(type(scheduler).__init__).parameters
        ancestral = "prediction_target" in known or isinstance(
            scheduler, (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler)
        )
        return ancestral and scheduler.config.get("variance_type") in ("learned", "learned_range")

    def _noise_levels(self, scheduler, timesteps: torch.Tensor) -> list[tuple[float, float]]:
        """
        `_signal_and_noise` at each of the timesteps. Many schedulers know it only of the step that they are at, so they
        take their steps once with nothing in them.
        """
        levels, nothing = [], torch.zeros(1, self._channels(), 1, 1)
        output = torch.cat([nothing] * (2 if self._takes_variance(scheduler) else 1), dim=1)
        takes = "generator" in inspect.signature(scheduler.step).parameters
        step_arguments = {"generator": torch.Generator()} if takes else {}
        for timestep in timesteps:
            scheduler.scale_model_input(nothing, timestep)
            signal, noise_level = self._signal_and_noise(scheduler, timestep)
            if signal == 0 and scheduler.config.get("prediction_type", "epsilon") == "epsilon":
                raise ValueError(
                    f"{type(scheduler).__name__} starts where no signal is left (time {float(timestep):g}): expected "
                    "strength below 1, or a network that predicts v"
                )
            levels.append((signal, noise_level))
            scheduler.step(output, timestep, nothing, **step_arguments)
        return levels

    @staticmethod
    def _signal_and_noise(scheduler, timestep: torch.Tensor) -> tuple[float, float]:
        """a and s of x_t = a x_0 + s noise, as the network sees it."""
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        pairs = (scheduler.add_noise(*pair, timestep.reshape(1)) for pair in ((one, zero), (zero, one)))
        signal, noise_level = (scheduler.scale_model_input(value, timestep).item() for value in pairs)
        if abs(signal**2 + noise_level**2 - 1) > 0.01:
            raise ValueError(
                f"{type(scheduler).__name__} does not say which noise level its steps are at: expected another"
            )
        return signal, noise_level

    @staticmethod
    def _clean_from(scheduler, signal: float, noise_level: float) -> tuple[float, float]:
        """c0 and c1, so that the clean estimate is c0 * sample + c1 * output (eq. 9)."""
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind == "sample":
            return 0.0, 1.0
        return (signal, -noise_level) if kind == "v_prediction" else (1 / signal, -noise_level / signal)

    def _unclipped_scheduler(self) -> SchedulerMixin:
        """The scheduler, or one like it that does not clip the clean estimate: that would come after the guidance."""
        clips = {name: False for name in ("clip_sample", "thresholding") if self.scheduler.config.get(name)}
        return type(self.scheduler).from_config(self.scheduler.config, **clips) if clips else self.scheduler

    def _consistent(self, images: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] in [-1, 1] that bicubic shrinking turns into the inputs [B, C, h, w], if there are."""
        pairs = zip(images.shape[-2:], inputs.shape[-2:], strict=True)
        (rows, rows_back), (columns, columns_back) = (self._shrinking(*pair, images.device) for pair in pairs)
        for _ in range(100):  # between the images that fit the input and those in [-1, 1]
            images = images.clamp(-1, 1)
            residual = inputs - rows @ images @ columns.mT
            if bool(residual.abs().max() < 0.5 / 255):
                break
            images = images + rows_back @ residual @ columns_back.mT
        else:
            logger.warning(
                f"hard_consistency: {255 / 2 * residual.abs().max().item():.1f}/255 is left; see `consistency`"
            )
        return images.clamp(-1, 1)

    @staticmethod
    def _shrinking(large: int, small: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix [small, large] of Pillow's bicubic shrinking along one side, and its pseudo-inverse, float32."""
        eye = torch.eye(large, dtype=torch.float64)[None, None]
        matrix = F.interpolate(eye, (small, large), mode="bicubic", antialias=True)[0, 0]
        inverse = torch.linalg.solve(matrix @ matrix.mT, matrix).mT  # its rows are independent
        return matrix.to(device, torch.float32), inverse.to(device, torch.float32)

    # Arguments and plans.

    def _arguments(self, num_inference_steps, strength, spacing, eta, plan) -> tuple[SchedulerMixin, dict]:
        """The scheduler and the arguments of a call, from the plan where there is one."""
        given = dict(zip(self.PLAN_ARGUMENTS, (num_inference_steps, strength, spacing, eta), strict=True))
        defaults = inspect.signature(type(self).__call__).parameters
        for name in list(given):
            value, default = given[name], defaults[name].default
            if value is default or ((isinstance(value, str) or self._is_number(value)) and value == default):
                del given[name]
        if plan is None:
            plan = "default" if num_inference_steps is None and "default" in (self.config.plans or {}) else {}
        elif given:
            name, value = next(iter(given.items()))
            raise ValueError(f"plan={plan!r} with {name}={value!r}: expected one or the other")
        scheduler, arguments = self._named_plan(plan)
        arguments = {**arguments, **given}
        eta, takes = arguments["eta"], "eta" in inspect.signature(scheduler.step).parameters
        if eta is not None and not (self._is_number(eta) and 0 <= eta <= 1):
            raise ValueError(f"eta={eta!r}: expected None or a number in [0, 1]")
        if eta is not None and not takes:
            raise ValueError(
                f"eta={eta}: {type(scheduler).__name__} does not take it; expected None, or a scheduler such as "
                "CosineResidualScheduler or DDIMScheduler"
            )
        return scheduler, arguments

    def _named_plan(self, plan: str | dict) -> tuple[SchedulerMixin, dict]:
        """The scheduler and the arguments of a plan; those it does not have are the defaults of a call."""
        defaults = inspect.signature(type(self).__call__).parameters
        if isinstance(plan, str):
            known = self.config.plans or {}
            if plan not in known:
                raise ValueError(f"plan={plan!r}: expected one of {sorted(known)}, or a dict of arguments")
            plan = known[plan]
        if not isinstance(plan, dict):
            raise ValueError(f"plan={plan!r}: expected a name or a dict of arguments")
        arguments, scheduler = {name: defaults[name].default for name in self.PLAN_ARGUMENTS}, None
        for name, value in plan.items():
            if name in self.PLAN_ARGUMENTS:
                arguments[name] = value
            elif name == "scheduler":
                scheduler = None if value is None else self._other_scheduler(value)
            else:
                raise ValueError(f"plan has {name!r}: expected {self.PLAN_ARGUMENTS}, scheduler")
        if scheduler is None:
            scheduler = self._unclipped_scheduler()
            self._check_process(scheduler)
        return scheduler, arguments

    def _other_scheduler(self, entry) -> SchedulerMixin:
        """
        A scheduler of diffusers over the same noise process, with the same target and spacing of steps; all else is its
        own default, or as set.
        """
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)):
            raise ValueError(f"scheduler of the plan is {entry!r}: expected [class of diffusers, {{setting: value}}]")
        kind, settings, config = getattr(diffusers, str(entry[0]), None), entry[1], self.scheduler.config
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise ValueError(f"scheduler of the plan is {entry[0]!r}: expected a scheduler of diffusers")
        known, clips = set(inspect.signature(kind.__init__).parameters) - {"self"}, {"clip_sample", "thresholding"}
        for setting in settings:
            if setting not in known - set(self.NOISE_PROCESS) - set(self.TARGET) - clips:
                raise ValueError(f"scheduler of the plan sets {setting!r}: expected settings of {entry[0]}'s steps")
        process = {
            name: config[name] for name in (*self.NOISE_PROCESS, "variance_type", "timestep_spacing") if name in config
        }
        process = {name: value for name, value in process.items() if name in known}
        part = kind(**{**process, **{name: False for name in clips & known}, **settings})
        part.register_to_config(**{name: config[name] for name in self.TARGET if name in config})
        self._check_process(part)
        return part

    def _check_process(self, scheduler) -> None:
        """Refuses a scheduler that does not say what is diffused, or that the network does not fit."""
        self._check_scheduler("scheduler", scheduler)
        name, config, channels = type(scheduler).__name__, scheduler.config, self._channels()
        target = config.get("prediction_target")
        scale = config.get("residual_scale") if target == "residual" else 1.0
        if target not in ("residual", "image"):
            raise ValueError(
                f"scheduler={name} with prediction_target={target!r} in its config: expected 'residual' or 'image'; "
                f"make it by {name}.from_config(scheduler.config) of a CosineResidualScheduler"
            )
        if not (self._is_number(scale) and 0 < scale < math.inf):
            raise ValueError(f"scheduler={name} with residual_scale={scale!r}: expected a finite number above 0")
        kind = config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"scheduler={name} predicts {kind!r}: expected 'epsilon', 'sample' or 'v_prediction'")
        made = self.unet.config.get("out_channels") or channels
        if made not in (channels, 2 * channels):
            raise ValueError(f"unet makes {made} channels of {channels}: expected as many, or twice as many")
        if self._takes_variance(scheduler) and made != 2 * channels:
            raise ValueError(
                f"scheduler={name} with variance_type={config.get('variance_type')!r}: expected a unet with "
                f"out_channels={2 * channels}, got {made}; or 'fixed_small' or 'fixed_large'"
            )

    def _timesteps(self, scheduler, arguments: dict) -> torch.Tensor:
        """Readies the scheduler, and returns the time of every network call; raises for steps it cannot make."""
        calls, strength, spacing = (arguments[name] for name in ("num_inference_steps", "strength", "spacing"))
        total = scheduler.config.num_train_timesteps
        if not (self._is_number(strength) and 0 < strength <= 1):
            raise ValueError(f"strength={strength!r}: expected a number in (0, 1]")
        if not (calls is None or self._is_count(calls)):
            raise ValueError(f"num_inference_steps={calls!r}: expected a whole number from 1 up")
        if isinstance(spacing, str):
            if spacing not in ("scheduler", "log_snr"):
                raise ValueError(f"spacing={spacing!r}: expected 'scheduler', 'log_snr' or a list of times")
            calls = max(min(100, int(strength * total)), 1) if calls is None else calls
        else:
            if not isinstance(spacing, (list, tuple)) or not all(type(time) is int for time in spacing):
                raise ValueError(f"spacing={spacing!r}: expected a list of descending whole numbers")
            if calls not in (None, len(spacing)):
                raise ValueError(f"num_inference_steps={calls} with {len(spacing)} times in spacing: expected as many")
            if max(spacing, default=0) > strength * total:
                raise ValueError(f"spacing={spacing}: expected times up to {strength * total:g}, for {strength=}")
            calls, spacing = len(spacing), [list(spacing)]
        timesteps = self._set_timesteps(scheduler, 0, calls, strength, spacing)
        if float(timesteps[0]) == 0 and total > 1:
            raise ValueError(
                f"num_inference_steps={calls}: {type(scheduler).__name__} would start at time 0, where there is no "
                "noise; expected more steps, or timestep_spacing='trailing' in its config"
            )
        return timesteps

    def _set_timesteps(self, scheduler, index: int, calls: int, strength: float, spacing) -> torch.Tensor:
        """
        Readies the level's scheduler for `calls` network calls from `strength` of the noise process down to 0, and
        returns their timesteps. A second-order scheduler calls the network twice a step but for the last.
        """
        train_steps = scheduler.config.num_train_timesteps
        steps = (calls + 1) // 2 if scheduler.order == 2 else calls
        if isinstance(spacing, str) and steps > strength * train_steps:
            name = "num_inference_steps" if index == 0 else "refine_steps"
            raise ValueError(
                f"{name}={calls}: expected at most {int(strength * train_steps)}, the training steps up to the noise "
                f"that the level starts from (strength {strength})"
            )
        if spacing == "scheduler":
            # Respaced so that the level's steps are the last ones of a full schedule and begin at the strength.
            few, many = steps, train_steps
            while few < many:
                middle = (few + many) // 2
                try:
                    scheduler.set_timesteps(middle)
                except ValueError as error:
                    raise ValueError(f"{type(scheduler).__name__} does not take {middle} steps: {error}") from error
                if float(scheduler.timesteps[scheduler.order * (middle - steps)]) > strength * train_steps:
                    few = middle + 1
                else:
                    many = middle
            scheduler.set_timesteps(few)
            begin = scheduler.order * (few - steps)
            if len(scheduler.timesteps[begin:]) != scheduler.order * (steps - 1) + 1:
                raise ValueError(
                    f"{type(scheduler).__name__} does not take as many steps as it is asked for: expected another, "
                    "such as DPMSolverMultistepScheduler"
                )
            if index > 0 and float(scheduler.timesteps[begin]) == 0:
                raise ValueError(
                    f"refine_steps={calls}: {type(scheduler).__name__} would start at time 0; expected 2 or more, or "
                    "timestep_spacing='trailing' in its config"
                )
        else:
            if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"spacing={spacing!r}: {type(scheduler).__name__} places its steps itself; expected 'scheduler' "
                    "or a scheduler whose `set_timesteps` takes `timesteps`, such as DPMSolverMultistepScheduler"
                )
            if spacing == "log_snr":
                times = self._log_snr_times(scheduler.alphas_cumprod, steps, strength)
            elif isinstance(spacing, str):
                raise ValueError(f"spacing={spacing!r}: expected 'scheduler', 'log_snr' or one list of times a level")
            else:
                times = list(spacing[index])
                if not times or times != sorted(set(times), reverse=True) or times[0] >= train_steps or times[-1] < 0:
                    raise ValueError(f"spacing[{index}]={times}: expected descending times from {train_steps - 1} to 0")
            scheduler.set_timesteps(timesteps=times)
            begin = 0
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return scheduler.timesteps[begin:]

    @staticmethod
    def _log_snr_times(alphas_cumprod: torch.Tensor, steps: int, strength: float) -> list[int]:
        """`steps` training times, descending to 0, as evenly spaced in log(alpha_bar / (1 - alpha_bar)) as can be."""
        alphas_cumprod = alphas_cumprod.cpu().double().clamp(1e-8, 1 - 1e-8).numpy()
        log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
        start = max(round(strength * len(log_snr)), steps) - 1
        wanted = np.linspace(log_snr[start], log_snr[0], steps)
        times = [int(np.abs(log_snr - value).argmin()) for value in wanted]
        for index in range(1, steps):
            times[index] = min(times[index], times[index - 1] - 1)
        return [max(time, steps - 1 - index) for index, time in enumerate(times)]

    def _output_size(self, small: tuple[int, int], scale_factor: int | None) -> tuple[int, int]:
        """(height, width) of the output."""
        trained = self.unet.config.get("scale_factors")
        if scale_factor is None:
            if not trained:
                raise ValueError("scale_factor=None: expected a whole number, since the network's config names none")
            scale_factor = max(trained)
        if not self._is_count(scale_factor) or scale_factor < 2:
            raise ValueError(f"scale_factor={scale_factor!r}: expected a whole number from 2 up")
        if trained and scale_factor not in trained:
            raise ValueError(f"scale_factor={scale_factor}: expected one of {sorted(trained)}, as it was trained for")
        size, multiple = tuple(side * scale_factor for side in small), self._size_multiple()
        if any(-side % multiple >= side for side in size):
            raise ValueError(
                f"image of {small[0]}x{small[1]} makes {size[0]}x{size[1]}: expected sides above {multiple // 2}, so "
                f"that they can be padded by reflection to the network's multiples of {multiple}"
            )
        return size

    def _check_inputs(self, batch_size, num_samples, generator, output_type, tensor_inputs, **switches) -> None:
        if not self._is_count(num_samples):
            raise ValueError(f"num_samples={num_samples!r}: expected a whole number from 1 up")
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: expected True or False")
        each = generator if isinstance(generator, list) else [generator] if generator is not None else []
        if not all(isinstance(one, torch.Generator) for one in each):
            raise ValueError(
                f"generator of type {type(generator).__name__}: expected a torch.Generator or a list of them"
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {batch_size}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={list(tensor_inputs)}: expected a subset of "
                f"{self._callback_tensor_inputs}"
            )

    def _low_res(self, image) -> torch.Tensor:
        """The input as float [B, C, h, w] in [0, 1]."""
        if isinstance(image, (list, tuple)):
            kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
            if not image or not any(all(isinstance(each, kind) for each in image) for kind in kinds):
                raise ValueError("image: expected a list of images of one kind, PIL, numpy or torch")
            parts = [self._low_res(each) for each in image]
            if len({part.shape[1:] for part in parts}) > 1:
                raise ValueError("image: got several sizes; expected one, or a call for each")
            return torch.cat(parts)
        channels = self._channels()
        if isinstance(image, PIL.Image.Image):
            mode = {1: "L", 3: "RGB"}.get(channels)
            if image.mode != mode:
                expected = f"{mode}; see `Image.convert`" if mode else f"a tensor, for {channels} channels"
                raise ValueError(f"image is in mode {image.mode}: expected {expected}")
            image = np.array(image, dtype=np.float32) / 255
            image = image[..., None] if image.ndim == 2 else image
        if isinstance(image, np.ndarray):
            if image.ndim not in (3, 4) or image.dtype.kind != "f":
                raise ValueError(f"image: got {image.dtype} {list(image.shape)}; expected float [B, H, W, C] in [0, 1]")
            image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
        if not isinstance(image, torch.Tensor):
            raise ValueError(f"image of type {type(image).__name__}: expected PIL, numpy or torch, or a list of them")
        image = image[None] if image.ndim == 3 else image
        if image.ndim != 4 or image.numel() == 0 or not image.is_floating_point():
            raise ValueError(f"image: got {image.dtype} {list(image.shape)}; expected float [B, C, h, w] in [0, 1]")
        if image.shape[1] != channels:
            raise ValueError(f"image has {image.shape[1]} channels: expected {channels}")
        lowest, highest = image.amin().item(), image.amax().item()
        if not math.isfinite(lowest + highest):
            raise ValueError("image has values that are no numbers or infinite: expected [0, 1]")
        if not (-1e-6 <= lowest and highest <= 1 + 1e-6):
            raise ValueError(f"image has values from {lowest:.3g} to {highest:.3g}: expected [0, 1]")
        return image

    @staticmethod
    def _is_number(value) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    @staticmethod
    def _is_count(value) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    @staticmethod
    def _pair(name: str, size) -> tuple[int, int]:
        pair = tuple(size) if isinstance(size, Sequence) else (size, size)
        if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
            raise ValueError(f"{name}={size}: expected a whole number or (height, width)")
        return pair

    def _tiling(self, tile: int | None, overlap: int | None) -> tuple[int | None, int | None]:
        multiple = self._size_multiple()
        if tile is None:
            if overlap is not None:
                raise ValueError(f"tile_overlap={overlap} without tile: expected both")
            return None, None
        if isinstance(tile, bool) or not isinstance(tile, int) or tile < 2 * multiple or tile % multiple:
            raise ValueError(f"tile={tile}: expected a multiple of {multiple} from {2 * multiple} up, for this network")
        if overlap is None:
            overlap = max(tile // 4 // multiple, 1) * multiple
        if not isinstance(overlap, int) or not multiple <= overlap <= tile - multiple or overlap % multiple:
            raise ValueError(
                f"tile_overlap={overlap}: expected a multiple of {multiple} up to {tile - multiple}, for tile={tile}"
            )
        return tile, overlap

    @staticmethod
    def _plain(module: torch.nn.Module) -> torch.nn.Module:
        """The module inside a compiled one."""
        return getattr(module, "_orig_mod", module)

    def _channels(self) -> int:
        return getattr(self.unet.config, "image_channels", self.unet.config.in_channels)

    def _size_multiple(self) -> int:
        """Sides of a network's sample are multiples of this."""
        return 2 ** (len(getattr(self.unet.config, "block_out_channels", (1,))) - 1)

    def _to_output(self, latents: torch.Tensor, size: tuple[int, int], output_type: str):
        if latents.shape[-2:] != size:
            latents = F.interpolate(latents, size, mode="bicubic", align_corners=False, antialias=True)
        if output_type == "latent":
            return latents
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
