"""How long network calls take on this machine, learned from the calls that took place."""

import threading
from bisect import bisect_left
from collections.abc import Iterable

WEIGHT = 0.3  # of a new observation


class Pace:
    """Seconds of a network call by its area, the number of images times their pixels."""

    def __init__(self):
        self._seconds: dict[int, float] = {}
        self._lock = threading.Lock()

    def observe(self, area: int, seconds: float) -> None:
        """A call of this area took so long; later calls count more."""
        with self._lock:
            known = self._seconds.get(area, seconds)
            self._seconds[area] = known + WEIGHT * (seconds - known)

    def of_call(self, area: float) -> float | None:
        """
        Seconds of one call: between areas that took place, linearly; above them in proportion, and below them as long
        as the smallest. None before the first call.
        """
        with self._lock:
            areas = sorted(self._seconds)
            if not areas:
                return None
            place = bisect_left(areas, area)
            if place == len(areas):
                return self._seconds[areas[-1]] * area / areas[-1]
            if place == 0:
                return self._seconds[areas[0]]
            low, high = areas[place - 1], areas[place]
            share = (area - low) / (high - low)
            return self._seconds[low] + share * (self._seconds[high] - self._seconds[low])

    def of_calls(self, calls: Iterable[tuple[float, float]]) -> float | None:
        """Seconds of several calls, as (number, area) each; None before the first call, or for none."""
        seconds = [(number, self.of_call(area)) for number, area in calls]
        if not seconds or any(each is None for _, each in seconds):
            return None
        return sum(number * each for number, each in seconds)
