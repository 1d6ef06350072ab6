"""The photo model that comes with the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pyrdiff
from pyrdiff.metrics import psnr


@pytest.fixture(scope="module")
def pipeline():
    pipeline = pyrdiff.load("photos-x4")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_photograph_is_nearer_to_the_truth_than_bicubic_makes_it(pipeline):
    folder = Path(__file__).parents[3] / "shared" / "data" / "Set5" / "x4"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    pixels = [np.array(Image.open(folder / kind / "img_003.png").convert("RGB")) for kind in ("HR", "LR")]
    high, low = (torch.from_numpy(each).permute(2, 0, 1)[None] / 255 for each in pixels)

    def score(image: torch.Tensor) -> float:
        return psnr(image.clamp(0, 1), high, data_range=(0, 1), channels="y", crop_border=4).value

    bicubic = score(pipeline.upsample(low, tuple(high.shape[-2:])))
    smooth, sharp = (pipeline(low, detail=detail, output_type="pt").images for detail in (0.0, 1.0))
    assert score(smooth) > score(sharp) > bicubic + 0.5
    restored = pipeline(low, restore=1.0, output_type="pt").images
    assert score(restored) < score(sharp), "there is no damage to undo"


def test_it_is_of_a_size_and_enlarges_by_what_it_is_trained_for(pipeline):
    folder = Path(pyrdiff.__file__).parent / "pretrained" / "photos-x4"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 12e6
    image = torch.rand(1, 3, 5, 9, generator=torch.Generator().manual_seed(0))
    assert pipeline(image, output_type="pt").images.shape == (1, 3, 20, 36)
    with pytest.raises(ValueError, match=r"scale_factor=3: expected one of \[4\]"):
        pipeline(image, scale_factor=3)
