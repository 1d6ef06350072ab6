"""Whether a checkpoint fits a run: its hashes say that it is as it was written, not who wrote it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyrdiff.parts.settings import is_whole
from pyrdiff.parts.weights import unusable

from .checkpoints import STATE_FILE, CheckpointError, Tensors

MOST_STEPS = 10**9
AVERAGE = "average-"  # groups of tensors of a checkpoint that begin so are averages kept for `pyrdiff ema`
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, beside `step`


def check_state(path: Path, step: int, state: object, averaged: bool) -> None:
    """
    Refuses a state that no run of ours has.

    Args:
        path: The checkpoint.
        step: Its step, by its manifest.
        state: What its state.json holds.
        averaged: True if it has the average of the weights.

    Raises:
        CheckpointError: the file and the key are named.
    """

    def expect(key: str, good: bool, expected: str) -> None:
        if not good:
            raise CheckpointError(f"{path / STATE_FILE}: {key}={_short(state.get(key))}: expected {expected}")

    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE_FILE}: expected a JSON object, found {type(state).__name__}")
    expect("step", is_whole(state.get("step")) and state["step"] == step, f"{step}, the checkpoint's step")
    expect("step", 0 <= step <= MOST_STEPS, f"a whole number from 0 to {MOST_STEPS}")
    total = state.get("total_steps", step)
    expect(
        "total_steps", is_whole(total) and step <= total <= MOST_STEPS, f"a whole number from {step} to {MOST_STEPS}"
    )
    for key in ("seconds", "step_seconds"):
        expect(key, _is_number(state.get(key)) and state[key] >= 0, "a number from 0 up")
    expect("identity", isinstance(state.get("identity"), dict), "an object")
    ema, scaler = state.get("ema"), state.get("scaler")
    count = ema.get("optimization_step") if isinstance(ema, dict) else None
    good = is_whole(count) and 0 <= count <= step or (ema is None and not averaged)
    expect("ema", good, f"an object with optimization_step from 0 to {step}")
    numbers = scaler.values() if isinstance(scaler, dict) else ()
    expect("scaler", scaler is None or numbers and all(map(_is_number, numbers)), "null or an object of numbers")
    expect("scaler", scaler is None or scaler.get("scale", 0) > 0, "a scale above 0")


def check_tensors(
    path: Path, step: int, tensors: Tensors, kept: Mapping[str, torch.Tensor], trained: Mapping[str, torch.nn.Parameter]
) -> None:
    """
    Refuses tensors that are not those of a network in training: by names, shapes, kinds and values.

    Args:
        path: The checkpoint.
        step: Its step.
        tensors: What it holds: "model", "optimizer" and the averages that were kept.
        kept, trained: What the run keeps of its network, and which weights it trains.

    Raises:
        CheckpointError: the file and the tensor are named.
    """
    averages = [name for name in tensors if name == "ema" or name.startswith(AVERAGE)]
    unknown = sorted(set(tensors) - {"model", "optimizer", *averages})
    if unknown or not {"model", "optimizer"} <= set(tensors):
        raise CheckpointError(f"{path}: holds {_short(sorted(tensors))}: expected model, optimizer and averages")
    _check_group(path / "model.safetensors", tensors["model"], kept)
    for name in averages:
        _check_group(path / f"{name}.safetensors", tensors[name], trained)
    _check_adamw(path / "optimizer.safetensors", step, tensors["optimizer"], list(trained.values()))


def _check_group(file: Path, saved: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    for text, keys in (("lacks", set(wanted) - set(saved)), ("has unknown", set(saved) - set(wanted))):
        if keys:
            raise CheckpointError(f"{file}: {text} {len(keys)} tensors, such as {_short(min(keys))}")
    for key, like in wanted.items():
        _check_like(file, key, saved[key], like)
    _check_values(file, saved)


def _check_adamw(
    file: Path, step: int, saved: Mapping[str, torch.Tensor], parameters: list[torch.nn.Parameter]
) -> None:
    """Each parameter has all of AdamW's tensors, or none: one that no loss reaches is not stepped."""
    stepped = {name.split(".", 1)[0] for name in saved}
    wanted = {str(index): like for index, like in enumerate(parameters) if str(index) in stepped}
    expected = {f"{index}.{key}" for index in wanted for key in ("step", *MOMENTS)}
    for text, keys in (("lacks", expected - set(saved)), ("has unknown", set(saved) - expected)):
        if keys:
            raise CheckpointError(f"{file}: {text} {len(keys)} tensors, such as {_short(min(keys))}")
    for index, like in wanted.items():
        for key in MOMENTS:
            _check_like(file, f"{index}.{key}", saved[f"{index}.{key}"], like)
        count = saved[f"{index}.step"]
        if count.ndim or not count.is_floating_point() or not 0 <= float(count) <= step or float(count) % 1:
            raise CheckpointError(f"{file}: {index}.step: expected a whole number from 0 to {step}")
        if bool((saved[f"{index}.exp_avg_sq"] < 0).any()):
            raise CheckpointError(f"{file}: {index}.exp_avg_sq has values below 0; expected squares")
    for name, value in saved.items():  # squares may be larger than weights
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{file}: {name} has values that are not finite")


def _check_like(file: Path, key: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.shape != like.shape:
        raise CheckpointError(f"{file}: {key} has the shape {tuple(value.shape)}; expected {tuple(like.shape)}")
    if value.is_floating_point() != like.is_floating_point():
        raise CheckpointError(f"{file}: {key} has numbers of the type {value.dtype}; expected {like.dtype}")


def _check_values(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    bad = unusable(tensors)
    if bad:
        raise CheckpointError(f"{file}: {bad[0]} has values that are not finite, or far too large for weights")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."
