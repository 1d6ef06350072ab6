"""What a network was trained for at each size: `noise_window` and `jumps` of its config."""

import math
from collections.abc import Iterable, Mapping, Sequence

from pyrdiff.parts.jumps import check_calls


def check_noise(
    config: Mapping,
    train_steps: int,
    starts: Sequence[tuple[tuple[int, int], float]],
    box: Sequence[float] = (0.0, 0.0, 1.0, 1.0),
) -> None:
    """
    Refuses levels that start from more noise than the network was trained for at their size.

    Above the lowest of its `resolutions` a network may be trained for a share `noise_window` of the noise process only.
    A size in between is taken for the resolution that is nearest in area.

    Args:
        config: Of the network. One without a `noise_window` was trained for all noise.
        train_steps: Steps of the noise process.
        starts: Of each level its (height, width) and the time that it starts from, 0 to train_steps - 1.
        box: The window of the whole image that the levels show: top, left, bottom, right in [0, 1].

    Raises:
        ValueError: naming the window and the first level that starts beyond it.
    """
    window, trained = config.get("noise_window", 1.0), config.get("resolutions") or ()
    if window >= 1 or len(trained) < 2:
        return
    for (height, width), time in starts:
        if _is_above_lowest(trained, height, width, box) and time > window * train_steps:
            lowest = (
                "x".join(map(str, trained[0])) if isinstance(trained[0], Sequence) else f"{trained[0]}x{trained[0]}"
            )
            raise ValueError(
                f"noise_window={window}: the level {height}x{width} would start from time {time:.0f} of {train_steps}; "
                f"expected at most {int(window * train_steps)}, since this network was trained for more noise at "
                f"{lowest} only (a lower strength, or levels from there on)"
            )


def check_level_calls(
    config: Mapping,
    levels: Sequence[tuple[tuple[int, int], Sequence[float]]],
    plans: Iterable[str],
    box: Sequence[float] = (0.0, 0.0, 1.0, 1.0),
) -> None:
    """
    Refuses calls of a distilled network at times that it was not trained for, above the lowest of its `resolutions`.

    Args:
        config: Of the network.
        levels: Of each its (height, width) and the times of its calls.
        plans: Names of the plans that there are.
        box: As of `check_noise`.

    Raises:
        ValueError: naming the first such level, the network's times and the plans.
    """
    for (height, width), times in levels if config.get("jumps") else ():
        if _is_above_lowest(config.get("resolutions") or (), height, width, box):
            check_calls(config, times, plans, f"the level {height}x{width}")


def _is_above_lowest(trained: Sequence, height: int, width: int, box: Sequence[float]) -> bool:
    """Whether a level is nearest in area to another than the lowest of the sizes that a network was trained at."""
    areas = [math.prod(size) if isinstance(size, Sequence) else size * size for size in trained]
    area = height * width / ((box[2] - box[0]) * (box[3] - box[1]))
    return min(range(len(areas)), key=lambda index: abs(math.log(areas[index] / area)), default=0) > 0
