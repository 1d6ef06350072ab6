"""The bench of guidance and averages, on a toy of few steps."""

import json
import sys

import guidance
import numpy as np
import pytest
import report
from metrics.conftest import squeezenet_file  # noqa: F401
from PIL import Image

from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.training.loop import train

NAMES = ["dark", "light"]
ARMS = (
    guidance.Arm("classes"),
    guidance.Arm("classes, guided by them", scale=2.0, interval=(0.0, 0.3)),
    guidance.Arm("no classes, guided by the early average", labels=False, calls="twice", scale=1.5, guide=True),
    guidance.Arm("classes", weights="0.1"),
)


@pytest.fixture
def score(tmp_path, monkeypatch, squeezenet_file):  # noqa: F811
    """Runs the bench's scores on a run of 32 steps with two classes; returns its result."""
    monkeypatch.setattr(guidance, "ARMS", ARMS)
    monkeypatch.setattr(guidance, "BATCH", 3)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    generator, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 12), ("test", 8)):
        labels = np.arange(count) % 2
        pixels = np.clip(60 + 130 * labels[:, None, None] + generator.integers(-20, 20, (count, 24, 24)), 0, 255)
        arrays |= {f"x_{part}": pixels.astype(np.uint8), f"y_{part}": labels}
    np.savez(tmp_path / "set.npz", **arrays)
    for index, (image, label) in enumerate(zip(arrays["x_train"], arrays["y_train"], strict=True)):
        folder = tmp_path / "images" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    settings = PyramidalSettings(
        train_data_dir=str(tmp_path / "images"), output_dir=str(tmp_path / "out" / "seed-0"), class_labels=True,
        keep_averages=True, image_channels=1, resolution=("8", "12", "24"), preset="tiny",
        block_out_channels=(8, 16, 32), train_batch_size=4, max_train_steps=32, save_images_steps=0, logging_steps=1,
        mixed_precision="no", lr_warmup_steps=2,
    )  # fmt: skip
    train(METHOD, settings)
    monkeypatch.setattr(guidance, "EARLY", 0.5)

    def call() -> dict:
        flags = ["--output", "out", "--seeds", "0", "--reference", "set.npz", "--order", *NAMES, "--epochs", "8"]
        flags += ["--weights", squeezenet_file, "--count", "8", "--result", "result.json", "--grids", "grids"]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["guidance.py", "score", *map(str, flags)])
        guidance.main()
        return json.loads((tmp_path / "result.json").read_text())

    return call


def test_every_arm_is_scored_and_costs_are_honest(score, tmp_path, monkeypatch):
    result = score()
    once, within, twice, averaged = (result["seeds"]["0"]["arms"][guidance.name_of(arm)] for arm in ARMS)
    assert result["seeds"]["0"]["steps"] == 32 and result["test_accuracy"] == 1
    assert once["nfe_eq"] == averaged["nfe_eq"] and once["frechet"] != averaged["frechet"]
    assert once["nfe_eq"] < within["nfe_eq"] < 2 * once["nfe_eq"] < twice["nfe_eq"]  # twice the calls, all guided
    assert twice["right"] is None and 0 <= once["right"] <= 1
    rows = guidance.table(result).splitlines()[4:]
    assert [row.split(" | ")[0][2:] for row in rows] == [guidance.name_of(arm) for arm in ARMS[:3]]
    rows = guidance.table(result, "averages").splitlines()[4:]
    assert [row.split(" | ")[0][2:] for row in rows] == ["classes", "classes, average of length 0.1"]
    assert len(list((tmp_path / "grids").iterdir())) == len(ARMS)
    assert report.table_of(tmp_path / "result.json") == guidance.table(result)

    monkeypatch.setattr(guidance, "arguments_of", lambda arm, pipeline: {"plan": "fast"})  # nothing is sampled again
    assert score()["seeds"]["0"]["arms"][guidance.name_of(ARMS[0])]["frechet"] == once["frechet"]
