"""
A scheduler of your own in a pyramid, beside a stock one, from the same noise:

    python examples/own_scheduler.py noto-emoji schedulers.png

Any class with diffusers' `add_noise`, `set_timesteps`, `step` and `alphas_cumprod` serves.
"""

import sys

import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from diffusers.utils import make_image_grid

import pyrdiff


class RestlessDDIMScheduler(DDIMScheduler):
    """DDIM whose steps are half way between deterministic and ancestral."""

    def step(self, model_output, timestep, sample, generator=None, **arguments):
        return super().step(model_output, timestep, sample, eta=0.5, generator=generator, **arguments)


model, output = sys.argv[1:3]
saved = pyrdiff.load(model)
images = []
for kind in (UniPCMultistepScheduler, RestlessDDIMScheduler):
    pipeline = pyrdiff.PyramidalPipeline(saved.unet, kind.from_config(saved.scheduler.config))
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    images += pipeline(8, num_inference_steps=20, refine_steps=4, generator=generators).images
make_image_grid(images, 2, 8).save(output)
