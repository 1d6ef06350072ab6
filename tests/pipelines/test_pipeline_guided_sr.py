import functools
import inspect
import math
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from oracles import GaussianNoisePredictor, GaussianPosterior

import pyrdiff
from pyrdiff import CoordinateUNet2DModel, GuidedSRPipeline, PyramidalPipeline
from pyrdiff.parts.operators import CallableOperator, SeparableOperator
from pyrdiff.parts.steps import lay_out_steps

LINEAR = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
SCHEDULERS = {
    "ddpm": lambda: DDPMScheduler(),
    "ddim": lambda: DDIMScheduler(),
    "dpm-solver++": lambda: DPMSolverMultistepScheduler(),
    "dpm-solver++ sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "unipc": lambda: UniPCMultistepScheduler(),
    "deis": lambda: DEISMultistepScheduler(),
    "heun": lambda: HeunDiscreteScheduler(**LINEAR),
    "euler": lambda: EulerDiscreteScheduler(**LINEAR),
}
TINY = dict(
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
POWER = 0.00664  # so that the standard deviation of an image is 0.3, that of the posterior 0.145
GUIDANCES = ("projection", "gradient", "paper", "none")


def network(seed: int = 0, **changes) -> CoordinateUNet2DModel:
    torch.manual_seed(seed)
    return CoordinateUNet2DModel(**{**TINY, "resolutions": (4, 8, 16), "image_channels": 1, **changes}).eval()


def quiet(unet=None, scheduler=None) -> GuidedSRPipeline:
    pipeline = GuidedSRPipeline(network() if unet is None else unet, scheduler or DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def pictures(*shape, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def soft(*shape) -> torch.Tensor:
    """Far enough from black and white for every detail to fit."""
    return 0.4 + 0.2 * pictures(*shape)


# Operators


def dense(operator: SeparableOperator, side: int) -> torch.Tensor:
    """The matrix [small, side] of its rows, for images of one column."""
    return operator.A(torch.eye(side).double()[:, None, :, None])[:, 0, :, 0].mT


@pytest.mark.parametrize(
    "large, small", [((16, 16), (4, 4)), ((12, 18), (8, 12)), ((15, 21), (5, 7)), ((9, 9), (9, 9))]
)
def test_bicubic_and_lanczos_are_those_of_pillow(large, small):
    image = pictures(1, 1, *large)
    for name, filter in (("bicubic", PIL.Image.BICUBIC), ("lanczos", PIL.Image.LANCZOS)):
        ours = SeparableOperator.named(name, large, small, 1).A(image)[0, 0]
        theirs = PIL.Image.fromarray(image[0, 0].numpy()).resize(small[::-1], filter)
        torch.testing.assert_close(ours, torch.from_numpy(np.array(theirs)), atol=2e-6, rtol=0)


def test_matlab_bicubic_differs_at_the_border_only_where_it_mirrors():
    image = pictures(1, 1, 32, 32)
    pillow = SeparableOperator.named("bicubic", (32, 32), (8, 8), 1).A(image)
    matlab = SeparableOperator.named("bicubic_matlab", (32, 32), (8, 8), 1).A(image)
    torch.testing.assert_close(matlab[..., 2:-2, 2:-2], pillow[..., 2:-2, 2:-2], atol=1e-6, rtol=0)
    assert (matlab - pillow).abs().max() > 1e-3
    mirrored = torch.cat((image.flip(-1), image, image.flip(-1)), -1)
    mirrored = torch.cat((mirrored.flip(-2), mirrored, mirrored.flip(-2)), -2)
    inside = SeparableOperator.named("bicubic", (96, 96), (24, 24), 1).A(mirrored)[..., 8:16, 8:16]
    torch.testing.assert_close(matlab, inside, atol=1e-6, rtol=0)


def test_area_is_average_pooling_and_gray_is_luma():
    image = pictures(2, 3, 12, 12)
    area = SeparableOperator.named("area", (12, 12), (4, 4), 3).A(image)
    torch.testing.assert_close(area, F.avg_pool2d(image, 3), atol=1e-6, rtol=0)
    uneven = dense(SeparableOperator.named("area", (3, 1), (2, 1), 1), 3)
    torch.testing.assert_close(uneven, torch.tensor([[2.0, 1, 0], [0, 1, 2]]).double() / 3)
    gray = SeparableOperator.named("gray", (12, 12), (12, 12), 3).A(image)
    weights = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(gray[:, 0], torch.einsum("bchw,c->bhw", image, weights), atol=1e-6, rtol=0)


def test_gaussian_blurs_by_two_fifths_of_a_small_pixel():
    row = dense(SeparableOperator.named("gaussian", (64, 1), (16, 1), 1), 64)[8]
    places = torch.arange(64).double() + 0.5
    assert abs((row * places).sum() - 34) < 1e-9
    spread = (row * (places - 34) ** 2).sum().sqrt()
    assert abs(spread - 1.6) < 0.01


@pytest.mark.parametrize("name", SeparableOperator.NAMES)
@pytest.mark.parametrize("large, small", [((16, 16), (4, 4)), ((12, 18), (8, 12))])
def test_operators_invert_and_transpose(name, large, small):
    operator = SeparableOperator.named(name, large, small, 3)
    image, measured = pictures(2, 3, *large).double(), operator.A(pictures(2, 3, *large, seed=1).double())
    inner = (operator.A(image) * measured).sum(), (image * operator.adjoint(measured)).sum()
    torch.testing.assert_close(*inner, rtol=1e-12, atol=0)
    torch.testing.assert_close(operator.A(operator.correction(measured)), measured, rtol=1e-8, atol=1e-8)
    slow = CallableOperator(operator.A, (3, *large))
    torch.testing.assert_close(slow.adjoint(measured), operator.adjoint(measured), rtol=1e-10, atol=1e-12)
    for ridge in (0.0, 0.1):
        torch.testing.assert_close(
            slow.correction(measured, ridge), operator.correction(measured, ridge), atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("name", ["bicubic", "bicubic_matlab", "lanczos"])
@pytest.mark.parametrize("large, small", [(1400, 700), (880, 587), (612, 600)])
def test_long_sides_are_the_dense_matrices(name, large, small):
    """Sides of several blocks: A, A^T and both inverses against one dense matrix."""
    operator = SeparableOperator.named(name, (large, 1), (small, 1), 1)
    matrix = dense(operator, large)
    measured = pictures(1, 1, small, 1).double()
    torch.testing.assert_close(operator.adjoint(measured), matrix.mT @ measured, rtol=0, atol=1e-12)
    for ridge in (0.0, 0.05):
        gram = matrix @ matrix.mT + ridge * torch.eye(small).double()
        expected = matrix.mT @ torch.linalg.solve(gram, measured)
        torch.testing.assert_close(operator.correction(measured, ridge), expected, rtol=0, atol=1e-6)


def test_an_operator_grows_with_the_side_of_the_image_and_not_with_its_square():
    def numbers(side: int) -> int:
        operator = SeparableOperator.named("bicubic", (16, 4 * side), (4, side), 3)
        return sum(block.weights.numel() for one in operator.matrices + operator.inverses for block in one.blocks)

    assert numbers(3000) < 2.1 * numbers(1500) and numbers(3000) < 6e6  # dense: 45 million


# The method


@pytest.mark.parametrize("spacing", ["scheduler", "log_snr"])
@pytest.mark.parametrize("guidance, error", [("projection", 0.02), ("gradient", 0.0125)])
def test_samples_of_gaussian_images_are_those_of_the_posterior(guidance, error, spacing):
    """8 calls a level, 8 -> 16 -> 32 by means: mean and spread of the samples against the closed form."""
    oracle = GaussianPosterior(factor=4, images=4, seed=0, power=POWER)
    pipeline = quiet(GaussianNoisePredictor(power=POWER, means_of=32), SCHEDULERS["dpm-solver++ sde"]())
    samples = 48
    measured = oracle.measured.repeat_interleave(samples, 0) / 2 + 0.5
    arguments = dict(spacing=spacing, refine_strength=0.2, operator="area", clip_sample=False, output_type="latent")
    generator = torch.Generator().manual_seed(1)
    output = pipeline(measured, guidance=guidance, generator=generator, **arguments)
    images = output.images.double().reshape(4, samples, 32, 32)
    variance = images.var(1).mean()
    off = ((images.mean(1) - oracle.mean).square().mean() - variance / samples).clamp(min=0).sqrt()
    assert off < error
    assert 0.88 < variance.sqrt() / oracle.spread < 1.06
    assert output.consistency.max() < 1 / 255
    if spacing == "scheduler":
        return
    short = pipeline(measured, guidance=guidance, generator=generator, refine_steps=5, **arguments)
    spread = short.images.double().reshape(4, samples, 32, 32).var(1).mean().sqrt()
    assert 0.9 < spread / oracle.spread < 1.1


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_the_weighted_gradient_is_its_formula(noise_std):
    """One step on Gaussian images: x0 + J^T A^T (A A^T + (sigma / r)^2)^-1 (y - A x0) / sqrt(alpha_bar)."""
    torch.manual_seed(0)
    pipeline = quiet(GaussianNoisePredictor(), DDIMScheduler(timestep_spacing="trailing"))
    seen = {}

    def look(pipe, step, timestep, tensors):
        seen[step] = tensors["latents"]
        return {}

    measured = pictures(1, 1, 8, 8)
    pipeline(
        measured,
        4,
        [32],
        1,
        0.3,
        guidance="gradient",
        noise_std=noise_std,
        clip_sample=False,
        operator="area",
        generator=generators(1),
        callback_on_step_end=look,
        output_type="latent",
    )
    # one call ends on the guided estimate
    scheduler = pipeline.scheduler
    time = int(pipeline.plan(8, 4, [32], 1)[0].timesteps[0])
    alpha = scheduler.alphas_cumprod[time].double()
    noise = torch.randn(1, 1, 32, 32, generator=generators(1)[0])
    start = F.interpolate(2 * measured - 1, (32, 32), mode="bicubic")
    sample = (alpha.sqrt() * start + (1 - alpha).sqrt() * noise).double()
    predict = GaussianNoisePredictor()
    clean = (sample - (1 - alpha).sqrt() * predict(sample, time)[0]) / alpha.sqrt()
    residual = 2 * measured.double() - 1 - F.avg_pool2d(clean, 4)
    ridge = (2 * noise_std) ** 2 / (1 - alpha)  # of the [-1, 1] range; A A^T = 1/16
    up = residual.repeat_interleave(4, -1).repeat_interleave(4, -2) / 16 / (1 / 16 + ridge)
    jacobian = (up - (1 - alpha).sqrt() * predict(up, time)[0]) / alpha.sqrt()  # linear and symmetric
    torch.testing.assert_close(seen[0].double(), clean + jacobian / alpha.sqrt(), atol=2e-4, rtol=0)


def test_the_printed_form_is_eq_10():
    pipeline, measured, found = quiet(), pictures(1, 1, 4, 4), []
    keep = lambda pipe, step, timestep, tensors: found.append(tensors["latents"]) or {}  # noqa: E731
    arguments = dict(resolutions=[8], refine_steps=4, clip_sample=False, callback_on_step_end=keep, scale_factor=2)
    pipeline(measured, guidance="none", generator=generators(1), **arguments)
    plain = found[0]
    found.clear()
    pipeline(measured, guidance="paper", guidance_scale=0.25, generator=generators(1), **arguments)
    time = int(pipeline.plan(4, 2, [8], 4)[0].timesteps[0])
    alpha = pipeline.scheduler.alphas_cumprod[time]
    noise = torch.randn(1, 1, 8, 8, generator=generators(1)[0])
    start = F.interpolate(2 * measured - 1, (8, 8), mode="bicubic")
    sample = (alpha.sqrt() * start + (1 - alpha).sqrt() * noise).requires_grad_()
    clean = (sample - (1 - alpha).sqrt() * pipeline.unet(sample, time)[0]) / alpha.sqrt()  # eq. 9
    down = SeparableOperator.named("bicubic", (8, 8), (4, 4), 1)
    (gradient,) = torch.autograd.grad((down.A(clean) - (2 * measured - 1)).square().sum(), sample)
    torch.testing.assert_close(found[0], plain - 0.25 * gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_any_scheduler(name, guidance):
    if guidance == "paper" and name in ("unipc", "heun", "euler"):  # eq. 10 would be undone, or be of another scale
        with pytest.raises(ValueError, match="guidance='paper'"):
            quiet(scheduler=SCHEDULERS[name]())(pictures(1, 1, 4, 4), guidance=guidance)
        return
    pipeline = quiet(scheduler=SCHEDULERS[name]())
    output = pipeline(
        pictures(1, 1, 4, 4), guidance=guidance, generator=generators(1), output_type="latent", refine_steps=5
    )
    assert output.images.shape == (1, 1, 16, 16) and output.images.isfinite().all()
    again = pipeline(
        pictures(1, 1, 4, 4), guidance=guidance, generator=generators(1), output_type="latent", refine_steps=5
    )
    assert torch.equal(output.images, again.images)
    if guidance == "projection":
        down = SeparableOperator.named("bicubic", (16, 16), (4, 4), 1)
        assert (down.A(output.images / 2 + 0.5) - pictures(1, 1, 4, 4)).abs().max() < 2 / 255


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["ddpm", "dpm-solver++", "euler"])
def test_without_guidance_it_is_the_stock_loop(name, prediction_type):
    scheduler = SCHEDULERS[name]()
    scheduler.register_to_config(prediction_type=prediction_type)
    if "clip_sample" in scheduler.config:
        scheduler.register_to_config(clip_sample=False)
    pipeline, measured = quiet(scheduler=scheduler), pictures(2, 1, 8, 8)
    ours = pipeline(
        measured,
        2,
        refine_steps=4,
        guidance="none",
        clip_sample=False,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    generator = torch.Generator().manual_seed(3)
    steps = lay_out_steps(scheduler, 4, 0.3, "scheduler", "refine_steps")
    scheduler, times = steps.scheduler, steps.timesteps
    noise = torch.randn(2, 1, 16, 16, generator=generator)
    latents = F.interpolate(2 * measured - 1, (16, 16), mode="bicubic")
    latents = scheduler.add_noise(latents, noise, times[:1].expand(2))
    takes = "generator" in inspect.signature(scheduler.step).parameters
    with torch.no_grad():
        for time in times:
            output = pipeline.unet(scheduler.scale_model_input(latents, time), time)[0]
            latents = scheduler.step(output, time, latents, **({"generator": generator} if takes else {}))[0]
    torch.testing.assert_close(ours, latents, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_an_image_does_not_depend_on_its_batch(guidance):
    pipeline, images = quiet(), pictures(8, 1, 4, 4)
    together = pipeline(images, guidance=guidance, generator=generators(8), output_type="latent", refine_steps=4)
    for index in (0, 5):
        alone = pipeline(
            images[index : index + 1],
            guidance=guidance,
            generator=generators(1, index),
            output_type="latent",
            refine_steps=4,
        )
        torch.testing.assert_close(together.images[index : index + 1], alone.images, atol=1e-5, rtol=0)


def test_only_the_input_gets_a_gradient_and_the_parameters_are_as_before():
    unet = network()
    seen = []
    unet.register_forward_hook(
        lambda module, inputs, output: seen.append([p.requires_grad for p in module.parameters()])
    )
    next(iter(unet.parameters())).requires_grad_(False)
    before = [p.requires_grad for p in unet.parameters()]
    quiet(unet)(pictures(1, 1, 4, 4), guidance="gradient", generator=generators(1), refine_steps=2)
    assert not any(map(any, seen)) and [p.requires_grad for p in unet.parameters()] == before
    assert all(p.grad is None for p in unet.parameters())


def test_guidance_every_nth_step():
    unet, seen = network(), []
    unet.register_forward_hook(lambda module, inputs, output: seen.append(torch.is_grad_enabled()))
    quiet(unet)(pictures(1, 1, 8, 8), 2, guidance="gradient", guidance_every=3, generator=generators(1), refine_steps=7)
    assert seen == [True, False, False, True, False, False, True]


def test_the_clean_estimate_is_clipped_before_the_guidance():
    pipeline = quiet(scheduler=DDPMScheduler(clip_sample=True, clip_sample_range=0.1))
    image = torch.full((1, 1, 4, 4), 0.8)
    output = pipeline(image, generator=generators(1), output_type="latent")
    assert abs(output.images.mean() - 0.6) < 0.01  # the scheduler's own clipping, at 0.1, would make it gray


@pytest.mark.parametrize("guidance", ["projection", "gradient", "none"])
def test_hard_consistency(guidance):
    images = pictures(2, 1, 8, 8)
    output = quiet()(images, 2, guidance=guidance, hard_consistency=True, generator=generators(2), output_type="pt")
    made = SeparableOperator.named("bicubic", (16, 16), (8, 8), 1).A(output.images)
    torch.testing.assert_close(output.consistency, (made - images).abs().mean((1, 2, 3)), atol=1e-6, rtol=0)
    soft = quiet()(images, 2, guidance=guidance, generator=generators(2), output_type="pt")
    assert output.consistency.max() <= soft.consistency.max() + 1e-6
    assert output.images.min() >= 0 and output.images.max() <= 1
    calm = quiet()(
        images * 0.2 + 0.4, 2, guidance=guidance, hard_consistency=True, generator=generators(2), output_type="pt"
    )
    assert calm.consistency.max() < 0.5 / 255


def test_noise_in_the_input_is_not_copied():
    """With noise of a known size the output fits the input about as well as the truth does, not exactly."""
    oracle = GaussianPosterior(factor=4, images=16, seed=0, power=POWER)
    noise = 0.1
    noisy = oracle.measured + 2 * noise * torch.randn(oracle.measured.shape, generator=torch.Generator().manual_seed(5))
    pipeline = quiet(GaussianNoisePredictor(power=POWER, means_of=32), SCHEDULERS["dpm-solver++ sde"]())
    arguments = dict(operator="area", clip_sample=False, output_type="latent", guidance="gradient")
    errors = {}
    for known in (1e-12, noise):
        images = pipeline(
            noisy / 2 + 0.5, noise_std=known, generator=torch.Generator().manual_seed(0), **arguments
        ).images
        errors[known] = (F.avg_pool2d(images, 4) - oracle.measured).square().mean().sqrt().item()
    assert errors[noise] < 0.95 * errors[1e-12]


def test_masks_colours_functions_and_physics():
    image = soft(1, 1, 8, 8)
    mask = torch.ones(8, 8)
    mask[2:5, 3:7] = 0
    filled = quiet()(
        image, 1, mask=mask, refine_strength=1.0, generator=generators(1), output_type="pt", hard_consistency=True
    )
    torch.testing.assert_close(filled.images * mask, image * mask, atol=1e-4, rtol=0)
    other = quiet()(
        image * mask,
        1,
        mask=mask,
        refine_strength=1.0,
        generator=generators(1),
        output_type="pt",
        hard_consistency=True,
    )
    assert torch.equal(filled.images, other.images)  # what is hidden is not looked at
    both = quiet()(soft(1, 1, 8, 8), 2, mask=mask, generator=generators(1), output_type="pt")
    assert both.images.shape == (1, 1, 16, 16) and both.consistency.max() < 5e-3

    color = quiet(network(image_channels=3))
    output = color(
        pictures(1, 1, 8, 8), 1, operator="gray", generator=generators(1), output_type="pt", hard_consistency=True
    )
    assert output.images.shape == (1, 3, 8, 8) and output.consistency.max() < 1 / 255

    named = SeparableOperator.named("bicubic", (16, 16), (8, 8), 1)
    by_name = quiet()(image, 2, generator=generators(1), output_type="pt").images
    physics = SimpleNamespace(A=named.A, A_dagger=named.correction)
    for operator in (named.A, physics, SimpleNamespace(A=named.A)):
        images = quiet()(image, 2, operator=operator, generator=generators(1), output_type="pt").images
        torch.testing.assert_close(images, by_name, atol=1e-4, rtol=0)
    bent = quiet()(
        image**2, 2, operator=lambda x: named.A(x) ** 2, guidance="paper", generator=generators(1), guidance_scale=1.0
    )
    assert bent.consistency.isfinite().all()


# Sizes, windows, kinds of input


@pytest.mark.parametrize(
    "factor, size, levels",
    [
        (4, (8, 8), [(16, 16), (32, 32)]),
        (3, (8, 10), [(12, 15), (24, 30)]),
        (1.5, (8, 8), [(12, 12)]),
        (8, (4, 6), [(8, 12), (16, 24), (32, 48)]),
        (1, (8, 8), [(8, 8)]),
        (2.5, (6, 6), [(8, 8), (15, 15)]),
    ],
)
def test_levels(factor, size, levels):
    assert [level.size for level in quiet().plan(size, factor)] == levels
    output = quiet()(
        pictures(1, 1, *size), factor, refine_steps=2, generator=generators(1), return_levels=True, output_type="pt"
    )
    assert [tuple(image.shape[-2:]) for image in output.levels] == levels
    assert torch.equal(output.levels[-1], output.images)


def test_the_plan_says_what_is_called():
    unet, sizes = network(), []
    unet.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[-1]))
    pipeline = quiet(unet)
    pipeline(pictures(1, 1, 4, 4), refine_steps=[3, 2], generator=generators(1))
    plan = pipeline.plan(4, refine_steps=[3, 2])
    assert sizes == [8, 8, 8, 16, 16] and pipeline.num_timesteps == 5
    assert [level.nfe_eq for level in plan] == [0.75, 2]


def test_odd_sizes_are_padded_for_the_network_only():
    seen = []
    unet = network()
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2:]))
    output = quiet(unet)(
        pictures(1, 1, 5, 7), 3, refine_steps=2, guidance="gradient", generator=generators(1), output_type="pt"
    )
    assert output.images.shape == (1, 1, 15, 21) and all(side % 2 == 0 for size in seen for side in size)


@pytest.mark.parametrize("guidance", ["projection", "gradient"])
@pytest.mark.parametrize("size, tile, overlap", [((16, 16), 8, 4), ((9, 14), 8, None), ((16, 40), 12, 2)])
def test_windows_blend_to_the_whole_for_a_network_that_sees_single_pixels(guidance, size, tile, overlap):
    """A 1x1 network has the same answer in every window: what is left is placing, blending, noise and coordinates."""

    class Pointwise(CoordinateUNet2DModel):
        def forward(self, sample, timestep, coordinates=None, return_dict=True):
            return (torch.sin(3 * sample + coordinates[:, :1] * 2 + coordinates[:, 1:]),)

    pipeline = quiet(Pointwise(**TINY, image_channels=1))
    arguments = dict(scale_factor=2, guidance=guidance, refine_steps=3, output_type="latent")
    whole = pipeline(pictures(2, 1, *size), generator=generators(2), **arguments).images
    tiled = pipeline(
        pictures(2, 1, *size), generator=generators(2), tile=tile, tile_overlap=overlap, **arguments
    ).images
    torch.testing.assert_close(tiled, whole, atol=2e-4, rtol=0)


@pytest.mark.parametrize("guidance", ["projection", "gradient"])
def test_windows_are_halved_when_memory_runs_out(guidance, monkeypatch):
    unet, sizes = network(), []
    forward = unet.forward

    @functools.wraps(forward)
    def limited(sample, *rest, **named):
        if sample.shape[-1] > 16:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(sample.shape[-1])
        return forward(sample, *rest, **named)

    arguments = dict(
        guidance=guidance, refine_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    )
    wanted = quiet(unet)(pictures(1, 1, 16, 16), 2, tile=16, **arguments).images
    monkeypatch.setattr(unet, "forward", limited)
    found = quiet(unet)(
        pictures(1, 1, 16, 16), 2, **{**arguments, "generator": torch.Generator().manual_seed(0)}
    ).images
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert set(sizes) == {16}

    @functools.wraps(forward)
    def never(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(unet, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        quiet(unet)(pictures(1, 1, 16, 16), 2, refine_steps=2)

    @functools.wraps(forward)
    def broken(*_, **__):
        raise RuntimeError("shapes")

    monkeypatch.setattr(unet, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        quiet(unet)(pictures(1, 1, 16, 16), 2, refine_steps=2)


def test_kinds_of_input_and_output():
    pipeline, tensor = quiet(network(image_channels=3)), (pictures(2, 3, 4, 4) * 255).round() / 255
    array = tensor.permute(0, 2, 3, 1).numpy()
    pils = [PIL.Image.fromarray((each * 255).round().astype(np.uint8)) for each in array]
    results = [
        pipeline(image, 2, refine_steps=2, generator=generators(2), output_type="np").images
        for image in (tensor, array, pils, list(tensor), list(array))
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-5)
    single = pipeline(pils[0], 2, refine_steps=2, generator=generators(1))
    assert isinstance(single.images[0], PIL.Image.Image) and single.images[0].size == (8, 8)
    images, consistency, levels = pipeline(pils[0], 2, refine_steps=2, generator=generators(1), return_dict=False)
    assert len(images) == len(consistency) == 1 and levels is None


def test_callback_and_interrupt():
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 3
        return {"latents": tensors["latents"] * 0}

    quiet()(pictures(1, 1, 4, 4), refine_steps=3, generator=generators(1), callback_on_step_end=stop)
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "name, image, arguments",
    [
        ("scale_factor", torch.zeros(1, 1, 4, 4), dict(scale_factor=0.5)),
        ("scale_factor", torch.zeros(1, 1, 5, 5), dict(scale_factor=1.5)),
        ("scale_factor", torch.zeros(1, 1, 4, 4), dict(scale_factor=math.nan)),
        ("resolutions", torch.zeros(1, 1, 4, 4), dict(resolutions=[2], scale_factor=None)),
        ("resolutions", torch.zeros(1, 1, 4, 4), dict(resolutions=[8, 12])),
        ("resolutions", torch.zeros(1, 1, 4, 4), dict(scale_factor=None)),
        ("refine_steps", torch.zeros(1, 1, 4, 4), dict(refine_steps=[1, 2, 3])),
        ("refine_steps", torch.zeros(1, 1, 4, 4), dict(refine_steps=0)),
        ("refine_strength", torch.zeros(1, 1, 4, 4), dict(refine_strength=1.5)),
        ("guidance", torch.zeros(1, 1, 4, 4), dict(guidance="dps")),
        ("guidance_scale", torch.zeros(1, 1, 4, 4), dict(guidance="paper", guidance_scale=-1.0)),
        ("guidance_every", torch.zeros(1, 1, 4, 4), dict(guidance_every=0)),
        ("operator", torch.zeros(1, 1, 4, 4), dict(operator="nearest")),
        ("operator", torch.zeros(1, 1, 4, 4), dict(operator=3)),
        ("operator", torch.zeros(1, 1, 4, 4), dict(operator=lambda x: F.avg_pool2d(x, 2))),
        ("not linear", torch.zeros(1, 1, 4, 4), dict(operator=lambda x: F.adaptive_avg_pool2d(x, 4) ** 2)),
        ("not linear", torch.zeros(1, 1, 4, 4), dict(operator=lambda x: F.adaptive_avg_pool2d(x, 4) + 1)),
        ("mask", torch.zeros(1, 1, 4, 4), dict(mask=torch.ones(8, 8))),
        ("mask", torch.zeros(1, 1, 4, 4), dict(mask=torch.full((4, 4), 0.5))),
        ("noise_std", torch.zeros(1, 1, 4, 4), dict(noise_std=-0.1)),
        ("hard_consistency", torch.zeros(1, 1, 4, 4), dict(noise_std=0.1, hard_consistency=True)),
        ("tile", torch.zeros(1, 1, 4, 4), dict(tile=2)),
        ("tile", torch.zeros(1, 1, 4, 4), dict(tile=7)),
        ("tile_overlap", torch.zeros(1, 1, 4, 4), dict(tile=8, tile_overlap=8)),
        ("tile_overlap", torch.zeros(1, 1, 4, 4), dict(tile_overlap=8)),
        ("generator", torch.zeros(1, 1, 4, 4), dict(generator=generators(2))),
        ("output_type", torch.zeros(1, 1, 4, 4), dict(output_type="tensor")),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing="even")),
        ("callback", torch.zeros(1, 1, 4, 4), dict(callback_on_step_end_tensor_inputs=["x"])),
        ("image", torch.full((1, 1, 4, 4), math.nan), {}),
        ("image", torch.full((1, 1, 4, 4), 2.0), {}),
        ("image", torch.zeros(1, 3, 4, 4), {}),
        ("image", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), {}),
        ("image", torch.zeros(4, 4), {}),
        ("image", [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 8, 8)], {}),
        ("image", [], {}),
        ("image", "photo.png", {}),
        ("mode", PIL.Image.new("RGBA", (4, 4)), {}),
        ("mode", PIL.Image.new("1", (4, 4)), {}),
        ("mode", PIL.Image.new("RGB", (4, 4)), {}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_named_before_the_network_runs(name, image, arguments):
    unet = network()
    unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=name):
        quiet(unet)(image, **arguments)


def test_schedulers_that_cannot_renoise_are_refused():
    with pytest.raises(ValueError, match="scheduler"):
        GuidedSRPipeline(network(), FlowMatchEulerDiscreteScheduler())


# Loading, and what it shares with the other pipeline


def test_a_trained_pyramid_serves(tmp_path, caplog):
    pyramid = PyramidalPipeline(network(), DDPMScheduler(), None, {"fast": {"num_inference_steps": 3}})
    pyrdiff.hub.export(pyramid, tmp_path / "model")
    first = quiet(pyramid.unet, pyramid.scheduler)(
        pictures(1, 1, 4, 4), generator=generators(1), output_type="pt"
    ).images
    for load in (
        lambda: pyrdiff.load(tmp_path / "model", pipeline_class="GuidedSRPipeline"),
        lambda: GuidedSRPipeline.from_pretrained(tmp_path / "model"),
        lambda: GuidedSRPipeline(pyramid.unet, pyramid.scheduler),
    ):
        pipeline = load()
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(pictures(1, 1, 4, 4), generator=generators(1), output_type="pt").images
        torch.testing.assert_close(images, first)
    with pytest.raises(ValueError, match="pipeline_class"):
        pyrdiff.load(tmp_path / "model", pipeline_class="OtherPipeline")


def test_it_exports_and_loads_without_pyrdiff(tmp_path):
    pyrdiff.hub.export(quiet(), tmp_path / "model")
    assert (tmp_path / "model" / "pipeline_guided_sr.py").is_file()
    assert isinstance(pyrdiff.load(tmp_path / "model"), GuidedSRPipeline)


def test_a_plain_unet_works():
    """It answers as a network does whose weights for the coordinates are zero."""
    blind = network(resolutions=(16,))
    blind.conv_in.weight.data[:, 1:] = 0
    plain = UNet2DModel(in_channels=1, out_channels=1, sample_size=16, **TINY).eval()
    plain.load_state_dict({**blind.state_dict(), "conv_in.weight": blind.conv_in.weight[:, :1]})
    images = [
        quiet(unet)(pictures(1, 1, 8, 8), 2, refine_steps=3, tile=tile, generator=generators(1), output_type="latent")
        for tile in (None, 8)
        for unet in (plain, blind)
    ]
    assert images[0].images.shape == (1, 1, 16, 16)
    torch.testing.assert_close(images[0].images, images[1].images, atol=1e-5, rtol=0)
    torch.testing.assert_close(images[2].images, images[3].images, atol=1e-5, rtol=0)
    assert (images[0].images - images[2].images).abs().max() > 1e-3, "windows see less than the whole"


# What a review found


def repeated_gray(image):
    """Averages the channels and repeats the mean: what it makes of an image never has differing channels."""
    return F.avg_pool2d(image, 2).mean(1, keepdim=True).expand(-1, 3, -1, -1)


def test_conjugate_gradients_leave_alone_what_the_operator_cannot_reach():
    operator = CallableOperator(repeated_gray, (3, 8, 8))
    residual = torch.zeros(3, 3, 4, 4)
    residual[0, 0], residual[1] = 1 / 255, 0.3  # out of reach but for its mean; reachable; and nothing to do
    found = operator.correction(residual)
    assert found.isfinite().all() and found[0].abs().max() < 0.01 and not found[2].any()
    torch.testing.assert_close(operator.A(found)[1], residual[1], atol=1e-5, rtol=0)

    def blind(image):  # to the finest checkerboard
        return (image + image.roll(1, -1)) / 2

    residual = torch.ones(1, 1, 1, 8) * torch.tensor([1.0, -1.0] * 4) / 765 + 0.1
    found = CallableOperator(blind, (1, 1, 8)).correction(residual)
    torch.testing.assert_close(found, torch.full_like(found, 0.1), atol=1e-3, rtol=0)


def test_zero_terminal_snr():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    image, mask = soft(1, 1, 8, 8), torch.ones(8, 8)
    mask[2:4] = 0
    arguments = dict(scale_factor=1, mask=mask, refine_strength=1.0, generator=generators(1), output_type="pt")
    assert quiet(scheduler=scheduler)(image, **arguments).images.isfinite().all()
    with pytest.raises(ValueError, match="refine_strength"):
        quiet(scheduler=scheduler)(image, guidance="gradient", **arguments)
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="refine_strength"):
        quiet(scheduler=scheduler)(image, **arguments)


