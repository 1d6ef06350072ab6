"""Super-resolution with an unconditional pyramid network, guided by the input (paper P, algorithm 2)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput, logging

from pyrdiff.parts.checks import (
    Generators,
    Size,
    check_count,
    check_scheduler,
    check_size,
    check_strength,
    is_number,
)
from pyrdiff.parts.estimates import CleanEstimate, prediction_type, signal_and_noise, unclipped
from pyrdiff.parts.images import ImageInput, read_images
from pyrdiff.parts.levels import nfe_eq, padded_grid, per_level
from pyrdiff.parts.noise import white_noise
from pyrdiff.parts.noise_windows import check_level_calls, check_noise
from pyrdiff.parts.operators import Operator, Sides, build_operator, project_onto
from pyrdiff.parts.sampling import SamplingPipeline
from pyrdiff.parts.steps import LevelSteps, check_start_above_zero, lay_out_steps
from pyrdiff.parts.windows import Prediction, Tiling, WindowedNetwork
from pyrdiff.parts.wrappers import plain

guidance_logger = logging.get_logger(__name__)


@dataclass
class GuidedSRLevel:
    """One level of a call: its size (height, width), the time of every network call, and what they cost."""

    size: tuple[int, int]
    timesteps: list[float]
    nfe_eq: float


@dataclass
class GuidedSRPipelineOutput(BaseOutput):
    """
    Args:
        images: The enlarged images: PIL, a numpy array [B, H, W, C] in [0, 1], or a tensor [B, C, H, W] ("pt" in
            [0, 1], "latent" in [-1, 1], not clipped).
        consistency: float32 [B]: mean absolute difference between the input and what the operator makes of the output,
            in the [0, 1] range of the input.
        levels: The images of every level, low to high, in the same form; `None` unless `return_levels=True`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    consistency: torch.Tensor
    levels: list | None = None


@dataclass(frozen=True)
class GuidedStage:
    """
    One level of a running call: its size (height, width), its steps, the operator from it to the input, and where its
    pixels lie, as the padded network sees them: [1, 2, H, W].
    """

    size: tuple[int, int]
    steps: LevelSteps
    operator: Operator
    coordinates: torch.Tensor


class GuidedOutput(NamedTuple):
    """
    A prediction whose clean estimate fits the input better, what is added after the step, and how far from the input
    the estimate was before: the mean absolute difference [B] in [0, 1]. `None` where there is none.
    """

    output: torch.Tensor
    push: torch.Tensor | None = None
    difference: torch.Tensor | None = None


