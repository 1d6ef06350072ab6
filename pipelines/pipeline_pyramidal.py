"""Pyramidal sampling of Pyramidal DDPM (paper P, algorithm 1): start small, then enlarge, renoise and refine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
    check_strength,
)
from pyrdiff.parts.colors import check_colors, draw_colors
from pyrdiff.parts.guidance import check_guidance, check_guide, check_guided, guidance_scales
from pyrdiff.parts.labels import count_images
from pyrdiff.parts.levels import check_growing, nfe_eq, per_level, pixel_grid, rounded_up
from pyrdiff.parts.noise import white_noise
from pyrdiff.parts.noise_windows import check_level_calls, check_noise
from pyrdiff.parts.plans import check_not_beside_plan, given, plan_scheduler, read_plan
from pyrdiff.parts.sampling import SamplingPipeline
from pyrdiff.parts.settings import is_whole
from pyrdiff.parts.steps import LevelSteps, Spacing, check_start_above_zero, lay_out_steps
from pyrdiff.parts.wrappers import plain


@dataclass
class PyramidalLevel:
    """
    One level of a plan: its size (height, width), the size the network runs at, the time of every step, and at how many
    of them guidance calls the network twice.
    """

    size: tuple[int, int]
    network_size: tuple[int, int]
    timesteps: list[float]
    nfe_eq: float
    guided: int = 0

    @property
    def network_calls(self) -> int:
        return len(self.timesteps) + self.guided


@dataclass
class PyramidalPlan:
    """What a call will cost. 1 NFE-eq is one network call for one image at the top level, by area."""

    levels: list[PyramidalLevel]

    @property
    def network_calls(self) -> int:
        return sum(level.network_calls for level in self.levels)

    @property
    def nfe_eq(self) -> float:
        return sum(level.nfe_eq for level in self.levels)

    def __str__(self) -> str:
        rows = [f"{'level':>9}  {'network':>9}  {'calls':>5}  {'first t':>7}  {'NFE-eq':>7}"]
        for level in self.levels:
            size, network = ("{}x{}".format(*pair) for pair in (level.size, level.network_size))
            first = f"{level.timesteps[0]:.0f}"
            rows.append(f"{size:>9}  {network:>9}  {level.network_calls:>5}  {first:>7}  {level.nfe_eq:>7.2f}")
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


class PyramidalArguments(NamedTuple):
    """The arguments of a call that say its levels and steps, with their defaults: what a plan may set."""

    resolutions: Sequence[Size] | None = None
    num_inference_steps: int = 100
    refine_steps: int | Sequence[int] = 8
    refine_strength: float | Sequence[float] = 0.3
    spacing: str | Sequence[Sequence[int]] = "scheduler"
    start_strength: float = 1.0
    guidance_scale: float = 1.0
    guidance_interval: Sequence[float] | None = None


@dataclass(frozen=True)
class PyramidalStage:
    """
    One level of a running call: its size, the size that the network runs at, both (height, width), its steps, the share
    of the noise process that they begin at, and the scale of guidance at each step.
    """

    size: tuple[int, int]
    network_size: tuple[int, int]
    steps: LevelSteps
    strength: float
    scales: list[float]

    @property
    def guided(self) -> int:
        """At how many steps the network is called twice."""
        return sum(scale != 1 for scale in self.scales)

    @property
    def calls(self) -> int:
        return len(self.steps) + self.guided


class PyramidalPipeline(SamplingPipeline, DiffusionPipeline):
    r"""
    Generation by Pyramidal DDPM: the whole reverse process at the lowest resolution, then at each higher one only the
    last part of it, from the enlarged and renoised image. Networks that know classes draw images of a class, or of any.

    Parameters:
        unet: A network trained at several resolutions. `coordinates` are given to it if its `forward` takes them, so a
            plain `UNet2DModel` works too.
        scheduler: Any scheduler of diffusers with `add_noise`; runs the lowest level.
        refine_scheduler (*optional*): Runs the levels above; by default the same one.
        plans (`dict`, *optional*): Named plans for `plan=`: {name: {argument of a call: value}}, and in it, as
            "scheduler" and "refine_scheduler", [class of diffusers, {setting: value}] to run the levels with instead.
        colors (`dict`, *optional*): {"mean": [C], "covariance": [C, C]} of the mean colours of the training images, in
            the [-1, 1] range, for `start_strength`; and as "classes" a list of the same of each class.
        guide (*optional*): A worse network of the same images, to guide by (autoguidance, Karras et al. 2024): an early
            average of the same training, or a smaller network. With it, `guidance_scale` needs no classes.
    """

    _optional_components = ["refine_scheduler", "guide"]
    model_cpu_offload_seq = "guide->unet"
    PLAN_ARGUMENTS = PyramidalArguments._fields
    BESIDE_PLANS = ("guidance_scale", "guidance_interval")  # may be given with a plan that does not set them
    RETIRED = ("detail_spectra", "spectra")

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        refine_scheduler: SchedulerMixin | None = None,
        plans: dict | None = None,
        colors: dict | None = None,
        guide: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, refine_scheduler=refine_scheduler, guide=guide)
        self.register_to_config(plans=plans, colors=colors)
        check_colors(colors, self._channels)
        check_scheduler("scheduler", scheduler)
        if refine_scheduler is not None:
            check_scheduler("refine_scheduler", refine_scheduler)
        if guide is not None:
            check_guide(plain(guide).config, plain(unet).config)
        for plan in (plans or {}).values():
            self._choose(plan, PyramidalArguments())

    @staticmethod
    def coordinate_grid(height: int, width: int, box: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
        """(row, column) of the pixel centres of a window (top, left, bottom, right), float32 [2, height, width]."""
        return pixel_grid(height, width, box)

    def plan(
        self,
        resolutions: Sequence[Size] | None = None,
        num_inference_steps: int = 100,
        refine_steps: int | Sequence[int] = 8,
        refine_strength: float | Sequence[float] = 0.3,
        spacing: Literal["scheduler", "log_snr"] | Sequence[Sequence[int]] = "scheduler",
        plan: str | dict | None = None,
        start_strength: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> PyramidalPlan:
        """The levels, steps and cost of a call with these arguments (see `__call__`), without running the network."""
        arguments = PyramidalArguments(
            resolutions,
            num_inference_steps,
            refine_steps,
            refine_strength,
            spacing,
            start_strength,
            guidance_scale,
            guidance_interval,
        )
        stages = self.lay_out(plan, arguments)
        self._check_noise(stages)
        top = stages[-1].network_size
        levels = [
            PyramidalLevel(s.size, s.network_size, s.steps.times, nfe_eq(s.calls, s.network_size, top), s.guided)
            for s in stages
        ]
        return PyramidalPlan(levels)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        resolutions: Sequence[Size] | None = None,
        num_inference_steps: int = 100,
        refine_steps: int | Sequence[int] = 8,
        refine_strength: float | Sequence[float] = 0.3,
        box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
        spacing: Literal["scheduler", "log_snr"] | Sequence[Sequence[int]] = "scheduler",
        plan: str | dict | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_levels: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        start_strength: float = 1.0,
        classes: str | int | Sequence[str | int | None] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> PyramidalPipelineOutput | tuple:
        """
        Generates images from coarse to fine (algorithm 1, with the noise term outside the bracket as in eq. 6 and the
        cumulative alpha in line 8).

        Args:
            batch_size: Number of images; by default as many as there are `classes`, or 1.
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
            plan: A plan of the pipeline by its name (`pipeline.config.plans`), or one as a dict, in place of the
                arguments above but `box`, which are then left at their defaults. It may set the guidance; where it does
                not, guidance may be given beside it. A distilled network, which knows few calls, takes its first plan
                where no steps are said.
            generator: One generator, or one an image: image k then does not depend on the others.
            output_type: "pil", "np" and "pt" in [0, 1], or "latent" in [-1, 1].
            return_levels: Whether to return the images of every level.
            return_dict: Whether to return a `PyramidalPipelineOutput` or a tuple (images, levels).
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": ...}) after each step, counted over
                all levels; may return changed tensors. Setting `pipeline._interrupt = True` ends the run.
            start_strength: Share in (0, 1] of the noise process that the lowest level starts from: 1 is noise alone
                (the paper); below, plain images in the colours of the data (`colors`), noised up to there. What little
                else more noise leaves of an image is hard to learn, and its errors become colour casts.
            classes: What to draw, of a network that knows classes (`unet.config.class_names`): a name or number for all
                images, or a list with one for each. `None` is for images of any class.
            guidance_scale: w of guidance: the prediction is u + w (c - u), c that of the network. u is its prediction
                without the class (Ho and Salimans 2022), both passes in one batch; or, of a pipeline with a `guide`,
                that of the guide (Karras et al. 2024). 1 is none; above, images are more typical of their class, or of
                the data, and less varied. A guided step costs two network calls.
            guidance_interval: (low, high), shares of the noise process within which there is guidance (Kynkäänniemi et
                al. 2024); by default everywhere.

        Raises:
            ValueError: for arguments out of range, before any work.
        """
        arguments = PyramidalArguments(
            resolutions,
            num_inference_steps,
            refine_steps,
            refine_strength,
            spacing,
            start_strength,
            guidance_scale,
            guidance_interval,
        )
        stages = self.lay_out(plan, arguments)
        batch_size = count_images(batch_size, classes)
        labels = self._labels(classes, batch_size)
        check_guided([scale for stage in stages for scale in stage.scales], classes, self.guide is not None)
        self._check_request(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"box={box}: expected (top, left, bottom, right) within [0, 1]")
        self._check_noise(stages, box)
        calls = sum(len(stage.steps) for stage in stages)
        latents, levels = None, []
        with self._running(calls, callback_on_step_end, callback_on_step_end_tensor_inputs) as run:
            for stage in run.going(stages):
                latents = self._begin(stage, latents, batch_size, generator, labels)  # line 1; lines 7 and 8
                coordinates = self._coordinates(stage, box, batch_size)
                steps = zip(stage.steps.on(latents.device), stage.scales, strict=True)
                for (timestep, network_time), scale in run.going(steps):  # lines 2 to 4; 9 to 11
                    sample = stage.steps.scheduler.scale_model_input(latents, timestep)
                    prediction = self._guided(sample, network_time, coordinates, labels, scale)
                    latents = stage.steps.step(prediction, timestep, latents, generator)
                    latents = run.after_step(timestep, latents)
                levels.append((latents, stage.size))
            images = self._to_output(latents, stages[-1].size, output_type)
            levels = [self._to_output(*level, output_type) for level in levels] if return_levels else None
        if not return_dict:
            return (images, levels)
        return PyramidalPipelineOutput(images=images, levels=levels)

    def _begin(
        self,
        stage: PyramidalStage,
        latents: torch.Tensor | None,
        batch_size: int,
        generator: Generators,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Noise at the lowest level (line 1), or plain colours in less of it; above, what was reached below, enlarged and
        renoised (eq. 2).
        """
        shape = (batch_size, self._channels, *stage.network_size)
        noise = white_noise(shape, generator=generator, device=self._execution_device)
        if latents is None and stage.strength == 1:
            return noise * stage.steps.scheduler.init_noise_sigma
        if latents is None:
            labels = None if labels is None else labels.tolist()
            plain_images = draw_colors(self.config.colors, shape, generator, noise.device, labels)
            return stage.steps.renoise(plain_images, noise)
        enlarged = F.interpolate(latents, stage.network_size, mode="bicubic", align_corners=False)
        return stage.steps.renoise(enlarged, noise)

    def _guided(
        self,
        sample: torch.Tensor,
        time: torch.Tensor,
        coordinates: torch.Tensor,
        labels: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """The network's output; unless the scale is 1, drawn away from the guide's, or that for images of any class."""
        if scale == 1:
            return self._predict(sample, time, coordinates, labels)
        if self.guide is not None:
            worse = self._predict(sample, time, coordinates, labels, self.guide)
            return worse + scale * (self._predict(sample, time, coordinates, labels) - worse)
        none = torch.full_like(labels, plain(self.unet).config.num_class_embeds - 1)
        coordinates = coordinates[:1].expand(2 * len(sample), -1, -1, -1)
        both = self._predict(torch.cat((sample, sample)), time, coordinates, torch.cat((none, labels)))
        without, told = both.chunk(2)
        return without + scale * (told - without)

    def _coordinates(self, stage: PyramidalStage, box: Sequence[float], batch_size: int) -> torch.Tensor:
        grid = pixel_grid(*stage.network_size, box).to(self._execution_device)
        return grid[None].expand(batch_size, -1, -1, -1)

    def lay_out(
        self, plan: str | dict | None = None, arguments: PyramidalArguments | None = None
    ) -> list[PyramidalStage]:
        """
        The levels of a call, low to high, each with a scheduler of its own that is ready for its steps.

        Args:
            plan: See `__call__`; beside it the arguments must be the defaults.
            arguments: Of a call; `None` for the defaults.

        Raises:
            ValueError: for what cannot run.
        """
        arguments = PyramidalArguments() if arguments is None else arguments
        arguments, schedulers = self._choose(plan, arguments)
        sizes = self._level_sizes(arguments.resolutions)
        spacings = self._spacings(arguments.spacing, len(sizes))
        calls = self._calls(arguments, spacings)
        strengths = per_level("refine_strength", arguments.refine_strength, len(sizes) - 1)
        for strength in strengths:
            check_strength("refine_strength", strength)
        self._check_start(arguments.start_strength)
        config, guided = plain(self.unet).config, self.guide is not None
        check_guidance(arguments.guidance_scale, arguments.guidance_interval, config, guided)
        stages = []
        for index, (size, strength) in enumerate(zip(sizes, [arguments.start_strength, *strengths], strict=True)):
            name = "refine_steps" if index else "num_inference_steps"
            steps = lay_out_steps(schedulers[min(index, 1)], calls[index], strength, spacings[index], name)
            if (index or strength < 1) and spacings[index] == "scheduler":
                check_start_above_zero(steps, name, calls[index])
            scales = guidance_scales(
                arguments.guidance_scale,
                arguments.guidance_interval,
                steps.times,
                steps.scheduler.config.num_train_timesteps,
            )
            stages.append(PyramidalStage(size, rounded_up(size, self._size_multiple), steps, strength, scales))
        return stages

    def _check_start(self, strength: float) -> None:
        check_strength("start_strength", strength)
        if strength < 1 and self.config.colors is None:
            raise ValueError(f"start_strength={strength}: expected 1.0, since this pipeline carries no `colors`")

    def _check_noise(self, stages: list[PyramidalStage], box: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> None:
        """Refuses more noise than the network is trained for at a level's size, or other times than it knows."""
        config, levels = plain(self.unet).config, [(stage.size, stage.steps.times) for stage in stages]
        starts = [(size, times[0]) for size, times in levels]
        check_noise(config, self.scheduler.config.num_train_timesteps, starts, box)
        check_level_calls(config, levels, self.config.plans or (), box)

    def _choose(
        self, plan: str | dict | None, arguments: PyramidalArguments
    ) -> tuple[PyramidalArguments, tuple[SchedulerMixin, SchedulerMixin]]:
        """The arguments of the plan, or those given; and the schedulers of the lowest level and of those above."""
        if plan is None and plain(self.unet).config.get("jumps") and not set(given(arguments)) - {*self.BESIDE_PLANS}:
            plan = next(iter(self.config.plans or ()), None)
        if plan is None:
            return arguments, (self.scheduler, self.refine_scheduler or self.scheduler)
        named = read_plan(plan, self.config.plans, self.PLAN_ARGUMENTS, ("scheduler", "refine_scheduler"))
        beside = {name: getattr(arguments, name) for name in self.BESIDE_PLANS if name not in named.arguments}
        check_not_beside_plan(plan, arguments, tuple(beside))
        chosen = {
            name: plan_scheduler(name, entry, self.scheduler) for name, entry in named.schedulers.items() if entry
        }
        low = chosen.get("scheduler", self.scheduler)
        own = None if named.schedulers else self.refine_scheduler
        return PyramidalArguments(**named.arguments, **beside), (low, chosen.get("refine_scheduler") or own or low)

    def _level_sizes(self, resolutions: Sequence[Size] | None) -> list[tuple[int, int]]:
        """The levels as (height, width), by default those of training."""
        if resolutions is None:
            config = plain(self.unet).config
            resolutions = getattr(config, "resolutions", None) or [config.sample_size]
            if resolutions == [None]:
                raise ValueError("resolutions=None: expected a list, since the network's config names none")
        sizes = check_growing("resolutions", resolutions)
        if min(sizes[0]) < self._size_multiple:
            raise ValueError(
                f"resolutions={list(resolutions)}: expected sides of at least {self._size_multiple} for this network"
            )
        return sizes

    @staticmethod
    def _spacings(spacing: str | Sequence[Sequence[int]], levels: int) -> list[Spacing]:
        """The spacing of each level."""
        if isinstance(spacing, str):
            return [spacing] * levels
        if len(spacing) != levels:
            raise ValueError(f"spacing gives times for {len(spacing)} levels: expected one list for each of {levels}")
        for times in spacing:
            if not isinstance(times, (list, tuple)) or not all(is_whole(time) for time in times):
                raise ValueError(f"spacing={spacing}: expected one list of whole numbers for each level")
        return list(spacing)

    @staticmethod
    def _calls(arguments: PyramidalArguments, spacings: list[Spacing]) -> list[int]:
        """Network calls of each level; where times are given, these say how many."""
        if not isinstance(spacings[0], str):
            return [len(times) for times in spacings]
        refine_steps = per_level("refine_steps", arguments.refine_steps, len(spacings) - 1)
        check_count("num_inference_steps", arguments.num_inference_steps)
        for steps in refine_steps:
            check_count("refine_steps", steps)
        return [arguments.num_inference_steps, *refine_steps]
