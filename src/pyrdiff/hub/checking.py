"""Whether a folder or repository is sound: it loads with and without pyrdiff, and contains nothing else."""

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

from pyrdiff import plugins
from pyrdiff.parts.files import replacing
from pyrdiff.parts.saving import index_entries
from pyrdiff.parts.sources import auto_map, source_of, standalone_text

from . import card
from .folders import LICENCE, write_licence
from .loading import (
    INDEX,
    MAX_MEGAPIXELS,
    NAME,
    SavedPipeline,
    build,
    inside,
    read_config,
    read_folder,
    shard_index,
    weight_files,
    within,
)
from .messages import file_name, shown
from .repository import LARGEST_CONFIG, Repository, is_bundled, local_folder

BESIDE = re.compile(r"README\.md|LICENSE(\.txt|\.md)?|NOTICE|\.gitattributes|[\w.-]+\.(png|jpg|jpeg|webp)|bench\.json")
SAVED_PRIVATE = ("_class_name", "_diffusers_version", "_name_or_path")  # keys of saved configs
PYTHON = (".py", ".pyc")
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
        loads: True if it loads with pyrdiff.
        loads_elsewhere: True if it loads without; None if that was not tried.
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


class Code(NamedTuple):
    """The code that belongs into a folder: {path: text}, and the entries of the index that name it."""

    texts: dict[str, str]
    entries: dict[str, object]


