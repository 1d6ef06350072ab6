"""One training in a folder at a time."""

import contextlib
import json
import os
import platform
import weakref
from pathlib import Path

import filelock


class FolderLock:
    """
    Holds a folder for the training of this process, until `release` or the end of the process, however it ends. The
    folder is made if it is missing, and gone again if nothing was written to it.

    Args:
        folder: The output folder.

    Raises:
        ValueError: if another process trains there.
    """

    FILES = (".training.lock", ".training.json")  # the lock, and who has it

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.path, self.owner = (self.folder / name for name in self.FILES)
        made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        # One lock for all of a process: it may train again where it has trained.
        self.lock = filelock.FileLock(self.path, thread_local=False, is_singleton=True)
        self._acquire()
        self.inode = _inode(self.path)
        if self.inode is None:  # held since a folder of this name was removed
            self.lock.release(force=True)
            self._acquire()
            self.inode = _inode(self.path)
        self.owner.write_text(json.dumps({"pid": os.getpid(), "machine": platform.node()}) + "\n", encoding="utf-8")
        self.release = weakref.finalize(self, _release, self.lock, self.path, self.owner, self.inode, made)

    def _acquire(self) -> None:
        try:
            self.lock.acquire(blocking=False)
        except filelock.Timeout:
            raise ValueError(
                f"output_dir={str(self.folder)!r}: {self._whose()} trains there; expected another folder, or its end"
            ) from None

    def is_in_place(self) -> bool:
        """False if the folder was removed, or replaced by another one."""
        return _inode(self.path) == self.inode

    def _whose(self) -> str:
        try:
            owner = json.loads(self.owner.read_text(encoding="utf-8"))
            return f"process {int(owner['pid'])} of {owner['machine']}"
        except (OSError, ValueError, TypeError, KeyError):
            return "another process"


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _release(lock: filelock.BaseFileLock, path: Path, owner: Path, inode: tuple[int, int], made: list[Path]) -> None:
    if not lock.is_locked:  # in a fork, which has none
        return
    last = lock.lock_counter == 1 and _inode(path) == inode
    with contextlib.suppress(OSError):
        if last:
            owner.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    lock.release()
    with contextlib.suppress(OSError):  # a folder that something was written to stays
        for place in made if last else ():
            place.rmdir()
