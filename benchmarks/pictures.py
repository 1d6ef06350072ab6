"""Pictures of samples, to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def write(pixels: np.ndarray, path: str | Path) -> None:
    """uint8 [H, W, C], C 1 or 3, as a PNG; spaces in the name become underscores."""
    path = Path(str(path).replace(" ", "_"))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


def write_grid(images: np.ndarray, path: str | Path, columns: int) -> None:
    """uint8 [N, H, W, C], so many a row; an incomplete row is left out."""
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = count // columns
    grid = images[: rows * columns].reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    write(grid.reshape(rows * height, columns * width, channels), path)


def write_rows(rows: Sequence[torch.Tensor], path: str | Path) -> None:
    """A row each for tensors [N, C, H, W] in [0, 1], such as inputs, outputs and truth, at the size of the last."""
    side = rows[-1].shape[-1]
    rows = [F.interpolate(row, (side, side), mode="nearest") for row in rows]
    grid = torch.cat([row.permute(1, 2, 0, 3).flatten(2) for row in rows], 1)
    write((grid * 255).round().byte().permute(1, 2, 0).numpy(), path)
