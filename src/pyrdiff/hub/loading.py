"""Loading without trust: a folder says which of the installed classes to build, and is checked against them."""

import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open

from pyrdiff import plugins
from pyrdiff.parts.json_files import read_json
from pyrdiff.parts.saving import index_entries
from pyrdiff.parts.settings import is_whole
from pyrdiff.parts.sources import auto_map
from pyrdiff.parts.weights import refuse_unusable

from .messages import in_one_line, shown
from .repository import LARGEST_CONFIG, Repository, local_folder

INDEX = DiffusionPipeline.config_name
WEIGHTS = "diffusion_pytorch_model"
ABSENT = (None, [None, None])  # in the index, for a component that the pipeline does without
LARGEST_NUMBER = 100_000  # a whole number in a config
MOST_PIXELS = 10**18  # that are counted
MAX_MEGAPIXELS = 64  # of an image that a folder asks for
MOST_MODULES = 5_000  # inside a network
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
STOCK = {"DDPMPipeline": "PyramidalPipeline", "DDIMPipeline": "PyramidalPipeline"}  # of diffusers: what samples theirs
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of diffusers before 0.15
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass
class Component:
    """
    A component of a saved pipeline.

    Args:
        cls: Its class.
        folder: Where it is saved.
        config: Its settings.
        shapes: Of a network, {tensor: shape} by its config; otherwise None.
        floats: The tensors that hold floating point numbers.
    """

    cls: type
    folder: Path
    config: dict
    shapes: dict[str, tuple[int, ...]] | None = None
    floats: frozenset[str] = frozenset()

    @property
    def config_file(self) -> Path:
        return self.folder / self.cls.config_name

    @property
    def parameters(self) -> int:
        """Of a network, how many numbers it has."""
        return sum(map(math.prod, self.shapes.values()))


class SavedPipeline(NamedTuple):
    """What the index and the configs of a folder say: the pipeline's class, the index, and the components it has."""

    folder: Path
    pipeline_class: type
    index: dict
    components: dict[str, Component]

    def networks(self) -> dict[str, Component]:
        return {name: component for name, component in self.components.items() if component.shapes is not None}

    def classes_with_code(self) -> dict[str, type]:
        """The classes whose code the folder carries, by component; "" for the pipeline."""
        classes = {"": self.pipeline_class}
        classes |= {name: component.cls for name, component in self.components.items()}
        return {name: cls for name, cls in classes.items() if cls.__module__.split(".")[0] != "diffusers"}

    def parameters(self) -> dict[str, int]:
        """{network: how many numbers it has}."""
        return {name: network.parameters for name, network in self.networks().items()}


def load(
    path_or_repo: str | os.PathLike,
    *,
    revision: str | None = None,
    pipeline_class: str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    torch_dtype: torch.dtype | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    adapters: Mapping[str, float] | Sequence[str] = (),
) -> DiffusionPipeline:
    """
    Loads an exported pipeline with the classes of installed methods: code in the folder is neither fetched nor run, and
    weights are safetensors only.

    Class names are looked up among those of pyrdiff, of installed plugins and of diffusers; a `DDPMPipeline` or
    `DDIMPipeline` of diffusers becomes a `PyramidalPipeline` of one level. Configs are checked against
    their signatures, and shapes of weights against the network that the config describes, before weights are read.

    Args:
        path_or_repo: A local folder, a repository on the Hub, or a model that comes with pyrdiff ("noto-emoji",
            "photos-x4").
        revision: Branch, tag or commit of the repository.
        pipeline_class: Another pipeline than the folder's own, with the same network, e.g. "GuidedSRPipeline" for what
            was trained to generate.
        dtype: Of the weights; float32 by default.
        variant: Of the weight files, such as "fp16".
        token, cache_dir, local_files_only: For the download.
        torch_dtype: What `dtype` was called before.
        max_megapixels: The most pixels, in millions, of an image that the configs and the plans ask for.
        adapters: Folders or repositories of adapters that were trained over this model; a mapping gives each a weight,
            by default 1. They stay apart in the network: `pipeline.unet.set_adapters` weights them anew, and
            `pyrdiff.hub.merge_adapters(pipeline)` adds them to the weights.

    Returns:
        The pipeline.

    Raises:
        ValueError: if there is no such folder, or it is not an export of a known pipeline, or something in it is not
            what its classes expect, or an adapter is for another base. The file and the key are named.
        ImportError: for adapters where peft is not installed.

    Example:
        >>> import pyrdiff
        >>> pipeline = pyrdiff.load("noto-emoji")
        >>> type(pipeline).__name__
        'PyramidalPipeline'
    """
    if dtype is not None and torch_dtype not in (None, dtype):
        raise ValueError(f"dtype={dtype}, torch_dtype={torch_dtype}: expected one of the two")
    from .adapters import add_adapters, saved_digest, weighted  # which build on this module

    weights = weighted(adapters)
    dtype = torch_dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype | None):
        raise ValueError(f"dtype={dtype!r}: expected a dtype of torch, such as torch.float16")
    folder = local_folder(path_or_repo)
    repository = None
    if folder is None:
        repository = Repository.open(str(path_or_repo), revision, token, cache_dir, local_files_only)
        folder = repository.fetch(repository.configs())
    if not (folder / INDEX).is_file():
        raise ValueError(f"path_or_repo={str(path_or_repo)!r}: expected an exported pipeline, with {INDEX} in it")
    saved = read_folder(folder, max_megapixels)
    chosen = saved.pipeline_class if pipeline_class is None else pipeline_named(pipeline_class, "pipeline_class")
    missing = set(chosen._get_signature_keys(chosen)[0]) - set(saved.index) - set(chosen._optional_components)
    if missing:
        asked = "" if pipeline_class is None else f"pipeline_class={pipeline_class!r}: "
        raise ValueError(f"{asked}{folder / INDEX} of {saved.pipeline_class.__name__} has no {sorted(missing)}")
    if weights and "unet" not in saved.components:
        raise ValueError(f"adapters: expected none, since a {chosen.__name__} has no network `unet`")
    if repository is not None:
        repository.fetch(repository.weights(saved.parameters()))
    pipeline = build(saved, chosen, dtype, variant)
    if weights:
        add_adapters(pipeline, weights, saved_digest(saved.components["unet"], variant))
    return pipeline


