"""Pyramidal sampling of Pyramidal DDPM (paper P, algorithm 1): start small, then enlarge, renoise and refine."""

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
class PyramidalLevel:
    """One level of a plan: its size (height, width), the size the network runs at, and the time of every call."""

    size: tuple[int, int]
    network_size: tuple[int, int]
    timesteps: list[float]
    nfe_eq: float


@dataclass
class PyramidalPlan:
    """What a call will cost. 1 NFE-eq is one network call for one image at the top level, by area."""

    levels: list[PyramidalLevel]

    @property
    def network_calls(self) -> int:
        return sum(len(level.timesteps) for level in self.levels)

    @property
    def nfe_eq(self) -> float:
        return sum(level.nfe_eq for level in self.levels)

    def __str__(self) -> str:
        rows = [f"{'level':>9}  {'network':>9}  {'calls':>5}  {'first t':>7}  {'NFE-eq':>7}"]
        for level in self.levels:
            size, network = ("{}x{}".format(*pair) for pair in (level.size, level.network_size))
            first = f"{level.timesteps[0]:.0f}"
            rows.append(f"{size:>9}  {network:>9}  {len(level.timesteps):>5}  {first:>7}  {level.nfe_eq:>7.2f}")
        rows.append(f"{'total':>9}  {'':>9}  {self.network_calls:>5}  {'':>7}  {self.nfe_eq:>7.2f}")
        return "\n".join(rows)


