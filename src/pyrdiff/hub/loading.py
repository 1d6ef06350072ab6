"""Loading without trust: a folder says which of the installed classes to build, and is checked against them."""

import glob
import inspect
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from pyrdiff import plugins
from pyrdiff.parts.sources import auto_map

from .folders import BUNDLED, bundled

INDEX = DiffusionPipeline.config_name
WEIGHTS = "diffusion_pytorch_model"
LONGEST = 400  # characters of another's text in a message of ours
LARGEST_NUMBER = 100_000  # a whole number in a config
LARGEST_CONFIG = 16 * 2**20  # bytes; pipelines keep measured spectra in theirs
MOST_MODULES = 5_000  # parts of a network
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass
class Part:
    """A component: its class, its folder, its config; of a model also {tensor: shape} by its config, and which of the
    tensors hold floating point numbers."""

    cls: type
    folder: Path
    config: dict
    shapes: dict[str, tuple[int, ...]] | None = None
    floats: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Numbers in a model."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def load(
    path_or_repo: str | os.PathLike,
    *,
    revision: str | None = None,
    pipeline_class: str | None = None,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> DiffusionPipeline:
    """
    Loads an exported pipeline with the classes of installed methods: code in the folder is neither fetched nor run, and
    weights are safetensors only.

    Class names are looked up among those of pyrdiff, of installed plugins and of diffusers; configs are checked against
    their signatures, and shapes of weights against the network that the config describes, before weights are read.

    Args:
        path_or_repo: A local folder, a repository on the Hub, or a model that comes with pyrdiff ("noto-emoji").
        revision: Branch, tag or commit of the repository.
        pipeline_class: Another pipeline than the folder's own, with the same network, e.g. "GuidedSRPipeline" for what
            was trained to generate.
        torch_dtype: Of the weights; float32 by default.
        variant: Of the weight files, such as "fp16".
        token, cache_dir, local_files_only: For the download.

    Raises:
        ValueError: if there is no such folder, or it is not an export of a known pipeline, or something in it is not
            as its classes want it; the file and the key are named.

    Example:
        >>> import pyrdiff
        >>> pipeline = pyrdiff.load("noto-emoji")
        >>> type(pipeline).__name__
        'PyramidalPipeline'
    """
    folder = Path(path_or_repo)
    listed, fetch = None, None
    if not folder.is_dir():
        if str(path_or_repo) in bundled():
            folder = BUNDLED / str(path_or_repo)
        elif folder.exists() or str(path_or_repo).count("/") != 1:
            raise ValueError(
                f"path_or_repo={str(path_or_repo)!r}: expected a folder or a repository such as 'user/name'"
                + (f", or one of {bundled()}" if bundled() else "")
            )
        else:
            offline = local_files_only or constants.HF_HUB_OFFLINE
            if not offline:  # from here on one commit, whatever is pushed meanwhile
                with hub_errors(f"path_or_repo={str(path_or_repo)!r}"):
                    revision, listed = list_files(str(path_or_repo), revision, token)

            def fetch(patterns: list[str]) -> Path:
                options = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=offline)
                with hub_errors(f"path_or_repo={str(path_or_repo)!r}"):
                    return Path(snapshot_download(str(path_or_repo), allow_patterns=patterns, **options))

            folder = fetch(configs(str(path_or_repo), listed))
    if not (folder / INDEX).is_file():
        raise ValueError(f"path_or_repo={str(path_or_repo)!r}: expected an exported pipeline, with {INDEX} in it")
    own_class, index = read_index(folder)
    chosen = own_class if pipeline_class is None else pipeline_named(pipeline_class, "pipeline_class")
    missing = set(chosen._get_signature_keys(chosen)[0]) - set(index)
    if missing:
        asked = "" if pipeline_class is None else f"pipeline_class={pipeline_class!r}: "
        raise ValueError(f"{asked}{folder / INDEX} of {own_class.__name__} has no {sorted(missing)}")
    parts = read_parts(folder, own_class, index)
    if fetch is not None:
        folder = fetch(configs(str(path_or_repo), listed) + weights(listed, parts))
        parts = read_parts(folder, own_class, index)
    for part in parts.values():
        if part is not None and part.shapes is not None:
            check_weights(part, variant)
    return build(chosen, parts, index, torch_dtype, variant)