# The index and the configs.


def read_folder(folder: Path, max_megapixels: float = MAX_MEGAPIXELS) -> SavedPipeline:
    """
    Reads the index of a folder and the configs that it names.

    Args:
        folder: The folder.
        max_megapixels: The most pixels, in millions, of an image that they ask for.

    Raises:
        ValueError: if they name another class than those of installed methods and of diffusers, or settings that the
            class does not have, or larger images.
    """
    path = inside(folder, INDEX)
    index = read_config(path)
    name = index.get("_class_name")
    name = name[1] if isinstance(name, list) and len(name) == 2 else name
    pipeline_class = pipeline_named(name, f"{path}: _class_name")
    check_keys(path, {key: value for key, value in index.items() if key != "auto_map"}, pipeline_class)
    check_megapixels(path, index, max_megapixels)
    components = {}
    for name in sorted(set(pipeline_class._get_signature_keys(pipeline_class)[0]) & set(index)):
        if index[name] not in ABSENT:
            components[name] = read_component(folder, name, index[name], max_megapixels)
    saved = SavedPipeline(folder, pipeline_class, index, components)
    named = index_entries(pipeline_class, saved.classes_with_code()).get("auto_map")
    if "auto_map" in index and index["auto_map"] != named:
        raise ValueError(f"{path}: unknown key 'auto_map'; expected it for {named}")
    return saved


def pipeline_named(name: object, where: str) -> type:
    """The pipeline of an installed method that has this name."""
    known = {key: cls for key, cls in plugins.classes().items() if issubclass(cls, DiffusionPipeline)}
    name = STOCK.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{where} is {shown(name)}; expected a pipeline of an installed method, one of {sorted(known)} "
            "(pyrdiff plugins lists the methods, and what failed)"
        )
    return known[name]


def read_component(folder: Path, name: str, entry: object, max_megapixels: float = MAX_MEGAPIXELS) -> Component:
    """The component in the folder `name`, which the index calls [module, class]; checked as far as its config goes."""
    cls = _component_class(folder, name, entry)
    path = inside(folder, str(Path(name, cls.config_name)))
    config = read_config(path)
    check_keys(path, config, cls)
    component = Component(cls, folder / name, {key: value for key, value in config.items() if not key.startswith("_")})
    try:
        with torch.device("meta" if issubclass(cls, ModelMixin) else "cpu"), _few_modules():
            built = cls.from_config(component.config)
    except Exception as error:  # whatever a constructor makes of strange values
        raise ValueError(f"{path}: {cls.__name__} cannot be built from it: {in_one_line(error)}") from error
    check_megapixels(path, built.config, max_megapixels)
    if isinstance(built, torch.nn.Module):
        tensors = built.state_dict()
        component.shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        component.floats = frozenset(key for key, value in tensors.items() if value.is_floating_point())
    return component


