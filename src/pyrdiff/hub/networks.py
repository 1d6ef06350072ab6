"""A trained network as data: its config and weights out of a folder or a repository, without running code from it."""

import inspect
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from pyrdiff import plugins
from pyrdiff.parts.weights import unusable

from .loading import (
    INDEX,
    Component,
    check_weights,
    current_names,
    read_component,
    read_config,
    read_folder,
    weight_files,
)
from .repository import Repository, local_folder


class SavedNetwork(NamedTuple):
    """
    Args:
        class_name: Of the network.
        config: Its settings, with the class's defaults where the file says nothing.
        tensors: {name: values} of its weights, as its class calls them today.
        scheduler: Settings of the scheduler that it was trained with, or None where none is beside it.
    """

    class_name: str
    config: dict
    tensors: dict[str, torch.Tensor]
    scheduler: dict | None


def read_network(path_or_repo: str | os.PathLike) -> SavedNetwork:
    """
    Reads the `unet` of a saved pipeline, or a network that was saved alone. Checks are those of `pyrdiff.load`.

    Args:
        path_or_repo: Folder or repository of a pipeline (of an installed method, or stock diffusion such as
            `DDPMPipeline`) or of a network, the output folder of a finished training, or a bundled model's name.

    Raises:
        ValueError: if there is no such network, or it is saved as a pickle.
    """
    folder, repository = local_folder(path_or_repo), None
    if folder is None:
        repository = Repository.open(str(path_or_repo))
        folder = repository.fetch(repository.configs())
    elif (folder / "pipeline" / INDEX).is_file():
        folder = folder / "pipeline"
    alone = not (folder / INDEX).is_file()
    if alone:
        network, scheduler = _alone(folder), None
    else:
        components = read_folder(folder).components
        network, scheduler = components.get("unet"), components.get("scheduler")
    if network is None or network.shapes is None:
        raise ValueError(f"{folder / INDEX}: names no network `unet`")
    if repository is not None:
        repository.fetch(repository.weights({"" if alone else "unet": network.parameters}))
    check_weights(network)
    names = current_names(network)
    saved = {key: value for path in weight_files(network) for key, value in load_file(path).items()}
    tensors = {names.get(key, key): value for key, value in saved.items()}
    bad = unusable(tensors)
    if bad:
        raise ValueError(f"{network.folder}: {bad[0]} is not finite, or far too large; expected weights")
    built = None if scheduler is None else dict(scheduler.cls.from_config(scheduler.config).config)
    return SavedNetwork(network.cls.__name__, {**_defaults(network.cls), **network.config}, tensors, built)


def _alone(folder: Path) -> Component:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected a saved pipeline ({INDEX}) or network (config.json)")
    name = read_config(path).get("_class_name")
    library = "pyrdiff" if name in plugins.classes() else "diffusers"
    return read_component(folder, "", [library, name])


def _defaults(cls: type) -> dict:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}
