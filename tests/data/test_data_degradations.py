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


@pytest.mark.parametrize("turn", [0.0, 0.6, 2.5])
@pytest.mark.parametrize("sigmas", [(1.6, 1.6), (2.5, 1.0), (0.8, 2.0)])
def test_blur_has_the_covariance_that_is_asked_for(sigmas, turn):
    delta = torch.zeros(1, 2, 41, 45)
    delta[0, 0, 20, 22], delta[0, 1, 20, 22] = 1, -3
    blurred = module._blur(delta, sigmas, turn)[0].double()
    torch.testing.assert_close(blurred[1], -3 * blurred[0], rtol=1e-5, atol=1e-7)
    weights = blurred[0]
    rows, columns = (torch.arange(41) - 20.0)[:, None], torch.arange(45) - 22.0
    along = columns * math.cos(turn) + rows * math.sin(turn)
    across = rows * math.cos(turn) - columns * math.sin(turn)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    for axis, sigma in ((along, sigmas[0]), (across, sigmas[1])):
        assert (weights * axis).sum().abs() < 1e-5
        assert (weights * axis.square()).sum().sqrt().item() == pytest.approx(sigma, rel=0.02)
    assert (weights * along * across).sum().abs() < 0.02


def test_blur_of_nothing_is_the_image():
    images = smooth()
    assert torch.equal(module._blur(images, (0.0, 0.0), 0.3), images)
    torch.testing.assert_close(module._blur(images, (1e-4, 1e-4), 0.3), images)


def test_blur_keeps_a_constant_up_to_its_borders_and_takes_small_images():
    for size in ((1, 3, 5, 7), (1, 1, 1, 1), (1, 1, 1, 9)):
        image = torch.full(size, 0.3)
        torch.testing.assert_close(module._blur(image, (1.5, 0.7), 1.0), image)


def chain(strength: float = 1.0, last: bool = True, numbers: list[float] | None = None, seed: int = 0):
    normal = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(seed))
    return module._Chain((16, 24), last, strength, numbers or [0.5] * 6, normal)


@pytest.mark.parametrize("number", [0.0, 0.34, 0.67, 0.99])
def test_resizing_ends_at_the_small_size_by_one_of_the_kernels(number):
    image = smooth(1)
    resized = chain(numbers=[0, 0, 0, 0, number, 0.5]).resize(image)
    kernel = module.KERNELS[int(3 * number)]
    options = {} if kernel == "area" else {"antialias": True}
    assert torch.equal(resized, torch.nn.functional.interpolate(image, (16, 24), mode=kernel, **options))
    half_way = chain(last=False, numbers=[0, 0, 0, 0, number, 0.5]).resize(image)
    assert half_way.shape == (1, 3, 23, 34), "half way on a logarithmic scale"


@pytest.mark.parametrize("gray", [True, False])
@pytest.mark.parametrize("shot", [True, False])
def test_noise_has_its_spread(shot, gray):
    numbers = [0, 0.5, 0.1 if gray else 0.9, 0.1 if shot else 0.9, 0, 0]
    levels = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 32, 48)
    residual = torch.cat([chain(0.8, True, numbers).noise(level[None]) - level for level in levels])
    spread = residual.flatten(1).std(1)
    brightness = torch.tensor([0.0, 0.5, 1.0]).sqrt() if shot else torch.ones(3)
    torch.testing.assert_close(spread, 2 * 0.8 * 0.5 * module.NOISE * brightness, rtol=0.05, atol=1e-6)
    assert torch.equal(residual[:, 0], residual[:, 1]) == gray


def test_strength_0_is_bicubic_and_good_jpeg():
    images = smooth()
    low = degrade(images, 2, "realistic", draws(), torch.zeros(4))
    rounds = [shrink(images, 2), shrink(module._jpeg(images, torch.full((4,), 95.0)), 2)]
    assert min((low - each).abs().mean() for each in rounds) < 0.02
    errors = [
        (degrade(images, 2, "realistic", draws(), torch.full((4,), strength)) - shrink(images, 2)).square().mean()
        for strength in (0.0, 0.5, 1.0)
    ]
    assert errors[0] < errors[1] < errors[2]


def test_the_order_of_the_steps_is_random(monkeypatch):
    seen = []
    for step in module.STEPS:
        method = getattr(module._Chain, step)
        monkeypatch.setattr(
            module._Chain, step, lambda self, image, step=step, method=method: seen.append(step) or method(self, image)
        )
    degrade(smooth(32), 2, "realistic", draws())
    rounds = [tuple(seen[start : start + 4]) for start in range(0, len(seen), 4)]
    assert len(rounds) == 64 and all(sorted(order) == sorted(module.STEPS) for order in rounds)
    assert len(set(rounds)) > 15, "of 24"


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
    monkeypatch.setattr(module, "_jpeg", lambda images, quality: seen.append(quality.item()) or images)
    degrade(torch.zeros(200, 1, 4, 4), 2, "realistic", draws())
    assert len(seen) == 400 and 40 <= min(seen) < 42 and 93 < max(seen) <= 95


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
