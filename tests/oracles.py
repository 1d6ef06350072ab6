"""Gaussian images with a natural spectrum, for which the best noise prediction is a closed form in Fourier space."""

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config

OCTAVES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16))


def radius(height: int, width: int) -> torch.Tensor:
    """Cycles per image of each frequency, float64 [height, width]."""
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
    return (rows[:, None].double() ** 2 + columns[None].double() ** 2).sqrt()


def natural_spectrum(height: int, width: int, power: float = 0.05) -> torch.Tensor:
    """Variance of each orthonormal Fourier mode, power ~ k^-2.5; it grows with the area of an image."""
    return power * height * width * radius(height, width).clamp(min=1) ** -2.5


def spectrum_of_means(spectrum: torch.Tensor) -> torch.Tensor:
    """Of the images [n/2, n/2] that 2x2 means of images [n, n] are: the box's response, and the folded aliases."""
    half = len(spectrum) // 2
    response = torch.cos(torch.pi * torch.fft.fftfreq(2 * half).double()) ** 2
    return (spectrum * response[:, None] * response).reshape(2, half, 2, half).sum((0, 2)) / 4


class GaussianNoisePredictor(ModelMixin, ConfigMixin):
    """The best possible noise prediction for such images under linear betas: E[eps | x_t] = s x / (a^2 v + s^2)."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int = 32,
        resolutions: tuple | None = None,
        power: float = 0.05,
        means_of: int | None = None,  # smaller images are means of images of this size
    ):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.alphas_cumprod = DDPMScheduler().alphas_cumprod.double()
        self.calls: list[tuple[int, int]] = []

    def forward(self, sample, timestep, return_dict=True):
        self.calls.append(tuple(sample.shape[-2:]))
        alpha = self.alphas_cumprod[torch.as_tensor(timestep).long().cpu()]
        spectrum = natural_spectrum(*sample.shape[-2:], self.config.power)
        if self.config.means_of:
            spectrum = natural_spectrum(self.config.means_of, self.config.means_of, self.config.power)
            while len(spectrum) > sample.shape[-1]:
                spectrum = spectrum_of_means(spectrum)
        gain = (1 - alpha).sqrt() / (alpha * spectrum + 1 - alpha)
        return (torch.fft.ifft2(torch.fft.fft2(sample.double()) * gain).real.to(sample.dtype),)


def octave_power(images: torch.Tensor) -> list[float]:
    """Power of images [N, C, H, W] in each octave, as a share of what it should be."""
    height, width = images.shape[-2:]
    share = torch.fft.fft2(images.double(), norm="ortho").abs().square().mean((0, 1)) / natural_spectrum(height, width)
    k = radius(height, width).round()
    octaves = [(low, high) for low, high in OCTAVES if high <= height // 2]
    return [share[(k >= low) & (k <= high)].mean().item() for low, high in octaves]


class GaussianPosterior:
    """
    Gaussian images [images, 1, 32, 32] of which means over `factor` x `factor` pixels are known: `measured`. Their
    posterior is a closed form: `mean`, and `spread`, its standard deviation over all pixels.
    """

    def __init__(self, factor: int, images: int, seed: int, power: float = 0.05, side: int = 32):
        pixels, small = side * side, side // factor
        covariance = torch.fft.ifft2(natural_spectrum(side, side, power)).real
        rows, columns = torch.arange(pixels) // side, torch.arange(pixels) % side
        prior = covariance[(rows[:, None] - rows) % side, (columns[:, None] - columns) % side]
        average = torch.nn.functional.avg_pool2d(torch.eye(pixels).double().reshape(-1, 1, side, side), factor)
        average = average.reshape(pixels, -1).T
        gain = prior @ average.T @ torch.linalg.inv(average @ prior @ average.T)
        self.spread = (prior - gain @ average @ prior).diagonal().mean().sqrt().item()
        root = torch.linalg.cholesky(prior + 1e-9 * torch.eye(pixels))
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(images, pixels, generator=generator, dtype=torch.float64) @ root.T
        self.measured = (truth @ average.T).reshape(images, 1, small, small).float()
        self.mean = (truth @ average.T @ gain.T).reshape(images, side, side)