def read_index(folder: Path) -> tuple[type, dict]:
    """The pipeline's class and the checked index of a folder."""
    path = inside(folder, INDEX)
    index = read_config(path)
    name = index.get("_class_name")
    name = name[1] if isinstance(name, list) and len(name) == 2 else name
    own_class = pipeline_named(name, f"{path}: _class_name")
    check_keys(path, index, own_class)
    return own_class, index


def pipeline_named(name: object, where: str) -> type:
    known = {key: each for key, each in plugins.classes().items() if issubclass(each, DiffusionPipeline)}
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{where} is {_shown(name)}; expected a pipeline of an installed method, one of {sorted(known)} "
            "(pyrdiff plugins lists the methods, and what failed)"
        )
    return known[name]


def read_parts(folder: Path, pipeline_class: type, index: dict) -> dict[str, Part | None]:
    """The components that an index names, each checked against its class."""
    required, optional = pipeline_class._get_signature_keys(pipeline_class)
    parts = {}
    for name in sorted(set(required) & set(index)):
        entry = index[name]
        parts[name] = None if entry is None or entry == [None, None] else _read_part(folder, name, entry)
    return parts


def _read_part(folder: Path, name: str, entry: object) -> Part:
    """Refuses a component of another class than those of installed methods and of diffusers, and whatever its config
    says that the class does not know."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(item, str) for item in entry)):
        raise ValueError(f"{folder / INDEX}: {name} is {_shown(entry)}; expected [module, class]")
    kind = SchedulerMixin if name.endswith("scheduler") else ModelMixin
    try:
        found = getattr(diffusers, entry[1], None) if entry[0] == "diffusers" else plugins.classes().get(entry[1])
    except Exception:  # diffusers imports what is asked for, and what that needs may not be installed
        found = None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(
            f"{folder / INDEX}: {name} is {_shown(entry)}; expected a class of diffusers or of an installed method "
            f"(a {kind.__name__})"
        )
    path = inside(folder, f"{name}/{found.config_name}")
    config = read_config(path)
    check_keys(path, config, found)
    part = Part(found, folder / name, {key: value for key, value in config.items() if not key.startswith("_")})
    try:
        with torch.device("meta" if kind is ModelMixin else "cpu"), _few_modules():
            built = found.from_config(part.config)
    except Exception as error:  # whatever a constructor makes of strange values
        raise ValueError(f"{path}: {found.__name__} cannot be built from it: {_line(error)}") from error
    if isinstance(built, torch.nn.Module):
        tensors = built.state_dict()
        part.shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        part.floats = frozenset(key for key, value in tensors.items() if value.is_floating_point())
    return part


def check_weights(part: Part, variant: str | None = None) -> None:
    """Compares names, shapes and kinds of numbers in the headers of the weight files with those of the network."""
    found, files = {}, weight_files(part, variant)
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(key)
                    found[key] = (path, tuple(tensor.get_shape()), tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: expected safetensors: {_line(error)}") from error
    config = part.cls.config_name
    for text, keys in (("lacks", set(part.shapes) - set(found)), ("has unknown", set(found) - set(part.shapes))):
        if keys:
            such = f"{len(keys)} tensors of {part.cls.__name__} by {config}, such as {_shown(min(keys))}"
            raise ValueError(f"{files[0] if text == 'lacks' else found[min(keys)][0]}: {text} {such}")
    for key, shape in part.shapes.items():
        path, has, kind = found[key]
        if has != shape:
            raise ValueError(f"{path}: {key} has the shape {has}; by {config} it has {shape}")
        if (kind in FLOATS) != (key in part.floats):
            wanted = "floating point" if key in part.floats else "whole"
            raise ValueError(f"{path}: {key} has numbers of the type {kind}; expected {wanted} ones")


def weight_files(part: Part, variant: str | None = None) -> list[Path]:
    """The weight files of a model: one, or the shards that an index lists."""
    stem = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
    index_name = (
        f"{WEIGHTS}.safetensors.index.json" if variant is None else f"{WEIGHTS}.safetensors.index.{variant}.json"
    )
    if not (part.folder / index_name).exists():
        return [inside(part.folder, f"{stem}.safetensors")]
    if (part.folder / f"{stem}.safetensors").exists():
        raise ValueError(f"{part.folder}: has both {index_name} and {stem}.safetensors; expected one of them")
    index = read_config(inside(part.folder, index_name))
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{part.folder / index_name}: weight_map is no map of tensors to files")
    for name in shards.values():
        if not NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{part.folder / index_name}: the file {_shown(name)}; expected .safetensors beside it")
    for text, keys in (("lacks", set(part.shapes) - set(shards)), ("has unknown", set(shards) - set(part.shapes))):
        if keys:  # diffusers would leave such tensors at random
            raise ValueError(f"{part.folder / index_name}: weight_map {text} {len(keys)} tensors: {_shown(min(keys))}")
    return [inside(part.folder, name) for name in sorted(set(shards.values()))]


def build(
    pipeline_class: type,
    parts: dict[str, Part | None],
    index: dict,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """The pipeline of checked parts."""
    names = inspect.signature(pipeline_class.__init__).parameters
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of reading shards, which looks like a download
    try:
        return _build(pipeline_class, names, parts, index, torch_dtype, variant)
    finally:
        if shown:
            logging.enable_progress_bar()


def _build(pipeline_class, names, parts, index, torch_dtype, variant) -> DiffusionPipeline:
    arguments = {key: value for key, value in index.items() if key in names and key not in parts}
    for name, part in parts.items():
        if name not in names:
            continue
        if part is None or part.shapes is None:
            arguments[name] = part and part.cls.from_config(part.config)
            continue
        try:
            arguments[name] = part.cls.from_pretrained(
                part.folder, use_safetensors=True, torch_dtype=torch_dtype, variant=variant, local_files_only=True
            )
        except Exception as error:  # whatever the reader makes of strange values
            path = part.folder / part.cls.config_name
            raise ValueError(f"{path}: its weights do not load: {_line(error)}") from error
    try:
        return pipeline_class(**arguments)
    except Exception as error:  # whatever a constructor makes of strange values
        path = next((part.folder.parent / INDEX for part in parts.values() if part is not None), INDEX)
        raise ValueError(f"{path}: {pipeline_class.__name__} cannot be built from it: {_line(error)}") from error


# Files.


def inside(folder: Path, name: str) -> Path:
    """A file of a folder; one that is reached through a link must lie in it, or in the same cached repository."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    top = folder if (folder / INDEX).is_file() else folder.parent
    if not within(path, top):
        raise ValueError(f"{path}: a link that leads out of the folder; expected a file")
    return path


