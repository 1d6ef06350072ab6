"""
The rule for files that commands write where files of others may lie.

What a run of ours wrote is no input of a run that meets it among other files (`written_by_runs`). A run replaces only
what it made itself, unless `--overwrite` is given (`Outputs.check`, `Outputs.replacing`). What is skipped because it is
there is what the run would have made (`Outputs.has`).

A run keeps a record in each folder that it writes to: `.pyrdiff.jsonl`, a line a file with its size, its SHA-256, and
the run. The line is there before the file has its name; a file that was changed since is not the run's. Runs are the
same if their recipe is: the command, and the settings that decide what is in the files. So a command that was killed
goes on when it is given again.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pyrdiff.parts.files import replacing

RECORD = ".pyrdiff.jsonl"
MAX_SETTINGS_BYTES = 2**20
CHUNK_BYTES = 2**20
# What a training keeps in its folder; other folders in it are the user's.
OF_TRAINING = re.compile("samples|pipeline|finished|checkpoint-[0-9]+")


class Made(NamedTuple):
    """A file as a run made it: its size, the SHA-256 of its content, and the run."""

    bytes: int
    sha256: str
    run: str


class Outputs:
    """
    The files of a run.

    Args:
        command: Which makes them, such as "sample".
        recipe: The settings that decide what is in the files, as JSON values: runs of the same recipe are the same run.
        overwrite: Whether it may replace other files.
    """

    def __init__(self, command: str, recipe: Mapping[str, object], overwrite: bool = False):
        text = json.dumps([command, recipe], sort_keys=True, default=str)
        self.run = f"{command} {hashlib.sha256(text.encode()).hexdigest()}"
        self.overwrite = overwrite

    def has(self, path: str | os.PathLike) -> bool:
        """True if this run made the file, now or earlier, and it is as it was made."""
        return made_by(path) == self.run

    def check(self, paths: Iterable[str | os.PathLike], flag: str) -> None:
        """
        To be called before any work.

        Args:
            paths: The files that are to be written.
            flag: The flag that says where, for the message.

        Raises:
            ValueError: if one is there already, and this run may not replace it.
        """
        refused = [path for path in paths if not self._may_write(Path(path))]
        if refused:
            others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            raise ValueError(
                f"--{flag}: {refused[0]}{others} is there and was not made by this run; expected another place, or "
                "--overwrite"
            )

    @contextmanager
    def replacing(self, path: str | os.PathLike) -> Iterator[Path]:
        """
        As `pyrdiff.data.replacing`: a path beside `path` to write the file to. It is put on record and renamed.

        Raises:
            ValueError: if another file has come to `path` that this run may not replace.
        """
        path = Path(path)
        with replacing(path) as beside:
            yield beside
            self.check([path], "output")
            _put_on_record(path, Made(beside.stat().st_size, _sha256(beside), self.run))

    def _may_write(self, path: Path) -> bool:
        if path.is_dir():
            return False
        return self.overwrite or not os.path.lexists(path) or self.has(path)


def made_by(path: str | os.PathLike) -> str | None:
    """The run of ours that made a file, by the record beside it; None if it is of others, or was changed since."""
    path = Path(path)
    made = on_record(path.parent).get(path.name)
    try:
        same = made is not None and path.stat().st_size == made.bytes and _sha256(path) == made.sha256
    except OSError:
        return None
    return made.run if same else None


def on_record(folder: Path) -> dict[str, Made]:
    """The files that runs of ours made in a folder, by name, as they were then."""
    return {name: made for name, made in _read(str(folder)).items() if os.path.lexists(folder / name)}


def written_by_runs(paths: Iterable[Path]) -> list[Path]:
    """Those of the files that commands of ours wrote, or that lie where a training of ours keeps its own files."""
    of_training: dict[Path, bool] = {}
    for folder in {path.parent for path in paths}:
        kept = [place.parent for place in (folder, *folder.parents) if OF_TRAINING.fullmatch(place.name)]
        of_training[folder] = any(map(is_training, kept))
    return [path for path in paths if of_training[path.parent] or made_by(path) is not None]


def is_training(folder: Path) -> bool:
    """True if it is the folder of a training of ours."""
    file = folder / "settings.json"
    try:
        if file.stat().st_size > MAX_SETTINGS_BYTES:
            return False
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and {"output_dir", "train_data_dir", "max_train_steps"} <= set(settings)


def _put_on_record(path: Path, made: Made) -> None:
    line = json.dumps({"file": path.name, **made._asdict()}).encode() + b"\n"
    with open(path.with_name(RECORD), "a+b") as record:
        if record.seek(0, os.SEEK_END) > 0:
            record.seek(-1, os.SEEK_END)
            line = line if record.read() == b"\n" else b"\n" + line  # after a line that was cut off
        record.write(line)


def _read(folder: str) -> dict[str, Made]:
    """The lines of a record, those of one file's earlier versions left out."""
    try:
        stat = os.stat(os.path.join(folder, RECORD))
    except OSError:
        return {}
    return _parsed(folder, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _parsed(folder: str, size: int, mtime_ns: int) -> dict[str, Made]:
    found = {}
    with open(os.path.join(folder, RECORD), "rb") as record:
        for line in record:
            try:
                entry = json.loads(line)
                name = entry.pop("file")
                found[name] = Made(**entry)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # cut off, or not ours
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
