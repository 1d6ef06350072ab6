import functools
import math

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import warm
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput

import pyrdiff
from pyrdiff import (
    CosineResidualScheduler,
    ResidualSRPipeline,
    ResidualSRUNet2DModel,
)
from pyrdiff.parts.windows import Tiling, WindowedNetwork
from pyrdiff.pipelines.pipeline_residual_sr import ResidualArguments

SOLVERS = {
    "own": CosineResidualScheduler,
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "deis": DEISMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}
TINY = dict(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)


def process(name: str = "own", **changes):
    own = CosineResidualScheduler(**{"num_train_timesteps": 50, **changes})
    return own if name == "own" else SOLVERS[name].from_config(own.config)


def network(seed: int = 0, kind=ResidualSRUNet2DModel, **changes):
    torch.manual_seed(seed)
    return kind(**{**TINY, "image_channels": 1, "scale_factors": (2,), **changes}).eval()


def quiet(unet=None, scheduler=None, plans=None) -> ResidualSRPipeline:
    pipeline = ResidualSRPipeline(network() if unet is None else unet, scheduler or process(), plans)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def pictures(*shape, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def soft(*shape, seed: int = 0) -> torch.Tensor:
    """Far enough from black and white for every detail to fit."""
    return 0.4 + 0.2 * pictures(*shape, seed=seed)


class Oracle(ResidualSRUNet2DModel):
    """Knows what is diffused, and so what a network that has learned it says of any noisy version of it."""

    truth, kind, seen = None, "epsilon", None

    def forward(self, sample, noise_level, low_res, return_dict=True):
        self.seen = [*(self.seen or []), noise_level]
        signal = noise_level.double().reshape(-1, 1, 1, 1)
        spread = (1 - signal**2).sqrt()
        noise = (sample.double() - signal * self.truth) / spread
        output = {"epsilon": noise, "sample": self.truth, "v_prediction": signal * noise - spread * self.truth}[
            self.kind
        ]
        return UNet2DOutput(output.float()) if return_dict else (output.float(),)


class Pointwise(ResidualSRUNet2DModel):
    """The same answer for a pixel in any window: what is left is placing, blending and noise."""

    def forward(self, sample, noise_level, low_res, return_dict=True):
        output = torch.sin(3 * sample + 2 * low_res) * noise_level.reshape(-1, 1, 1, 1)
        return (output.repeat(1, self.config.out_channels // sample.shape[1], 1, 1),)


def oracle(high: torch.Tensor, low: torch.Tensor, scheduler, kind: str = "epsilon") -> Oracle:
    """For images in [0, 1]; eq. 9 written out."""
    unet, config = network(kind=Oracle), scheduler.config
    upsampled = F.interpolate(2 * low - 1, high.shape[-2:], mode="bicubic", antialias=True)
    residual = (2 * high - 1 - upsampled).double() * config["residual_scale"]
    unet.truth, unet.kind = (2 * high - 1).double() if config["prediction_target"] == "image" else residual, kind
    return unet


def shrink(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """As Pillow does it, in its 32-bit float mode."""
    rows = [
        [np.array(PIL.Image.fromarray(channel.numpy()).resize(size[::-1], PIL.Image.BICUBIC)) for channel in image]
        for image in images.float()
    ]
    return torch.from_numpy(np.array(rows))


# The method


@pytest.mark.parametrize("target, scale", [("residual", 1.0), ("residual", 4.0), ("image", 1.0)])
@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "deis"])  # which extrapolates the noise
def test_the_right_noise_leads_to_the_right_image(name, target, scale):
    scheduler = process(name, prediction_target=target, residual_scale=scale)
    high, low = pictures(2, 1, 12, 16), pictures(2, 1, 6, 8, seed=1)
    pipeline = quiet(oracle(high, low, scheduler), scheduler)
    images = pipeline(low, num_inference_steps=7, generator=generators(2), output_type="pt").images
    torch.testing.assert_close(images, high, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize("name", ["own", "dpm-solver++", "euler"])
@pytest.mark.parametrize("clip", [True, False])
def test_other_predictions_lead_there_too(name, kind, clip):
    scheduler = process(name, prediction_type=kind, residual_scale=2.0)
    high, low = pictures(2, 1, 12, 16), pictures(2, 1, 6, 8, seed=1)
    pipeline = quiet(oracle(high, low, scheduler, kind), scheduler)
    arguments = dict(num_inference_steps=7, generator=generators(2), clip_sample=clip, output_type="pt")
    torch.testing.assert_close(pipeline(low, **arguments).images, high, atol=2e-4, rtol=0)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_network_is_told_the_signal_share_of_its_sample(name, strength):
    scheduler = process(name)
    low = pictures(2, 1, 6, 8)
    unet = oracle(pictures(2, 1, 12, 16), low, scheduler)
    pipeline, times = quiet(unet, scheduler), []
    keep = lambda pipe, step, timestep, tensors: times.append(float(timestep)) or {}  # noqa: E731
    pipeline(low, num_inference_steps=7, strength=strength, generator=generators(2), callback_on_step_end=keep)
    expected = scheduler.alphas_cumprod.double().sqrt()
    found = torch.stack(unet.seen).double()
    assert found.shape == (7, 2) and torch.equal(found[:, 0], found[:, 1])
    for time, level in zip(times, found[:, 0], strict=True):
        if time == int(time):
            assert abs(level - expected[int(time)]) < 1e-6
        else:  # schedulers interpolate in log sigma between whole times
            assert expected[math.ceil(time)] < level < expected[int(time)]
    assert pipeline.num_timesteps == 7 and pipeline.cost((6, 8), None, 7, strength).timesteps == times


@pytest.mark.parametrize("clip", [False, True])
def test_images_are_made_by_the_stock_loop(clip):
    """SR3: with the image as target, ours is DDPM, and our clipping is DDPM's own."""
    scheduler = process("ddpm", prediction_target="image", num_train_timesteps=40)
    pipeline, low = quiet(scheduler=scheduler), pictures(2, 1, 4, 4)
    arguments = dict(num_inference_steps=10, generator=torch.Generator().manual_seed(3), output_type="latent")
    ours = pipeline(low, clip_sample=clip, **arguments).images
    stock = DDPMScheduler.from_config(scheduler.config, clip_sample=clip)
    stock.set_timesteps(10)
    generator = torch.Generator().manual_seed(3)
    upsampled = F.interpolate(2 * low - 1, (8, 8), mode="bicubic", antialias=True)
    latents = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for time in stock.timesteps:
            output = pipeline.unet(latents, stock.alphas_cumprod[time].sqrt(), upsampled).sample
            latents = stock.step(output, time, latents, generator=generator).prev_sample
    torch.testing.assert_close(ours, latents, atol=1e-4 if clip else 1e-6, rtol=1e-4)


def test_residuals_are_made_by_the_schedulers_own_loop():
    """Eq. 9 by the scheduler's `compose`, and its DDIM step at the `eta` that is asked for."""
    scheduler, low = process(residual_scale=3.0), pictures(2, 1, 4, 4)
    pipeline = quiet(scheduler=scheduler)
    for eta in (None, 0.0, 0.7):
        arguments = dict(num_inference_steps=10, generator=torch.Generator().manual_seed(3), output_type="latent")
        ours = pipeline(low, eta=eta, clip_sample=False, **arguments).images
        generator = torch.Generator().manual_seed(3)
        upsampled = ResidualSRPipeline.upsample(2 * low - 1, (8, 8))
        latents = torch.randn(2, 1, 8, 8, generator=generator)
        scheduler.set_timesteps(10)
        with torch.no_grad():
            for time in scheduler.timesteps:
                output = pipeline.unet(latents, scheduler.noise_level(time), upsampled).sample
                latents = scheduler.step(output, time, latents, eta=eta, generator=generator).prev_sample
        torch.testing.assert_close(ours, scheduler.compose(latents, upsampled), atol=1e-5, rtol=1e-5)


def test_each_clean_image_is_kept_in_range():
    """A network whose estimates are far out: the residual is clipped where the image is, not at 1."""
    low = pictures(1, 1, 4, 4)
    for sign in (1, -1):
        scheduler = process("ddim", residual_scale=4.0)
        unet = oracle(pictures(1, 1, 8, 8), low, scheduler)
        unet.truth = torch.full_like(unet.truth, 20.0 * sign)
        images = quiet(unet, scheduler)(low, num_inference_steps=5, output_type="latent").images
        torch.testing.assert_close(images, torch.full_like(images, sign), atol=1e-4, rtol=0)
        free = quiet(unet, scheduler)(low, num_inference_steps=5, output_type="latent", clip_sample=False).images
        upsampled = ResidualSRPipeline.upsample(2 * low - 1, (8, 8))
        torch.testing.assert_close(free, upsampled + 5.0 * sign, atol=1e-3, rtol=0)


def test_the_schedulers_own_clipping_is_off():
    """It would be at 1 in the units of the residual, here 0.25 in those of the image."""
    low, high = torch.full((1, 1, 4, 4), 0.5), torch.full((1, 1, 8, 8), 0.9)
    scheduler = process(residual_scale=4.0, clip_sample=True)
    for part in (scheduler, DDIMScheduler.from_config(scheduler.config)):
        assert part.config.clip_sample
        images = quiet(oracle(high, low, part), part)(low, num_inference_steps=5, output_type="pt").images
        torch.testing.assert_close(images, high, atol=1e-4, rtol=0)


def test_upsampling_is_that_of_pillow():
    low = pictures(2, 3, 5, 7)
    for size in ((10, 14), (20, 28), (3, 4)):
        torch.testing.assert_close(ResidualSRPipeline.upsample(low, size), shrink(low, size), atol=2e-6, rtol=0)


@pytest.mark.parametrize("target", ["residual", "image"])
@pytest.mark.parametrize("name", ["own", "dpm-solver++", "euler"])
def test_below_full_strength_it_starts_from_the_enlarged_input(name, target):
    scheduler, low, seen = process(name, prediction_target=target), pictures(1, 1, 4, 4), []
    unet = network()
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    pipeline = quiet(unet, scheduler)
    pipeline(low, num_inference_steps=4, strength=0.4, generator=generators(1))
    upsampled = F.interpolate(2 * low - 1, (8, 8), mode="bicubic", antialias=True)
    start = upsampled if target == "image" else torch.zeros_like(upsampled)
    noise = torch.randn(1, 1, 8, 8, generator=generators(1)[0])
    sample, signal = seen[0]
    assert len(seen) == 4 and pipeline.cost(4, None, 4, 0.4).timesteps[0] <= 20
    torch.testing.assert_close(sample, signal * start + (1 - signal**2).sqrt() * noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_at_full_strength_it_starts_from_noise(name):
    unet, seen = network(), []
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    quiet(unet, process(name))(pictures(1, 1, 4, 4), num_inference_steps=5, generator=generators(1))
    noise = torch.randn(1, 1, 8, 8, generator=generators(1)[0])
    torch.testing.assert_close(seen[0], noise, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_learned_variances(name):
    scheduler = process(name, variance_type="learned_range")
    low = pictures(2, 1, 4, 4)
    arguments = dict(num_inference_steps=5, output_type="latent", clip_sample=False)

    def run(halves, part=scheduler):
        unet = network(out_channels=2)
        with torch.no_grad():
            unet.conv_out.weight[1] = 0
            unet.conv_out.bias[1] = halves
        return quiet(unet, part)(low, generator=torch.Generator().manual_seed(0), **arguments).images

    small, large = run(-1.0), run(1.0)
    assert torch.equal(small, large) == (name not in ("own", "ddpm"))
    if name in ("own", "ddpm"):  # the ends of the range are the fixed ones
        for variance_type, images in (("fixed_small", small), ("fixed_large", large)):
            fixed = run(0.0, process(name, variance_type=variance_type))
            torch.testing.assert_close(images, fixed, atol=1e-3, rtol=1e-3)


def test_spacings():
    scheduler, low = process("dpm-solver++"), pictures(1, 1, 4, 4)
    pipeline = quiet(scheduler=scheduler)
    times = pipeline.cost(4, spacing="log_snr", num_inference_steps=6).timesteps
    ratio = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)).log()[[int(time) for time in times]]
    assert times[0] == 49 and times[-1] == 0 and (ratio.diff() > 0).all()
    given = [int(time) for time in times]
    images = [
        pipeline(low, spacing=spacing, num_inference_steps=count, generator=generators(1), output_type="pt").images
        for spacing, count in (("log_snr", 6), (given, None), (given, 6))
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert quiet().cost(4, spacing=[49, 20, 0]).timesteps == [49, 20, 0]


def test_the_cost_of_a_call_by_default():
    assert quiet().cost(4) == pyrdiff.pipelines.pipeline_residual_sr.ResidualSRCost((8, 8), list(range(49, -1, -1)), 50)
    assert quiet(scheduler=process(num_train_timesteps=200)).cost((4, 5)).nfe_eq == 100
    assert quiet(scheduler=process(num_train_timesteps=200)).cost(4, strength=0.1).nfe_eq == 20


# Several samples, several images


@pytest.mark.parametrize("name", ["own", "dpm-solver++"])
def test_an_image_does_not_depend_on_its_batch(name):
    pipeline, images = quiet(scheduler=process(name)), pictures(4, 1, 4, 5)
    arguments = dict(num_inference_steps=4, num_samples=3, output_type="latent")
    together = pipeline(images, generator=generators(4), **arguments).images
    assert len(together) == 12 and len({image.sum().item() for image in together}) == 12
    for index in (0, 3):
        alone = pipeline(images[index : index + 1], generator=generators(1, index), **arguments).images
        torch.testing.assert_close(together[3 * index : 3 * index + 3], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_mean_and_uncertainty(output_type):
    pipeline = quiet(network(image_channels=3, scale_factors=(2, 3)))
    arguments = dict(num_inference_steps=4, num_samples=5, clip_sample=False)
    output = pipeline(pictures(2, 3, 4, 4), output_type=output_type, **arguments)
    images, mean = (np.array(part).astype(np.float64) for part in (output.images, output.mean))
    assert len(images) == 10 and output.consistency.shape == (10,)
    grouped = images.reshape(2, 5, *images.shape[1:])
    np.testing.assert_allclose(mean, grouped.mean(1), atol=1e-5)
    grouped = (grouped / 2 + 0.5).clip(0, 1) if output_type == "latent" else grouped
    grouped = grouped.transpose(0, 1, 4, 2, 3) if output_type == "np" else grouped
    wanted = np.sqrt(grouped.var(1, ddof=1).mean(1, keepdims=True))
    assert output.uncertainty.shape == (2, 1, 12, 12)
    np.testing.assert_allclose(output.uncertainty.numpy(), wanted, atol=1e-5)
    single = pipeline(pictures(2, 3, 4, 4), num_inference_steps=2, return_dict=False)
    assert len(single) == 4 and single[2:] == (None, None)


# Consistency


def test_hard_consistency():
    low = soft(2, 3, 6, 8)
    pipeline = quiet(network(image_channels=3))
    arguments = dict(scale_factor=2, num_inference_steps=4, output_type="pt")
    free = pipeline(low, generator=generators(2), **arguments)
    hard = pipeline(low, generator=generators(2), hard_consistency=True, **arguments)
    assert (shrink(hard.images, (6, 8)) - low).abs().max() < 0.5 / 255
    assert hard.images.min() >= 0 and hard.images.max() <= 1
    for output in (free, hard):
        wanted = (shrink(output.images, (6, 8)) - low).abs().mean((1, 2, 3))
        torch.testing.assert_close(output.consistency, wanted, atol=1e-6, rtol=0)
    assert (free.consistency > 0.01).all() and (hard.consistency < 1e-3).all()


def test_color_fix():
    low = soft(2, 3, 4, 4)
    pipeline = quiet(network(image_channels=3))
    arguments = dict(num_inference_steps=4, num_samples=2, output_type="latent")
    free = pipeline(low, generator=generators(2), **arguments).images
    fixed = pipeline(low, generator=generators(2), color_fix=True, **arguments).images
    means = (2 * low - 1).mean((2, 3)).repeat_interleave(2, 0)
    assert (free.mean((2, 3)) - means).abs().max() > 0.01
    torch.testing.assert_close(fixed.mean((2, 3)), means, atol=1e-5, rtol=0)
    shift = fixed - free
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), atol=1e-5, rtol=0)


# Windows, sizes, kinds of input


@pytest.mark.parametrize("size, tile, overlap", [((8, 8), 8, 4), ((5, 7), 8, None), ((8, 21), 12, 2)])
@pytest.mark.parametrize("outputs", [1, 2])
def test_windows_blend_to_the_whole_for_a_network_that_sees_single_pixels(size, tile, overlap, outputs):
    scheduler = process(variance_type="learned_range" if outputs == 2 else "fixed_small")
    pipeline = quiet(network(kind=Pointwise, out_channels=outputs), scheduler)
    arguments = dict(num_inference_steps=3, num_samples=2, output_type="latent")
    whole = pipeline(pictures(2, 1, *size), generator=generators(2), **arguments).images
    tiled = pipeline(
        pictures(2, 1, *size), generator=generators(2), tile=tile, tile_overlap=overlap, **arguments
    ).images
    torch.testing.assert_close(tiled, whole, atol=2e-4, rtol=0)


def test_a_window_gets_its_part_of_both_images():
    """A network that answers with its input: in windows it must be the whole input again."""
    pieces = []

    def echo(sample, level, low_res):
        pieces.append(tuple(sample.shape[-2:]))
        return torch.cat((sample, low_res), dim=1)

    sample, low = pictures(1, 1, 13, 22), pictures(1, 1, 13, 22, seed=1)
    found = WindowedNetwork(echo, 2, Tiling(8, 4)).predict(sample, torch.ones(1), low)
    torch.testing.assert_close(found, torch.cat((sample, low), 1), atol=1e-6, rtol=0)
    assert set(pieces) == {(8, 8)} and len(pieces) == 3 * 5
    assert torch.equal(WindowedNetwork(echo, 2, None).predict(sample, torch.ones(1), low)[:, :1], sample)


@pytest.mark.parametrize("pixels, calls", [(0, 15), (8 * 8 * 2 * 4, 4), (2**20, 1)])
def test_windows_go_through_the_network_together(monkeypatch, pixels, calls):
    """Of several images with a noise level and a condition of their own."""
    monkeypatch.setattr(WindowedNetwork, "PIXELS_TOGETHER", {"cpu": pixels})
    sizes = []

    def echo(sample, level, low_res):
        sizes.append(len(sample))
        return sample * level[:, None, None, None] + low_res

    sample, low = pictures(2, 1, 13, 22), pictures(2, 1, 13, 22, seed=1)
    level = torch.tensor([0.25, 0.75])
    found = WindowedNetwork(echo, 2, Tiling(8, 4)).predict(sample, level, low)
    torch.testing.assert_close(found, sample * level[:, None, None, None] + low, atol=1e-6, rtol=0)
    assert len(sizes) == calls and sum(sizes) == 2 * 15


def test_fewer_windows_go_together_before_they_are_halved(monkeypatch):
    monkeypatch.setattr(WindowedNetwork, "PIXELS_TOGETHER", {"cpu": 2**20})
    sizes = []

    def limited(sample, level, low_res):
        sizes.append(len(sample))
        if len(sample) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return sample

    sample = pictures(1, 1, 13, 22)
    network = WindowedNetwork(limited, 2, Tiling(8, 4))
    found = network.predict(sample, torch.ones(1), sample)
    torch.testing.assert_close(found, sample, atol=1e-6, rtol=0)
    assert sizes == [15, 7, *[3] * 5] and network.tiling.side == 8


def test_windows_are_halved_when_memory_runs_out(monkeypatch):
    unet, sizes = network(), []
    forward = unet.forward

    @functools.wraps(forward)
    def limited(sample, *rest, **named):
        if sample.shape[-1] > 16:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(sample.shape[-1])
        return forward(sample, *rest, **named)

    arguments = dict(num_inference_steps=2, output_type="latent")
    wanted = quiet(unet)(pictures(1, 1, 16, 16), tile=16, generator=generators(1), **arguments).images
    monkeypatch.setattr(unet, "forward", limited)
    found = quiet(unet)(pictures(1, 1, 16, 16), generator=generators(1), **arguments).images
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert set(sizes) == {16}

    @functools.wraps(forward)
    def broken(*_, **__):
        raise RuntimeError("shapes")

    monkeypatch.setattr(unet, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        quiet(unet)(pictures(1, 1, 16, 16), num_inference_steps=2)


def test_sizes_that_are_padded_for_the_network_only():
    seen, unet = [], network(block_out_channels=(8, 8, 8))
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    output = quiet(unet)(pictures(1, 1, 5, 3), num_inference_steps=2, output_type="pt")
    assert output.images.shape == (1, 1, 10, 6) and set(seen) == {(12, 8)}
    for height, width in ((5, 1), (1, 5), (1, 1)):  # too short to be mirrored
        arguments = dict(num_inference_steps=2, hard_consistency=True, output_type="pt")
        output = quiet(unet)(0.4 + 0.2 * pictures(1, 1, height, width), **arguments)
        assert output.images.shape == (1, 1, 2 * height, 2 * width) and output.consistency < 1 / 255


def test_kinds_of_input_and_output():
    pipeline, tensor = quiet(network(image_channels=3)), (pictures(2, 3, 4, 4) * 255).round() / 255
    array = tensor.permute(0, 2, 3, 1).numpy()
    pils = [PIL.Image.fromarray((each * 255).round().astype(np.uint8)) for each in array]
    results = [
        pipeline(image, num_inference_steps=2, generator=generators(2), output_type="np").images
        for image in (tensor, array, pils, list(tensor), list(array))
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-5)
    single = pipeline(pils[0], num_inference_steps=2, num_samples=2)
    assert [image.size for image in single.images] == [(8, 8)] * 2 and single.mean[0].mode == "RGB"
    gray = quiet()(PIL.Image.new("L", (4, 5)), num_inference_steps=2).images[0]
    assert gray.mode == "L" and gray.size == (8, 10)


def test_callback_and_interrupt():
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 3
        return {"latents": tensors["latents"] * 0}

    low = pictures(1, 1, 4, 4)
    images = quiet()(low, num_inference_steps=8, callback_on_step_end=stop, output_type="latent").images
    assert steps == [0, 1, 2, 3]
    torch.testing.assert_close(images, ResidualSRPipeline.upsample(2 * low - 1, (8, 8)))


def test_scale_factors():
    low = pictures(1, 1, 4, 4)
    pipeline = quiet(network(scale_factors=(2, 4)))
    assert pipeline.cost(4).size == (16, 16) and pipeline.cost((4, 6), 2).size == (8, 12)
    with pytest.raises(ValueError, match=r"expected one of \[2, 4\]"):
        pipeline(low, 3)
    free = quiet(network(scale_factors=None))
    assert free(low, 5, num_inference_steps=2, output_type="pt").images.shape[-1] == 20
    for wrong in (None, 1, 2.0, True, "2"):
        with pytest.raises(ValueError, match="scale_factor"):
            free(low, wrong)


# Plans


def test_plans():
    plans = {
        "fast": {"num_inference_steps": 4, "spacing": "log_snr", "scheduler": ["DPMSolverMultistepScheduler", {}]},
        "ddim": {"num_inference_steps": 5, "eta": 0.0, "strength": 0.5},
        "heun": {"num_inference_steps": 5, "scheduler": ["HeunDiscreteScheduler", {"timestep_spacing": "trailing"}]},
    }
    scheduler = process(residual_scale=3.0)
    pipeline, low = quiet(scheduler=scheduler, plans=plans), pictures(1, 1, 4, 4)
    run = functools.partial(pipeline, low, output_type="pt")
    other = DPMSolverMultistepScheduler.from_config(scheduler.config)
    by_hand = quiet(pipeline.unet, other)(
        low, num_inference_steps=4, spacing="log_snr", generator=generators(1), output_type="pt"
    )
    assert torch.equal(run(plan="fast", generator=generators(1)).images, by_hand.images)
    assert torch.equal(run(plan=plans["fast"], generator=generators(1)).images, by_hand.images)
    by_hand = run(num_inference_steps=5, eta=0.0, strength=0.5, generator=generators(1))
    assert torch.equal(run(plan="ddim", generator=generators(1)).images, by_hand.images)
    assert pipeline.cost(4, plan="ddim").nfe_eq == pipeline.cost(4, plan="heun").nfe_eq == 5
    assert pipeline.cost(4).nfe_eq == 50 and pipeline.scheduler is scheduler


def test_a_plan_has_the_noise_process_and_the_target_of_the_pipeline():
    pipeline = quiet(scheduler=process(residual_scale=3.0))
    steps, _ = pipeline._lay_out({"scheduler": ["DDIMScheduler", {}]}, ResidualArguments())
    other = steps.scheduler
    assert other.config.residual_scale == 3.0 and other.config.prediction_target == "residual"
    assert not other.config.clip_sample and torch.equal(other.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_the_default_plan():
    low = pictures(1, 1, 4, 4)
    pipeline = quiet(plans={"default": {"num_inference_steps": 6, "scheduler": ["DDIMScheduler", {}]}})
    run = functools.partial(pipeline, low, output_type="pt")
    planned = run(generator=generators(1)).images
    assert pipeline.cost(4).nfe_eq == pipeline.num_timesteps == 6
    assert torch.equal(planned, run(plan="default", generator=generators(1)).images)
    run(num_inference_steps=3, generator=generators(1))  # the pipeline's own scheduler then
    assert pipeline.num_timesteps == 3 and pipeline.cost(4, None, 3).timesteps == [32, 16, 0]
    half = pipeline.cost(4, strength=0.5)
    assert half.nfe_eq == 6 and half.timesteps[0] <= 25  # an entry of the plan is replaced
    with pytest.raises(ValueError, match="num_inference_steps"):
        run(plan="default", num_inference_steps=3)


@pytest.mark.parametrize("plan", [
    {"num_inference_steps": 0}, {"num_inference_steps": 51}, {"strength": 0.0}, {"spacing": "even"}, {"steps": 4},
    {"spacing": [3, 9]}, {"spacing": [60, 3]}, {"eta": 2.0}, {"scheduler": "DDIMScheduler"},
    {"scheduler": ["CosineResidualScheduler", {}]}, {"scheduler": ["DDIMScheduler", {"residual_scale": 2.0}]},
    {"scheduler": ["DDIMScheduler", {"beta_schedule": "linear"}]},
    {"scheduler": ["DDIMScheduler", {"clip_sample": True}]},
    {"scheduler": ["DPMSolverMultistepScheduler", {}], "eta": 0.5}, {"scheduler": ["UNet2DModel", {}]},
    {"scheduler": ["DDPMScheduler", {"variance_type": "learned_range"}]},
    {"scheduler": ["FlowMatchEulerDiscreteScheduler", {}]},
    "other", 3,
])  # fmt: skip
def test_bad_plans_are_refused_when_they_are_given(plan):
    word = "plan|expected"
    with pytest.raises(ValueError, match=word):
        quiet(plans={"mine": plan})
    with pytest.raises(ValueError, match=word):
        quiet().cost(4, plan=plan)


# Bad input


@pytest.mark.parametrize(
    "name, image, arguments",
    [
        ("scale_factor", torch.zeros(1, 1, 4, 4), dict(scale_factor=3)),
        ("scale_factor", torch.zeros(1, 1, 4, 4), dict(scale_factor=2.5)),
        ("scale_factor", torch.zeros(1, 1, 4, 4), dict(scale_factor=math.nan)),
        ("num_inference_steps", torch.zeros(1, 1, 4, 4), dict(num_inference_steps=0)),
        ("num_inference_steps", torch.zeros(1, 1, 4, 4), dict(num_inference_steps=51)),
        ("num_inference_steps", torch.zeros(1, 1, 4, 4), dict(num_inference_steps=2.0)),
        ("num_inference_steps", torch.zeros(1, 1, 4, 4), dict(num_inference_steps=True)),
        ("time 0", torch.zeros(1, 1, 4, 4), dict(num_inference_steps=1)),
        ("strength", torch.zeros(1, 1, 4, 4), dict(strength=0)),
        ("strength", torch.zeros(1, 1, 4, 4), dict(strength=1.5)),
        ("strength", torch.zeros(1, 1, 4, 4), dict(strength=math.nan)),
        ("strength", torch.zeros(1, 1, 4, 4), dict(strength=True)),
        ("strength", torch.zeros(1, 1, 4, 4), dict(strength=0.5, num_inference_steps=40)),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing="even")),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing=[])),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing=[0, 10])),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing=[10, 10])),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing=[50, 0])),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing=[40.5, 0])),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing=np.array([40, 0]))),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing=[40, 0], strength=0.5)),
        ("spacing", torch.zeros(1, 1, 4, 4), dict(spacing=[40, 0], num_inference_steps=3)),
        ("eta", torch.zeros(1, 1, 4, 4), dict(eta=-0.1)),
        ("eta", torch.zeros(1, 1, 4, 4), dict(eta=math.nan)),
        ("eta", torch.zeros(1, 1, 4, 4), dict(eta="1")),
        ("plan", torch.zeros(1, 1, 4, 4), dict(plan="fast")),
        ("plan", torch.zeros(1, 1, 4, 4), dict(plan={"eta": 0.0}, strength=0.5)),
        ("num_samples", torch.zeros(1, 1, 4, 4), dict(num_samples=0)),
        ("num_samples", torch.zeros(1, 1, 4, 4), dict(num_samples=True)),
        ("hard_consistency", torch.zeros(1, 1, 4, 4), dict(hard_consistency="yes")),
        ("color_fix", torch.zeros(1, 1, 4, 4), dict(color_fix=1)),
        ("clip_sample", torch.zeros(1, 1, 4, 4), dict(clip_sample=None)),
        ("tile", torch.zeros(1, 1, 4, 4), dict(tile=2)),
        ("tile", torch.zeros(1, 1, 4, 4), dict(tile=7)),
        ("tile_overlap", torch.zeros(1, 1, 4, 4), dict(tile=8, tile_overlap=8)),
        ("tile_overlap", torch.zeros(1, 1, 4, 4), dict(tile_overlap=8)),
        ("generator", torch.zeros(1, 1, 4, 4), dict(generator=generators(2))),
        ("generator", torch.zeros(1, 1, 4, 4), dict(generator=[0])),
        ("generator", torch.zeros(1, 1, 4, 4), dict(generator=0)),
        ("generator", torch.zeros(1, 1, 4, 4), dict(num_samples=2, generator=generators(2))),
        ("output_type", torch.zeros(1, 1, 4, 4), dict(output_type="tensor")),
        ("callback", torch.zeros(1, 1, 4, 4), dict(callback_on_step_end_tensor_inputs=["x"])),
        ("image", torch.full((1, 1, 4, 4), math.nan), {}),
        ("image", torch.full((1, 1, 4, 4), 2.0), {}),
        ("image", torch.zeros(1, 3, 4, 4), {}),
        ("image", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), {}),
        ("image", np.zeros((4, 4, 1), np.uint8), {}),
        ("image", torch.zeros(4, 4), {}),
        ("image", torch.zeros(0, 1, 4, 4), {}),
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


