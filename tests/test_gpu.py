"""What only a GPU can show: `pytest -m gpu`, which `benchmarks/gpu.sh` runs first."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

import pyrdiff
from pyrdiff import (
    CoordinateUNet2DModel,
    CosineResidualScheduler,
    GuidedSRPipeline,
    ParallelTrajectoryPipeline,
    ParallelTrajectoryUNet2DModel,
    PixelAwareScheduler,
    PyramidalPipeline,
    ResidualSRPipeline,
    ResidualSRUNet2DModel,
    ScaleAutoencoder,
    plugins,
)
from pyrdiff.machine import ALLOCATOR, open_device
from pyrdiff.parts.windows import Tiling, WindowedNetwork
from pyrdiff.training.loop import prepare, train

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = dict(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
TINY = dict(**BLOCKS, layers_per_block=1, norm_num_groups=4, image_channels=1, resolutions=(4, 8))
RESIDUAL = dict(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8, image_channels=1)
TIMED = dict(norm_num_groups=4, time_embedding_dim=16, num_train_timesteps=20, image_channels=1, sample_size=8)
STRUCTURE = dict(**TIMED, block_out_channels=(8,), latent_dim=4, bottleneck_channels=4, prior="normal")
PYRAMID = dict(preset="tiny", resolution=("8", "16"), block_out_channels=(8, 16, 32))
RESTORER = dict(preset="mini", resolution=("16",), block_out_channels=(32, 32), ddpm_num_steps=20)
PIXELS = dict(
    preset="tiny", resolution=("8",), encoder_channels=(8, 16), latent_dim=4, num_train_timesteps=20, prior="normal",
    autoencoder_steps=6,
)  # fmt: skip
METHODS = {"pddpm": PYRAMID, "sr": RESTORER, "pixel_aware": PIXELS}


def image() -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def pixel_aware() -> ParallelTrajectoryPipeline:
    unet = ParallelTrajectoryUNet2DModel(**TIMED, encoder_channels=(4, 8), layers_per_block=1, head="literal")
    torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
    return ParallelTrajectoryPipeline(unet, ScaleAutoencoder(**STRUCTURE), PixelAwareScheduler(20))


PIPELINES = {
    "pyramid": (
        lambda: PyramidalPipeline(CoordinateUNet2DModel(**TINY), DPMSolverMultistepScheduler()),
        lambda: dict(batch_size=2, num_inference_steps=4, refine_steps=3),
    ),
    "guided by projection": (
        lambda: GuidedSRPipeline(CoordinateUNet2DModel(**TINY), DDPMScheduler()),
        lambda: dict(image=image(), scale_factor=2, refine_steps=4, hard_consistency=True),
    ),
    "guided by gradient, in windows": (
        lambda: GuidedSRPipeline(CoordinateUNet2DModel(**TINY), DPMSolverMultistepScheduler()),
        lambda: dict(image=image(), scale_factor=2, refine_steps=4, guidance="gradient", tile=4, tile_overlap=2),
    ),
    "residual": (
        lambda: ResidualSRPipeline(ResidualSRUNet2DModel(**RESIDUAL), CosineResidualScheduler(50)),
        lambda: dict(image=image(), scale_factor=2, num_inference_steps=5),
    ),
    "pixel-aware": (pixel_aware, lambda: dict(batch_size=2, num_passes=3, return_trajectory=True)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_gives_on_a_gpu_what_it_gives_on_the_cpu(name, dtype):
    make, arguments = PIPELINES[name]
    torch.manual_seed(0)
    pipeline, images = make(), {}
    pipeline.to(dtype).set_progress_bar_config(disable=True)
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(3)
        output = pipeline.to(device)(**arguments(), generator=generator, output_type="latent")
        images[device] = output.images.cpu()
        assert output.images.device.type == device
    distance = (images["cuda"] - images["cpu"]).abs().max() / images["cpu"].abs().max().clamp(min=1)
    assert images["cuda"].isfinite().all()
    # Convolutions are in TF32, of 10 bits, unless the network has fewer.
    assert distance <= 16 * max(torch.finfo(dtype).eps, 2**-10)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8))
    return str(path)


def settings_of(name: str, data: str, folder: Path, **flags):
    given = dict(train_data_dir=data, output_dir=str(folder), train_batch_size=4, max_train_steps=12, lr_warmup_steps=2)
    return plugins.find(name).settings(
        **{**given, "save_images_steps": 0, "logging_steps": 1, **METHODS[name], **flags}
    )


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_training_ends_with_a_model_that_loads(name, precision, data, tmp_path):
    method = plugins.find(name)
    folder = train(method, settings_of(name, data, tmp_path / "run", mixed_precision=precision))
    losses = [json.loads(line).get("loss", 0.0) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all() and len(losses) >= 12
    for device in ("cpu", "cuda"):
        pipeline = pyrdiff.load(folder).to(device)
        given = dict(image=torch.full((1, 3, 4, 4), 0.5)) if name == "sr" else {}
        assert len(pipeline(**given).images) == 1


def test_a_training_resumes_and_steps_are_checked_late(data, tmp_path):
    flags = dict(mixed_precision="no", checkpointing_steps=4)
    for total, begins in ((4, 0), (8, 4)):
        run = prepare(plugins.find("pddpm"), settings_of("pddpm", data, tmp_path, max_train_steps=total, **flags))
        assert run.step == begins and run.checks_late and run.accelerator.device.type == "cuda"
        assert next(run.learner.network.parameters()).is_cuda and run.learner.adamw.defaults["fused"]
        run.fit()
        run.close()


def test_compiled_steps(data, tmp_path):
    settings = settings_of("pddpm", data, tmp_path, compile=True, mixed_precision="bf16", max_train_steps=6)
    assert (train(plugins.find("pddpm"), settings) / "model_index.json").is_file()


def test_windows_are_halved_when_the_memory_of_the_gpu_runs_out():
    sizes = []

    def network(sample, time, condition):
        sizes.append(sample.shape[-1])
        if sample.shape[-1] > 16:
            torch.empty(2**45, dtype=torch.uint8, device="cuda")
        return sample

    sample = torch.randn(1, 1, 64, 64, device="cuda")
    windowed = WindowedNetwork(network, 2, Tiling(64, 16))
    torch.testing.assert_close(windowed.predict(sample, torch.tensor(0), sample), sample)
    assert sizes[0] == 64 and sizes[-1] == 16


def test_memory_grows_in_segments():
    assert open_device("cuda").type == "cuda"
    assert any("expandable_segments" in os.environ.get(name, "") for name in ALLOCATOR)
