"""
Writing files and folders that are whole or absent: beside the final place first, then renamed.

What lies beside is hidden, and named after the process that writes it: `.NAME.writing-PID-MACHINE-NUMBER`. A process
that is killed leaves it behind. The next one that writes to the same folder sweeps it away.
"""

import contextlib
import ctypes
import hashlib
import itertools
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:6]  # numbers of processes mean something on one only
NAME_BYTES = 255  # that a name may have
# Earlier releases had neither machine nor number in it.
STRAY = re.compile(r"\.(.+)\.(writing|removing|replaced)-([1-9][0-9]*)(?:-([0-9a-f]{6})-[0-9]+)?", re.DOTALL)
OS_ERROR = re.compile(r"\(os error ([0-9]+)\)")  # how errors of Rust, such as SafetensorError, have the number

_numbers = itertools.count()
_ours: set[str] = set()  # what this process is writing
_swept: set[tuple[int, str]] = set()  # folders that this process has swept


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    A path beside `path` to write a file to. It takes the name `path` when the block ends well; otherwise it is removed,
    and what was at `path` stays.

    Raises:
        OSError: if the disk refuses; the message names the path and the bytes.
    """
    path = Path(path)
    with _beside(path, _size_of_file) as beside:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)


@contextmanager
def replacing_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A path beside `folder` to make a folder at. It takes the name `folder` when the block ends well; otherwise it is
    removed, and the earlier folder stays. The caller writes, and verifies, inside the block.

    Where the system can exchange two names (Linux, on its own disks), there is no moment without a folder of that name.

    Raises:
        OSError: if the disk refuses; the message names the path and the bytes.
    """
    folder = Path(folder)
    with _beside(folder, _size_of_folder) as beside:
        yield beside
        _sync_tree(beside)
        if not folder.is_dir():
            os.rename(beside, folder)
        elif not _exchanged(beside, folder):
            _replace_in_two_steps(beside, folder)
        _sync_folder(folder.parent)


def remove_folder(folder: str | os.PathLike) -> None:
    """Removes a folder; under its name it is whole until it is gone."""
    with _stray(Path(folder), "removing") as beside:
        os.rename(folder, beside)


def sweep(folder: str | os.PathLike) -> list[Path]:
    """
    Clears away what killed processes of this machine left in a folder. What one of them had set aside to put something
    else in its place, and did not come to, gets its name back.

    Returns:
        What was removed.

    Raises:
        OSError: if something could not get its name back.
    """
    removed = []
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []:
        match = STRAY.fullmatch(path.name)
        if match is None or path.is_symlink() or _is_in_use(path, int(match[3]), match[4]):
            continue
        final = path.with_name(match[1])
        if match[2] == "replaced" and not final.exists():
            os.rename(path, final)
            continue
        with contextlib.suppress(OSError):
            _remove(path)
            removed.append(path)
    return removed


@contextmanager
def _beside(path: Path, size_of: Callable[[Path], int]) -> Iterator[Path]:
    """A hidden path beside `path`, which is gone after the block; errors of the disk in the block name `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent)
    with _stray(path, "writing") as beside:
        try:
            yield beside
        except Exception as error:
            number = _disk_error(error, (beside, path))
            if not number:
                raise
            written = f"{size_of(beside)} bytes were written, {_free_bytes(path.parent)} are free"
            raise OSError(number, f"{os.strerror(number)} ({written})", str(path)) from error


def _disk_error(error: Exception, places: tuple[Path, ...]) -> int | None:
    """The number of an error of the operating system that is about one of these places, or about none in particular."""
    if not isinstance(error, OSError):
        match = OS_ERROR.search(str(error))
        return int(match[1]) if match else None
    about = error.filename
    elsewhere = isinstance(about, (str, bytes)) and not any(map(Path(os.fsdecode(about)).is_relative_to, places))
    return None if elsewhere else error.errno


@contextmanager
def _stray(path: Path, kind: str) -> Iterator[Path]:
    """A hidden name beside `path` for this process; what has it after the block is removed."""
    stray = _hidden(path, kind)
    _ours.add(str(stray))
    try:
        yield stray
    finally:
        try:
            with contextlib.suppress(OSError):  # what cannot be removed now is swept later
                _remove(stray)
        finally:
            _ours.discard(str(stray))


def _hidden(path: Path, kind: str) -> Path:
    ending = f".{kind}-{os.getpid()}-{MACHINE}-{next(_numbers)}"
    name = os.fsencode(path.name)[: NAME_BYTES - 1 - len(ending)]
    return path.with_name("." + os.fsdecode(name) + ending)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two names in one step. False, and nothing is done, where the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and not renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)


def _replace_in_two_steps(beside: Path, folder: Path) -> None:
    """In between, the earlier folder has a hidden name; `sweep` gives it its own one back if the process is killed."""
    before = _hidden(folder, "replaced")
    os.rename(folder, before)
    try:
        os.rename(beside, folder)
    finally:
        if not folder.exists():
            os.rename(before, folder)
    shutil.rmtree(before, ignore_errors=True)


def _sweep_once(folder: Path) -> None:
    """The first time that this process writes to a folder."""
    place = (os.getpid(), os.path.realpath(folder))
    if place not in _swept:
        _swept.add(place)
        with contextlib.suppress(OSError):
            sweep(folder)


def _free_bytes(folder: Path) -> int:
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free


def _is_in_use(path: Path, pid: int, machine: str | None) -> bool:
    """True if a stray is of a live process, or if that cannot be told."""
    if machine not in (None, MACHINE) or str(path) in _ours:
        return True
    if pid == os.getpid():  # of an earlier process of this number, as all are the first one in a container
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


def _size_of_file(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _size_of_folder(folder: Path) -> int:
    return sum(map(_size_of_file, folder.rglob("*")))


def _sync_tree(folder: Path) -> None:
    """Makes a folder and what is in it durable."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; only POSIX can open a folder for this."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
