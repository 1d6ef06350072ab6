"""Scores of samples against real images, the same for every bench."""

import argparse
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from spectra import octave_power

from pyrdiff import metrics
from pyrdiff.data import ImageLevels, open_source
from pyrdiff.metrics import SetComparison, interval_of, open_features

NEIGHBOURS = 2000  # real images for the scores whose cost grows with their square, and for the spectrum


def model_hash(folder: str) -> str:
    """SHA-256 of an exported pipeline's network."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("unet/*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Float [N, C, H, W] in [-1, 1], clipped, to uint8 [N, H, W, C]: what a user saves."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def load_images(reference: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """The images of a set at one size, uint8 [N, H, W, C]."""
    return ImageLevels.build(open_source(reference), [size], channels=channels).arrays[-1]


def generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """A generator for each image, so that image k has the same noise in every arm and every batch."""
    return [torch.Generator().manual_seed(seed * 1_000_000 + index) for index in indices]


def in_batches(make: Callable[[range], torch.Tensor], count: int, batch_size: int) -> torch.Tensor:
    """The images [count, ...] that f(indices) makes, some at a time, on the CPU."""
    starts = range(0, count, batch_size)
    return torch.cat([make(range(start, min(start + batch_size, count))).cpu() for start in starts])


def fidelity(images: torch.Tensor, truth: torch.Tensor, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """PSNR, SSIM and LPIPS of each image, both float [N, C, H, W] in [0, 1]."""
    known = dict(data_range=(0, 1))
    return {
        "psnr": metrics.psnr(images, truth, **known).per_image,
        "ssim": metrics.ssim(images, truth, **known).per_image,
        "lpips": metrics.lpips(images, truth, **known, network=options.lpips, weights=options.lpips_weights).per_image,
    }


def interval_of_mean(values: torch.Tensor) -> list[float]:
    """Holds 95 % of what the mean of other images would be."""
    return list(interval_of(torch.mean, values.double(), resamples=1000))


class Scorer:
    """
    A reference set and a feature network.

    Args:
        reference, array_key: As for `open_source`.
        size, channels: Of the images.
        features, weights: As for `open_features`.
        held: So many real images are set aside (`held`), to be scored as samples are.
        limit: Real images to compare with, at most.
        seed: Of the choice.
    """

    def __init__(self, reference, array_key, size, channels, features, weights, device, held, limit, seed, resamples):
        images = ImageLevels.build(open_source(reference, array_key=array_key), [size], channels=channels)
        if len(images) < 2 * held:
            raise ValueError(
                f"--reference: holds {len(images)} images; expected twice the {held} that are set aside to be scored"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
        self.held, rest = (images.arrays[-1][part] for part in (order[:held], order[held:][:limit]))
        self.network = open_features(features, weights=weights, device=device)
        real = self._features(rest)
        self.all_real = SetComparison(real, self.network, resamples)
        self.few_real = SetComparison(real[:NEIGHBOURS], self.network, resamples=0)
        self.few_images = self._floats(rest[:NEIGHBOURS])
        self.description = {
            "features": features,
            "conventions": dict(self.network.conventions),
            "resamples": resamples,
            "data": {"fingerprint": images.fingerprint, "images": len(images)},
            "compared_with": {"frechet": len(rest), "others": len(self.few_images)},
        }

    @classmethod
    def of(cls, options: argparse.Namespace, size, channels: int, device, held: int) -> "Scorer":
        """From the flags `flags.SCORED`."""
        return cls(
            options.reference, options.array_key, size, channels, options.features, options.weights, device,
            held, options.reference_images, options.seed, options.resamples,
        )  # fmt: skip

    def __call__(self, images: np.ndarray) -> dict:
        """Scores of uint8 [N, H, W, C]; the interval holds 95 % of what other samples of this number would give."""
        features = self._features(images)
        (distance,) = self.all_real.scores(features, ("frechet_distance",))
        kernel, precision, recall = self.few_real.scores(features, ("kid", "precision_recall"))
        return {
            "images": len(images),
            "frechet": distance.result.value,
            "frechet_interval": list(distance.interval),
            "kid": kernel.result.value,
            "precision_recall": [precision.result.value, recall.result.value],
            "octaves": [round(value, 4) for value in octave_power(self._floats(images), self.few_images)],
        }

    def _features(self, images):
        return self.network(self._floats(images), data_range=(0, 1)).double()

    @staticmethod
    def _floats(images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