@dataclass(frozen=True)
class InputGuidance:
    """
    Line 8 of algorithm 2: draws each clean estimate to images with A x0 = y.

    Args:
        kind: See the argument `guidance` of the pipeline.
        measured: y, [B, c, h, w] in [0, 1].
        scale: lambda of "paper".
        every: Guides every n-th step, the last one among them.
        noise_std: Of the measurement.
        clip_sample: Whether the clean estimate is kept in [-1, 1] before it is guided.
        network: Makes the prediction.
    """

    kind: Literal["projection", "gradient", "paper", "none"]
    measured: torch.Tensor
    scale: float
    every: int
    noise_std: float
    clip_sample: bool
    network: WindowedNetwork

    def predict(
        self, stage: GuidedStage, index: int, timestep: torch.Tensor, time: torch.Tensor, latents: torch.Tensor
    ) -> GuidedOutput:
        """The guided prediction of a step; `index` counts the steps of the level."""
        scheduler = stage.steps.scheduler
        sample = scheduler.scale_model_input(latents, timestep)
        estimate = CleanEstimate.at(scheduler, *signal_and_noise(scheduler, timestep))
        kind = self.kind if (len(stage.steps) - 1 - index) % self.every == 0 else "none"
        if kind in ("none", "projection"):
            output = self.network.predict(sample, time, stage.coordinates)
            clean = self._clipped(estimate.clean(sample, output))
            if kind == "none":
                return GuidedOutput(estimate.output(sample, clean))
            residual = self._residual(stage.operator, clean)
            clean = clean + self._correction(stage.operator, residual, estimate)
            return GuidedOutput(estimate.output(sample, clean), None, residual.abs().flatten(1).mean(1))
        prediction = self.network.differentiate(sample, time, stage.coordinates)
        clean = self._clipped(estimate.clean(sample, prediction.output))
        residual = self._residual(stage.operator, clean)
        difference = residual.abs().flatten(1).mean(1)
        if kind == "paper":
            direction = self._through(prediction, estimate, self._gradient(stage.operator, residual, clean))
            return GuidedOutput(estimate.output(sample, clean), self.scale * direction, difference)
        direction = self._through(prediction, estimate, self._correction(stage.operator, residual, estimate))
        return GuidedOutput(estimate.output(sample, clean + direction / estimate.signal), None, difference)

    def _clipped(self, clean: torch.Tensor) -> torch.Tensor:
        return clean.clamp(-1, 1) if self.clip_sample else clean

    def _residual(self, operator: Operator, clean: torch.Tensor) -> torch.Tensor:
        """y - A x0, in the range of the measurement."""
        return self.measured - operator.A(clean / 2 + 0.5)

    def _correction(self, operator: Operator, residual: torch.Tensor, estimate: CleanEstimate) -> torch.Tensor:
        """A^+ (y - A x0), damped by what noise the measurement has, in the [-1, 1] range of the estimate."""
        return 2 * operator.correction(residual, (2 * self.noise_std / estimate.noise) ** 2)

    @staticmethod
    def _gradient(operator: Operator, residual: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """- grad |A x0 - y|^2 to x0 (eq. 10), both in [-1, 1]."""
        return 4 * operator.adjoint(residual, at=clean / 2 + 0.5)

    @staticmethod
    def _through(prediction: Prediction, estimate: CleanEstimate, direction: torch.Tensor) -> torch.Tensor:
        """J^T of a direction, J being the derivative of the clean estimate (without its clipping) to the sample."""
        return estimate.sample_weight * direction + prediction.pull(estimate.output_weight * direction)


class GuidedSRPipeline(SamplingPipeline, DiffusionPipeline):
    r"""
    Enlarges images, or restores them, with a network that generates: the input is enlarged and renoised to a part of
    the noise process, and every step of the way back is guided towards images that the operator would turn into the
    input; at each level up to the size that is asked for (algorithm 2).

    Parameters:
        unet: A network trained at one or several resolutions, without conditions or with classes. `coordinates` are
            given to it if its `forward` takes them, so a plain `UNet2DModel` works too.
        scheduler: Any scheduler of diffusers with `add_noise`. Its own clipping is left out; see `clip_sample`.
    """

    PAPER_SCALE = 5.0  # lambda of eq. 10, which the paper does not give: searched, see benchmarks/README.md

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        check_scheduler("scheduler", scheduler)
        prediction_type(scheduler)
        made = plain(unet).config.get("out_channels")
        if made not in (None, self._channels):
            raise ValueError(f"unet makes {made} channels of {self._channels}: expected as many")

    def plan(
        self,
        image_size: Size,
        scale_factor: float | None = 4,
        resolutions: Sequence[Size] | None = None,
        refine_steps: int | Sequence[int] = 8,
        refine_strength: float | Sequence[float] = 0.3,
        spacing: Literal["scheduler", "log_snr"] = "scheduler",
    ) -> list[GuidedSRLevel]:
        """
        The levels and times of a call for an input of this size (see `__call__`), without running the network.

        1 NFE-eq is one network call at the output's size; a step with guidance by gradient costs about two.
        """
        sizes = self._level_sizes(check_size("image_size", image_size), scale_factor, resolutions)
        steps = self._lay_out(sizes, refine_steps, refine_strength, spacing)
        return [
            GuidedSRLevel(size, level.times, nfe_eq(len(level), size, sizes[-1]))
            for size, level in zip(sizes, steps, strict=True)
        ]

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list,
        scale_factor: float | None = 4,
        resolutions: Sequence[Size] | None = None,
        refine_steps: int | Sequence[int] = 8,
        refine_strength: float | Sequence[float] = 0.3,
        spacing: Literal["scheduler", "log_snr"] = "scheduler",
        guidance: Literal["projection", "gradient", "paper", "none"] = "projection",
        guidance_scale: float | None = None,
        guidance_every: int = 1,
        operator="bicubic",
        mask: torch.Tensor | None = None,
        noise_std: float = 0.0,
        hard_consistency: bool = False,
        clip_sample: bool = True,
        tile: int | None = None,
        tile_overlap: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_levels: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        classes: str | int | Sequence[str | int | None] | None = None,
    ) -> GuidedSRPipelineOutput | tuple:
        r"""
        Args:
            image: One or several images of one size: PIL in mode RGB or L, a list of them, numpy [H, W, C] or
                [B, H, W, C] in [0, 1], or a tensor [C, h, w] or [B, C, h, w] in [0, 1].
            scale_factor: Output's sides over input's, 1 or more; they must come out whole. `None`: see `resolutions`.
            resolutions: The levels, low to high, each an int or (height, width), the output's size last; by default
                that size and its halves down to what is above the input's.
            refine_steps: Network calls at each level (T_s times the strength): one number, or one a level. A
                second-order scheduler makes an odd number.
            refine_strength: Share in (0, 1] of the noise process that a level starts from (Delta t_s). Inpainting of
                more than specks wants 1.
            spacing: How the steps of a level are placed: as the scheduler does, or uniformly in log-SNR.
            guidance: How each clean estimate x0 is drawn to images with A x0 = y, the input:
                "projection": x0 + A^+ (y - A x0), no gradient (DDNM's and ILVR's family);
                "gradient": x0 + J^T A^+ (y - A x0) / sqrt(alpha_bar), J = dx0/dx_t without the clipping (eq. 9,
                weighted by (A A^T)^-1 as in PiGDM: E[x0 | x_t, y] if x0 given x_t had the variance 1 - alpha_bar, so it
                needs no scale). A step costs about two network calls, three in windows;
                "paper": x_{t-1} - scale * grad |A x0 - y|^2, as eq. 10 is printed;
                "none": the input is but the start.
            guidance_scale: The scale (lambda) of "paper".
            guidance_every: Guides every n-th network call only, the last one among them.
            operator: How the input came from an image of a level's size, both in [0, 1]. A name of
                `SeparableOperator.named`; an object with `A`, and `A_dagger` if it knows its pseudo-inverse; or a
                function [B, C, H, W] -> [B, c, h, w] that torch can differentiate, linear unless guidance is "paper".
            mask: [h, w], 1 where the input is known, 0 where it is not, for inpainting; after the operator.
            noise_std: Standard deviation of the noise in the input, in its [0, 1] range.
            hard_consistency: Whether to project the output until the operator turns it into the input up to rounding,
                as far as images in [0, 1] can; it is then clipped in every form. Not together with `noise_std`.
            clip_sample: Whether each clean estimate is kept in [-1, 1], before it is guided.
            tile: Side of the square windows that the network sees, for images that do not fit as a whole. The noise and
                the guidance are of the whole image and the windows blend in every step. Halved when memory runs out.
            tile_overlap: Pixels that neighbouring windows share at least; by default a quarter of `tile`.
            generator: One generator, or one an image: image k then does not depend on the others.
            output_type: "pil", "np" and "pt" in [0, 1], or "latent" in [-1, 1].
            return_levels: Whether to return the images of every level.
            return_dict: Whether to return a `GuidedSRPipelineOutput` or a tuple (images, consistency, levels).
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": ...}) after each step, counted over
                all levels; may return changed tensors. Setting `pipeline._interrupt = True` ends the run.
            classes: What the images show, for a network that knows classes (`unet.config.class_names`): a name or
                number for all of them, or a list with one for each. `None` is for images of any class.

        Raises:
            ValueError: for arguments out of range or an operator that does not fit, before any network call.
        """
        measured = self._read(image, operator, noise_std).to(self._execution_device, torch.float32)
        scale = self.PAPER_SCALE if guidance_scale is None else guidance_scale
        self._check_call(guidance, scale, guidance_every, noise_std, hard_consistency)
        self._check_request(len(measured), generator, output_type, callback_on_step_end_tensor_inputs)
        sizes = self._level_sizes(tuple(measured.shape[-2:]), scale_factor, resolutions)
        steps = self._lay_out(sizes, refine_steps, refine_strength, spacing)
        self._check_steps(steps, guidance)
        inverted = guidance in ("projection", "gradient") or hard_consistency or mask is not None
        stages = [
            self._stage(size, level, measured, operator, mask, inverted)
            for size, level in zip(sizes, steps, strict=True)
        ]
        tiling = Tiling.checked(tile, tile_overlap, self._size_multiple)
        predict = partial(self._predict, labels=self._labels(classes, len(measured)))
        network = WindowedNetwork(predict, self._size_multiple, tiling)
        if mask is not None:
            measured = measured * mask.to(measured)
        guide = InputGuidance(guidance, measured, scale, guidance_every, noise_std, clip_sample, network)

        calls = sum(len(stage.steps) for stage in stages)
        latents, levels, guided = None, [], None
        with self._frozen(), self._running(calls, callback_on_step_end, callback_on_step_end_tensor_inputs) as run:
            for stage in run.going(stages):
                operator = stage.operator
                latents = self._begin(stage, latents, measured, mask, generator)  # lines 1 and 4
                numbered = enumerate(stage.steps.on(latents.device))
                for index, (timestep, time) in run.going(numbered):  # lines 5 to 9
                    guided = guide.predict(stage, index, timestep, time, latents)  # eq. 9 and line 8
                    latents = stage.steps.step(guided.output, timestep, latents, generator)
                    latents = latents if guided.push is None else latents + guided.push  # eq. 10
                    latents = run.after_step(timestep, latents)
                levels.append(latents)
        if hard_consistency:
            levels[-1] = latents = project_onto(latents, measured, operator)
        consistency = self._consistency(latents, measured, mask, operator)
        self._warn_if_worse(consistency, guided, guidance)
        images, *levels = (
            self._to_output(one, one.shape[-2:], output_type) for one in (latents, *(levels if return_levels else []))
        )
        levels = levels if return_levels else None
        if not return_dict:
            return (images, consistency, levels)
        return GuidedSRPipelineOutput(images=images, consistency=consistency, levels=levels)

    def _begin(
        self,
        stage: GuidedStage,
        latents: torch.Tensor | None,
        measured: torch.Tensor,
        mask: torch.Tensor | None,
        generator: Generators,
    ) -> torch.Tensor:
        """The input, or what was reached below, enlarged (line 1) and renoised (line 4, eq. 2)."""
        shape = (len(measured), self._channels, *stage.size)
        noise = white_noise(shape, generator=generator, device=measured.device)
        if latents is None and (mask is not None or measured.shape[1] != shape[1]):
            gray = torch.full(shape, 0.5, device=measured.device)
            start = 2 * stage.operator.correction(measured - stage.operator.A(gray))
        else:
            below = 2 * measured - 1 if latents is None else latents
            start = F.interpolate(below, stage.size, mode="bicubic", align_corners=False)
        return stage.steps.renoise(start, noise)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """A gradient goes to the input only, at the cost of one more network call instead of two."""
        learning = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    @staticmethod
    def _consistency(
        latents: torch.Tensor, measured: torch.Tensor, mask: torch.Tensor | None, operator: Operator
    ) -> torch.Tensor:
        """Mean absolute difference [B] between the input and what the operator makes of the output, where known."""
        difference = (operator.A(latents.clamp(-1, 1) / 2 + 0.5) - measured).abs()
        if mask is not None:
            difference = difference * mask.to(difference) / mask.to(difference).mean()
        return difference.flatten(1).mean(1)

    @staticmethod
    def _warn_if_worse(consistency: torch.Tensor, guided: GuidedOutput | None, guidance: str) -> None:
        """Warns if the last guided step ended further from the input than what the network had predicted without it."""
        if guided is None or guided.difference is None:
            return
        worse = consistency > guided.difference.clamp(min=1 / 255)
        if bool(worse.any()):
            at = int((consistency - guided.difference).argmax())
            guidance_logger.warning(
                f"guidance={guidance!r} draws away from the input: image {at} ends {consistency[at].item():.3f} away, "
                f"and was {guided.difference[at].item():.3f} away before the last step"
                + ("; expected a smaller guidance_scale" if guidance == "paper" else "")
            )

    def _lay_out(self, sizes, refine_steps, refine_strength, spacing) -> list[LevelSteps]:
        """The steps of each level, with schedulers of their own; raises for steps that cannot be made."""
        if spacing not in ("scheduler", "log_snr"):
            raise ValueError(f"spacing={spacing!r}: expected 'scheduler' or 'log_snr'")
        calls = per_level("refine_steps", refine_steps, len(sizes))
        strengths = per_level("refine_strength", refine_strength, len(sizes))
        scheduler, levels = unclipped(self.scheduler), []
        for count, strength in zip(calls, strengths, strict=True):
            check_count("refine_steps", count)
            check_strength("refine_strength", strength)
            levels.append(lay_out_steps(scheduler, count, strength, spacing, "refine_steps"))
            if spacing == "scheduler":
                check_start_above_zero(levels[-1], "refine_steps", count)
        config = plain(self.unet).config
        called = [(size, level.times) for size, level in zip(sizes, levels, strict=True)]
        starts = [(size, times[0]) for size, times in called]
        check_noise(config, scheduler.config.num_train_timesteps, starts)
        check_level_calls(config, called, plans=())
        return levels

    @staticmethod
    def _check_steps(levels: list[LevelSteps], guidance: str) -> None:
        """Refuses what the scheduler cannot do, before the network runs."""
        scheduler = levels[0].scheduler
        name = type(scheduler).__name__
        if guidance == "paper" and (
            scheduler.order != 1 or scheduler.init_noise_sigma != 1 or "disable_corrector" in scheduler.config
        ):
            raise ValueError(
                f"guidance='paper' with {name}: expected a first-order scheduler on the scale of the noise process "
                "that keeps no corrector, such as DDPMScheduler or DDIMScheduler; eq. 10 changes the result of its step"
            )
        divides = guidance == "gradient" or prediction_type(scheduler) == "epsilon"
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        for level in levels:
            signal, noise = (level.renoise(*pair).item() for pair in ((one, zero), (zero, one)))
            if divides and signal < 1e-3 * noise:
                raise ValueError(
                    f"refine_strength: nothing of the image is left at time {level.times[0]:g} of {name}; expected "
                    "less, or a network that predicts v, guided by projection"
                )

    def _read(self, image: ImageInput, operator, noise_std: float) -> torch.Tensor:
        """The input as float [B, C, h, w] in [0, 1]; what an own operator measures may lie beyond."""
        named = isinstance(operator, str)
        channels = None if not named else 1 if operator == "gray" else self._channels
        return read_images(image, channels, any_range=not named or bool(noise_std))

    def _stage(
        self, size: tuple[int, int], steps: LevelSteps, measured: torch.Tensor, operator, mask, inverted: bool
    ) -> GuidedStage:
        sides = Sides((self._channels, *size), tuple(measured.shape[1:]), measured.device)
        linear = inverted or measured.shape[1] != self._channels
        coordinates = padded_grid(*size, self._size_multiple).to(measured.device)
        return GuidedStage(size, steps, build_operator(operator, mask, sides, linear), coordinates)

    @staticmethod
    def _check_call(guidance, scale, every, noise_std, hard_consistency) -> None:
        if guidance not in ("projection", "gradient", "paper", "none"):
            raise ValueError(f"guidance={guidance!r}: expected 'projection', 'gradient', 'paper' or 'none'")
        if not is_number(scale) or scale < 0:
            raise ValueError(f"guidance_scale={scale}: expected a number from 0 up")
        check_count("guidance_every", every)
        if not is_number(noise_std) or not 0 <= noise_std < 1:
            raise ValueError(f"noise_std={noise_std}: expected a number in [0, 1)")
        if hard_consistency and noise_std:
            raise ValueError(f"hard_consistency with noise_std={noise_std}: expected one, since noise would be copied")

    def _level_sizes(
        self, small: tuple[int, int], scale_factor: float | None, resolutions: Sequence[Size] | None
    ) -> list[tuple[int, int]]:
        """The levels as (height, width), from above the input's size to the output's."""
        if resolutions is not None and (not isinstance(resolutions, (list, tuple)) or len(resolutions) == 0):
            raise ValueError(f"resolutions={resolutions}: expected a list of sizes, low to high, the output's last")
        given = None if resolutions is None else [check_size("resolutions", size) for size in resolutions]
        if scale_factor is not None:
            target = self._enlarged(small, scale_factor)
        elif given is not None:
            target = given[-1]
        else:
            raise ValueError("scale_factor=None: expected resolutions then, with the output's size last")
        sizes = self.sizes_between(small, target) if given is None else given
        if sizes[-1] != target:
            raise ValueError(f"resolutions={resolutions}: expected {target} last, for scale_factor={scale_factor}")
        for low, high in zip([small, *sizes], sizes, strict=False):
            if high[0] < low[0] or high[1] < low[1] or (high == low and len(sizes) > 1):
                raise ValueError(
                    f"resolutions={resolutions}: expected levels that grow from the input's size {small}, none smaller"
                )
        return sizes

    @staticmethod
    def _enlarged(small: tuple[int, int], scale_factor: float) -> tuple[int, int]:
        """The output's size; whole sides."""
        if not is_number(scale_factor) or scale_factor < 1:
            raise ValueError(f"scale_factor={scale_factor}: expected a number from 1 up")
        exact = [side * scale_factor for side in small]
        target = tuple(round(side) for side in exact)
        if max(abs(a - b) for a, b in zip(exact, target, strict=True)) > 1e-6:
            raise ValueError(
                f"scale_factor={scale_factor} makes {exact[0]:g}x{exact[1]:g} of {small[0]}x{small[1]}: expected "
                "whole sides; crop the input, or give scale_factor=None and the size in resolutions"
            )
        return target

    @staticmethod
    def sizes_between(small: tuple[int, int], target: tuple[int, int]) -> list[tuple[int, int]]:
        """
        The levels that lead from an input of one size (height, width) to an output of another, for `resolutions`: the
        target and its halves, rounded up, that are larger than the input; low to high.
        """
        sizes, half = [target], target
        while max(half) > 1:
            half = tuple(math.ceil(side / 2) for side in half)
            if min(a - b for a, b in zip(half, small, strict=True)) < 0 or half == small:
                break
            sizes.insert(0, half)
        return sizes
