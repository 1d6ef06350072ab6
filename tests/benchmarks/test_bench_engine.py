"""The bench of trainings at equal processor time, on toys of one step."""

import json
import sys

import engine
import numpy as np
import pytest
import tuning
from metrics.conftest import squeezenet_file  # noqa: F401
from PIL import Image

import pyrdiff


@pytest.fixture
def run(tmp_path, monkeypatch, squeezenet_file):  # noqa: F811
    """Runs the bench with flags, on images of 24x24 and networks of few channels."""
    monkeypatch.setattr(engine, "BATCH", 2)
    monkeypatch.setattr(engine, "STEPS", {"20 + 200 60": [200, 60]})
    small = {"preset": "tiny", "block_out_channels": (8, 16, 32), "train_batch_size": 9}
    monkeypatch.setattr(engine, "SIZES", {24: {**small, "resolution": ("8", "12", "24")}})
    pixels = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    for name, part in (("train", pixels[:8]), ("test", pixels[8:])):
        (tmp_path / name).mkdir()
        for index, image in enumerate(part):
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")

    def call(command: str, *flags):
        given = ["--train_data_dir", tmp_path / "train", "--output", tmp_path / "out", "--minutes", 0.12, "--size", 24]
        if command == "score":
            given += ["--held_out", tmp_path / "test", "--weights", squeezenet_file, "--count", 4]
            given += ["--result", tmp_path / "engine.json"]
        monkeypatch.setattr(sys, "argv", ["engine.py", command, *map(str, [*given, *flags])])
        engine.main()

    return call


def test_arms_are_trained_scored_and_go_on(run, tmp_path, capsys, monkeypatch):
    for arm in ("full", "new"):
        run("train", "--arm", arm)
    windows = [
        pyrdiff.load(tmp_path / "out" / f"{arm}-0" / "pipeline").unet.config.noise_window for arm in ("full", "new")
    ]
    assert windows == [1.0, 0.35]
    run("train", "--arm", "new")
    assert "new-0: is trained" in capsys.readouterr().out

    only = ("--plans", "from colours", "20/3/2", "DPM-Solver++ 20")
    run("score", *only)
    result = json.loads((tmp_path / "engine.json").read_text())
    rows = {(row["arm"], row["plan"]): row for row in result["rows"]}
    assert [name for name, _ in rows] == ["full"] * 3 + ["new"] * 2, "of seed 1 none is trained"
    assert rows["new", "20 + 200 60, from colours"]["nfe_eq"] == pytest.approx(20 / 9 + 2 / 4 + 2)
    assert {row["images"] for row in result["rows"]} == {4} and result["real"]["images"] == 4
    assert len(engine.table(result).splitlines()) == 4 + 5 + 1

    asked = []
    monkeypatch.setattr(pyrdiff.PyramidalPipeline, "__call__", lambda *given, **named: asked.append(given))
    run("score", *only)
    again = json.loads((tmp_path / "engine.json").read_text())
    assert not asked, "the samples are those of before"
    assert [row["frechet"] for row in again["rows"]] == pytest.approx(
        [row["frechet"] for row in rows.values()], rel=1e-3
    )


def test_plans_of_a_search_are_measured_on_fresh_seeds(run, tmp_path, monkeypatch, squeezenet_file):  # noqa: F811
    run("train", "--arm", "new")
    folder = tmp_path / "out" / "new-0" / "pipeline"
    before = json.loads((folder / "model_index.json").read_text())
    found = {"plan": before["plans"]["fast"], "distance": 3.0, "interval": [2.0, 4.0], "samples": 64}
    search = {"plans": {"best": found}, "seconds": 90, "rounds": [[8, 32], [4, 64]], "held_out": 40, "yardstick": None}
    (tmp_path / "search.json").write_text(json.dumps(search))
    flags = {
        "name": "toy", "model": folder, "search": tmp_path / "search.json", "before": folder / "model_index.json",
        "reference": tmp_path / "train", "weights": squeezenet_file, "count": 4, "samples": tmp_path,
        "result": tmp_path / "tuning.json",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tuning.py", *(str(part) for key in flags for part in (f"--{key}", flags[key]))])
    tuning.main()
    rows = json.loads((tmp_path / "tuning.json").read_text())["models"]["toy"]["rows"]
    assert [row["plan"] for row in rows] == ["best = fast, before", "balanced, before"]
    assert rows[0]["searched"]["distance"] == 3 and rows[0]["images"] == 4
    assert "| toy | 1.5 minutes: 8 plans x 32, 4 plans x 64; 40 images | best = fast, before |" in tuning.table(
        json.loads((tmp_path / "tuning.json").read_text())
    )


def test_casts_widen_the_spread_of_colours():
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    assert engine.color_spread(images) == [0, 0]
    images[0, ..., 0] += 51  # a red cast of a fifth
    assert engine.color_spread(images) == pytest.approx([0.1, 0])
    images[:, :2] = np.random.default_rng(0).integers(0, 256, (1, 2, 4, 1))  # gray details that both have
    assert engine.color_spread(images) == pytest.approx([0.05, 0])
