"""The side-by-side bench, on a toy network."""

import json
import sys
from pathlib import Path

import ablation
import bench
import calculus_rank
import fitted_arms
import fitting
import numpy as np
import pytest
import samplers
import spectra
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

import pyrdiff
from pyrdiff.data import ImageLevels, draw_glyphs
from pyrdiff.metrics import train_classifier

TOY = dict(
    resolutions=(4, 8, 16),
    image_channels=1,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
FAST = ["DDIM 20", "DPM-Solver++ 20", "log-SNR 10", "UniPC 10", "pyramid 20/5/5", "pyramid 20/4/2", "pyramid 20/2/1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported model, a reference, and a feature network."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    network = pyrdiff.CoordinateUNet2DModel(**TOY)
    pyrdiff.hub.export(pyrdiff.PyramidalPipeline(network, DDPMScheduler()), folder / "model")
    images = draw_glyphs(16, 64)
    np.save(folder / "images.npy", images)
    labels = torch.arange(64) % 2
    train_classifier(torch.from_numpy(images), labels, epochs=1).save(folder / "classifier.safetensors")
    return folder


def run(folder: Path, output: str, *flags: str) -> dict:
    flags = ["--threads", "1", "--runs", "2", "--batch_size", "4", "--score_images", "8", "--resamples", "5", *flags]
    flags += ["--features", "classifier", "--weights", str(folder / "classifier.safetensors")]
    flags += ["--model", str(folder / "model"), "--reference", str(folder / "images.npy")]
    bench.main([*flags, "--output", str(folder / output)])
    return json.loads((folder / output).read_text())


@pytest.fixture(scope="module")
def result(folder) -> dict:
    """Scored first, then timed into the same file."""
    run(folder, "all.json", "--phase", "score", "--only", *FAST, "--cache", str(folder / "cache"))
    return run(folder, "all.json", "--phase", "time", "--only", *FAST)


def test_phases_merge_into_a_complete_result(folder, result):
    assert len(result["arms"]) == len(FAST)
    for name, row in result["arms"].items():
        assert len(row["seconds"]["latency"]["values"]) == len(row["seconds"]["throughput"]["values"]) == 2, name
        assert row["seconds"]["latency"]["min"] <= row["seconds"]["latency"]["median"]
        low, high = row["score"]["frechet_interval"]
        assert low <= row["score"]["frechet"] <= high and len(row["score"]["octaves"]) == 4, name
    assert len(result["model"]["sha256"]) == 64 and result["scored"]["data"]["images"] == 64
    assert {"device", "threads", "versions", "load", "load_before"} <= set(result["timed"])
    assert str(folder) not in json.dumps(result)


def test_every_arm_is_in_a_table(result):
    shown = bench.table(result)
    assert all(f"| {name} |" in shown for name in result["arms"]) and "| real images |" in shown
    assert "~×" in shown, "DDPM 1000 was not timed, so it is scaled"
    speed = bench.table(result, "speed")
    assert "| DPM-Solver++ 20 |" in speed and "DDIM 20" not in speed and "KID" not in speed
    with pytest.raises(ValueError, match="view='other'"):
        bench.table(result, "other")


def test_the_plot_is_small(result, tmp_path):
    assert bench.plot(result, tmp_path / "plot.png")
    assert 5_000 < (tmp_path / "plot.png").stat().st_size < 150_000


def test_network_calls_are_those_of_the_plan(folder, result):
    base = pyrdiff.load(folder / "model")
    solver = samplers.build_scheduler({"_class_name": "DPMSolverMultistepScheduler"}, base.scheduler)
    plan = pyrdiff.PyramidalPipeline(base.unet, solver).plan(num_inference_steps=20, refine_steps=5)
    row = result["arms"]["pyramid 20/5/5, DPM-Solver++"]
    assert row["calls"] == [["4x4", 20], ["8x8", 5], ["16x16", 5]] and row["nfe_eq"] == pytest.approx(plan.nfe_eq)
    assert result["arms"]["DPM-Solver++ 20"]["nfe_eq"] == 20


@pytest.mark.parametrize("resolutions", [(4, 8, 16), (8, 16), (16,), (4, (8, 4), (16, 8), 32)])
def test_every_arm_can_be_planned_for_any_levels(resolutions):
    base = pyrdiff.PyramidalPipeline(
        pyrdiff.CoordinateUNet2DModel(**{**TOY, "resolutions": resolutions}), DDPMScheduler()
    )
    found = bench.arms(base)
    calls = {name: samplers.Sampler(arm, base, base.unet).expected_calls() for name, arm in found.items()}
    assert {
        "DDPM 1000",
        "DDIM 50",
        "UniPC 10",
        "strength 0.5",
        "levels 16" if resolutions[-1] == 16 else "levels 32",
    } <= set(calls)
    assert {view for arm in found.values() for view in arm["views"]} == {"main", "speed", "strength", "levels"}
    if len(resolutions) == 3:
        assert calls["levels 4/16"] == [((4, 4), 100), ((16, 16), 10)] and calls["levels 16"] == [((16, 16), 100)]
        assert calls["pyramid 20/2/1, SDE-DPM-Solver++"] == [((4, 4), 20), ((8, 8), 2), ((16, 16), 1)]
        assert [sum(n for _, n in calls[f"strength {s}"]) for s in (0.1, 0.3)] == [120, 160]


def test_saved_plans_are_arms():
    plan = dict(num_inference_steps=6, refine_steps=2, scheduler=["DPMSolverMultistepScheduler", {"solver_order": 1}])
    base = pyrdiff.PyramidalPipeline(pyrdiff.CoordinateUNet2DModel(**TOY), DDPMScheduler(), plans={"fast": plan})
    sampler = samplers.Sampler(bench.arms(base)["saved plan fast"], base, base.unet)
    calls = samplers.Calls(base.unet)
    with torch.no_grad():
        images = sampler(2, torch.Generator().manual_seed(0))
    assert images.shape == (2, 1, 16, 16) and calls.images == {(4, 4): 12, (8, 8): 4, (16, 16): 4}
    assert sampler.expected_calls() == [((4, 4), 6), ((8, 8), 2), ((16, 16), 2)]
    assert sampler.settings["arguments"]["plan"] == plan, "what is in a plan is part of the key"


def samplers_of(folder, **arms):
    base = pyrdiff.load(folder / "model")
    return [samplers.Sampler({"refine_scheduler": None, **arm}, base, base.unet) for arm in arms.values()]


def test_the_stock_loop_is_our_pipeline_with_one_level(folder):
    solver, base = {"_class_name": "DPMSolverMultistepScheduler"}, pyrdiff.load(folder / "model")
    stock, ours = samplers_of(
        folder,
        stock=dict(loop="stock", scheduler=solver, arguments=dict(num_inference_steps=20)),
        ours=dict(loop="pyramid", scheduler=solver, arguments=dict(num_inference_steps=20, resolutions=[16])),
    )
    with torch.no_grad():
        images = [sampler(3, torch.Generator().manual_seed(5)) for sampler in (stock, ours)]
    torch.testing.assert_close(*images, rtol=0, atol=0)
    scheduler = samplers.build_scheduler(solver, base.scheduler)
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    clean = torch.linspace(-3, 3, 64).reshape(1, 1, 8, 8)
    torch.testing.assert_close(scheduler._threshold_sample(clean), clean.clamp(-1, 1))


@pytest.mark.parametrize("window", [20, 6])
def test_the_parallel_loop_finds_the_sequential_trajectory(folder, window):
    network = pyrdiff.load(folder / "model").unet
    calls = samplers.Calls(network)
    parallel = samplers.build_scheduler({"_class_name": "DDIMParallelScheduler"}, DDPMScheduler())
    shape = (2, 1, 16, 16)
    with torch.no_grad():
        expected = samplers.stock_images(network, DDIMScheduler(), shape, torch.Generator().manual_seed(3), 20)
        assert calls.images == {(16, 16): 2 * 20}
        found = samplers.parallel_images(network, parallel, shape, torch.Generator().manual_seed(3), 20, window, 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert calls.images[16, 16] > 2 * 2 * 20, "every sweep of the window counts"


def test_a_resumed_scoring_is_the_same(folder, result, capsys):
    name = "pyramid 20/4/2, SDE-DPM-Solver++"
    [path] = (folder / "cache").glob("pyramid_20_4_2_SDE*.npy")
    whole = np.load(path)
    np.save(path, whole[:4])  # interrupted after one batch
    again = run(folder, "again.json", "--phase", "score", "--only", name, "--cache", str(folder / "cache"))
    assert again["arms"][name]["score"] == result["arms"][name]["score"]
    assert np.array_equal(np.load(path), whole)

    np.save(path, 255 - whole)  # what other code made
    again = run(folder, "again.json", "--phase", "score", "--only", name, "--cache", str(folder / "cache"))
    assert "made anew" in capsys.readouterr().out and again["arms"][name]["score"] == result["arms"][name]["score"]


def test_results_that_do_not_fit_together_are_refused(folder, result):
    (folder / "other.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="holds seed=0; expected 1"):
        run(folder, "other.json", "--phase", "time", "--only", "DDIM 20", "--seed", "1")
    with pytest.raises(ValueError, match="holds scored="):
        run(folder, "other.json", "--phase", "score", "--only", "DDIM 20", "--score_images", "16")
    with pytest.raises(ValueError, match="expected parts of some of these names"):
        run(folder, "other.json", "--only", "no such arm")
    with pytest.raises(ValueError, match="holds 64 images; expected twice the 33"):
        run(folder, "other.json", "--phase", "score", "--only", "DDIM 20", "--score_images", "33")


def test_an_arm_from_a_file_with_its_memory(folder):
    extra = {
        "mine": {
            "method": "mine",
            "scheduler": {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1},
            "refine_scheduler": {"_class_name": "DDPMScheduler"},
            "arguments": {"num_inference_steps": 6, "refine_steps": [2, 2], "refine_strength": 0.2},
        }
    }
    (folder / "arms.json").write_text(json.dumps(extra))
    flags = ["--only", "mine", "--arms", str(folder / "arms.json")]
    found = run(folder, "mine.json", *flags, "--phase", "memory", "--batch_size", "64")
    assert list(found["arms"]) == ["mine"] and found["arms"]["mine"]["nfe_eq"] == 6 / 16 + 2 / 4 + 2
    shown = bench.table(found)
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[2:]]
    peaks = {row[0]: int(row[header.index("peak, MiB")]) for row in rows}
    assert min(peaks.values()) >= 2, "64 images in 8 channels at 16x16 are 0.5 MiB, and a block holds several"
    assert {name: round(row["memory"] / 2**20) for name, row in found["arms"].items()} == peaks
    assert "Memory: peak resident, in a process of its own, above the loaded model" in shown
    slow = run(folder, "mine.json", *flags, "--phase", "time", "--slow_seconds", "0")
    assert "memory" in slow["arms"]["mine"], "kept from the earlier phase"
    assert [len(part["values"]) for part in slow["arms"]["mine"]["seconds"].values()] == [1], "once, at batch 1"


def test_arms_with_more_steps_than_the_training_had_are_left_out(folder, tmp_path, capsys):
    network = pyrdiff.load(folder / "model").unet
    pyrdiff.hub.export(pyrdiff.PyramidalPipeline(network, DDPMScheduler(60)), tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--phase", "time", "--runs", "1", "--batch_size", "2"]
    flags += ["--threads", "1", "--output", str(tmp_path / "few.json"), "--only"]
    bench.main([*flags, "DDPM 1000", "DDIM 20", "pyramid 1000", "pyramid 50/5/5, DDPM", "pyramid 20/5/5"])
    found = json.loads((tmp_path / "few.json").read_text())
    kept = ["DDIM 20", "pyramid 50/5/5, DDPM + DPM-Solver++", "pyramid 20/5/5, DPM-Solver++"]
    assert list(found["arms"]) == kept and all("throughput" in row["seconds"] for row in found["arms"].values())
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in named] == ["DDPM 1000", "pyramid 1000/30/30, DDPM"]
    assert all("num_inference_steps=1000: expected at most 60" in line for line in named)

    with pytest.raises(ValueError, match="expected an arm that this model can run"):
        bench.main([*flags, "DDPM 1000"])
    arm = {"method": "mine", "scheduler": {"_class_name": "DDPMScheduler"}, "arguments": {"refine_steps": 30}}
    (tmp_path / "arms.json").write_text(json.dumps({"mine": arm}))
    with pytest.raises(ValueError, match="^--arms 'mine': num_inference_steps=100: expected at most 60"):
        bench.main([*flags, "mine", "--arms", str(tmp_path / "arms.json")])


def test_trainings_side_by_side(folder, monkeypatch):
    """The ablation's arms see the same noise: a model beside itself scores the same."""
    flags = ["--reference", str(folder / "images.npy"), "--features", "classifier", "--threads", "1"]
    flags += ["--weights", str(folder / "classifier.safetensors"), "--images", "8", "--grids", str(folder / "grids")]
    for name in ("one, seed 0", "one, seed 1", "other, seed 0"):
        flags += ["--arm", f"{name}={folder / 'model'}"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *flags, "--output", str(folder / "ablation.json")])
    monkeypatch.setitem(ablation.SAMPLERS, "pyramid", dict(num_inference_steps=3, refine_steps=2))
    ablation.main()
    result = json.loads((folder / "ablation.json").read_text())
    assert len({row["frechet"] for row in result["rows"]}) == 1 and result["rows"][0]["images"] == 8
    shown = ablation.table(result)
    assert "| **one**, mean |" in shown and "over 2 seeds" in shown and "**other**" not in shown
    assert len(list((folder / "grids").glob("*.png"))) == 3


def test_the_calculus_beside_the_bench(folder, result, monkeypatch):
    images = str(folder / "images.npy")
    flags = ["--model", str(folder / "model"), "--bench", str(folder / "all.json"), "--points", "4"]
    flags += ["--train", images, "--reference", images, "--output", str(folder / "rank.json")]
    monkeypatch.setattr(sys, "argv", ["calculus_rank.py", *flags])
    calculus_rank.main()
    found = json.loads((folder / "rank.json").read_text())
    assert len(found["rows"]) >= 4 and all(-1 <= value <= 1 for value in found["correlation"].values())
    perfect = [row for row in found["rows"] if row["name"] == "pyramid 20/5/5, DPM-Solver++"][0]
    scheduler, network = DPMSolverMultistepScheduler(), pyrdiff.load(folder / "model").unet
    plan = pyrdiff.PyramidalPipeline(network, scheduler).plan(num_inference_steps=20, refine_steps=5)
    levels = fitting.level_steps(plan, (scheduler, None), scheduler.alphas_cumprod)
    measured = spectra.Spectra.of(ImageLevels.build(np.load(images), [4, 8, 16], channels=1))
    assert perfect["calculus"]["perfect network"] == pytest.approx(float(fitting.score(levels, measured)), rel=1e-4)


def test_fitted_plans_are_arms(folder, monkeypatch):
    monkeypatch.setattr(fitted_arms, "FITTED", (("dpmsolver++", (4, 2, 2)),))
    flags = ["--model", str(folder / "model"), "--train", str(folder / "images.npy")]
    monkeypatch.setattr(sys, "argv", ["fitted_arms.py", *flags, "--output", str(folder / "fitted.json")])
    fitted_arms.main()
    base = pyrdiff.load(folder / "model")
    found = bench.chosen_arms(base, str(folder / "fitted.json"), ["fitted"], None)
    calls = samplers.Sampler(found["fitted 4/2/2, DPM-Solver++"], base, base.unet).expected_calls()
    assert calls == [((4, 4), 4), ((8, 8), 2), ((16, 16), 2)]
