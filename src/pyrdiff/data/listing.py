"""What a folder of images holds: what is taken, and what is not."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pyrdiff.parts.outputs import written_by_runs

from .images import extensions

NAMED = 8  # endings and folders that are named, the most frequent ones
HEIF = {".heic", ".heif", ".hif"}
TO_READ_HEIF = "pip install pillow-heif to read .heic"


class Listing(NamedTuple):
    """
    The files of a folder and the folders below it, hidden ones left out.

    Attributes:
        folder: The folder.
        images: The image files, sorted by relative POSIX path.
        of_runs: Image files that are left out, since runs of ours wrote them.
        others: What else is there.
    """

    folder: Path
    images: list[Path]
    of_runs: list[Path]
    others: list[Path]

    def __str__(self) -> str:
        """One line: what is taken and what is not, by ending and by folder."""
        taken = f"{self.folder}: {len(self.images)} images taken ({_counted(map(_ending, self.images))}"
        folders = [path.relative_to(self.folder).parts[0] + "/" for path in self.images if path.parent != self.folder]
        if folders:
            there = len(self.images) - len(folders)
            taken += f"; from {_counted(folders)}" + (f", {there} beside" if there else "")
        left = [_counted(map(_ending, self.others))] if self.others else []
        left += [f"{len(self.of_runs)} that runs of pyrdiff wrote"] if self.of_runs else []
        line = taken + ")" + (f"; not taken: {', '.join(left)}" if left else "")
        if any(path.suffix.lower() in HEIF for path in self.others):
            line += f" ({TO_READ_HEIF})"
        return line


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The image files in `folder` and the folders below it, sorted by relative POSIX path.

    A file counts by its extension, upper or lower case. Hidden files and folders are left out. Links are followed, but
    not back into a folder that contains them; a broken link counts as a file, so that it shows up as a bad image.

    Raises:
        ValueError: when `folder` does not exist, is not a folder or has no image.
    """
    return look_into(folder).images


def look_into(folder: str | os.PathLike, leave_out_runs: bool = False) -> Listing:
    """
    As `list_images`, and what else the folder holds.

    Args:
        folder: The folder.
        leave_out_runs: Whether images that runs of ours wrote are left out: sample grids, enlarged pictures beside
            their originals. Where a folder has no other images, these were meant and are taken.

    Raises:
        ValueError: as `list_images`.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"folder={str(folder)!r} does not exist: expected a folder of images")
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r}: expected a folder of images")
    files = sorted(_files(folder), key=lambda path: path.relative_to(folder).as_posix())
    images = [path for path in files if path.suffix.lower() in extensions()]
    others = [path for path in files if path.suffix.lower() not in extensions()]
    of_runs = set(written_by_runs(images)) if leave_out_runs else set()
    if len(of_runs) == len(images):
        of_runs = set()
    found = Listing(
        folder, [path for path in images if path not in of_runs], [path for path in images if path in of_runs], others
    )
    if not images:
        there = f", only {_counted(map(_ending, others))}" if others else ""
        heif = f" ({TO_READ_HEIF})" if any(path.suffix.lower() in HEIF for path in others) else ""
        raise ValueError(
            f"folder={str(folder)!r} has no image{there}: expected files such as .png, .jpg, .webp, .tif{heif}"
        )
    return found


def _files(folder: Path) -> list[Path]:
    found = []

    def walk(path: Path, parents: frozenset[str]) -> None:
        real = os.path.realpath(path)
        if real in parents:
            return
        for entry in path.iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                walk(entry, parents | {real})
            elif entry.is_file() or entry.is_symlink():
                found.append(entry)

    walk(folder, frozenset())
    return found


def _ending(path: Path) -> str:
    return path.suffix.lower() or "without ending"


def _counted(names: Iterable[str]) -> str:
    """How often each name comes, the most frequent ones first."""
    counts = Counter(names).most_common()
    rest = [f"{sum(count for _, count in counts[NAMED:])} others"] if len(counts) > NAMED else []
    return ", ".join([*(f"{count} {name}" for name, count in counts[:NAMED]), *rest])
