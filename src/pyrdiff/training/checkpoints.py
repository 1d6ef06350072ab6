"""Checkpoints that survive kills, full disks and flipped bits.

A checkpoint is a folder `checkpoint-{step}` holding one `{name}.safetensors` per group of tensors, `state.json`, and
`manifest.json` with the size and sha256 of each. It is written beside its final place, read back, and renamed, so the
folder under its final name is always complete. safetensors and JSON only: loading one never executes code.

One process writes to a folder at a time; readers may look at any moment. A run starts with `sweep_strays`, goes on from
`newest_checkpoint`, and calls `prune_checkpoints` after each save.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

FORMAT = "pyrdiff-checkpoint"
FORMAT_VERSION = 1
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
CHUNK_BYTES = 8 * 2**20
MAX_MANIFEST_BYTES = 16 * 2**20

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_STRAY = re.compile(r"\.checkpoint-([0-9]+)\.(writing|removing|replaced)-([1-9][0-9]*)")
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Tensors = dict[str, dict[str, torch.Tensor]]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what lies on disk is not a whole checkpoint; the message names the file."""


def save_checkpoint(folder: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    """Write `folder/checkpoint-{step}` and return its path; it appears under that name only when it is whole.

    An existing checkpoint of this step is kept if it verifies and holds the same content, and replaced otherwise.

    Args:
        folder: where the run's checkpoints lie; created if missing.
        step: number of optimiser steps done, 0 or more.
        tensors: group name → tensor name → tensor, of any shape, on any device, in any dtype that safetensors knows.
            Each is copied to CPU memory, one group at a time, so tensors that share memory are stored apart. Group
            names are letters, digits, `_`, `-` and `.`, and become file names.
        state: what strict JSON can hold: no NaN or infinity, string keys only. Tuples come back as lists.

    Raises:
        ValueError: an argument that cannot be stored as it is; nothing was written.
        CheckpointError: the disk refused (full, read-only, ...) or gave back other bytes than were written. The
            message names the path and the bytes, the temporary folder is gone, earlier checkpoints are untouched.
    """
    _check_arguments(step, tensors)
    state_bytes = _state_bytes(state)
    payload = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) + len(state_bytes)
    folder = Path(folder)
    target = folder / f"checkpoint-{step}"
    temporary = _stray_path(target, "writing")
    try:
        existing = verify_checkpoint(target)["files"]
    except CheckpointError:
        existing = None
    if existing is not None and existing == {n: _entry([data]) for n, data in _contents(tensors, state_bytes)}:
        return target

    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        os.mkdir(temporary)
        files = {}
        for name, data in _contents(tensors, state_bytes):
            files[name] = _write_file(temporary / name, data)
        _write_file(temporary / MANIFEST_FILE, _manifest_bytes(step, files))
        _sync_folder(temporary)
        verify_checkpoint(temporary)
        _put_in_place(temporary, target, keep_old=existing is not None)
    except (OSError, CheckpointError) as error:
        _remove(temporary, best_effort=True)
        raise CheckpointError(
            f"could not write {target}: {payload} bytes of tensors and state were to be written: {error}"
        ) from error
    except BaseException:
        _remove(temporary, best_effort=True)
        raise
    return target


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Read every file of a checkpoint and return its manifest: `step` and, per file, `bytes` and `sha256`.

    Files that the manifest does not list are ignored.

    Raises:
        CheckpointError: names the first file that is missing, truncated, too long, unreadable or altered, or says what
            is wrong with the manifest (not readable, not ours, a format version that this release does not know, or
            a step other than the one in the folder's name).
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        for _ in _verified_chunks(path / name, expected):
            pass
    return manifest


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Load a checkpoint: (tensors on the CPU by group and name, state), as given to `save_checkpoint`.

    Each file is read once: the bytes that are parsed are the bytes whose sha256 was compared.

    Raises:
        CheckpointError: as `verify_checkpoint`.
    """
    path = Path(path)
    tensors, state = {}, {}
    for name, expected in _read_manifest(path)["files"].items():
        data = b"".join(_verified_chunks(path / name, expected))
        try:
            if name == STATE_FILE:
                state = json.loads(data)
            else:
                tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
        except Exception as error:  # safetensors raises its own class, which derives from Exception directly
            raise CheckpointError(f"{path / name} has the recorded sha256 but cannot be parsed: {error}") from error
    return tensors, state


def list_checkpoints(folder: Path) -> list[Path]:
    """All folders named exactly `checkpoint-{step}`, oldest (lowest step) first, whether or not they verify."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir()), key=_step_of)


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


def sweep_strays(folder: Path) -> list[Path]:
    """Clear away what killed runs left behind and return the temporary folders that were removed.

    Only folders with the names that this module gives, and none that belongs to another live process of this machine.
    A checkpoint that was set aside by a replacement which never finished gets its name back.

    Raises:
        CheckpointError: such a checkpoint could not be renamed.
    """
    folder = Path(folder)
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _STRAY.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir() or _belongs_to_another(int(match[3])):
            continue
        checkpoint = folder / f"checkpoint-{match[1]}"
        if match[2] == "replaced" and not checkpoint.exists():
            try:
                os.rename(path, checkpoint)
            except OSError as error:
                raise CheckpointError(f"could not give {path} its name {checkpoint.name} back: {error}") from error
        else:
            _remove(path, best_effort=True)
            if not path.exists():
                removed.append(path)
    return removed


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete the oldest checkpoints until `keep` (1 or more) remain; delete nothing while the newest does not verify.

    Raises:
        ValueError: `keep` is below 1.
        CheckpointError: one could not be removed from its place.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep must be an int of 1 or more, got {keep!r}")
    checkpoints = list_checkpoints(folder)
    if len(checkpoints) <= keep:
        return
    try:
        verify_checkpoint(checkpoints[-1])
    except CheckpointError:
        return
    for path in checkpoints[:-keep]:
        stray = _stray_path(path, "removing")
        try:
            _remove(stray)
            os.rename(path, stray)
        except OSError as error:
            raise CheckpointError(f"could not remove {path}: {error}") from error
        _remove(stray, best_effort=True)


def _check_arguments(step: int, tensors: Tensors) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an int of 0 or more, got {step!r}")
    for group, entries in tensors.items():
        if not isinstance(group, str) or not _GROUP.fullmatch(group):
            raise ValueError(f"tensors: group names are letters, digits, '_', '-' and '.', got {group!r}")
        for name, value in entries.items():
            if not isinstance(name, str):
                raise ValueError(f"tensors[{group!r}]: tensor names must be str, got {name!r}")
            if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
                raise ValueError(f"tensors[{group!r}][{name!r}] must be a dense tensor with data, got {_kind(value)}")


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"layout {value.layout} on device {value.device}"
    return type(value).__name__


def _state_bytes(state: dict[str, Any]) -> bytes:
    if not isinstance(state, dict):
        raise ValueError(f"state must be a dict, got {type(state).__name__}")
    _check_keys(state, "state")
    try:
        return json.dumps(state, allow_nan=False, indent=1).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"state must hold only what strict JSON can: {error}") from error


