"""Super-resolution with an unconditional pyramid network, guided by the input (paper P, algorithm 2)."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

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


class SeparableOperator:
    """
    A linear operator on images: one matrix over the rows, one over the columns, one over the channels. Its inverse
    problems are solved exactly, since A A^T has the products of their eigenvalues.

    Args:
        rows: float64 [h, H].
        columns: float64 [w, W].
        channels: float64 [c, C], or `None` to keep the channels as they are.
    """

    NAMES = ("bicubic", "bicubic_matlab", "area", "lanczos", "gaussian", "gray")

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor, channels: torch.Tensor | None = None):
        self.factors = [rows, columns, torch.eye(1, dtype=torch.float64) if channels is None else channels]
        self.mixes = channels is not None
        self.eigen = [torch.linalg.eigh(factor @ factor.mT) for factor in self.factors]
        self.on: dict[tuple, list] = {}

    @classmethod
    def named(cls, name: str, large: tuple[int, int], small: tuple[int, int], channels: int) -> "SeparableOperator":
        """
        The operator that makes (height, width) `small` of `large`: "bicubic" as Pillow does it, "bicubic_matlab" as
        `imresize` does (they differ at the borders), "area" (means), "lanczos" (Pillow's, 3 lobes), "gaussian" (a blur
        of 0.4 pixels of the small image, then every n-th pixel: a standard deviation of 1.6 at x4), or "gray"
        (bicubic, then the luma of Rec. 601).
        """
        kernels = {"area": cls._area, "lanczos": cls._lanczos, "gaussian": cls._gaussian}
        kernel, mirrored = kernels.get(name, cls._cubic), name == "bicubic_matlab"
        matrices = [cls._resampling(a, b, kernel, mirrored) for a, b in zip(large, small, strict=True)]
        luma = torch.tensor([[0.299, 0.587, 0.114]] if channels == 3 else [[1.0 / channels] * channels])
        return cls(*matrices, luma.double() if name == "gray" else None)

    @staticmethod
    def _resampling(large: int, small: int, kernel: Callable, mirrored: bool) -> torch.Tensor:
        """float64 [small, large]: weights of a kernel that is widened by large / small, each row summing to 1."""
        scale = large / small
        margin = math.ceil(4 * scale) if mirrored else 0
        taps = torch.arange(-margin, large + margin)
        centres = (torch.arange(small, dtype=torch.float64) + 0.5) * scale
        weights = kernel((taps.double() + 0.5 - centres[:, None]) / scale, 0.5 / scale)
        if mirrored:
            place = taps % (2 * large)
            place = torch.where(place < large, place, 2 * large - 1 - place)
            weights = torch.zeros(small, large, dtype=torch.float64).index_add_(1, place, weights)
        return weights / weights.sum(1, keepdim=True)

    @staticmethod
    def _cubic(x: torch.Tensor, half_pixel: float) -> torch.Tensor:
        x = x.abs()
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return torch.where(x < 1, near, far) * (x < 2)

    @staticmethod
    def _lanczos(x: torch.Tensor, half_pixel: float) -> torch.Tensor:
        return torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)

    @staticmethod
    def _gaussian(x: torch.Tensor, half_pixel: float) -> torch.Tensor:
        return torch.exp(-0.5 * (x / 0.4) ** 2) * (x.abs() < 1.6)

    @staticmethod
    def _area(x: torch.Tensor, half_pixel: float) -> torch.Tensor:
        return ((x + half_pixel).clamp(max=0.5) - (x - half_pixel).clamp(min=-0.5)).clamp(min=0)

    def is_identity(self) -> bool:
        return all(
            factor.shape[0] == factor.shape[1] and bool((factor - torch.eye(len(factor))).abs().max() < 1e-9)
            for factor in self.factors
        )

    def _at(self, like: torch.Tensor) -> tuple[list, list, list]:
        """Matrices, eigenvectors and eigenvalues on a tensor's device and in its type."""
        key = (like.device, like.dtype)
        if key not in self.on:
            vectors, values = [v for _, v in self.eigen], [e for e, _ in self.eigen]
            self.on[key] = [[part.to(like) for part in parts] for parts in (self.factors, vectors, values)]
        return self.on[key]

    def _apply(self, image: torch.Tensor, rows, columns, channels) -> torch.Tensor:
        image = rows @ image @ columns.mT
        return torch.einsum("cd,bdhw->bchw", channels, image) if self.mixes else image

    def A(self, image: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, c, h, w]."""
        return self._apply(image, *self._at(image)[0])

    def adjoint(self, measurement: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """A^T: [B, c, h, w] to [B, C, H, W]."""
        return self._apply(measurement, *(factor.mT for factor in self._at(measurement)[0]))

    def correction(self, residual: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
        """A^T (A A^T + ridge)^-1 of [B, c, h, w]; without a ridge the pseudo-inverse."""
        _, vectors, (rows, columns, channels) = self._at(residual)
        values = channels[:, None, None] * rows[:, None] * columns + ridge
        values = torch.where(values > 1e-6 * values.max(), values, torch.inf)
        waves = self._apply(residual, *(part.mT for part in vectors)) / values
        return self.adjoint(self._apply(waves, *vectors))


class MaskOperator:
    """Keeps the pixels where the mask [h, w] is 1, for inpainting."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask

    def A(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.mask.to(image)

    def adjoint(self, measurement: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        return measurement * self.mask.to(measurement)

    def correction(self, residual: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
        return residual * self.mask.to(residual) / (1 + ridge)


class CallableOperator:
    """
    Any function of images that torch can differentiate. Where it is linear, inverse problems are solved by conjugate
    gradients, each image for itself, with A^T from autograd.

    Args:
        function: [B, C, H, W] to [B, c, h, w].
        shape: (C, H, W) that it takes.
        dagger: Its pseudo-inverse, if known.
    """

    ITERATIONS, TOLERANCE = 200, 1e-6

    def __init__(self, function: Callable, shape: tuple[int, int, int], dagger: Callable | None = None):
        self.function, self.shape, self.dagger = function, shape, dagger

    def A(self, image: torch.Tensor) -> torch.Tensor:
        return self.function(image)

    def adjoint(self, measurement: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """A^T, or for another than linear function that of its derivative at an image `at` [B, C, H, W]."""
        at = measurement.new_zeros(measurement.shape[0], *self.shape) if at is None else at
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            return torch.autograd.grad(self.function(at), at, measurement)[0]

    def is_linear(self, device: torch.device) -> bool:
        generator = torch.Generator().manual_seed(0)
        one, other = (torch.randn(1, *self.shape, generator=generator).to(device) for _ in range(2))
        difference = self.function(one - 2 * other) - self.function(one) + 2 * self.function(other)
        return bool(difference.abs().max() <= 1e-3 * self.function(one).abs().max())

    def check_dagger(self, device: torch.device) -> None:
        """Raises `ValueError` unless A A^+ A is A, on an image of noise."""
        image = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(0)).to(device)
        made = self.function(image)
        try:
            again = self.function(self.dagger(made))
            good = bool((again - made).abs().max() <= 1e-2 * made.abs().max())
        except Exception as error:
            raise ValueError(f"operator.A_dagger does not take what A makes: {error}") from error
        if not good:
            raise ValueError("operator.A_dagger is not the pseudo-inverse of A: expected A A_dagger A x = A x")

    def correction(self, residual: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
        """A^T (A A^T + ridge)^-1 of [B, c, h, w]."""
        if self.dagger is not None and ridge == 0:
            return self.dagger(residual)
        # What A cannot reach must not be chased: an image is done when its residual is small, when it no longer falls,
        # or when the direction is one that A A^T hardly changes.
        axes, tiny = tuple(range(1, residual.ndim)), torch.finfo(residual.dtype).tiny
        solution, left, direction = torch.zeros_like(residual), residual, residual
        size = left.square().sum(axes, keepdim=True)
        enough, strongest, going = self.TOLERANCE**2 * size, torch.zeros_like(size), size > 0
        for _ in range(self.ITERATIONS):
            image = self.function(self.adjoint(direction)) + ridge * direction
            curvature, length = ((direction * part).sum(axes, keepdim=True) for part in (image, direction))
            strongest = torch.maximum(strongest, curvature / length.clamp(min=tiny))
            going = going & (curvature > 1e-5 * strongest * length)
            step = size / curvature.clamp(min=tiny)
            after = left - step * image
            smaller = after.square().sum(axes, keepdim=True)
            going = going & (smaller < size)
            solution, left = (
                torch.where(going, new, old) for new, old in ((solution + step * direction, solution), (after, left))
            )
            direction = left + smaller / size.clamp(min=tiny) * direction
            size = torch.where(going, smaller, size)
            going = going & (size > enough)
            if not bool(going.any()):
                break
        return self.adjoint(solution)


class WindowedNetwork:
    """
    A network's prediction for an image that may be too large for it: by windows that overlap and blend. Also the
    gradient through it, window by window, so that neither needs more memory than one window does.

    Args:
        network: Called as network(sample [B, C, H, W], time, coordinates or `None`).
        multiple: Sides that the network takes are multiples of this.
        tile, overlap: Side of the windows and what neighbours share at least, multiples of `multiple`; no tile: whole.
    """

    def __init__(self, network: Callable, multiple: int, tile: int | None, overlap: int | None):
        self.network, self.multiple, self.tile, self.overlap = network, multiple, tile, overlap
        self.laid_out: tuple = (None, [])

    def predict(self, sample: torch.Tensor, time: torch.Tensor, keep_graph: bool = False) -> torch.Tensor:
        """The prediction for [B, C, H, W], float32; `pull` needs the graph."""
        while True:
            try:
                return self._predict(sample, time, keep_graph)
            except RuntimeError as error:
                self._halve(error, sample)
            if sample.is_cuda:
                torch.cuda.empty_cache()

    def pull(self, cotangent: torch.Tensor) -> torch.Tensor:
        """The gradient of <cotangent, prediction> to the sample of the last `predict`."""
        while True:
            try:
                return self._pull(cotangent)
            except RuntimeError as error:
                self.output = None
                self._halve(error, cotangent)
            if cotangent.is_cuda:
                torch.cuda.empty_cache()

    def _predict(self, sample, time, keep_graph):
        self.time, self.output, (height, width) = time, None, sample.shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        with torch.set_grad_enabled(keep_graph):
            self.sample = sample.detach().requires_grad_(keep_graph)
            self.padded = F.pad(self.sample, (0, right, 0, bottom), mode="reflect") if right or bottom else self.sample
            windows = self._windows()
            if len(windows) == 1:
                output = self.network(self.padded, time, windows[0][3])[..., :height, :width]
                self.output = output if keep_graph else None
                return output.detach()
        blended = torch.zeros_like(self.padded)
        for rows, columns, weight, grid in windows:
            piece = self.padded[..., rows, columns].detach()
            blended[..., rows, columns] += weight * self.network(piece, time, grid)
        return blended[..., :height, :width]

    def _pull(self, cotangent):
        if self.output is not None:
            return torch.autograd.grad(self.output, self.sample, cotangent)[0]
        gradient = torch.zeros_like(self.padded)
        right, bottom = (gradient.shape[axis] - cotangent.shape[axis] for axis in (-1, -2))
        cotangent = F.pad(cotangent, (0, right, 0, bottom))
        for rows, columns, weight, grid in self._windows():
            with torch.enable_grad():
                piece = self.padded[..., rows, columns].detach().requires_grad_()
                output = self.network(piece, self.time, grid)
            pulled = torch.autograd.grad(output, piece, weight * cotangent[..., rows, columns])[0]
            gradient[..., rows, columns] += pulled
        if self.padded is self.sample:
            return gradient
        return torch.autograd.grad(self.padded, self.sample, gradient)[0]

    def _grid(self, height: int, width: int) -> torch.Tensor:
        """(row, column) of the pixel centres in the image, [1, 2, H, W]; what was added below and right stays in it."""
        axes = [
            ((torch.arange(side + -side % self.multiple, dtype=torch.float64) + 0.5) / side).clamp(max=1)
            for side in (height, width)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).float()[None]

    def _windows(self) -> list[tuple]:
        """(rows, columns, weight [h, w], coordinates [1, 2, h, w]) of each window; a pixel's weights sum to 1."""
        key = (self.sample.shape[-2:], self.sample.device, self.tile)
        if self.laid_out[0] != key:
            self.laid_out = key, self._lay_out()
        return self.laid_out[1]

    def _lay_out(self) -> list[tuple]:
        axes, grid = [], self._grid(*self.sample.shape[-2:]).to(self.sample.device)
        for length in self.padded.shape[-2:]:
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
            weights = (weights / weights.sum(0)).to(self.padded)
            axes.append([(slice(p, p + side), weight[p : p + side]) for p, weight in zip(places, weights, strict=True)])
        return [
            (rows, columns, a[:, None] * b, grid[..., rows, columns]) for rows, a in axes[0] for columns, b in axes[1]
        ]

    def _halve(self, error: RuntimeError, image: torch.Tensor) -> None:
        """Halves the windows if memory ran out; raises what else went wrong."""
        if not ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error)):
            raise error
        side = min(self.tile or math.inf, max(image.shape[-2:])) // 2 // self.multiple * self.multiple
        if side < 2 * self.multiple:
            raise error
        self.tile, self.overlap = side, max(side // 4 // self.multiple, 1) * self.multiple
        logger.warning(f"out of memory: the network goes on with windows of {side}x{side}")


class GuidedSRPipeline(StandaloneSaving, DiffusionPipeline):
    r"""
    Enlarges images, or restores them, with an unconditional network: the input is enlarged and renoised to a part of
    the noise process, and every step of the way back is guided towards images that the operator would turn into the
    input; at each level up to the size that is asked for (algorithm 2).

    Parameters:
        unet: A network trained without conditions at one or several resolutions. `coordinates` are given to it if its
            `forward` takes them, so a plain `UNet2DModel` works too.
        scheduler: Any scheduler of diffusers with `add_noise`. Its own clipping is left out; see `clip_sample`.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]
    PAPER_SCALE = 5.0  # lambda of eq. 10, which the paper does not give: searched, see benchmarks/README.md

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._check_scheduler("scheduler", scheduler)
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"scheduler predicts {kind!r}: expected 'epsilon', 'sample' or 'v_prediction'")
        if unet.config.get("out_channels") not in (None, self._channels()):
            raise ValueError(f"unet makes {unet.config.out_channels} channels of {self._channels()}: expected as many")

    @property
    def num_timesteps(self) -> int:
        """Network calls of the last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

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
        sizes = self._level_sizes(self._pair("image_size", image_size), scale_factor, resolutions)
        steps = self._per_level("refine_steps", refine_steps, len(sizes))
        strengths = self._per_level("refine_strength", refine_strength, len(sizes))
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in steps):
            raise ValueError(f"refine_steps={refine_steps}: expected whole numbers from 1 up")
        if not all(0 < strength <= 1 for strength in strengths):
            raise ValueError(f"refine_strength={refine_strength}: expected numbers in (0, 1]")
        if spacing not in ("scheduler", "log_snr"):
            raise ValueError(f"spacing={spacing!r}: expected 'scheduler' or 'log_snr'")
        levels, scheduler = [], self._unclipped_scheduler()
        for size, calls, strength in zip(sizes, steps, strengths, strict=True):
            times = [float(t) for t in self._set_timesteps(scheduler, 1, calls, strength, spacing)]
            levels.append(GuidedSRLevel(size, times, len(times) * math.prod(size) / math.prod(sizes[-1])))
        return levels

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

        Raises:
            ValueError: for arguments out of range or an operator that does not fit, before any network call.
        """
        # 1. Check, and lay out the levels.
        measured = self._measured(image, operator, noise_std)
        plan = self.plan(measured.shape[-2:], scale_factor, resolutions, refine_steps, refine_strength, spacing)
        strengths = self._per_level("refine_strength", refine_strength, len(plan))
        batch_size, device = len(measured), self._execution_device
        measured = measured.to(device, torch.float32)
        if guidance_scale is None:
            guidance_scale = self.PAPER_SCALE
        self._check_inputs(
            guidance, guidance_scale, guidance_every, noise_std, hard_consistency, generator, batch_size, output_type
        )
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={list(callback_on_step_end_tensor_inputs)}: expected a subset of "
                f"{self._callback_tensor_inputs}"
            )
        operators = [self._operator(operator, mask, level.size, measured, guidance, hard_consistency) for level in plan]
        scheduler, latents, levels, step_count = self._unclipped_scheduler(), None, [], 0
        self._check_steps(scheduler, plan, strengths, spacing, guidance)
        network = WindowedNetwork(self._network, self._size_multiple(), *self._tiling(tile, tile_overlap))
        self._interrupt, self._num_timesteps = False, sum(len(level.timesteps) for level in plan)
        if mask is not None:
            measured = measured * mask.to(measured)
        learns = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in learns:  # so that a gradient goes to the input only, at the cost of one more network call
            parameter.requires_grad_(False)

        try:
            with self.progress_bar(total=self._num_timesteps) as progress:
                for index, level in enumerate(plan):
                    if self.interrupt:
                        break
                    # Schedulers read their times as numbers, so these stay on the CPU, where that waits for no GPU.
                    calls = len(level.timesteps)
                    timesteps = self._set_timesteps(scheduler, 1, calls, strengths[index], spacing)
                    network_times = timesteps.to(device)
                    shape = (batch_size, self._channels(), *level.size)
                    noise = randn_tensor(shape, generator=generator, device=device)

                    degrade = operators[index]  # of images in [0, 1], while the network's are in [-1, 1]

                    # 2. Lines 1 and 4: enlarge, then renoise (eq. 2).
                    if latents is not None:
                        latents = F.interpolate(latents, level.size, mode="bicubic", align_corners=False)
                    elif mask is None and measured.shape[1] == shape[1]:
                        latents = F.interpolate(2 * measured - 1, level.size, mode="bicubic", align_corners=False)
                    else:
                        gray = torch.full(shape, 0.5, device=device)
                        latents = 2 * degrade.correction(measured - degrade.A(gray))
                    latents = scheduler.add_noise(latents, noise, timesteps[:1].expand(batch_size).to(device))

                    # 3. Lines 5 to 9: the reverse process.
                    step_arguments = {}
                    if "generator" in inspect.signature(scheduler.step).parameters:
                        step_arguments["generator"] = generator
                    for step, (timestep, network_time) in enumerate(zip(timesteps, network_times, strict=True)):
                        if self.interrupt:
                            continue
                        sample = scheduler.scale_model_input(latents, timestep)
                        guide = guidance if (calls - 1 - step) % guidance_every == 0 else "none"

                        # Eq. 9: the clean estimate, for every kind of prediction c0 * sample + c1 * output.
                        output = network.predict(sample, network_time, keep_graph=guide in ("gradient", "paper"))
                        signal, noise_level = self._signal_and_noise(scheduler, timestep)
                        c0, c1 = self._clean_from(scheduler, signal, noise_level)
                        clean = c0 * sample + c1 * output
                        if clip_sample:
                            clean = clean.clamp(-1, 1)

                        # Line 8: towards images that the operator turns into the input.
                        push = None
                        if guide != "none":
                            residual = measured - degrade.A(clean / 2 + 0.5)
                            if guide == "paper":
                                direction = 4 * degrade.adjoint(residual, at=clean / 2 + 0.5)
                            else:
                                direction = 2 * degrade.correction(residual, (2 * noise_std / noise_level) ** 2)
                            if guide != "projection":
                                direction = c0 * direction + network.pull(c1 * direction)
                            if guide == "paper":
                                push = guidance_scale * direction
                            else:
                                clean = clean + (direction / signal if guide == "gradient" else direction)

                        output = (clean - c0 * sample) / c1
                        latents = scheduler.step(output, timestep, latents, **step_arguments, return_dict=False)[0]
                        latents = latents if push is None else latents + push
                        if callback_on_step_end is not None:
                            tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                            changed = callback_on_step_end(self, step_count, timestep, tensors) or {}
                            latents = changed.pop("latents", latents)
                        step_count += 1
                        progress.update()

                    if return_levels:
                        levels.append(self._to_output(latents, level.size, output_type))
        finally:
            for parameter in learns:
                parameter.requires_grad_(True)

        # 4. From [-1, 1] to what was asked for.
        if hard_consistency:
            for _ in range(100):  # between the images that fit the input and those in [-1, 1]
                latents = latents.clamp(-1, 1)
                residual = measured - degrade.A(latents / 2 + 0.5)
                if bool(residual.abs().max() < 0.25 / 255):
                    break
                latents = latents + 2 * degrade.correction(residual)
            else:
                logger.warning(
                    f"hard_consistency: {255 * residual.abs().max().item():.1f}/255 is left; see `consistency`"
                )
            latents = latents.clamp(-1, 1)
            if return_levels:
                levels[-1] = self._to_output(latents, latents.shape[-2:], output_type)
        difference = (degrade.A(latents.clamp(-1, 1) / 2 + 0.5) - measured).abs()
        if mask is not None:
            difference = difference * mask.to(difference) / mask.to(difference).mean()
        consistency = difference.flatten(1).mean(1)
        images = self._to_output(latents, latents.shape[-2:], output_type)
        self.maybe_free_model_hooks()
        levels = levels if return_levels else None
        if not return_dict:
            return (images, consistency, levels)
        return GuidedSRPipelineOutput(images=images, consistency=consistency, levels=levels)

    def _network(self, sample: torch.Tensor, time: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        where = {}
        if "coordinates" in inspect.signature(self._plain(self.unet).forward).parameters:
            where["coordinates"] = coordinates
        return self.unet(sample.to(self.unet.dtype), time, **where, return_dict=False)[0].float()

    def _channels(self) -> int:
        return getattr(self.unet.config, "image_channels", self.unet.config.in_channels)

    def _unclipped_scheduler(self) -> SchedulerMixin:
        """The scheduler, or one like it that does not clip the clean estimate: that would come after the guidance."""
        clips = {name: False for name in ("clip_sample", "thresholding") if self.scheduler.config.get(name)}
        return type(self.scheduler).from_config(self.scheduler.config, **clips) if clips else self.scheduler

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

    def _check_steps(self, scheduler, plan, strengths, spacing, guidance) -> None:
        """Refuses what the scheduler cannot do, before the network runs."""
        name = type(scheduler).__name__
        if guidance == "paper" and (
            scheduler.order != 1 or scheduler.init_noise_sigma != 1 or "disable_corrector" in scheduler.config
        ):
            raise ValueError(
                f"guidance='paper' with {name}: expected a first-order scheduler on the scale of the noise process "
                "that keeps no corrector, such as DDPMScheduler or DDIMScheduler; eq. 10 changes the result of its step"
            )
        divides = guidance == "gradient" or scheduler.config.get("prediction_type", "epsilon") == "epsilon"
        for level, strength in zip(plan, strengths, strict=True):
            times = self._set_timesteps(scheduler, 1, len(level.timesteps), strength, spacing)
            one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
            signal, noise = (scheduler.add_noise(*pair, times[:1]).item() for pair in ((one, zero), (zero, one)))
            if divides and signal < 1e-3 * noise:
                raise ValueError(
                    f"refine_strength={strength}: nothing of the image is left at time {float(times[0]):g} of {name}; "
                    "expected less, or a network that predicts v, guided by projection"
                )

    def _measured(self, image, operator, noise_std) -> torch.Tensor:
        """The input as float [B, C, h, w] in [0, 1]."""
        if isinstance(image, (list, tuple)):
            kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
            if not image or not any(all(isinstance(each, kind) for each in image) for kind in kinds):
                raise ValueError("image: expected a list of images of one kind, PIL, numpy or torch")
            parts = [self._measured(each, operator, noise_std) for each in image]
            if len({part.shape for part in parts}) > 1:
                raise ValueError("image: got several sizes or modes; expected one, or a call for each")
            return torch.cat(parts)
        channels = self._channels()
        expected = None if not isinstance(operator, str) else 1 if operator == "gray" else channels
        if isinstance(image, PIL.Image.Image):
            modes = {1: ("L",), 3: ("RGB",)}.get(expected, ("L", "RGB"))
            if image.mode not in modes:
                raise ValueError(f"image is in mode {image.mode}: expected {' or '.join(modes)}; see `Image.convert`")
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
        if expected is not None and image.shape[1] != expected:
            raise ValueError(f"image has {image.shape[1]} channels: expected {expected}")
        low, high = image.amin().item(), image.amax().item()
        if not math.isfinite(low + high):
            raise ValueError("image has values that are no numbers or infinite: expected [0, 1]")
        if isinstance(operator, str) and not noise_std and not (-1e-6 <= low and high <= 1 + 1e-6):
            raise ValueError(f"image has values from {low:.3g} to {high:.3g}: expected [0, 1]")
        return image

    def _operator(self, operator, mask, size, measured, guidance, hard_consistency):
        """The operator from a level's size to the input's."""
        shape, small = (self._channels(), *size), tuple(measured.shape[-2:])
        if isinstance(operator, str):
            if operator not in SeparableOperator.NAMES:
                raise ValueError(f"operator={operator!r}: expected one of {SeparableOperator.NAMES}, or a function")
            built = SeparableOperator.named(operator, size, small, shape[0])
        elif hasattr(operator, "A") and callable(operator.A):
            built = CallableOperator(operator.A, shape, getattr(operator, "A_dagger", None))
        elif callable(operator):
            built = CallableOperator(operator, shape)
        else:
            raise ValueError(f"operator={operator!r}: expected a name, a function, or an object with `A`")
        device = measured.device
        if isinstance(built, CallableOperator):
            try:
                made = tuple(built.A(torch.zeros(1, *shape, device=device)).shape[1:])
            except Exception as error:
                raise ValueError(f"operator does not take an image of {size[0]}x{size[1]}: {error}") from error
            if made != tuple(measured.shape[1:]):
                raise ValueError(
                    f"operator makes {list(made)} of an image [C, H, W] = {list(shape)}: expected "
                    f"{list(measured.shape[1:])}, as the input (`resolutions` sets the levels)"
                )
            inverted = guidance in ("projection", "gradient") or hard_consistency or mask is not None
            if (inverted or measured.shape[1] != shape[0]) and not built.is_linear(device):
                raise ValueError(
                    "operator is not linear: expected one, or guidance='paper' without mask and hard_consistency, and "
                    "an input with the network's channels"
                )
            if built.dagger is not None:
                built.check_dagger(device)
        if mask is None:
            return built
        if not isinstance(mask, torch.Tensor):
            raise ValueError(f"mask of type {type(mask).__name__}: expected a tensor {list(small)} of zeros and ones")
        if tuple(mask.shape) != small or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
            raise ValueError(
                f"mask of shape {list(mask.shape)}: expected zeros and ones of {list(small)}, as the input"
            )
        if isinstance(built, SeparableOperator) and built.is_identity():
            return MaskOperator(mask)
        return CallableOperator(lambda image: built.A(image) * mask.to(image), shape)

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

    def _check_inputs(
        self, guidance, scale, every, noise_std, hard_consistency, generator, batch_size, output_type
    ) -> None:
        if guidance not in ("projection", "gradient", "paper", "none"):
            raise ValueError(f"guidance={guidance!r}: expected 'projection', 'gradient', 'paper' or 'none'")
        if not math.isfinite(scale) or scale < 0:
            raise ValueError(f"guidance_scale={scale}: expected a number from 0 up")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"guidance_every={every}: expected a whole number from 1 up")
        if not isinstance(noise_std, (int, float)) or not 0 <= noise_std < 1:
            raise ValueError(f"noise_std={noise_std}: expected a number in [0, 1)")
        if hard_consistency and noise_std:
            raise ValueError(f"hard_consistency with noise_std={noise_std}: expected one, since noise would be copied")
        if not (generator is None or isinstance(generator, (torch.Generator, list))):
            raise ValueError(
                f"generator of type {type(generator).__name__}: expected a torch.Generator or a list of them"
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {batch_size}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")

    @staticmethod
    def _pair(name: str, size) -> tuple[int, int]:
        pair = tuple(size) if isinstance(size, Sequence) else (size, size)
        if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
            raise ValueError(f"{name}={size}: expected a whole number or (height, width)")
        return pair

    def _level_sizes(self, small: tuple[int, int], scale_factor, resolutions) -> list[tuple[int, int]]:
        """The levels as (height, width), from above the input's size to the output's."""
        if resolutions is not None and (not isinstance(resolutions, (list, tuple)) or len(resolutions) == 0):
            raise ValueError(f"resolutions={resolutions}: expected a list of sizes, low to high, the output's last")
        sizes = None if resolutions is None else [self._pair("resolutions", size) for size in resolutions]
        if scale_factor is None:
            if sizes is None:
                raise ValueError("scale_factor=None: expected resolutions then, with the output's size last")
            target = sizes[-1]
        else:
            if not isinstance(scale_factor, (int, float)) or not math.isfinite(scale_factor) or scale_factor < 1:
                raise ValueError(f"scale_factor={scale_factor}: expected a number from 1 up")
            exact = [side * scale_factor for side in small]
            target = tuple(round(side) for side in exact)
            if max(abs(a - b) for a, b in zip(exact, target, strict=True)) > 1e-6:
                raise ValueError(
                    f"scale_factor={scale_factor} makes {exact[0]:g}x{exact[1]:g} of {small[0]}x{small[1]}: expected "
                    "whole sides; crop the input, or give scale_factor=None and the size in resolutions"
                )
        if sizes is None:
            sizes, half = [target], target
            while max(half) > 1:
                half = tuple(math.ceil(side / 2) for side in half)
                if min(a - b for a, b in zip(half, small, strict=True)) < 0 or half == small:
                    break
                sizes.insert(0, half)
        if sizes[-1] != target:
            raise ValueError(f"resolutions={resolutions}: expected {target} last, for scale_factor={scale_factor}")
        for low, high in zip([small, *sizes], sizes, strict=False):
            if high[0] < low[0] or high[1] < low[1] or (high == low and len(sizes) > 1):
                raise ValueError(
                    f"resolutions={resolutions}: expected levels that grow from the input's size {small}, none smaller"
                )
        smallest = self._size_multiple()
        if min(sizes[0]) < smallest:
            raise ValueError(f"a level of {sizes[0]}: expected sides of at least {smallest} for this network")
        return sizes

    @staticmethod
    def _check_scheduler(name: str, part) -> None:
        if not (hasattr(part, "add_noise") and hasattr(part, "alphas_cumprod")):
            raise ValueError(
                f"{name}={type(part).__name__}: expected a scheduler with `add_noise` and `alphas_cumprod`, such "
                "as DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler or "
                "HeunDiscreteScheduler"
            )

    @staticmethod
    def _plain(module: torch.nn.Module) -> torch.nn.Module:
        """The module inside a compiled one."""
        return getattr(module, "_orig_mod", module)

    def _size_multiple(self) -> int:
        """Sides of a network's sample are multiples of this."""
        return 2 ** (len(getattr(self.unet.config, "block_out_channels", (1,))) - 1)

    @staticmethod
    def _per_level(name: str, value, count: int) -> list:
        if not isinstance(value, Sequence):
            return [value] * count
        if len(value) != count:
            raise ValueError(f"{name}={list(value)}: expected one number, or one for each of the {count} higher levels")
        return list(value)

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
