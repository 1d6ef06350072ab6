"""Peak memory of work: allocated on the GPU, or resident in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Memory(NamedTuple):
    """Bytes before the work, and at its peak."""

    before: int
    peak: int

    @property
    def above(self) -> int:
        """What the work took."""
        return self.peak - self.before


def of(work: Callable[[], object], device: torch.device) -> Memory:
    """The memory of some work; its result is not kept."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return Memory(before, torch.cuda.max_memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: reading the weights had its own
    before = _status("VmRSS")
    work()
    return Memory(before, _status("VmHWM"))


def _status(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
