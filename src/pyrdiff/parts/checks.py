"""Checks of arguments that several pipelines take. Each raises `ValueError` with the name, the value and what fits."""

import math
import numbers
from collections.abc import Sequence

import torch

from pyrdiff.parts.settings import is_whole

Size = int | tuple[int, int]
Generators = torch.Generator | list[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def is_number(value) -> bool:
    """Whether it is a finite real number, also one of numpy; a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < math.inf


def is_count(value) -> bool:
    """Whether it is a whole number from 1 up."""
    return is_whole(value) and value > 0


def check_count(name: str, value) -> None:
    if not is_count(value):
        raise ValueError(f"{name}={value!r}: expected a whole number from 1 up")


def check_switch(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False")


def check_strength(name: str, value) -> None:
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name}={value!r}: expected a number in (0, 1]")


def check_size(name: str, size: Size) -> tuple[int, int]:
    """The size as (height, width)."""
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(is_count(side) for side in pair):
        raise ValueError(f"{name}={size}: expected a whole number or (height, width)")
    return pair


def check_generators(generator: Generators) -> None:
    """One generator, a list of them, or none."""
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator={one!r}: expected a torch.Generator or a list of them, such as "
                "torch.Generator().manual_seed(5)"
            )


def check_generator(generator: Generators, batch_size: int) -> None:
    """One generator, or as many as there are images."""
    check_generators(generator)
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {batch_size}")


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")


def check_scheduler(name: str, scheduler) -> None:
    """The scheduler must be able to renoise an image, and say its noise process."""
    if not (hasattr(scheduler, "add_noise") and hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(
            f"{name}={type(scheduler).__name__}: expected a scheduler with `add_noise` and `alphas_cumprod`, such "
            "as DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler or "
            "HeunDiscreteScheduler"
        )
