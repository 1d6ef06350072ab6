"""The pictures of a model that its card and the README show."""

import show_model
import torch
from PIL import Image


def test_nearest_takes_the_image_or_its_mirror():
    images = torch.rand(5, 3, 4, 4) * 2 - 1
    samples = torch.stack([images[3] + 0.01, images[1].flip(-1) - 0.01])
    assert torch.equal(show_model.nearest(samples, images), torch.stack([images[3], images[1].flip(-1)]))


def test_the_grid_has_rows_of_eight():
    images = torch.arange(16).view(16, 1, 1, 1).expand(-1, 3, 2, 2) / 7.5 - 1
    pixels = show_model.grid(images, 4)
    assert pixels.shape == (8, 32, 3)
    assert pixels[0, ::4, 0].tolist() == [17 * k for k in range(8)]
    assert pixels[4, ::4, 0].tolist() == [17 * (8 + k) for k in range(8)]
    assert Image.fromarray(pixels).size == (32, 8)
