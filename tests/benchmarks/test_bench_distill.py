"""The benches of distillation, on toys of one step."""

import json
import sys
from pathlib import Path

import distill
import engine
import numpy as np
import one_call_sr
import pytest
import torch
from diffusers import DDPMScheduler
from metrics.conftest import alexnet_file, lpips_heads, squeezenet_file  # noqa: F401
from PIL import Image

from pyrdiff import CoordinateUNet2DModel, PyramidalPipeline, hub
from pyrdiff.methods.distill import perceptual
from pyrdiff.methods.pddpm import plans


@pytest.fixture
def folders(tmp_path) -> Path:
    """Two folders of images of 32x32, named as UTKFace names them."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for name, part in (("train", pixels[:8]), ("test", pixels[8:])):
        (tmp_path / name).mkdir()
        for index, image in enumerate(part):
            Image.fromarray(image).save(tmp_path / name / f"{15 * index}_{index % 2}_{index % 5}_{index}.png")
    return tmp_path


def call(monkeypatch, bench, *flags) -> None:
    monkeypatch.setattr(sys, "argv", [f"{bench.__name__}.py", *map(str, flags)])
    bench.main()


def test_students_are_trained_and_scored_beside_their_teacher(folders, monkeypatch, squeezenet_file):  # noqa: F811
    monkeypatch.setattr(engine, "BATCH", 2)
    monkeypatch.setattr(distill, "EPOCHS", 8)  # of one step
    monkeypatch.setattr(distill, "FLAGS", {**distill.FLAGS, "train_batch_size": 4, "mixed_precision": "no"})
    torch.manual_seed(0)
    network = CoordinateUNet2DModel.from_preset(
        "tiny", resolutions=(8, 32), block_out_channels=(8, 16, 32), noise_window=0.35
    )
    colors = {"mean": [0.0] * 3, "covariance": np.eye(3).tolist()}
    teacher = hub.export(PyramidalPipeline(network, DDPMScheduler(), plans=plans(), colors=colors), folders / "teacher")
    shared = ["--train_data_dir", folders / "train", "--output", folders / "out"]
    flags = ["--flags", json.dumps({"lpips_weight": 0.0}), "--minutes", 0.05]
    for _ in range(2):  # the second time it is done
        call(monkeypatch, distill, "train", "--teacher", teacher, *shared, *flags)
    file = folders / "classifier.safetensors"
    call(monkeypatch, distill, "classifier", *shared[:2], "--classifier", file, "--size", 32)
    scored = ["--engine", folders, "--held_out", folders / "test", "--weights", squeezenet_file, "--classifier", file]
    call(monkeypatch, distill, "score", *shared, *scored, "--size", 32, "--count", 4, "--result", folders / "a.json")
    result = json.loads((folders / "a.json").read_text())
    rows = {(row["arm"], row["plan"]): row for row in result["rows"]}
    assert list(rows) == [*(("teacher", name) for name in distill.TEACHER), ("student", "one"), ("student", "two")]
    assert [row["nfe_eq"] for row in rows.values()] == pytest.approx([20 / 16 + n for n in (4, 2, 1, 2)])
    assert all(set(row["scores"]) == {"squeezenet", "classifier"} for row in rows.values())
    assert len(distill.table(result).splitlines()) == 4 + 4 + 1
    assert len(list((folders / "out" / "samples").glob("*.png"))) == 4


def test_labels_are_read_from_names():
    labels = [distill.label_of(name) for name in ("1_0_0_x.jpg", "folder/30_1_4_x.jpg", "90_1_7_x.jpg")]
    assert labels == [0, 19, 29]


@pytest.fixture
def lpips_files(alexnet_file, lpips_heads) -> Path:  # noqa: F811
    """The file of a random trunk, with heads beside it."""
    perceptual.cache_clear()
    yield alexnet_file
    perceptual.cache_clear()


def test_super_resolution_in_one_call_is_trained_and_scored(folders, monkeypatch, squeezenet_file, lpips_files):  # noqa: F811
    small = {"resolution": ("32",), "scale_factor": (4,), "preset": "tiny", "block_out_channels": (32, 32)}
    monkeypatch.setattr(one_call_sr, "NETWORK", small)
    monkeypatch.setattr(one_call_sr, "SHARED", {**one_call_sr.SHARED, "mixed_precision": "no"})
    shared = ["--train_data_dir", folders / "train", "--trained", folders / "sr", "--lpips_weights", lpips_files]
    for arm in ("teacher", "distilled", "plain"):
        call(monkeypatch, one_call_sr, "train", "--arm", arm, "--minutes", 0.05, *shared)
    scored = ["--trained", folders / "sr", "--reference", folders / "test", "--images", 2, "--grids", folders]
    weights = ["--weights", squeezenet_file, "--lpips_weights", squeezenet_file, "--output", folders / "b.json"]
    call(monkeypatch, one_call_sr, "score", *scored, *weights)
    result = json.loads((folders / "b.json").read_text())
    rows = [(row["arm"], row["plan"], row["calls"]) for row in result["rows"]]
    calls = {"default": 20, "balanced": 8, "fast": 4}
    assert rows[:4] == [("bicubic", "-", 0), ("distilled", "one", 1), ("distilled", "two", 2), ("plain", "-", 1)]
    assert rows[4:] == [("teacher", name, count) for name, count in calls.items()]
    assert (folders / "one_call_sr.png").is_file()
