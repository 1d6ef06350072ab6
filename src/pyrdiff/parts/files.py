"""Writing files and folders that are whole or absent: beside the final place first, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    A path beside `path` to write a file to. It takes the name `path` when the block ends well; otherwise it is removed,
    and what was at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A path beside `folder` to make a folder at. It takes the name `folder` when the block ends well; otherwise it is
    removed, and the earlier folder stays. The caller writes, and verifies, inside the block.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    before = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        yield beside
        if folder.exists():
            folder.rename(before)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if before.exists() and not folder.exists():
            before.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
