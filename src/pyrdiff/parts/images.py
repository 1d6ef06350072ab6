"""Images in: PIL, numpy or torch, in one form."""

import math

import numpy as np
import PIL.Image
import torch

ImageInput = PIL.Image.Image | np.ndarray | torch.Tensor | list
PIL_MODES = {1: "L", 3: "RGB"}


def read_images(image: ImageInput, channels: int | None, any_range: bool = False) -> torch.Tensor:
    """
    The images of an argument `image` as one batch.

    Args:
        image: PIL in mode L or RGB; numpy [H, W, C] or [B, H, W, C], or torch [C, H, W] or [B, C, H, W], of floats in
            [0, 1]; or a list of one of these kinds, all of one size.
        channels: How many are expected; `None` for any.
        any_range: Whether numbers outside [0, 1] are fine, as they are for noisy measurements.

    Returns:
        Floats [B, C, H, W] as they were given; PIL as float32 in [0, 1].

    Raises:
        ValueError: for anything else.
    """
    if isinstance(image, (list, tuple)):
        kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
        if not image or not any(all(isinstance(one, kind) for one in image) for kind in kinds):
            raise ValueError("image: expected a list of images of one kind, PIL, numpy or torch")
        batches = [read_images(one, channels, any_range) for one in image]
        if len({batch.shape[1:] for batch in batches}) > 1:
            raise ValueError("image: got several sizes or modes; expected one, or a call for each")
        return torch.cat(batches)
    batch = _as_tensor(image, channels)
    if batch.ndim != 4 or batch.numel() == 0 or not batch.is_floating_point():
        raise ValueError(f"image: got {batch.dtype} {list(batch.shape)}; expected float [B, C, H, W] in [0, 1]")
    if channels is not None and batch.shape[1] != channels:
        raise ValueError(f"image has {batch.shape[1]} channels: expected {channels}")
    lowest, highest = batch.amin().item(), batch.amax().item()
    if not math.isfinite(lowest + highest):
        raise ValueError("image has values that are not finite: expected numbers in [0, 1]")
    if not any_range and not (-1e-6 <= lowest and highest <= 1 + 1e-6):
        raise ValueError(f"image has values from {lowest:.3g} to {highest:.3g}: expected [0, 1]")
    return batch


def _as_tensor(image: PIL.Image.Image | np.ndarray | torch.Tensor, channels: int | None) -> torch.Tensor:
    """[B, C, H, W] of one image, or of a batch that is one array already."""
    if isinstance(image, PIL.Image.Image):
        modes = [mode for count, mode in PIL_MODES.items() if channels in (None, count)]
        if image.mode not in modes:
            expected = f"{' or '.join(modes)}; see `Image.convert`" if modes else f"a tensor, for {channels} channels"
            raise ValueError(f"image is in mode {image.mode}: expected {expected}")
        image = np.array(image, dtype=np.float32) / 255
        image = image[..., None] if image.ndim == 2 else image
    if isinstance(image, np.ndarray):
        if image.ndim not in (3, 4) or image.dtype.kind != "f":
            raise ValueError(f"image: got {image.dtype} {list(image.shape)}; expected float [B, H, W, C] in [0, 1]")
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"image of type {type(image).__name__}: expected PIL, numpy or torch, or a list of them")
    return image[None] if image.ndim == 3 else image
