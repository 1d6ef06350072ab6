"""Low-resolution images made of high-resolution ones on the fly, to train super-resolution."""

import io
import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# "realistic": what a small photograph from the web has gone through, twice: at full strength each is drawn uniformly.
BLUR = 0.7  # standard deviation of the blur along each of its axes up to this, in pixels of the small image
NOISE = 10 / 255  # standard deviation of noise up to this, in the [0, 1] range; of shot noise that of white
QUALITY = (40, 95)  # of JPEG; 95 at strength 0
KERNELS = ("area", "bilinear", "bicubic")  # of resizing
STEPS = ("blur", "resize", "noise", "jpeg")


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


def degrade(
    images: torch.Tensor,
    factor: int,
    kind: Literal["bicubic", "realistic"],
    draws: Source,
    strength: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    What a low-resolution file of each image would hold: "bicubic", `shrink`; or "realistic", a chain of blur, resizing,
    noise and JPEG in random order, gone through twice (the second-order degradations of Wang et al. 2021,
    arXiv:2107.10833, in the random order of Zhang et al. 2021, arXiv:2103.14006). JPEG runs on the CPU, and the
    numbers that say what is done are read there.

    Args:
        images, factor: As of `shrink`, which says what is returned and raised, too.
        draws: Where the random numbers come from.
        strength: float [B] in [0, 1], of the realistic chain; by default 1. At 0 it is `shrink` and JPEG of quality 95.
    """
    if kind == "bicubic":
        return shrink(images, factor)
    if kind != "realistic":
        raise ValueError(f"kind={kind!r}: expected 'bicubic' or 'realistic'")
    _check_factor(images, factor)
    count = len(images)
    strength = torch.ones(count) if strength is None else strength.cpu()
    # For each image and round: an order of the steps, six numbers, and noise, of which small images take a part.
    orders = draws.uniform(count, 2, len(STEPS)).argsort(-1).tolist()
    numbers = draws.uniform(count, 2, 6).tolist()
    noise = torch.stack([draws.normal(*images.shape) for _ in range(2)], dim=1).to(images.device)
    small = tuple(side // factor for side in images.shape[-2:])
    made = []
    for index, image in enumerate(images.float().split(1)):
        for turn in range(2):
            chain = _Chain(small, turn == 1, float(strength[index]), numbers[index][turn], noise[index, turn])
            for step in orders[index][turn]:
                image = getattr(chain, STEPS[step])(image)
        made.append(_round(image))
    return torch.cat(made)


@dataclass(frozen=True)
class _Chain:
    """
    One round of the realistic chain.

    Args:
        small: (height, width) at the end of the last round.
        last: Whether this is the last round.
        strength: In [0, 1].
        numbers: Six numbers in [0, 1) that say what the steps do.
        normal: Normal numbers [C, H, W].
    """

    small: tuple[int, int]
    last: bool
    strength: float
    numbers: list[float]
    normal: torch.Tensor

    def blur(self, image: torch.Tensor) -> torch.Tensor:
        """Gaussian, the same in all directions half of the time."""
        first, second, turn = self.numbers[0], self.numbers[1], math.pi * self.numbers[2]
        widest = self.strength * BLUR * image.shape[-2] / self.small[0]
        sigmas = (widest * first, widest * (first if self.numbers[3] < 0.5 else second))
        return _blur(image, sigmas, turn)

    def resize(self, image: torch.Tensor) -> torch.Tensor:
        """At the end to the small size, before to one between the image's and that; by a random kernel."""
        number = self.numbers[4]
        kernel = KERNELS[int(number / self.strength * len(KERNELS))] if number < self.strength else "bicubic"
        share = 1.0 if self.last else self.strength * self.numbers[5]
        pairs = zip(image.shape[-2:], self.small, strict=True)
        size = tuple(round(side * (small / side) ** share) for side, small in pairs)
        if kernel == "area":
            return F.interpolate(image, size, mode="area")
        return F.interpolate(image, size, mode=kernel, antialias=True)

    def noise(self, image: torch.Tensor) -> torch.Tensor:
        """White, or shot noise in its normal approximation; gray half of the time."""
        height, width = image.shape[-2:]
        normal = self.normal[:, :height, :width]
        if self.numbers[2] < 0.5:
            normal = normal[:1].expand_as(normal)
        spread = 2 * self.strength * NOISE * self.numbers[1]  # the range is 2, so that it is twice what it is in [0, 1]
        if self.numbers[3] < 0.5:
            normal = normal * (image.clamp(-1, 1) / 2 + 0.5).sqrt()
        return image + spread * normal

    def jpeg(self, image: torch.Tensor) -> torch.Tensor:
        quality = QUALITY[1] - self.strength * self.numbers[0] * (QUALITY[1] - QUALITY[0])
        return _jpeg(_round(image), torch.tensor([quality]))


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


def _blur(images: torch.Tensor, sigmas: tuple[float, float], turn: float) -> torch.Tensor:
    """
    Gaussian blur of images [B, C, H, W], borders mirrored.

    Args:
        sigmas: Standard deviations along the two axes of the kernel, in pixels.
        turn: Angle of the first axis from that of the columns towards that of the rows, in radians.
    """
    channels, height, width = images.shape[1:]
    radius = min(math.ceil(4 * max(sigmas)), height - 1, width - 1)
    if radius == 0:
        return images
    taps = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    cosine, sine = math.cos(turn), math.sin(turn)
    along = taps * cosine + taps[:, None] * sine, taps[:, None] * cosine - taps * sine
    kernel = torch.exp(
        -0.5 * sum((axis / max(sigma, 1e-3)).square() for axis, sigma in zip(along, sigmas, strict=True))
    )
    kernel = (kernel / kernel.sum()).expand(channels, 1, -1, -1)
    return F.conv2d(F.pad(images, (radius,) * 4, mode="reflect"), kernel.contiguous(), groups=channels)


def _jpeg(images: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    pixels = ((images + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    decoded = []
    for array, number in zip(pixels, quality.tolist(), strict=True):
        file = io.BytesIO()
        Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(file, "JPEG", quality=round(number))
        decoded.append(np.asarray(Image.open(file)).reshape(array.shape))
    values = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images)
    return values / 127.5 - 1
