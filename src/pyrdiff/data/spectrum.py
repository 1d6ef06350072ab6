"""How much each level adds over the one below it, by spatial frequency."""

import numpy as np
import torch
import torch.nn.functional as F

from .levels import ImageLevels

CHUNK = 64  # images that are held as floats at a time


def radial_covariance(images: torch.Tensor) -> torch.Tensor:
    """Covariance over channels by spatial frequency; white noise of covariance V gives V in every bin.

    The real part of FFT2 · FFT2* / (H·W), averaged over images and over those frequencies whose radius √(fy² + fx²),
    with fy and fx in whole cycles per image, rounds to the bin's number. The corners' higher frequencies are in the
    last bin. The diagonal is the power of each channel.

    Args:
        images: float [N, C, H, W].

    Returns:
        float64 [max(H, W) // 2 + 1, C, C], on the device of `images`.

    Raises:
        ValueError: when `images` is not a float tensor of four dimensions with at least one value.
    """
    if images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
        raise ValueError(f"images: got {images.dtype} {list(images.shape)}; accepted is a non-empty float [N, C, H, W]")
    count, channels, height, width = images.shape
    bins = max(height, width) // 2 + 1
    waves = torch.fft.fft2(images, norm="ortho")
    products = torch.einsum("nchw,ndhw->hwcd", waves, waves.conj()).real.to(torch.float64) / count
    rows = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64, device=images.device)
    columns = torch.fft.fftfreq(width, 1 / width, dtype=torch.float64, device=images.device)
    radius = (rows[:, None].square() + columns.square()).sqrt().round().long().clamp(max=bins - 1).flatten()
    sums = torch.zeros(bins, channels, channels, dtype=torch.float64, device=images.device)
    sums.index_add_(0, radius, products.flatten(0, 1))
    return sums / torch.bincount(radius, minlength=bins)[:, None, None]


def detail_spectra(images: ImageLevels, max_images: int = 2048, seed: int = 0) -> list[list]:
    """For each level above the lowest, `radial_covariance` of what bicubic upsampling of the level below lacks.

    Args:
        images: the levels; their pixels are taken in the range [-1, 1].
        max_images: at most so many images, chosen at random, are measured.
        seed: of that choice.

    Returns:
        One nested list [max(h, w) // 2 + 1, C, C] per level from the second on, rounded to 6 significant digits.

    Raises:
        ValueError: when `max_images` is below 1.
    """
    if max_images < 1:
        raise ValueError(f"max_images: got {max_images}; accepted is 1 or more")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen = np.sort(order[:max_images].numpy())

    def pixels(level: int, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images.arrays[level][indices]).permute(0, 3, 1, 2).float() / 127.5 - 1

    spectra = []
    for level in range(1, len(images.sizes)):
        total = 0.0
        for start in range(0, len(chosen), CHUNK):
            indices = chosen[start : start + CHUNK]
            below = F.interpolate(pixels(level - 1, indices), images.sizes[level], mode="bicubic", align_corners=False)
            total = total + len(indices) * radial_covariance(pixels(level, indices) - below)
        mean = (total / len(chosen)).tolist()
        spectra.append([[[float(f"{value:.6g}") for value in row] for row in matrix] for matrix in mean])
    return spectra