def _component_class(folder: Path, name: str, entry: object) -> type:
    """The class that the index names; it must be of diffusers or of an installed method."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(item, str) for item in entry)):
        raise ValueError(f"{folder / INDEX}: {name} is {shown(entry)}; expected [module, class]")
    kind = SchedulerMixin if name.endswith("scheduler") else ModelMixin
    try:
        cls = getattr(diffusers, entry[1], None) if entry[0] == "diffusers" else plugins.classes().get(entry[1])
    except Exception:  # diffusers imports what is asked for, and what that needs may not be installed
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise ValueError(
            f"{folder / INDEX}: {name} is {shown(entry)}; expected a class of diffusers or of an installed method "
            f"(a {kind.__name__})"
        )
    return cls


def read_config(path: Path) -> dict:
    """Reads a JSON object of bounded size and depth. It may hold no NaN."""
    config = read_json(path, LARGEST_CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def check_keys(path: Path, config: dict, owner: type) -> None:
    """
    Refuses keys that the class does not take: diffusers would ignore a misspelt one. The config of a scheduler may have
    settings of compatible schedulers; that of a network may name its file for `AutoModel`.
    """
    takers = [owner, *(owner._get_compatibles() if hasattr(owner, "_get_compatibles") else [])]
    known = {name for cls in takers for name in inspect.signature(cls.__init__).parameters} - {"self", "kwargs"}
    known |= set(getattr(owner, "RETIRED", ()))
    for key, value in config.items():
        if key == "auto_map" and issubclass(owner, ModelMixin) and value == auto_map(owner):
            continue
        if not key.startswith("_") and key not in known:
            raise ValueError(f"{path}: unknown key {shown(key)} for {owner.__name__}")
        for number in _numbers(value):
            if math.isnan(number) or (isinstance(number, int) and abs(number) > LARGEST_NUMBER):
                raise ValueError(f"{path}: {key} has {shown(number)}; expected whole numbers up to {LARGEST_NUMBER}")


def check_megapixels(where: object, values: Mapping, most: float) -> None:
    """
    Refuses images that are too large, before anything of their size is made.

    Args:
        where: Whose sizes they are, for the message.
        values: `sample_size` and `resolutions` in it, and in what it contains, are sizes.
        most: Pixels of an image, in millions.

    Raises:
        ValueError: the size, and the memory that it needs, are named.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_megapixels(where, value, most)
        sizes = {"sample_size": [value], "resolutions": value}.get(key) or []
        for size in sizes if isinstance(sizes, (list, tuple)) else []:
            sides = size if isinstance(size, (list, tuple)) else [size, size]
            pixels = min(math.prod(sides), MOST_PIXELS) if all(map(is_whole, sides)) else 0
            if pixels > most * 1e6:
                raise ValueError(
                    f"{where}: {key} has {shown(size)}, {pixels / 1e6:,.0f} megapixels: an image takes "
                    f"{pixels * 12 / 1e9:,.1f} GB, and the network several times that; expected at most "
                    f"{most:g} megapixels (pyrdiff.load, sample, check and push take a larger max_megapixels)"
                )


