"""What images are to show: the classes that a model knows, and how strongly it is guided."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline

from pyrdiff.parts.checks import is_number
from pyrdiff.parts.wrappers import plain

from .run import parameters

MOST_GUIDANCE = 5.0


def class_names(pipeline: DiffusionPipeline) -> list[str]:
    """The names of the classes that a call takes; none if it takes none."""
    config = getattr(plain(pipeline.unet), "config", {}) if hasattr(pipeline, "unet") else {}
    return list(config.get("class_names") or []) if "classes" in parameters(pipeline) else []


def is_guided(pipeline: DiffusionPipeline) -> bool:
    """Whether there is something to guide by: classes, or another network."""
    by = bool(class_names(pipeline)) or getattr(pipeline, "guide", None) is not None
    return by and "guidance_scale" in parameters(pipeline)


def steering_arguments(pipeline: DiffusionPipeline, count: int, classes: Sequence[str], guidance: float) -> dict:
    """
    The arguments of a call that draws so.

    Args:
        pipeline: Any.
        count: Number of images.
        classes: Names; the images take turns. None of them for images of any class.
        guidance: 1 for none, up to `MOST_GUIDANCE`.

    Raises:
        ValueError: for what the model does not know.
    """
    known, arguments = class_names(pipeline), {}
    for name in classes:
        if name not in known:
            raise ValueError(f"Classes: got {name!r}; expected some of {', '.join(known) or 'none'}.")
    if not (is_number(guidance) and 0 <= guidance <= MOST_GUIDANCE):
        raise ValueError(f"Guidance: got {guidance}; expected a number from 0 to {MOST_GUIDANCE:g}.")
    if classes:
        arguments["classes"] = [classes[index % len(classes)] for index in range(count)]
    if guidance != 1:
        if not classes and getattr(pipeline, "guide", None) is None:
            raise ValueError("Guidance: choose classes first, since it draws images towards their classes.")
        arguments["guidance_scale"] = float(guidance)
    return arguments