def check(
    path_or_repo: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    update_code: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Check:
    """
    Says whether an exported folder or repository is sound.

    It is, if it holds one pipeline of an installed method and nothing else than its configs, safetensors, card and
    pictures; if its code is, byte for byte, what an export of the installed classes has; if it loads by `pyrdiff.load`;
    and if it loads to the same weights in a process where neither pyrdiff nor the method's package can be imported.
    That process sees a copy of the files that belong to the model, and nothing else. It is started only if the folder's
    code is the same, or with `trust_remote_code`.

    Args:
        path_or_repo: A local folder, a repository on the Hub, or a model that comes with pyrdiff. Of these, which are
            kept without code, a copy with it is checked.
        revision, token: Of the repository.
        trust_remote_code: Run the folder's own code, for the load without pyrdiff, even if it is not the installed one.
            That code is the files that the index names.
        update_code: First put the code of the installed classes into a local folder that loads, such as one that an
            earlier version exported. Every other Python file in the folder and below it is removed.
        max_megapixels: As for `pyrdiff.load`.

    Returns:
        What was found; `sound` says it in a word.

    Raises:
        ValueError: if there is no such folder or repository.
    """
    folder, repository, result = local_folder(path_or_repo), None, Check()
    if folder is not None and is_bundled(folder):  # as an export of it would be
        with tempfile.TemporaryDirectory() as place:
            copy = shutil.copytree(folder, Path(place) / folder.name)
            return check(copy, update_code=True, max_megapixels=max_megapixels)
    if folder is None:
        if update_code:
            raise ValueError(f"update_code=True: {str(path_or_repo)!r} is no local folder; expected one")
        repository = Repository.open(str(path_or_repo), revision, token)
        folder = _fetch(repository, max_megapixels)
        result.commit = folder.name
    listed = {} if repository is None else {name: size or 0 for name, size in (repository.sizes or {}).items()}
    try:
        saved = read_folder(folder, max_megapixels)
        if repository is not None:
            repository.weights(saved.parameters())  # refuses those that are too large
        pipeline = build(saved)
        code = code_of(saved)
        if update_code:
            result.notes += [f"removed {file_name(name)}" for name in _write_code(saved, code)]
            saved = read_folder(folder, max_megapixels)
    except ValueError as error:
        result.files = listed | _files(folder)
        result.problems = [*_misplaced(folder, result.files), f"does not load: {error}"]
        return result
    result.files = listed | _files(folder)
    result.loads, result.pipeline = True, saved.pipeline_class.__name__
    wrong_code = list(_wrong_code(saved, code, result.files))
    result.problems += _misplaced(folder, result.files)
    result.problems += _foreign(result.files, {*code.texts, *_data_files(saved)})
    result.problems += wrong_code
    if "README.md" not in result.files:
        result.notes.append("has no card (README.md)")
    else:
        result.problems += _wrong_card(folder / "README.md")
    if wrong_code and not trust_remote_code:
        result.notes.append("the load without pyrdiff was not tried, since it would run code that is not the installed")
        return result
    with tempfile.TemporaryDirectory() as place:
        texts = _own_code(saved) if wrong_code else {name: text.encode() for name, text in code.texts.items()}
        loaded = load_elsewhere(_clean_copy(saved, texts, Path(place)))
    result.loads_elsewhere = loaded.digest == digest(pipeline)
    if loaded.digest is None:
        result.problems.append(f"does not load without pyrdiff: {loaded.why}")
    elif not result.loads_elsewhere:
        result.problems.append("loads without pyrdiff, but to other weights")
    return result


# What belongs to a model.


def code_of(saved: SavedPipeline) -> Code:
    """The code that an export of the installed classes has."""
    classes = saved.classes_with_code()
    texts = {
        (Path(name) / f"{source_of(cls).stem}.py").as_posix(): standalone_text(cls) for name, cls in classes.items()
    }
    return Code(texts, index_entries(saved.pipeline_class, classes))


def _data_files(saved: SavedPipeline) -> set[str]:
    """Paths of the index, of the configs and of the weights."""
    paths = {saved.folder / INDEX} | {component.config_file for component in saved.components.values()}
    for network in saved.networks().values():
        paths |= {*weight_files(network), *filter(None, [shard_index(network)])}
    return {path.relative_to(saved.folder).as_posix() for path in paths}


def _files(folder: Path) -> dict[str, int]:
    """{path: bytes} of the files of a folder."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: path.stat().st_size for name, path in files.items() if within(path, folder) and path.is_file()}


# What is wrong, a sentence each.


def _misplaced(folder: Path, files: dict[str, int]) -> Iterator[str]:
    """Links that lead out of the folder, what is neither file nor folder, and pickles."""
    for path in sorted(folder.rglob("*")):
        name = file_name(path.relative_to(folder).as_posix())
        if not within(path, folder):
            yield f"{name}: a link that leads out of the folder"
        elif not path.is_file() and not path.is_dir():
            yield f"{name}: neither a file nor a folder"
    for name in files:
        if name.endswith(PICKLES):
            yield f"{file_name(name)}: weights and arrays are to be safetensors, which hold no code"


def _foreign(files: dict[str, int], expected: set[str]) -> Iterator[str]:
    for name in files:
        if name not in expected and not BESIDE.fullmatch(name) and not name.endswith(PICKLES):
            yield f"{file_name(name)}: is no part of the model"


def _wrong_card(path: Path) -> Iterator[str]:
    try:
        card.read(path)
    except ValueError as error:
        yield str(error)


def _wrong_code(saved: SavedPipeline, code: Code, files: dict[str, int]) -> Iterator[str]:
    """Differences from the code that an export has, and from the entries that name it."""
    for path, text in code.texts.items():
        if path not in files:
            yield f"{path}: is missing, so that diffusers alone cannot load the folder"
        elif files[path] != len(text.encode()) or (saved.folder / path).read_bytes() != text.encode():
            yield f"{path}: is not the code of the installed classes (pyrdiff check --update_code mends that)"
    for name, wanted in code.entries.items():
        if saved.index.get(name) != wanted:
            yield f"{INDEX}: {name} is {shown(saved.index.get(name))}; diffusers alone needs {wanted}"
    for name, network in saved.networks().items():
        if name in code.entries and network.config.get("auto_map") != auto_map(network.cls):
            yield f"{name}/{network.cls.config_name}: has no auto_map; AutoModel alone needs {auto_map(network.cls)}"
    yield from (f"{INDEX}: {shown(key)} is no part of it" for key in _private_keys(saved.index))
    for name, component in saved.components.items():
        config, file = read_config(component.config_file), f"{name}/{component.cls.config_name}"
        yield from (f"{file}: {shown(key)} is no part of it" for key in _private_keys(config))
        wanted = component.cls.__name__
        if config.get("_class_name", wanted) != wanted:
            yield f"{file}: _class_name is {shown(config['_class_name'])}; expected {wanted!r}"


# What `check` does.


def _write_code(saved: SavedPipeline, code: Code) -> list[str]:
    """
    Puts the code into the folder, and names it in the index and the configs. Every other Python file is removed,
    wherever it lies in the folder: a loader may run what no index names.

    Returns:
        What was removed, without the files that were replaced.
    """
    old = sorted(path for path in _tree(saved.folder) if path.suffix.lower() in PYTHON and not _is_folder(path))
    for path in code.texts:
        if _is_folder(saved.folder / path):
            raise ValueError(f"{saved.folder / path}: a folder; expected a file")
    for path in old:
        path.unlink()
    for path, text in code.texts.items():
        with replacing(saved.folder / path) as beside:
            beside.write_text(text, encoding="utf-8", newline="\n")
    _write_config(saved.folder / INDEX, saved.pipeline_class, {**saved.index, **code.entries})
    for name, component in saved.components.items():
        config = {**read_config(component.config_file), "_class_name": component.cls.__name__}
        if name in code.entries and component.shapes is not None:
            config["auto_map"] = auto_map(component.cls)
        _write_config(component.config_file, component.cls, config)
    if not os.path.lexists(saved.folder / LICENCE):
        write_licence(saved.folder)
    removed = [path.relative_to(saved.folder).as_posix() for path in old]
    return [name for name in removed if name not in code.texts]


def _tree(folder: Path) -> Iterator[Path]:
    """Everything in a folder and below it. Links are not followed."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place) / name for name in [*folders, *files])


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _write_config(path: Path, owner: type, config: dict) -> None:
    """Writes a config, if it changed, without what its class does not take or no longer takes."""
    gone = {*getattr(owner, "RETIRED", ()), *_private_keys(config)}
    config = {key: value for key, value in config.items() if key not in gone}
    if config != read_config(path):
        with replacing(path) as beside:
            beside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _private_keys(config: dict) -> list[str]:
    """Keys that diffusers might give a meaning, and that no export has."""
    return sorted(key for key in config if key.startswith("_") and key not in SAVED_PRIVATE)


def _fetch(repository: Repository, max_megapixels: float) -> Path:
    """The local folder of a repository, with the files that may be part of a model or beside it."""
    wanted = repository.configs()
    folder = repository.fetch(wanted)
    try:
        wanted += repository.weights(read_folder(folder, max_megapixels).parameters())
    except ValueError:
        pass  # `check` comes to it
    for path, size in (repository.sizes or {}).items():
        if (size or 0) <= LARGEST_CONFIG and not path.endswith((*PICKLES, ".json", ".safetensors")):
            wanted.append(glob.escape(path))
    return repository.fetch(wanted)


def _own_code(saved: SavedPipeline) -> dict[str, bytes]:
    """{path: content} of the files that the folder's index names as code."""
    named = {"": saved.index.get("_class_name"), **{name: saved.index[name] for name in saved.components}}
    texts = {}
    for name, entry in named.items():
        if isinstance(entry, list) and entry[0] != "diffusers" and NAME.fullmatch(str(entry[0])):
            path = (Path(name) / f"{entry[0]}.py").as_posix()
            if (saved.folder / path).is_file():
                texts[path] = inside(saved.folder, path).read_bytes()
    return texts


def _clean_copy(saved: SavedPipeline, code: dict[str, bytes], folder: Path) -> Path:
    """
    A folder with the files of the model, this code, and nothing else. Diffusers runs whatever has the name of a
    component's library in the component's folder.
    """
    for name in _data_files(saved):
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            shutil.copyfile(saved.folder / name, folder / name)
        else:
            (folder / name).symlink_to((saved.folder / name).resolve())
    for name, text in code.items():
        (folder / name).write_bytes(text)
    return folder


class Elsewhere(NamedTuple):
    """The digest of the weights that a process without pyrdiff loaded; or None, and why."""

    digest: str | None
    why: str = ""


def load_elsewhere(folder: Path) -> Elsewhere:
    """Loads a folder, and runs its code, in a process where pyrdiff and the packages of methods are not installed."""
    packages = {"pyrdiff", *(cls.__module__.split(".")[0] for cls in plugins.classes().values())}
    with tempfile.TemporaryDirectory() as modules:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        command = [sys.executable, "-c", ELSEWHERE, str(folder.resolve()), *sorted(packages)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=modules)
        except subprocess.TimeoutExpired:
            return Elsewhere(None, "it took longer than 10 minutes")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return Elsewhere(None, lines[-1] if lines else f"exit code {done.returncode}")
    return Elsewhere(done.stdout.split()[-1])


def digest(pipeline: DiffusionPipeline) -> str:
    """A hash of all weights, as `ELSEWHERE` computes it."""
    total = hashlib.sha256()
    for name, network in _networks(pipeline):
        for key, value in sorted(network.state_dict().items()):
            total.update(f"{name}.{key}".encode() + value.float().numpy().tobytes())
    return total.hexdigest()


def _networks(pipeline: DiffusionPipeline) -> list[tuple[str, torch.nn.Module]]:
    components = sorted(pipeline.components.items())
    return [(name, component) for name, component in components if isinstance(component, torch.nn.Module)]
