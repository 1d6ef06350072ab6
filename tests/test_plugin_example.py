"""The example of a third-party plugin, installed for real into a folder that child processes have on their path."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

import pyrdiff
from pyrdiff import CoordinateUNet2DModel

SOURCE = Path(pyrdiff.__file__).parents[1]
EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin"
TRAIN = (
    "train lanczos-pyramid --train_data_dir glyphs --image_channels 1 --resolution 8 16 --preset tiny "
    "--block_out_channels 8 16 32 --train_batch_size 4 --max_train_steps 3 --lr_warmup_steps 1 --eval_batch_size 2 "
    "--mixed_precision no --save_images_steps 3 --lanczos_lobes 4 --output_dir"
)
SAMPLE = """
def sample(pipeline):
    import torch
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipeline(2, num_inference_steps=4, refine_steps=2, generator=generators, output_type="pt").images
"""
WITH_BOTH = f"""{SAMPLE}
import sys, torch, pyrdiff
pipeline = pyrdiff.load(sys.argv[1])
from pyrdiff_lanczos.pipeline_lanczos_pyramid import LanczosPyramidPipeline
again = LanczosPyramidPipeline.from_pretrained(sys.argv[1])
for each in (pipeline, again):
    assert type(each) is LanczosPyramidPipeline and type(each.unet) is pyrdiff.CoordinateUNet2DModel
    assert each.config.lanczos_lobes == 4 and each.scheduler.config.prediction_type == "v_prediction"
