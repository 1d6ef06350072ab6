"""How much memory there is, and how much a network and an image need."""

import copy
import os
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyrdiff.parts.wrappers import network_takes

# Bytes a pixel of the result, for three channels: what is diffused, the enlarged input, the prediction and its clean
# estimate are there as a whole, and in the end the picture that is written. Measured, with some room.
BYTES_A_PIXEL = 160
SHARE = 0.8  # of the free memory that a run may take
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a device, or for this process if its memory is limited; `None` if nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError):  # no limit
        pass
    return max(min(found), 0) if found else None


class _Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and keeps the most."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


class _AttentionInBlocks(TorchFunctionMode):
    """Attention holds no scores of all pixels with all others, as the kernels of real devices do not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return function(*args, **(kwargs or {}))


def network_bytes(network: torch.nn.Module, channels: int, side: int) -> int | None:
    """
    The most bytes that are alive while the network sees a window of side x side pixels, beside its weights. Nothing is
    computed: a copy without values runs. `None` for a network that cannot be run so.
    """
    try:
        hollow = copy.deepcopy(network).to("meta")
        for module in hollow.modules():  # whoever watches the network does not mean the copy
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        made = {"device": "meta", "dtype": next(hollow.parameters()).dtype}
        with torch.no_grad(), _AttentionInBlocks(), _Peak() as peak:
            sample, given = torch.empty(1, channels, side, side, **made), {}
            if network_takes(network, "low_res"):
                given["low_res"] = torch.empty_like(sample)
            if network_takes(network, "coordinates"):
                given["coordinates"] = torch.empty(1, 2, side, side, **made)
            hollow(sample, 0.5 if "low_res" in given else 1, **given)
    except Exception:  # a network of others may need what is not known here
        return None
    return peak.most
