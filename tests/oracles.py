"""Gaussian images with a natural spectrum, for which the best noise prediction is a closed form in Fourier space."""

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config

OCTAVES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16))


def radius(height: int, width: int) -> torch.Tensor:
    """Cycles per image of each frequency, float64 [height, width]."""
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
    return (rows[:, None].double() ** 2 + columns[None].double() ** 2).sqrt()


def natural_spectrum(height: int, width: int) -> torch.Tensor:
    """Variance of each orthonormal Fourier mode, power ~ k^-2.5; it grows with the area of an image."""
    return 0.05 * height * width * radius(height, width).clamp(min=1) ** -2.5


class GaussianNoisePredictor(ModelMixin, ConfigMixin):
    """The best possible noise prediction for such images under linear betas: E[eps | x_t] = s x / (a^2 v + s^2)."""

    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: int = 32, resolutions: tuple | None = None):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.alphas_cumprod = DDPMScheduler().alphas_cumprod.double()
        self.calls: list[tuple[int, int]] = []

    def forward(self, sample, timestep, return_dict=True):
        self.calls.append(tuple(sample.shape[-2:]))
        alpha = self.alphas_cumprod[torch.as_tensor(timestep).long().cpu()]
        spectrum = natural_spectrum(*sample.shape[-2:])
        gain = (1 - alpha).sqrt() / (alpha * spectrum + 1 - alpha)
        return (torch.fft.ifft2(torch.fft.fft2(sample.double()) * gain).real.to(sample.dtype),)


def octave_power(images: torch.Tensor) -> list[float]:
    """Power of images [N, C, H, W] in each octave, as a share of what it should be."""
    height, width = images.shape[-2:]
    share = torch.fft.fft2(images.double(), norm="ortho").abs().square().mean((0, 1)) / natural_spectrum(height, width)
    k = radius(height, width).round()
    octaves = [(low, high) for low, high in OCTAVES if high <= height // 2]
    return [share[(k >= low) & (k <= high)].mean().item() for low, high in octaves]
