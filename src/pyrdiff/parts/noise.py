"""White noise by one generator, or by one an image."""

import torch
from diffusers.utils.torch_utils import randn_tensor

from pyrdiff.parts.checks import Generators, check_generators


def white_noise(
    shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """
    Standard normal numbers [B, ...], drawn on the generator's device.

    Raises:
        ValueError: for generators that are none, or another number than one, or one for each of B.
    """
    check_generators(generator)
    if isinstance(generator, list) and len(generator) not in (1, shape[0]):
        raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {shape[0]}")
    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
