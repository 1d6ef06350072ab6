"""What the loop, the loader and the command line know of a method: one description, found by entry point."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

GROUP = "pyrdiff.methods"


@dataclass(frozen=True)
class Method:
    """
    A trainable method. Its functions import torch when called, so that listing methods and their flags is quick.

    Args:
        name: As users type it.
        summary: One line for `--help`.
        settings: Dataclass of the method's flags; a `TrainingSettings`.
        model: f(settings, channels) -> the network.
        scheduler: f(settings, images) -> the noise schedule that it is trained with; `images` are `ImageLevels`.
        loss: f(network, scheduler, settings, batch, draws) -> scalar; `batch` holds images [B, C, H, W] in [-1, 1].
        pipeline: f(settings, network, scheduler, images) -> the pipeline to sample with and to publish.
        preview: f(settings, pipeline, images, path) -> {name: number} to log; writes a picture to `path`.
    """

    name: str
    summary: str
    settings: type
    model: Callable
    scheduler: Callable
    loss: Callable
    pipeline: Callable
    preview: Callable


def methods() -> dict[str, Method]:
    """Every installed method by name, ours and those of other packages (entry-point group `pyrdiff.methods`)."""
    return {entry.name: entry.load() for entry in entry_points(group=GROUP)}
