# SPDX-License-Identifier: Apache-2.0
# Written by pyrdiff; stands alone.
"""Super-resolution by diffusion of what the enlarged input lacks (paper S: SR4), or of the image itself (SR3)."""

import PIL.Image
import copy
import diffusers
import importlib
import inspect
import json
import math
import numbers
import numpy as np
import os
import re
import sys
import torch
import torch.nn.functional as F
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from functools import partial
from huggingface_hub import create_repo
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar


# pyrdiff.parts.settings: Checks of the settings of networks and schedulers. Each raises `ValueError` with name, value and what is accepted.

def check_choices(settings: Mapping, choices: Mapping[str, Sequence]) -> None:
    """Each setting that `choices` names must have one of the values there."""
    for name, accepted in choices.items():
        if settings[name] not in accepted:
            raise ValueError(f"{name}={settings[name]!r}: expected one of {tuple(accepted)}")


def is_whole(value: object) -> bool:
    """True for a whole number, also one of numpy; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_whole(settings: Mapping, *names: str, optional: bool = False) -> None:
    """Each of these settings must be a whole number from 1 up, or None if that is allowed."""
    for name in names:
        value = settings[name]
        if not (is_whole(value) and value >= 1 or optional and value is None):
            raise ValueError(f"{name}={value!r}: expected a whole number from 1 up{' or None' * optional}")


def check_positive(settings: Mapping, *names: str) -> None:
    """Each of these settings must be a finite number above 0."""
    for name in names:
        if not 0 < settings[name] < math.inf:
            raise ValueError(f"{name}={settings[name]}: expected a finite number above 0")


def checked_factors(factors: Sequence[int] | None) -> list[int] | None:
    """The setting `scale_factors` as a config keeps it: different whole numbers from 2 up, or None."""
    if factors is None:
        return None
    given = list(factors) if isinstance(factors, (list, tuple)) else []
    whole = all(is_whole(factor) and factor >= 2 for factor in given)
    if not given or not whole or len(set(given)) < len(given):
        raise ValueError(f"scale_factors={factors}: expected different whole numbers from 2 up, or None")
    return given


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing if none is near."""
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else ""


# pyrdiff.parts.checks: Checks of arguments that several pipelines take. Each raises `ValueError` with the name, the value and what fits.

Size = int | tuple[int, int]
Generators = torch.Generator | list[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def is_number(value) -> bool:
    """Whether it is a finite real number, also one of numpy; a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < math.inf


def is_count(value) -> bool:
    """Whether it is a whole number from 1 up."""
    return is_whole(value) and value > 0


def check_count(name: str, value) -> None:
    if not is_count(value):
        raise ValueError(f"{name}={value!r}: expected a whole number from 1 up")


def check_switch(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False")


def check_strength(name: str, value) -> None:
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name}={value!r}: expected a number in (0, 1]")


def check_size(name: str, size: Size) -> tuple[int, int]:
    """The size as (height, width)."""
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(is_count(side) for side in pair):
        raise ValueError(f"{name}={size}: expected a whole number or (height, width)")
    return pair


def check_generators(generator: Generators) -> None:
    """One generator, a list of them, or none."""
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator={one!r}: expected a torch.Generator or a list of them, such as "
                "torch.Generator().manual_seed(5)"
            )


def check_generator(generator: Generators, batch_size: int) -> None:
    """One generator, or as many as there are images."""
    check_generators(generator)
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {batch_size}")


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")


def check_scheduler(name: str, scheduler) -> None:
    """The scheduler must be able to renoise an image, and say its noise process."""
    if not (hasattr(scheduler, "add_noise") and hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(
            f"{name}={type(scheduler).__name__}: expected a scheduler with `add_noise` and `alphas_cumprod`, such "
            "as DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler or "
            "HeunDiscreteScheduler"
        )


# pyrdiff.parts.estimates: The clean estimate that a network's prediction stands for (paper P, eq. 9), and the way back.

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What the network predicts, as the scheduler's config says it.

    Raises:
        ValueError: if the clean estimate is not a linear function of it.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"scheduler={type(scheduler).__name__} predicts {kind!r}: expected 'epsilon', 'sample' or 'v_prediction'"
        )
    return kind


@dataclass(frozen=True)
class CleanEstimate:
    """
    Eq. 9 at one noise level, for every kind of prediction: the clean image is
    sample_weight * sample + output_weight * output.

    Args:
        signal, noise: a and s of sample = a * clean + s * noise, as the network sees it; a^2 + s^2 = 1.
        sample_weight, output_weight: What the clean estimate is made of.
    """

    signal: float
    noise: float
    sample_weight: float
    output_weight: float

    @classmethod
    def at(cls, scheduler: SchedulerMixin, signal: float, noise: float) -> "CleanEstimate":
        kind = prediction_type(scheduler)
        if kind == "sample":
            return cls(signal, noise, 0.0, 1.0)
        if kind == "v_prediction":
            return cls(signal, noise, signal, -noise)
        return cls(signal, noise, 1 / signal, -noise / signal)

    def clean(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return self.sample_weight * sample + self.output_weight * output

    def output(self, sample: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """The prediction whose clean estimate this is."""
        return (clean - self.sample_weight * sample) / self.output_weight


def signal_and_noise(scheduler: SchedulerMixin, timestep: torch.Tensor) -> tuple[float, float]:
    """a and s of x_t = a x_0 + s noise, as the network sees it; asked of the scheduler, whatever its scale.

    Raises:
        ValueError: if the scheduler has lost track of its noise level.
    """
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    pairs = (scheduler.add_noise(*pair, timestep.reshape(1)) for pair in ((one, zero), (zero, one)))
    signal, noise = (scheduler.scale_model_input(value, timestep).item() for value in pairs)
    if abs(signal**2 + noise**2 - 1) > 0.01:
        raise ValueError(
            f"{type(scheduler).__name__} does not say which noise level its steps are at: expected another"
        )
    return signal, noise


def unclipped(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, or one like it that does not clip the clean estimate: the pipeline does that itself."""
    clips = {name: False for name in ("clip_sample", "thresholding") if scheduler.config.get(name)}
    return type(scheduler).from_config(scheduler.config, **clips) if clips else scheduler


# pyrdiff.parts.images: Images in: PIL, numpy or torch, in one form.

ImageInput = PIL.Image.Image | np.ndarray | torch.Tensor | list
PIL_MODES = {1: "L", 3: "RGB"}


def read_images(image: ImageInput, channels: int | None, any_range: bool = False) -> torch.Tensor:
    """
    The images of an argument `image` as one batch.

    Args:
        image: PIL in mode L or RGB; numpy [H, W, C] or [B, H, W, C], or torch [C, H, W] or [B, C, H, W], of floats in
            [0, 1]; or a list of one of these kinds, all of one size.
        channels: How many are expected; `None` for any.
        any_range: Whether numbers outside [0, 1] are fine, as they are for noisy measurements.

    Returns:
        Floats [B, C, H, W] as they were given; PIL as float32 in [0, 1].

    Raises:
        ValueError: for anything else.
    """
    if isinstance(image, (list, tuple)):
        kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
        if not image or not any(all(isinstance(one, kind) for one in image) for kind in kinds):
            raise ValueError("image: expected a list of images of one kind, PIL, numpy or torch")
        batches = [read_images(one, channels, any_range) for one in image]
        if len({batch.shape[1:] for batch in batches}) > 1:
            raise ValueError("image: got several sizes or modes; expected one, or a call for each")
        return torch.cat(batches)
    batch = _as_tensor(image, channels)
    if batch.ndim != 4 or batch.numel() == 0 or not batch.is_floating_point():
        raise ValueError(f"image: got {batch.dtype} {list(batch.shape)}; expected float [B, C, H, W] in [0, 1]")
    if channels is not None and batch.shape[1] != channels:
        raise ValueError(f"image has {batch.shape[1]} channels: expected {channels}")
    lowest, highest = batch.amin().item(), batch.amax().item()
    if not math.isfinite(lowest + highest):
        raise ValueError("image has values that are not finite: expected numbers in [0, 1]")
    if not any_range and not (-1e-6 <= lowest and highest <= 1 + 1e-6):
        raise ValueError(f"image has values from {lowest:.3g} to {highest:.3g}: expected [0, 1]")
    return batch


def _as_tensor(image: PIL.Image.Image | np.ndarray | torch.Tensor, channels: int | None) -> torch.Tensor:
    """[B, C, H, W] of one image, or of a batch that is one array already."""
    if isinstance(image, PIL.Image.Image):
        modes = [mode for count, mode in PIL_MODES.items() if channels in (None, count)]
        if image.mode not in modes:
            expected = f"{' or '.join(modes)}; see `Image.convert`" if modes else f"a tensor, for {channels} channels"
            raise ValueError(f"image is in mode {image.mode}: expected {expected}")
        image = np.array(image, dtype=np.float32) / 255
        image = image[..., None] if image.ndim == 2 else image
    if isinstance(image, np.ndarray):
        if image.ndim not in (3, 4) or image.dtype.kind != "f":
            raise ValueError(f"image: got {image.dtype} {list(image.shape)}; expected float [B, H, W, C] in [0, 1]")
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"image of type {type(image).__name__}: expected PIL, numpy or torch, or a list of them")
    return image[None] if image.ndim == 3 else image


