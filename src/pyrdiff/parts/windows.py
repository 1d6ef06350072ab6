"""A network's prediction for images that may be too large for it: by windows that overlap and blend."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from pyrdiff.parts.checks import is_count

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
