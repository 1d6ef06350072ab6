"""Published convolutional networks as functions of a state dict, so that none needs torchvision.

Each takes images that are normalised already, and gives the activations that metrics use.
"""

import functools
import hashlib
import importlib.util
import os
import pickle
from pathlib import Path
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TORCHVISION = "https://download.pytorch.org/models/"
URLS = {
    "alexnet": TORCHVISION + "alexnet-owt-7be5be79.pth",
    "squeezenet": TORCHVISION + "squeezenet1_1-b8a52dc0.pth",
    "vgg16": TORCHVISION + "vgg16-397923af.pth",
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
}
SMALLEST = {"alexnet": 31, "squeezenet": 17, "vgg16": 16, "inception": 1}  # side of an image, in pixels


def alexnet(state: dict, x: Tensor) -> list[Tensor]:
    """AlexNet (Krizhevsky 2014, arXiv:1404.5997): after each of the five ReLUs, 64, 192, 384, 256 and 256 channels."""
    taps = []
    for name, stride, padding in (("0", 4, 2), ("3", 1, 2), ("6", 1, 1), ("8", 1, 1), ("10", 1, 1)):
        if name in ("3", "6"):
            x = F.max_pool2d(x, 3, 2)
        x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding).relu()
        taps.append(x)
    return taps


def squeezenet(state: dict, x: Tensor) -> list[Tensor]:
    """SqueezeNet 1.1 (Iandola et al. 2016): 64, 128, 256, 384, 384, 512 and 512 channels, the last from the last fire.

    The taps are those of LPIPS: before each pooling, and each of the last four fire modules.
    """

    def conv(x: Tensor, name: str, **settings) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **settings).relu()

    x = conv(x, "0", stride=2)
    taps = []
    for layer in range(2, 13):
        if layer in (2, 5, 8):
            taps.append(x)
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            continue
        x = conv(x, f"{layer}.squeeze")
        x = torch.cat((conv(x, f"{layer}.expand1x1"), conv(x, f"{layer}.expand3x3", padding=1)), 1)
        if layer >= 9:
            taps.append(x)
    return taps


def vgg16(state: dict, x: Tensor) -> list[Tensor]:
    """VGG-16 (Simonyan and Zisserman 2014): the last ReLU before each pooling, 64, 128, 256, 512 and 512 channels."""
    taps = []
    for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        if taps:
            x = F.max_pool2d(x, 2)
        for name in block:
            x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
        taps.append(x)
    return taps


