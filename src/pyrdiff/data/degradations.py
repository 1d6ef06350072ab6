"""Low-resolution images made of high-resolution ones on the fly, to train super-resolution."""

import io
import math
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# "realistic": what a small photograph from the web has gone through, each drawn uniformly for every image.
BLUR = (0.0, 0.4)  # standard deviation of the blur, in pixels of the small image
NOISE = (0.0, 10 / 255)  # standard deviation of white noise, in the [0, 1] range
QUALITY = (40, 95)  # of JPEG


class Source(Protocol):
    """Where random numbers come from, such as `pyrdiff.training.losses.Draws`."""

    def uniform(self, *shape: int) -> torch.Tensor: ...

    def normal(self, *shape: int) -> torch.Tensor: ...


def shrink(images: torch.Tensor, factor: int) -> torch.Tensor:
    """
    Bicubic with Pillow's antialiasing, rounded to 8 bits as a file is.

    Args:
        images: float [B, C, H, W] in [-1, 1].
        factor: A whole number that divides both sides.

    Returns:
        float32 [B, C, H / factor, W / factor] in [-1, 1].

    Raises:
        ValueError: if the factor does not divide the sides.
    """
    return _round(_resize(images, factor))


def degrade(images: torch.Tensor, factor: int, kind: Literal["bicubic", "realistic"], draws: Source) -> torch.Tensor:
    """
    What a low-resolution file of each image would hold: "bicubic", `shrink`; or "realistic", a Gaussian blur, `shrink`,
    white noise and JPEG, each of random strength (`BLUR`, `NOISE`, `QUALITY`). JPEG runs on the CPU.

    Args, returns and raises as `shrink`; `draws` is where the random numbers come from.
    """
    if kind == "bicubic":
        return shrink(images, factor)
    if kind != "realistic":
        raise ValueError(f"kind={kind!r}: expected 'bicubic' or 'realistic'")
    _check_factor(images, factor)
    count = len(images)
    blur, noise, quality = (
        low + (high - low) * draws.uniform(count).to(images.device) for low, high in (BLUR, NOISE, QUALITY)
    )
    small = _resize(_blur(images.float(), blur * factor, BLUR[1] * factor), factor)
    # The range is 2, so that the noise is twice what it is in [0, 1].
    small = small + 2 * noise[:, None, None, None] * draws.normal(*small.shape).to(small)
    return _jpeg(_round(small), quality)


def _check_factor(images: torch.Tensor, factor: int) -> None:
    height, width = images.shape[-2:]
    if not isinstance(factor, int) or factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor={factor} for images of {height}x{width}: expected one that divides both sides")


def _resize(images: torch.Tensor, factor: int) -> torch.Tensor:
    _check_factor(images, factor)
    height, width = images.shape[-2:]
    return F.interpolate(images.float(), (height // factor, width // factor), mode="bicubic", antialias=True)


def _round(images: torch.Tensor) -> torch.Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _blur(images: torch.Tensor, sigma: torch.Tensor, widest: float) -> torch.Tensor:
    """Gaussian blur of each image [B, C, H, W] by its own sigma [B], up to `widest`, in pixels; borders mirrored."""
    count, channels, height, width = images.shape
    radius = min(math.ceil(4 * widest), height - 1, width - 1)
    taps = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]).square())
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    flat = F.pad(images, (radius,) * 4, mode="reflect").reshape(
        1, count * channels, *(s + 2 * radius for s in (height, width))
    )
    flat = F.conv2d(flat, kernels[:, :, :, None], groups=count * channels)
    flat = F.conv2d(flat, kernels[:, :, None, :], groups=count * channels)
    return flat.reshape(images.shape)


def _jpeg(images: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    pixels = ((images + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    decoded = []
    for array, number in zip(pixels, quality.tolist(), strict=True):
        file = io.BytesIO()
        Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(file, "JPEG", quality=round(number))
        decoded.append(np.asarray(Image.open(file)).reshape(array.shape))
    values = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images)
    return values / 127.5 - 1