def _check_keys(value: object, where: str) -> None:
    """`json` turns other keys into strings without a word, so they would come back changed."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: keys must be str, got {key!r}")
            _check_keys(inner, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_keys(inner, f"{where}[{index}]")


def _contents(tensors: Tensors, state_bytes: bytes) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint but for the manifest: name, content."""
    for group, entries in tensors.items():
        copies = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in entries.items()}
        try:
            data = safetensors.torch.save(copies)
        except KeyError as error:
            raise ValueError(f"tensors[{group!r}]: safetensors cannot store dtype {error}") from error
        yield f"{group}.safetensors", data
    yield STATE_FILE, state_bytes


def _entry(chunks: list[bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return {"bytes": sum(map(len, chunks)), "sha256": digest.hexdigest()}


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
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {manifest.get('version')!r}; this release reads version {FORMAT_VERSION}"
        )
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or not isinstance(files, dict) or STATE_FILE not in files:
        raise CheckpointError(f"{file} is damaged: 'step' or 'files' is missing or of another type")
    for name, entry in files.items():
        if name != STATE_FILE and not (_GROUP.fullmatch(name) and name.endswith(".safetensors")):
            raise CheckpointError(f"{file} is damaged: {name!r} is not the name of a checkpoint's file")
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
            raise CheckpointError(f"{file} is damaged: the entry of {name!r} has no size")
        if not isinstance(entry.get("sha256"), str) or not _SHA256.fullmatch(entry["sha256"]):
            raise CheckpointError(f"{file} is damaged: the entry of {name!r} has no sha256")
    if data != _manifest_bytes(step, files):
        raise CheckpointError(f"{file} is damaged: its content differs from its own sha256")
    if _CHECKPOINT.fullmatch(path.name) and step != _step_of(path):
        raise CheckpointError(f"{file} is of step {step}, which is not the step in the folder's name")
    return manifest


def _verified_chunks(file: Path, expected: dict[str, Any]) -> Iterator[bytes]:
    """Yield a file's bytes; raises CheckpointError before (size) or after (sha256) the last if they are not those."""
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
    """Write and fsync a new file; returns its manifest entry, computed from the bytes handed to the disk."""
    view = memoryview(data)
    digest = hashlib.sha256()
    with open(file, "xb") as handle:
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            _write(handle, chunk)
            digest.update(chunk)
        handle.flush()
        os.fsync(handle.fileno())
    return {"bytes": len(view), "sha256": digest.hexdigest()}


def _write(handle: BinaryIO, data: memoryview) -> None:
    handle.write(data)


def _sync_folder(folder: Path) -> None:
    """Make a folder's entries durable; only POSIX can open a folder for this."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path, keep_old: bool) -> None:
    """Rename `temporary` to `target`; what lies there is set aside first, and put back if the rename fails.

    A good old one (`keep_old`) is set aside under a name that `sweep_strays` gives back to it after a kill in between.
    """
    aside = None
    if os.path.lexists(target):
        aside = _stray_path(target, "replaced" if keep_old else "removing")
        _remove(aside)
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        if aside is not None:
            os.rename(aside, target)
        raise
    _sync_folder(target.parent)
    if aside is not None:
        _remove(aside, best_effort=True)


def _stray_path(target: Path, purpose: str) -> Path:
    return target.parent / f".{target.name}.{purpose}-{os.getpid()}"


def _remove(path: Path, best_effort: bool = False) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=best_effort)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        if not best_effort:
            raise


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _belongs_to_another(pid: int) -> bool:
    """Whether `pid` is another live process. Not being able to tell counts as yes."""
    if pid == os.getpid():
        return False
    if os.name != "posix":  # elsewhere os.kill(pid, 0) would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
