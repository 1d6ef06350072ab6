"""The windows that go through a pipeline's networks, counted."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

from .telling import Progress


@contextmanager
def watched(pipeline: DiffusionPipeline | None, progress: Progress) -> Iterator[None]:
    """In the block, what goes through the pipeline's networks is told to `progress`; after it the bar is closed."""

    def count(module: torch.nn.Module, given: tuple, named: dict, made: object) -> None:
        values = (*given, *named.values())
        sample = next((value for value in values if isinstance(value, torch.Tensor) and value.ndim == 4), None)
        if sample is not None:
            progress.windows(len(sample))

    components = [] if pipeline is None else pipeline.components.values()
    networks = [part for part in components if isinstance(part, torch.nn.Module)]
    hooks = [network.register_forward_hook(count, with_kwargs=True) for network in networks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        progress.close()
