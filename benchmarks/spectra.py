"""Power spectra of images: by spatial frequency and colour, at every level, and by octave."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pyrdiff.data import ImageLevels

CHUNK = 64  # images that are held as floats at a time


def frequency_bins(height: int, width: int) -> torch.Tensor:
    """
    The bin of every frequency of an FFT, int64 [height, width]: its radius √(fy² + fx²) in whole cycles per image,
    rounded; the corners' higher frequencies are in the last bin, max(height, width) // 2.
    """
    rows = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)
    columns = torch.fft.fftfreq(width, 1 / width, dtype=torch.float64)
    radius = (rows[:, None].square() + columns.square()).sqrt().round().long()
    return radius.clamp(max=max(height, width) // 2)


def octaves(side: int) -> Iterator[range]:
    """The bins of 1, 2, 3-4, 5-8 ... cycles per image, up to half of `side`."""
    low, high = 1, 1
    while high <= side // 2:
        yield range(low, high + 1)
        low, high = high + 1, 2 * high


def radial_covariance(images: torch.Tensor) -> torch.Tensor:
    """
    Covariance over channels by spatial frequency; white noise of covariance V gives V in every bin.

    The real part of FFT2 · FFT2* / (H·W), averaged over images and over the frequencies of a bin (`frequency_bins`).
    The diagonal is the power of each channel.

    Args:
        images: float [N, C, H, W].

    Returns:
        float64 [max(H, W) // 2 + 1, C, C], on the device of `images`.

    Raises:
        ValueError: for anything else than a float tensor of four dimensions with at least one value.
    """
    if images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
        raise ValueError(f"images={images.dtype} {list(images.shape)}: expected a non-empty float [N, C, H, W]")
    count, channels, height, width = images.shape
    waves = torch.fft.fft2(images, norm="ortho")
    products = torch.einsum("nchw,ndhw->hwcd", waves, waves.conj()).real.to(torch.float64) / count
    bins = frequency_bins(height, width).flatten().to(images.device)
    sums = torch.zeros(max(height, width) // 2 + 1, channels, channels, dtype=torch.float64, device=images.device)
    sums.index_add_(0, bins, products.flatten(0, 1))
    return sums / torch.bincount(bins, minlength=len(sums))[:, None, None]


def power_about_mean(images: torch.Tensor) -> torch.Tensor:
    """`radial_covariance` of float [N, C, H, W], N at least 2, about their mean image: N - 1 in the denominator."""
    mean, total = images.mean(0), 0.0
    for chunk in images.split(CHUNK):
        total = total + len(chunk) * radial_covariance(chunk - mean)
    return total / (len(images) - 1)


def octave_power(images: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """
    How much the images of a set differ, by octave, as a share of how much those of another do; 1.0 is right.

    Each set is taken about its own mean image, so what all images share does not count.

    Args:
        images: float [N, C, H, W], N at least 2.
        reference: float [M, C, H, W], M at least 2.

    Returns:
        For each of the `octaves` of the shorter side: the ratio of their powers, over all channels and frequencies.

    Raises:
        ValueError: when the shapes do not fit.
    """
    if images.shape[1:] != reference.shape[1:] or min(len(images), len(reference)) < 2:
        raise ValueError(
            f"images={list(images.shape)}, reference={list(reference.shape)}: expected two or more each, of one shape"
        )
    height, width = images.shape[-2:]
    count = torch.bincount(frequency_bins(height, width).flatten()).to(images.device)
    ours, theirs = (power_about_mean(part).diagonal(dim1=1, dim2=2).sum(1) * count for part in (images, reference))
    parts = [slice(bins.start, bins.stop) for bins in octaves(min(height, width))]
    return [(ours[part].sum() / theirs[part].sum()).item() for part in parts]


@dataclass
class Spectra:
    """
    The variance of images by level, colour axis and spatial frequency, about their mean image.

    Attributes:
        colors: float64 [C, C], orthonormal rows: axes along which the colours of the images are uncorrelated, the
            strongest first.
        sizes: (height, width) of each level, low to high.
        power: For each level float64 [C, bins], the variance of an orthonormal Fourier coefficient in the [-1, 1]
            range; see `frequency_bins`.
    """

    colors: torch.Tensor
    sizes: list[tuple[int, int]]
    power: list[torch.Tensor]

    @classmethod
    def of(cls, images: ImageLevels, max_images: int = 2048, generator: torch.Generator | None = None) -> "Spectra":
        """
        Measures images at every level.

        Args:
            images: The levels; their pixels are taken in the range [-1, 1].
            max_images: At most so many images, chosen at random, are measured.
            generator: A CPU generator for that choice; seeded with 0 when None, so that the spectra belong to the
                images.

        Raises:
            ValueError: for fewer than two images, which have no variance.
        """
        count = min(max_images, len(images))
        if count < 2:
            raise ValueError(f"images={len(images)}, max_images={max_images}: expected 2 or more")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        chosen = np.sort(torch.randperm(len(images), generator=generator)[:count].numpy())
        covariances = []
        for array in images.arrays:
            mean, total = array[chosen].mean(0, dtype=np.float64), 0.0
            for start in range(0, count, CHUNK):
                part = torch.from_numpy((array[chosen[start : start + CHUNK]] - mean) / 127.5)
                total = total + len(part) * radial_covariance(part.permute(0, 3, 1, 2))
            covariances.append(total / (count - 1))
        bins = frequency_bins(*images.sizes[-1]).flatten()
        of_a_pixel = covariances[-1][bins].mean(0)
        colors = torch.linalg.eigh(of_a_pixel).eigenvectors.T.flip(0)
        power = [torch.einsum("kc,bcd,kd->kb", colors, part, colors).clamp(min=1e-12) for part in covariances]
        return cls(colors, list(images.sizes), power)

    def modes(self, level: int) -> torch.Tensor:
        """float64 [C, M]: the variance of every mode, those of `calculus.Modes.of(*sizes[level])`."""
        height, width = self.sizes[level]
        bins = frequency_bins(height, width)[: height // 2 + 1, : width // 2 + 1]
        return self.power[level][:, bins.flatten()]
