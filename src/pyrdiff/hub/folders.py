"""Exports: folders that load with and without pyrdiff."""

import os
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import pyrdiff
from pyrdiff.parts.files import replacing_folder
from pyrdiff.parts.wrappers import plain

from . import card

LICENCE = "LICENSE"


def export(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike,
    *,
    description: str = "A pixel-space diffusion model.",
    max_shard_size: str | int | None = None,
    license: str | None = None,
    training: dict[str, object] | None = None,
    data: str | None = None,
    limits: str = "",
) -> Path:
    """
    Writes a pipeline as a self-contained folder: safetensors weights, configs, code, its licence, and a model card.

    It is written beside, loaded once, compared with what was saved, and only then takes the name `folder`, where it
    replaces an earlier export.

    Args:
        pipeline: One of pyrdiff's pipelines, or any that saves its own code.
        folder: Where to. An existing folder must be empty or an earlier export.
        description: One paragraph for the model card.
        max_shard_size: Largest weight file, e.g. "10MB"; by default one file up to diffusers' limit.
        license: Licence identifier for the model card. The code has pyrdiff's, Apache-2.0.
        training: What the model card says of the training: {"steps": 20000, "seed": 0, ...}.
        data: For the card: what the images were, and their licence.
        limits: For the card: what the model cannot do.

    Returns:
        The folder.

    Raises:
        ValueError: if `folder` holds something else.
        RuntimeError: if the written folder does not load to the same weights; `folder` is then as it was.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / DiffusionPipeline.config_name).is_file() and any(folder.iterdir()):
        raise ValueError(f"folder={str(folder)!r}: expected a new, an empty or an earlier exported folder")
    with replacing_folder(folder) as beside:
        pipeline.save_pretrained(beside, safe_serialization=True, max_shard_size=max_shard_size)
        write_licence(beside)
        title = folder.resolve().parent.name if folder.name == "pipeline" else folder.name  # of a training, its name
        text = card.write(pipeline, title, description, license, training or {}, data, limits)
        (beside / "README.md").write_text(text, encoding="utf-8")
        _verify(pipeline, beside)
    return folder


def write_licence(folder: Path) -> None:
    """Writes the licence of the code beside it."""
    shutil.copyfile(Path(pyrdiff.__file__).parent / LICENCE, folder / LICENCE)


def _verify(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Loads an export the way a user without pyrdiff does, and compares every weight."""
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, use_safetensors=True)
    for name, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            kept = loaded.components[name].state_dict()
            for key, value in plain(network).state_dict().items():
                if not torch.equal(value.detach().cpu().float(), kept[key].float()):
                    raise RuntimeError(f"{folder}: {name}.{key} was read back different from what was saved")
