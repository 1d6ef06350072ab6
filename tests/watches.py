"""
What makes the host wait for an accelerator, or copies between the two, is noted with the place that asked for it: on
one that is not there (torch's "meta" device, which computes shapes and no values), and on a GPU.
"""

import sys
import warnings
from collections import Counter
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyrdiff

DEVICE = torch.device("meta")
PACKAGE = Path(pyrdiff.__file__).parent
ROOMS = tuple(path.resolve() for path in (PACKAGE, PACKAGE / "pipelines", PACKAGE / "schedulers"))
EMBEDDED = 64 * 1024  # bytes: a smaller copy to a GPU travels with its command, so nobody waits for it

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default}
# Their results have a size that depends on values, so a GPU must be waited for to make them.
SIZED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default}
COMPARES = {aten.equal.default}
INDEXES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Wait(NamedTuple):
    """What the host waited for, and the function of the project that asked for it: "parts/noise.py:white_noise"."""

    what: str
    place: str


@cache
def room_of(filename: str) -> str | None:
    """The folder and name of a file of the project, other than a test."""
    path = Path(filename).resolve()
    return f"{path.parent.name}/{path.name}" if any(path.is_relative_to(room) for room in ROOMS) else None


def place() -> str:
    """The innermost function of the project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        room = room_of(frame.f_code.co_filename)
        if room is not None:
            return f"{room}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


def is_there(value: object) -> bool:
    """True for a tensor on the device."""
    return isinstance(value, torch.Tensor) and value.is_meta


def is_here(value: object) -> bool:
    """True for a tensor of one or more dimensions on the CPU. A number that is a tensor may go into a GPU's kernels."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.ndim > 0


class DeviceGenerator(torch.Generator):
    """A generator that says where it is. What it draws on the device has no values."""

    def __new__(cls, device: str | torch.device = "cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


class Operations(TorchDispatchMode):
    """Notes the waits of operations, and refuses what a GPU would refuse."""

    def __init__(self, waits: list[Wait]):
        super().__init__()
        self.waits = waits

    def note(self, what: str) -> None:
        self.waits.append(Wait(what, place()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        values = tree_leaves((args, kwargs))
        there = any(map(is_there, values))
        on_device = there or torch.device(kwargs.get("device") or "cpu").type == DEVICE.type
        if not on_device:
            return function(*args, **kwargs)
        if function in READS:
            self.note("reads a number")
            return torch.ones((), dtype=args[0].dtype).item()
        if function in COMPARES:
            self.note("compares all values")
            return True
        if function in SIZED_BY_VALUES:
            raise RuntimeError(f"{function} on the device: its result has a size that depends on values, at {place()}")
        if function is aten._to_copy.default:
            return self.copied(args[0], kwargs)
        if function is aten.copy_.default and args[0].device != args[1].device:
            self.note("copies to the device" if is_there(args[0]) else "copies to the CPU")
            return args[0] if is_there(args[0]) else args[0].fill_(1)
        if there and any(map(is_here, values)):
            if function not in INDEXES:
                raise RuntimeError(f"{function}: tensors of the device and of the CPU meet, at {place()}")
            self.note("copies an index to the device")
        return function(*args, **kwargs)

    def copied(self, tensor: torch.Tensor, kwargs: dict) -> torch.Tensor:
        target = torch.device(kwargs.get("device") or tensor.device)
        if target.type == tensor.device.type:
            return aten._to_copy.default(tensor, **kwargs)
        if target.type == "cpu":
            self.note("copies to the CPU")
            return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
        if not (kwargs.get("non_blocking") and tensor.nbytes <= EMBEDDED):
            self.note("copies to the device")
        return aten._to_copy.default(tensor, **kwargs)


class Calls(TorchFunctionMode):
    """
    Notes lists and numbers that become tensors of the device, and refuses generators of the other device: operations
    do not tell of them.
    """

    def __init__(self, waits: list[Wait]):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator, device = kwargs.get("generator"), torch.device(kwargs.get("device") or "cpu")
        drawn_there = any(map(is_there, args[:1])) or device.type == DEVICE.type
        if generator is not None and drawn_there and generator.device.type != DEVICE.type:
            raise RuntimeError(f"{function.__name__}: a generator of the CPU draws on the device, at {place()}")
        made = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        made = made and device.type == DEVICE.type
        made = made or (function is torch.Tensor.new_tensor and is_there(args[0]) and "device" not in kwargs)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and is_there(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            made = made or any(isinstance(part, list) for part in index)
        if made:
            self.waits.append(Wait("makes a tensor of numbers", place()))
        return function(*args, **kwargs)


class Watch(ExitStack):
    """Within it, `waits` are what the host waits for, in order."""

    device: torch.device

    def __init__(self):
        super().__init__()
        self.waits: list[Wait] = []

    def counted(self) -> Counter:
        return Counter(self.waits)


class AbsentDevice(Watch):
    """
    Numbers that are read back are 1. Raises `RuntimeError` where a GPU would: tensors of both devices in one operation,
    a generator of the other device.
    """

    device = DEVICE

    def __enter__(self):
        super().__enter__()
        self.callback(setattr, torch, "Generator", torch.Generator)
        torch.Generator = DeviceGenerator
        self.enter_context(Calls(self.waits))
        self.enter_context(Operations(self.waits))
        return self


class PresentDevice(Watch):
    """A GPU, whose own debugging tells of each wait."""

    device = torch.device("cuda")

    def __enter__(self):
        super().__enter__()
        self.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = self.note
        self.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def note(self, message, category, *where) -> None:
        if "synchroniz" in str(message):
            self.waits.append(Wait("waits", place()))


WATCHES = [AbsentDevice, pytest.param(PresentDevice, marks=pytest.mark.gpu)]
