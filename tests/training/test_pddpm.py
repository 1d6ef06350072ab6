"""What Pyramidal DDPM draws: times within the noise window above the lowest resolution, levels by their shares."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics.conftest import squeezenet_file  # noqa: F401

import pyrdiff
from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.training.checkpoints import load_checkpoint, save_checkpoint
from pyrdiff.training.loop import DeviceBatch, train
from pyrdiff.training.losses import Draws

FLAGS = dict(train_data_dir="images", resolution=("8", "16"), preset="tiny", block_out_channels=(8, 16, 32))


def times_drawn(settings: PyramidalSettings, level: int, draws: int = 40) -> set[int]:
    """The times at which the loss asks the network, for batches of 256 images of one pixel row."""
    scheduler, seen = METHOD.scheduler(settings, None), set()

    def network(noisy, timesteps, coordinates, return_dict):
        seen.update(timesteps.tolist())
        return (noisy,)

    for index in range(draws):
        batch = DeviceBatch(torch.zeros(256, 1, 1, 2), None, level)
        METHOD.loss(network, scheduler, settings, batch, Draws(index, device=torch.device("cpu")))
    return seen


@pytest.mark.parametrize(
    ("changes", "level", "last"),
    [
        ({}, 0, 999),
        ({}, 1, 369),  # the window and its margin
        ({"noise_window": 0.2}, 1, 219),
        ({"noise_window": 1.0}, 1, 999),
        ({"noise_window": 0.99}, 1, 999),
        ({"ddpm_num_steps": 100}, 1, 36),
    ],
)
def test_times_reach_to_the_noise_window_above_the_lowest_resolution(changes, level, last):
    seen = times_drawn(PyramidalSettings(**FLAGS, **changes), level)
    assert max(seen) == last and min(seen) == 0
    assert len(seen) > 0.99 * (last + 1)


def test_the_network_says_its_window():
    def window(**changes) -> float:
        return METHOD.model(PyramidalSettings(**{**FLAGS, **changes}), 1).config.noise_window

    assert window() == 0.35
    assert window(noise_window=1.0) == 1.0
    assert window(resolution=("16",)) == 1.0, "no resolution is above the only one"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"noise_window": 0.0}, "noise_window=0.0: expected a number in"),
        ({"noise_window": 1.1}, "noise_window=1.1"),
        ({"level_share": (1, 2, 6)}, r"level_share=\(1, 2, 6\): expected a whole number from 1 up for each of the 2"),
        ({"level_share": (1, 0)}, r"level_share=\(1, 0\)"),
    ],
)
def test_bad_flags(changes, named):
    with pytest.raises(ValueError, match=named):
        PyramidalSettings(**{**FLAGS, **changes})


@pytest.fixture(scope="module")
def paper(toy) -> dict:
    """The flags of a run of 6 steps at all times and with equal shares, which was done."""
    flags = {**toy(max_train_steps=6), "noise_window": 1.0, "level_share": [1, 1]}
    run(flags)
    return flags


def run(flags: dict) -> Path:
    return train(METHOD, PyramidalSettings(**flags))


def test_the_exported_pipeline_starts_in_the_colours_of_the_images(paper):
    pipeline = pyrdiff.load(Path(paper["output_dir"]) / "pipeline")
    pixels = np.load(paper["train_data_dir"]).reshape(24, 8, 2, 8, 2, 3).mean((2, 4))  # at the lowest resolution
    colors = pixels.mean((1, 2)) / 127.5 - 1
    assert np.allclose(pipeline.config.colors["mean"], colors.mean(0), atol=5e-3)
    assert np.allclose(pipeline.config.colors["covariance"], np.cov(colors.T), atol=1e-3)
    assert pipeline.config.plans["balanced"]["start_strength"] == 0.55
    assert pipeline.plan(plan="balanced").levels[0].timesteps[0] == 550
    pipeline(1, plan="fast")


def test_a_checkpoint_from_before_there_were_windows_and_shares_goes_on(paper, tmp_path):
    folder = Path(shutil.copytree(paper["output_dir"], tmp_path / "run"))
    tensors, state = load_checkpoint(folder / "checkpoint-6")
    identity = state["identity"]
    assert identity["network"].pop("noise_window") == 1.0 and identity.pop("level_share") is None
    identity["network"]["a_setting_that_is_gone"] = 8
    shutil.rmtree(folder / "checkpoint-6")
    save_checkpoint(folder, 6, tensors, state)
    run({**paper, "output_dir": str(folder), "max_train_steps": 8})
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"noise_window": 0.5}, 'network={"noise_window": 1.0}, this run has {"noise_window": 0.5}'),
        ({"level_share": [1, 3]}, "level_share=null, this run has [1, 3]"),
    ],
)
def test_a_run_does_not_go_on_with_another_window_or_share(paper, changes, named):
    with pytest.raises(ValueError) as caught:
        run({**paper, **changes, "max_train_steps": 8})
    assert named in str(caught.value)


@pytest.fixture
def held_out(tmp_path, squeezenet_file) -> dict:  # noqa: F811
    """The flags of a search after the training."""
    path = tmp_path / "held_out.npy"
    np.save(path, np.random.default_rng(1).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8))
    judged_by = {"features": "squeezenet", "feature_weights": str(squeezenet_file)}
    return {"held_out_dir": str(path), "tune_minutes": 30, **judged_by}


def test_the_finished_model_gets_plans_of_its_own(toy, held_out, monkeypatch):
    module = importlib.import_module("pyrdiff.plan.tune")
    every = module.candidates
    monkeypatch.setattr(module, "candidates", lambda pipeline: every(pipeline)[:4])
    monkeypatch.setattr(module, "MOST", 32)  # so it ends long before its minutes
    folder = run({**toy(max_train_steps=2, resolution=["8", "24"]), **held_out})
    figures = json.loads((folder / "tuning.json").read_text())
    pipeline = pyrdiff.load(folder)
    assert pipeline.config.plans["best"] == figures["plans"]["best"]["plan"] and "paper" in pipeline.config.plans
    assert figures["held_out"] == 32
    pipeline(1, plan="best")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"held_out_dir": None}, "tune_minutes=30: expected held_out_dir beside it"),
        ({"tune_minutes": None}, "tune_minutes=None: expected held_out_dir beside it"),
        ({"tune_minutes": 0.0}, "tune_minutes=0.0: expected a number above 0"),
        ({"held_out_dir": "few"}, "held_out: got 24 images; expected 32 or more"),
        ({}, r"images of \[16, 16\]: expected sides of 17 or more for squeezenet"),
        ({"feature_weights": "missing.pth"}, "missing.pth"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_the_training(toy, held_out, changes, named):
    flags = {**toy(max_train_steps=2), **held_out, **changes}
    if flags["held_out_dir"] == "few":
        flags["held_out_dir"] = flags["train_data_dir"]
    with pytest.raises(ValueError, match=named):
        run(flags)
    assert not list(Path(flags["output_dir"]).glob("checkpoint-*"))
