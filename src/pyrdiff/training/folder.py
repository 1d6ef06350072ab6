"""The folder of a run: its settings, its log, its checkpoints, and where it goes on from."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyrdiff.parts.files import replacing, replacing_folder
from pyrdiff.parts.outputs import is_training
from pyrdiff.parts.weights import refuse_unusable

from . import checkpoints
from .lock import FolderLock
from .resuming import check_state
from .settings import TrainingSettings
from .snapshots import remove_snapshots, write_snapshot

FINISHED = "finished"  # folder of a network that another method builds on


class Saved(NamedTuple):
    """A checkpoint that was read."""

    path: Path
    tensors: checkpoints.Tensors
    state: dict[str, Any]


def refuse_other_folder(folder: Path, settings: TrainingSettings, within: Iterable[Path] = ()) -> None:
    """
    Refuses an output folder that is something else than a run of ours.

    Args:
        folder: The output folder.
        settings: Those of the run.
        within: Folders of other runs, which may lie in it.

    Raises:
        ValueError: if it holds other things, or checkpoints that the run is not to resume from.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r}: expected a folder, found a file")
    has_checkpoints = bool(checkpoints.list_checkpoints(folder))
    if has_checkpoints and settings.resume_from_checkpoint == "none":
        raise ValueError(f"output_dir={str(folder)!r}: holds checkpoints; expected a new folder, or resume 'latest'")
    there = folder.iterdir() if folder.is_dir() else ()
    used = any(path not in within and path.name not in FolderLock.FILES for path in there)
    if used and not has_checkpoints and not is_training(folder):
        raise ValueError(f"output_dir={str(folder)!r}: expected a new, an empty or an earlier run's folder")


class RunFolder:
    """
    What a run keeps on disk. One process writes; all of them read.

    Args:
        path: The folder.
        settings: Those of the run.
        lock: The lock on the folder, in the process that writes.
    """

    def __init__(self, path: Path, settings: TrainingSettings, lock: FolderLock | None = None):
        self.path, self.settings, self.lock = path, settings, lock

    def open(self, step: int) -> None:
        """Writes the resolved settings, and takes out what a killed run had logged and kept after `step`."""
        self.check()
        remove_snapshots(self.path, lambda at: at > step)
        with replacing(self.path / "settings.json") as beside:
            beside.write_text(json.dumps(asdict(self.settings), indent=2) + "\n", encoding="utf-8")
        log = self.path / "log.jsonl"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if log.is_file() else []
        kept = [line for line in lines if _is_of_a_step_up_to(step, line)]
        if kept != lines:
            with replacing(log) as beside:
                beside.write_text("".join(kept), encoding="utf-8")

    def check(self) -> None:
        """
        To be called before anything is written.

        Raises:
            FileNotFoundError: if the folder is no longer the one that the run began in.
        """
        if self.lock is not None and not self.lock.is_in_place():
            raise FileNotFoundError(
                f"output_dir={str(self.path)!r}: was removed or replaced by another folder while the run was training; "
                "nothing more is written"
            )

    def log(self, values: dict[str, Any]) -> None:
        """Adds a line to log.jsonl."""
        self.check()
        path = self.path / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error  # Python does not name it

    def write_failure(self, step: int, report: dict[str, Any]) -> None:
        """Writes down that a step was not finite."""
        self.check()
        with replacing(self.failure(step)) as beside:
            beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    def picture(self, step: int) -> Path:
        """Where the sample grid of a step is to be."""
        self.check()
        path = self.path / "samples" / f"step-{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        return path

    def failure(self, step: int) -> Path:
        """Where it is written down that a step was not finite."""
        return self.path / f"failure-{step}.json"

    # Checkpoints.

    def keep_averages(self, step: int, averages: dict[float, dict[str, torch.Tensor]]) -> None:
        """Writes a copy of averages ({length: {name: values}}), and removes those that are too many."""
        self.check()
        write_snapshot(self.path, step, averages)

    def save(self, step: int, tensors: checkpoints.Tensors, state: dict[str, Any]) -> None:
        """Writes a checkpoint, and removes those that are too many."""
        self.check()
        checkpoints.save_checkpoint(self.path, step, tensors, state)
        checkpoints.prune_checkpoints(self.path, self.settings.checkpoints_total_limit)

    def has_saved(self, step: int) -> bool:
        return self.path / f"checkpoint-{step}" in checkpoints.list_checkpoints(self.path)

    def saved(self, identity: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> Saved | None:
        """
        The checkpoint that the settings say to resume from; None for a fresh start.

        Args:
            identity: What must be the same in the run that wrote it.
            defaults: For each config in `identity`, the values of settings that an older config does not have. Settings
                that only the older one has are gone, and say nothing.

        Raises:
            ValueError: if the checkpoint is not one of this run.
            CheckpointError: if it is named in the settings and damaged, or if its state is not that of a run.
        """
        wanted = self.settings.resume_from_checkpoint
        if wanted == "none":
            return None
        path = checkpoints.newest_checkpoint(self.path, _pass_over) if wanted == "latest" else Path(wanted)
        if path is None:
            return None
        if not path.is_dir():
            raise ValueError(f"resume_from_checkpoint={wanted!r}: expected 'latest', 'none' or a checkpoint folder")
        saved = Saved(path, *checkpoints.load_checkpoint(path))
        check_state(path, checkpoints.step_of_checkpoint(path), saved.state, "ema" in saved.tensors)
        newest = checkpoints.list_checkpoints(self.path)[-1:]
        if wanted != "latest" and newest and newest[0].name != f"checkpoint-{saved.state['step']}":
            raise ValueError(f"resume_from_checkpoint={wanted!r}: {newest[0]} is there; expected another output_dir")
        for key, value in identity.items():
            its_value = saved.state["identity"].get(key, value if key == "images" else None)  # once not counted
            if key in defaults and isinstance(its_value, dict):
                its_value = {name: its_value.get(name, defaults[key].get(name)) for name in value}
            if its_value != value:
                its_value, value = _differing(its_value, value)
                said = f"has {key}={_short(its_value)}, this run has {_short(value)}"
                if key == "images":
                    said = f"is of other images: {its_value} then, {value} now"
                elif key == "data":
                    said = "is of other images, or of the same at other sizes"
                    said += ": as many then as now, with other pixels or classes"
                raise ValueError(f"{path} {said}; expected the same, or another output_dir")
        return saved

    # The finished network, where another method builds on it.

    @property
    def finished(self) -> Path:
        return self.path / FINISHED

    def keep_finished(self, network: torch.nn.Module) -> None:
        """Saves a network as finished, whole or not at all; `ValueError` if its weights are not finite."""
        self.check()
        refuse_unusable([(FINISHED, network)], "Nothing was saved.")
        with replacing_folder(self.finished) as beside:
            network.save_pretrained(beside, safe_serialization=True)

    def finished_digest(self) -> str:
        """SHA-256 of the finished network's weights."""
        digest = hashlib.sha256()
        for path in sorted(self.finished.glob("*.safetensors")):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def _is_of_a_step_up_to(step: int, line: str) -> bool:
    """False for a line that was cut off, too."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _pass_over(damaged: Path, reason: str) -> None:
    print(f"passing over {damaged}: {reason}", flush=True)


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two dicts the entries that differ; else both."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
