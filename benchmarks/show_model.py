"""
Pictures of a pyramid, for its card and the README: samples, how they come about, and the training images next to them.

    python benchmarks/show_model.py MODEL IMAGES --plan balanced

Writes into the model's folder samples.png (seeds 0 to 15, unpicked), levels.webp (the first eight from noise to image,
each level at the size of the last), and neighbours.png: below each sample the training image that is nearest by the
squared difference of pixels, mirrored or not.
"""

import argparse
from itertools import accumulate
from pathlib import Path

import numpy as np
import pictures
import torch
import torch.nn.functional as F
from PIL import Image

import pyrdiff
from pyrdiff.data import image_tensor, open_source, read_image

COUNT, COLUMNS, ENLARGED = 16, 8, 2
STEP_MS, LEVEL_MS, LAST_MS = 120, 500, 2500


def grid(images: torch.Tensor, side: int) -> np.ndarray:
    """uint8 [H, W, C] of images [B, C, h, w] in [-1, 1], each shown at `side` pixels."""
    shown = F.interpolate(images.clamp(-1, 1), (side, side), mode="nearest")
    pixels = ((shown + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = pixels.reshape(-1, COLUMNS, side, side, pixels.shape[-1]).transpose(0, 2, 1, 3, 4)
    return rows.reshape(rows.shape[0] * side, COLUMNS * side, pixels.shape[-1])


def draw(pipeline, plan: str) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """The samples, the state after every second step and the last of each level, and how long to show each."""
    calls = [len(level.timesteps) for level in pipeline.plan(plan=plan).levels]
    lasts, states, durations = {count - 1 for count in accumulate(calls)}, [], []

    def keep(pipe, step, timestep, tensors):
        if step in lasts or step % 2 == 0:
            states.append(tensors["latents"].clone())
            durations.append(LEVEL_MS if step in lasts else STEP_MS)

    generators = [torch.Generator().manual_seed(seed) for seed in range(COUNT)]
    output = pipeline(COUNT, plan=plan, generator=generators, output_type="latent", callback_on_step_end=keep)
    return output.images, states, [*durations[:-1], LAST_MS]


def nearest(samples: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """For each sample [B, C, H, W] the image of [N, C, H, W] that is nearest, mirrored where that is nearer."""
    both = torch.cat([images, images.flip(-1)]).flatten(1)
    closest = torch.cdist(samples.flatten(1), both).argmin(1)
    return both[closest].view_as(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images")
    parser.add_argument("--plan", default="balanced")
    options = parser.parse_args()
    pipeline = pyrdiff.load(options.model)
    samples, states, durations = draw(pipeline, options.plan)
    side = samples.shape[-1]
    pictures.write(grid(samples, side), options.model / "samples.png")
    frames = [Image.fromarray(grid(state[:COLUMNS], ENLARGED * side)) for state in states]
    frames[0].save(
        options.model / "levels.webp", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=40
    )
    source = open_source(options.images)
    fitted = [read_image(source, index, samples.shape[1], (side, side)) for index in range(len(source))]
    images = 2 * image_tensor(fitted, samples.shape[1]) - 1
    pairs = torch.stack([samples, nearest(samples, images)], 1)  # a row of samples, a row of neighbours
    ordered = pairs.view(-1, COLUMNS, 2, *samples.shape[1:]).transpose(1, 2).reshape(-1, *samples.shape[1:])
    pictures.write(grid(ordered, side), options.model / "neighbours.png")


if __name__ == "__main__":
    main()