# pyrdiff.parts.jumps: The times that a distilled network is called at: `jumps` of its config.

def check_jumps(jumps: Sequence[int] | None) -> None:
    """Refuses what is neither None nor descending times from 0 up."""
    if jumps is None:
        return
    times = list(jumps) if isinstance(jumps, (list, tuple)) else []
    whole = all(is_whole(time) and time >= 0 for time in times)
    if not times or not whole or times != sorted(set(times), reverse=True):
        raise ValueError(f"jumps={jumps!r}: expected None or descending whole numbers, the times of network calls")


def check_calls(config: Mapping, times: Sequence[float], plans: Iterable[str], where: str = "") -> None:
    """
    Refuses calls of a distilled network at times that it was not trained for.

    Args:
        config: Of the network. One without `jumps` is called at any time.
        times: Of the calls.
        plans: Names of the plans that there are.
        where: What the calls are of, such as "the level 64x64", for the message.

    Raises:
        ValueError: naming the calls, the network's times and the plans.
    """
    jumps = config.get("jumps")
    if jumps is None or all(time in jumps for time in times):
        return
    shown = f"{len(times)} calls" if len(times) > 4 else f"calls at {[round(float(time)) for time in times]}"
    names = " or ".join(map(repr, sorted(plans))) or "calls at those times"
    raise ValueError(
        f"jumps={list(jumps)}: {where or 'this run'} would take {shown}; this network is distilled to jump from these "
        f"times, expected plan={names}"
    )


# pyrdiff.parts.noise: White noise by one generator, or by one an image.

def white_noise(
    shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """
    Standard normal numbers [B, ...], drawn on the generator's device.

    Raises:
        ValueError: for generators that are none, or another number than one, or one for each of B.
    """
    check_generators(generator)
    if isinstance(generator, list) and len(generator) not in (1, shape[0]):
        raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {shape[0]}")
    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)


# pyrdiff.parts.operators: How a small image came from a large one: linear operators, their adjoints, and the corrections that invert them.

operators_logger = logging.get_logger(__name__)


class Block(NamedTuple):
    """Rows of a matrix as far as they are not 0: weights [rows, stop - start] in the columns from `start` to `stop`."""

    weights: torch.Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class BandedMatrix:
    """A matrix with numbers other than 0 near its diagonal only, as blocks of rows from top to bottom."""

    blocks: tuple[Block, ...]
    width: int

    def to(self, like: torch.Tensor) -> "BandedMatrix":
        """On a tensor's device and in its type."""
        return BandedMatrix(tuple(block._replace(weights=block.weights.to(like)) for block in self.blocks), self.width)

    def times(self, image: torch.Tensor) -> torch.Tensor:
        """The product with each column of [..., H, W]: [..., h, W]."""
        return torch.cat([block.weights @ image[..., block.start : block.stop, :] for block in self.blocks], -2)

    def transposed_times(self, image: torch.Tensor) -> torch.Tensor:
        """The product of the transposed matrix with each column of [..., h, W]: [..., H, W]."""
        made, row = image.new_zeros(*image.shape[:-2], self.width, image.shape[-1]), 0
        for block in self.blocks:
            count = len(block.weights)
            made[..., block.start : block.stop, :] += block.weights.mT @ image[..., row : row + count, :]
            row += count
        return made

    def is_identity(self) -> bool:
        """True if it changes nothing."""
        row = 0
        for weights, start, stop in self.blocks:
            one = torch.arange(row, row + len(weights))[:, None] == torch.arange(start, stop)
            if not bool((weights - one.to(weights)).abs().max() < 1e-9):
                return False
            row += len(weights)
        return row == self.width


@dataclass(frozen=True)
class Resampling:
    """
    Makes a side of `large` pixels one of `small`, by a kernel that is widened by large / small: f(x in small pixels,
    half the width of a large pixel). Over the border it is cut off, or sees the image mirrored.
    """

    large: int
    small: int
    kernel: Callable
    mirrored: bool = False

    ROWS = 256  # of a block
    # Of the Gram matrix, rows on both sides of a block that its inverse is computed with. Inverses fall by a factor of
    # ten or more in 2 rows at x1.05 and above, in 12 at x1.0025.
    MARGIN = 128

    def rows(self, first: int, last: int) -> Block:
        """The rows from `first` to `last` of the matrix [small, large], float64, each summing to 1."""
        scale = self.large / self.small
        margin = math.ceil(4 * scale)
        lowest, highest = (-margin, self.large + margin) if self.mirrored else (0, self.large)
        lowest, highest = (
            max(lowest, math.floor(first * scale) - margin),
            min(highest, math.ceil(last * scale) + margin),
        )
        taps = torch.arange(lowest, highest)
        centres = (torch.arange(first, last, dtype=torch.float64) + 0.5) * scale
        weights = self.kernel((taps.double() + 0.5 - centres[:, None]) / scale, 0.5 / scale)
        place = taps % (2 * self.large)
        place = torch.where(place < self.large, place, 2 * self.large - 1 - place)
        start, stop = int(place.min()), int(place.max()) + 1
        folded = torch.zeros(last - first, stop - start, dtype=torch.float64).index_add_(1, place - start, weights)
        return Block(folded / folded.sum(1, keepdim=True), start, stop)

    def matrix(self) -> BandedMatrix:
        """The matrix [small, large]."""
        ends = ((first, min(first + self.ROWS, self.small)) for first in range(0, self.small, self.ROWS))
        return BandedMatrix(tuple(self.rows(first, last) for first, last in ends), self.large)

    def gram_inverse(self) -> BandedMatrix:
        """(A A^T)^-1 of the matrix A, [small, small]: block by block, since it falls quickly beside the diagonal."""
        blocks = []
        for first in range(0, self.small, self.ROWS):
            last = min(first + self.ROWS, self.small)
            start, stop = max(first - self.MARGIN, 0), min(last + self.MARGIN, self.small)
            near = self.rows(start, stop).weights
            blocks.append(Block(torch.linalg.inv(near @ near.mT)[first - start : last - start], start, stop))
        return BandedMatrix(tuple(blocks), self.small)


