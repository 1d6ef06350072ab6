"""Spectra against closed forms."""

import math

import pytest
import torch
from spectra import octave_power, radial_covariance


@pytest.mark.parametrize("height, width", [(32, 32), (16, 24), (7, 12)])
def test_white_noise_has_its_variance_in_every_bin(height, width):
    noise = 0.5 * torch.randn(2000, 2, height, width, generator=torch.Generator().manual_seed(0))
    noise[:, 1] = 0.6 * noise[:, 0] + 0.8 * noise[:, 1]
    covariance = radial_covariance(noise)
    assert covariance.shape == (max(height, width) // 2 + 1, 2, 2)
    expected = torch.tensor([[0.25, 0.15], [0.15, 0.25]], dtype=torch.float64)
    assert torch.allclose(covariance, expected.expand_as(covariance), rtol=0.08)


@pytest.mark.parametrize("height, width, fy, fx", [(16, 16, 0, 3), (16, 16, 3, 4), (16, 24, 2, 2), (16, 16, 8, 8)])
def test_a_wave_is_in_its_bin(height, width, fy, fx):
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
    wave = torch.cos(2 * math.pi * (fy * rows + fx * columns))[None, None]
    power = radial_covariance(wave)[:, 0, 0]
    expected = min(round(math.hypot(fy, fx)), max(height, width) // 2)
    assert power.argmax() == expected
    assert power.sum() - power[expected] < 1e-9


def test_power_adds_up():
    """Parseval: bins weighted by how many frequencies they hold give the mean square."""
    images = torch.rand(3, 2, 10, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(8, dtype=torch.float64)
    for fy in [*range(5), *range(-5, 0)]:
        for fx in [*range(7), *range(-7, 0)]:
            counts[min(round(math.hypot(fy, fx)), 7)] += 1
    trace = radial_covariance(images).diagonal(dim1=1, dim2=2).sum(1)
    assert torch.isclose((trace * counts).sum() / (10 * 14 * 2), images.square().mean())


def test_wrong_input():
    for images in (torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, 1, 8, 8)):
        with pytest.raises(ValueError, match="^images="):
            radial_covariance(images)


def test_octave_power_is_of_what_differs():
    """Twice the amplitude in one octave is four times its power, and a shared image changes nothing."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 2, 16, 20, generator=generator)
    assert octave_power(noise[:200], noise[200:]) == pytest.approx([1] * 4, abs=0.1)
    rows, columns = torch.fft.fftfreq(16, 1 / 16), torch.fft.fftfreq(20, 1 / 20)
    radius = (rows[:, None].square() + columns.square()).sqrt().round()
    waves = torch.fft.fft2(noise) * torch.where((radius >= 3) & (radius <= 4), 2.0, 1.0)
    changed = torch.fft.ifft2(waves).real
    shared = 50 * torch.randn(1, 2, 16, 20, generator=generator)
    assert octave_power(changed + shared, noise) == pytest.approx([1, 1, 4, 1], rel=1e-3)
    for part in (noise[:1], noise[:, :1], noise[..., 1:]):
        with pytest.raises(ValueError, match="^images=.*, reference="):
            octave_power(part, noise)
