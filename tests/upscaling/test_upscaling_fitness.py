"""What is said against a model for the pictures at hand, and that nothing is said where nothing speaks against it."""

from types import SimpleNamespace

import pytest
from PIL import Image

from pyrdiff.data import Picture
from pyrdiff.upscaling.fitness import doubts_of_colors, doubts_of_size, said_of_images

GRAY = {"mean": [0.0, 0.0, 0.0], "covariance": [[0.01, 0, 0], [0, 0.01, 0], [0, 0, 0.01]]}


@pytest.mark.parametrize("colors, color, said", [
    (GRAY, (128, 128, 128), None),
    (GRAY, (160, 120, 110), None),  # 2.9
    (GRAY, (255, 128, 128), "its colours are 10 standard deviations"),
    (None, (255, 0, 0), None),
    ({"mean": [0.0], "covariance": [[0.01]]}, (255, 0, 0), None),  # of another number of channels
])  # fmt: skip
def test_colours(colors, color, said):
    enlarger = SimpleNamespace(saved=SimpleNamespace(config={"colors": colors}))
    found = doubts_of_colors(enlarger, Picture(Image.new("RGB", (8, 6), color)))
    assert found is None if said is None else found.startswith(said)


@pytest.mark.parametrize("card, said", [
    ("# A\n\nImages: Noto Emoji by Google: the 112 faces, laid on white.\n", "Noto Emoji by Google"),
    ("Images: Kodak's 24 photographs.\n", "Kodak's 24 photographs"),
    ("Images: not described; nor is their licence.\n", None),
    ("no such line", None),
    (None, None),
])  # fmt: skip
def test_cards(tmp_path, card, said):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert said_of_images(tmp_path) == said


@pytest.mark.parametrize("config, target, said", [
    ({"resolutions": [16, [32, 64]]}, (1024, 768), "draws images of 64x64 (faces)"),
    ({"sample_size": 64}, (129, 8), "draws images of 64x64 (faces)"),
    ({"sample_size": 64}, (128, 128), None),
    ({}, (128, 128), None),
])  # fmt: skip
def test_sizes(config, target, said):
    class Network:
        def modules(self):
            return [self]

    network = Network()
    network.config = config
    enlarger = SimpleNamespace(pipeline=SimpleNamespace(unet=network), saved=object())
    found = doubts_of_size(enlarger, target, "faces")
    assert found is None if said is None else said in found
    enlarger.saved = enlarger.pipeline  # it was trained to enlarge
    assert doubts_of_size(enlarger, target, "faces") is None
