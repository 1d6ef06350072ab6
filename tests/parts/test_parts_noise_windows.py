"""Levels that start from more noise than their network was trained for are refused."""

import pytest

from pyrdiff.parts.noise_windows import check_noise

TRAINED = {"noise_window": 0.35, "resolutions": [16, 32, 64]}


@pytest.mark.parametrize(
    ("config", "starts", "box"),
    [
        (TRAINED, [((16, 16), 999), ((32, 32), 350), ((64, 64), 0)], (0, 0, 1, 1)),
        (TRAINED, [((16, 24), 999), ((20, 20), 999)], (0, 0, 1, 1)),  # nearer to 16x16 than to 32x32
        (TRAINED, [((8, 8), 999), ((16, 16), 350)], (0, 0.5, 0.5, 1)),  # a quarter of the image
        ({"resolutions": [16, 32, 64]}, [((64, 64), 999)], (0, 0, 1, 1)),  # of a network from before there were windows
        ({**TRAINED, "noise_window": 1.0}, [((64, 64), 999)], (0, 0, 1, 1)),
        ({"noise_window": 0.35, "resolutions": [16]}, [((64, 64), 999)], (0, 0, 1, 1)),
        ({"noise_window": 0.35, "resolutions": None}, [((64, 64), 999)], (0, 0, 1, 1)),
    ],
)
def test_within_the_window(config, starts, box):
    check_noise(config, 1000, starts, box)


@pytest.mark.parametrize(
    ("config", "starts", "box", "named"),
    [
        (
            TRAINED,
            [((64, 64), 999)],
            (0, 0, 1, 1),
            "noise_window=0.35: the level 64x64 would start from time 999 of 1000",
        ),
        (
            TRAINED,
            [((16, 16), 999), ((32, 32), 351)],
            (0, 0, 1, 1),
            "32x32 .* time 351 .* at most 350, .* at 16x16 only",
        ),
        (TRAINED, [((128, 128), 400)], (0, 0, 1, 1), "128x128"),
        (TRAINED, [((24, 24), 400)], (0, 0, 1, 1), "24x24"),
        (TRAINED, [((16, 16), 999)], (0, 0, 0.5, 0.5), "16x16"),  # the whole image would be 32x32
        ({**TRAINED, "resolutions": [[16, 24], [32, 48]]}, [((32, 48), 400)], (0, 0, 1, 1), "at 16x24 only"),
    ],
)
def test_beyond_the_window(config, starts, box, named):
    with pytest.raises(ValueError, match=named):
        check_noise(config, 1000, starts, box)
