"""Whether a folder or repository is sound: it loads with and without pyrdiff, and contains nothing else."""

import glob
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from pyrdiff import plugins
from pyrdiff.parts.sources import source_of, standalone_text

from .folders import BUNDLED, bundled
from .loading import (
    INDEX,
    LARGEST_CONFIG,
    WEIGHTS,
    build,
    check_weights,
    configs,
    hub_errors,
    list_files,
    read_index,
    read_parts,
    weight_files,
    weights,
    within,
)

BESIDE = re.compile(r"README\.md|LICENSE(\.txt|\.md)?|NOTICE|\.gitattributes|[\w.-]+\.(png|jpg|jpeg|webp)|bench\.json")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".npy", ".npz", ".joblib")

ELSEWHERE = """
import hashlib, sys
for package in sys.argv[2:]:
    sys.modules[package] = None  # as where it is not installed
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, use_safetensors=True)
digest = hashlib.sha256()
for name, part in sorted(pipeline.components.items()):
    if hasattr(part, "state_dict"):
        for key, value in sorted(part.state_dict().items()):
            digest.update(f"{name}.{key}".encode() + value.float().numpy().tobytes())
print(digest.hexdigest())
"""


@dataclass
class Check:
    """
    What `check` found.

    Args:
        files: {path: bytes} of everything in the folder.
        problems: What is not sound, in a sentence each.
        notes: What is sound and worth knowing.
        loads: Whether it loads with pyrdiff.
        loads_elsewhere: Whether it loads without; None if that was not tried.
        pipeline: The pipeline's class.
        commit: Of a repository.
    """

    files: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loads: bool = False
    loads_elsewhere: bool | None = None
    pipeline: str | None = None
    commit: str | None = None

    @property
    def sound(self) -> bool:
        return not self.problems


def check(
    path_or_repo: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    update_code: bool = False,
) -> Check:
    """
    Says whether an exported folder or repository is sound.

    It is, if it holds one pipeline of an installed method and nothing else than its configs, safetensors, card and
    pictures; if its code is, byte for byte, that of the installed classes; if it loads by `pyrdiff.load`; and if it
    loads to the same weights in a process where neither pyrdiff nor the method's package can be imported. That process
    runs the folder's code, so it is started only if the code is the installed one, or with `trust_remote_code`.

    Args:
        path_or_repo: A local folder, a repository on the Hub, or a model that comes with pyrdiff.
        revision, token: Of the repository.
        trust_remote_code: Run the folder's own code, for the load without pyrdiff, even if it is not the installed one.
        update_code: First put the code of the installed classes into a local folder that loads, such as one that an
            earlier version exported.

    Raises:
        ValueError: if there is no such folder or repository.
    """
    found = Check()
    folder, listed = Path(path_or_repo), None
    if not folder.is_dir() and str(path_or_repo) in bundled():
        folder = BUNDLED / str(path_or_repo)
    if update_code and not folder.is_dir():
        raise ValueError(f"update_code: {str(path_or_repo)!r} is no local folder")
    if not folder.is_dir():
        if folder.exists() or str(path_or_repo).count("/") != 1:
            raise ValueError(f"path_or_repo={str(path_or_repo)!r}: expected a folder or a repository as 'user/name'")
        folder, listed = _fetch(str(path_or_repo), revision, token)
        found.commit = folder.name
    _list(folder, found, listed)
    try:
        pipeline_class, index = read_index(folder)
        parts = read_parts(folder, pipeline_class, index)
        if listed is not None:
            weights(listed, parts)
        files = {name: weight_files(part) for name, part in parts.items() if part and part.shapes is not None}
        for part in parts.values():
            if part is not None and part.shapes is not None:
                check_weights(part)
        pipeline = build(pipeline_class, parts, index)
    except ValueError as error:
        found.problems.append(f"does not load: {error}")
        return found
    found.loads, found.pipeline, digest = True, pipeline_class.__name__, _digest(pipeline)

    # What belongs to it; anything else does not.
    own = {"": pipeline_class} | {name: part.cls for name, part in parts.items() if part is not None}
    own = {name: each for name, each in own.items() if each.__module__.split(".")[0] != "diffusers"}
    code = {(Path(name) / f"{source_of(each).stem}.py").as_posix(): each for name, each in own.items()}
    if update_code:
        _write_code(folder, code, index)
        _list(folder, found)
    expected = {INDEX, *code}
    for name, part in parts.items():
        if part is not None:
            expected.add(f"{name}/{part.cls.config_name}")
            expected |= {f"{name}/{path.name}" for path in files.get(name, [])}
            expected |= {f"{name}/{path.name}" for path in (folder / name).glob(f"{WEIGHTS}*.index*.json")}
    for path in found.files:
        if path not in expected and not BESIDE.fullmatch(path) and not path.endswith(PICKLES):
            found.problems.append(f"{path}: is no part of the model")
    for name, part in pipeline.components.items():
        bad = [key for key, value in getattr(part, "state_dict", dict)().items() if not value.isfinite().all()]
        if bad:
            found.problems.append(f"{name}: {min(bad)} has values that are not finite")
    same = True
    for path, each in code.items():
        if path not in found.files:
            same = False
            found.problems.append(f"{path}: is missing, so that diffusers alone cannot load the folder")
        elif (folder / path).read_bytes() != standalone_text(each).encode():
            same = False
            found.problems.append(f"{path}: is not the code of the installed {each.__name__} (update_code mends that)")
    for name, wanted in _index_of(code).items():
        if index.get(name) != wanted:
            same = False
            found.problems.append(f"{INDEX}: {name} is {index.get(name)!r}; diffusers alone needs {wanted}")
    if "README.md" not in found.files:
        found.notes.append("has no card (README.md)")

    # Without pyrdiff.
    if same or trust_remote_code:
        packages = {"pyrdiff", *(each.__module__.split(".")[0] for each in plugins.classes().values())}
        elsewhere, why = _load_elsewhere(folder, packages)
        found.loads_elsewhere = elsewhere == digest
        if elsewhere is None:
            found.problems.append(f"does not load without pyrdiff: {why}")
        elif elsewhere != digest:
            found.problems.append("loads without pyrdiff, but to other weights")
    else:
        found.notes.append("the load without pyrdiff was not tried, since it would run code that is not the installed")
    return found


