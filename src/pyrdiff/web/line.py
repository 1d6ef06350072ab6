"""The line of visitors: one run at a time on the machine, in the order in which they came."""

import threading

from .events import Busy, Waiting
from .run import Run

LONGEST = 32  # runs in the line, each of which has a thread


class Line:
    """
    Runs that share a machine. The first one works, the others are told how many are before them whenever that changes.
    """

    def __init__(self):
        self._runs: list[Run] = []
        self._lock = threading.Lock()

    def join(self, run: Run) -> None:
        """
        Puts a run at the end of the line.

        Raises:
            Busy: if the line is full.
        """
        with self._lock:
            if len(self._runs) >= LONGEST:
                raise Busy(f"{LONGEST} runs are waiting already: try again in a while.")
            self._runs.append(run)
            self._tell()

    def leave(self, run: Run) -> None:
        """Takes a run out of the line, whether it worked or still waited; the next one begins."""
        with self._lock:
            self._runs.remove(run)
            self._tell()

    def cancel(self, owner: str) -> bool:
        """Cancels what this owner has in the line; False if there is nothing."""
        with self._lock:
            own = [run for run in self._runs if run.owner == owner]
        for run in own:
            run.cancel()
        return bool(own)

    def _tell(self) -> None:
        for ahead, run in enumerate(self._runs):
            if ahead == 0:
                run.turn.set()
            elif run.ahead != ahead:
                run.ahead = ahead
                run.events.put(Waiting(ahead))
