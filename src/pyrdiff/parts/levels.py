"""The levels of a pyramid: their sizes, and what a level needs of the network."""

import math
from collections.abc import Sequence

import torch

from pyrdiff.parts.checks import Size, check_size


def per_level(name: str, value, count: int) -> list:
    """One value for each of the `count` refined levels: the one that was given, or those."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}={list(value)}: expected one number, or one for each of the {count} higher levels")
    return list(value)


def check_growing(name: str, resolutions: Sequence[Size]) -> list[tuple[int, int]]:
    """Sizes as (height, width), each larger than the one before."""
    if not isinstance(resolutions, Sequence) or isinstance(resolutions, str) or not resolutions:
        raise ValueError(f"{name}={resolutions}: expected a list of sizes, low to high, such as [16, 32, 64]")
    sizes = [check_size(name, size) for size in resolutions]
    for low, high in zip(sizes, sizes[1:], strict=False):
        if high[0] < low[0] or high[1] < low[1] or high == low:
            raise ValueError(f"{name}={list(resolutions)}: expected each level to be larger than the one before")
    return sizes


def rounded_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    return tuple(math.ceil(side / multiple) * multiple for side in size)


def nfe_eq(calls: int, size: tuple[int, int], top: tuple[int, int]) -> float:
    """The cost of network calls at a size, in calls at the top size, by area."""
    return calls * math.prod(size) / math.prod(top)


def pixel_grid(height: int, width: int, box: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
    """(row, column) of the pixel centres of a window (top, left, bottom, right), float32 [2, height, width]."""
    top, left, bottom, right = box
    rows = top + (bottom - top) * (torch.arange(height, dtype=torch.float64) + 0.5) / height
    columns = left + (right - left) * (torch.arange(width, dtype=torch.float64) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).float()


def padded_grid(height: int, width: int, multiple: int) -> torch.Tensor:
    """The grid [1, 2, H, W] of an image that is padded below and right to multiples; what is added stays inside it."""
    axes = [
        ((torch.arange(side + -side % multiple, dtype=torch.float64) + 0.5) / side).clamp(max=1)
        for side in (height, width)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).float()[None]
