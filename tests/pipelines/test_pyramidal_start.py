"""Where the levels of a pyramid may start: at the lowest in the colours of the data, above within the noise window."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from pyrdiff import CoordinateUNet2DModel, GuidedSRPipeline, PyramidalPipeline
from pyrdiff.data import color_statistics
from pyrdiff.methods.pddpm import plans, start_strength
from pyrdiff.plan import measure_costs

COLORS = {"mean": [0.2, -0.1, 0.0], "covariance": [[0.04, 0.01, 0.0], [0.01, 0.02, 0.01], [0.0, 0.01, 0.03]]}


def network(**changes) -> CoordinateUNet2DModel:
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, block_out_channels=(8, 8))
    return CoordinateUNet2DModel(
        **{**blocks, "layers_per_block": 1, "norm_num_groups": 4, "resolutions": (4, 8, 16), **changes}
    ).eval()


def pyramid(scheduler=None, colors=COLORS, **changes) -> PyramidalPipeline:
    pipeline = PyramidalPipeline(network(**changes), scheduler or DDPMScheduler(), colors=colors)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def first_inputs(pipeline, count: int, **arguments) -> torch.Tensor:
    """What the network sees first, float64."""
    seen = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0].double()))
    pipeline(count, generator=torch.Generator().manual_seed(3), output_type="latent", **arguments)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_the_start_is_the_colours_of_the_data_noised(scheduler):
    """Images of one colour N(m, S), noised: mean a m; over a pixel a² S + s², over an image a² S + s² / pixels."""
    pipeline = pyramid(scheduler())
    seen = first_inputs(pipeline, 6000, resolutions=[4], num_inference_steps=3, start_strength=0.3)
    time = pipeline.plan(resolutions=[4], num_inference_steps=3, start_strength=0.3).levels[0].timesteps[0]
    assert 200 <= time <= 300
    signal = pipeline.scheduler.alphas_cumprod[int(time)].double()
    covariance = signal * torch.tensor(COLORS["covariance"]).double()
    assert seen.mean((0, 2, 3)).numpy() == pytest.approx(signal.sqrt() * np.array(COLORS["mean"]), abs=0.015)
    whole, pixel = torch.cov(seen.mean((2, 3)).T), torch.cov(seen[:, :, 1, 2].T)
    assert torch.allclose(whole, covariance + (1 - signal) / 16 * torch.eye(3), atol=0.006)
    assert torch.allclose(pixel, covariance + (1 - signal) * torch.eye(3), atol=0.04)


def test_all_noise_is_as_without_colours():
    arguments = dict(num_inference_steps=3, refine_steps=2, output_type="latent")
    images = [
        pyramid(colors=colors)(2, generator=torch.Generator().manual_seed(0), **arguments).images
        for colors in (None, COLORS)
    ]
    assert torch.equal(*images)


def test_an_image_does_not_depend_on_its_batch():
    def draw(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments = dict(num_inference_steps=3, refine_steps=2, start_strength=0.5, output_type="latent")
        return pyramid()(len(seeds), generator=generators, **arguments).images

    assert torch.allclose(draw(5, 6, 7)[1:2], draw(6), atol=1e-5)


def test_a_scheduler_that_counts_noise_on_another_scale():
    linear = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    arguments = dict(resolutions=[4], num_inference_steps=5, start_strength=0.5)
    seen = first_inputs(pyramid(HeunDiscreteScheduler(**linear)), 2000, **arguments)
    assert seen.std().item() == pytest.approx(1, abs=0.1)  # scaled for the network


def test_the_colours_of_images():
    pixels = np.random.default_rng(0).integers(0, 256, (700, 4, 4, 3), dtype=np.uint8)  # more than one chunk
    found = color_statistics(pixels)
    means = pixels.mean((1, 2)) / 127.5 - 1
    assert np.allclose(found["mean"], means.mean(0), atol=1e-6)
    assert np.allclose(found["covariance"], np.cov(means.T), atol=1e-6)
    pyramid(colors=found)
    pyramid(colors=color_statistics(np.repeat(pixels[..., :1], 3, 3)))  # gray images in colour: of rank 1
    assert color_statistics(pixels[:1])["covariance"] == [[0.0] * 3] * 3


def test_the_start_of_larger_images_is_at_more_noise():
    signal = DDPMScheduler().alphas_cumprod.tolist()
    starts = [start_strength(signal, (side, side)) for side in (8, 16, 32, 64)]
    assert starts == sorted(starts) and starts[:2] == [0.55, 0.55], "what was measured, and no less"
    for side, start in zip((16, 32, 64), starts[1:], strict=True):
        assert signal[round(1000 * start)] * side**2 == pytest.approx(11.7, rel=0.05), "as much of the mean is left"
    assert start_strength([0.9] * 100, (16, 16)) == 1.0, "a process that leaves more than that everywhere"


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize(("steps", "window"), [(1000, 0.35), (100, 0.35), (1000, 0.1), (1000, 1.0)])
def test_the_plans_of_a_training_run_within_its_window(levels, steps, window):
    unet = network(resolutions=tuple(4 * 2**level for level in range(levels)), noise_window=window)
    named = plans(steps, levels, 0.6, window)
    pipeline = PyramidalPipeline(unet, DDPMScheduler(steps), plans=named, colors=COLORS)
    for name in named:
        plan = pipeline.plan(plan=name)
        assert len(plan.levels) == levels
        assert all(level.timesteps[0] <= min(window, 0.35) * steps for level in plan.levels[1:])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(refine_strength=0.4), "noise_window=0.35: the level 8x8 would start from time 400"),
        (dict(refine_strength=[0.3, 0.4]), "noise_window=0.35: the level 16x16 would start"),
        (dict(resolutions=[16]), "noise_window=0.35: the level 16x16 would start from time 9"),
        (dict(resolutions=[8, 16], start_strength=0.5), "noise_window=0.35: the level 8x8"),
        (dict(spacing=[[999, 500], [400, 100], [100]]), "noise_window=0.35: the level 8x8 would start from time 400"),
        (dict(box=(0, 0, 0.5, 0.5)), "noise_window=0.35: the level 4x4 would start from time 9"),
        (dict(start_strength=0.0), r"start_strength=0.0: expected a number in \(0, 1\]"),
    ],
)
def test_calls_beyond_the_window_are_refused_before_any_work(arguments, named):
    pipeline, calls = pyramid(DPMSolverMultistepScheduler(), noise_window=0.35), []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=named):
        pipeline(1, **{"num_inference_steps": 3, "refine_steps": 2, **arguments})
    if "box" not in arguments:
        with pytest.raises(ValueError, match=named):
            pipeline.plan(**{"num_inference_steps": 3, "refine_steps": 2, **arguments})
    assert not calls


def test_guided_enlarging_keeps_to_the_window():
    pipeline = GuidedSRPipeline(network(noise_window=0.35), DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 4, 4)
    pipeline(image, scale_factor=2, refine_steps=2)
    with pytest.raises(ValueError, match="noise_window=0.35: the level 8x8 would start from time"):
        pipeline(image, scale_factor=2, refine_steps=2, refine_strength=0.5)


def test_the_steps_of_a_network_with_a_window_can_be_timed():
    pipeline = pyramid(noise_window=0.35)
    costs = measure_costs(pipeline, 1, steps=3, rounds=1)
    assert set(costs.seconds["DDPMScheduler()"]) == {"4x4", "8x8", "16x16"}
    with pytest.raises(ValueError, match="noise_window"):
        pipeline.plan(resolutions=[16])


@pytest.mark.parametrize(
    ("colors", "arguments", "named"),
    [
        (None, dict(start_strength=0.5), "start_strength=0.5: expected 1.0, since this pipeline carries no `colors`"),
        ({"mean": [0.0], "covariance": [[1.0]]}, {}, r"colors=.*: expected the mean \[3\]"),
        ({**COLORS, "covariance": (-np.eye(3)).tolist()}, {}, "colors="),
        ({**COLORS, "covariance": [[1, 0, 0], [1, 1, 0], [0, 0, 1]]}, {}, "colors="),
        ({"mean": [0.0] * 3}, {}, "colors="),
    ],
)
def test_bad_colours(colors, arguments, named):
    with pytest.raises(ValueError, match=named):
        pyramid(colors=colors)(1, num_inference_steps=2, **arguments)
