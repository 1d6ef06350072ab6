"""The benches of super-resolution models, on an untrained toy."""

import json
import sys
from pathlib import Path

import few_steps
import numpy as np
import photos_sr
import pytest
import residual_sr
import torch
from PIL import Image

import pyrdiff
from pyrdiff.data import draw_glyphs
from pyrdiff.metrics import train_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two exported models with a log beside them, a reference, a feature network, and pairs of files."""
    folder = tmp_path_factory.mktemp("bench_sr")
    for name, channels in (("gray", 1), ("color", 3)):
        torch.manual_seed(0)
        unet = pyrdiff.ResidualSRUNet2DModel(
            image_channels=channels, scale_factors=(2,), sample_size=16, block_out_channels=(8, 8), norm_num_groups=4,
            attention_head_dim=8,
        )  # fmt: skip
        scheduler = pyrdiff.CosineResidualScheduler(100, residual_scale=3.0)
        plans = {"default": {"num_inference_steps": 2, "eta": 0.0}}
        pyrdiff.hub.export(pyrdiff.ResidualSRPipeline(unet, scheduler, plans), folder / name / "pipeline")
    line = {"step": 7, "loss": 1.0, "seconds": 120.0}
    (folder / "gray" / "log.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "gray" / "settings.json").write_text(json.dumps({"train_batch_size": 4}))
    images = draw_glyphs(16, 64)
    np.save(folder / "images.npy", images)
    train_classifier(torch.from_numpy(images), torch.arange(64) % 2, epochs=1).save(folder / "classifier.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for name, picture in (("high", Image.fromarray(pixels)), ("low", Image.fromarray(pixels).resize((16, 12)))):
        (folder / name).mkdir()
        picture.save(folder / name / "a.png")
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Runs a bench's main function on the gray model with a stand-in for LPIPS, whose weights are not here."""
    monkeypatch.setattr(
        "pyrdiff.metrics.lpips", lambda a, b, *, network, weights, **known: pyrdiff.metrics.psnr(a, b, **known)
    )

    def call(bench, *flags) -> dict:
        output = folder / f"{bench.__name__}.json"
        common = ["--threads", "1", "--output", str(output)]
        if bench is not photos_sr:
            common += ["--models", f"SR4={folder / 'gray' / 'pipeline'}", "--reference", str(folder / "images.npy")]
            common += ["--images", "8", "--slow_images", "2", "--resamples", "5", "--features", "classifier"]
            common += ["--weights", str(folder / "classifier.safetensors")]
        monkeypatch.setattr(sys, "argv", [bench.__name__, *common, *map(str, flags)])
        bench.main()
        return json.loads(output.read_text())

    return call


def test_the_table_has_every_arm_and_what_it_was_trained_for(run, folder):
    result = run(residual_sr, "--arms", "table", "--grids", folder / "grids")
    assert [(row["model"], row["name"], row["calls"]) for row in result["rows"]] == [
        ("bicubic", "bicubic", 0),
        ("SR4", "all 100", 100),
        ("SR4", "100", 100),
    ]
    slow, full = result["rows"][1:]
    assert (slow["images"], full["images"]) == (2, 8)
    assert slow["slow"] == pytest.approx(full["slow"], abs=1e-4), "the same steps on the same images and seeds"
    assert result["models"]["SR4"]["training"] == {"steps": 7, "minutes": 2.0, "images": 28}
    text = residual_sr.table(result)
    assert text.count("\n| SR4 ") == 2 and "| 2 |" in text and len(list((folder / "grids").iterdir())) == 2


def test_found_plans_are_arms_of_the_frontier(run, folder):
    found = run(few_steps, "--calls", 1, 2)
    assert {len(plan["spacing"]) for plan in found["plans"].values()} == {1, 2}
    for calls in (1, 2):
        mine = [row for row in found["rows"] if row["calls"] == calls]
        (name,) = [name for name in found["plans"] if name.startswith(f"found {calls}:")]
        chosen = next(row for row in mine if row["plan"] == found["plans"][name])
        assert chosen["lpips"] == min(row["lpips"] for row in mine)
    frontier = run(
        residual_sr, "--arms", "frontier", "--only", "found", "DDIM", "--plans", folder / "few_steps.json"
    )  # fmt: skip
    calls = {row["name"]: row["calls"] for row in frontier["rows"]}
    assert {calls[f"DDIM {n}"] == n for n in (50, 20, 8, 4, 2)} == {True}
    assert sum(name.startswith("found") for name in calls) == 2
    assert few_steps.table(found) and residual_sr.table(frontier)


@pytest.mark.parametrize("train_steps", [100, 500])
def test_times_descend_within_the_process(train_steps):
    for calls in range(1, 9):
        for start in few_steps.STARTS:
            for power in few_steps.POWERS:
                times = few_steps.times_of(train_steps, calls, start, power)
                assert times == sorted(set(times), reverse=True) and 0 <= times[-1] <= times[0] < train_steps


def test_pairs_of_files(run, folder):
    flags = ["--model", folder / "color" / "pipeline", "--low", folder / "low", "--high", folder / "high", "--tile", 8]
    result = run(photos_sr, *flags, "--grids", folder / "photos")
    assert [row["name"] for row in result["rows"]] == [
        "bicubic",
        "default",
        "default, hard consistency",
        "default, mean of 4",
    ]
    bicubic, plain, hard, mean = result["rows"]
    assert mean["psnr_y"] > plain["psnr_y"], "noise is averaged away"
    assert hard["consistency"] < 1 < plain["consistency"] and bicubic["each"][0]["size"] == [24, 32]
    assert photos_sr.table(result).count("\n|") == 6
    assert len(list((folder / "photos").iterdir())) == 4
