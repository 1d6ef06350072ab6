"""Pyramidal sampling with a Lanczos up-sampler. A saved model carries this file and what it imports of pyrdiff."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from pyrdiff.parts.checks import (
    Size,
    check_count,
    check_scheduler,
    check_strength,
    is_count,
)
from pyrdiff.parts.levels import check_growing, pixel_grid
from pyrdiff.parts.sampling import SamplingPipeline
from pyrdiff.parts.steps import LevelSteps, lay_out_steps


@dataclass
class LanczosPyramidPipelineOutput(BaseOutput):
    """
    Args:
        images: The top level: PIL images, a numpy array [B, H, W, C] in [0, 1], or a tensor [B, C, H, W] ("pt" in
            [0, 1], "latent" in [-1, 1], not clipped).
        levels: The images of every level, low to high, in the same form; `None` unless `return_levels=True`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    levels: list | None = None


class LanczosPyramidPipeline(SamplingPipeline, DiffusionPipeline):
    r"""
    Unconditional generation from coarse to fine: the whole reverse process at the lowest resolution, then at each
    higher one only its last part, from the enlarged (Lanczos) and renoised image.

    Parameters:
        unet: A network trained at several resolutions; those in its config are the default levels.
        scheduler: Any scheduler of diffusers with `add_noise`.
        lanczos_lobes (`int`, defaults to 3): Lobes on each side of the kernel.
    """

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, lanczos_lobes: int = 3):
        super().__init__()
        check_scheduler("scheduler", scheduler)
        if not is_count(lanczos_lobes):
            raise ValueError(f"lanczos_lobes={lanczos_lobes!r}: expected a whole number from 1 up")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(lanczos_lobes=lanczos_lobes)

    @staticmethod
    def lanczos_matrix(low: int, high: int, lobes: int = 3) -> torch.Tensor:
        """
        Enlarges `low` samples to `high`: row i holds L(x) = sinc(x) sinc(x / lobes) at the distances x of output i from
        the inputs, 0 from x = lobes on, divided by its sum (which differs from 1, most at the borders).

        Returns:
            float64 [high, low]. Pixel k of n lies at (k + 0.5) / n.
        """
        if not 1 <= low <= high:
            raise ValueError(f"low={low}, high={high}: expected 1 <= low <= high; to shrink would need an antialias")
        centres = (torch.arange(high, dtype=torch.float64) + 0.5) * low / high - 0.5
        distances = centres[:, None] - torch.arange(low, dtype=torch.float64)
        weights = torch.sinc(distances) * torch.sinc(distances / lobes) * (distances.abs() < lobes)
        return weights / weights.sum(dim=1, keepdim=True)

    @classmethod
    def enlarge(cls, images: torch.Tensor, size: tuple[int, int], lobes: int = 3) -> torch.Tensor:
        """Images [B, C, h, w] of any range enlarged to [B, C, *size], rows and columns apart."""
        rows, columns = (
            cls.lanczos_matrix(low, high, lobes).to(images) for low, high in zip(images.shape[-2:], size, strict=True)
        )
        return rows @ images @ columns.mT

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        resolutions: Sequence[int | tuple[int, int]] | None = None,
        num_inference_steps: int = 100,
        refine_steps: int = 8,
        refine_strength: float = 0.3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_levels: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LanczosPyramidPipelineOutput | tuple:
        """
        Args:
            batch_size: Number of images.
            resolutions: The levels, low to high, each an int or (height, width); by default those of training.
            num_inference_steps: Network calls at the lowest level.
            refine_steps: Network calls at each higher level.
            refine_strength: Share in (0, 1] of the noise process that a higher level starts from.
            generator: One generator, or one an image: image k then does not depend on the others.
            output_type: "pil", "np" and "pt" in [0, 1], or "latent" in [-1, 1].
            return_levels: Whether to return the images of every level.
            return_dict: Whether to return a `LanczosPyramidPipelineOutput` or a tuple (images, levels).
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": ...}) after each step, counted over
                all levels; may return changed tensors. Setting `pipeline._interrupt = True` ends the run.

        Raises:
            ValueError: for arguments out of range, before any work.
        """
        check_count("batch_size", batch_size)
        self._check_request(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        sizes = self._level_sizes(resolutions)
        steps = self._lay_out(len(sizes), num_inference_steps, refine_steps, refine_strength)

        latents, levels, device = None, [], self._execution_device
        calls = sum(len(level) for level in steps)
        with self._running(calls, callback_on_step_end, callback_on_step_end_tensor_inputs) as run:
            for size, level in run.going(zip(sizes, steps, strict=True)):
                # Noise at the lowest level; above, the enlarged image, renoised.
                noise = randn_tensor((batch_size, self._channels, *size), generator=generator, device=device)
                if latents is None:
                    latents = noise * level.scheduler.init_noise_sigma
                else:
                    latents = level.renoise(self.enlarge(latents, size, self.config.lanczos_lobes), noise)
                # The reverse process.
                grid = pixel_grid(*size).to(device)[None]
                for timestep, network_time in run.going(level.on(device)):
                    sample = level.scheduler.scale_model_input(latents, timestep)
                    prediction = self._predict(sample, network_time, grid)
                    latents = level.step(prediction, timestep, latents, generator)
                    latents = run.after_step(timestep, latents)
                levels.append(self._to_output(latents, size, output_type))
        if not return_dict:
            return (levels[-1], levels if return_levels else None)
        return LanczosPyramidPipelineOutput(images=levels[-1], levels=levels if return_levels else None)

    def _level_sizes(self, resolutions: Sequence[Size] | None) -> list[tuple[int, int]]:
        """The levels as (height, width); raises unless they grow and the network can run at them."""
        sizes = check_growing("resolutions", resolutions or self.unet.config.resolutions or [])
        if any(side % self._size_multiple for size in sizes for side in size):
            raise ValueError(f"resolutions={sizes}: expected multiples of {self._size_multiple}")
        return sizes

    def _lay_out(self, levels: int, calls: int, refine_calls: int, strength: float) -> list[LevelSteps]:
        """The steps of each level, with schedulers of their own."""
        check_count("num_inference_steps", calls)
        check_count("refine_steps", refine_calls)
        check_strength("refine_strength", strength)
        low = lay_out_steps(self.scheduler, calls, 1.0, "scheduler", "num_inference_steps")
        arguments = (self.scheduler, refine_calls, strength, "scheduler", "refine_steps")
        return [low, *(lay_out_steps(*arguments) for _ in range(levels - 1))]