assert torch.equal(sample(pipeline), sample(again))
torch.save(sample(pipeline), sys.argv[2])
"""
WITH_NEITHER = f"""{SAMPLE}
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert pipeline.config.lanczos_lobes == 4
torch.save(sample(pipeline), sys.argv[2])
pipeline.save_pretrained(sys.argv[3])
"""
PYRDIFF = "from pyrdiff.cli import main; main()"


def python(code: str, *args, plugins=(), fails=False, without=()) -> subprocess.CompletedProcess:
    """Runs code in a process of its own that has the folders `plugins` on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, plugins)), "ACCELERATE_USE_CPU": "true"}
    done = warm.run(code, *args, env=environment, without=without)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def same_pixels(first: Path, second: Path) -> bool:
    """Weights at another place in memory may change the last bit of a convolution, never a pixel."""
    first, second = torch.load(first), torch.load(second)
    return torch.allclose(first, second, atol=1e-5) and torch.equal((first * 255).round(), (second * 255).round())


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The example as pip installs it."""
    place = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, place / "source", ignore=shutil.ignore_patterns("*.egg-info", "build"))
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", place / "site", source]
    subprocess.run(command, check=True, timeout=900)
    return place / "site"


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """Another plugin, which raises when it is imported."""
    place = tmp_path_factory.mktemp("broken")
    (place / "broken_plugin.py").write_text("raise RuntimeError('half written')\n")
    (place / "broken_plugin-1.0.dist-info").mkdir()
    (place / "broken_plugin-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n"
    )
    (place / "broken_plugin-1.0.dist-info" / "entry_points.txt").write_text(
        "[pyrdiff.methods]\nbroken = broken_plugin:METHOD\n"
    )
    return place


@pytest.fixture(scope="module")
def trained(installed, broken, tmp_path_factory) -> Path:
    """The folder of a run of 3 steps, trained with the broken plugin beside."""
    run = tmp_path_factory.mktemp("run") / "lanczos"
    done = python(PYRDIFF, *TRAIN.split(), run, "--json", plugins=(installed, broken))
    assert json.loads(done.stdout) == {"pipeline": str(run / "pipeline")}
    return run


@pytest.fixture(scope="module")
def pipeline_class(installed) -> type:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(installed)
        return importlib.import_module("pyrdiff_lanczos.pipeline_lanczos_pyramid").LanczosPyramidPipeline


@pytest.fixture
def unet() -> CoordinateUNet2DModel:
    torch.manual_seed(0)
    return CoordinateUNet2DModel.from_preset(
        "tiny", image_channels=1, resolutions=(8, (8, 16)), block_out_channels=(8, 16, 32)
    )


# The up-sampler.


@pytest.mark.parametrize("low, high", [(1, 4), (5, 5), (7, 16), (16, 32), (16, 41)])
@pytest.mark.parametrize("lobes", [1, 2, 3, 5])
def test_constants_stay(pipeline_class, low, high, lobes):
    matrix = pipeline_class.lanczos_matrix(low, high, lobes)
    assert matrix.shape == (high, low)
    torch.testing.assert_close(matrix.sum(1), torch.ones(high, dtype=torch.float64), rtol=0, atol=1e-14)
    images = torch.full((2, 3, low, low), 0.7)
    torch.testing.assert_close(pipeline_class.enlarge(images, (high, high), lobes), torch.full((2, 3, high, high), 0.7))


def test_the_same_size_changes_nothing(pipeline_class):
    torch.testing.assert_close(
        pipeline_class.lanczos_matrix(9, 9), torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("lobes, tolerance", [(2, 0.015), (3, 0.006), (4, 0.005)])
@pytest.mark.parametrize("high", [64, 80])
def test_a_cosine_of_an_eighth_of_the_sampling_rate_is_kept(pipeline_class, high, lobes, tolerance):
    """Four periods on 32 samples. At the borders, where the kernel is cut off, it is not."""
    low, border = 32, math.ceil(lobes * high / 32)

    def cosine(count: int) -> torch.Tensor:
        return torch.cos(2 * math.pi * 4 * (torch.arange(count, dtype=torch.float64) + 0.5) / count)

    error = (pipeline_class.lanczos_matrix(low, high, lobes) @ cosine(low) - cosine(high)).abs()
    assert error[border:-border].max() < tolerance


def test_it_is_pillows_lanczos(pipeline_class):
    images = torch.rand(2, 1, 9, 13, generator=torch.Generator().manual_seed(0))
    enlarged = pipeline_class.enlarge(images, (20, 31))
    for image, ours in zip(images[:, 0], enlarged[:, 0], strict=True):
        theirs = Image.fromarray(image.numpy()).resize((31, 20), Image.Resampling.LANCZOS)
        assert theirs.mode == "F" and np.abs(np.asarray(theirs) - ours.numpy()).max() < 1e-6


def test_it_does_not_shrink(pipeline_class):
    with pytest.raises(ValueError, match="low=8, high=7: expected 1 <= low <= high"):
        pipeline_class.lanczos_matrix(8, 7)


# The pipeline.


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_any_scheduler_and_image_by_image_the_same(pipeline_class, unet, scheduler):
    pipeline = pipeline_class(unet, scheduler(prediction_type="v_prediction"))
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    unet.register_forward_pre_hook(lambda module, inputs: calls.append(tuple(inputs[0].shape[-2:])))

    def sample(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments = dict(num_inference_steps=6, refine_steps=3, output_type="latent", return_levels=True)
        return pipeline(len(seeds), generator=generators, **arguments)

    both = sample(0, 1)
    per_step = (5, 3) if pipeline.scheduler.order == 2 else (6, 3)  # two calls a step but for the last
    assert calls == [(8, 8)] * per_step[0] + [(8, 16)] * per_step[1] and pipeline.num_timesteps == len(calls)
    assert [level.shape for level in both.levels] == [(2, 1, 8, 8), (2, 1, 8, 16)]
    assert both.images.isfinite().all() and torch.equal(both.images, both.levels[-1])
    torch.testing.assert_close(both.images[1:], sample(1).images, rtol=1e-4, atol=1e-4)


def test_a_level_starts_from_the_enlarged_one_at_its_strength(pipeline_class, unet):
    """The first sample of a higher level is the enlarged one (here made constant) with the noise of its time."""
    pipeline = pipeline_class(unet, DDIMScheduler(prediction_type="sample"), lanczos_lobes=2)
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"]) + 0.25} if step == 1 else {}

    arguments = dict(num_inference_steps=2, refine_steps=3, refine_strength=0.03, output_type="latent")
    inputs = []
    unet.register_forward_pre_hook(lambda module, values: inputs.append(values[0]))
    pipeline(generator=torch.Generator().manual_seed(0), callback_on_step_end=look, **arguments)
    assert seen == [(0, 500), (1, 0), (2, 30), (3, 15), (4, 0)]
    alpha = pipeline.scheduler.alphas_cumprod[30]
    noise = (inputs[2] - alpha.sqrt() * 0.25) / (1 - alpha).sqrt()
    assert 0.8 < noise.std() < 1.2 and noise.mean().abs() < 0.4


def test_outputs_and_interruption(pipeline_class, unet):
    pipeline = pipeline_class(unet, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    arguments = dict(batch_size=2, num_inference_steps=2, refine_steps=2)
    assert pipeline(**arguments).images[0].size == (16, 8)
    images, levels = pipeline(**arguments, output_type="np", return_dict=False)
    assert images.shape == (2, 8, 16, 1) and 0 <= images.min() <= images.max() <= 1 and levels is None

    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = True
        return tensors

    stopped = pipeline(**arguments, output_type="pt", return_levels=True, callback_on_step_end=stop)
    assert [level.shape for level in stopped.levels] == [(2, 1, 8, 8)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"resolutions": [16, 8]}, r"resolutions=\[16, 8\]: expected each level to be larger"),
        ({"resolutions": [10]}, "multiples of 4"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: expected at most 1000"),
        ({"refine_steps": 2.5}, "refine_steps=2.5: expected a whole number"),
        ({"refine_strength": 0}, r"refine_strength=0: expected a number in \(0, 1\]"),
        ({"generator": [torch.Generator()] * 2}, "generator has 2 entries"),
        ({"output_type": "tiff"}, "output_type='tiff'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_bad_arguments(pipeline_class, unet, arguments, message):
    unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran before the arguments were checked"))
    with pytest.raises(ValueError, match=message):
        pipeline_class(unet, DDPMScheduler())(**arguments)


def test_bad_lobes(pipeline_class, unet, installed):
    with pytest.raises(ValueError, match="lanczos_lobes=0: expected a whole number from 1 up"):
        pipeline_class(unet, DDPMScheduler(), lanczos_lobes=0)
    done = python(PYRDIFF, *TRAIN.split(), "/nowhere", "--lanczos_lobes", 0, plugins=[installed], fails=True)
    assert done.returncode == 2 and done.stderr == "error: lanczos_lobes=0: expected 1 or more\n"


# Installed, trained, loaded.


def test_it_is_listed_and_a_broken_one_beside_it_harms_none(installed, broken):
    done = python(PYRDIFF, "plugins", "--json", plugins=[installed, broken], fails=True)
    rows = {row["name"]: row for row in json.loads(done.stdout)["plugins"]}
    row = rows["lanczos_pyramid"]
    assert (row["package"], row["version"], row["module"]) == ("pyrdiff-lanczos", "0.1.0", "pyrdiff_lanczos.method")
    assert row["classes"] == ["CoordinateUNet2DModel", "LanczosPyramidPipeline"]
    assert rows["broken"]["error"] == "RuntimeError: half written"
    assert [name for name, row in rows.items() if row["error"]] == ["broken"] and "pddpm" in rows
    assert "lanczos_pyramid" in done.stderr and "pyrdiff-lanczos 0.1.0" in done.stderr  # beside --json


def test_listing_its_flags_does_not_import_torch(installed):
    code = "import sys; from pyrdiff.plugins import find; assert find('lanczos-pyramid').settings; "
    command = [sys.executable, "-c", code + "assert 'torch' not in sys.modules"]  # a real interpreter: see warm.py
    folders = os.pathsep.join([str(SOURCE), str(installed)])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": folders})


def test_training_writes_settings_samples_and_a_folder_that_stands_alone(trained):
    settings = json.loads((trained / "settings.json").read_text())
    assert settings["lanczos_lobes"] == 4 and settings["prediction_type"] == "v_prediction"
    assert (trained / "samples" / "step-0000003.png").is_file()
    losses = [json.loads(line)["loss"] for line in (trained / "log.jsonl").read_text().splitlines()]
    assert losses and all(map(math.isfinite, losses))
    index = json.loads((trained / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_lanczos_pyramid", "LanczosPyramidPipeline"]
    assert index["unet"] == ["unet_coordinate", "CoordinateUNet2DModel"] and index["lanczos_lobes"] == 4
    assert "It draws images of the kind" in (trained / "pipeline" / "README.md").read_text()  # the method's limits


def test_loading_and_sampling_run_no_code_of_the_folder_and_give_the_pixels_of_a_process_without_both(
    trained, installed, broken, tmp_path
):
    neither = ["pyrdiff", "pyrdiff_lanczos"]
    python(WITH_NEITHER, trained / "pipeline", tmp_path / "without.pt", tmp_path / "again", without=neither)
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(trained.parent) not in path.read_text()
    folder = tmp_path / "again"  # what that process saved
    for source in folder.rglob("*.py"):
        source.write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n" + source.read_text())
    assert len(list(folder.rglob("*.py"))) == 2
    python(WITH_BOTH, folder, tmp_path / "with.pt", plugins=[installed, broken])
    assert same_pixels(tmp_path / "with.pt", tmp_path / "without.pt")

    flags = "--num_images 2 --num_inference_steps 4 --refine_steps 2 --device cpu"
    python(
        PYRDIFF, "sample", "--model", folder, "--output_dir", tmp_path / "drawn", *flags.split(), plugins=[installed]
    )
    for seed, image in enumerate(torch.load(tmp_path / "with.pt")[:, 0]):
        drawn = np.asarray(Image.open(tmp_path / "drawn" / f"{seed:05d}.png"))
        np.testing.assert_array_equal(drawn, (image.numpy() * 255).round())
    assert not (tmp_path / "canary").exists()


@pytest.mark.skipif(
    any(each.metadata["Name"] == "pyrdiff-lanczos" for each in distributions()), reason="the example is installed here"
)
def test_uninstalled_loading_says_so(trained):
    message = "_class_name is 'LanczosPyramidPipeline'; expected a pipeline of an installed method"
    with pytest.raises(ValueError, match=message):
        pyrdiff.load(trained / "pipeline")
