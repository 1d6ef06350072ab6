"""What ends a run before its last step: its minutes, or a signal."""

import signal
import time
from collections import deque
from collections.abc import Callable

TIME_IS_UP = 1000  # as a reason to stop, beside the numbers of signals


class Stopwatch:
    """
    The seconds of a run: since this was made, and in earlier sessions.

    Args:
        clock: f() -> seconds. `time.process_time` counts CPU time instead, for benches on machines with other work.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.began = clock()
        self.earlier = 0.0

    @property
    def seconds(self) -> float:
        return self.earlier + self.clock() - self.began


class Budget:
    """How much is left of the `minutes` that a run may take; None for no limit."""

    def __init__(self, watch: Stopwatch, minutes: float | None):
        self.watch = watch
        self.limit = float("inf") if minutes is None else minutes * 60
        self.reserve = 5.0  # seconds kept for the end of the run
        self.step_seconds = 0.0  # mean of the last 100 steps; 0 while unknown
        self._durations = deque(maxlen=100)

    @property
    def seconds_left(self) -> float:
        return self.limit - self.watch.seconds - self.reserve

    def note_step(self, seconds: float) -> None:
        self._durations.append(seconds)
        self.step_seconds = sum(self._durations) / len(self._durations)

    def note_preview(self, seconds: float) -> None:
        """The run ends with a preview: twice its time is kept for it."""
        self.reserve = max(self.reserve, 2 * seconds + 5.0)

    def total_steps(self, step: int) -> int:
        """The length of the run, in steps, if it is to end in time after `step` of them."""
        return max(1, step + max(0, int(self.seconds_left / self.step_seconds)))


class Signals:
    """Within this context SIGTERM and Ctrl-C only set `number`, so that the running step is finished."""

    def __init__(self):
        self.number = 0

    def __enter__(self) -> "Signals":
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.number = number
