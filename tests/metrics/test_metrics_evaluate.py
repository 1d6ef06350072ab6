"""The same numbers as modules of evaluate, loaded by path, in one process and in two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from pyrdiff import metrics

UNIT = (0, 1)
MODULES = Path(metrics.__file__).parent / "evaluate_modules"
NAMES = ("psnr", "ssim", "consistency", "lpips", "frechet_distance", "kid", "precision_recall")


def images(count: int, seed: int, side: int = 34) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3, side, side), dtype=np.float32)


def features(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 5)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_gives_what_the_function_gives(name, tmp_path, lpips_heads, alexnet_file):
    import evaluate

    metric = evaluate.load(str(MODULES / f"{name}.py"), cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric) and metric.description
    function = getattr(metrics, name)
    if name in ("frechet_distance", "kid", "precision_recall"):
        real, fake = features(30, 0), features(20, 1)
        padded = [*fake, *[[]] * 10]
        for part in (slice(0, 15), slice(15, 30)):
            metric.add_batch(predictions=padded[part], references=list(real[part]))
        found = metric.compute()
        expected = function(torch.from_numpy(real), torch.from_numpy(fake))
        expected = expected if isinstance(expected, tuple) else (expected,)
    else:
        settings = dict(data_range=UNIT) | (dict(weights=alexnet_file) if name == "lpips" else {})
        a, b = images(3, 0), images(3, 1)
        metric.add_batch(predictions=a[:2], references=b[:2])
        metric.add(prediction=a[2], reference=b[2])
        found = metric.compute(**settings)
        expected = (function(torch.from_numpy(a), torch.from_numpy(b), **settings),)
    assert found["conventions"] == expected[0].conventions
    for result in expected:
        assert found[result.name] == pytest.approx(result.value, rel=1e-6)
        if result.per_image is not None:
            assert found[f"{result.name}_per_image"] == pytest.approx(result.per_image.tolist(), rel=1e-6)


def test_images_of_several_sizes(tmp_path):
    metric = metrics.load("psnr", cache_dir=str(tmp_path))
    pairs = [(images(1, side, side)[0], images(1, 99, side)[0]) for side in (8, 12)]
    for prediction, reference in pairs:
        metric.add(prediction=prediction, reference=reference)
    expected = [metrics.psnr(*(torch.from_numpy(x)[None] for x in pair), data_range=UNIT).value for pair in pairs]
    assert metric.compute(data_range=UNIT)["psnr_per_image"] == pytest.approx(expected)


def test_sets_of_images(tmp_path, squeezenet_file):
    network = metrics.open_features("squeezenet", squeezenet_file)
    metric = metrics.load("frechet_distance", config_name="images", cache_dir=str(tmp_path))
    real, fake = images(5, 0), images(5, 1)
    found = metric.compute(predictions=fake, references=real, features=network, data_range=UNIT)
    expected = metrics.frechet_distance(*map(torch.from_numpy, (real, fake)), features=network, data_range=UNIT)
    assert found["FD-squeezenet"] == pytest.approx(expected.value, rel=1e-6)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="^name='fid': expected one of 'consistency', 'frechet_distance'"):
        metrics.load("fid")
    metric = metrics.load("psnr", cache_dir=str(tmp_path))
    metric.add_batch(predictions=images(1, 0), references=images(1, 1))
    with pytest.raises(ValueError, match=r"^data_range=None: expected compute\(data_range=...\)"):
        metric.compute()
    with pytest.raises(ValueError, match="^config_name='pixels'"):
        metrics.load("kid", config_name="pixels", cache_dir=str(tmp_path))


def measure_a_part(rank: int, folder: str) -> None:
    own = dict(num_process=2, process_id=rank, experiment_id="two", cache_dir=folder)
    results = []
    for name, first, second, cut, settings in (
        ("psnr", images(5, 0), images(5, 1), 3, dict(data_range=UNIT)),
        ("frechet_distance", features(20, 0), features(20, 1), 13, {}),
    ):
        part = slice(0, cut) if rank == 0 else slice(cut, None)
        metric = metrics.load(name, **own)
        metric.add_batch(predictions=first[part], references=second[part])
        results.append(metric.compute(**settings))
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


def test_two_processes_give_the_value_of_one(tmp_path):
    import evaluate  # noqa: F401  # once, before the processes part

    mp.start_processes(measure_a_part, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert second == [None, None]
    psnr = metrics.psnr(*(torch.from_numpy(images(5, seed)) for seed in (0, 1)), data_range=UNIT)
    assert first[0]["psnr"] == pytest.approx(psnr.value, rel=1e-12) and first[0]["conventions"]["count"] == 5
    assert first[0]["psnr_per_image"] == pytest.approx(psnr.per_image.tolist(), rel=1e-12)
    fake, real = (torch.from_numpy(features(20, seed)) for seed in (0, 1))
    assert first[1]["FD-features"] == pytest.approx(metrics.frechet_distance(real, fake).value, rel=1e-9)
