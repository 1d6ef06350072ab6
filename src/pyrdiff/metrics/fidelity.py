"""How near an image is to the one it should be: PSNR, SSIM, and the consistency of super-resolution."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .result import DataRange, MetricResult, check_images, check_pair, check_range, mean_of, to_unit

Channels = Literal["rgb", "y"]
SSIM_SIGMA, SSIM_WINDOW, SSIM_K1, SSIM_K2 = 1.5, 11, 0.01, 0.03  # Wang et al. 2004, section III-B
BT601 = (65.481, 128.553, 24.966)  # of R, G, B in [0, 1]; with the offset of 16, Y is in 16..235 of 255
CONSISTENCY_UNIT = 1e-5


def psnr(
    prediction: Tensor, target: Tensor, *, data_range: DataRange, channels: Channels = "rgb", crop_border: int = 0
) -> MetricResult:
    """Peak signal-to-noise ratio in dB, -10 log10 of the mean square error in units of the range; the mean over images.

    Equals scikit-image's `peak_signal_noise_ratio` for each image. Equal images have inf.

    Args:
        prediction: float [B, C, H, W], C 1 or 3, values in `data_range`.
        target: The same.
        data_range: (low, high), what black and white are; a number is (0, number).
        channels: "rgb" takes all channels as they are; "y" takes BT.601 luma in the studio range 16..235 of 255, not
            rounded, with 255 as the peak: MATLAB's `rgb2ycbcr`, as in the super-resolution literature.
        crop_border: So many pixels are left out at each side; there, the scale factor is usual.

    Raises:
        ValueError: for wrong shapes, values or settings.

    Example:
        >>> gray = torch.full((2, 1, 8, 8), 0.5)
        >>> result = psnr(gray + 0.1, gray, data_range=(0, 1))
        >>> round(result.value, 2), len(result.per_image), result.conventions["units"]
        (20.0, 2, 'dB')
    """
    prediction, target, conventions = _prepare(prediction, target, data_range, channels, crop_border, smallest=1)
    error = (prediction - target).square().mean((1, 2, 3))
    return mean_of("psnr", -10 * error.log10(), {**conventions, "units": "dB", "peak": "the whole range"})


def ssim(
    prediction: Tensor, target: Tensor, *, data_range: DataRange, channels: Channels = "rgb", crop_border: int = 0
) -> MetricResult:
    """Structural similarity (Wang et al. 2004) with an 11×11 Gaussian window, sigma 1.5; the mean over images.

    1 for equal images. Averaged over the windows that lie inside the image, and over channels. SSIM is not the same for
    shifted values, so images are brought to [0, 1] first, and their range does not change the number. There it equals
    scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.

    Args and raises: as `psnr`; what is left after `crop_border` is at least 11×11.
    """
    prediction, target, conventions = _prepare(
        prediction, target, data_range, channels, crop_border, smallest=SSIM_WINDOW
    )
    window = {"window": SSIM_WINDOW, "sigma": SSIM_SIGMA, "k1": SSIM_K1, "k2": SSIM_K2}
    window |= {"border": "windows inside the image", "computed_in": [0, 1]}
    return mean_of("ssim", _similarity(prediction, target).mean((1, 2, 3)), conventions | window)


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (eq. 13) of every window [B, C, h, w] inside images [B, C, H, W] in [0, 1]."""
    place = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    taps = torch.softmax(-0.5 * (place / SSIM_SIGMA).square(), 0)

    def local_mean(values: Tensor) -> Tensor:
        rows = F.conv2d(values.flatten(0, 1)[:, None], taps.reshape(1, 1, -1, 1))
        return F.conv2d(rows, taps.reshape(1, 1, 1, -1)).unflatten(0, values.shape[:2]).squeeze(2)

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = (local_mean(x * x) - mean_x.square()).clamp(min=0)
    variance_y = (local_mean(y * y) - mean_y.square()).clamp(min=0)
    covariance = local_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_K1**2) / (mean_x.square() + mean_y.square() + SSIM_K1**2)
    return luminance * (2 * covariance + SSIM_K2**2) / (variance_x + variance_y + SSIM_K2**2)


