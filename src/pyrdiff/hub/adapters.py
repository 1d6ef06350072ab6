"""Adapters: changes of low rank to a network's weights (LoRA, arXiv 2106.09685), in files of their own, by peft."""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import set_weights_and_activate_adapters
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pyrdiff.parts.checks import is_number
from pyrdiff.parts.colors import check_colors
from pyrdiff.parts.files import replacing_folder
from pyrdiff.parts.settings import is_whole
from pyrdiff.parts.weights import refuse_unusable, unusable

from . import card
from .loading import Component, current_names, read_config, weight_files
from .messages import in_one_line, shown
from .repository import Repository, local_folder, public_name

WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers names it
CONFIG = "adapter_config.json"  # as peft does
BASE = "base.json"  # what the adapter was trained over
FOLDER = "adapter"  # in that of a training
METADATA = "lora_adapter_metadata"  # in the header of the weights, for `load_lora_adapter` of diffusers
INPUT = "conv_in"  # may have channels that other networks of these weights have not
LARGEST_RANK = 4096
LEFT_OUT = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")  # of peft's LoRA


class Adapter(NamedTuple):
    """
    An adapter that was read.

    Args:
        name: What its network calls it.
        place: Where it is, as the user named it.
        tensors: {name: values} of its weights.
        rank, alpha: It adds alpha / rank times the product of its two matrices to each weight.
        base: What it was trained over: `name`, `digest`.
        colors: Of the images that it was trained on, as `PyramidalPipeline` takes them, or None.
    """

    name: str
    place: str
    tensors: dict[str, torch.Tensor]
    rank: int
    alpha: float
    base: dict
    colors: dict | None


def require_peft():
    """
    The package.

    Raises:
        ImportError: if it is not installed; one line says how to get it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"adapters need peft: pip install 'pyrdiff[lora]' ({error})") from error
    return peft


def targets_of(network: torch.nn.Module) -> list[str]:
    """The layers that adapters change: every linear one and every convolution, but for the first."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [name for name, module in network.named_modules() if type(module) in kinds and name != INPUT]


def inject(network: torch.nn.Module, rank: int) -> None:
    """
    Puts a new adapter into a network, in place. It changes nothing yet, and nothing else is trained from then on.

    Args:
        network: Any.
        rank: Of the change to each weight; those of 3x3 convolutions are matrices [out, 9 in].
    """
    peft = require_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets_of(network))
    peft.inject_adapter_in_model(config, network)


