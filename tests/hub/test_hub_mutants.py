"""Random damage to sound exports (R7): each loads, or gives one error that names a file of the folder in one line."""

import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import pyrdiff
from pyrdiff import hub

COUNT = int(os.environ.get("PYRDIFF_MUTANTS", 250))
FIRST = int(os.environ.get("PYRDIFF_FIRST_MUTANT", 0))  # seed of the first
SECONDS, MEMORY = 5, 2**30  # at most
WORDS = (
    "", "x", "é" * 50, "a" * 20_000, "../../etc/passwd", "/etc/passwd", "__init__", "os", "system", "\x00", "1", "nan",
    "UNet2DModel", "DDIMScheduler", "AutoencoderKL", "DiffusionPipeline", "PyramidalPipeline", "ScaleAutoencoder",
    "linear", "epsilon", "trailing", "gelu", "AttnDownBlock2D", "a\nb", "diffusers", "scheduler", "F32", "BOOL",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 64, 1000, 4096, 99_999, 100_000, 100_001, -100_000, 2**31, 2**63, 10**30, -(10**18),
    0.0, 0.5, 1.5, -0.1, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [None], {"a": {}}, [1, 2], ["a", "b"], [[[[1]]]], {"__class__": "x"})
DEEP = 100_000  # brackets


def value(draw: random.Random) -> object:
    kind = draw.randrange(6)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind == 2:
        return draw.choice(WORDS)
    if kind == 3:
        return deepcopy(draw.choice(OTHERS))
    if kind == 4:
        return [draw.choice(NUMBERS + WORDS) for _ in range(draw.choice((1, 2, 3, 4, 300)))]
    return {draw.choice(WORDS): deepcopy(draw.choice(NUMBERS + WORDS + OTHERS))}


def places(found: object) -> list[tuple]:
    """(container, key) of every value in a JSON value."""
    keys = list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
    return [place for key in keys for place in [(found, key), *places(found[key])]]


def damaged(found: object, draw: random.Random) -> object:
    """A JSON value with one thing in it changed."""
    spots = places(found)
    if not spots or draw.random() < 0.02:
        return value(draw)
    holder, key = draw.choice(spots)
    before, kind = holder[key], draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        del holder[key]
        holder[draw.choice((key + "s", key[:-1], key.upper(), "_" + key, *WORDS[:6]))] = before
    elif kind == 2:
        holder[key] = draw.choice(([before], [before, before], {str(key): before}, str(before)))
    elif kind == 3 and isinstance(before, (int, float)) and not isinstance(before, bool):
        holder[key] = draw.choice(
            (-before, before + 1, before - 1, before * 1000, before / 3, before + 0.5, str(before))
        )
    elif kind == 4 and isinstance(before, list):
        holder[key] = draw.choice((before[:-1], before + before, before[::-1], before * 100))
    elif kind == 5 and isinstance(holder, dict):
        holder[draw.choice(("extra", "_extra", "quantization_config", "auto_map", *WORDS))] = value(draw)
    else:
        holder[key] = value(draw)
    return json.loads(json.dumps(found))  # parts that are in it twice become two


def torn(data: bytes, draw: random.Random) -> bytes:
    """Bytes cut short, changed, put in or repeated."""
    kind, place = draw.randrange(5), draw.randrange(max(len(data), 1))
    if kind == 0:
        return data[:place]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 3))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 2:
        return data[:place] + draw.randbytes(draw.choice((1, 4, 100))) + data[place:]
    if kind == 3:
        return draw.choice((b"", b"null", b"[]", b"{}", b"{" * DEEP, b'{"a":' * DEEP, b"[" * DEEP, data + data))
    return data[:place] + data[place + draw.choice((1, 2, 50)) :]