def _numbers(value: object) -> Iterator[int | float]:
    """Every number in a JSON value."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield value
        elif isinstance(value, (list, dict)):
            left.extend(value.values() if isinstance(value, dict) else value)


@contextmanager
def _few_modules() -> Iterator[None]:
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


# The weights.


def build(
    saved: SavedPipeline,
    pipeline_class: type | None = None,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """
    The pipeline of a folder that was read; `pipeline_class` in place of its own.

    Raises:
        ValueError: if its weights are not those of the networks, or the classes do not accept what they are given.
    """
    for network in saved.networks().values():
        check_weights(network, variant)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of reading shards, which looks like a download
    try:
        return _build(saved, pipeline_class or saved.pipeline_class, torch_dtype, variant)
    finally:
        if bars:
            logging.enable_progress_bar()


def _build(
    saved: SavedPipeline, pipeline_class: type, torch_dtype: torch.dtype | None, variant: str | None
) -> DiffusionPipeline:
    arguments = {}
    for name in inspect.signature(pipeline_class.__init__).parameters:
        if name not in saved.index:
            continue
        if name in saved.components:
            arguments[name] = _load_component(saved.components[name], torch_dtype, variant)
        else:
            arguments[name] = None if saved.index[name] in ABSENT else saved.index[name]
    try:
        return pipeline_class(**arguments)
    except Exception as error:  # whatever a constructor makes of strange values
        path = saved.folder / INDEX
        raise ValueError(f"{path}: {pipeline_class.__name__} cannot be built from it: {in_one_line(error)}") from error


def _load_component(component: Component, torch_dtype: torch.dtype | None, variant: str | None):
    if component.shapes is None:
        return component.cls.from_config(component.config)
    options = dict(use_safetensors=True, torch_dtype=torch_dtype, variant=variant, local_files_only=True)
    try:
        network = component.cls.from_pretrained(component.folder, **options)
    except Exception as error:  # whatever the reader makes of strange values
        raise ValueError(f"{component.config_file}: its weights do not load: {in_one_line(error)}") from error
    file = shard_index(component, variant) or weight_files(component, variant)[0]
    refuse_unusable([(str(file), network)], "It was not loaded.")
    return network


def check_weights(network: Component, variant: str | None = None) -> None:
    """Compares names, shapes and kinds of numbers in the headers of the weight files with those of the network."""
    saved, files = {}, weight_files(network, variant)
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(key)
                    saved[key] = (path, tuple(tensor.get_shape()), tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: expected safetensors: {in_one_line(error)}") from error
    names = current_names(network)
    saved = {names.get(key, key): value for key, value in saved.items()}
    config = network.cls.config_name
    for text, keys in (("lacks", set(network.shapes) - set(saved)), ("has unknown", set(saved) - set(network.shapes))):
        if keys:
            path = files[0] if text == "lacks" else saved[min(keys)][0]
            such = f"{len(keys)} tensors of {network.cls.__name__} by {config}, such as {shown(min(keys))}"
            raise ValueError(f"{path}: {text} {such}")
    for key, shape in network.shapes.items():
        path, has, kind = saved[key]
        if has != shape:
            raise ValueError(f"{path}: {key} has the shape {has}; by {config} it has {shape}")
        if (kind in FLOATS) != (key in network.floats):
            wanted = "floating point" if key in network.floats else "whole"
            raise ValueError(f"{path}: {key} has numbers of the type {kind}; expected {wanted} ones")


def current_names(network: Component) -> dict[str, str]:
    """{name: today's name} of the tensors that diffusers once called otherwise, and renames when it loads them."""
    names = {}
    for key in network.shapes:
        for old, new in OLD_ATTENTION.items():
            before, found, after = key.rpartition(f".{new}.")
            if found and ".attentions." in key:
                names[f"{before}.{old}.{after}"] = key
    return names


def weight_files(network: Component, variant: str | None = None) -> list[Path]:
    """The weight files of a network: one, or the shards that an index lists."""
    folder = network.folder
    single = f"{WEIGHTS}.safetensors" if variant is None else f"{WEIGHTS}.{variant}.safetensors"
    index = shard_index(network, variant)
    if index is None:
        pickled = folder / f"{WEIGHTS}.bin"
        if pickled.exists() and not (folder / single).exists():
            raise ValueError(
                f"{pickled}: a pickle, which can run code when it is read; expected {single}. Where you trust it, "
                f"{network.cls.__name__}.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) converts it"
            )
        return [inside(folder, single)]
    if (folder / single).exists():
        raise ValueError(f"{folder}: has both {index.name} and {single}; expected one of them")
    shards = read_config(inside(folder, index.name)).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: weight_map is no map of tensors to files")
    for name in shards.values():
        if not NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: the file {shown(name)}; expected .safetensors beside it")
    named, wanted = set(shards), set(network.shapes)
    for text, keys in (("lacks", wanted - named), ("has unknown", named - wanted)):
        if keys:  # diffusers would leave such tensors at random
            raise ValueError(f"{index}: weight_map {text} {len(keys)} tensors: {shown(min(keys))}")
    return [inside(folder, name) for name in sorted(set(shards.values()))]


def shard_index(network: Component, variant: str | None = None) -> Path | None:
    """The file that lists the shards of a network's weights, if there is one."""
    path = network.folder / (f"{WEIGHTS}.safetensors.index." + ("json" if variant is None else f"{variant}.json"))
    return path if path.exists() else None


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
    """True if a path leads into the folder `top` or, of a repository in the cache, to a cached file of it."""
    roots = [top, *([top.parents[1] / "blobs"] if top.parent.name == "snapshots" else [])]
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    return any(target.is_relative_to(root.resolve()) for root in roots)
