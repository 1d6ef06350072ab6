"""Images of one colour, spread as the colours of a data set are: all that can be told of an image in much noise."""

from collections.abc import Mapping

import torch

from pyrdiff.parts.checks import Generators
from pyrdiff.parts.noise import white_noise


def check_colors(colors: Mapping | None, channels: int) -> None:
    """
    Refuses what is no mean and covariance of colours.

    Args:
        colors: {"mean": [C], "covariance": [C, C]} of the mean colours of images in [-1, 1], or `None`.
        channels: C.
    """
    if colors is None:
        return
    try:
        mean, covariance = (torch.tensor(colors[name], dtype=torch.float64) for name in ("mean", "covariance"))
        good = mean.shape == (channels,) and covariance.shape == (channels, channels)
        good = good and bool(covariance.isfinite().all() and mean.isfinite().all())
        good = (
            good and torch.equal(covariance, covariance.T) and bool((torch.linalg.eigvalsh(covariance) > -1e-5).all())
        )
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"colors={colors}: expected the mean [{channels}] and covariance [{channels}, {channels}] of colours"
        )


def draw_colors(
    colors: Mapping, shape: tuple[int, int, int, int], generator: Generators, device: torch.device
) -> torch.Tensor:
    """
    Images of one colour each, in [-1, 1] as far as their spread is.

    Args:
        colors: See `check_colors`.
        shape: [B, C, H, W].
        generator: One, or one an image.
        device: Of the images.
    """
    covariance = torch.tensor(colors["covariance"], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # symmetric, so that it does not depend on signs
    normal = white_noise((shape[0], shape[1], 1, 1), generator=generator, device=device)
    drawn = (
        torch.einsum("cd,bdhw->bchw", root.to(normal), normal) + torch.tensor(colors["mean"]).to(normal)[:, None, None]
    )
    return drawn.expand(shape)
