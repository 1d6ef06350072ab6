"""Images of one colour, spread as the colours of a data set are: all that can be told of an image in much noise."""

from collections.abc import Mapping

import torch

from pyrdiff.parts.checks import Generators, is_number
from pyrdiff.parts.noise import white_noise


def check_colors(colors: Mapping | None, channels: int) -> None:
    """
    Refuses what is no mean and covariance of colours.

    Args:
        colors: {"mean": [C], "covariance": [C, C]} of the mean colours of images in [-1, 1], or `None`; and as
            "classes", if there are any, a list of the same of each class, with its "share" of the images.
        channels: C.
    """
    if colors is None:
        return
    share = colors.get("share", 0.0) if isinstance(colors, Mapping) else 0.0
    if not is_number(share) or not 0 <= share <= 1:
        raise ValueError(f"colors: has a share of {share!r}; expected a number from 0 to 1")
    of_classes = colors.get("classes", []) if isinstance(colors, Mapping) else []
    if not isinstance(of_classes, (list, tuple)):
        raise ValueError(f"colors: has the classes {of_classes!r}; expected a list with the colours of each")
    for each in of_classes:
        check_colors(each if isinstance(each, Mapping) else {}, channels)
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
    colors: Mapping,
    shape: tuple[int, int, int, int],
    generator: Generators,
    device: torch.device,
    labels: list[int] | None = None,
) -> torch.Tensor:
    """
    Images of one colour each, in [-1, 1] as far as their spread is.

    Args:
        colors: See `check_colors`.
        shape: [B, C, H, W].
        generator: One, or one an image.
        device: Of the images.
        labels: [B], places in the list of classes; beyond it, an image has the colours of all images.
    """
    normal = white_noise((shape[0], shape[1], 1, 1), generator=generator, device=device)
    classes = colors.get("classes") or []
    if labels is None or not classes:
        root, mean = _root_and_mean(colors)
        drawn = torch.einsum("cd,bdhw->bchw", root.to(normal), normal) + mean.to(normal)[:, None, None]
        return drawn.expand(shape)
    pairs = [_root_and_mean(each) for each in (*classes, colors)]
    roots, means = (torch.stack([pairs[min(label, len(classes))][k] for label in labels]) for k in (0, 1))
    drawn = torch.einsum("bcd,bdhw->bchw", roots.to(normal), normal) + means.to(normal)[:, :, None, None]
    return drawn.expand(shape)


def _root_and_mean(colors: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """The root [C, C] of the covariance, float64, and the mean [C]."""
    values, vectors = torch.linalg.eigh(torch.tensor(colors["covariance"], dtype=torch.float64))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # symmetric, so that it does not depend on signs
    return root, torch.tensor(colors["mean"])
