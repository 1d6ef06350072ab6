"""PSNR and SSIM against scikit-image and published numbers; consistency against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pyrdiff.metrics import consistency, luma, psnr, ssim

UNIT = (0, 1)


def noisy_pair(shape: tuple, data_range: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    low, high = data_range
    smooth = F.avg_pool2d(torch.rand(shape, generator=generator, dtype=torch.float64), 3, 1, 1)
    noisy = (smooth + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1)
    return low + (high - low) * smooth, low + (high - low) * noisy


@pytest.mark.parametrize("shape", [(2, 3, 33, 41), (2, 1, 11, 11), (1, 3, 64, 48)])
@pytest.mark.parametrize("data_range", [(0, 1), (-1, 1), (0, 255)])
def test_scikit_image_agrees(shape, data_range):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = noisy_pair(shape, data_range)
    low, span = data_range[0], data_range[1] - data_range[0]
    ours = psnr(a, b, data_range=data_range).per_image, ssim(a, b, data_range=data_range).per_image
    for index in range(len(a)):
        x, y = (((image[index] - low) / span).numpy() for image in (a, b))  # in [0, 1]; SSIM sees a shift
        expected = metrics.peak_signal_noise_ratio(y, x, data_range=1)
        assert ours[0][index].item() == pytest.approx(expected, abs=1e-5)
        settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        expected = metrics.structural_similarity(x, y, channel_axis=0, data_range=1, **settings)
        assert ours[1][index].item() == pytest.approx(expected, abs=1e-5)


def test_psnr_of_a_known_error():
    a = torch.full((1, 3, 8, 8), 0.5)
    assert psnr(a, a + 0.1, data_range=UNIT).value == pytest.approx(20, abs=1e-5)
    assert psnr(a, a + 0.1, data_range=(-1, 1)).value == pytest.approx(20 + 20 * math.log10(2), abs=1e-5)


def test_luma_is_the_studio_range():
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]]).reshape(5, 3, 1, 1)
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966])
    assert torch.allclose(255 * luma(colours).flatten(), expected, atol=1e-4)
    black, white = colours[:1].expand(-1, -1, 4, 4), colours[1:2].expand(-1, -1, 4, 4)
    full = psnr(black, white, data_range=UNIT, channels="y")
    assert full.value == pytest.approx(20 * math.log10(255 / 219), abs=1e-6)


def test_the_border_is_left_out():
    a, b = noisy_pair((1, 3, 20, 24), UNIT)
    spoilt = b.clone()
    spoilt[..., :2, :], spoilt[..., -2:, :], spoilt[..., :2], spoilt[..., -2:] = 1, 1, 1, 1
    for metric in (psnr, ssim):
        cropped = metric(a, spoilt, data_range=UNIT, crop_border=2)
        assert cropped.value == metric(a[..., 2:-2, 2:-2], b[..., 2:-2, 2:-2], data_range=UNIT).value
        assert cropped.conventions["crop_border"] == 2


def read(path) -> Image.Image:
    return Image.open(path).convert("RGB")


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("scale, expected", [(2, 33.67), (4, 28.43)])
def test_set5_bicubic(shared, scale, expected):
    values = []
    for path in sorted((shared / f"data/Set5/x{scale}/LR").glob("*.png")):
        low, high = read(path), tensor(read(shared / "data/Set5/x4/HR" / path.name))
        up = tensor(low.resize((low.width * scale, low.height * scale), Image.Resampling.BICUBIC))
        high = high[..., : up.shape[-2], : up.shape[-1]]
        values.append(psnr(up, high, data_range=UNIT, channels="y", crop_border=scale).value)
    assert len(values) == 5
    assert np.mean(values) == pytest.approx(expected, abs=0.02)


def test_consistency_counts_in_1e_5():
    low = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 0.9
    exact = low.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def pool(x):
        return F.avg_pool2d(x, 2)

    assert consistency(exact, low, data_range=UNIT, down=pool).value == pytest.approx(0, abs=1e-6)
    off = consistency(exact + 0.01, low, data_range=UNIT, down=pool)
    assert off.value == pytest.approx(10, rel=1e-3)  # 0.01² = 10 · 1e-5
    assert off.conventions["down"] == "pool" and "1e-05" in off.conventions["scale"]
    assert consistency(2 * exact - 0.98, 2 * low - 1, data_range=(-1, 1), down=pool).value == pytest.approx(
        10, rel=1e-3
    )


def test_consistency_by_default_is_antialiased_bicubic():
    high = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    low = F.interpolate(high.double(), (8, 10), mode="bicubic", antialias=True)
    assert 0 < low.min() and low.max() < 1
    assert consistency(high, low, data_range=UNIT).value == pytest.approx(0, abs=1e-9)
    aliased = F.interpolate(high.double(), (8, 10), mode="bicubic").clamp(0, 1)
    assert consistency(high, aliased, data_range=UNIT).value > 100


def test_bad_settings():
    a = torch.rand(1, 3, 16, 16)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="^channels='Y': expected 'rgb' or 'y'"):
            metric(a, a, data_range=UNIT, channels="Y")
        with pytest.raises(ValueError, match="^channels='y' for images of 1 channel"):
            metric(a[:, :1], a[:, :1], data_range=UNIT, channels="y")
        with pytest.raises(ValueError, match="^crop_border=8 .*expected 0"):
            metric(a, a, data_range=UNIT, crop_border=8)
    with pytest.raises(ValueError, match="^crop_border=.*expected images of 11 pixels a side"):
        ssim(a[..., :10], a[..., :10], data_range=UNIT)
    with pytest.raises(ValueError, match=r"^output=\[1, 3, 16, 16\], low_res=\[1, 3, 32, 16\]"):
        consistency(a, a.repeat(1, 1, 2, 1), data_range=UNIT)
    with pytest.raises(ValueError, match=r"^down=.*which gives \[1, 3, 16, 16\]: expected one that gives"):
        consistency(a, a[..., ::2, ::2], data_range=UNIT, down=torch.nn.Identity())


def test_a_range_may_be_one_number_as_torchmetrics_takes_it():
    a, b = noisy_pair((2, 3, 16, 16), (0, 255))
    for metric in (psnr, ssim):
        assert metric(a, b, data_range=255.0).value == metric(a, b, data_range=(0, 255)).value
        assert metric(a, b, data_range=np.float32(255)).conventions["data_range"] == [0.0, 255.0]
    for wrong in (0.0, -1, float("nan"), "one", (1.0,), None):
        with pytest.raises(ValueError, match="data_range=.*expected a pair .*or a number"):
            psnr(a, b, data_range=wrong)


@pytest.mark.parametrize("images", [np.zeros((1, 3, 8, 8)), [0.0], None], ids=["numpy", "list", "None"])
def test_what_is_no_tensor_is_refused(images):
    with pytest.raises(ValueError, match=f"prediction={type(images).__name__}: expected a float tensor"):
        psnr(images, torch.zeros(1, 3, 8, 8), data_range=UNIT)
