"""The power spectrum of images at every level: what a plan is fitted to."""

from dataclasses import dataclass

import numpy as np
import torch

from pyrdiff.data import ImageLevels, radial_covariance

from .gaussian import Modes

CHUNK = 64  # images that are held as floats at a time


@dataclass
class Spectra:
    """
    The variance of images by level, colour axis and spatial frequency, about their mean image.

    Attributes:
        colors: float64 [C, C], orthonormal rows: axes along which the colours of the images are uncorrelated, the
            strongest first.
        sizes: (height, width) of each level, low to high.
        power: For each level float64 [C, bins], the variance of an orthonormal Fourier coefficient in the [-1, 1]
            range; the bins are those of `pyrdiff.data.radial_covariance`.
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
            raise ValueError(f"images, max_images: got {len(images)}, {max_images}; expected 2 or more")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        order = torch.randperm(len(images), generator=generator)
        chosen = np.sort(order[:count].numpy())
        covariances = []
        for array in images.arrays:
            mean = array[chosen].mean(0, dtype=np.float64)
            total = 0.0
            for start in range(0, count, CHUNK):
                part = torch.from_numpy((array[chosen[start : start + CHUNK]] - mean) / 127.5)
                total = total + len(part) * radial_covariance(part.permute(0, 3, 1, 2))
            covariances.append(total / (count - 1))
        modes = Modes.of(*images.sizes[-1])
        each_pixel = torch.einsum("m,mcd->cd", modes.count / modes.count.sum(), covariances[-1][modes.bins])
        colors = torch.linalg.eigh(each_pixel).eigenvectors.T.flip(0)
        power = [torch.einsum("kc,bcd,kd->kb", colors, part, colors).clamp(min=1e-12) for part in covariances]
        return cls(colors, list(images.sizes), power)

    def modes(self, level: int) -> torch.Tensor:
        """float64 [C, M]: the variance of every mode of `Modes.of(*sizes[level])`."""
        return self.power[level][:, Modes.of(*self.sizes[level]).bins]

    def to_dict(self) -> dict:
        """Numbers for a config file, rounded to 6 digits."""

        def rounded(tensor):
            return [[float(f"{value:.6g}") for value in row] for row in tensor.tolist()]

        power = {"{}x{}".format(*size): rounded(values) for size, values in zip(self.sizes, self.power, strict=True)}
        return {"colors": rounded(self.colors), "power": power}

    @classmethod
    def from_dict(cls, values: dict) -> "Spectra":
        """What `to_dict` gave; the order of its keys does not matter, since config files sort them as text."""
        if not values:
            raise ValueError(f"values={values!r}: expected what Spectra.to_dict gives; this model carries no spectra")
        power = {
            tuple(map(int, name.split("x"))): torch.tensor(rows, dtype=torch.float64)
            for name, rows in values["power"].items()
        }
        sizes = sorted(power)
        return cls(torch.tensor(values["colors"], dtype=torch.float64), sizes, [power[size] for size in sizes])