def mutate(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    if path.suffix == ".json":
        if draw.random() < 0.3:
            data = torn(data, draw)
        else:
            found = json.loads(data)
            for _ in range(draw.choice((1, 1, 1, 2, 4))):
                found = damaged(found, draw)
            data = json.dumps(found).encode()
    else:
        (length,), kind = struct.unpack("<Q", data[:8]), draw.randrange(8)
        header, rest = data[8 : 8 + length], data[8 + length :]
        if kind == 0:
            data = struct.pack("<Q", draw.choice((0, 1, length + 1, 10**8, 10**12, 2**63))) + data[8:]
        elif kind == 1:
            data = data[: draw.randrange(len(data))]
        elif kind == 2:
            header = torn(header, draw)
            data = struct.pack("<Q", len(header)) + header + rest
        else:
            header = json.dumps(damaged(json.loads(header), draw)).encode()
            data = struct.pack("<Q", len(header)) + header + rest
    path.write_bytes(data)


@pytest.fixture(scope="module")
def sound(exports, tmp_path_factory) -> list[Path]:
    """One export of each pipeline, and one in shards."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    hub.export(pyrdiff.load(exports["pyramidal"]), folder, max_shard_size="10KB")
    return [*exports.values(), folder]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def highest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def ended(seconds: float) -> Iterator[None]:
    """Ends what takes longer; time counts that this process had, since others may run beside it."""

    def end(*_):
        raise AssertionError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def as_saved(pipeline: DiffusionPipeline, folder: Path) -> bool:
    """Whether every weight is that of the files: none is left at random."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            kept = {}
            for path in (folder / name).glob("*.safetensors"):
                kept |= load_file(path)
            if kept.keys() != part.state_dict().keys():
                return False
            for key, value in part.state_dict().items():
                if not torch.allclose(value.float(), kept[key].float(), equal_nan=True):
                    return False
    return True


def judge(folder: Path) -> tuple[str, str | None]:
    """("loads" or "refused", what is wrong with how it was refused)."""
    began, peak = time.process_time(), max(highest(), resident())
    try:
        with ended(6 * SECONDS):
            pipeline = pyrdiff.load(folder)
        outcome, fault = "loads", None if as_saved(pipeline, folder) else "loads other weights than the files have"
    except ValueError as error:
        text, outcome, fault = str(error), "refused", None
        if "\n" in text or len(text) > 2000:
            fault = f"{len(text)} characters in {text.count(chr(10)) + 1} lines: {text[:200]!r}"
        elif not re.search(rf"{re.escape(str(folder))}/(\w+/)?[\w.-]+\.(json|safetensors)\b", text):
            fault = f"names no file: {text[:300]!r}"
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        outcome, fault = "refused", f"{type(error).__name__}: {str(error)[:300]!r}"
    if fault is None and time.process_time() - began > SECONDS:
        fault = f"took {time.process_time() - began:.1f} s"
    if fault is None and highest() - peak > MEMORY:
        fault = f"took {(highest() - peak) / 2**20:.0f} MiB"
    return outcome, fault


@pytest.mark.filterwarnings("ignore")
def test_every_mutant_loads_or_is_refused_in_one_line_that_names_a_file(sound, tmp_path, caplog):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    counts, faults = {"loads": 0, "refused": 0}, []
    for seed in range(FIRST, FIRST + COUNT):
        draw = random.Random(seed)
        original, copy = sound[seed % len(sound)], tmp_path / "mutant"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        files = sorted(path for path in copy.rglob("*") if path.suffix in (".json", ".safetensors"))
        path = draw.choice(files)
        mutate(path, draw)
        outcome, fault = judge(copy)
        counts[outcome] += 1
        if fault is not None:
            faults.append(f"mutant {seed}, {original.name}/{path.relative_to(copy)}: {fault}")
            print(faults[-1], flush=True)
        caplog.clear()
        if (seed - FIRST) % 1000 == 999:
            print(f"{seed - FIRST + 1} mutants: {counts}", flush=True)
    print(counts, flush=True)
    torch.set_num_threads(threads)
    assert not faults, "\n".join(faults[:20])
    assert min(counts.values()) > COUNT // 20  # both kinds occur