def test_schedulers_and_networks_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="flow_prediction"):
        quiet(scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    with pytest.raises(ValueError, match="channels"):
        quiet(network(out_channels=2))


def test_wrong_pseudo_inverses_and_masks_are_named():
    named = SeparableOperator.named("bicubic", (8, 8), (4, 4), 1)
    wrong = (lambda y: 100 * named.correction(y), lambda y: y[..., :2], lambda y: named.correction(y).numpy(), 3)
    for dagger in wrong:
        with pytest.raises(ValueError, match="A_dagger"):
            quiet()(soft(1, 1, 4, 4), 2, operator=SimpleNamespace(A=named.A, A_dagger=dagger))
    with pytest.raises(ValueError, match="mask"):
        quiet()(soft(1, 1, 4, 4), 1, mask=np.ones((4, 4)))
    median = lambda x: F.unfold(F.avg_pool2d(x, 2), 3, padding=1).median(1).values.reshape(1, 1, 4, 4)  # noqa: E731
    with pytest.raises(ValueError, match="not linear"):
        quiet()(soft(1, 1, 4, 4), 2, operator=median)


def test_hard_consistency_is_in_the_last_level_too():
    output = quiet()(
        soft(1, 1, 8, 8), 2, guidance="none", hard_consistency=True, generator=generators(1), return_levels=True
    )
    assert output.levels[-1][0].tobytes() == output.images[0].tobytes()


def test_lists_of_files_of_different_formats(tmp_path):
    image = PIL.Image.new("L", (4, 4), 100)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg")
    files = [PIL.Image.open(tmp_path / name) for name in ("a.png", "b.jpg")]
    assert len(quiet()(files, 2, refine_steps=2).images) == 2


@pytest.mark.parametrize("arguments", [
    dict(scale_factor="4"), dict(noise_std=None), dict(resolutions=16.0), dict(generator=(1, 2)),
    dict(tile=8, tile_overlap=3),
])  # fmt: skip
def test_wrong_types_are_named(arguments):
    with pytest.raises(ValueError, match="|".join(arguments)):
        quiet()(soft(1, 1, 4, 4), **arguments)
    with pytest.raises(ValueError, match="float"):
        quiet()(np.zeros((4, 4, 1), np.uint8))


def test_mirrored_arrays_are_read():
    array = np.random.default_rng(0).random((4, 4, 1), dtype=np.float32)
    run = lambda image: quiet()(image, 2, refine_steps=2, generator=generators(1), output_type="np").images  # noqa: E731
    np.testing.assert_array_equal(run(array[:, ::-1]), run(np.ascontiguousarray(array[:, ::-1])))


@pytest.mark.parametrize("height, width", [(1, 20), (20, 1), (1, 1), (3, 5)])
@pytest.mark.parametrize("tile", [None, 8])
def test_sides_shorter_than_the_network_takes(height, width, tile):
    unet = network(
        block_out_channels=(8, 8, 8), down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3
    )
    arguments = dict(refine_steps=2, tile=tile, generator=generators(1), output_type="pt")
    for guidance in ("projection", "gradient"):
        output = quiet(unet)(soft(1, 1, height, width), 2, guidance=guidance, hard_consistency=True, **arguments)
        assert output.images.shape == (1, 1, 2 * height, 2 * width) and output.consistency < 1 / 255


def test_guidance_that_draws_away_from_the_input_is_said(caplog):
    image = pictures(2, 1, 8, 8)
    for guidance, scale in (("none", None), ("projection", None), ("paper", 0.5), ("paper", 50.0)):
        output = quiet()(image, 2, guidance=guidance, guidance_scale=scale, generator=generators(2))
        said = "draws away from the input" in caplog.text
        assert said == (scale == 50.0), (guidance, scale, output.consistency)
