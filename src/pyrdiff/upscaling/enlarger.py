"""A pipeline that enlarges pictures to any size: its passes, its windows and the memory that they need."""

import inspect
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pyrdiff.data import image_tensor
from pyrdiff.hub.enlarging import arguments_of, image_channels
from pyrdiff.machine import seeded
from pyrdiff.parts.operators import SeparableOperator, project_onto
from pyrdiff.parts.windows import Tiling
from pyrdiff.parts.wrappers import plain

from .memory import BYTES_A_PIXEL, SHARE, free_bytes, network_bytes
from .sizes import Size, passes

SIDES = (2048, 1024, 512, 256, 128, 64, 32)  # of windows to choose from
OVERLAP = 32  # pixels that windows share
# The largest window whose tensors are not more than this is taken. A processor is faster with windows that its cache
# holds: SR4 mini took 8.9 s a megapixel in windows of 256, 12.8 s in windows of 512 and 16.2 s at 1024 as a whole.
WINDOW_BYTES = {"cpu": 160 * 2**20, "cuda": 4 * 2**30}


class Counts(NamedTuple):
    """Windows of the result, network calls for each pixel, and how often a window goes through the network."""

    windows: int
    calls: int
    through: int

    def __str__(self) -> str:
        if self.through != self.windows * self.calls:  # levels of different sizes
            return f"{self.through} windows"
        return f"{self.windows} window{'s' * (self.windows > 1)} × {self.calls} call{'s' * (self.calls > 1)}"


class Pass(NamedTuple):
    """A call of the pipeline: what it makes, its arguments, and its work (`None` where nobody says)."""

    size: Size
    arguments: dict
    counts: Counts | None


class Route(NamedTuple):
    """How a picture gets its size: the passes, and where they end elsewhere a resampling. `need`: bytes at once."""

    passes: list[Pass]
    target: Size
    need: int

    @property
    def windows(self) -> int:
        """Times that a window goes through the network."""
        return sum(each.counts.through for each in self.passes if each.counts)

    @property
    def notes(self) -> list[str]:
        """What there is to say of it."""
        size = "{}x{}".format(*self.target)
        if not self.passes:
            return [f"made {size} by Lanczos alone, since the model makes nothing smaller"]
        by = " and ".join(
            f"×{each.arguments['scale_factor']}" for each in self.passes if each.arguments.get("scale_factor")
        )
        if self.passes[-1].size != self.target:
            return [f"enlarged {by or 'by the model'}, then made {size} by Lanczos"]
        return [f"enlarged {by}"] if len(self.passes) > 1 else []


