"""The embedded letters."""

import sys

import numpy as np
import pytest

from pyrdiff.data import ImageLevels, draw_glyphs, open_source


def edges(image: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row and column that are half lit or more."""
    rows, columns = np.flatnonzero((image > 127).any(1)), np.flatnonzero((image > 127).any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


def test_same_seed_same_images():
    images = draw_glyphs(16, 64, seed=5)
    assert images.shape == (64, 16, 16) and images.dtype == np.uint8
    assert np.array_equal(images, draw_glyphs(16, 64, seed=5))
    assert not np.array_equal(images, draw_glyphs(16, 64, seed=6))


def test_images_differ():
    images = draw_glyphs(32, 500)
    assert len(np.unique(images.reshape(500, -1), axis=0)) > 490
    same_letter = draw_glyphs(32, 100, letters="R")
    assert len(np.unique(same_letter.reshape(100, -1), axis=0)) > 90


def test_letters_fill_the_frame_and_are_centred():
    for image in draw_glyphs(64, 200):
        top, bottom, left, right = edges(image)
        assert 0.66 * 64 <= max(bottom - top, right - left) + 1 <= 0.82 * 64
        assert abs((top + bottom + 1) / 2 - 32) <= 4 and abs((left + right + 1) / 2 - 32) <= 4


def test_white_on_black_and_antialiased():
    images = draw_glyphs(32, 100)
    assert images.max() == 255 and (images[:, 0] == 0).all() and (images[:, :, -1] == 0).all()
    between = ((images > 0) & (images < 255)).mean()
    assert 0.02 < between < 0.4


def test_letters_look_like_themselves():
    # An I is narrow, an L has its weight at the bottom left, an O is dark in the middle.
    for image in draw_glyphs(32, 20, letters="O"):
        assert image[14:18, 14:18].mean() < 30 < image.mean()
    mean = draw_glyphs(32, 50, letters="L").mean(0)
    assert mean[16:].sum() > 1.2 * mean[:16].sum() and mean[:, :16].sum() > 1.2 * mean[:, 16:].sum()
    width = [edges(image)[3] - edges(image)[2] for image in draw_glyphs(32, 20, letters="I")]
    assert max(width) < 22 and min(width) < 8


@pytest.mark.parametrize("options", [{"size": 3}, {"count": 0}, {"letters": ""}, {"letters": "A B"}])
def test_arguments_are_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}="):
        draw_glyphs(**options)


def test_glyphs_are_a_source():
    source = open_source("glyphs")
    assert len(source) == 4096 and source.read(0).size == (64, 64)
    levels = ImageLevels.build("glyphs", [8, 16], channels=1, num_threads=2)
    assert len(levels) == 4096 and levels.enlarged == 0 and levels.composited == 0


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_glyphs(8, 1)
