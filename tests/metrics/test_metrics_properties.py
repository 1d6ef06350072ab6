"""What holds for every metric."""

import json
import math

import pytest
import torch

from pyrdiff import metrics

UNIT = (0, 1)
IMAGE_METRICS = {
    "psnr": (metrics.psnr, math.inf),
    "psnr_y": (lambda a, b, **k: metrics.psnr(a, b, channels="y", crop_border=2, **k), math.inf),
    "ssim": (metrics.ssim, 1.0),
    "ssim_y": (lambda a, b, **k: metrics.ssim(a, b, channels="y", **k), 1.0),
    "consistency": (lambda a, b, **k: metrics.consistency(a, b, down=lambda x: x, **k), 0.0),
    "lpips": (metrics.lpips, 0.0),
    "lpips_squeeze": (metrics.lpips, 0.0),
}
SET_METRICS = {
    "frechet_distance": lambda a, b, **k: metrics.frechet_distance(a, b, **k),
    "kid": lambda a, b, **k: metrics.kid(a, b, **k),
    "precision": lambda a, b, **k: metrics.precision_recall(a, b, **k)[0],
    "recall": lambda a, b, **k: metrics.precision_recall(a, b, **k)[1],
}


def images(count: int, channels: int = 3, side: int = 35, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=IMAGE_METRICS)
def image_metric(request, alexnet_file, squeezenet_file, lpips_heads):
    function, perfect = IMAGE_METRICS[request.param]
    settings = {}
    if request.param.startswith("lpips"):
        squeeze = request.param == "lpips_squeeze"
        settings = {
            "network": "squeeze" if squeeze else "alex",
            "weights": squeezenet_file if squeeze else alexnet_file,
        }
    return lambda a, b, data_range=UNIT, **more: function(a, b, data_range=data_range, **settings, **more), perfect


def test_equal_images_are_perfect_and_others_are_not(image_metric):
    measure, perfect = image_metric
    result = measure(images(2), images(2))
    assert result.value == pytest.approx(perfect, abs=1e-9)
    worse = [measure(images(2), images(2).lerp(images(2, seed=1), part)).value for part in (0.1, 0.3)]
    sign = -1 if perfect == 0 else 1
    assert sign * perfect > sign * worse[0] > sign * worse[1]


def test_an_image_has_its_value_whatever_the_batch(image_metric):
    measure, _ = image_metric
    a, b = images(3), images(3, seed=1)
    whole = measure(a, b)
    assert whole.per_image.shape == (3,) and whole.per_image.dtype == torch.float64
    assert whole.value == pytest.approx(whole.per_image.mean().item())
    for index in range(3):
        alone = measure(a[index : index + 1], b[index : index + 1])
        assert alone.value == pytest.approx(whole.per_image[index].item(), rel=1e-5)


def test_the_range_is_only_a_unit(image_metric):
    measure, _ = image_metric
    a, b = images(2), images(2, seed=1)
    assert measure(2 * a - 1, 2 * b - 1, (-1, 1)).value == pytest.approx(measure(a, b).value, rel=1e-5)


def test_results_say_how(image_metric):
    measure, _ = image_metric
    result = measure(2 * images(2) - 1, 2 * images(2, seed=1) - 1, (-1, 1))
    assert result.conventions["count"] == 2 and result.conventions["data_range"] == [-1, 1]
    assert result.conventions["channels"] in ("rgb", "y")
    json.dumps(result.conventions, allow_nan=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(data_range=(1, 0)), r"^data_range=\(1, 0\): expected a pair"),
        (dict(data_range=0), "^data_range=0: expected a pair"),
        (dict(a=images(2) + 0.1), r"(prediction|output) has values in .*expected data_range=\(0, 1\)"),
        (dict(a=images(2) - 0.1), "(prediction|output) has values"),
        (dict(a=images(2) * math.nan), "(prediction|output) has values"),
        (dict(b=255 * images(2)), "(target|low_res) has values"),
        (dict(a=images(2).mul(255).byte()), "(prediction|output)=torch.uint8"),
        (dict(a=images(2)[0]), r"(prediction|output)=torch.float32 \[3, 35, 35\]"),
        (dict(a=images(2, 2)), r"(prediction|output)=.* C 1 or 3"),
        (dict(a=images(0)), r"(prediction|output)=.*non-empty"),
        (dict(b=images(3)), r"=\[2, 3, 35, 35\], \w+=\[3, 3, 35, 35\]"),
        (dict(a=images(2).numpy()), "(prediction|output)=ndarray"),
    ],
)
def test_bad_images(image_metric, change, message):
    measure, _ = image_metric
    given = dict(a=images(2), b=images(2, seed=1), data_range=UNIT) | change
    with pytest.raises(ValueError, match=message):
        measure(given["a"], given["b"], given["data_range"])


def test_the_range_must_be_stated():
    for function in (metrics.psnr, metrics.ssim, metrics.consistency, metrics.lpips):
        with pytest.raises(TypeError, match="data_range"):
            function(images(1), images(1))


def features(count: int, dimension: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SET_METRICS)
def test_equal_sets_are_perfect_and_far_ones_are_not(name):
    measure, real = SET_METRICS[name], features(60)
    same, far = measure(real, real).value, measure(real, features(50, seed=1) + 9).value
    if name in ("precision", "recall"):
        assert same == 1 and far == 0
    elif name == "kid":  # unbiased, so a set with itself has a little less than 0
        assert -0.3 < same <= 0 and far > 10
    else:
        assert same == pytest.approx(0, abs=1e-6) and far == pytest.approx(6 * 81, rel=0.1)


@pytest.mark.parametrize("name", SET_METRICS)
def test_sets_do_not_depend_on_order_and_say_how(name):
    measure, real, fake = SET_METRICS[name], features(60), 1.5 * features(50, seed=1)
    result = measure(real, fake)
    assert measure(real.flip(0), fake.flip(0)).value == pytest.approx(result.value, rel=1e-9)
    assert {"count": 50, "count_real": 60, "dimension": 6}.items() <= result.conventions.items()
    json.dumps(result.conventions, allow_nan=False)


@pytest.mark.parametrize("name", SET_METRICS)
@pytest.mark.parametrize(
    "real, fake, settings, message",
    [
        (features(1), features(9), {}, "^real="),
        (features(9), features(9) * math.nan, {}, "^generated="),
        (features(9), features(9, 5), {}, "^generated with 5 features: expected 6"),
        (features(9).long(), features(9), {}, "^real=torch.int64"),
        (images(4), images(4), {}, "^features, data_range=None and None"),
        (features(9), features(9), dict(data_range=UNIT), "^features, data_range=None"),
    ],
)
def test_bad_sets(name, real, fake, settings, message):
    with pytest.raises(ValueError, match=message):
        SET_METRICS[name](real, fake, **settings)


def test_parts_combine():
    parts = [metrics.psnr(images(2, side=side), images(2, side=side, seed=1), data_range=UNIT) for side in (9, 12)]
    whole = metrics.combine(parts)
    assert whole.value == pytest.approx((parts[0].value + parts[1].value) / 2)
    assert whole.conventions["count"] == 4
    other = metrics.psnr(images(2), images(2, seed=1), data_range=UNIT, crop_border=1)
    for wrong in ([], [parts[0], other]):
        with pytest.raises(ValueError, match="^results="):
            metrics.combine(wrong)
