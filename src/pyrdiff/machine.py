"""What a figure was measured on, and how long work takes there. Torch is imported only when it is needed."""

import os
import platform
from collections.abc import Callable, Hashable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

PACKAGES = ("pyrdiff", "torch", "diffusers", "pillow", "numpy")
CPUINFO = Path("/proc/cpuinfo")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the settings of torch's memory on a GPU

Key = TypeVar("Key", bound=Hashable)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of installed packages, by default of those that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages or PACKAGES}}


def open_device(name: str | None = None) -> "torch.device":
    """The device of this name, by default the GPU if there is one. Raises `ValueError` unless it can be used."""
    import torch

    set_up_gpu()
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r}: expected one of this machine, such as cpu ({error})") from error
    return device


def set_up_gpu(training: bool = False) -> None:
    """
    All that is set for work on CUDA; to be called before the first tensor there. `benchmarks/gpu.sh` measures each.

    - Memory is taken in segments that grow: the many sizes of pyramids and windows would leave holes between fixed
      ones. `PYTORCH_ALLOC_CONF` and `PYTORCH_CUDA_ALLOC_CONF` count more.
    - A training repeats few sizes many times. cuDNN tries its kernels at the first step of each size (`benchmark`), and
      float32 products are computed in TF32, as convolutions are by default. Sampling, which meets a size for a few
      calls and whose float32 is to be float32, keeps PyTorch's own settings.

    Args:
        training: True for a training.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[1]] = "expandable_segments:True"
    if training:
        import torch

        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.fp32_precision = "tf32"


def seeded(seeds: Iterable[int], device: "torch.device | str") -> "list[torch.Generator]":
    """A generator for each seed, on the device: what one of the CPU draws costs a GPU a copy, and a wait, each time."""
    import torch

    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def device_name(device: "torch.device") -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or device.type


def seconds_of(work: Callable[[], object], device: "torch.device") -> float:
    """Seconds until the work is done, on the GPU too."""
    _finish(device)
    began = perf_counter()
    work()
    _finish(device)
    return perf_counter() - began


def _finish(device: "torch.device") -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def in_turn(
    works: Mapping[Key, Callable[[int], object]],
    runs: int,
    device: "torch.device",
    fewer: Mapping[Key, int] | None = None,
    report: Callable[[int, Key, float], None] | None = None,
    progress: str | None = None,
) -> dict[Key, list[float]]:
    """
    Times several kinds of work side by side: all of them in turn, again and again, so that a change of the machine's
    load meets them alike. The first turn warms up and is not counted.

    Args:
        works: {name: f(turn)}. The turn is -1 for the warm-up, then 0, 1, ...
        runs: Timed runs of each, 1 or more.
        device: Where the work runs.
        fewer: {name: runs} of those with fewer runs, which get no warm-up; 0 leaves one out.
        report: Called as f(turn, name, seconds) after each timed run.
        progress: Title of a progress bar, which a terminal shows; None for no bar.

    Returns:
        {name: seconds of each timed run}.
    """
    wanted = {name: (fewer or {}).get(name, runs) for name in works}
    found: dict[Key, list[float]] = {name: [] for name in works}
    order = [
        (turn, name)
        for turn in range(-1, runs)
        for name in works
        if turn < wanted[name] and (turn >= 0 or wanted[name] >= runs)
    ]
    for turn, name in tqdm(order, desc=progress, unit="run", disable=True if progress is None else None):
        seconds = seconds_of(lambda work=works[name], turn=turn: work(turn), device)
        if turn < 0:
            continue
        found[name].append(seconds)
        if report is not None:
            report(turn, name, seconds)
    return found


def duration(seconds: float) -> str:
    """As people say it: 40 s, 2 min, 1 h 20 min."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
