"""The bench of models that generate at toy size, and that of the trajectory's heads."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pyrdiff
from pyrdiff import (
    CoordinateUNet2DModel,
    ParallelTrajectoryPipeline,
    ParallelTrajectoryUNet2DModel,
    PixelAwareScheduler,
    PyramidalPipeline,
    ScaleAutoencoder,
)
from pyrdiff.data import draw_glyphs
from pyrdiff.metrics import train_classifier

BENCHMARKS = Path(pyrdiff.__file__).parents[2] / "benchmarks"
STEPS = 20
UNET = dict(
    image_channels=1,
    sample_size=16,
    encoder_channels=(8, 16),
    layers_per_block=1,
    time_embedding_dim=16,
    num_train_timesteps=STEPS,
)


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import pixel_aware

        yield pixel_aware
    finally:
        sys.path.remove(str(BENCHMARKS))


def autoencoder(**changes) -> ScaleAutoencoder:
    settings = dict(image_channels=1, sample_size=16, block_out_channels=(8, 16), latent_dim=4, prior="normal")
    return ScaleAutoencoder(**{**settings, "num_train_timesteps": STEPS, **changes}).eval()


def without_structure() -> ParallelTrajectoryPipeline:
    torch.manual_seed(0)
    unet = ParallelTrajectoryUNet2DModel(**UNET, use_structure=False).eval()
    process = PixelAwareScheduler(STEPS, schedule="uniform", residual_std=0.3)
    pipeline = ParallelTrajectoryPipeline(unet, None, process)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    process = PixelAwareScheduler(STEPS)
    paper = dict(head="literal", target="noise")
    made = {
        "ours:0": ParallelTrajectoryPipeline(ParallelTrajectoryUNet2DModel(**UNET), autoencoder(), process),
        "ours:1": ParallelTrajectoryPipeline(ParallelTrajectoryUNet2DModel(**UNET), autoencoder(), process),
        "EDM:0": without_structure(),
        "paper:0": ParallelTrajectoryPipeline(
            ParallelTrajectoryUNet2DModel(**UNET, **paper),
            autoencoder(output="scale"),
            PixelAwareScheduler(STEPS, mode="paper"),
        ),
        "DDPM:0": PyramidalPipeline(
            CoordinateUNet2DModel.from_preset(
                "tiny", block_out_channels=(8, 16, 32), image_channels=1, resolutions=[16]
            ),
            DDPMScheduler(),
        ),
    }
    folders = {}
    for name, pipeline in made.items():
        folders[name] = tmp_path_factory.mktemp("models") / "pipeline"
        pipeline.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def result(bench, models, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("bench")
    images = draw_glyphs(16, 64)
    np.save(folder / "images.npy", images)
    train_classifier(torch.from_numpy(images), torch.arange(64) % 2, epochs=1).save(folder / "classifier.safetensors")
    arguments = [
        "pixel_aware.py", "--models", *[f"{name}={path}" for name, path in models.items()], "--reference",
        str(folder / "images.npy"), "--train", str(folder / "images.npy"), "--images", "8", "--slow_images", "4",
        "--slow_calls", "4", "--held", "8", "--batch_size", "5", "--time_batch", "2", "--runs", "1", "--resamples", "2",
        "--features", "classifier", "--weights", str(folder / "classifier.safetensors"), "--grids",
        str(folder / "grids"), "--output",
        str(folder / "out.json"), "--only", "1 pass", "4 passes", "structure only", "its own step, 4",
        "DPM-Solver++ 10", "algorithm 1", "DDIM 10", "--threads", "1",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        bench.main()
    assert len(list((folder / "grids").glob("*.png"))) > 8
    return json.loads((folder / "out.json").read_text())


def test_rows_say_what_was_run(bench, result):
    rows = {(row["method"], row["seed"], row["name"]): row for row in result["rows"]}
    assert rows["ours", 1, "4 passes"]["calls"] == 4 and rows["ours", 0, "structure only"]["calls"] == 0
    # 4 passes are 3 calls of the UNet more than one, and all that is not a call is the autoencoder's.
    one, four = (rows["ours", 0, name] for name in ("1 pass", "4 passes"))
    assert four["nfe_eq"] - one["nfe_eq"] == pytest.approx(3, rel=1e-6)
    assert one["nfe_eq"] - 1 == pytest.approx(rows["ours", 0, "structure only"]["nfe_eq"], rel=1e-6)
    assert rows["EDM", 0, "its own step, 4"]["nfe_eq"] == pytest.approx(4, rel=1e-6)
    assert rows["EDM", 0, "DPM-Solver++ 10"]["nfe_eq"] == pytest.approx(10, rel=1e-6)
    assert rows["DDPM", 0, "DDIM 10, trailing"]["nfe_eq"] == pytest.approx(10, rel=1e-6)
    assert rows["ours", 0, "1 pass"]["images"] == 8 and rows["EDM", 0, "DPM-Solver++ 10"]["images"] == 4
    assert all(row["seconds"] > 0 and row["nearest"] > 0 for row in result["rows"][1:])
    assert ("paper", 0, "algorithm 1 from N(0, I)") in rows


def test_the_table_has_a_row_for_each_method_and_arm(bench, result, tmp_path):
    text = bench.table(result)
    assert text.count("| ours | 1 pass |") == 1 and "ours:1" in text
    values = [row["frechet"] for row in result["rows"] if row["method"] == "ours" and row["name"] == "1 pass"]
    assert f"{bench.digits(sum(values) / 2)} ({bench.digits(values[0])}, {bench.digits(values[1])})" in text
    bench.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_nearest_is_the_distance_to_the_nearest(bench):
    real = np.zeros((3, 4, 4, 1), np.uint8)
    real[1], real[2] = 100, 200
    images = np.full((2, 4, 4, 1), 110, np.uint8)
    images[1] = 200
    assert bench.nearest(images, real).tolist() == pytest.approx([10 / 255, 0], abs=1e-5)


def test_stock_solvers_see_the_same_process(bench):
    """DDIM of diffusers on the network without structure is the scheduler's own step with eta 0, times being equal."""
    pipeline = without_structure()
    torch.nn.init.normal_(pipeline.unet.conv_out.weight, std=0.1)
    sampler = bench.StockSampler(pipeline, "DDIMScheduler", {"timestep_spacing": "trailing"}, 5)
    found = sampler(2, torch.Generator().manual_seed(0))
    own = pipeline(2, num_passes=5, eta=0.0, generator=torch.Generator().manual_seed(0), output_type="latent").images
    torch.testing.assert_close(found, 2 * pipeline.scheduler.from_range(own) - 1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("text", ["ours=folder", "ours:x=folder", ":0=folder", "ours:0"])
def test_models_are_named_with_a_seed(bench, text):
    from types import SimpleNamespace

    with pytest.raises(SystemExit, match="METHOD:SEED=FOLDER"):
        bench.parse_models(SimpleNamespace(models=[text]))


def test_heads():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import trajectory_heads
    finally:
        sys.path.remove(str(BENCHMARKS))
    rows = {head: trajectory_heads.run("paper-cifar10", head, 1, 1) for head in ("tied", "lowrank")}
    result = {
        "bench": "trajectory_heads", "runs": 1, "rows": list(rows.values()),
        "parameters": {"paper-cifar10": {"ours": [30.3e6, 41.2e6], "paper": [30.3e6, 41.2e6]}},
        "device": "x", "threads": 1, "load": [0], "versions": {"torch": "2"},
    }  # fmt: skip
    text = trajectory_heads.table(result)
    assert rows["tied"]["parameters"] == 0 and rows["lowrank"]["bytes"] == 200 * 3 * 32 * 32 * 4
    assert "| lowrank |" in text and "+0.0 %" in text
    # What is counted is what the published table says.
    published = json.loads((BENCHMARKS / "results" / "trajectory_heads.json").read_text())["rows"]
    for row in published:
        found = trajectory_heads.cost(row["preset"], row["head"])
        assert found["macs"] == pytest.approx(row["macs"], rel=0.02)
        assert found["parameters"] == pytest.approx(row["parameters"], rel=0.02)


def test_the_recipe_is_a_script_that_names_flags_that_exist():
    from pyrdiff.methods.pixel_aware import PixelAwareSettings

    path = BENCHMARKS / "recipes" / "pixel_aware.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    known = set(PixelAwareSettings.__dataclass_fields__)
    used = set(part.split()[0] for line in text.splitlines() if "arm " in line for part in line.split("--")[1:])
    assert used and used <= known
    assert runpy.run_path(str(BENCHMARKS / "pixel_aware.py"), run_name="x")["PASSES"][0] == 1
