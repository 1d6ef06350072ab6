"""Networks of published shape with random weights, so that the tests need neither downloads nor the lpips package."""

import importlib
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the folder shared/ beside the project, with its data and weights")
    return SHARED


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return state


@pytest.fixture(scope="session")
def alexnet_file(tmp_path_factory) -> Path:
    shapes = {"0": (64, 3, 11, 11), "3": (192, 64, 5, 5), "6": (384, 192, 3, 3), "8": (256, 384, 3, 3)}
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(random_state(shapes | {"10": (256, 256, 3, 3)}), path)
    return path


@pytest.fixture(scope="session")
def squeezenet_file(tmp_path_factory) -> Path:
    shapes, before = {"0": (64, 3, 3, 3)}, 64
    for layer, inside, after in (
        *((3, 16, 64), (4, 16, 64), (6, 32, 128), (7, 32, 128)),
        *((9, 48, 192), (10, 48, 192), (11, 64, 256), (12, 64, 256)),
    ):
        shapes[f"{layer}.squeeze"] = (inside, before, 1, 1)
        shapes[f"{layer}.expand1x1"] = (after, inside, 1, 1)
        shapes[f"{layer}.expand3x3"] = (after, inside, 3, 3)
        before = 2 * after
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(random_state(shapes), path)
    return path


@pytest.fixture
def lpips_heads(tmp_path, monkeypatch) -> Path:
    """A folder that looks like the lpips package, with positive random heads; importing it fails the test."""
    folder = tmp_path / "site" / "lpips"
    (folder / "weights" / "v0.1").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('lpips was imported')\n")
    channels = {"alex": (64, 192, 384, 256, 256), "squeeze": (64, 128, 256, 384, 384, 512, 512)}
    for network, counts in channels.items():
        heads = {f"lin{i}.model.1.weight": torch.full((1, count, 1, 1), 0.5) for i, count in enumerate(counts)}
        torch.save(heads, folder / "weights" / "v0.1" / f"{network}.pth")
    monkeypatch.syspath_prepend(str(folder.parent))
    importlib.invalidate_caches()
    return folder
