"""One picture enlarged with what its file carries, and how far the result is from it."""

from dataclasses import replace

import numpy as np
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
    _, alpha = picture.upright()
    values = seen_values(picture)
    made = enlarger.enlarge(values.expand(-1, channels, -1, -1).contiguous(), route, seed)
    color = to_picture(made).convert("L" if gray else "RGB")
    deep = None
    if picture.deep is not None:
        values = to_luma(made)[0, 0] if gray else made[0].movedim(0, -1)
        deep = (values * 65535).round().numpy().astype(np.uint16)
    alpha = None if alpha is None else enlarged_alpha(enlarger, alpha, route)
    enlarged = picture.with_shown(color, alpha, deep)
    enlarged.notes.extend(route.notes)
    if gray and channels == 3:
        enlarged.notes.append("gray, enlarged as RGB and saved as its luma")
    return enlarged


def seen_values(picture: Picture) -> torch.Tensor:
    """The colours [1, 1 or 3, H, W] in [0, 1] as they are shown, with those that alpha hides filled in."""
    color, alpha = picture.upright()
    deep = picture.deep_upright()
    channels = 1 if color.mode == "L" else 3
    values = image_tensor([color if alpha is None else fill_hidden(color, alpha)], channels)
    if deep is None:
        return values
    exact = torch.from_numpy(deep.reshape(*deep.shape[:2], channels).astype(np.float32) / 65535).movedim(-1, 0)[None]
    return exact if alpha is None else torch.where(image_tensor([alpha], 1) > 0, exact, values)


def to_luma(image: torch.Tensor) -> torch.Tensor:
    """[1, 1, H, W], of RGB weighted as Rec. 601 has it."""
    if image.shape[1] == 1:
        return image
    return (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


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
    (_, alpha), (_, larger_alpha) = picture.upright(), made.upright()
    given, larger = seen_values(picture), seen_values(replace(made, alpha=None))
    if given.shape[1] == 1:  # it may have become RGB in the file
        larger = to_luma(larger)
    operator = enlarger.shrinking(larger.shape[-2:], given.shape[-2:])
    seen = torch.ones(()) if alpha is None else image_tensor([alpha], 1)
    bands = [(operator.A(larger) - given).abs() * seen]
    if alpha is not None:
        opaque = torch.ones(1, 1, *larger.shape[-2:])
        written = opaque if larger_alpha is None else image_tensor([larger_alpha], 1)
        bands.append((operator.A(written) - seen).abs())
    distance = torch.cat(bands, 1)
    return distance.mean().item(), distance.max().item()