def inception(state: dict, x: Tensor) -> list[Tensor]:
    """The Inception-v3 of FID (Heusel et al. 2017): [B, 3, 299, 299] in [-1, 1] to the 2048 of the last pooling.

    It is the network of the 2015 TensorFlow release: average pooling counts no padding, and the last module pools by
    maximum.
    """

    def conv(x: Tensor, name: str, stride: int = 1, pad: bool = True) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        padding = tuple(side // 2 for side in weight.shape[-2:]) if pad else 0
        x = F.conv2d(x, weight, None, stride, padding)
        norm = (state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *norm, eps=1e-3).relu()

    def chain(x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = conv(x, name)
        return x

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    x = conv(x, "Conv2d_1a_3x3", 2, pad=False)
    x = conv(x, "Conv2d_2a_3x3", pad=False)
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3"), 3, 2)
    x = conv(x, "Conv2d_3b_1x1")
    x = F.max_pool2d(conv(x, "Conv2d_4a_3x3", pad=False), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        branches = (
            conv(x, f"{name}.branch1x1"),
            chain(x, f"{name}.branch5x5_1", f"{name}.branch5x5_2"),
            chain(x, *(f"{name}.branch3x3dbl_{part}" for part in "123")),
            conv(average(x), f"{name}.branch_pool"),
        )
        x = torch.cat(branches, 1)
    double = chain(x, "Mixed_6a.branch3x3dbl_1", "Mixed_6a.branch3x3dbl_2")
    branches = (
        conv(x, "Mixed_6a.branch3x3", 2, pad=False),
        conv(double, "Mixed_6a.branch3x3dbl_3", 2, pad=False),
        F.max_pool2d(x, 3, 2),
    )
    x = torch.cat(branches, 1)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        branches = (
            conv(x, f"{name}.branch1x1"),
            chain(x, *(f"{name}.branch7x7_{part}" for part in "123")),
            chain(x, *(f"{name}.branch7x7dbl_{part}" for part in "12345")),
            conv(average(x), f"{name}.branch_pool"),
        )
        x = torch.cat(branches, 1)
    branches = (
        conv(conv(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", 2, pad=False),
        conv(chain(x, *(f"Mixed_7a.branch7x7x3_{part}" for part in "123")), "Mixed_7a.branch7x7x3_4", 2, pad=False),
        F.max_pool2d(x, 3, 2),
    )
    x = torch.cat(branches, 1)
    for name in ("Mixed_7b", "Mixed_7c"):
        single = conv(x, f"{name}.branch3x3_1")
        double = chain(x, f"{name}.branch3x3dbl_1", f"{name}.branch3x3dbl_2")
        pooled = average(x) if name == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        branches = (
            conv(x, f"{name}.branch1x1"),
            *(conv(single, f"{name}.branch3x3_{part}") for part in ("2a", "2b")),
            *(conv(double, f"{name}.branch3x3dbl_{part}") for part in ("3a", "3b")),
            conv(pooled, f"{name}.branch_pool"),
        )
        x = torch.cat(branches, 1)
    return [x.mean((2, 3))]


NETWORKS = {"alexnet": alexnet, "squeezenet": squeezenet, "vgg16": vgg16, "inception": inception}


def open_trunk(
    network: str, weights: str | os.PathLike | None = None, device: str | torch.device = "cpu"
) -> tuple[dict, str]:
    """The state dict of a network, and the first 12 hexadecimal digits of the SHA-256 of its file.

    Args:
        network: A key of `NETWORKS`.
        weights: A file: a state dict in torchvision's layout, of the whole model or of its `features`, as .safetensors
            or as what `torch.load(weights_only=True)` reads. None takes the published file from torch.hub's cache, and
            downloads it when it is not there.
        device: Where the tensors go.

    Raises:
        ValueError: when there is no such file, it is not of this network, or it cannot be downloaded.
    """
    if weights is None:
        weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(URLS[network]).path).name
        if not weights.exists():
            try:
                weights.parent.mkdir(parents=True, exist_ok=True)
                prefix = weights.stem.rpartition("-")[2]
                torch.hub.download_url_to_file(URLS[network], str(weights), hash_prefix=prefix, progress=False)
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"weights=None, but {URLS[network]} cannot be downloaded ({error}): expected the path of a "
                    f"file with the weights of {network}"
                ) from error
    path = Path(weights)
    if not path.is_file():
        raise ValueError(f"weights={str(path)!r}, which is no file: expected a file with {network}'s weights")
    stat = path.stat()
    return _read_trunk(network, path.resolve(), (stat.st_size, stat.st_mtime_ns), str(device))


@functools.lru_cache(maxsize=4)
def _read_trunk(network: str, path: Path, stamp: tuple, device: str) -> tuple[dict, str]:
    refused = f"weights={str(path)!r}, which is not a state dict of {network}"
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
        state = {name.removeprefix("features."): value for name, value in state.items()}
        probe = torch.zeros(1, 3, *(2 * [299 if network == "inception" else SMALLEST[network]]))
        with torch.no_grad():
            fits = all(tap.isfinite().all() for tap in NETWORKS[network](state, probe))
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(f"{refused}: {str(error).splitlines()[0]}") from error
    except (AttributeError, TypeError, ValueError) as error:  # it holds something else than named tensors
        raise ValueError(refused) from error
    if not fits:
        raise ValueError(f"{refused}: it gives values that are not finite")
    return {name: value.to(device) for name, value in state.items()}, sha256_of(path.read_bytes())


def lpips_heads(network: str, device: str | torch.device = "cpu") -> list[Tensor]:
    """The linear heads of LPIPS, version 0.1, [1, C, 1, 1] a tap, from the files of the lpips package (not imported).

    Raises:
        ImportError: when that package is not installed.
    """
    spec = importlib.util.find_spec("lpips")
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0]) / "weights" / "v0.1" / f"{network}.pth" if folders else None
    if path is None or not path.is_file():
        raise ImportError(
            "lpips: its linear heads come with the lpips package, which is not installed; expected "
            "`pip install --no-deps lpips==0.1.4` (with its dependencies it would bring torchvision along)"
        )
    state = torch.load(path, weights_only=True, map_location=device)
    return [state[f"lin{index}.model.1.weight"] for index in range(len(state))]


def imagenet_normal(images: Tensor) -> Tensor:
    """RGB [B, 3, H, W] from [0, 1] to ImageNet's mean 0 and standard deviation 1."""
    mean, std = (images.new_tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def sha256_of(content: bytes) -> str:
    """The first 12 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:12]
