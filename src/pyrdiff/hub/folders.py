"""Folders that load anywhere: export a pipeline with its code, and load one without running code from it."""

import inspect
import json
import os
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError

import pyrdiff.models
import pyrdiff.pipelines
import pyrdiff.schedulers

CARD = """
# {title}

{description}

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH_OR_REPO", trust_remote_code=True)
{call}
```

`trust_remote_code` is needed because the folder carries the pipeline's own code. Where pyrdiff is installed, none of it
runs: `pyrdiff.load("PATH_OR_REPO")`.
"""


def export(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike,
    *,
    description: str = "An unconditional pixel-space diffusion model.",
    max_shard_size: str | int | None = None,
    license: str | None = None,
) -> Path:
    """
    Writes a pipeline as a self-contained folder: safetensors weights, configs, source files and a model card.

    It is written beside, loaded once, compared with what was saved, and only then takes the name `folder`, where it
    replaces an earlier export.

    Args:
        pipeline: One of pyrdiff's pipelines, or any that saves its own code.
        folder: Where to. An existing folder must be empty or an earlier export.
        description: One paragraph for the model card.
        max_shard_size: Largest weight file, e.g. "10MB"; by default one file up to diffusers' limit.
        license: Licence identifier for the model card.

    Returns:
        The folder.

    Raises:
        ValueError: if `folder` holds something else.
        RuntimeError: if the written folder does not load to the same weights; `folder` is then as it was.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / DiffusionPipeline.config_name).is_file() and any(folder.iterdir()):
        raise ValueError(f"folder={str(folder)!r}: expected a new, an empty or an earlier exported folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    before = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        pipeline.save_pretrained(beside, safe_serialization=True, max_shard_size=max_shard_size)
        image = inspect.signature(pipeline.__call__).parameters.get("image")
        enlarges = image is not None and image.default is inspect.Parameter.empty
        task = "image-to-image" if enlarges else "unconditional-image-generation"
        call = "larger = pipeline(image).images[0]" if enlarges else "images = pipeline(batch_size=4).images"
        data = ModelCardData(library_name="diffusers", pipeline_tag=task, license=license)
        data.tags = ["pyrdiff", type(pipeline).__name__]
        card = ModelCard(
            f"---\n{data.to_yaml()}\n---\n" + CARD.format(title=folder.name, description=description, call=call)
        )
        card.save(beside / "README.md")
        _verify(pipeline, beside)
        if folder.exists():
            folder.rename(before)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if before.exists() and not folder.exists():
            before.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    return folder


def _verify(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Loads an export the way a user without pyrdiff does, and compares every weight."""
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, use_safetensors=True)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            kept = loaded.components[name].state_dict()
            for key, value in getattr(part, "_orig_mod", part).state_dict().items():
                if not torch.equal(value.detach().cpu().float(), kept[key].float()):
                    raise RuntimeError(f"{folder}: {name}.{key} was read back different from what was saved")


def load(
    path_or_repo: str | os.PathLike, *, revision: str | None = None, pipeline_class: str | None = None, **kwargs
) -> DiffusionPipeline:
    """
    Loads an exported pipeline with the classes of the installed pyrdiff: code in the folder is neither fetched nor run.

    Args:
        path_or_repo: A local folder, or a repository on the Hub.
        revision: Branch, tag or commit of the repository.
        pipeline_class: Another of pyrdiff's pipelines than the folder's own, with the same network, e.g.
            "GuidedSRPipeline" for what was trained to generate.
        **kwargs: For `DiffusionPipeline.from_pretrained`, e.g. `torch_dtype`; `token`, `cache_dir` and
            `local_files_only` for the download.

    Raises:
        ValueError: if there is no such folder, or it is not an export of one of pyrdiff's pipelines, or a config in it
            has an unknown key or a value that is no number; the file and the key are named.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        if folder.exists() or str(path_or_repo).count("/") != 1:
            raise ValueError(
                f"path_or_repo={str(path_or_repo)!r}: expected a folder or a repository such as 'user/name'"
            )
        names = ("token", "cache_dir", "local_files_only", "force_download")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        wanted = ["*.json", "*.safetensors"]
        try:
            folder = snapshot_download(str(path_or_repo), revision=revision, allow_patterns=wanted, **hub_arguments)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(
                f"path_or_repo={str(path_or_repo)!r}: neither a folder nor a repository that can be read: {error}"
            ) from error
        folder = Path(folder)
    index_path = folder / DiffusionPipeline.config_name
    if not index_path.is_file():
        raise ValueError(
            f"path_or_repo={str(path_or_repo)!r}: expected an exported pipeline, with {index_path.name} in it"
        )
    index = _read_config(index_path)
    name = index.get("_class_name")
    name = name[1] if isinstance(name, list) and len(name) == 2 else name
    if name not in pyrdiff.pipelines.__all__:
        raise ValueError(f"{index_path}: _class_name is {name!r}; expected one of {pyrdiff.pipelines.__all__}")
    own_class, chosen = getattr(pyrdiff.pipelines, name), pipeline_class or name
    if chosen not in pyrdiff.pipelines.__all__:
        raise ValueError(f"pipeline_class={pipeline_class!r}: expected one of {pyrdiff.pipelines.__all__}")
    _check_keys(index_path, index, own_class)
    chosen = getattr(pyrdiff.pipelines, chosen)
    missing = set(chosen._get_signature_keys(chosen)[0]) - set(index)
    if missing:
        raise ValueError(f"pipeline_class={pipeline_class!r}: {folder} of {name} has no {sorted(missing)}")
    for part in set(index) & set(own_class._get_signature_keys(own_class)[0]):
        _check_part(folder / part, index[part])
    try:
        return chosen.from_pretrained(folder, use_safetensors=True, **kwargs)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from error


def _check_part(folder: Path, entry) -> None:
    """Refuses a component of another class than ours and diffusers', and config keys that its class does not know."""
    if entry is None or entry == [None, None]:
        return
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(item, str) for item in entry)):
        raise ValueError(f"{folder.parent}: {folder.name} is {entry!r} in the index; expected [module, class]")
    homes = (diffusers,) if entry[0] == "diffusers" else (pyrdiff.models, pyrdiff.schedulers)
    part_class = next((getattr(home, entry[1]) for home in homes if hasattr(home, entry[1])), None)
    if part_class is None:
        raise ValueError(f"{folder.parent}: {folder.name} is {entry!r}; expected a class of diffusers or of pyrdiff")
    for path in sorted(folder.glob("*config.json")):
        _check_keys(path, _read_config(path), part_class)


def _read_config(path: Path) -> dict:
    def constant(text: str) -> float:
        if text == "NaN":
            raise ValueError(f"{path}: NaN is not a value; expected numbers")
        return float(text)  # an infinite bound is a default of some schedulers

    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _check_keys(path: Path, config: dict, owner: type) -> None:
    """A misspelt key would be ignored by diffusers. A scheduler's config may carry settings of compatible ones."""
    owners = [owner, *(owner._get_compatibles() if hasattr(owner, "_get_compatibles") else [])]
    known = {name for each in owners for name in inspect.signature(each.__init__).parameters}
    for key in config:
        if not key.startswith("_") and key not in known:
            raise ValueError(f"{path}: unknown key {key!r} for {owner.__name__}")
