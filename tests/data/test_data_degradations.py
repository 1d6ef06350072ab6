"""Degradations: `shrink` against Pillow's, each step of "realistic" against a closed form, and what is random."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from pyrdiff.data import degradations as module
from pyrdiff.data import degrade, shrink
from pyrdiff.training.losses import Draws

CPU = torch.device("cpu")


def draws(seed: int = 0, **processes) -> Draws:
    return Draws(seed, device=CPU, **processes)


def smooth(count: int = 4, channels: int = 3, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Gray-ish images of 8 bits with some detail, [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, height // 4, width // 4, generator=generator) * 0.6 + 0.2
    tint = torch.rand(count, channels, 1, 1, generator=generator) * 0.1
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") + tint
    images += 0.02 * torch.randn(images.shape, generator=generator)
    return (255 * images.clamp(0, 1)).round() / 127.5 - 1


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """[B, H, W, C] uint8; the values have to be those of 8 bits."""
    levels = (images + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4 and levels.min() > -0.5 and levels.max() < 255.5
    return levels.round().byte().permute(0, 2, 3, 1).numpy()


def of(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_shrink_is_pillows_bicubic(factor, channels):
    images = smooth(channels=channels)
    small = shrink(images, factor)
    assert small.shape == (4, channels, 32 // factor, 48 // factor) and small.dtype == torch.float32
    size, found, original = (48 // factor, 32 // factor), to_bytes(small).astype(int), to_bytes(images)
    expected = [np.asarray(of(array).resize(size, Image.Resampling.BICUBIC)) for array in original]
    difference = np.abs(found - np.stack(expected).reshape(found.shape))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.2  # Pillow rounds between its two passes, too
    planes = [Image.fromarray(plane.astype(np.float32)) for array in original for plane in array.transpose(2, 0, 1)]
    exact = np.stack([np.asarray(plane.resize(size, Image.Resampling.BICUBIC)) for plane in planes])
    exact = exact.reshape(4, channels, *found.shape[1:3]).transpose(0, 2, 3, 1)
    assert np.abs(found - exact).max() < 0.501


def test_shrink_keeps_to_the_range_where_bicubic_overshoots():
    images = torch.where(torch.arange(32) < 18, -1.0, 1.0).expand(1, 3, 16, 32)
    raw = torch.nn.functional.interpolate(images, (4, 8), mode="bicubic", antialias=True)
    assert raw.min() < -1.01 and raw.max() > 1.01
    small = shrink(images, 4)
    assert small.min() == -1 and small.max() == 1


@pytest.mark.parametrize("kind", ["bicubic", "realistic"])
@pytest.mark.parametrize("factor", [0, -2, 3, 2.0])
def test_a_factor_has_to_divide_both_sides(kind, factor):
    with pytest.raises(ValueError, match=f"factor={factor} for images of 32x48: expected one that divides both sides"):
        degrade(smooth(), factor, kind, draws())
    with pytest.raises(ValueError, match=f"factor={factor} "):
        shrink(smooth(), factor)


def test_the_kind_has_to_be_known():
    with pytest.raises(ValueError, match="kind='jpeg': expected 'bicubic' or 'realistic'"):
        degrade(smooth(), 2, "jpeg", draws())


def test_bicubic_is_shrink():
    assert torch.equal(degrade(smooth(), 4, "bicubic", draws()), shrink(smooth(), 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_realistic_is_8_bit_and_near_the_original(channels):
    images = smooth(channels=channels)
    low = degrade(images, 2, "realistic", draws())
    assert low.shape == (4, channels, 16, 24) and low.dtype == torch.float32
    to_bytes(low)
    error = (low - shrink(images, 2)).square().mean().sqrt().item()
    assert 0.01 < error < 0.15


def test_blur_has_the_standard_deviation_that_is_asked_for():
    sigma = torch.tensor([0.0, 0.8, 1.6, 2.5])
    delta = torch.zeros(4, 2, 41, 45)
    delta[:, 0, 20, 22], delta[:, 1, 20, 22] = 1, -3
    blurred = module._blur(delta, sigma, 2.5).double()
    assert torch.equal(blurred[0].float(), delta[0])
    torch.testing.assert_close(blurred[:, 1], -3 * blurred[:, 0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(blurred.sum((2, 3))[:, 0], torch.ones(4).double(), rtol=1e-5, atol=0)
    for axis, centre in ((1, 20), (2, 22)):
        marginal = blurred[:, 0].sum(3 - axis)
        offset = torch.arange(marginal.shape[1]) - centre
        assert ((marginal * offset).sum(1)).abs().max() < 1e-5
        std = (marginal * offset.square()).sum(1).sqrt()
        torch.testing.assert_close(std, sigma.double(), rtol=0.01, atol=1e-6)
    rows, columns = torch.arange(41)[:, None] - 20, torch.arange(45) - 22
    gaussian = torch.exp(-(rows.square() + columns.square()) / (2 * 1.6**2)) / (2 * math.pi * 1.6**2)
    torch.testing.assert_close(blurred[2, 0], gaussian.double(), rtol=0, atol=2e-4)


def test_blur_keeps_a_constant_up_to_its_borders_and_takes_small_images():
    for size in ((1, 3, 5, 7), (1, 1, 1, 1), (1, 1, 1, 9)):
        image = torch.full(size, 0.3)
        torch.testing.assert_close(module._blur(image, torch.tensor([1.5]), 1.6), image)


def test_blur_is_in_pixels_of_the_small_image(monkeypatch):
    seen = []
    blur = module._blur
    monkeypatch.setattr(module, "_blur", lambda *args: seen.append(args[1:]) or blur(*args))
    for factor in (2, 4):
        degrade(smooth(64, 1, 16, 16), factor, "realistic", draws())
    (two, widest_two), (four, widest_four) = seen
    torch.testing.assert_close(2 * two, four)
    assert widest_two == 0.8 and widest_four == 1.6 and four.max() <= widest_four
    assert four.min() < 0.1 and four.max() > 1.5 and four.mean() == pytest.approx(0.8, abs=0.2)


def test_noise_is_drawn_for_each_image_with_its_own_strength(monkeypatch):
    monkeypatch.setattr(module, "_jpeg", lambda images, quality: images)
    images = torch.zeros(200, 1, 32, 32)
    residual = degrade(images, 2, "realistic", draws()) * 127.5 - 0.5  # 0 is between two levels, and rounds up
    spread = residual.flatten(1).std(1)  # of 8-bit levels
    assert spread.min() < 1 and 9 < spread.max() < 11.5 and spread.mean() == pytest.approx(5, abs=0.7)
    noise = draws()
    noise.uniform(200), (strength := noise.uniform(200)), noise.uniform(200)
    torch.testing.assert_close(spread, ((10 * strength).square() + 1 / 12).sqrt(), rtol=0.2, atol=0.2)
    normed = residual / spread[:, None, None, None]
    strong = normed[spread > 3].flatten(1)
    assert (strong @ strong.T / strong.shape[1] - torch.eye(len(strong))).abs().max() < 0.4


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels):
    images, quality = smooth(channels=channels), torch.tensor([40.0, 60.4, 60.6, 95.0])
    found = to_bytes(module._jpeg(images, quality))
    for array, number, result in zip(to_bytes(images), (40, 60, 61, 95), found, strict=True):
        file = io.BytesIO()
        of(array).save(file, "JPEG", quality=number)
        assert np.array_equal(np.asarray(Image.open(file)).reshape(array.shape), result)
        assert not np.array_equal(array, result)
    error = np.abs(found.astype(int) - to_bytes(images)).mean((1, 2, 3))
    assert error[0] > 1.2 * error[3]


def test_quality_covers_40_to_95(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_jpeg", lambda images, quality: seen.append(quality) or images)
    degrade(torch.zeros(200, 1, 4, 4), 2, "realistic", draws())
    assert 40 <= seen[0].min() < 42 and 93 < seen[0].max() <= 95


@pytest.mark.parametrize("kind", ["bicubic", "realistic"])
def test_processes_make_the_parts_of_what_one_makes(kind):
    images = smooth(6)
    whole = degrade(images, 2, kind, draws(3))
    parts = [degrade(images[2 * k :][:2], 2, kind, draws(3, num_processes=3, process_index=k)) for k in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_randomness_is_the_source_s_alone():
    images = smooth(1).expand(3, -1, -1, -1)
    low = degrade(images, 2, "realistic", draws(1))
    state = torch.get_rng_state()
    assert torch.equal(degrade(images, 2, "realistic", draws(1)), low)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(degrade(images, 2, "realistic", draws(2)), low)
    assert not torch.equal(low[0], low[1]) and not torch.equal(low[1], low[2])
