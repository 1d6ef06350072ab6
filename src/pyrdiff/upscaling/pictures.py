"""One picture enlarged with what its file carries, and how far the result is from it."""

import torch
from PIL import Image

from pyrdiff.data import Picture, fill_hidden, image_tensor
from pyrdiff.parts.operators import project_onto

from .enlarger import Enlarger, Route, to_picture


def enlarge(enlarger: Enlarger, picture: Picture, route: Route, seed: int) -> Picture:
    """
    The enlarged picture. It is worked on upright, and without the colours that its alpha hides.

    Args:
        enlarger: Enlarges it.
        picture: Any.
        route: Of the size that it is shown at.
        seed: Of the noise.

    Raises:
        ValueError: for colours and a model of one channel, or a model that gives no numbers.
    """
    gray, channels = picture.color.mode == "L", enlarger.channels
    if channels == 1 and not gray:
        raise ValueError("a colour image: expected a gray one, for this model of one channel")
    color, alpha = picture.upright()
    if alpha is not None:
        color, alpha = fill_hidden(color, alpha), enlarged_alpha(enlarger, alpha, route)
    made = to_picture(enlarger.enlarge(image_tensor([color], channels), route, seed))
    enlarged = picture.with_shown(made.convert("L") if gray and channels == 3 else made, alpha)
    enlarged.notes.extend(route.notes)
    if gray and channels == 3:
        enlarged.notes.append("gray, enlarged as RGB and saved as its luma")
    return enlarged


def enlarged_alpha(enlarger: Enlarger, alpha: Image.Image, route: Route) -> Image.Image:
    """Bicubic; with `hard_consistency` projected so that, made smaller, it gives the alpha of the picture."""
    larger = alpha.resize(route.target, Image.Resampling.BICUBIC)
    if not enlarger.arguments.get("hard_consistency"):
        return larger
    operator = enlarger.shrinking(route.target[::-1], alpha.size[::-1])
    projected = project_onto(2 * image_tensor([larger], 1) - 1, image_tensor([alpha], 1), operator)
    return to_picture(projected / 2 + 0.5)


def difference(enlarger: Enlarger, picture: Picture, made: Picture) -> tuple[float, float]:
    """
    How far the file that was written, made smaller, is from the picture: mean and largest absolute difference in
    [0, 1], over the colours that are seen and the alpha.
    """
    (color, alpha), (larger, larger_alpha) = picture.upright(), made.upright()
    channels = 1 if color.mode == "L" else 3
    operator = enlarger.shrinking(larger.size[::-1], color.size[::-1])
    seen = torch.ones(())
    if alpha is not None:
        color, seen = fill_hidden(color, alpha), image_tensor([alpha], 1)
    bands = [(operator.A(image_tensor([larger], channels)) - image_tensor([color], channels)).abs() * seen]
    if alpha is not None:
        opaque = torch.ones(1, 1, *larger.size[::-1])
        written = opaque if larger_alpha is None else image_tensor([larger_alpha], 1)
        bands.append((operator.A(written) - seen).abs())
    distance = torch.cat(bands, 1)
    return distance.mean().item(), distance.max().item()
