"""What the loop, the loader and the command line know of a method: one description, found by entry point."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
        first: f(settings) -> (`Method`, its settings) of a network that this one builds on, or None. It is trained
            first, by the same loop, into the folder of its method's name; `scheduler`, `loss`, `pipeline` and `preview`
            of this method then get the finished network as the argument `given`. Its own `pipeline` may be any object
            for its `preview`: it is not exported.
        finish: f(settings, network, images), for a method that is the `first` of another: last work on the trained
            network, such as fitting what is not learned by gradients, before it is kept.
    """

    name: str
    summary: str
    settings: type
    model: Callable
    scheduler: Callable
    loss: Callable
    pipeline: Callable
    preview: Callable
    first: Callable | None = None
    finish: Callable | None = None

    def building_on(self, network) -> "Method":
        """This method with the finished network of its `first` in place."""
        names = ("scheduler", "loss", "pipeline", "preview")
        return replace(self, **{name: partial(getattr(self, name), given=network) for name in names}, first=None)


def methods() -> dict[str, Method]:
    """Every installed method by name, ours and those of other packages (entry-point group `pyrdiff.methods`)."""
    return {entry.name: entry.load() for entry in entry_points(group=GROUP)}
