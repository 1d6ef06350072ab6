"""What the pipelines share of a call: progress, interruption, callbacks, and the way out of [-1, 1]."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from pyrdiff.parts.checks import Generators, check_generator, check_output_type
from pyrdiff.parts.labels import Classes, label_numbers
from pyrdiff.parts.saving import StandaloneSaving
from pyrdiff.parts.wrappers import network_takes, plain

Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor
Item = TypeVar("Item")


class SamplingRun:
    """The running call of a pipeline: what happens after each of its steps."""

    def __init__(self, pipeline, progress, callback: Callable | None, tensor_inputs: Sequence[str]):
        self._pipeline, self._progress = pipeline, progress
        self._callback, self._tensor_inputs = callback, tensor_inputs
        self._steps = 0

    def going(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until the run is interrupted."""
        for item in items:
            if self._pipeline.interrupt:
                return
            yield item

    def after_step(self, timestep: torch.Tensor | int, latents: torch.Tensor) -> torch.Tensor:
        """Tells the callback and the progress bar; returns the latents, or those that the callback made of them."""
        if self._callback is not None:
            tensors = {"latents": latents} if "latents" in self._tensor_inputs else {}
            changed = self._callback(self._pipeline, self._steps, timestep, tensors) or {}
            latents = changed.pop("latents", latents)
        self._steps += 1
        self._progress.update()
        return latents


class SamplingPipeline(StandaloneSaving):
    """A base beside `DiffusionPipeline`, before it: `class P(SamplingPipeline, DiffusionPipeline)`."""

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "SamplingPipeline":
        """As stock, which takes over no network of a class that `__init__` does not name: here of every class."""
        accepted = inspect.signature(cls.__init__).parameters
        shared = {name: component for name, component in pipeline.components.items() if name in accepted}
        return super().from_pipe(pipeline, **shared | kwargs)

    @property
    def components(self) -> dict[str, object]:
        """As stock, without those that are left out by default: other pipelines may not know them."""
        defaults = inspect.signature(type(self).__init__).parameters
        named = super().components.items()
        return {name: value for name, value in named if value is not None or defaults[name].default is not None}

    @property
    def num_timesteps(self) -> int:
        """Network calls of the last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @contextmanager
    def _running(self, calls: int, callback: Callable | None, tensor_inputs: Sequence[str]) -> Iterator[SamplingRun]:
        self._interrupt, self._num_timesteps = False, calls
        with self.progress_bar(total=calls) as progress:
            yield SamplingRun(self, progress, callback, tensor_inputs)
        self.maybe_free_model_hooks()

    def _check_request(self, batch_size: int, generator: Generators, output_type: str, names: Sequence[str]) -> None:
        """The arguments that all calls have; `names` is `callback_on_step_end_tensor_inputs`."""
        check_generator(generator, batch_size)
        check_output_type(output_type)
        if not set(names) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={list(names)}: expected a subset of {self._callback_tensor_inputs}"
            )

    @property
    def _channels(self) -> int:
        """Of an image."""
        config = plain(self.unet).config
        return getattr(config, "image_channels", config.in_channels)

    @property
    def _size_multiple(self) -> int:
        """Sides of a network's sample are multiples of this; with pixels in cells, of so many cells."""
        network = plain(self.unet)
        levels = len(getattr(network.config, "block_out_channels", (1,)))
        return getattr(network, "CELL", 1) * 2 ** (levels - 1)

    def _predict(
        self,
        sample: torch.Tensor,
        time: torch.Tensor,
        coordinates: torch.Tensor,
        labels: torch.Tensor | None = None,
        network: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """
        The output [B, C, H, W], float32, of `unet` or another network; it is told where the pixels lie if it wants to
        know, and the labels of the images' classes if there are any: [B], or [B / n] for n windows of each image.
        """
        network = self.unet if network is None else network
        told = {"coordinates": coordinates} if network_takes(network, "coordinates") else {}
        if labels is not None:
            told["class_labels"] = labels.repeat(len(sample) // len(labels))
        return network(sample.to(plain(network).dtype), time, **told, return_dict=False)[0].float()

    def _labels(self, classes: Classes, count: int) -> torch.Tensor | None:
        """What the network is told of the images' classes, int64 [count]; `None` if it knows none."""
        labels = label_numbers(classes, count, plain(self.unet).config)
        return None if labels is None else torch.tensor(labels, device=self._execution_device)

    def _to_output(self, latents: torch.Tensor, size: tuple[int, int], output_type: str) -> Images:
        """Latents [B, C, H, W] in [-1, 1] at a size and in the form that was asked for."""
        if latents.shape[-2:] != size:
            latents = F.interpolate(latents, size, mode="bicubic", align_corners=False, antialias=True)
        if output_type == "latent":
            return latents
        return self._in_unit_range((latents / 2 + 0.5).clamp(0, 1), output_type)

    def _in_unit_range(self, images: torch.Tensor, output_type: str) -> Images:
        """Images [B, C, H, W] in [0, 1] as "pil", "np" or "pt"."""
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