def test_schedulers_and_networks_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="scheduler"):
        quiet(scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="from_config"):
        quiet(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="low_res"):
        quiet(UNet2DModel(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=4, sample_size=8,
                          down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]))  # fmt: skip
    with pytest.raises(ValueError, match="out_channels=2"):
        quiet(scheduler=process(variance_type="learned_range"))
    for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        with pytest.raises(ValueError, match="eta"):
            quiet(scheduler=kind.from_config(process().config))(pictures(1, 1, 4, 4), eta=0.0)
    with pytest.raises(ValueError, match="spacing"):
        quiet(scheduler=process("ddim"))(pictures(1, 1, 4, 4), spacing="log_snr")
    pipeline = quiet()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="from_config"):
        pipeline(pictures(1, 1, 4, 4))


def test_schedulers_that_hide_their_noise_levels_are_refused_before_the_network_runs():
    unet = network()
    unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match="noise level"):
        quiet(unet, KDPM2DiscreteScheduler.from_config(process().config))(pictures(1, 1, 4, 4), num_inference_steps=7)
    none_left = DDIMScheduler.from_config(process().config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="no signal"):
        quiet(unet, none_left)(pictures(1, 1, 4, 4), num_inference_steps=7)


def test_what_is_random_comes_from_the_generator():
    pipeline = quiet(scheduler=process("ddpm"))
    state = torch.get_rng_state()
    arguments = dict(num_inference_steps=4, output_type="pt")
    first, second = (pipeline(pictures(1, 1, 4, 4), generator=generators(1), **arguments).images for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(first, second)


# Loading, and what it shares with the other pipelines

ELSEWHERE = """
import sys
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
low = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
generator = torch.Generator().manual_seed(0)
torch.save(pipeline(low, num_samples=2, output_type="latent", generator=generator).images, sys.argv[2])
pipeline.save_pretrained(sys.argv[3])
"""


def test_it_loads_where_pyrdiff_is_not_installed(tmp_path):
    plans = {"default": {"num_inference_steps": 4, "scheduler": ["DPMSolverMultistepScheduler", {}]}}
    pipeline = quiet(scheduler=process(residual_scale=3.0), plans=plans)

    def run(part):
        return part(pictures(2, 1, 4, 4), num_samples=2, output_type="latent", generator=generators(1)[0]).images

    expected = run(pipeline)
    pyrdiff.hub.export(pipeline, tmp_path / "model")
    assert (tmp_path / "model" / "pipeline_residual_sr.py").is_file()
    arguments = [str(tmp_path / name) for name in ("model", "images.pt", "again")]
    warm.run(ELSEWHERE, *arguments, without=["pyrdiff"], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, atol=1e-5, rtol=0)
    for folder in ("model", "again"):
        loaded = pyrdiff.load(tmp_path / folder)
        assert type(loaded) is ResidualSRPipeline and loaded.config.plans == plans
        torch.testing.assert_close(run(loaded), expected, atol=1e-5, rtol=0)


def test_a_solver_of_diffusers_keeps_the_target_through_saving(tmp_path):
    pipeline = quiet(scheduler=process("unipc", residual_scale=3.0))
    pipeline.save_pretrained(tmp_path / "model")
    loaded = ResidualSRPipeline.from_pretrained(tmp_path / "model")
    assert type(loaded.scheduler) is UniPCMultistepScheduler and loaded.scheduler.config.residual_scale == 3.0
    arguments = dict(num_inference_steps=4, output_type="latent")
    first, second = (part(pictures(1, 1, 4, 4), generator=generators(1), **arguments) for part in (pipeline, loaded))
    torch.testing.assert_close(first.images, second.images, atol=1e-5, rtol=0)
