"""The times that a distilled network is called at: `jumps` of its config."""

from collections.abc import Iterable, Mapping, Sequence

from pyrdiff.parts.settings import is_whole


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