def consistency(
    output: Tensor,
    low_res: Tensor,
    *,
    data_range: DataRange,
    down: Callable[[Tensor], Tensor] | None = None,
) -> MetricResult:
    """How well a super-resolved image keeps to its input: SR3's measure (Saharia et al. 2021, table 2).

    The mean square error between `low_res` and the down-sampled output, both in [0, 1], in units of 1e-5; the mean over
    images. 0 is perfect.

    Args:
        output: float [B, C, H, W], C 1 or 3, values in `data_range`.
        low_res: float [B, C, h, w], values in `data_range`.
        data_range: (low, high) of both.
        down: [B, C, H, W] to [B, C, h, w], in `data_range`; by default antialiased bicubic, `F.interpolate`. Use the
            degradation that made the input.

    Raises:
        ValueError: for wrong shapes or values, or a `down` that gives another shape than that of `low_res`.
    """
    check_images("output", output, data_range)
    check_images("low_res", low_res, data_range)
    if output.shape[:2] != low_res.shape[:2] or any(a < b for a, b in zip(output.shape, low_res.shape, strict=True)):
        raise ValueError(
            f"output={list(output.shape)}, low_res={list(low_res.shape)}: expected [B, C, H, W] and "
            "[B, C, h, w] with h <= H and w <= W"
        )
    if down is None:
        named = "bicubic, antialiased, not rounded"
        shrunk = F.interpolate(output.double(), low_res.shape[-2:], mode="bicubic", antialias=True)
    else:
        named = getattr(down, "__name__", type(down).__name__)
        shrunk = down(output)
        if shrunk.shape != low_res.shape:
            raise ValueError(
                f"down={named}, which gives {list(shrunk.shape)}: expected one that gives {list(low_res.shape)}"
            )
    error = (to_unit(shrunk, data_range) - to_unit(low_res, data_range)).square().mean((1, 2, 3)) / CONSISTENCY_UNIT
    scale = f"mean square error in [0, 1], in units of {CONSISTENCY_UNIT:g}"
    kind = "gray" if output.shape[1] == 1 else "rgb"
    conventions = {"channels": kind, "data_range": list(check_range(data_range)), "down": named, "scale": scale}
    return mean_of("consistency", error, conventions)


def luma(images: Tensor) -> Tensor:
    """BT.601 luma [B, 1, H, W] in [16/255, 235/255], not rounded, of RGB [B, 3, H, W] in [0, 1]."""
    weights = torch.tensor(BT601, dtype=images.dtype, device=images.device).reshape(1, 3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 16) / 255


def _prepare(
    prediction: Tensor, target: Tensor, data_range: DataRange, channels: str, crop: int, smallest: int
) -> tuple[Tensor, Tensor, dict]:
    """Both as float64 [B, C, h, w] in [0, 1], cropped, with the channels to compare; and the conventions."""
    check_pair(prediction, target, data_range)
    if channels not in ("rgb", "y"):
        raise ValueError(f"channels={channels!r}: expected 'rgb' or 'y'")
    if channels == "y" and prediction.shape[1] != 3:
        raise ValueError(f"channels='y' for images of {prediction.shape[1]} channel: expected 'rgb' there")
    room = (min(prediction.shape[-2:]) - smallest) // 2
    if not isinstance(crop, int) or not 0 <= crop <= room:
        expected = f"0..{room}" if room >= 0 else f"images of {smallest} pixels a side or more"
        raise ValueError(f"crop_border={crop!r} for images {list(prediction.shape[-2:])}: expected {expected}")
    kind = "gray" if prediction.shape[1] == 1 else channels
    pair = []
    for images in (prediction, target):
        images = to_unit(images, data_range)
        images = images[..., crop : images.shape[-2] - crop, crop : images.shape[-1] - crop]
        pair.append(luma(images) if kind == "y" else images)
    conventions = {"channels": kind, "crop_border": crop, "data_range": list(check_range(data_range))}
    if kind == "y":
        conventions["luma"] = "BT.601 studio range 16..235, not rounded, peak 255"
    return *pair, conventions
