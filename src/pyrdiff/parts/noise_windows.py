"""The noise that a network was trained for at each size: `noise_window` of its config."""

import math
from collections.abc import Mapping, Sequence


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
    areas = [math.prod(size) if isinstance(size, Sequence) else size * size for size in trained]
    shown = (box[2] - box[0]) * (box[3] - box[1])
    for (height, width), time in starts:
        area = height * width / shown
        nearest = min(range(len(areas)), key=lambda index: abs(math.log(areas[index] / area)))
        if nearest > 0 and time > window * train_steps:
            lowest = (
                "x".join(map(str, trained[0])) if isinstance(trained[0], Sequence) else f"{trained[0]}x{trained[0]}"
            )
            raise ValueError(
                f"noise_window={window}: the level {height}x{width} would start from time {time:.0f} of {train_steps}; "
                f"expected at most {int(window * train_steps)}, since this network was trained for more noise at "
                f"{lowest} only (a lower strength, or levels from there on)"
            )
