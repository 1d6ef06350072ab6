"""What a metric returns, and the checks and conversions that all image metrics share."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DataRange = tuple[float, float] | float

SLACK = 1e-6  # of the range: what float32 arithmetic may leave outside it


@dataclass(frozen=True, eq=False)
class MetricResult:
    """A number and what is needed to get it again.

    Attributes:
        name: What to call the number; "FID" only where the feature network is that of FID.
        value: The number; for metrics of single images the mean of `per_image`.
        per_image: float64 [B] on the CPU, or None where images have no values of their own.
        conventions: How it was computed, as JSON values: count, channels, range, units and the metric's own settings.
    """

    name: str
    value: float
    per_image: Tensor | None = None
    conventions: dict = field(default_factory=dict)


def mean_of(name: str, per_image: Tensor, conventions: dict) -> MetricResult:
    """The result of a metric of single images: the mean of per_image [B], and the count."""
    per_image = per_image.detach().double().cpu()
    return MetricResult(name, per_image.mean().item(), per_image, {"count": len(per_image), **conventions})


def combine(results: Sequence[MetricResult]) -> MetricResult:
    """One result for images that were measured in parts, for example because their sizes differ.

    Raises:
        ValueError: when there is none, or they are not of one metric of single images with the same conventions.
    """
    if not results:
        raise ValueError("results=[]: expected one or more")
    kept = [{key: value for key, value in result.conventions.items() if key != "count"} for result in results]
    first = results[0]
    for result, conventions in zip(results, kept, strict=True):
        if result.name != first.name or result.per_image is None or conventions != kept[0]:
            raise ValueError(
                f"results={first.name} {kept[0]} beside {result.name} {conventions}: expected per-image "
                "results of one metric with the same conventions"
            )
    return mean_of(first.name, torch.cat([result.per_image for result in results]), kept[0])


def check_range(data_range: DataRange) -> tuple[float, float]:
    """
    `data_range` as the two floats (low, high); of one number it is (0, that number), as torchmetrics has it.

    Raises:
        ValueError: unless it is finite, with low < high.
    """
    try:
        low, high = (0.0, float(data_range)) if isinstance(data_range, numbers.Real) else map(float, data_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"data_range={data_range!r}: expected a pair (low, high) such as (0, 1) or (-1, 1), or a number for (0, it)"
        )
    return low, high


def check_tensor(argument: str, values: object) -> None:
    """Raise ValueError unless it is a tensor."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{argument}={type(values).__name__}: expected a float tensor (torch.from_numpy makes one)")


def check_images(argument: str, images: Tensor, data_range: DataRange) -> None:
    """Raise ValueError unless `images` is a float [B, C, H, W], C 1 or 3, not empty, with values in `data_range`."""
    low, high = check_range(data_range)
    check_tensor(argument, images)
    if images.ndim != 4 or not images.is_floating_point() or images.numel() == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{argument}={images.dtype} {list(images.shape)}: expected a non-empty float [B, C, H, W], C 1 or 3"
        )
    least, most = images.min().item(), images.max().item()
    slack = SLACK * (high - low)
    if not (low - slack <= least and most <= high + slack):
        raise ValueError(
            f"{argument} has values in [{least:.6g}, {most:.6g}]: expected data_range=({low:g}, {high:g}), "
            "and nothing is clamped here"
        )


def check_pair(prediction: Tensor, target: Tensor, data_range: DataRange) -> None:
    """Raise ValueError unless both are images in `data_range` (see `check_images`) of one shape."""
    check_images("prediction", prediction, data_range)
    check_images("target", target, data_range)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction={list(prediction.shape)}, target={list(target.shape)}: expected equal shapes")


def to_unit(images: Tensor, data_range: DataRange, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images from `data_range` to [0, 1]."""
    low, high = check_range(data_range)
    return (images.to(dtype) - low) / (high - low)
