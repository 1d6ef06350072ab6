"""The colours of a set of images."""

import numpy as np
import torch

CHUNK = 512  # images that are held as floats at a time


def color_statistics(images: np.ndarray) -> dict:
    """
    Mean and covariance of the mean colours of images, as `PyramidalPipeline` keeps them.

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        {"mean": [C], "covariance": [C, C]}, in the [-1, 1] range, rounded to 6 digits. One image has the covariance 0.
    """
    starts = range(0, len(images), CHUNK)
    means = [images[start : start + CHUNK].mean((1, 2), dtype=np.float64) / 127.5 - 1 for start in starts]
    colors = torch.from_numpy(np.concatenate(means))
    away = colors - colors.mean(0)
    covariance = away.T @ away / max(1, len(colors) - 1)
    covariance = (covariance + covariance.T) / 2
    return {
        "mean": [round(value, 6) for value in colors.mean(0).tolist()],
        "covariance": [[round(value, 6) for value in row] for row in covariance.tolist()],
    }
