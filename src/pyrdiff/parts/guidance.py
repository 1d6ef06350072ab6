"""Guidance: predictions drawn away from those of the network without the class, or of a worse network."""

from collections.abc import Mapping, Sequence

from pyrdiff.parts.checks import is_number
from pyrdiff.parts.labels import Classes


def check_guidance(scale: float, interval: Sequence[float] | None, config: Mapping, has_guide: bool) -> None:
    """
    Checks the arguments `guidance_scale` and `guidance_interval`.

    Args:
        scale, interval: The arguments.
        config: Of the network.
        has_guide: Whether there is a worse network to guide by.

    Raises:
        ValueError: for numbers out of range, or a network that cannot be guided.
    """
    if not is_number(scale) or scale < 0:
        raise ValueError(f"guidance_scale={scale!r}: expected a number from 0 up")
    if interval is not None:
        good = isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(is_number, interval))
        if not good or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(f"guidance_interval={interval!r}: expected (low, high) within [0, 1]")
    if scale != 1 and config.get("class_names") is None and not has_guide:
        lacks = "has no label for images of no class" if config.get("num_class_embeds") else "knows no classes"
        raise ValueError(
            f"guidance_scale={scale}: expected 1.0, since this network {lacks}, and no `guide` comes with it"
        )


def check_guided(scales: Sequence[float], classes: Classes, has_guide: bool) -> None:
    """
    Refuses guidance by classes of images none of which has one.

    Args:
        scales: At each step of a call.
        classes: Of the call.
        has_guide: Whether it is guided by a worse network, whatever the classes.

    Raises:
        ValueError: if there is nothing to guide by.
    """
    scale = next((scale for scale in scales if scale != 1), 1)
    named = classes if isinstance(classes, (list, tuple)) else [classes]
    if scale != 1 and not has_guide and all(value is None for value in named):
        raise ValueError(f"guidance_scale={scale:g}: expected classes beside it, which guidance draws towards")


def guidance_scales(
    scale: float, interval: Sequence[float] | None, times: Sequence[float], train_steps: int
) -> list[float]:
    """The scale at each time: 1, which is none, where the share of the noise process is outside the interval."""
    low, high = (0.0, 1.0) if interval is None else interval
    return [float(scale) if low <= time / train_steps <= high else 1.0 for time in times]


def check_guide(guide: Mapping, network: Mapping) -> None:
    """
    Refuses a guide that cannot be called as the network is.

    Args:
        guide, network: Their configs.

    Raises:
        ValueError: the setting is named.
    """

    def both(*names: str) -> tuple:
        return tuple(
            next((config[name] for name in names if config.get(name) is not None), None) for config in (guide, network)
        )

    for name, (its, ours) in (
        ("image_channels", both("image_channels", "in_channels")),
        ("class_names", both("class_names")),
        ("num_class_embeds", both("num_class_embeds")),
    ):
        if its != ours:
            raise ValueError(f"guide has {name}={its!r}: expected {ours!r}, as the network has")
    its, ours = (len(config.get("block_out_channels", (1,))) for config in (guide, network))
    if its > ours:
        raise ValueError(f"guide has {its} levels of channels: expected at most {ours}, as the network has")
    its, ours = (config.get("noise_window", 1.0) for config in (guide, network))
    if its < ours:
        raise ValueError(f"guide has noise_window={its}: expected {ours} or more, as the network has")