@dataclass
class PyramidalPipelineOutput(BaseOutput):
    """
    Args:
        images: The top level: PIL images, a numpy array [B, H, W, C] in [0, 1], or a tensor [B, C, H, W] ("pt" in
            [0, 1], "latent" in [-1, 1], not clipped).
        levels: The images of every level, low to high, in the same form; `None` unless `return_levels=True`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    levels: list | None = None


class PyramidalPipeline(StandaloneSaving, DiffusionPipeline):
    r"""
    Unconditional generation by Pyramidal DDPM: the whole reverse process at the lowest resolution, then at each higher
    one only the last part of it, from the enlarged and renoised image.

    Parameters:
        unet: A network trained at several resolutions. `coordinates` are given to it if its `forward` takes them, so a
            plain `UNet2DModel` works too.
        scheduler: Any scheduler of diffusers with `add_noise`; runs the lowest level.
        refine_scheduler (*optional*): Runs the levels above; by default the same one.
        detail_spectra (`dict`, *optional*): For `stage_jump="matched"`: the covariance over channels of the details
            that enlarging loses, by spatial frequency: {"HxW" of a level: [bins, C, C]}, in the [-1, 1] range. The
            trainer measures it.
        spectra (`dict`, *optional*): Colour axes and power spectrum of the training images at every level, as
            `pyrdiff.plan.Spectra` keeps them. The trainer measures them; plans are fitted to them.
        plans (`dict`, *optional*): Named plans for `plan=`: {name: {argument of a call: value}}, and in it, as
            "scheduler" and "refine_scheduler", [class of diffusers, {setting: value}] to run the levels with instead.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["refine_scheduler"]
    _callback_tensor_inputs = ["latents"]
    NOISE_PROCESS = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    PLAN_ARGUMENTS = (
        "resolutions",
        "num_inference_steps",
        "refine_steps",
        "refine_strength",
        "spacing",
        "stage_jump",
    )

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        refine_scheduler: SchedulerMixin | None = None,
        detail_spectra: dict | None = None,
        spectra: dict | None = None,
        plans: dict | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, refine_scheduler=refine_scheduler)
        self.register_to_config(detail_spectra=detail_spectra, spectra=spectra, plans=plans)
        for name in ("scheduler", "refine_scheduler"):
            if getattr(self, name) is not None:
                self._check_scheduler(name, getattr(self, name))
        for plan in (plans or {}).values():
            self._named_plan(plan, {})

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
    def coordinate_grid(height: int, width: int, box=(0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
        """(row, column) of the pixel centres of a window (top, left, bottom, right), float32 [2, height, width]."""
        top, left, bottom, right = box
        rows = top + (bottom - top) * (torch.arange(height, dtype=torch.float64) + 0.5) / height
        columns = left + (right - left) * (torch.arange(width, dtype=torch.float64) + 0.5) / width
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).float()

    def plan(
        self,
        resolutions: Sequence[Size] | None = None,
        num_inference_steps: int = 100,
        refine_steps: int | Sequence[int] = 8,
        refine_strength: float | Sequence[float] = 0.3,
        spacing: Literal["scheduler", "log_snr"] | Sequence[Sequence[int]] = "scheduler",
        plan: str | dict | None = None,
    ) -> PyramidalPlan:
        """The levels, steps and cost of a call with these arguments (see `__call__`), without running the network."""
        if plan is not None:
            given = (resolutions, num_inference_steps, refine_steps, refine_strength, spacing)
            arguments, schedulers = self._named_plan(plan, dict(zip(self.PLAN_ARGUMENTS, given, strict=False)))
            arguments = {name: value for name, value in arguments.items() if name != "stage_jump"}
            return self._lay_out(schedulers, **arguments)
        schedulers = (self.scheduler, self.refine_scheduler or self.scheduler)
        return self._lay_out(schedulers, resolutions, num_inference_steps, refine_steps, refine_strength, spacing)

    def _named_plan(self, plan: str | dict, given: dict) -> tuple[dict, tuple]:
        """The arguments and the two schedulers of a plan; raises if arguments were given beside it."""
        defaults = inspect.signature(type(self).__call__).parameters
        for name, value in given.items():
            if value is not defaults[name].default and value != defaults[name].default:
                raise ValueError(f"plan={plan!r} with {name}={value!r}: expected one or the other")
        if isinstance(plan, str):
            known = self.config.plans or {}
            if plan not in known:
                raise ValueError(f"plan={plan!r}: expected one of {sorted(known)}, or a dict of arguments")
            plan = known[plan]
        if not isinstance(plan, dict):
            raise ValueError(f"plan={plan!r}: expected a name or a dict of arguments")
        arguments, schedulers = {name: defaults[name].default for name in self.PLAN_ARGUMENTS}, {}
        for name, value in plan.items():
            if name in self.PLAN_ARGUMENTS:
                arguments[name] = value
            elif name in ("scheduler", "refine_scheduler"):
                schedulers[name] = None if value is None else self._other_scheduler(name, value)
            else:
                raise ValueError(f"plan has {name!r}: expected {self.PLAN_ARGUMENTS}, scheduler, refine_scheduler")
        low = schedulers.get("scheduler") or self.scheduler
        own = self.refine_scheduler if not schedulers else None
        return arguments, (low, schedulers.get("refine_scheduler") or own or low)

    def _other_scheduler(self, name: str, entry) -> SchedulerMixin:
        """A scheduler of diffusers over the same noise process; all else is its own default, or as set."""
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)):
            raise ValueError(f"{name} of the plan is {entry!r}: expected [class of diffusers, {{setting: value}}]")
        kind, settings, config = getattr(diffusers, str(entry[0]), None), entry[1], self.scheduler.config
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise ValueError(f"{name} of the plan is {entry[0]!r}: expected a scheduler of diffusers")
        known = set(inspect.signature(kind.__init__).parameters) - {"self"}
        for setting in settings:
            if setting not in known - set(self.NOISE_PROCESS):
                raise ValueError(f"{name} of the plan sets {setting!r}: expected settings of {entry[0]}'s steps")
        process = {key: config[key] for key in self.NOISE_PROCESS if key in config and key in known}
        part = kind(**process, **settings)
        self._check_scheduler(name, part)
        return part

    def _lay_out(
        self, schedulers, resolutions, num_inference_steps, refine_steps, refine_strength, spacing
    ) -> PyramidalPlan:
        sizes = self._level_sizes(resolutions)
        if not isinstance(spacing, str):  # the times say how many calls there are
            if len(spacing) != len(sizes):
                raise ValueError(
                    f"spacing gives times for {len(spacing)} levels: expected one list for each of {len(sizes)}"
                )
            for times in spacing:
                if not isinstance(times, (list, tuple)) or not all(isinstance(time, int) for time in times):
                    raise ValueError(f"spacing={spacing}: expected one list of whole numbers for each level")
            num_inference_steps, *refine_steps = (len(times) for times in spacing)
        steps = self._per_level("refine_steps", refine_steps, len(sizes) - 1)
        strengths = self._per_level("refine_strength", refine_strength, len(sizes) - 1)
        for name, values in (("num_inference_steps", [num_inference_steps]), ("refine_steps", steps)):
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in values):
                raise ValueError(f"{name}={values if len(values) > 1 else values[0]}: expected whole numbers from 1 up")
        if not all(0 < strength <= 1 for strength in strengths):
            raise ValueError(f"refine_strength={refine_strength}: expected numbers in (0, 1]")
        levels, top_area = [], math.prod(self._network_size(sizes[-1]))
        for index, size in enumerate(sizes):
            calls = [num_inference_steps, *steps][index]
            strength = [1.0, *strengths][index]
            timesteps = self._set_timesteps(schedulers[min(index, 1)], index, calls, strength, spacing)
            network_size = self._network_size(size)
            cost = len(timesteps) * math.prod(network_size) / top_area
            levels.append(PyramidalLevel(size, network_size, [float(t) for t in timesteps], cost))
        return PyramidalPlan(levels)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        resolutions: Sequence[Size] | None = None,
        num_inference_steps: int = 100,
        refine_steps: int | Sequence[int] = 8,
        refine_strength: float | Sequence[float] = 0.3,
        box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
        spacing: Literal["scheduler", "log_snr"] | Sequence[Sequence[int]] = "scheduler",
        stage_jump: Literal["white", "matched"] = "white",
        plan: str | dict | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_levels: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PyramidalPipelineOutput | tuple:
        """
        Generates images from coarse to fine (algorithm 1, with the noise term outside the bracket as in eq. 6 and the
        cumulative alpha in line 8).

        Args:
            batch_size: Number of images.
            resolutions: The levels, low to high, each an int or (height, width); by default those that the network was
                trained at. A size that the network cannot run at is rounded up for it, and its result is resized
                (bicubic): `plan` shows both.
            num_inference_steps: Network calls at the lowest level (T_f).
            refine_steps: Network calls at each higher level (T_s times the strength): one number, or one a level.
            refine_strength: Share in (0, 1] of the noise process that a higher level starts from (Delta t_s).
            box: The window of the whole image to generate: top, left, bottom, right in [0, 1]. `resolutions` are then
                those of the window.
            spacing: How the steps of a level are placed: as the scheduler does, uniformly in log-SNR, or the times
                themselves, one descending list a level.
            stage_jump: What is added to an enlarged image: white noise (the paper), or also noise with the spectrum of
                the details that enlarging lacks (needs `detail_spectra`).
            plan: A plan of the pipeline by its name (`pipeline.config.plans`), or one as a dict, in place of the
                arguments above but `box`, which are then left at their defaults.
            generator: One generator, or one an image: image k then does not depend on the others.
            output_type: "pil", "np" and "pt" in [0, 1], or "latent" in [-1, 1].
            return_levels: Whether to return the images of every level.
            return_dict: Whether to return a `PyramidalPipelineOutput` or a tuple (images, levels).
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": ...}) after each step, counted over
                all levels; may return changed tensors. Setting `pipeline._interrupt = True` ends the run.

        Raises:
            ValueError: for arguments out of range, before any work.
        """
        # 1. Check, and lay out the plan.
        schedulers = (self.scheduler, self.refine_scheduler or self.scheduler)
        given = (resolutions, num_inference_steps, refine_steps, refine_strength, spacing, stage_jump)
        arguments = dict(zip(self.PLAN_ARGUMENTS, given, strict=True))
        if plan is not None:
            arguments, schedulers = self._named_plan(plan, arguments)
        stage_jump = arguments.pop("stage_jump")
        plan = self._lay_out(schedulers, **arguments)
        self._check_inputs(
            batch_size, box, stage_jump, generator, output_type, callback_on_step_end_tensor_inputs, plan
        )
        device, dtype = self._execution_device, self.unet.dtype
        channels = getattr(self.unet.config, "image_channels", self.unet.config.in_channels)
        takes_coordinates = "coordinates" in inspect.signature(self._plain(self.unet).forward).parameters
        self._interrupt, self._num_timesteps, step_count = False, plan.network_calls, 0
        strengths = [1.0, *self._per_level("refine_strength", arguments["refine_strength"], len(plan.levels) - 1)]
        latents, levels = None, []

        with self.progress_bar(total=plan.network_calls) as progress:
            for index, level in enumerate(plan.levels):
                if self.interrupt:
                    break
                # Schedulers read their times as numbers, so these stay on the CPU, where that waits for no GPU; the
                # network gets a copy beside it.
                scheduler = schedulers[min(index, 1)]
                calls = len(level.timesteps)
                timesteps = self._set_timesteps(scheduler, index, calls, strengths[index], arguments["spacing"])
                network_times = timesteps.to(device)
                shape = (batch_size, channels, *level.network_size)
                noise = randn_tensor(shape, generator=generator, device=device)

                # 2. Line 1: noise at the lowest level; lines 7 and 8: enlarge, then renoise (eq. 2).
                if latents is None:
                    latents = noise * scheduler.init_noise_sigma
                else:
                    latents = F.interpolate(latents, level.network_size, mode="bicubic", align_corners=False)
                    if stage_jump == "matched":
                        latents = latents + self._detail_noise(shape, level.size, generator, device)
                    latents = scheduler.add_noise(latents, noise, timesteps[:1].expand(batch_size).to(device))

                # 3. Lines 2-4 and 9-11: the reverse process.
                where = {}
                if takes_coordinates:
                    grid = self.coordinate_grid(*level.network_size, box).to(device)
                    where["coordinates"] = grid[None].expand(batch_size, -1, -1, -1)
                step_arguments = {}
                if "generator" in inspect.signature(scheduler.step).parameters:
                    step_arguments["generator"] = generator
                for timestep, network_time in zip(timesteps, network_times, strict=True):
                    if self.interrupt:
                        continue
                    model_input = scheduler.scale_model_input(latents, timestep).to(dtype)
                    prediction = self.unet(model_input, network_time, **where, return_dict=False)[0].float()
                    latents = scheduler.step(prediction, timestep, latents, **step_arguments, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                        changed = callback_on_step_end(self, step_count, timestep, tensors) or {}
                        latents = changed.pop("latents", latents)
                    step_count += 1
                    progress.update()

                if return_levels:
                    levels.append(self._to_output(latents, level.size, output_type))

        # 4. From [-1, 1] to what was asked for.
        images = self._to_output(latents, plan.levels[-1].size, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, levels if return_levels else None)
        return PyramidalPipelineOutput(images=images, levels=levels if return_levels else None)

    @staticmethod
    def _plain(module: torch.nn.Module) -> torch.nn.Module:
        """The module inside a compiled one."""
        return getattr(module, "_orig_mod", module)

    @staticmethod
    def _per_level(name: str, value, count: int) -> list:
        if not isinstance(value, Sequence):
            return [value] * count
        if len(value) != count:
            raise ValueError(f"{name}={list(value)}: expected one number, or one for each of the {count} higher levels")
        return list(value)

    def _level_sizes(self, resolutions: Sequence[Size] | None) -> list[tuple[int, int]]:
        """The levels as (height, width); raises unless they increase and the network can run at the lowest."""
        if resolutions is None:
            resolutions = getattr(self.unet.config, "resolutions", None) or [self.unet.config.sample_size]
            if resolutions == [None]:
                raise ValueError("resolutions=None: expected a list, since the network's config names none")
        if isinstance(resolutions, int) or len(resolutions) == 0:
            raise ValueError(f"resolutions={resolutions}: expected a list of sizes, low to high, such as [16, 32, 64]")
        sizes = []
        for size in resolutions:
            pair = tuple(size) if isinstance(size, Sequence) else (size, size)
            if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
                raise ValueError(f"resolutions={list(resolutions)}: expected whole numbers or (height, width) pairs")
            sizes.append(pair)
        for low, high in zip(sizes, sizes[1:], strict=False):
            if high[0] < low[0] or high[1] < low[1] or high == low:
                raise ValueError(
                    f"resolutions={list(resolutions)}: expected each level to be larger than the one before"
                )
        smallest = self._size_multiple()
        if min(sizes[0]) < smallest:
            raise ValueError(f"resolutions={list(resolutions)}: expected sides of at least {smallest} for this network")
        return sizes

    def _size_multiple(self) -> int:
        """Sides of a network's sample are multiples of this."""
        return 2 ** (len(getattr(self.unet.config, "block_out_channels", (1,))) - 1)

    def _network_size(self, size: tuple[int, int]) -> tuple[int, int]:
        multiple = self._size_multiple()
        return tuple(math.ceil(side / multiple) * multiple for side in size)

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

    def _detail_noise(self, shape, size: tuple[int, int], generator, device) -> torch.Tensor:
        """Gaussian noise [B, C, H, W] with the measured covariance over channels at each spatial frequency."""
        covariance = torch.tensor(self.config.detail_spectra["{}x{}".format(*size)], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariance)
        mixing = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT
        height, width = shape[-2:]
        rows, columns = torch.fft.fftfreq(height) * height, torch.fft.rfftfreq(width) * width
        radius = (rows[:, None] ** 2 + columns[None] ** 2).sqrt().round().long().clamp(max=len(mixing) - 1)
        filters = mixing[radius].to(device, torch.complex64)
        noise = torch.fft.rfft2(randn_tensor(shape, generator=generator, device=device))
        return torch.fft.irfft2(torch.einsum("hwcd,bdhw->bchw", filters, noise), s=(height, width))

    def _check_inputs(self, batch_size, box, stage_jump, generator, output_type, callback_inputs, plan) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected a whole number from 1 up")
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"box={box}: expected (top, left, bottom, right) within [0, 1]")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator has {len(generator)} entries: expected one, or batch_size={batch_size}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        if stage_jump not in ("white", "matched"):
            raise ValueError(f"stage_jump={stage_jump!r}: expected 'white' or 'matched'")
        if stage_jump == "matched" and tuple(box) != (0, 0, 1, 1):
            raise ValueError(f"stage_jump='matched' with box={box}: expected the whole image, which was measured")
        if stage_jump == "matched":
            known = sorted(self.config.detail_spectra or {})
            for level in plan.levels[1:]:
                if "{}x{}".format(*level.size) not in known:
                    raise ValueError(
                        f"stage_jump='matched' at {level.size}: expected one of the measured sizes {known}"
                    )
        if not set(callback_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={list(callback_inputs)}: expected a subset of "
                f"{self._callback_tensor_inputs}"
            )

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