def _index_of(code: dict[str, type]) -> dict[str, list[str]]:
    """What the index says of classes whose code, {path: class}, is in the folder."""
    entries = {path.rpartition("/")[0] or "_class_name": each for path, each in code.items()}
    return {name: [source_of(each).stem, each.__name__] for name, each in entries.items()}


def _write_code(folder: Path, code: dict[str, type], index: dict) -> None:
    """Puts the source files of classes, {path: class}, into a folder, and into its index."""
    for path, each in code.items():
        for old in (folder / path).parent.glob("*.py"):
            old.unlink()
        (folder / path).write_text(standalone_text(each), encoding="utf-8", newline="\n")
    index.update(_index_of(code))
    beside = folder / f".{INDEX}.{os.getpid()}"
    beside.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    beside.replace(folder / INDEX)


def _fetch(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Path, dict[str, int | None]]:
    """The files of a repository that may be part of a model or beside it, and {path: bytes} of all of them."""
    with hub_errors(f"path_or_repo={repo_id!r}"):
        commit, listed = list_files(repo_id, revision, token)
        fetch = partial(snapshot_download, repo_id, revision=commit, token=token)
        wanted = configs(repo_id, listed)
        folder = Path(fetch(allow_patterns=wanted))
        try:
            wanted += weights(listed, read_parts(folder, *read_index(folder)))
        except ValueError:
            pass  # `check` comes to it
        for file, size in listed.items():
            if (size or 0) <= LARGEST_CONFIG and not file.endswith((*PICKLES, ".json", ".safetensors")):
                wanted.append(glob.escape(file))
        return Path(fetch(allow_patterns=wanted)), listed


def _list(folder: Path, found: Check, listed: dict[str, int | None] | None = None) -> None:
    """Files of the folder, or `listed`; links that lead out of it, and pickles, are problems."""
    found.problems.clear()
    found.files = {name: size or 0 for name, size in (listed or {}).items()}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not within(path, folder):
            found.problems.append(f"{name}: a link that leads out of the folder")
        elif path.is_file():
            found.files[name] = path.stat().st_size
        elif not path.is_dir():
            found.problems.append(f"{name}: neither a file nor a folder")
    for name in found.files:
        if name.endswith(PICKLES):
            found.problems.append(f"{name}: weights and arrays are to be safetensors, which hold no code")


def _digest(pipeline: DiffusionPipeline) -> str:
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            for key, value in sorted(part.state_dict().items()):
                digest.update(f"{name}.{key}".encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


def _load_elsewhere(folder: Path, packages: set[str]) -> tuple[str | None, str]:
    """The digest of the weights that a process without these packages loads; or None and why."""
    with tempfile.TemporaryDirectory() as modules:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        command = [sys.executable, "-c", ELSEWHERE, str(folder.resolve()), *sorted(packages)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=modules)
        except subprocess.TimeoutExpired:
            return None, "it took longer than 10 minutes"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return None, lines[-1] if lines else f"exit code {done.returncode}"
    return done.stdout.split()[-1], ""
