"""What methods do with images: read some of the training images, and show images as pictures of progress."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pyrdiff.data import ImageLevels


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Images [B, H, W, C] in 0 to 255 as a tensor [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def spread_over(images: ImageLevels, count: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Batches [B, C, H, W] in [-1, 1] of up to `count` of the images at their top size, spread over all."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int))
    for start in range(0, len(chosen), batch_size):
        yield as_tensor(images.arrays[-1][chosen[start : start + batch_size]])


def generators(seed: int, count: int) -> list[torch.Generator]:
    """A generator for each image of a picture of progress, the same at every step."""
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def as_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Images [B, C, H, W] in [0, 1] as Pillow images."""
    return DiffusionPipeline.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).numpy())
