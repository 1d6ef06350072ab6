"""What visitors ask for: checked, and turned into the arguments of a pipeline's call."""

from diffusers import DiffusionPipeline
from PIL import Image

from pyrdiff.machine import seeded

from .run import parameters

MAX_IMAGES = 16
MOST_STEPS = 10_000


def call_arguments(
    pipeline: DiffusionPipeline, count: int | None, seed: int | None, plan: str | None, steps: dict | None
) -> dict:
    """
    The arguments of a call that it takes. Image k has the seed `seed + k`, so that it is the same in every batch.

    Raises:
        ValueError: for what is empty or out of range, in a sentence that names the field.
    """
    check_number("Images", count, 1, MAX_IMAGES)
    check_number("Seed", seed, 0, 2**63 - 1)
    takes, arguments = parameters(pipeline), {}
    count = count if "batch_size" in takes else 1
    if "batch_size" in takes:
        arguments["batch_size"] = count
    if "generator" in takes:
        generators = seeded([(seed + index) % 2**63 for index in range(count)], pipeline.device)
        arguments["generator"] = generators if count > 1 else generators[0]
    return {**arguments, **plan_arguments(pipeline, plan, steps)}


def plan_arguments(pipeline: DiffusionPipeline, plan: str | None, steps: dict | None) -> dict:
    """
    The arguments of a call that say how it is done: a plan, or those numbers of steps that it takes and that are given.

    Raises:
        ValueError: for a number that is none.
    """
    if plan:
        return {"plan": plan}
    takes = parameters(pipeline)
    given = {name: value for name, value in (steps or {}).items() if value is not None and name in takes}
    for name, value in given.items():
        check_number(name, value, 1, MOST_STEPS)
    return given


def check_number(field: str, value: object, low: int, high: int) -> None:
    """Raises `ValueError` unless the value is a whole number from `low` to `high`."""
    if value is None:
        raise ValueError(f"{field}: nothing is entered; expected a whole number from {low} to {high}.")
    if not (isinstance(value, int) and low <= value <= high):
        raise ValueError(f"{field}: got {value}; expected a whole number from {low} to {high}.")


def numbers(field: str, text: str | None) -> list[int]:
    """
    Numbers of steps from a text such as "1, 2, 4".

    Raises:
        ValueError: if it holds anything else.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() and 0 < int(part) <= MOST_STEPS for part in parts):
        raise ValueError(f"{field}: got {text!r}; expected whole numbers with commas between, such as 5, 10, 20.")
    return list(dict.fromkeys(int(part) for part in parts))


def picture_arguments(
    pipeline: DiffusionPipeline, image: Image.Image, scale_factor: float | None, tile: int | None, max_pixels: int
) -> dict:
    """
    The arguments of a call that are about the picture.

    Raises:
        ValueError: for a scale factor that is none, or a result of more than `max_pixels`.
    """
    takes, arguments = parameters(pipeline), {"image": image}
    if "scale_factor" in takes:
        if scale_factor is None:
            raise ValueError("Scale factor: nothing is entered; expected a number from 1 to 64.")
        if not (isinstance(scale_factor, (int, float)) and 1 <= scale_factor <= 64):
            raise ValueError(f"Scale factor: got {scale_factor}; expected a number from 1 to 64.")
        scale_factor = int(scale_factor) if float(scale_factor).is_integer() else scale_factor
        width, height = (round(side * scale_factor) for side in image.size)
        if width * height > max_pixels:
            raise ValueError(
                f"Enlarged {scale_factor} times it would have {width}×{height} pixels, "
                f"{width * height / 1e6:.0f} megapixels; expected at most {max_pixels / 1e6:g}."
            )
        arguments["scale_factor"] = scale_factor
    if "tile" in takes and tile is not None:
        arguments["tile"] = tile
    return arguments
