"""What a run says: what it is going to do, how far it is and how long that will take."""

import os
import sys
import time
from collections.abc import Callable

from pyrdiff.machine import duration

FROM = 6  # passes of windows through the network; fewer are over before their time is known


def say(line: str) -> None:
    """Prints a line, unless nobody listens any more, as after `| head`: the work goes on."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(text: object) -> str:
    """The text without line breaks, and with what stdout cannot show spelt out."""
    return " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())


def reason(error: Exception) -> str:
    """What went wrong with a file, in one line."""
    text = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return one_line(text)


class Progress:
    """
    How far a run is: a bar on a terminal, and everywhere one line that says the time, once it has been measured.

    Args:
        total: Times that a window will go through the network, of all pictures.
        pictures: How many there are.
        clock: Seconds.
    """

    def __init__(self, total: int, pictures: int, clock: Callable[[], float] = time.perf_counter):
        from tqdm import tqdm

        self.total, self.pictures, self.clock = total, pictures, clock
        self.done, self.first, self.told = 0, 0.0, total < FROM
        form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} windows [{elapsed}<{remaining}]"
        on = total > 0 and sys.stderr.isatty()
        self.bar = tqdm(total=total, bar_format=form, disable=not on, leave=False, file=sys.stderr)
        self.write = tqdm.write if on else say

    def start(self, name: str, number: int) -> None:
        """The picture of this number, from 1, begins."""
        of = f" ({number} of {self.pictures})" if self.pictures > 1 else ""
        self.bar.set_description_str(f"{one_line(name)}{of}: ", refresh=False)

    def windows(self, count: int) -> None:
        """So many windows went through the network once more."""
        self.done += count
        self.bar.update(count)
        if self.told:
            return
        if not self.first:  # the first one also sets things up
            self.first, self.before = self.clock(), self.done
            return
        self.told = True
        seconds = (self.clock() - self.first) / (self.done - self.before)
        left = max(self.total - self.done, 0) * seconds
        self.write(f"{seconds:.2g} s a window: about {duration(left)}")

    def finish(self, planned: int) -> None:
        """A picture ended, for which so many windows were planned; with smaller windows there are more."""
        self.done = planned
        self.bar.n = planned
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()
