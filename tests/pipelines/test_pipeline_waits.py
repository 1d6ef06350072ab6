"""No step of a pipeline makes the host wait for a GPU, or copies between the two: proved with and without one."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from watches import WATCHES, Watch

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
)

# What a step may wait for, and why.
ALLOWED = {
    # Ends when every image is solved: the applications that this saves cost more than the wait.
    "a noisy input": "parts/operators.py:conjugate_gradients",
    # Diffusers makes a tensor of each of its coefficients.
    "unipc": "parts/steps.py:step",
}
LINEAR = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "dpm-solver++ sde": lambda **more: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **more),
    "deis": DEISMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "euler": EulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}
BLOCKS = dict(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
TINY = dict(**BLOCKS, layers_per_block=1, norm_num_groups=4, image_channels=1, resolutions=(4, 8))
COLORS = {"mean": [0.0], "covariance": [[0.1]]}
RESIDUAL = dict(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8, image_channels=1)
TIMED = dict(norm_num_groups=4, time_embedding_dim=16, num_train_timesteps=20, image_channels=1, sample_size=8)
TRAJECTORY = dict(**TIMED, encoder_channels=(4, 8), layers_per_block=1)
STRUCTURE = dict(**TIMED, block_out_channels=(8,), latent_dim=4, bottleneck_channels=4)


@pytest.fixture(params=WATCHES)
def watch(request) -> type[Watch]:
    return request.param


def each_step(watch: type[Watch], make, call, few: int = 2, more: int = 4) -> Counter:
    """What a call of `more` steps waits for beyond one of `few`, each of a pipeline of its own on the device."""
    waits = []
    for steps in (few, more):
        pipeline = make().to(watch.device)
        pipeline.set_progress_bar_config(disable=True)
        with watch() as device:
            call(pipeline, steps)
        waits.append(device.counted())
    waits[1].subtract(waits[0])
    return Counter({wait: count for wait, count in waits[1].items() if count})


def pyramid(scheduler=DDPMScheduler, colors=None, **changes) -> PyramidalPipeline:
    return PyramidalPipeline(CoordinateUNet2DModel(**TINY, **changes), scheduler(**LINEAR), colors=colors)


def drawn(pipeline: PyramidalPipeline, steps: int, **arguments) -> None:
    pipeline(2, num_inference_steps=steps, refine_steps=steps, output_type="latent", **arguments)


@pytest.mark.parametrize(
    ("parts", "arguments"),
    [
        ({}, dict(box=(0.0, 0.0, 0.5, 0.5))),
        (dict(colors=COLORS), dict(start_strength=0.6)),
        (dict(class_names=("a", "b")), dict(classes=["a", "b"], guidance_scale=2.0)),
    ],
)
def test_a_step_of_the_pyramid(watch, parts, arguments):
    assert each_step(watch, lambda: pyramid(**parts), lambda *run: drawn(*run, **arguments)) == {}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_of_each_scheduler(watch, name):
    waits = each_step(watch, lambda: pyramid(SCHEDULERS[name]), lambda pipeline, steps: drawn(pipeline, 2 * steps - 1))
    assert {wait.place for wait in waits} == {ALLOWED[name] for _ in range(name in ALLOWED)}


def test_generators_draw_where_they_are(watch):
    """Those of the device cost nothing; those of the CPU a copy for each step that draws."""
    for kind, copies in ((watch.device, 0), ("cpu", 4)):
        waits = each_step(
            watch,
            pyramid,
            lambda pipeline, steps, kind=kind: drawn(
                pipeline, steps, generator=[torch.Generator(kind).manual_seed(seed) for seed in range(2)]
            ),
        )
        assert sum(waits.values()) == copies


GUIDED = {
    "projection": dict(),
    "gradient": dict(guidance="gradient"),
    "gradient in windows": dict(guidance="gradient", tile=4, tile_overlap=2),
    "paper": dict(guidance="paper"),
    "none in windows": dict(guidance="none", tile=4),
    "a noisy input": dict(noise_std=0.1),
    "a function": dict(operator=lambda images: F.avg_pool2d(images, 2), guidance="paper"),
}


@pytest.mark.parametrize("name", GUIDED)
def test_a_step_of_guided_super_resolution(watch, name):
    def call(pipeline: GuidedSRPipeline, steps: int) -> None:
        image = torch.full((2, 1, 4, 4), 0.5)
        pipeline(image, scale_factor=2, refine_steps=steps, output_type="latent", **GUIDED[name])

    waits = each_step(watch, lambda: GuidedSRPipeline(CoordinateUNet2DModel(**TINY), DDPMScheduler()), call, 2, 3)
    assert {wait.place for wait in waits} == {ALLOWED[name] for _ in range(name in ALLOWED)}


RESTORED = {
    "own": ({}, {}, dict(num_samples=2, color_fix=True)),
    "learned variance": (dict(out_channels=2), dict(variance_type="learned_range"), {}),
    "windows": (dict(low_res_injection="bicubic"), {}, dict(tile=4)),
    "from a part": (dict(low_res_injection="direct", input_fusion="attention"), {}, dict(strength=0.5, eta=0.0)),
    "ddpm": ({}, {}, dict(plan={"scheduler": ["DDPMScheduler", {}]})),
}


@pytest.mark.parametrize("name", RESTORED)
def test_a_step_of_residual_super_resolution(watch, name):
    unet, process, arguments = RESTORED[name]

    def make() -> ResidualSRPipeline:
        scheduler = CosineResidualScheduler(num_train_timesteps=50, **process)
        return ResidualSRPipeline(ResidualSRUNet2DModel(**RESIDUAL, **unet), scheduler)

    def call(pipeline: ResidualSRPipeline, steps: int) -> None:
        given = {"num_inference_steps": steps, **arguments}
        if "plan" in given:
            given["plan"] = {**given["plan"], "num_inference_steps": given.pop("num_inference_steps")}
        pipeline(torch.full((2, 1, 4, 4), 0.5), scale_factor=2, output_type="latent", **given)

    assert each_step(watch, make, call) == {}


PASSES = {
    "tied": ({}, {}, {}),
    "a trajectory": ({}, {}, dict(return_trajectory=True)),
    "a trajectory of sub-networks": (dict(head="literal", chunk_size=4), {}, dict(return_trajectory=True)),
    "restored": ({}, {}, dict(image=torch.full((2, 1, 8, 8), 0.5), timestep=10)),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_of_pixel_aware_diffusion(watch, name):
    unet, process, arguments = PASSES[name]

    def make() -> ParallelTrajectoryPipeline:
        network, scheduler = ParallelTrajectoryUNet2DModel(**TRAJECTORY, **unet), PixelAwareScheduler(20, **process)
        return ParallelTrajectoryPipeline(network, ScaleAutoencoder(**STRUCTURE, prior="normal"), scheduler)

    def call(pipeline: ParallelTrajectoryPipeline, steps: int) -> None:
        pipeline(2, num_passes=steps, output_type="latent", **arguments)

    assert each_step(watch, make, call) == {}


def test_a_step_of_the_paper_s_algorithm(watch):
    def make() -> ParallelTrajectoryPipeline:
        network = ParallelTrajectoryUNet2DModel(**TRAJECTORY, head="literal", target="noise")
        return ParallelTrajectoryPipeline(
            network, ScaleAutoencoder(**STRUCTURE, output="scale"), PixelAwareScheduler(20, mode="paper")
        )

    def call(pipeline: ParallelTrajectoryPipeline, steps: int) -> None:
        image = torch.full((2, 1, 8, 8), 0.5)
        pipeline(2, image=image, timestep=steps, return_trajectory=True, output_type="latent")

    assert each_step(watch, make, call) == {}
