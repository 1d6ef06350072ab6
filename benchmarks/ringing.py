"""A measure that sees ringing: what an image adds where the truth is smooth, beside its edges."""

import torch
import torch.nn.functional as F

FLAT, EDGE = (
    12 / 255,
    50 / 255,
)  # range of 7 x 7 pixels below which a place is smooth, of 3 x 3 above which it is an edge
REACH = 12  # pixels from an edge within which a smooth place counts
FEWEST = 20  # places


def ringing(luma: torch.Tensor, truth: torch.Tensor) -> float | None:
    """
    Root mean square, in levels of 255, of the difference of the images without their means of 9 x 9 pixels, over the
    places where the truth is smooth and an edge is near. Streaks, overshoots and grain count, wrong brightness does
    not; blurred edges count a little.

    Args:
        luma: [1, 1, H, W] in [0, 1], 9 pixels a side or more.
        truth: The same.

    Returns:
        None if there are hardly such places.
    """
    smooth, near = _range(truth, 7) < FLAT, F.max_pool2d(_range(truth, 3), 2 * REACH + 1, 1, REACH) > EDGE
    places = smooth & near
    if places.sum() <= FEWEST:
        return None
    return 255 * (_details(luma) - _details(truth))[places].square().mean().sqrt().item()


def _range(image: torch.Tensor, side: int) -> torch.Tensor:
    return F.max_pool2d(image, side, 1, side // 2) + F.max_pool2d(-image, side, 1, side // 2)


def _details(image: torch.Tensor) -> torch.Tensor:
    return image - F.avg_pool2d(F.pad(image, (4,) * 4, mode="reflect"), 9, 1)
