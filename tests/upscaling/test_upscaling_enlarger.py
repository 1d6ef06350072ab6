"""Windows and memory of an enlargement, against what the network really sees and holds."""

import pytest
import torch
from diffusers import DDPMScheduler

from pyrdiff import (
    CoordinateUNet2DModel,
    CosineResidualScheduler,
    GuidedSRPipeline,
    ResidualSRPipeline,
    ResidualSRUNet2DModel,
)
from pyrdiff.upscaling import enlarger as room
from pyrdiff.upscaling.enlarger import Enlarger
from pyrdiff.upscaling.memory import free_bytes, network_bytes
from pyrdiff.upscaling.telling import Progress
from pyrdiff.upscaling.watching import watched


def residual(**more) -> ResidualSRPipeline:
    torch.manual_seed(0)
    unet = ResidualSRUNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8, scale_factors=(2,), **more
    )
    pipeline = ResidualSRPipeline(unet, CosineResidualScheduler(100), {"default": {"num_inference_steps": 3}})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def guided() -> GuidedSRPipeline:
    unet = CoordinateUNet2DModel(
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4, add_attention=False,
    )  # fmt: skip
    pipeline = GuidedSRPipeline(unet, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seen(one: Enlarger, size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, torch.Tensor]:
    """Windows that were announced, windows that the network saw, and the result."""
    route = one.route(size, target)
    progress = Progress(route.windows, 1)
    with watched(one.pipeline, progress):
        image = one.enlarge(torch.rand(1, 3, *size[::-1], generator=torch.Generator().manual_seed(0)), route, 0)
    return route.windows, progress.done, image


@pytest.mark.parametrize("size, target, tile", [
    ((20, 9), (40, 18), 8),
    ((20, 9), (33, 15), 8),
    ((5, 9), (20, 36), 8),
    ((5, 9), (20, 36), None),
])  # fmt: skip
def test_what_is_announced_takes_place(size, target, tile):
    announced, took_place, image = seen(Enlarger(residual(), {}, tile), size, target)
    assert announced == took_place > 0 and image.shape == (1, 3, *target[::-1])


@pytest.mark.parametrize("arguments, tile", [({}, 16), ({"guidance": "gradient"}, 16), ({}, None)])
def test_what_is_announced_takes_place_with_guidance(guided, arguments, tile):
    announced, took_place, image = seen(Enlarger(guided, {"refine_steps": 2, **arguments}, tile), (12, 10), (30, 25))
    assert announced == took_place > 0 and image.shape == (1, 3, 25, 30)


def test_windows_are_chosen_by_what_they_hold(monkeypatch):
    one = Enlarger(residual(), {})
    assert "tile" not in one.route((64, 64), (128, 128)).passes[0].arguments
    whole = one.enlarge(torch.rand(1, 3, 40, 40), one.route((40, 40), (80, 80)), 0)
    monkeypatch.setitem(room.WINDOW_BYTES, "cpu", network_bytes(one.network, 3, 32))
    small = Enlarger(one.pipeline, {})
    (only,) = small.route((40, 40), (80, 80)).passes
    # Of sides from 24 to 40, two windows a side see the fewest pixels if they are of 42 or more: three of 30 do here.
    assert only.arguments == {"scale_factor": 2, "tile": 30, "tile_overlap": 4} and only.counts.windows == 9
    assert "tile" not in small.route((20, 20), (40, 40)).passes[0].arguments  # hardly larger than a window
    assert small.enlarge(torch.rand(1, 3, 40, 40), small.route((40, 40), (80, 80)), 0).shape == whole.shape


class Attending(torch.nn.Module):
    """Holds its input, 8 and 16 channels at once; then what attention takes and gives, but no scores."""

    def __init__(self, attention: bool):
        super().__init__()
        self.first, self.second, self.attention = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 16, 1), attention

    def forward(self, sample, time):
        made = self.second(self.first(sample))
        pixels = made.flatten(2).mT
        return torch.nn.functional.scaled_dot_product_attention(pixels, pixels, pixels) if self.attention else made


@pytest.mark.parametrize("attention", [False, True])
def test_the_bytes_of_a_network_are_those_that_it_holds(attention):
    channels = max(3 + 8 + 16, 3 + 16 + 16 if attention else 0)
    assert network_bytes(Attending(attention), 3, 40) == 40**2 * 4 * channels


def test_nobody_who_watches_a_network_sees_it_asked():
    network, seen = Attending(False), []
    network.register_forward_hook(lambda *_: seen.append(1))
    assert network_bytes(network, 3, 8) > 0 and not seen


def test_networks_that_cannot_be_asked():
    assert network_bytes(torch.nn.Bilinear(2, 2, 2), 3, 8) is None
    assert free_bytes(torch.device("cpu")) > 2**20


def test_a_tile_that_fits_is_named(monkeypatch):
    one = Enlarger(residual(), {}, 1024)
    route = one.route((800, 800), (1600, 1600))
    monkeypatch.setattr(room, "free_bytes", lambda device: int(1600**2 * room.BYTES_A_PIXEL * 1.8))
    with pytest.raises(ValueError, match="1600x1600 pixels need .* GiB are free: expected --tile (512|256) or less"):
        one.check_memory(route)
    monkeypatch.setattr(room, "free_bytes", lambda device: 800**2 * room.BYTES_A_PIXEL)
    with pytest.raises(ValueError, match="expected a result of at most about"):
        one.check_memory(route)
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    one.check_memory(route)
