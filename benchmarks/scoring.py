"""Scores of samples against real images, the same for every bench."""

import hashlib
from pathlib import Path

NEIGHBOURS = 2000  # real images for the scores whose cost grows with their square, and for the spectrum


def model_hash(folder: str) -> str:
    """SHA-256 of an exported pipeline's network."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("unet/*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def to_uint8(images):
    """Float [N, C, H, W] in [-1, 1], clipped, to uint8 [N, H, W, C]: what a user saves."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def load_images(reference, size: tuple[int, int], channels: int):
    """The images of a set at one size, uint8 [N, H, W, C]."""
    from pyrdiff.data import ImageLevels, open_source

    return ImageLevels.build(open_source(reference), [size], channels=channels).arrays[-1]


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
        import torch

        from pyrdiff.data import ImageLevels, open_source
        from pyrdiff.metrics import open_features

        images = ImageLevels.build(open_source(reference, array_key=array_key), [size], channels=channels)
        if len(images) < 2 * held:
            raise ValueError(
                f"--reference: holds {len(images)} images; expected twice the {held} that are set aside to be scored"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
        self.held, rest = (images.arrays[-1][part] for part in (order[:held], order[held:][:limit]))
        self.network, self.resamples = open_features(features, weights=weights, device=device), resamples
        self.real = self._features(rest)
        self.all_real = self._statistics(self.real)
        self.few_images = self._floats(rest[:NEIGHBOURS])
        self.description = {
            "features": features,
            "conventions": dict(self.network.conventions),
            "resamples": resamples,
            "data": {"fingerprint": images.fingerprint, "images": len(images)},
            "compared_with": {"frechet": len(rest), "others": len(self.few_images)},
        }

    def __call__(self, images) -> dict:
        """Scores of uint8 [N, H, W, C]; the interval holds 95 % of what other samples of this number would give."""
        from pyrdiff.data import octave_power
        from pyrdiff.metrics import bootstrap_interval, kid, precision_recall

        mine, few = self._features(images), self.real[:NEIGHBOURS]
        interval = bootstrap_interval(
            lambda sample: self.all_real.distance(self._statistics(sample)), mine, resamples=self.resamples, level=0.95
        )
        return {
            "images": len(images),
            "frechet": self.all_real.distance(self._statistics(mine)),
            "frechet_interval": list(interval),
            "kid": kid(few, mine).value,
            "precision_recall": [part.value for part in precision_recall(few, mine)],
            "octaves": [round(value, 4) for value in octave_power(self._floats(images), self.few_images)],
        }

    def _features(self, images):
        return self.network(self._floats(images), data_range=(0, 1)).double()

    @staticmethod
    def _floats(images):
        import torch

        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255

    @staticmethod
    def _statistics(features):
        from pyrdiff.metrics import FeatureStatistics

        return FeatureStatistics(features.shape[1]).update(features)