class SeparableOperator:
    """
    A linear operator on images: one matrix over the rows, one over the columns, one over the channels. The memory that
    it needs grows with the sides of the image, not with their squares.

    Args:
        rows: How the height becomes smaller.
        columns: How the width does.
        channels: float64 [c, C], or `None` to keep the channels as they are.
    """

    NAMES = ("bicubic", "bicubic_matlab", "area", "lanczos", "gaussian", "gray")

    def __init__(self, rows: Resampling, columns: Resampling, channels: torch.Tensor | None = None):
        self.large = (rows.large, columns.large)
        self.matrices = [rows.matrix(), columns.matrix()]
        self.inverses = [rows.gram_inverse(), columns.gram_inverse()]
        self.channels = channels
        self.on: dict[tuple, list[BandedMatrix]] = {}

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
        sides = [Resampling(a, b, kernel, mirrored) for a, b in zip(large, small, strict=True)]
        luma = torch.tensor([[0.299, 0.587, 0.114]] if channels == 3 else [[1.0 / channels] * channels])
        return cls(*sides, luma.double() if name == "gray" else None)

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
        return self.channels is None and all(matrix.is_identity() for matrix in self.matrices)

    def _at(self, like: torch.Tensor) -> list[BandedMatrix]:
        """Both matrices, and both inverses, on a tensor's device and in its type."""
        key = (like.device, like.dtype)
        if key not in self.on:
            self.on[key] = [matrix.to(like) for matrix in (*self.matrices, *self.inverses)]
        return self.on[key]

    def _mixed(self, image: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        return torch.einsum("cd,bdhw->bchw", channels.to(image), image)

    def A(self, image: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, c, h, w]."""
        rows, columns, *_ = self._at(image)
        image = image if self.channels is None else self._mixed(image, self.channels)
        return rows.times(columns.times(image.mT).mT)

    def adjoint(self, measurement: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """A^T: [B, c, h, w] to [B, C, H, W]."""
        rows, columns, *_ = self._at(measurement)
        image = rows.transposed_times(columns.transposed_times(measurement.mT).mT)
        return image if self.channels is None else self._mixed(image, self.channels.mT)

    def correction(self, residual: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
        """A^T (A A^T + ridge)^-1 of [B, c, h, w]; without a ridge the pseudo-inverse."""
        if ridge:
            return self.adjoint(conjugate_gradients(lambda y: self.A(self.adjoint(y)) + ridge * y, residual, 1e-7))
        *_, rows, columns = self._at(residual)
        solved = rows.times(columns.times(residual.mT).mT)
        if self.channels is not None:
            solved = self._mixed(solved, torch.linalg.inv(self.channels @ self.channels.mT))
        return self.adjoint(solved)


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

    TOLERANCE = 1e-6

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
        return self.adjoint(
            conjugate_gradients(lambda y: self.function(self.adjoint(y)) + ridge * y, residual, self.TOLERANCE)
        )


def conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, tolerance: float, iterations: int = 200
) -> torch.Tensor:
    """
    The solution x [B, c, h, w] of apply(x) = target, each image for itself; `apply` is symmetric and positive. What it
    cannot reach must not be chased: an image is done when its residual is small, when the residual no longer falls, or
    when the direction is one that `apply` hardly changes.
    """
    axes, tiny = tuple(range(1, target.ndim)), torch.finfo(target.dtype).tiny

    def dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one * other).sum(axes, keepdim=True)

    solution, residual, direction = torch.zeros_like(target), target, target
    energy = dot(residual, residual)
    enough, strongest, active = tolerance**2 * energy, torch.zeros_like(energy), energy > 0
    for _ in range(iterations):
        image = apply(direction)
        curvature, length = dot(direction, image), dot(direction, direction)
        strongest = torch.maximum(strongest, curvature / length.clamp(min=tiny))
        active = active & (curvature > 1e-5 * strongest * length)
        step = energy / curvature.clamp(min=tiny)
        next_residual = residual - step * image
        next_energy = dot(next_residual, next_residual)
        active = active & (next_energy < energy)
        solution = torch.where(active, solution + step * direction, solution)
        residual = torch.where(active, next_residual, residual)
        direction = residual + next_energy / energy.clamp(min=tiny) * direction
        energy = torch.where(active, next_energy, energy)
        active = active & (energy > enough)
        if not bool(active.any()):
            break
    return solution


Operator = SeparableOperator | MaskOperator | CallableOperator


@dataclass(frozen=True)
class Sides:
    """What an operator must fit: images [C, H, W] and measurements [c, h, w], on a device."""

    image: tuple[int, int, int]
    measurement: tuple[int, int, int]
    device: torch.device


def build_operator(
    operator: str | Callable | object, mask: torch.Tensor | None, sides: Sides, linear: bool
) -> Operator:
    """
    The operator of an argument `operator`, and after it the `mask`.

    Args:
        operator: A name of `SeparableOperator.NAMES`, an object with `A` (and `A_dagger`), or a function of images.
        mask: [h, w] of zeros and ones, or `None`.
        sides: What it must fit.
        linear: Whether it will be inverted.

    Raises:
        ValueError: for an operator or a mask that does not fit.
    """
    _, *size = sides.image
    _, *small = sides.measurement
    if isinstance(operator, str):
        if operator not in SeparableOperator.NAMES:
            raise ValueError(f"operator={operator!r}: expected one of {SeparableOperator.NAMES}, or a function")
        built = SeparableOperator.named(operator, tuple(size), tuple(small), sides.image[0])
    elif hasattr(operator, "A") and callable(operator.A):
        built = CallableOperator(operator.A, sides.image, getattr(operator, "A_dagger", None))
    elif callable(operator):
        built = CallableOperator(operator, sides.image)
    else:
        raise ValueError(f"operator={operator!r}: expected a name, a function, or an object with `A`")
    if isinstance(built, CallableOperator):
        _check_callable(built, sides, linear)
    if mask is None:
        return built
    _check_mask(mask, tuple(small))
    if isinstance(built, SeparableOperator) and built.is_identity():
        return MaskOperator(mask)
    return CallableOperator(lambda image: built.A(image) * mask.to(image), sides.image)


def _check_callable(operator: CallableOperator, sides: Sides, linear: bool) -> None:
    height, width = sides.image[1:]
    try:
        made = tuple(operator.A(torch.zeros(1, *sides.image, device=sides.device)).shape[1:])
    except Exception as error:  # the user's code: whatever it raises says that the image does not fit
        raise ValueError(f"operator does not take an image of {height}x{width}: {error}") from error
    if made != sides.measurement:
        raise ValueError(
            f"operator makes {list(made)} of an image [C, H, W] = {list(sides.image)}: expected "
            f"{list(sides.measurement)}, as the input (`resolutions` sets the levels)"
        )
    if linear and not operator.is_linear(sides.device):
        raise ValueError(
            "operator is not linear: expected one, or guidance='paper' without mask and hard_consistency, and an input "
            "with the network's channels"
        )
    if operator.dagger is not None:
        operator.check_dagger(sides.device)


def _check_mask(mask: torch.Tensor, size: tuple[int, int]) -> None:
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"mask of type {type(mask).__name__}: expected a tensor {list(size)} of zeros and ones")
    if tuple(mask.shape) != size or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
        raise ValueError(f"mask of shape {list(mask.shape)}: expected zeros and ones of {list(size)}, as the input")


def project_onto(images: torch.Tensor, measured: torch.Tensor, operator: Operator) -> torch.Tensor:
    """
    Images that the operator turns into the measurement up to rounding, as far as images in [-1, 1] can: projections
    onto those and these in turn. Warns of what is left.

    Args:
        images: [B, C, H, W] in [-1, 1] or a little beyond.
        measured: [B, c, h, w] in [0, 1]; the operator is of images in [0, 1].

    Returns:
        [B, C, H, W] in [-1, 1].
    """
    for _ in range(100):
        images = images.clamp(-1, 1)
        residual = measured - operator.A(images / 2 + 0.5)
        if bool(residual.abs().max() < 0.25 / 255):
            break
        images = images + 2 * operator.correction(residual)
    else:
        operators_logger.warning(
            f"hard_consistency: {255 * residual.abs().max().item():.1f}/255 is left; see `consistency`"
        )
    return images.clamp(-1, 1)


# pyrdiff.parts.plans: Named plans: the arguments of a call that a pipeline keeps in its config, and the schedulers that they run with.

NOISE_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
ALWAYS = {"stage_jump": "white"}  # plans in older folders may say what is no longer a choice


@dataclass(frozen=True)
class NamedPlan:
    """Arguments of a call; by "scheduler" or "refine_scheduler", the [class, settings] to run it with, or `None`."""

    arguments: dict = field(default_factory=dict)
    schedulers: dict = field(default_factory=dict)


def read_plan(
    plan: str | dict, plans: dict | None, arguments: tuple[str, ...], schedulers: tuple[str, ...]
) -> NamedPlan:
    """
    A plan by its name or as a dict, taken apart.

    Args:
        plan: What the user gave.
        plans: Those of the pipeline's config.
        arguments, schedulers: What a plan may set.

    Raises:
        ValueError: for an unknown name, or a plan that sets anything else.
    """
    if isinstance(plan, str):
        known = plans or {}
        if plan not in known:
            near = did_you_mean(plan, known)
            raise ValueError(f"plan={plan!r}: expected one of {sorted(known)}, or a dict of arguments{near}")
        plan = known[plan]
    if not isinstance(plan, dict):
        raise ValueError(f"plan={plan!r}: expected a name or a dict of arguments")
    plan = {name: value for name, value in plan.items() if (name, value) not in ALWAYS.items()}
    for name in plan:
        if name not in (*arguments, *schedulers):
            raise ValueError(f"plan has {name!r}: expected {arguments}, {', '.join(schedulers)}")
    return NamedPlan(
        {name: value for name, value in plan.items() if name in arguments},
        {name: value for name, value in plan.items() if name in schedulers},
    )


def given(arguments: NamedTuple) -> dict:
    """Those arguments of a call that are not their defaults."""
    defaults = arguments._field_defaults

    def left_out(name: str, value) -> bool:
        return value is defaults[name] or ((isinstance(value, str) or is_number(value)) and value == defaults[name])

    return {name: value for name, value in arguments._asdict().items() if not left_out(name, value)}


def check_not_beside_plan(plan: str | dict, arguments: NamedTuple, but: tuple[str, ...] = ()) -> None:
    """Refuses arguments that are given beside a plan, but those that may be."""
    for name, value in given(arguments).items():
        if name not in but:
            raise ValueError(f"plan={plan!r} with {name}={value!r}: expected one or the other")


def plan_scheduler(
    name: str, entry: object, process: SchedulerMixin, kept: tuple[str, ...] = (), fixed: dict | None = None
) -> SchedulerMixin:
    """
    A scheduler of diffusers over the same noise process; all else is its own default, or as set.

    Args:
        name: Of the plan's entry, for messages.
        entry: [class of diffusers, {setting: value}].
        process: The scheduler that the network was trained with.
        kept: Further settings that are taken over from it.
        fixed: Settings that a plan may not change.

    Raises:
        ValueError: for a class or a setting that it cannot take.
    """
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)):
        raise ValueError(f"{name} of the plan is {entry!r}: expected [class of diffusers, {{setting: value}}]")
    kind, settings, fixed = getattr(diffusers, str(entry[0]), None), entry[1], fixed or {}
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{name} of the plan is {entry[0]!r}: expected a scheduler of diffusers")
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    for setting in settings:
        if setting not in known - {*NOISE_PROCESS, *fixed}:
            raise ValueError(f"{name} of the plan sets {setting!r}: expected settings of {entry[0]}'s steps")
    taken = {key: process.config[key] for key in (*NOISE_PROCESS, *kept) if key in process.config}
    options = {key: value for key, value in {**taken, **fixed}.items() if key in known}
    try:
        scheduler = kind(**{**options, **settings})
    except Exception as error:  # whatever a constructor of diffusers makes of strange values
        raise ValueError(f"{name} of the plan: {entry[0]} does not take {settings}: {error}") from error
    check_scheduler(name, scheduler)
    return scheduler


# pyrdiff.parts.labels: The classes of a call: as its user names them, as numbers for the network, and as often as in training.

Classes = str | int | None | Sequence[str | int | None]
NAMED_CLASSES = 12  # in a message
GOLDEN = 0.6180339887498949  # multiples of it, taken modulo 1, are spread evenly however many there are


def count_images(batch_size: int | None, classes: Classes) -> int:
    """How many images a call makes: `batch_size`, or one for each of several classes, or one."""
    if batch_size is None:
        batch_size = len(classes) if isinstance(classes, (list, tuple)) and classes else 1
    check_count("batch_size", batch_size)
    return batch_size


def label_numbers(classes: Classes, count: int, config: Mapping) -> list[int] | None:
    """
    What the network is told of each image's class.

    Args:
        classes: Names or numbers: one for all images, or a list with one for each. `None` stands for no class.
        count: Number of images.
        config: Of the network. If it has `class_names`, its last label stands for no class.

    Returns:
        A label for each image, or `None` for a network without classes.

    Raises:
        ValueError: for a class that the network does not know, or for as many as there are no images.
    """
    wanted = list(classes) if isinstance(classes, (list, tuple)) else [classes]
    if len(wanted) not in (1, count):
        raise ValueError(f"classes={classes!r}: expected one, or one for each of {count} images")
    if not config.get("num_class_embeds"):
        if any(value is not None for value in wanted):
            raise ValueError(f"classes={classes!r}: expected None, since this network knows no classes")
        return None
    labels = [_label_number(value, config) for value in wanted]
    return labels * count if len(labels) == 1 else labels


def spread_classes(config: Mapping, colors: Mapping | None, numbers: Sequence[int]) -> list[str] | None:
    """
    Classes of images that together stand for the training images: each as often as there.

    Args:
        config: Of the network.
        colors: Of the pipeline; "share" in its "classes" says how often each is. Without, all are as often.
        numbers: Of the images, 0 or more. An image of a number has the same class whatever the others are.

    Returns:
        A class for each image, or `None` for a network without classes.
    """
    total, names = config.get("num_class_embeds"), config.get("class_names")
    if not total:
        return None
    names = [str(number) for number in range(total)] if names is None else list(names)
    shares = np.array([each.get("share", 0.0) for each in (colors or {}).get("classes") or []])
    if len(shares) != len(names) or shares.sum() <= 0:
        shares = np.ones(len(names))
    places = (np.asarray(numbers, dtype=np.float64) + 0.5) * GOLDEN % 1
    found = np.searchsorted(np.cumsum(shares) / shares.sum(), places, side="right")
    return [names[min(index, len(names) - 1)] for index in found]


def _label_number(value: str | int | None, config: Mapping) -> int:
    """A class by its name or number. Where the names are numbers, a number is a name."""
    named, total = config.get("class_names"), config["num_class_embeds"]
    names = [str(number) for number in range(total)] if named is None else list(named)
    if value is None and named is not None:
        return len(names)
    if isinstance(value, str) and value in names:
        return names.index(value)
    if is_whole(value) and str(value) in names:
        return names.index(str(value))
    only_numbers = all(name.removeprefix("-").isdecimal() for name in names)
    place = int(value) if is_whole(value) or (isinstance(value, str) and value.isdecimal()) else -1
    if not only_numbers and 0 <= place < len(names):
        return place
    known = names if len(names) <= NAMED_CLASSES else [*names[:NAMED_CLASSES], f"{len(names) - NAMED_CLASSES} others"]
    more = "" if only_numbers else f", or a number from 0 to {len(names) - 1}"
    none = " for each image" if value is None else ""
    raise ValueError(f"classes={value!r}: expected one of {', '.join(known)}{more}{none}")


# pyrdiff.parts.sources: The code of a class, kept from the moment that the class is made.

STANDS_ALONE = "# Written by pyrdiff; stands alone."  # in the first two lines of a file that was joined
OWN_IMPORT = re.compile(r"^from\s+([\w.]+)\s+import", re.MULTILINE)
# By these patterns diffusers looks for files that it would have to bring along, in strings and comments too.
RELATIVE_IMPORT = re.compile(r"^\s*(import\s+\.\S+\s*$|from\s+\.\S+\s+import)", re.MULTILINE)
MODULES: dict[tuple[str, str, str], str] = {}  # (package, stem, class): the module that defines the class


class SourceFile(NamedTuple):
    """A file, and its text as it was when it was read."""

    path: str
    text: str


class Source(NamedTuple):
    """The module of a class; {module: file} of it and of those of its own package, or pyrdiff's, that it imports."""

    module: str
    files: dict[str, SourceFile]

    @property
    def stem(self) -> str:
        return self.module.rpartition(".")[2]


class KeepsSource:
    """
    Put in front of `ModelMixin` or `SchedulerMixin`, so that a saved folder carries the code of the class as it was
    when the class was made. Later the file may be another: diffusers writes the code of every folder that it loads to
    the same place, and a package may be updated while a training runs.

    Set `RETIRED` to names of settings that earlier versions saved and this one no longer takes: they are passed over.
    """

    RETIRED: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        keep_source(cls)
        package, stem = cls.__module__.split(".")[0], cls.__module__.rpartition(".")[2]
        MODULES[package, stem, cls.__name__] = cls.__module__

    def register_to_config(self, **settings) -> None:
        """As stock, with numbers of numpy as those of Python, which a config is saved with."""
        super().register_to_config(**{name: _without_numpy(value) for name, value in settings.items()})

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As stock; `auto_map` in a saved config is for diffusers' `AutoModel` and says nothing to the class."""
        passed_over = ("auto_map", *cls.RETIRED)
        config_dict = {name: value for name, value in config_dict.items() if name not in passed_over}
        return super().extract_init_dict(config_dict, **kwargs)


def _without_numpy(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_numpy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def keep_source(cls: type) -> None:
    """Keeps the code of a class with it, if that was not done before and there is a file."""
    if "_kept_source" not in vars(cls):
        cls._kept_source = _read_source(cls.__module__)


def _read_source(module: str) -> Source | None:
    files, waiting = {}, [module]
    own_packages = {module.split(".")[0], "pyrdiff"}
    while waiting:
        name = waiting.pop()
        path = getattr(sys.modules.get(name), "__file__", None)
        if name in files or path is None or not path.endswith(".py") or not Path(path).is_file():
            continue
        text = Path(path).read_text(encoding="utf-8")
        files[name] = SourceFile(path, text)
        if STANDS_ALONE not in text.split("\n")[:2]:
            waiting += [other for other in OWN_IMPORT.findall(text) if other.split(".")[0] in own_packages]
    return Source(module, files) if module in files else None


def source_of(cls: type) -> Source:
    """
    The kept code of a class.

    Raises:
        ValueError: if the class is of a script or of an interactive session. A folder would carry the whole script,
            with whatever else is in it.
    """
    keep_source(cls)
    if cls.__module__ == "__main__" or cls._kept_source is None:
        raise ValueError(
            f"{cls.__name__} is defined in {cls.__module__}, expected a class of a module with a file of its own: "
            "a saved folder carries that file"
        )
    return cls._kept_source


def standalone_text(cls: type) -> str:
    """
    The text of a file that has the class and all that it needs of its own package and of pyrdiff.

    Raises:
        ValueError: if there is no such file, or it cannot be joined with what it imports.
    """
    source = source_of(cls)
    path, text = source.files[source.module]
    if len(source.files) > 1:
        # Not an import statement: the exporter would follow it, and the joined files, which never come here, are used
        # where pyrdiff is not installed. A class comes here only if it imports modules of pyrdiff or of its package.
        text = importlib.import_module("pyrdiff.hub.standalone").join(source)
    relative = RELATIVE_IMPORT.search(text)
    if relative:
        raise ValueError(f"{path}: {relative[0].strip()!r}: expected no line that looks like a relative import")
    return text


def auto_map(cls: type) -> dict[str, str]:
    """What diffusers' `AutoModel` reads in a network's config to find its class in the folder."""
    return {"AutoModel": f"{source_of(cls).stem}.{cls.__name__}"}


# pyrdiff.parts.weights: Weights that are numbers: what a run that diverged leaves is neither saved nor loaded.

LARGEST_WEIGHT = 1e18  # its square still fits into float32; weights that were trained are far below


def unusable(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with values that are not finite, or of a size that no training ends with."""
    return sorted(name for name, value in tensors.items() if not _is_usable(value))


def _is_usable(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.is_meta or value.numel() == 0:
        return True
    return bool(value.detach().float().abs().amax() <= LARGEST_WEIGHT)  # NaN is not


def refuse_unusable(networks: Iterable[tuple[str, object]], what: str) -> None:
    """
    Refuses networks whose weights are not numbers to go on with.

    Args:
        networks: (name, component); those that are no networks are passed over.
        what: What does not take place, for the message.

    Raises:
        ValueError: the network and the tensor are named.
    """
    for name, network in networks:
        bad = unusable(network.state_dict()) if isinstance(network, torch.nn.Module) else []
        if bad:
            raise ValueError(
                f"{name}: {bad[0]} has values that are not finite or above {LARGEST_WEIGHT:g}; expected those of a "
                f"training that did not diverge. {what}"
            )


# pyrdiff.parts.steps: The steps of one level: a scheduler, respaced to run only the last part of its noise process.

Spacing = str | Sequence[int]  # "scheduler", "log_snr", or descending times


@dataclass(frozen=True)
class LevelSteps:
    """
    A scheduler of its own that is ready for the steps of one level, and the time of every network call.

    Args:
        scheduler: A copy, so that laying out steps changes nothing of the pipeline.
        timesteps: [calls], descending, on the CPU: schedulers read their times as numbers, which would wait for a GPU.
    """

    scheduler: SchedulerMixin
    timesteps: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def times(self) -> list[float]:
        return [float(time) for time in self.timesteps]

    def on(self, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The time of every call twice: on the CPU for the scheduler, and beside the sample for the network."""
        return zip(self.timesteps, self.timesteps.to(device, non_blocking=True), strict=True)

    def renoise(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The images [B, C, H, W] noised up to the first time (paper P, eq. 2)."""
        time = self.timesteps[:1].to(images.device, non_blocking=True)
        # By a copy: schedulers move their tables to the images for good, and the steps would read them from a GPU.
        return copy.copy(self.scheduler).add_noise(images, noise, time.expand(len(images)))

    def step(
        self,
        output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: Generators,
        eta: float | None = None,
    ) -> torch.Tensor:
        """The next sample [B, C, H, W]."""
        options = {} if eta is None else {"eta": eta}
        if takes(self.scheduler.step, "generator"):
            options["generator"] = generator
        return self.scheduler.step(output, timestep, sample, **options, return_dict=False)[0]


def takes(function, argument: str) -> bool:
    """Whether a function has this argument."""
    return argument in inspect.signature(function).parameters


def lay_out_steps(
    scheduler: SchedulerMixin, calls: int, strength: float, spacing: Spacing, calls_name: str
) -> LevelSteps:
    """
    The steps from `strength` of the noise process down to no noise.

    Args:
        scheduler: Is copied, not changed.
        calls: Network calls. A second-order scheduler calls the network twice a step but for the last, so it makes an
            odd number.
        strength: Share in (0, 1] of the noise process.
        spacing: "scheduler": as the scheduler places its last steps; "log_snr": evenly in log-SNR; or the times.
        calls_name: What the argument `calls` is called where the user gave it.

    Raises:
        ValueError: for steps that the scheduler cannot make.
    """
    scheduler = plainly_clipping(copy.deepcopy(scheduler))
    train_steps = scheduler.config.num_train_timesteps
    steps = (calls + 1) // 2 if scheduler.order == 2 else calls
    if isinstance(spacing, str) and steps > strength * train_steps:
        raise ValueError(
            f"{calls_name}={calls}: expected at most {int(strength * train_steps)}, the training steps up to the noise "
            f"that the level starts from (strength {strength})"
        )
    if spacing == "scheduler":
        begin = _respace(scheduler, steps, strength)
    else:
        begin = 0
        _place(scheduler, _times(scheduler, steps, strength, spacing))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return LevelSteps(scheduler, scheduler.timesteps[begin:])


def plainly_clipping(scheduler: SchedulerMixin) -> SchedulerMixin:
    """
    The scheduler, told how to clip its clean estimate to [-1, 1] if it has `thresholding` with `sample_max_value=1`.

    Diffusers looks for a quantile and clamps it between 1 and `sample_max_value`. Where both are 1 the result is the
    same to the last bit without sorting all values of an image, which at 256x256 takes ten times as long as the rest.
    """
    if scheduler.config.get("thresholding") and scheduler.config.get("sample_max_value") == 1:
        scheduler._threshold_sample = clipped_to_one
    return scheduler


def clipped_to_one(sample: torch.Tensor) -> torch.Tensor:
    """A clean estimate of any shape, kept in [-1, 1]."""
    return sample.clamp(-1, 1)


def _respace(scheduler: SchedulerMixin, steps: int, strength: float) -> int:
    """Gives the scheduler the fewest steps whose last `steps` begin within the strength; returns where they begin."""
    limit, order = strength * scheduler.config.num_train_timesteps, scheduler.order

    def starts_within(total: int) -> bool:
        try:
            scheduler.set_timesteps(total)
        except ValueError as error:
            raise ValueError(f"{type(scheduler).__name__} does not take {total} steps: {error}") from error
        return float(scheduler.timesteps[order * (total - steps)]) <= limit

    totals = range(steps, scheduler.config.num_train_timesteps)
    total = steps + bisect_left(totals, True, key=starts_within)
    scheduler.set_timesteps(total)
    begin = order * (total - steps)
    if len(scheduler.timesteps[begin:]) != order * (steps - 1) + 1:
        raise ValueError(
            f"{type(scheduler).__name__} does not take as many steps as it is asked for: expected another, such as "
            "DPMSolverMultistepScheduler"
        )
    return begin


def _times(scheduler: SchedulerMixin, steps: int, strength: float, spacing: Spacing) -> list[int]:
    if spacing == "log_snr":
        return log_snr_times(scheduler.alphas_cumprod, steps, strength)
    if isinstance(spacing, str):
        raise ValueError(f"spacing={spacing!r}: expected 'scheduler', 'log_snr' or one list of times a level")
    times, last = list(spacing), scheduler.config.num_train_timesteps - 1
    if not times or times != sorted(set(times), reverse=True) or times[0] > last or times[-1] < 0:
        raise ValueError(f"spacing={times}: expected descending times from {last} to 0")
    return times


def _place(scheduler: SchedulerMixin, times: list[int]) -> None:
    if not takes(scheduler.set_timesteps, "timesteps"):
        raise ValueError(
            f"spacing: {type(scheduler).__name__} places its steps itself; expected 'scheduler', or a scheduler whose "
            "`set_timesteps` takes `timesteps`, such as DPMSolverMultistepScheduler"
        )
    scheduler.set_timesteps(timesteps=times)


def log_snr_times(alphas_cumprod: torch.Tensor, steps: int, strength: float) -> list[int]:
    """`steps` training times, descending to 0, as evenly spaced in log(alpha_bar / (1 - alpha_bar)) as can be."""
    alphas_cumprod = alphas_cumprod.cpu().double().clamp(1e-8, 1 - 1e-8).numpy()
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
    start = max(round(strength * len(log_snr)), steps) - 1
    wanted = np.linspace(log_snr[start], log_snr[0], steps)
    times = [int(np.abs(log_snr - value).argmin()) for value in wanted]
    for index in range(1, steps):
        times[index] = min(times[index], times[index - 1] - 1)
    return [max(time, steps - 1 - index) for index, time in enumerate(times)]


def check_start_above_zero(steps: LevelSteps, name: str, calls: int) -> None:
    """A level must start at some noise: its first step would otherwise do nothing."""
    if steps.times[0] == 0:
        raise ValueError(
            f"{name}={calls}: {type(steps.scheduler).__name__} would start at time 0, where there is no noise; "
            "expected 2 or more, or timestep_spacing='trailing' in its config"
        )


# pyrdiff.parts.wrappers: The network inside what is wrapped around it: a compiled module, adapters of PEFT, parallel training.

def plain(module: torch.nn.Module) -> torch.nn.Module:
    """The network inside its wrappers: the outermost `ModelMixin` in the module, or else the module itself."""
    return next((inner for inner in module.modules() if isinstance(inner, ModelMixin)), module)


def network_takes(module: torch.nn.Module, argument: str) -> bool:
    """
    Whether the network inside the wrappers has this argument of `forward`. Its class says so: a wrapper takes whatever
    it is given and passes it on.
    """
    return takes(type(plain(module)).forward, argument)


# pyrdiff.parts.saving: Saving a pipeline together with its code, so that diffusers alone can load it.

class StandaloneSaving(KeepsSource):
    """
    Put in front of `DiffusionPipeline`: saved folders carry the code of the pipeline and of its components, and
    `from_pretrained` of an installed class needs none of it.
    """

    def register_modules(self, **components):
        """As stock; also reads the code of components that keep none themselves, before its file is replaced."""
        super().register_modules(**components)
        for cls in self._classes_with_code(components).values():
            keep_source(cls)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """
        Saves a folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads wherever diffusers
        is installed. It is the stock folder, with a source file for this class and for each component that is not part
        of diffusers, and with an index and configs that name these files. The arguments are those of
        `DiffusionPipeline`.

        Raises:
            ValueError: if a class is of a script or an interactive session, if a network is inside adapters or what
                distributes it, or if its weights are not finite; nothing was written then.
        """
        check_bare(self.components)
        refuse_unusable(self.components.items(), "Nothing was saved.")
        classes = self._classes_with_code(self.components)
        texts = {name: standalone_text(cls) for name, cls in classes.items()}  # raises before anything is written
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        for name, cls in classes.items():
            (folder / name / f"{source_of(cls).stem}.py").write_text(texts[name], encoding="utf-8", newline="\n")
        self._name_code(folder, classes)
        if push_to_hub:
            private, token = hub_arguments.pop("private", None), hub_arguments.get("token")
            repo_id = hub_arguments.pop("repo_id", folder.name)
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
            self._upload_folder(folder, repo_id, **hub_arguments)

    def _classes_with_code(self, components: dict[str, object]) -> dict[str, type]:
        """The classes that are not of diffusers by the folder that they are saved in, "" for the pipeline's own."""
        classes = {"": type(self)}
        for name, component in components.items():
            if component is not None:
                classes[name] = type(plain(component) if isinstance(component, torch.nn.Module) else component)
        stock = ("diffusers", "transformers")
        return {name: cls for name, cls in classes.items() if cls.__module__.split(".")[0] not in stock}

    def _name_code(self, folder: Path, classes: dict[str, type]) -> None:
        """Writes the names of the source files to index and configs, and takes out where the pipeline came from."""
        for path in [folder / self.config_name, *folder.glob("*/*config.json")]:
            config = json.loads(path.read_text(encoding="utf-8"))
            config = {key: value for key, value in config.items() if key not in ("_name_or_path", "_module")}
            if path.name == self.config_name:
                config |= index_entries(type(self), classes)
            elif issubclass(classes.get(path.parent.name, object), torch.nn.Module):
                config["auto_map"] = auto_map(classes[path.parent.name])
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load_config(cls, *args, **kwargs):
        """
        As stock, but an index that names source files of the folder (see `save_pretrained`) is read as naming the
        installed classes of the same names. `from_pretrained` of this class then runs no code from the folder and needs
        no trust flag. Of a folder of another pipeline, only what this one takes is read.
        """
        config = super().load_config(*args, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        stem = cls.__module__.rpartition(".")[2]
        if index.get("_class_name") not in (cls.__name__, [stem, cls.__name__]):
            takes = inspect.signature(cls.__init__).parameters
            for name in [name for name in index if name not in takes and not name.startswith("_")]:
                del index[name]
        for name, value in index.items():
            if isinstance(value, (list, tuple)) and [type(item) for item in value] == [str, str]:
                here, pyrdiff = cls.__module__.split(".")[0], "pyrdiff"
                module = MODULES.get((here, *value)) or MODULES.get((pyrdiff, *value))
                if module is not None:
                    index[name] = value[1] if name == "_class_name" else [module, value[1]]
        return config


def check_bare(components: dict[str, object]) -> None:
    """Refuses networks with anything around them but what compiles: it would be saved in their place."""
    for name, component in components.items():
        inside = getattr(component, "_orig_mod", component)
        if getattr(inside, "peft_config", None) and inside is plain(inside):
            raise ValueError(
                f"{name}: expected it without adapters, to save it; `pyrdiff.hub.merge_adapters(pipeline)` adds them "
                "to its weights, and `unload_lora()` takes them out"
            )
        if isinstance(inside, torch.nn.Module) and inside is not plain(inside):
            raise ValueError(
                f"{name}={type(inside).__name__}: expected the {type(plain(inside)).__name__} inside, to save it; with "
                "adapters of PEFT, `merge_and_unload()` gives it with them"
            )


def index_entries(pipeline_class: type, classes: dict[str, type]) -> dict[str, object]:
    """
    What the index of a folder says of the code in it.

    Args:
        pipeline_class: The pipeline's class.
        classes: The classes that have code in the folder, by component; "" for the pipeline.

    Returns:
        [file, class] of each, and the `auto_map` of the first network: diffusers' `AutoModel` reads that of the index,
        whatever subfolder it is asked for. Other networks it loads from their own folder, by the `auto_map` there.
    """
    entries = {name or "_class_name": [source_of(cls).stem, cls.__name__] for name, cls in classes.items()}
    for name in inspect.signature(pipeline_class.__init__).parameters:
        if issubclass(classes.get(name, object), torch.nn.Module):
            return {**entries, "auto_map": auto_map(classes[name])}
    return entries


# pyrdiff.parts.sampling: What the pipelines share of a call: progress, interruption, callbacks, and the way out of [-1, 1].

Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor
Item = TypeVar("Item")


class SamplingRun:
    """The running call of a pipeline: what happens after each of its steps."""

    def __init__(self, pipeline, progress, callback: Callable | None, tensor_inputs: Sequence[str]):
        self._pipeline, self._progress = pipeline, progress
        self._callback, self._tensor_inputs = callback, tensor_inputs
        self._steps = 0

    def going(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until the run is interrupted."""
        for item in items:
            if self._pipeline.interrupt:
                return
            yield item

    def after_step(self, timestep: torch.Tensor | int, latents: torch.Tensor) -> torch.Tensor:
        """Tells the callback and the progress bar; returns the latents, or those that the callback made of them."""
        if self._callback is not None:
            tensors = {"latents": latents} if "latents" in self._tensor_inputs else {}
            changed = self._callback(self._pipeline, self._steps, timestep, tensors) or {}
            latents = changed.pop("latents", latents)
        self._steps += 1
        self._progress.update()
        return latents


class SamplingPipeline(StandaloneSaving):
    """A base beside `DiffusionPipeline`, before it: `class P(SamplingPipeline, DiffusionPipeline)`."""

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "SamplingPipeline":
        """As stock, which takes over no network of a class that `__init__` does not name: here of every class."""
        accepted = inspect.signature(cls.__init__).parameters
        shared = {name: component for name, component in pipeline.components.items() if name in accepted}
        return super().from_pipe(pipeline, **shared | kwargs)

    @property
    def components(self) -> dict[str, object]:
        """As stock, without those that are left out by default: other pipelines may not know them."""
        defaults = inspect.signature(type(self).__init__).parameters
        named = super().components.items()
        return {name: value for name, value in named if value is not None or defaults[name].default is not None}

    @property
    def num_timesteps(self) -> int:
        """Network calls of the last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @contextmanager
    def _running(self, calls: int, callback: Callable | None, tensor_inputs: Sequence[str]) -> Iterator[SamplingRun]:
        self._interrupt, self._num_timesteps = False, calls
        with self.progress_bar(total=calls) as progress:
            yield SamplingRun(self, progress, callback, tensor_inputs)
        self.maybe_free_model_hooks()

    def _check_request(self, batch_size: int, generator: Generators, output_type: str, names: Sequence[str]) -> None:
        """The arguments that all calls have; `names` is `callback_on_step_end_tensor_inputs`."""
        check_generator(generator, batch_size)
        check_output_type(output_type)
        if not set(names) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={list(names)}: expected a subset of {self._callback_tensor_inputs}"
            )

    @property
    def _channels(self) -> int:
        """Of an image."""
        config = plain(self.unet).config
        return getattr(config, "image_channels", config.in_channels)

    @property
    def _size_multiple(self) -> int:
        """Sides of a network's sample are multiples of this; with pixels in cells, of so many cells."""
        network = plain(self.unet)
        levels = len(getattr(network.config, "block_out_channels", (1,)))
        return getattr(network, "CELL", 1) * 2 ** (levels - 1)

    def _predict(
        self,
        sample: torch.Tensor,
        time: torch.Tensor,
        coordinates: torch.Tensor,
        labels: torch.Tensor | None = None,
        network: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """
        The output [B, C, H, W], float32, of `unet` or another network; it is told where the pixels lie if it wants to
        know, and the labels of the images' classes if there are any: [B], or [B / n] for n windows of each image.
        """
        network = self.unet if network is None else network
        told = {"coordinates": coordinates} if network_takes(network, "coordinates") else {}
        if labels is not None:
            told["class_labels"] = labels.repeat(len(sample) // len(labels))
        return network(sample.to(plain(network).dtype), time, **told, return_dict=False)[0].float()

    def _labels(self, classes: Classes, count: int) -> torch.Tensor | None:
        """What the network is told of the images' classes, int64 [count]; `None` if it knows none."""
        labels = label_numbers(classes, count, plain(self.unet).config)
        return None if labels is None else torch.tensor(labels, device=self._execution_device)

    def _to_output(self, latents: torch.Tensor, size: tuple[int, int], output_type: str) -> Images:
        """Latents [B, C, H, W] in [-1, 1] at a size and in the form that was asked for."""
        if latents.shape[-2:] != size:
            latents = F.interpolate(latents, size, mode="bicubic", align_corners=False, antialias=True)
        if output_type == "latent":
            return latents
        return self._in_unit_range((latents / 2 + 0.5).clamp(0, 1), output_type)

    def _in_unit_range(self, images: torch.Tensor, output_type: str) -> Images:
        """Images [B, C, H, W] in [0, 1] as "pil", "np" or "pt"."""
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images


# pyrdiff.parts.windows: A network's prediction for images that may be too large for it: by windows that overlap and blend.

windows_logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Tiling:
    """Side of the square windows, and the pixels that neighbours share at least."""

    side: int
    overlap: int

    @classmethod
    def checked(cls, tile: int | None, tile_overlap: int | None, multiple: int) -> "Tiling | None":
        """
        The tiling of the arguments `tile` and `tile_overlap`; none for `tile=None`.

        Raises:
            ValueError: unless both are multiples of what the network takes, and the overlap leaves room.
        """
        if tile is None:
            if tile_overlap is not None:
                raise ValueError(f"tile_overlap={tile_overlap} without tile: expected both")
            return None
        if not is_count(tile) or tile < 2 * multiple or tile % multiple:
            raise ValueError(f"tile={tile}: expected a multiple of {multiple} from {2 * multiple} up, for this network")
        if tile_overlap is None:
            return cls.of(tile, multiple)
        if not is_count(tile_overlap) or not multiple <= tile_overlap <= tile - multiple or tile_overlap % multiple:
            raise ValueError(
                f"tile_overlap={tile_overlap}: expected a multiple of {multiple} up to {tile - multiple}, for "
                f"tile={tile}"
            )
        return cls(tile, tile_overlap)

    @classmethod
    def of(cls, side: int, multiple: int) -> "Tiling":
        """Windows of this side that share a quarter of it."""
        return cls(side, max(side // 4 // multiple, 1) * multiple)

    def places(self, length: int, multiple: int) -> list[int]:
        """Where the windows along a side of this length begin."""
        side = min(self.side, length)
        count = 1 if side == length else math.ceil((length - self.overlap) / (side - self.overlap))
        return [int(place) * multiple for place in (torch.linspace(0, length - side, count) / multiple).round()]


@dataclass(frozen=True)
class Window:
    """A part of an image, and its weights there: `down` [h] times `across` [w]. Those of a pixel sum to 1."""

    rows: slice
    columns: slice
    down: torch.Tensor
    across: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """[h, w]."""
        return self.down[:, None] * self.across

    def of(self, image: torch.Tensor) -> torch.Tensor:
        return image[..., self.rows, self.columns]


@dataclass(frozen=True)
class Prediction:
    """A network's output [B, C, H, W], and `pull`: the gradient of <cotangent, output> to the sample."""

    output: torch.Tensor
    pull: Callable[[torch.Tensor], torch.Tensor]


def gradient_of(output: torch.Tensor, at: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """
    The gradient of <cotangent, output> to `at`. The cotangent is made as large as 1 by a power of two before it goes
    through the network, and the gradient as small again: float16 has no numbers for what late steps ask for.
    """
    largest = cotangent.abs().amax().clamp(min=torch.finfo(cotangent.dtype).tiny)
    factor = torch.exp2(-largest.log2().ceil())
    return torch.autograd.grad(output, at, cotangent * factor)[0] / factor


class WindowedNetwork:
    """
    A network's prediction for a whole image, and the gradient through it. In windows, neither needs more memory than
    some windows do. When memory runs out, fewer go through the network together, and then smaller ones.

    Args:
        network: Called as network(sample [B, C, H, W], time, condition), with windows of both images.
        multiple: Sides that the network takes are multiples of this; others are padded by reflection, or where they are
            too short for it by the pixels at the border.
        tiling: The windows; `None` for the whole image at once.
    """

    # Pixels of the windows that go through the network together. A GPU is busy with so many. A processor core is slower
    # with more than one window, which its cache does not hold: SR4 mini took 8.9 s a megapixel with windows of 256 one
    # by one, and 11.7 s with four together.
    PIXELS_TOGETHER = {"cuda": 2**20}

    def __init__(self, network: Callable, multiple: int, tiling: Tiling | None):
        self.network, self.multiple, self.tiling = network, multiple, tiling
        self._windows_of: dict[tuple, list[Window]] = {}
        self._most_together = math.inf

    def predict(self, sample: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """
        The prediction, float32, with as many channels as the network makes.

        Args:
            sample: [B, C, H, W].
            time: What the network takes as its second argument.
            condition: An image beside the sample, [B or 1, K, H, W], or of the padded size already.
        """
        height, width = sample.shape[-2:]
        padded = self._padded(sample)
        return self._fitting(lambda: self._blend(padded, time, condition), sample)[..., :height, :width]

    def differentiate(self, sample: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> Prediction:
        """The prediction (see `predict`), and the gradient to the sample."""
        whole = self._fitting(lambda: self._whole(sample, time, condition), sample)
        if whole is not None:
            return whole
        output = self.predict(sample, time, condition)
        return Prediction(output, lambda cotangent: self._pull(sample, time, condition, cotangent))

    def _padded(self, image: torch.Tensor) -> torch.Tensor:
        """The image with sides that the network takes; as it is if they are multiples already."""
        for below, side in ((False, image.shape[-1]), (True, image.shape[-2])):
            added = -side % self.multiple
            if added:
                mode = "reflect" if added < side else "replicate"  # too few pixels to mirror
                image = F.pad(image, (0, 0, 0, added) if below else (0, added, 0, 0), mode=mode)
        return image

    def _blend(self, padded: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        windows, condition = self.windows(padded), self._padded(condition)
        if len(windows) == 1:
            return self.network(padded, time, condition)
        blended, count, together = None, len(padded), self._together(windows[0], padded)
        if isinstance(time, torch.Tensor) and time.ndim > 0:
            time = time.expand(count)
        for start in range(0, len(windows), together):
            group = windows[start : start + together]
            samples = torch.cat([window.of(padded) for window in group])
            conditions = torch.cat([window.of(condition).expand(count, -1, -1, -1) for window in group])
            times = time.repeat(len(group)) if isinstance(time, torch.Tensor) and time.ndim > 0 else time
            outputs = self.network(samples, times, conditions)
            if blended is None:
                blended = outputs.new_zeros(count, outputs.shape[1], *padded.shape[-2:])
            for window, output in zip(group, outputs.split(count), strict=True):
                window.of(blended).add_(output * window.weight)
        return blended

    def _together(self, window: Window, image: torch.Tensor) -> int:
        """How many windows go through the network at once."""
        pixels = self.PIXELS_TOGETHER.get(image.device.type, 0)
        return max(min(pixels // (len(image) * window.down.numel() * window.across.numel()), self._most_together), 1)

    @torch.enable_grad()
    def _whole(self, sample: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> Prediction | None:
        """The prediction in one piece with its graph; `None` if the image has several windows."""
        leaf = sample.detach().requires_grad_()
        padded = self._padded(leaf)
        if len(self.windows(padded)) > 1:
            return None
        output = self.network(padded, time, self._padded(condition))[..., : sample.shape[-2], : sample.shape[-1]]
        return Prediction(output.detach(), self._pull_of_graph(output, leaf, sample, time, condition))

    def _pull_of_graph(self, output, leaf, sample, time, condition) -> Callable:
        def pull(cotangent: torch.Tensor) -> torch.Tensor:
            try:
                return gradient_of(output, leaf, cotangent)
            except RuntimeError as error:  # the graph did not fit: go on in windows
                self._halve(error, sample)
            return self._pull(sample, time, condition, cotangent)

        return pull

    def _pull(self, sample, time, condition, cotangent) -> torch.Tensor:
        return self._fitting(lambda: self._pull_windows(sample, time, condition, cotangent), sample)

    @torch.enable_grad()
    def _pull_windows(self, sample, time, condition, cotangent) -> torch.Tensor:
        leaf = sample.detach().requires_grad_()
        padded, condition = self._padded(leaf), self._padded(condition)
        right, bottom = (padded.shape[axis] - cotangent.shape[axis] for axis in (-1, -2))
        cotangent = F.pad(cotangent, (0, right, 0, bottom))
        gradient = torch.zeros_like(padded)
        for window in self.windows(padded):
            inside = window.of(padded).detach().requires_grad_()
            output = self.network(inside, time, window.of(condition))
            window.of(gradient).add_(gradient_of(output, inside, window.weight * window.of(cotangent)))
        return gradient if padded is leaf else torch.autograd.grad(padded, leaf, gradient)[0]

    def windows(self, padded: torch.Tensor) -> list[Window]:
        """The windows of an image [B, C, H, W] whose sides the network takes, on its device; laid out once a size."""
        key = (padded.shape[-2:], padded.device, self.tiling)
        if key not in self._windows_of:
            rows, columns = (self._along(length, padded.device) for length in padded.shape[-2:])
            self._windows_of = {
                key: [Window(row, column, down, across) for row, down in rows for column, across in columns]
            }
        return self._windows_of[key]

    def _along(self, length: int, device: torch.device) -> list[tuple[slice, torch.Tensor]]:
        """Places of the windows along one side, and their weights."""
        tiling = self.tiling or Tiling(length, 0)
        side, overlap, places = min(tiling.side, length), tiling.overlap, tiling.places(length, self.multiple)
        weights, share = torch.zeros(len(places), length, dtype=torch.float64), max(overlap, 1)
        inside = torch.arange(side, dtype=torch.float64) + 0.5
        for weight, place in zip(weights, places, strict=True):
            before = inside if place > 0 else torch.full_like(inside, share)
            after = side - inside if place < length - side else torch.full_like(inside, share)
            near = torch.minimum(before, after).clamp(max=share) / share
            weight[place : place + side] = torch.sin(math.pi / 2 * near) ** 2
        weights = (weights / weights.sum(0)).float().to(device)
        return [(slice(p, p + side), weight[p : p + side]) for p, weight in zip(places, weights, strict=True)]

    def _fitting(self, attempt: Callable, image: torch.Tensor):
        """What the attempt returns, with smaller windows each time that memory runs out."""
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                self._halve(error, image)
            if image.is_cuda:
                torch.cuda.empty_cache()

    def _halve(self, error: RuntimeError, image: torch.Tensor) -> None:
        """Halves the windows at once, or each, if memory ran out; raises what else went wrong."""
        if not ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error)):
            raise error
        windows = self.windows(self._padded(image)) if self.tiling else []
        together = min(self._together(windows[0], image), len(windows)) if windows else 1
        if together > 1:
            self._most_together = together // 2
            return
        side = min(self.tiling.side if self.tiling else math.inf, max(image.shape[-2:])) // 2
        side = side // self.multiple * self.multiple
        if side < 2 * self.multiple:
            raise error
        self.tiling = Tiling.of(side, self.multiple)
        windows_logger.warning(f"out of memory: the network goes on with windows of {side}x{side}")


# pyrdiff.pipelines.pipeline_residual_sr

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