def base_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the weights that no adapter changes, biases and norms: a merged network has those of its base."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if tensors[name].ndim == 1:
            digest.update(name.encode() + tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def saved_digest(network: Component, variant: str | None = None) -> str:
    """`base_digest` of a saved network."""
    names, found = current_names(network), {}
    for path in weight_files(network, variant):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if len(file.get_slice(key).get_shape()) == 1:
                    found[names.get(key, key)] = file.get_tensor(key)
    return base_digest(found)


# Saving.


def save_adapter(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike,
    *,
    base: str,
    digest: str,
    description: str,
    license: str | None = None,
    training: dict[str, object] | None = None,
    data: str | None = None,
) -> Path:
    """
    Writes the adapter of a pipeline's `unet`, whole or not at all: its weights, as diffusers' `load_lora_adapter` reads
    them (prefix=None, use_safetensors=True), peft's `adapter_config.json`, what it was trained over, and a card.

    Args:
        pipeline: With the adapter of a training in its network.
        folder: Where to. An existing folder must be empty or an earlier adapter.
        base: Name of the model that it was trained over.
        digest: See `base_digest`.
        description, license, training, data: For the card; see `export`.

    Returns:
        The folder.

    Raises:
        ValueError: if `folder` holds something else, or weights are not finite.
    """
    from peft.utils import get_peft_model_state_dict

    folder, network = Path(folder), pipeline.unet
    if folder.exists() and not (folder / WEIGHTS).is_file() and any(folder.iterdir()):
        raise ValueError(f"folder={str(folder)!r}: expected a new, an empty or an earlier adapter's folder")
    refuse_unusable([("unet", network)], "Nothing was saved.")
    config = network.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    tensors = {key: value.contiguous().cpu() for key, value in get_peft_model_state_dict(network).items()}
    known = {"name": base, "digest": digest, "network": type(network).__name__, "colors": pipeline.config.get("colors")}
    title = folder.resolve().parent.name if folder.name == FOLDER else folder.name
    text = card.write_adapter(title, base, description, license, training or {}, data)
    with replacing_folder(folder) as beside:
        beside.mkdir()
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt", METADATA: _as_json(config)})
        (beside / CONFIG).write_text(_as_json(config), encoding="utf-8")
        (beside / BASE).write_text(_as_json(known), encoding="utf-8")
        (beside / "README.md").write_text(text, encoding="utf-8")
    return folder


def _as_json(values: dict) -> str:
    return json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"


# Loading.


def weighted(adapters: "Mapping[str, float] | Iterable[str]") -> dict[str, float]:
    """
    {place: weight} of adapters; those without a weight have 1.

    Raises:
        ValueError: for a weight that is no number.
        ImportError: if there are adapters and no peft.
    """
    weights = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    for place, weight in weights.items():
        if not is_number(weight):
            raise ValueError(f"adapters: {str(place)!r} has the weight {weight!r}; expected a number")
    if weights:
        require_peft()
    return weights


def parse_adapters(texts: Iterable[str]) -> dict[str, float]:
    """{place: weight} of texts such as "runs/mine" and "runs/mine:0.5"."""
    weights = {}
    for text in texts:
        place, colon, weight = text.rpartition(":")
        try:
            weights[place if colon else text] = float(weight) if colon else 1.0
        except ValueError:  # a colon of the path
            weights[text] = 1.0
    return weights


def add_adapters(pipeline: DiffusionPipeline, weights: Mapping[str, float], digest: str) -> None:
    """
    Puts saved adapters into the network `unet` of a pipeline, in place.

    Args:
        pipeline: The base.
        weights: {folder or repository: its weight}, see `weighted`.
        digest: `base_digest` of the base as it was saved.

    Raises:
        ValueError: for an adapter that is none, or one for another base.
    """
    network, found = pipeline.unet, []
    for place in weights:
        found.append(read_adapter(place, network, [adapter.name for adapter in found]))
        _check_base(found[-1], digest)
    colors = _mixed_colors(pipeline, found, list(weights.values()))
    for adapter in found:
        _put_in(adapter, network)
    if found:
        set_weights_and_activate_adapters(network, [adapter.name for adapter in found], list(weights.values()))
        network.requires_grad_(False)
    if colors is not None:
        pipeline.register_to_config(colors=colors)


def read_adapter(place: str | os.PathLike, network: torch.nn.Module, taken: Iterable[str] = ()) -> Adapter:
    """
    Reads an adapter, without running code from it, and compares it with the network that it is for.

    Args:
        place: Folder of an adapter or of its training, or a repository.
        network: The network, with other adapters or without.
        taken: Names that it is not to have.

    Raises:
        ValueError: the file and the tensor are named.
    """
    try:
        return _read(place, network, taken)
    except ValueError as error:
        raise ValueError(f"adapter {str(place)!r}: {error}") from error


def _read(place: str | os.PathLike, network: torch.nn.Module, taken: Iterable[str]) -> Adapter:
    folder = local_folder(place)
    if folder is None:
        repository = Repository.open(str(place))
        folder = repository.fetch(
            [*repository.configs(), *repository.weights({"": sum(p.numel() for p in network.parameters())})]
        )
    elif not (folder / WEIGHTS).is_file() and (folder / FOLDER / WEIGHTS).is_file():
        folder = folder / FOLDER
    for name in (WEIGHTS, CONFIG, BASE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; expected the folder of an adapter")
    config, base = read_config(folder / CONFIG), read_config(folder / BASE)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not is_whole(rank) or not 1 <= rank <= LARGEST_RANK or not is_number(alpha):
        raise ValueError(f"{folder / CONFIG}: r={shown(rank)}, lora_alpha={shown(alpha)}; expected numbers")
    others = [name for name in LEFT_OUT if config.get(name)]
    if config.get("peft_type") != "LORA" or others or config.get("bias", "none") != "none":
        raise ValueError(f"{folder / CONFIG}: expected peft_type LORA without bias and {', '.join(LEFT_OUT)}")
    if not all(isinstance(base.get(key), str) for key in ("name", "digest")):
        raise ValueError(f"{folder / BASE}: expected the name and digest of a base")
    _check_shapes(folder / WEIGHTS, _shapes(folder / WEIGHTS), rank, network, base["name"])
    tensors = load_file(folder / WEIGHTS)
    bad = unusable(tensors)
    if bad:
        raise ValueError(f"{folder / WEIGHTS}: {bad[0]} is not finite, or far too large; expected weights")
    colors = base.get("colors")
    if colors is not None:
        check_colors(colors, network.config.out_channels)
    return Adapter(_name(folder, taken), str(place), tensors, rank, float(alpha), base, colors)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """By the header of a file."""
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected safetensors: {in_one_line(error)}") from error


def _check_shapes(path: Path, shapes: dict, rank: int, network: torch.nn.Module, base: str) -> None:
    """Refuses tensors that are not two matrices for each of some layers of the network."""
    layers = {name.replace(".base_layer", ""): module for name, module in network.named_modules()}
    kinds, trained = (torch.nn.Linear, torch.nn.Conv2d), f"the adapter was trained over {base!r}"
    wanted = {}
    for name in {key.rpartition(".lora_")[0] for key in shapes}:
        layer = getattr(layers.get(name), "base_layer", layers.get(name))
        if not isinstance(layer, kinds):
            odd = shown(min(key for key in shapes if key.startswith(name)))
            raise ValueError(f"{path}: {odd} is for a layer that this network has not: {trained}")
        out, inner = layer.weight.shape[0], tuple(layer.weight.shape[1:])
        wanted[f"{name}.lora_A.weight"] = (rank, *inner)
        wanted[f"{name}.lora_B.weight"] = (out, rank, *[1] * (len(inner) - 1))
    if not wanted or set(wanted) != set(shapes):
        odd = min(set(wanted) ^ set(shapes), default="nothing")
        raise ValueError(f"{path}: has {shown(odd)} alone; expected lora_A.weight and lora_B.weight of each layer")
    for key in sorted(wanted):
        if shapes[key] != wanted[key]:
            raise ValueError(
                f"{path}: {key} has the shape {shapes[key]}; for this network it has {wanted[key]}: {trained}"
            )


def _check_base(adapter: Adapter, digest: str) -> None:
    if adapter.base["digest"] != digest:
        raise ValueError(
            f"adapter {adapter.place!r}: was trained over {adapter.base['name']!r}, of other weights than this base; "
            "expected that one, or one with adapters merged into it"
        )


def _name(folder: Path, taken: Iterable[str]) -> str:
    """A name for peft, of the training's folder or the adapter's own."""
    name = re.sub(r"\W", "_", public_name(folder)) or FOLDER
    used = set(taken)
    return next(each for each in (name, *(f"{name}_{k}" for k in range(2, len(used) + 3))) if each not in used)


def _put_in(adapter: Adapter, network: torch.nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    layers = sorted({key.rpartition(".lora_")[0] for key in adapter.tensors})
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=layers, inference_mode=True)
    dtype, device = network.dtype, network.device
    tensors = {key: value.to(device, dtype) for key, value in adapter.tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of several adapters in a network, which are wanted
        inject_adapter_in_model(config, network, adapter.name, low_cpu_mem_usage=True)  # draws no random numbers
    found = set_peft_model_state_dict(network, tensors, adapter.name, low_cpu_mem_usage=True)
    if found.unexpected_keys or any(adapter.name in key for key in found.missing_keys if ".lora_" in key):
        raise ValueError(f"adapter {adapter.place!r}: peft found other layers than {len(layers)} of it")
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = True  # so that the mixin of diffusers knows of it
    network.eval()


def _mixed_colors(pipeline: DiffusionPipeline, adapters: list[Adapter], weights: list[float]) -> dict | None:
    """
    The colours that images start from: those of the base and of the adapters' images, each by its weight; None where
    they stay as they are.
    """
    base, parts = pipeline.config.get("colors"), []
    for adapter, weight in zip(adapters, weights, strict=True):
        if base is not None and adapter.colors is not None and weight > 0:
            parts.append((weight, adapter.colors))
    if not parts:
        return None
    total = max(1.0, math.fsum(weight for weight, _ in parts))
    rest = 1.0 - math.fsum(weight for weight, _ in parts) / total
    shares = [(rest, base), *((weight / total, colors) for weight, colors in parts)]

    def mixed(pick) -> dict:
        return {
            key: sum(share * torch.tensor(pick(colors)[key], dtype=torch.float64) for share, colors in shares).tolist()
            for key in ("mean", "covariance")
        }

    result = mixed(lambda colors: colors)
    counts = {len(colors.get("classes") or []) for _, colors in shares}
    if len(counts) == 1 and counts != {0}:
        result["classes"] = [mixed(lambda colors, k=k: colors["classes"][k]) for k in range(counts.pop())]
    return result


def merge_adapters(pipeline: DiffusionPipeline) -> None:
    """
    Adds the active adapters of a pipeline's `unet` to its weights, as they are weighted, and takes them out, in place.
    The pipeline is then as quick as its base, and can be exported.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = pipeline.unet
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            network.set_submodule(name, module.get_base_layer())
    del network.peft_config
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = False
    network.requires_grad_(True)
