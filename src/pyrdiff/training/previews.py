"""Pictures of a training's progress: rows of images on white."""

from pathlib import Path

import torch
from PIL import Image

from pyrdiff.parts.files import replacing


def image_grid(rows: list[list[Image.Image]], cell: int | None = None, gap: int = 2) -> Image.Image:
    """
    Rows of images on white, each scaled (nearest) to fit `cell` pixels; by default the largest image's longer side.
    """
    cell = cell or max(max(image.size) for row in rows for image in row)
    mode = rows[0][0].mode
    columns = max(len(row) for row in rows)
    canvas = Image.new(mode, (columns * (cell + gap) + gap, len(rows) * (cell + gap) + gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            scale = cell / max(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.NEAREST)
            canvas.paste(image, (gap + x * (cell + gap), gap + y * (cell + gap)))
    return canvas


def save_grid(rows: list[list[Image.Image]], path: Path) -> None:
    """Writes `image_grid(rows)`, whole or not at all."""
    with replacing(path) as beside:
        image_grid(rows).save(beside, "PNG")


def save_samples(settings, pipeline, images, path: Path, **arguments) -> dict[str, float]:
    """
    `Method.preview` of what generates: samples with a fixed seed, a row for each level if there are several. Further
    arguments are those of the call.
    """
    pipeline.set_progress_bar_config(disable=True)
    count = settings.eval_batch_size
    generators = [torch.Generator().manual_seed(settings.seed + index) for index in range(count)]
    output = pipeline(batch_size=count, generator=generators, return_levels=True, **arguments)
    pipeline.set_progress_bar_config(disable=False)
    save_grid(output.levels, path)
    return {}