class Enlarger:
    """
    Args:
        pipeline: One that enlarges (`pyrdiff.hub.enlarging.enlarging`).
        arguments: Of its calls.
        tile: Side of the windows; `None` for what fits the device.
        tile_overlap: Pixels that they share.
        saved: The pipeline that was saved, if it is another one.

    Raises:
        ValueError: for windows that the network does not take.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        arguments: Mapping[str, object],
        tile: int | None = None,
        tile_overlap: int | None = None,
        saved: DiffusionPipeline | None = None,
    ):
        self.pipeline, self.known = pipeline, arguments_of(pipeline)
        self.arguments, self.saved = dict(arguments), pipeline if saved is None else saved
        self.channels = image_channels(pipeline)
        network = getattr(pipeline, "unet", None)
        self.network = None if network is None else plain(network)
        self.device = torch.device(getattr(pipeline, "device", "cpu"))
        self._multiple = getattr(pipeline, "_size_multiple", 1)
        self._given = None if tile is None else Tiling.checked(tile, tile_overlap, self._multiple)
        self._bytes_of: dict[int, int | None] = {}
        self._routes: dict[tuple[Size, Size], Route] = {}

    @property
    def factors(self) -> list[int] | None:
        """The factors that the model was trained for; `None` if it takes any whole number."""
        found = getattr(self.network, "config", {}).get("scale_factors")
        return list(found) if found else None

    @property
    def any_size(self) -> bool:
        """Whether one call makes any size."""
        return "resolutions" in self.known and hasattr(self.pipeline, "sizes_between")

    def route(self, size: Size, target: Size) -> Route:
        """How a picture of one size gets another."""
        if (size, target) not in self._routes:
            self._routes[size, target] = self._route(size, target)
        return self._routes[size, target]

    def _route(self, size: Size, target: Size) -> Route:
        found: list[Pass] = []
        for made, given in self._calls(size, target):
            tiling = self._tiling(made)
            told = {} if tiling is None else {"tile": tiling.side, "tile_overlap": tiling.overlap}
            found.append(Pass(made, given | told, self._counts(size, made, given, tiling)))
            size = made
        return Route(found, target, self._need([*(each.size for each in found), target], found))

    def check_memory(self, route: Route) -> None:
        """
        Raises:
            ValueError: if the memory that is free is less than a route needs; what fits is said.
        """
        free = free_bytes(self.device)
        if free is None or route.need <= SHARE * free:
            return
        width, height = route.target
        said = f"{width}x{height} pixels need {_gib(route.need)}, and {_gib(free)} are free"
        tiles = [one for one in SIDES if self._need_with(route, one) <= SHARE * free]
        if tiles and "tile" in self.known:
            raise ValueError(f"{said}: expected --tile {tiles[0]} or less")
        most = math.sqrt(SHARE * free / route.need)
        raise ValueError(f"{said}: expected a result of at most about {int(most * width)}x{int(most * height)}")

    def enlarge(self, image: torch.Tensor, route: Route, seed: int) -> torch.Tensor:
        """
        Args:
            image: [1, C, h, w] in [0, 1].
            route: Of this size.
            seed: Of the noise.

        Returns:
            float32 [1, C, H, W] in [0, 1], on the CPU.

        Raises:
            ValueError: if the model gives what are no numbers.
        """
        given, device = image, image.device
        for each in route.passes:
            image = self._call(image, each, seed)
            if not bool(torch.isfinite(image).all()):
                raise ValueError("the model gave values that are no numbers")
        if tuple(image.shape[:-3:-1]) != route.target:
            image = resampled(image, route.target)
            if self.arguments.get("hard_consistency"):
                shrinking = self.shrinking(image.shape[-2:], given.shape[-2:], image.shape[1])
                image = project_onto(2 * image - 1, given, shrinking) / 2 + 0.5
        return image.to(device)

    def shrinking(self, large: tuple[int, int], small: tuple[int, int], channels: int = 1) -> SeparableOperator:
        """The operator that makes (height, width) `small` of `large`, as the pictures are taken to have been made."""
        return SeparableOperator.named(self.arguments.get("operator") or "bicubic", large, small, channels)

    def _call(self, image: torch.Tensor, one: Pass, seed: int) -> torch.Tensor:
        given = {**self.arguments, **one.arguments}
        if "generator" in self.known:
            (given["generator"],) = seeded([seed], self.device)
        if "output_type" in self.known:
            return self.pipeline(image, **given, output_type="pt").images.float().cpu()
        return image_tensor([self.pipeline(to_picture(image), **given).images[0]], image.shape[1])

    def _calls(self, size: Size, target: Size) -> list[tuple[Size, dict]]:
        """What each call makes, and the arguments that say so."""
        goal = tuple(max(pair) for pair in zip(size, target, strict=True))
        needed = max(large / small for large, small in zip(goal, size, strict=True))
        if any(small > large for small, large in zip(size, target, strict=True)) and goal == size:
            return []
        if self.any_size:
            factor = goal[0] / size[0]
            if tuple(factor * side for side in size) == goal:
                return [(goal, {"scale_factor": int(factor) if factor == int(factor) else factor})]
            levels = self.pipeline.sizes_between(size[::-1], goal[::-1])
            return [(goal, {"scale_factor": None, "resolutions": levels})]
        if "scale_factor" not in self.known:
            return [(goal, {})]
        calls = []
        for factor in passes(self.factors, needed):
            size = tuple(factor * side for side in size)
            calls.append((size, {"scale_factor": factor}))
        return calls

    def _tiling(self, size: Size) -> Tiling | None:
        """The windows of a call that makes this size."""
        if "tile" not in self.known:
            return None
        if self._given is not None:
            return self._given
        multiple = self._multiple
        most = WINDOW_BYTES.get(self.device.type, WINDOW_BYTES["cpu"])
        sides = [side for side in SIDES if side % multiple == 0 and side >= 4 * multiple]
        side = next((side for side in sides if (self._window_bytes(side) or math.inf) <= most), 256)
        if side % multiple or self._fits_whole(size, side):
            return None
        overlap = max(min(side // 8, OVERLAP) // multiple, 1) * multiple
        near = range(side * 3 // 4 // multiple * multiple, side * 5 // 4 + 1, multiple)
        return min((Tiling(one, overlap) for one in near), key=lambda tiling: self._pixels_seen(size, tiling))

    def _pixels_seen(self, size: Size, tiling: Tiling) -> int:
        """Pixels of all windows of an image: what they overlap by counts twice."""
        padded = (math.ceil(length / self._multiple) * self._multiple for length in size)
        return math.prod(len(tiling.places(side, self._multiple)) * min(side, tiling.side) for side in padded)

    @staticmethod
    def _fits_whole(size: Size, side: int) -> bool:
        """Whether an image is so little larger than a window that it goes through as a whole."""
        return math.prod(size) <= 2 * side**2 and max(size) <= 4 * side

    def _window_bytes(self, side: int) -> int | None:
        """What the network needs for a window. Beyond 128 pixels it grows with their number: attention does not."""
        if self.network is None:
            return None
        base = min(side, 128)
        if base not in self._bytes_of:
            self._bytes_of[base] = network_bytes(self.network, self.channels, base)
        known = self._bytes_of[base]
        return None if known is None else known * side**2 // base**2

    def _counts(self, size: Size, made: Size, given: dict, tiling: Tiling | None) -> Counts | None:
        """The work of a call of the pipeline, by its own account."""
        multiple = self._multiple

        def windows(side: Size) -> int:
            padded = (math.ceil(length / multiple) * multiple for length in side)
            return math.prod(1 if tiling is None else len(tiling.places(length, multiple)) for length in padded)

        account = getattr(self.pipeline, "cost", None) or getattr(self.pipeline, "plan", None)
        try:
            accepted = inspect.signature(account).parameters
            told = {name: value for name, value in {**self.arguments, **given}.items() if name in accepted}
            cost = account(size[::-1], **told)
            levels = cost if isinstance(cost, list) else [cost]
            calls = [len(level.timesteps) for level in levels]
            seen = [windows(level.size[::-1]) for level in levels]
            if self.arguments.get("guidance") == "gradient":  # once more for the gradient, unless it keeps the graph
                seen = [count * 2 if count > 1 else 1 for count in seen]
            through = sum(each * count for each, count in zip(calls, seen, strict=True))
            return Counts(windows(made), sum(calls), through)
        except (AttributeError, TypeError):  # a pipeline of others
            return None

    def _need(self, sizes: list[Size], found: list[Pass]) -> int:
        """Bytes at once: the image, and the windows that are in the network."""
        image = max(map(math.prod, sizes)) * BYTES_A_PIXEL * self.channels // 3
        sides = [each.arguments.get("tile") or max(math.prod(each.size), 1) ** 0.5 for each in found]
        windows = [self._window_bytes(math.ceil(side / 32) * 32) or 0 for side in sides]
        return image + max(windows, default=0)

    def _need_with(self, route: Route, tile: int) -> int:
        passes = [each._replace(arguments=each.arguments | {"tile": tile}) for each in route.passes]
        return self._need([*(each.size for each in passes), route.target], passes)


def resampled(image: torch.Tensor, size: Size) -> torch.Tensor:
    """The image [1, C, h, w] at another size (width, height), by Pillow's Lanczos filter; in [0, 1]."""
    bands = [Image.fromarray(band.numpy()).resize(size, Image.Resampling.LANCZOS) for band in image[0].float().cpu()]
    return torch.from_numpy(np.stack([np.asarray(band) for band in bands]))[None].clamp(0, 1)


def to_picture(image: torch.Tensor) -> Image.Image:
    """Mode "L" or "RGB", of [1, C, H, W] in [0, 1]."""
    pixels = (image[0].clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
