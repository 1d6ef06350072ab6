"""Whether a model is one for the pictures that it is given, as far as model and pictures tell."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from pyrdiff.data import Picture
from pyrdiff.parts.wrappers import plain

from .enlarger import Enlarger
from .pictures import difference, seen_values
from .sizes import Size

MUCH_LARGER = 2  # than the images that a generator was trained to draw, a side
FAR = 5.0  # standard deviations of the colours that it was trained on
MAX_CARD_BYTES = 2**20


def said_of_images(model: Path) -> str | None:
    """What the card in a model's folder says of the images that it was trained on: its first sentence."""
    try:
        with open(model / "README.md", encoding="utf-8") as file:
            text = file.read(MAX_CARD_BYTES)
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"^Images: (.{1,200}?)(?:[.:;] |\.?$)", text, re.MULTILINE)
    return None if found is None or found[1].startswith("not described") else found[1]


def doubts_of_size(enlarger: Enlarger, target: Size, said: str | None) -> str | None:
    """
    What there is to say against enlarging to a size (width, height) by a network that was trained to draw images.

    Args:
        enlarger: With any network.
        target: The largest result.
        said: What the card says of the training images.
    """
    if enlarger.pipeline is enlarger.saved:
        return None
    config = getattr(plain(enlarger.pipeline.unet), "config", {})
    sizes = config.get("resolutions") or [config.get("sample_size")]
    sides = [max(size) if isinstance(size, (list, tuple)) else size for size in sizes if size]
    if not sides or max(target) <= MUCH_LARGER * max(sides):
        return None
    of = f" ({said})" if said else ""
    return (
        f"this model draws images of {max(sides)}x{max(sides)}{of}, and was not trained to enlarge: at "
        f"{target[0]}x{target[1]} expect no better than bicubic"
    )


def doubts_of_colors(enlarger: Enlarger, picture: Picture) -> str | None:
    """What there is to say if a picture has other colours than the training images, where a model knows theirs."""
    colors = enlarger.saved.config.get("colors")
    values = seen_values(picture)
    if not colors or values.shape[1] != len(colors["mean"]):
        return None
    away = 2 * values.double().mean((0, 2, 3)) - 1 - torch.tensor(colors["mean"], dtype=torch.float64)
    spread = torch.tensor(colors["covariance"], dtype=torch.float64) + 1e-4 * torch.eye(len(away)).double()
    distance = (away @ torch.linalg.solve(spread, away)).sqrt().item()
    return f"its colours are {distance:.0f} standard deviations from the training images'" if distance > FAR else None


def doubts_of_result(enlarger: Enlarger, picture: Picture, target: Size, mean: float) -> str | None:
    """
    What there is to say if a result is much further from its picture than a bicubic enlargement.

    Args:
        enlarger: Made the result.
        picture: What was enlarged.
        target: (width, height) of the result.
        mean: Mean difference in [0, 1] between the picture and the result made smaller.
    """
    color, _ = picture.upright()
    bicubic = picture.with_shown(color.resize(target, Image.Resampling.BICUBIC), None)
    plain_one, _ = difference(enlarger, replace(picture, alpha=None), bicubic)
    if mean <= 2 * plain_one + 1 / 255:
        return None
    return (
        f"made smaller again it is {255 * mean:.1f}/255 from the picture, a bicubic enlargement {255 * plain_one:.1f}: "
        "look at it before you use it"
    )
