"""Copies of a run's averages in its folder: which steps are kept, how they are written, and averages made of them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pyrdiff.parts.files import replacing, sweep
from pyrdiff.parts.weights import unusable

from .averages import coefficients

FOLDER = "averages"  # in that of a run
FIRST = 16  # steps between the copies of a run that begins
MOST = 16  # copies of both averages, beside that of the last step
LARGEST_HALF = 65504.0  # that float16 holds
_FILE = re.compile(r"step-([0-9]{7,})\.safetensors")


class Snapshot(NamedTuple):
    """A file with copies of the averages at a step."""

    step: int
    path: Path


def spacing(step: int) -> int:
    """Steps between the copies that are kept when a run has come to this step: at most MOST, evenly spaced."""
    between = FIRST
    while step > MOST * between:
        between *= 2
    return between


def is_due(step: int) -> bool:
    """Whether a copy is to be kept of this step, if it is not the last."""
    return step % spacing(step) == 0


def write_snapshot(run: Path, step: int, averages: Mapping[float, Mapping[str, torch.Tensor]]) -> None:
    """
    Writes a copy, and removes those between the steps that are kept.

    Args:
        run: The run's folder.
        step: Of the copy.
        averages: {length: {name of the parameter: values}}. They are written as float16, which an average of a few
            copies keeps to 3e-4 of a weight's size; larger ones than that holds, as they are.
    """
    tensors = {
        f"{length}/{name}": _halved(value) for length, values in averages.items() for name, value in values.items()
    }
    folder = run / FOLDER
    with replacing(folder / f"step-{step:07d}.safetensors") as beside:
        beside.write_bytes(save(tensors, metadata={"format": "pt"}))
    remove_snapshots(run, lambda at: at % spacing(step) and at != step)


def remove_snapshots(run: Path, unwanted: Callable[[int], bool]) -> None:
    """Removes the copies of the steps for which f(step) is true, and what a killed run left half-written."""
    sweep(run / FOLDER)
    for snapshot in list_snapshots(run):
        if unwanted(snapshot.step):
            snapshot.path.unlink()


def list_snapshots(run: Path) -> list[Snapshot]:
    """The copies in a run's folder, the earliest first."""
    folder = run / FOLDER
    names = [_FILE.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(Snapshot(int(name[1]), folder / name[0]) for name in names if name)


def last_step(run: Path) -> int:
    """The step of the last copy. Raises `ValueError` if there is none."""
    snapshots = list_snapshots(run)
    if not snapshots:
        raise ValueError(f"{str(run / FOLDER)!r}: no copies of averages; expected a run with --keep_averages")
    return snapshots[-1].step


def average(
    run: Path, length: float, parameters: Mapping[str, torch.Tensor], step: int | None = None
) -> dict[str, torch.Tensor]:
    """
    An average of a run's weights, made of the copies in its folder.

    Args:
        run: The folder.
        length: Share of the steps that it extends over, from 0.01 to 0.28 (`averages`).
        parameters: Of the network, whose names and shapes the copies must have.
        step: Where it ends; by default at the last copy.

    Returns:
        {name: float32} for every parameter.

    Raises:
        ValueError: if there are no copies, or they are not of this network, or not finite.
    """
    step = last_step(run) if step is None else step
    kept = [(snapshot, length) for snapshot in list_snapshots(run) for length in _lengths(snapshot.path)]
    weights = coefficients([(snapshot.step, its_length) for snapshot, its_length in kept], length, step)
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in parameters.items()}
    for (snapshot, its_length), weight in zip(kept, weights.tolist(), strict=True):
        if weight:
            _add(total, snapshot.path, its_length, weight)
    averaged = {name: value.float() for name, value in total.items()}
    bad = unusable(averaged)
    if bad:
        raise ValueError(f"{str(run / FOLDER)!r}: {bad[0]} is not finite, or far too large; expected weights")
    return averaged


def _halved(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu().contiguous()
    return value.half() if value.numel() and float(value.abs().max()) <= LARGEST_HALF else value


def _lengths(path: Path) -> list[float]:
    """Of the averages in a file."""
    try:
        with safe_open(path, "pt") as file:
            lengths = sorted({float(key.partition("/")[0]) for key in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: expected copies of averages ({error})") from error
    if not lengths:
        raise ValueError(f"{path}: expected copies of averages, found none")
    return lengths


def _add(total: dict[str, torch.Tensor], path: Path, length: float, weight: float) -> None:
    """Adds a copy, weighted, to a sum."""
    with safe_open(path, "pt") as file:
        there = set(file.keys())
        for name, value in total.items():
            key = f"{length}/{name}"
            shape = tuple(file.get_slice(key).get_shape()) if key in there else None
            if shape != tuple(value.shape):
                has = "lacks" if shape is None else f"has the shape {shape} for"
                raise ValueError(f"{path}: {has} {key}; expected {tuple(value.shape)}, as in the network")
            value.add_(file.get_tensor(key).double(), alpha=weight)
