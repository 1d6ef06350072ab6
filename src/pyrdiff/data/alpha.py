"""Transparent pictures whose colours are worked on apart from their alpha."""

import numpy as np
from PIL import Image


def is_opaque(alpha: Image.Image) -> bool:
    """True if every pixel of an alpha channel (mode "L") is 255."""
    return alpha.getextrema()[0] == 255


def fill_hidden(color: Image.Image, alpha: Image.Image) -> Image.Image:
    """
    The colours with those that nobody sees, where alpha is 0, taken from the visible pixels nearby: whatever spreads
    colours, such as enlarging, then spreads no hidden ones.

    Args:
        color: Mode "L" or "RGB", [H, W].
        alpha: Mode "L" of the same size.

    Returns:
        In the mode of `color`; where alpha is above 0, the same.
    """
    weight = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    values = np.asarray(color, dtype=np.float64).reshape(*weight.shape[:2], -1)
    filled = np.where(weight > 0, values, np.rint(_filled(values * weight, weight)))
    return Image.fromarray(filled.astype(np.uint8).reshape(np.asarray(color).shape))


def _filled(weighted: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Means [H, W, C] of weighted values; where there is no weight, those of ever larger squares around."""
    means, (height, width) = weighted / np.maximum(weight, 1e-9), weight.shape[:2]
    if weight.all() or height == width == 1:
        return means
    even = [(0, height % 2), (0, width % 2), (0, 0)]
    halved = [
        np.pad(each, even).reshape(-(-height // 2), 2, -(-width // 2), 2, each.shape[2]).sum((1, 3))
        for each in (weighted, weight)
    ]
    around = _filled(*halved).repeat(2, 0).repeat(2, 1)[:height, :width]
    return np.where(weight > 0, means, around)
