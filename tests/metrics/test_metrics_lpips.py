"""LPIPS: its published reference values, a closed form, and what is said when files are missing."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pyrdiff.metrics import LPIPS, lpips
from pyrdiff.metrics.trunks import NETWORKS, SMALLEST

UNIT = (0, 1)


@pytest.mark.parametrize(
    "network, file, expected",
    [("alex", "alexnet_features.pth", (0.7219, 0.1376)), ("squeeze", "squeeze.backbone.pth", (0.7110, 0.1479))],
)
def test_reference_values(shared, network, file, expected):
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("needs the weight files of the lpips package: pip install --no-deps lpips==0.1.4")
    folder = shared / "weights" / "lpips"
    images = [Image.open(folder / f"reference_images/ex_{name}.png").convert("RGB") for name in ("ref", "p0", "p1")]
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images]
    found = lpips(
        torch.stack([images[0]] * 3), torch.stack([*images[1:], images[0]]), data_range=UNIT, network=network,
        weights=folder / file,
    )  # fmt: skip
    assert found.per_image.tolist() == pytest.approx([*expected, 0], abs=1e-4)
    assert found.conventions["network"] in file.replace("squeeze.backbone", "squeezenet")


def random_pair(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, side, side, generator=generator), torch.rand(1, 3, side, side, generator=generator)


@pytest.mark.parametrize("network, trunk", [("alex", "alexnet"), ("squeeze", "squeezenet")])
def test_the_distance_is_that_of_unit_vectors(network, trunk, lpips_heads, alexnet_file, squeezenet_file):
    """With all heads 0.5 it is 1 - cosine at each position, averaged, and added up over the taps."""
    weights = alexnet_file if network == "alex" else squeezenet_file
    a, b = random_pair(64)
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    state = torch.load(weights, weights_only=True)
    taps = zip(*(NETWORKS[trunk](state, (2 * x - 1 - shift) / scale) for x in (a, b)), strict=True)
    expected = sum((1 - torch.cosine_similarity(x, y, dim=1)).mean() for x, y in taps)
    found = lpips(a, b, data_range=UNIT, network=network, weights=weights)
    assert found.value == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_is_the_measure_with_gradients(lpips_heads, alexnet_file):
    a, b = random_pair(40)
    images, originals = (2 * a - 1).requires_grad_(), (2 * b - 1).requires_grad_()
    measure = LPIPS.open("alex", alexnet_file)
    distance = measure(images, originals)
    assert distance.item() == pytest.approx(lpips(a, b, data_range=UNIT, weights=alexnet_file).value, rel=1e-6)
    distance.sum().backward()
    assert originals.grad is None
    step = 1e-2 * images.grad / images.grad.norm()
    with torch.no_grad():
        change = (measure(images + step, originals) - measure(images - step, originals)).item()
    assert change == pytest.approx(2e-2 * images.grad.norm().item(), rel=0.05)


def test_gray_is_repeated(lpips_heads, alexnet_file):
    a, b = (image[:, :1] for image in random_pair(40))
    gray = lpips(a, b, data_range=UNIT, weights=alexnet_file)
    assert gray.value == lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1), data_range=UNIT, weights=alexnet_file).value
    assert gray.conventions["channels"] == "gray, repeated to rgb"


def test_weights_come_in_several_forms(lpips_heads, alexnet_file, tmp_path):
    pair = random_pair(40)
    state = torch.load(alexnet_file, weights_only=True)
    whole = {f"features.{name}": value for name, value in state.items()} | {"classifier.1.bias": torch.zeros(3)}
    save_file(whole, tmp_path / "whole.safetensors")
    plain, wrapped = (lpips(*pair, data_range=UNIT, weights=w) for w in (alexnet_file, tmp_path / "whole.safetensors"))
    assert plain.value == wrapped.value
    assert plain.conventions["weights_sha256"] != wrapped.conventions["weights_sha256"]


def test_what_is_missing_is_said(lpips_heads, alexnet_file, squeezenet_file, tmp_path, monkeypatch):
    pair = random_pair(40)
    broken, odd = tmp_path / "broken.pth", tmp_path / "odd.pth"
    broken.write_bytes(alexnet_file.read_bytes()[:1000])
    torch.save([1, 2], odd)
    nan = torch.load(alexnet_file, weights_only=True)
    nan["3.bias"][0] = torch.nan
    torch.save(nan, tmp_path / "nan.pth")
    for weights, message in (
        (tmp_path / "none.pth", "which is no file"),
        (squeezenet_file, "which is not a state dict of alexnet"),
        (broken, "which is not a state dict of alexnet"),
        (odd, "which is not a state dict of alexnet"),
        (tmp_path / "nan.pth", "not finite"),
    ):
        with pytest.raises(ValueError, match=f"^weights=.*{message}") as error:
            lpips(*pair, data_range=UNIT, weights=weights)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(ValueError, match=r"^weights=None, but https.*alexnet.* \(no route\): expected the path"):
        lpips(*pair, data_range=UNIT)
    with pytest.raises(ValueError, match="^network='resnet': expected one of 'alex', 'squeeze', 'vgg'"):
        lpips(*pair, data_range=UNIT, network="resnet")
    for network, trunk in (("alex", "alexnet"), ("vgg", "vgg16")):
        small = [image[..., : SMALLEST[trunk] - 1] for image in pair]
        with pytest.raises(ValueError, match="^prediction with images .* sides of"):
            lpips(*small, data_range=UNIT, network=network, weights=alexnet_file)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^lpips: .*`pip install --no-deps lpips==0.1.4`"):
        lpips(*pair, data_range=UNIT, weights=alexnet_file)


@pytest.mark.parametrize("trunk", ["alexnet", "squeezenet", "vgg16"])
def test_the_smallest_image_is_the_smallest(trunk, alexnet_file, squeezenet_file):
    """One pixel less and the network has nothing left to pool."""
    if trunk == "vgg16":
        shapes = dict(zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), [4] * 13, strict=True))
        state = {f"{name}.weight": torch.ones(4, 3 if name == 0 else 4, 3, 3) for name in shapes}
        state |= {f"{name}.bias": torch.zeros(4) for name in shapes}
    else:
        state = torch.load({"alexnet": alexnet_file, "squeezenet": squeezenet_file}[trunk], weights_only=True)
    side = SMALLEST[trunk]
    assert all(tap.numel() for tap in NETWORKS[trunk](state, torch.ones(1, 3, side, side)))
    with pytest.raises(RuntimeError):
        NETWORKS[trunk](state, torch.ones(1, 3, side - 1, side - 1))
