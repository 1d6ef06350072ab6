"""A batch of images at the door of a network or scheduler, and numbers of which each image has its own."""

import torch


def check_batch(sample: torch.Tensor, channels: int, multiple: int) -> None:
    """
    The sample must be images [B, channels, H, W] with sides that are multiples of `multiple`.

    Raises:
        ValueError: if it is not.
    """
    if sample.ndim != 4 or sample.shape[1] != channels:
        raise ValueError(f"sample has shape {tuple(sample.shape)}: expected {channels} channels")
    if sample.shape[-2] % multiple or sample.shape[-1] % multiple:
        raise ValueError(f"sample has shape {tuple(sample.shape)}: expected sides that are multiples of {multiple}")


def one_for_each(name: str, value: torch.Tensor | float, images: torch.Tensor) -> torch.Tensor:
    """
    A number for all images [B, ...], or one for each, as float32 numbers on the device that it was given on.

    Raises:
        ValueError: for a shape other than (), (1,) and (B,).
    """
    numbers = torch.as_tensor(value, dtype=torch.float32)
    if numbers.shape not in ((), (1,), (len(images),)):
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}: expected a number or ({len(images)},)")
    return numbers


def beside(numbers: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """A number for each image, shaped [B, 1, ...] so that it multiplies images [B, ...]."""
    return numbers.reshape(-1, *[1] * (images.ndim - 1))
