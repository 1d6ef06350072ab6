"""Checkpoints that survive kills, full disks and flipped bits.

A checkpoint is a folder `checkpoint-{step}` with one `{name}.safetensors` per group of tensors, `state.json`, and
`manifest.json` with the size and sha256 of each. It is written beside its final place, read back, and renamed, so the
folder under its final name is always complete. safetensors and JSON only: loading one never executes code.

One process writes to a folder at a time; readers may look at any moment. A run starts with `parts.files.sweep`, goes on
from `newest_checkpoint`, and calls `prune_checkpoints` after each save.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from pyrdiff.parts.files import remove_folder, replacing_folder
from pyrdiff.parts.json_files import parse_json

FORMAT = "pyrdiff-checkpoint"
FORMAT_VERSION = 1
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
CHUNK_BYTES = 8 * 2**20
MAX_MANIFEST_BYTES = 16 * 2**20

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Tensors = dict[str, dict[str, torch.Tensor]]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not whole; the message names the file."""


def save_checkpoint(folder: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    """
    Writes `folder/checkpoint-{step}`; it has that name only when it is whole. An earlier one of this step is replaced.

    Args:
        folder: Where the run's checkpoints lie; made if missing.
        step: Number of optimiser steps done, 0 or more.
        tensors: Group name → tensor name → tensor, of any shape, on any device, in any dtype that safetensors knows.
            Tensors that share memory are stored apart. Group names are letters, digits, `_`, `-` and `.`.
        state: What JSON gives back as it was: string keys, lists, no tuples, no NaN or infinity.

    Returns:
        The checkpoint.

    Raises:
        ValueError: for an argument that cannot be stored as it is; nothing is left of it.
        CheckpointError: if the disk refused (full, read-only, ...) or gave back other bytes than were written. The
            message names the path and the bytes, the temporary folder is gone, earlier checkpoints are untouched.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step={step!r}: expected a whole number from 0 up")
    for group in tensors:
        if not isinstance(group, str) or not _GROUP.fullmatch(group):
            raise ValueError(f"tensors: expected names of letters, digits, '_', '-' and '.', got {group!r}")
    state_bytes = _state_bytes(state)
    target = Path(folder) / f"checkpoint-{step}"
    files = {}
    try:
        with replacing_folder(target) as beside:
            os.mkdir(beside)
            for name, group in tensors.items():
                file = f"{name}.safetensors"
                files[file] = _write_file(beside / file, _tensor_bytes(name, group))
            files[STATE_FILE] = _write_file(beside / STATE_FILE, state_bytes)
            _write_file(beside / MANIFEST_FILE, _manifest_bytes(step, files))
            verify_checkpoint(beside)
    except (OSError, CheckpointError) as error:
        size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values()) + len(state_bytes)
        raise CheckpointError(
            f"could not write {target}: {size} bytes of tensors and state were to be written: {error}"
        ) from error
    return target


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """
    Reads every file of a checkpoint. Files that the manifest does not list are ignored.

    Returns:
        The manifest: `step` and, in `files`, the `bytes` and `sha256` of each.

    Raises:
        CheckpointError: names the first file that is missing, truncated, too long, unreadable or altered, or says what
            is wrong with the manifest (not readable, not ours, a format version that this release does not know, or
            a step other than the one in the folder's name).
    """
    manifest = _read_manifest(Path(path))
    for name, expected in manifest["files"].items():
        for _ in _verified_chunks(Path(path) / name, expected):
            pass
    return manifest


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """
    Loads a checkpoint. Each file is read once: the bytes that are parsed are those whose sha256 was compared.

    Returns:
        The tensors, on the CPU, by group and name, and the state, as given to `save_checkpoint`.

    Raises:
        CheckpointError: as `verify_checkpoint`. What the values are worth, `resuming` checks.
    """
    tensors, state = {}, {}
    for name, expected in _read_manifest(Path(path))["files"].items():
        file = Path(path) / name
        data = b"".join(_verified_chunks(file, expected))
        try:
            if name == STATE_FILE:
                state = parse_json(data, str(file))
            else:
                tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
        except Exception as error:  # safetensors raises its own class, which derives from Exception directly
            raise CheckpointError(f"{file} has the recorded sha256 but cannot be parsed: {error}") from error
    return tensors, state


def step_of_checkpoint(path: Path) -> int:
    """The step that a checkpoint's manifest says; `CheckpointError` if that cannot be read."""
    return _read_manifest(Path(path))["step"]


def list_checkpoints(folder: Path) -> list[Path]:
    """All folders named exactly `checkpoint-{step}`, oldest (lowest step) first, whether or not they verify."""
    paths = Path(folder).iterdir() if Path(folder).is_dir() else []
    return sorted((path for path in paths if _CHECKPOINT.fullmatch(path.name) and path.is_dir()), key=_step_of)


def newest_checkpoint(folder: Path, on_damaged: Callable[[Path, str], None] | None = None) -> Path | None:
    """The checkpoint of the highest step that verifies, or None; `on_damaged(path, message)` hears of those above."""
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            if on_damaged is not None:
                on_damaged(path, str(error))
        else:
            return path
    return None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """
    Deletes the oldest checkpoints until `keep` (1 or more) remain, and nothing while the newest does not verify.

    Raises:
        ValueError: if `keep` is below 1.
        CheckpointError: if one could not be removed from its place.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep={keep!r}: expected a whole number from 1 up")
    paths = list_checkpoints(folder)
    if len(paths) <= keep or newest_checkpoint(folder) != paths[-1]:
        return
    for path in paths[:-keep]:
        try:
            remove_folder(path)
        except OSError as error:
            raise CheckpointError(f"could not remove {path}: {error}") from error


# The content.


def _state_bytes(state: dict[str, Any]) -> bytes:
    try:
        data = json.dumps(state, allow_nan=False, indent=1).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"state: expected only what strict JSON can hold: {error}") from error
    if not isinstance(state, dict) or json.loads(data) != state:
        raise ValueError("state: expected a dict that JSON gives back as it was: with string keys, without tuples")
    return data


def _tensor_bytes(name: str, group: dict[str, torch.Tensor]) -> bytes:
    try:
        copies = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in group.items()}
        return safetensors.torch.save(copies)
    except Exception as error:  # of torch and safetensors, of many kinds
        raise ValueError(f"tensors[{name!r}]: expected dense tensors that safetensors can store: {error}") from error


def _manifest_bytes(step: int, files: dict[str, dict[str, Any]]) -> bytes:
    """The manifest ends with its own sha256, so a flipped bit in it is told from one in the file that it describes."""
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(manifest).encode("utf-8")).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode("utf-8")


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_FILE
    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{file} is not a manifest of ours: more than {MAX_MANIFEST_BYTES} bytes")
        data = file.read_bytes()
        manifest = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a manifest of ours: expected a JSON object with format {FORMAT!r}")
    version, step, files = (manifest.get(key) for key in ("version", "step", "files"))
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format version {version!r}; this release reads version {FORMAT_VERSION}")
    if type(step) is not int or not isinstance(files, dict) or STATE_FILE not in files:
        raise CheckpointError(f"{file} is damaged: 'step' or 'files' is missing or of another type")
    for name, entry in files.items():
        if not _is_entry(name, entry):
            raise CheckpointError(f"{file} is damaged: {name!r}: expected a checkpoint's file, its bytes and sha256")
    if data != _manifest_bytes(step, files):
        raise CheckpointError(f"{file} is damaged: its content differs from its own sha256")
    if _CHECKPOINT.fullmatch(path.name) and step != _step_of(path):
        raise CheckpointError(f"{file} is of step {step}, which is not the step in the folder's name")
    return manifest


def _is_entry(name: str, entry: Any) -> bool:
    named = name == STATE_FILE or (_GROUP.fullmatch(name) and name.endswith(".safetensors"))
    sized = isinstance(entry, dict) and type(entry.get("bytes")) is int
    return bool(named and sized and _SHA256.fullmatch(str(entry.get("sha256"))))


# Files and folders.


def _verified_chunks(file: Path, expected: dict[str, Any]) -> Iterator[bytes]:
    """Yields a file's bytes; raises CheckpointError before (size) or after (sha256) the last if they are not those."""
    digest = hashlib.sha256()
    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            kind = "truncated" if size < expected["bytes"] else "too long"
            raise CheckpointError(f"{file} is {kind}: {size} bytes, expected {expected['bytes']}")
        with open(file, "rb") as handle:
            while chunk := handle.read(CHUNK_BYTES):
                digest.update(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if digest.hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{file} is damaged: sha256 {digest.hexdigest()}, expected {expected['sha256']}")


def _write_file(file: Path, data: bytes) -> dict[str, Any]:
    """Writes a new file; returns its manifest entry, made from the bytes in memory."""
    with open(file, "xb") as handle:
        for start in range(0, len(data), CHUNK_BYTES):
            _write(handle, memoryview(data)[start : start + CHUNK_BYTES])
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write(handle: BinaryIO, data: memoryview) -> None:
    handle.write(data)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
