"""The photo models that come with the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pyrdiff
from pyrdiff.metrics import psnr

FACTORS = {"photos-x2": 2, "photos-x4": 4}


@pytest.fixture
def shared() -> Path:
    folder = Path(__file__).parents[3] / "shared"
    if not (folder / "data" / "Set5").is_dir():
        pytest.skip(f"needs {folder}")
    return folder


def quiet(name: str):
    pipeline = pyrdiff.load(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", FACTORS)
def test_a_photograph_is_nearer_to_the_truth_than_bicubic_makes_it(name, shared):
    factor = FACTORS[name]
    files = [shared / "data" / "Set5" / place / "img_003.png" for place in ("x4/HR", f"x{factor}/LR")]
    pixels = [np.array(Image.open(file).convert("RGB")) for file in files]
    high, low = (torch.from_numpy(each).permute(2, 0, 1)[None] / 255 for each in pixels)
    pipeline = quiet(name)
    known = dict(data_range=(0, 1), channels="y", crop_border=factor)

    def score(image: torch.Tensor) -> float:
        return psnr(image.clamp(0, 1), high, **known).value

    bicubic = score(pipeline.upsample(low, tuple(high.shape[-2:])))
    smooth, sharp = (pipeline(low, detail=detail, output_type="pt").images for detail in (0.0, 1.0))
    assert score(smooth) > bicubic + 0.5 and score(smooth) > score(sharp) > bicubic
    restored = pipeline(low, restore=1.0, output_type="pt").images
    assert score(restored) < score(sharp), "there is no damage to undo"


@pytest.mark.parametrize("name", FACTORS)
def test_what_it_enlarges_by_and_what_it_is_trained_on_are_said(name):
    pipeline, factor = quiet(name), FACTORS[name]
    assert list(pipeline.unet.config.scale_factors) == [factor]
    image = torch.rand(1, 3, 5, 9, generator=torch.Generator().manual_seed(0))
    assert pipeline(image, output_type="pt").images.shape == (1, 3, 5 * factor, 9 * factor)
    with pytest.raises(ValueError, match=f"scale_factor=3: expected one of \\[{factor}\\]"):
        pipeline(image, scale_factor=3)
