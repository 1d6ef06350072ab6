"""How a small image came from a large one: linear operators, their adjoints, and the corrections that invert them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.utils import logging

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