def within(path: Path, top: Path) -> bool:
    """Whether a path of a folder leads into it; of a repository in the cache also into the cached files."""
    roots = [top, *([top.parents[1] / "blobs"] if top.parent.name == "snapshots" else [])]
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    return any(target.is_relative_to(root.resolve()) for root in roots)


def read_config(path: Path) -> dict:
    """A JSON object of finite size and numbers."""

    def constant(text: str) -> float:
        if text == "NaN":
            raise ValueError("NaN is not a value; expected numbers")
        return float(text)  # an infinite bound is a default of some schedulers

    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"has {path.stat().st_size} bytes; expected at most {LARGEST_CONFIG}")
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
        if not isinstance(config, dict):
            raise ValueError(f"expected a JSON object, found {type(config).__name__}")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, {_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {_line(error)}") from error
    return config


def check_keys(path: Path, config: dict, owner: type) -> None:
    """A misspelt key would be ignored by diffusers. A scheduler's config may carry settings of compatible ones."""
    owners = [owner, *(owner._get_compatibles() if hasattr(owner, "_get_compatibles") else [])]
    known = {name for each in owners for name in inspect.signature(each.__init__).parameters} - {"self", "kwargs"}
    known |= set(getattr(owner, "RETIRED", ()))
    for key, value in config.items():
        if key == "auto_map" and issubclass(owner, ModelMixin) and value == auto_map(owner):
            continue
        if not key.startswith("_") and key not in known:
            raise ValueError(f"{path}: unknown key {_shown(key)} for {owner.__name__}")
        for number in _numbers(value):
            if math.isnan(number) or (isinstance(number, int) and abs(number) > LARGEST_NUMBER):
                raise ValueError(f"{path}: {key} has {number}; expected whole numbers up to {LARGEST_NUMBER}")


def _numbers(value: object):
    """Every number in a JSON value."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield value
        elif isinstance(value, (list, dict)):
            left.extend(value.values() if isinstance(value, dict) else value)


@contextmanager
def _few_modules():
    """Ends a constructor that makes more modules than any network of ours has."""
    count = 0

    def counted(*_):
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ValueError(f"more than {MOST_MODULES} modules")

    hook = torch.nn.modules.module.register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


# The Hub.


def list_files(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[str, dict[str, int | None]]:
    """
    The commit of a repository's revision, and {path: bytes} of it.

    Raises:
        ValueError: if a path would lie outside of a folder.
    """
    info = HfApi().repo_info(repo_id, revision=revision, files_metadata=True, token=token)
    for sibling in info.siblings or []:
        parts = PurePosixPath(sibling.rfilename).parts
        if sibling.rfilename.startswith("/") or "\\" in sibling.rfilename or ".." in parts or not parts:
            raise ValueError(f"{repo_id}: has the file {sibling.rfilename!r}; expected names inside a folder")
    return info.sha, {sibling.rfilename: sibling.size for sibling in info.siblings or []}


def configs(repo_id: str, listed: dict[str, int | None] | None) -> list[str]:
    """
    The JSON files of a repository to fetch; patterns where it is not `listed`.

    Raises:
        ValueError: if one of them is too large for a config.
    """
    if listed is None:
        return ["*.json"]
    files = [file for file in listed if re.fullmatch(r"([^/]+/)?[^/]+\.json", file)]
    for file in files:
        if (listed[file] or 0) > LARGEST_CONFIG:
            raise ValueError(f"{repo_id}/{file}: has {listed[file]} bytes; expected at most {LARGEST_CONFIG}")
    return [glob.escape(file) for file in files]


def weights(listed: dict[str, int | None] | None, parts: dict[str, Part | None]) -> list[str]:
    """
    The weight files of a repository to fetch; patterns where it is not `listed`.

    Raises:
        ValueError: if those of a network are far larger than it.
    """
    wanted = []
    for name, part in parts.items():
        if part is None or part.shapes is None:
            continue
        if listed is None:
            wanted.append(f"{name}/*.safetensors")
            continue
        files = [file for file in listed if re.fullmatch(rf"{name}/[^/]+\.safetensors", file)]
        size, most = sum(listed[file] or 0 for file in files), 16 * part.size + 2**21
        if size > most:
            raise ValueError(f"{part.folder}: has {size} bytes of .safetensors; expected at most {most} for its config")
        wanted += [glob.escape(file) for file in files]
    return wanted


@contextmanager
def hub_errors(what: str):
    """Errors of the Hub's client as one ValueError that says what was asked."""
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
        raise ValueError(f"{what}: neither a folder nor a repository that can be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
