import inspect
import math

import numpy as np
import PIL.Image
import pytest
import torch
import warm
from diffusers import DDPMScheduler

import pyrdiff
from pyrdiff import (
    ParallelTrajectoryPipeline,
    ParallelTrajectoryUNet2DModel,
    PixelAwareScheduler,
    ResidualSRUNet2DModel,
    ScaleAutoencoder,
)
from pyrdiff.models.unet_parallel_trajectory import ParallelTrajectoryOutput

T, LATENTS = 20, 4
SHAPE = (1, 8, 8)
UNET = dict(image_channels=1, encoder_channels=(4, 8), layers_per_block=1, norm_num_groups=4, time_embedding_dim=16)
VAE = dict(image_channels=1, sample_size=8, block_out_channels=(8,), latent_dim=LATENTS, bottleneck_channels=4)


def process(**settings) -> PixelAwareScheduler:
    return PixelAwareScheduler(**{"num_train_timesteps": T, **settings})


def network(seed: int = 1, kind=ParallelTrajectoryUNet2DModel, spread: float = 0.3, **settings):
    """Untrained, but for what would be its first step: with `spread` 0 its answer is 0, the preconditioning's guess."""
    torch.manual_seed(seed)
    unet = kind(**{**UNET, "num_train_timesteps": T, **settings}).eval()
    if unet.config.target == "clean":
        torch.nn.init.normal_(unet.conv_out.weight, std=spread)
    return unet


def autoencoder(seed: int = 2, kind=ScaleAutoencoder, prior: str = "normal", **settings):
    """Untrained, with structures of some contrast; "gmm" has a mixture on the dimensions 2 and 0."""
    torch.manual_seed(seed)
    sizes = dict(norm_num_groups=4, time_embedding_dim=16, num_train_timesteps=T)
    model = kind(**{**VAE, **sizes, "prior": prior, **settings}).eval()
    with torch.no_grad():
        model.conv_out.weight *= 10
        model.to_moments.weight *= 10
    if prior == "gmm":
        means = torch.tensor([[2.0, -1.0], [-3.0, 4.0], [0.0, 9.0]])
        covariances = torch.tensor([[0.5, 0.2], [0.2, 0.3]]).expand(3, 2, 2)
        model.set_prior(torch.tensor([0.5, 0.3, 0.2]), means, covariances, torch.tensor([2, 0]))
    return model


def quiet(unet=None, vae="own", scheduler=None) -> ParallelTrajectoryPipeline:
    vae = autoencoder() if vae == "own" else vae
    pipeline = ParallelTrajectoryPipeline(network() if unet is None else unet, vae, scheduler or process())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [seeded(first + index) for index in range(count)]


def draw(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def pictures(count: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, *SHAPE, generator=seeded(seed))


def watch(module) -> list[dict]:
    """What the network is called with, and what it answers, call by call."""
    calls, names = [], list(inspect.signature(module.forward).parameters)

    def keep(_, positional, named, output):
        calls.append({**dict(zip(names, positional, strict=False)), **named, "output": output})

    module.register_forward_hook(keep, with_kwargs=True)
    return calls


def alpha_bar(scheduler, structure: torch.Tensor, timestep: float) -> torch.Tensor:
    """Eq. 9 with floor and ramp, written out, in float64."""
    config = scheduler.config
    return torch.exp(-config.gamma * (structure.double() + config.floor) * (timestep / T) ** config.ramp_power)


class Oracle(ParallelTrajectoryUNet2DModel):
    """Knows the image, up to an error: what the network must say for the clean estimate to be that, in float64."""

    truth, error, scheduler = None, 0.0, None

    def forward(self, sample, timestep, structure=None, steps=None, return_dict=True):
        structure = 0.5 if structure is None else structure.double()
        left = alpha_bar(self.scheduler, torch.as_tensor(structure), timestep)
        power = self.scheduler.config.residual_std**2
        variance = left * power + 1 - left
        skip = structure + left.sqrt() * power / variance.sqrt() * sample.double()
        answer = (self.truth + self.error - skip) / (power * (1 - left) / variance).sqrt()
        return ParallelTrajectoryOutput(sample=answer.float())


def oracle(truth: torch.Tensor, scheduler, error: float = 0.0, **settings) -> Oracle:
    unet = network(kind=Oracle, **settings)
    unet.truth, unet.error, unet.scheduler = truth.double(), error, scheduler
    return unet


class Known(ScaleAutoencoder):
    """Its structure is a given image."""

    truth = None

    def decode(self, latents):
        return self.truth.expand(len(latents), *SHAPE)


def known(truth: torch.Tensor, **settings) -> Known:
    vae = autoencoder(kind=Known, **settings)
    vae.truth = truth
    return vae


# One call, or a few


TIMES = {1: [20], 2: [20, 10], 3: [20, 13, 7], 4: [20, 15, 10, 5], 7: [20, 17, 14, 11, 9, 6, 3], T: [*range(T, 0, -1)]}


@pytest.mark.parametrize("passes", TIMES)
def test_passes_are_network_calls_and_the_structure_is_decoded_once(passes, monkeypatch):
    pipeline = quiet()
    calls, decode, decoded = watch(pipeline.unet), pipeline.autoencoder.decode, []
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda z: decoded.append(z) or decode(z))
    pipeline(2, num_passes=passes, return_trajectory=True)
    assert [call["timestep"] for call in calls] == TIMES[passes]
    assert len(decoded) == 1 and pipeline.num_timesteps == passes
    assert all(call["steps"] is None for call in calls)  # a tied head has no noises to give
    assert all(torch.equal(call["structure"], calls[0]["structure"]) for call in calls)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("passes", [1, 2, 7, T])
def test_the_right_image_arrives_whatever_the_passes(passes, eta):
    scheduler, image = process(), pictures(3, low=4e-3)
    images = quiet(oracle(image, scheduler), scheduler=scheduler)(
        3, num_passes=passes, eta=eta, generator=seeded(), output_type="latent"
    ).images
    torch.testing.assert_close(images, image, atol=1e-6, rtol=0)


@pytest.mark.parametrize("passes", [1, 7, T])
def test_an_error_of_the_network_arrives_as_it_is(passes):
    scheduler, image = process(), pictures(2, low=0.4, high=0.6)
    for error in (-0.05, 0.05):
        pipeline = quiet(oracle(image, scheduler, error), scheduler=scheduler)
        images = pipeline(2, num_passes=passes, generator=seeded(), output_type="latent").images
        torch.testing.assert_close(images, image + error, atol=2e-6, rtol=0)
    pipeline = quiet(oracle(image, scheduler, 3.0), scheduler=scheduler)
    run = dict(num_passes=passes, generator=seeded(), output_type="latent")
    torch.testing.assert_close(pipeline(2, clip_sample=False, **run).images, image + 3, atol=1e-5, rtol=0)
    assert torch.equal(pipeline(2, **run).images, torch.ones(2, *SHAPE))
    pipeline.unet.error = -3.0
    assert torch.equal(pipeline(2, **run).images, torch.full((2, *SHAPE), 4e-3))


def test_gaussian_images_about_the_structure_come_out_as_they_are():
    """
    A network that says 0 gives E[x_0 | x_i] of images N(structure, sd ** 2). One pass gives E[x_0 | x_T]; more passes
    bring the spread to sd, up to the variance of x_0 that eq. 4's posterior, of one x_0, leaves out of each step.
    """
    total, sd = 400, 0.5
    scheduler = process(gamma=2.0, floor=1.0, residual_std=sd, num_train_timesteps=total)
    small = dict(num_train_timesteps=total, encoder_channels=(4,), patch_size=4)
    pipeline = quiet(network(spread=0.0, **small), autoencoder(num_train_timesteps=total), scheduler)

    def expected_spread(passes: int, structure: torch.Tensor) -> float:
        """In units of sd: each pass is linear in the state, so its variance is a recursion."""
        rate, power = 2 * (structure.double() + 1), sd**2
        times = [round(total * k / passes) / total for k in range(passes, -1, -1)]
        left = (-rate).exp()
        variance = left * power + 1 - left
        for late, early in zip(times, times[1:], strict=False):
            late, early = (torch.exp(-rate * time**3) for time in (late, early))
            gain = late.sqrt() * power / (late * power + 1 - late)  # of the clean estimate
            rho = (early.reciprocal() - 1).sqrt() / (late.reciprocal() - 1).sqrt()
            gain = early.sqrt() * gain + (1 - early).sqrt() * rho * (1 - late.sqrt() * gain) / (1 - late).sqrt()
            variance = gain**2 * variance + (1 - early) * (1 - rho**2)
        return (variance.mean() / power).sqrt().item()

    for passes, count in ((1, 512), (8, 256), (64, 256)):
        latents = draw(1, LATENTS).expand(count, -1)
        run = dict(latents=latents, eta=1.0, clip_sample=False, output_type="latent")
        result = pipeline(num_passes=passes, generator=seeded(), **run)
        deviation = (result.images - result.structure).double() / sd
        spread = expected_spread(passes, result.structure[:1])
        error = 4 * spread / deviation.numel() ** 0.5
        assert abs(deviation.mean()) < error and abs(deviation.std() - spread) < error
    left = torch.exp(-2 * (result.structure.double() + 1))
    explained = (left * sd**2 / (left * sd**2 + 1 - left)).mean().sqrt()  # of the standard deviation, by x_T
    assert abs(expected_spread(1, result.structure) - explained) < 1e-9 and 0.05 < explained < 0.2
    assert 0.93 < spread < 1 and 0.985 < expected_spread(total, result.structure) < 1


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("clip", [True, False])
def test_it_is_the_schedulers_own_loop(passes, eta, clip):
    scheduler = process(eta=0.8, schedule="uniform" if clip else "pixel")
    pipeline = quiet(vae=autoencoder(prior="gmm"), scheduler=scheduler)
    ours = pipeline(3, passes, eta=eta, clip_sample=clip, generator=seeded(), output_type="latent")
    generator, vae = seeded(), pipeline.autoencoder
    scheduler.set_timesteps(passes)
    with torch.no_grad():
        structure = vae.decode(vae.sample_prior(3, generator=generator))
        sample = scheduler.prior_sample(structure, generator=generator)
        for time in scheduler.timesteps.tolist():
            network_input, skip, scale = scheduler.precondition(sample, time, structure)
            clean = skip + scale * pipeline.unet(network_input, time, structure).sample
            clean = clean.clamp(4e-3, 1) if clip else clean
            sample = scheduler.step(clean, time, sample, structure, eta=eta, generator=generator).prev_sample
    assert torch.equal(ours.images, sample) and torch.equal(ours.structure, structure)


def test_passes_are_at_the_timesteps_that_are_asked_for():
    pipeline, run = quiet(), dict(output_type="latent", return_trajectory=True)
    calls = watch(pipeline.unet)
    found = pipeline(2, timesteps=[20, 15, 10, 5], generator=seeded(), **run)
    same = pipeline(2, num_passes=4, generator=seeded(), **run)
    assert torch.equal(found.images, same.images) and pipeline.num_timesteps == 4
    pipeline(2, timesteps=(20, 3))
    assert [call["timestep"] for call in calls[8:]] == [20, 3]


def test_the_mode_is_the_schedulers_unless_told():
    image = pictures(1)
    paper = quiet(scheduler=process(mode="paper"))
    run = dict(image=image, timestep=9, output_type="latent")
    asked = quiet(scheduler=process(floor=0.0, ramp_power=1.0))(mode="paper", generator=seeded(), **run)
    assert torch.equal(paper(generator=seeded(), **run).images, asked.images)
    assert not torch.equal(paper(mode="structure", generator=seeded(), **run).images, asked.images)


# Where it starts


@pytest.mark.parametrize("passes", [1, 3])
def test_a_noisy_image_is_where_it_starts(passes):
    pipeline, noisy, time = quiet(), draw(2, *SHAPE), 13
    calls = watch(pipeline.unet)
    result = pipeline(image=noisy, timestep=time, num_passes=passes, output_type="latent", generator=seeded())
    with torch.no_grad():
        structure = pipeline.autoencoder.decode(pipeline.autoencoder.encode(noisy, time)[0])
    assert torch.equal(result.structure, structure)
    assert [call["timestep"] for call in calls] == {1: [13], 3: [13, 9, 4]}[passes]
    wanted = pipeline.scheduler.precondition(noisy, time, structure)[0]
    assert torch.equal(calls[0]["sample"], wanted) and torch.equal(calls[0]["structure"], structure)


def test_a_noisy_image_is_restored():
    scheduler, image = process(), pictures(2, low=4e-3)
    for time in (1, 6, T):
        noisy = scheduler.add_noise(image, draw(2, *SHAPE), time)
        pipeline = quiet(oracle(image, scheduler), scheduler=scheduler)
        images = pipeline(image=noisy, timestep=time, num_passes=1, output_type="latent").images
        torch.testing.assert_close(images, image, atol=1e-6, rtol=0)


def test_of_a_clean_image_only_the_structure_is_kept():
    pipeline, image = quiet(), pictures(2)
    calls, vae = watch(pipeline.unet), pipeline.autoencoder
    with torch.no_grad():
        latents = vae.encode(4e-3 + (1 - 4e-3) * image, 0)[0]
    run = dict(num_passes=3, output_type="latent")
    ours = pipeline(image=image, timestep=0, generator=seeded(), **run)
    same = pipeline(latents=latents, generator=seeded(), **run)
    torch.testing.assert_close(ours.structure, vae.decode(latents), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.images, same.images, atol=1e-5, rtol=0)
    assert calls[0]["timestep"] == T
    other = pipeline(image=image, timestep=0, generator=seeded(1), **run)
    assert torch.equal(other.structure, ours.structure) and not torch.allclose(other.images, ours.images, atol=0.01)


def test_kinds_of_clean_images():
    array = (pictures(2).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    pils = [PIL.Image.fromarray((each[..., 0] * 255).round().astype(np.uint8)) for each in array]
    pipeline = quiet()
    results = [
        pipeline(image=image, timestep=0, generator=generators(2), output_type="pt").images
        for image in (tensor, array, pils, list(tensor), list(array), tensor.double())
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=0)
    single = pipeline(image=pils[0], timestep=0, generator=generators(1), output_type="pt").images
    torch.testing.assert_close(single, results[0][:1], atol=1e-5, rtol=0)


def test_latents_give_the_structure():
    pipeline, latents = quiet(), draw(3, LATENTS)
    result = pipeline(latents=latents, generator=seeded(), output_type="latent")
    with torch.no_grad():
        structure = pipeline.autoencoder.decode(latents)
    assert torch.equal(result.structure, structure)
    calls = watch(pipeline.unet)
    pipeline(latents=latents, generator=seeded())
    start = pipeline.scheduler.prior_sample(structure, generator=seeded())
    assert torch.equal(calls[0]["sample"], pipeline.scheduler.precondition(start, T, structure)[0])


def test_a_scale_is_turned_into_the_image_that_has_it():
    """Eq. 7 solved for the image, within its range: a scale of 0 is white, one of 1 black."""
    scheduler, image = process(), pictures(1, low=4e-3)
    scale = torch.exp(-20 * (image + 0.1))
    for given, wanted in ((scale, image), (torch.zeros_like(scale), 1.0), (torch.ones_like(scale), 4e-3)):
        pipeline = quiet(vae=known(given, output="scale"), scheduler=scheduler)
        structure = pipeline(1, output_type="latent").structure
        torch.testing.assert_close(structure, torch.as_tensor(wanted).expand_as(structure), atol=1e-5, rtol=0)


# The trajectory


@pytest.mark.parametrize("asked", [None, [5, 17, 1, T, 11]])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_trajectory_is_a_closed_form_of_each_pass(passes, asked):
    """In every block, the clean estimate and the noise of its first state, less the more steps it lies back."""
    scheduler, states = process(), []
    pipeline = quiet(scheduler=scheduler)
    run = dict(num_passes=passes, generator=seeded(), output_type="latent", eta=0.7)
    plain = pipeline(2, **run)
    calls = watch(pipeline.unet)
    run["generator"] = seeded()
    keep = lambda pipe, step, time, tensors: states.append((time, tensors["latents"])) and None  # noqa: E731
    result = pipeline(2, return_trajectory=True, trajectory_steps=asked, callback_on_step_end=keep, **run)
    steps = sorted(asked or range(1, T + 1), reverse=True)
    assert torch.equal(plain.images, result.images) and len(calls) == passes
    assert plain.trajectory is None and plain.trajectory_steps is None
    assert result.trajectory_steps == steps and len(result.trajectory) == len(steps)

    structure, generator = result.structure, seeded()
    latents = pipeline.autoencoder.sample_prior(2, generator=generator)  # so that the next is what came next
    start = scheduler.prior_sample(pipeline.autoencoder.decode(latents), generator=generator).detach()
    blocks = dict(zip([time for time, _ in states], [start, *[state for _, state in states]], strict=False))
    for step, state in zip(steps, result.trajectory, strict=True):
        time = min(time for time in blocks if time >= step)
        sample = blocks[time]
        call = next(call for call in calls if call["timestep"] == time)
        _, skip, scale = scheduler.precondition(sample, time, structure)
        clean = (skip + scale * call["output"].sample).clamp(4e-3, 1).double()
        late, early = (alpha_bar(scheduler, structure, each) for each in (time, step))
        noise = (sample.double() - late.sqrt() * clean) / (1 - late).sqrt()
        rho = ((1 / early - 1) / (1 / late - 1)).sqrt()
        wanted = early.sqrt() * clean + (1 - early).sqrt() * rho * noise
        torch.testing.assert_close(state.double(), wanted, atol=2e-5, rtol=0)
        if step == time:
            torch.testing.assert_close(state, sample, atol=2e-5, rtol=0)


def test_a_trajectory_begins_at_the_noisy_image():
    pipeline, noisy = quiet(), draw(2, *SHAPE)
    result = pipeline(image=noisy, timestep=7, output_type="latent", return_trajectory=True)
    assert result.trajectory_steps == [7, 6, 5, 4, 3, 2, 1]
    torch.testing.assert_close(result.trajectory[0], noisy, atol=2e-5, rtol=0)


def test_a_head_is_asked_for_the_steps_of_its_pass():
    pipeline, asked = quiet(network(head="literal")), [2, 9, 5, T, 14]
    calls = watch(pipeline.unet)
    run = dict(num_passes=4, return_trajectory=True, clip_sample=False, output_type="latent", generator=seeded())
    result = pipeline(2, trajectory_steps=asked, **run)
    assert [call["timestep"] for call in calls] == [20, 15, 10, 5]
    assert [call["steps"] for call in calls] == [[20], [14], [9], [5, 2]]
    noises = torch.cat([call["output"].noises for call in calls])
    left = torch.stack([alpha_bar(pipeline.scheduler, result.structure, step) for step in result.trajectory_steps])
    images = torch.stack(result.trajectory)[-2:].double() - ((1 - left).sqrt() * noises)[-2:]
    clean = result.images.double()  # the last pass leads to its own estimate
    torch.testing.assert_close(images, left[-2:].sqrt() * clean, atol=1e-5, rtol=0)
    calls.clear()
    pipeline(2, trajectory_steps=[T], **run)
    assert [call["steps"] for call in calls] == [[T], None, None, None]


# Algorithm 1


def paper(unet=None, vae="own", **settings) -> ParallelTrajectoryPipeline:
    return quiet(unet, vae, process(mode="paper", **settings))


@pytest.mark.parametrize("reading", ["A", "B"])
@pytest.mark.parametrize("target", ["clean", "noise"])
def test_algorithm_1_is_the_schedulers(target, reading):
    """Stepwise where the states are asked for, at once where not."""
    pipeline = paper(network(target=target, head="tied" if target == "clean" else "literal"), gamma=4.0)
    scheduler, noisy, time = pipeline.scheduler, draw(2, *SHAPE), 13
    calls = watch(pipeline.unet)
    run = dict(image=noisy, timestep=time, reading=reading, output_type="latent")
    at_once = pipeline(generator=seeded(), **run)
    stepwise = pipeline(generator=seeded(), return_trajectory=True, trajectory_steps=[13, 4, 2], **run)
    assert len(calls) == 2 and pipeline.num_timesteps == 1
    assert [call["timestep"] for call in calls] == [time, time]

    with torch.no_grad():
        structure = pipeline.autoencoder.decode(pipeline.autoencoder.encode(noisy, time)[0])
    assert torch.equal(at_once.structure, structure)
    if target == "noise":
        assert calls[0]["steps"] == list(range(1, time + 1))
        assert torch.equal(calls[0]["sample"], noisy)
        assert torch.equal(calls[0]["structure"], torch.exp(-4.0 * structure))
        noises = calls[0]["output"].noises
    else:
        assert calls[0]["steps"] is None and torch.equal(calls[0]["structure"], structure)
        network_input, skip, scale = scheduler.precondition(noisy, time, structure)
        assert torch.equal(calls[0]["sample"], network_input)
        clean = skip + scale * calls[0]["output"].sample
        noises = scheduler.tied_noise(noisy, clean, time, range(1, time + 1), structure)
    assert torch.equal(at_once.images, scheduler.collapse(noises, noisy, structure, reading, generator=seeded()))
    generator, sample, states = seeded(), noisy, {}
    for step in range(time, 0, -1):
        states[step] = sample
        sample = scheduler.step_paper(noises[step - 1], step, sample, structure, reading, generator=generator)
    assert torch.equal(stepwise.images, sample) and stepwise.trajectory_steps == [13, 4, 2]
    for step, state in zip([13, 4, 2], stepwise.trajectory, strict=True):
        assert torch.equal(state, states[step])

    both = [pipeline(eta=0.0, return_trajectory=wanted, **run).images for wanted in (False, True)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-4 * both[0].abs().max().item())
    assert not torch.allclose(both[0], at_once.images, atol=0.01)  # there is noise without eta=0


@pytest.mark.parametrize("time", [1, 8, T])
def test_algorithm_1_returns_the_image_if_everything_is_exact(time):
    """Structure and noises of an oracle, no fresh noise: acceptance test 1 of the method. With it, it diverges."""
    scheduler, image = process(mode="paper", gamma=10.0), pictures(2, low=4e-3)
    noisy = scheduler.add_noise(image, draw(2, *SHAPE), time)
    pipeline = quiet(oracle(image, scheduler), known(image), scheduler)
    run = dict(image=noisy, timestep=time, output_type="latent")
    for wanted in (False, True):
        images = pipeline(eta=0.0, return_trajectory=wanted, **run).images
        torch.testing.assert_close(images, image, atol=1e-3, rtol=0)
    if time == T:
        error = (pipeline(generator=seeded(), **run).images - image).double()
        spread = scheduler.fresh_variance(10.0 * image.double(), T).sqrt()
        assert spread.max() > 30 and abs((error / spread).std() - 1) < 4 / (2 * error.numel()) ** 0.5


def test_algorithm_1_warns(caplog):
    image = torch.full((1, *SHAPE), 0.5)
    pipeline = paper(vae=known(image))
    pipeline(mode="structure", image=image, timestep=3)
    assert not caplog.records
    pipeline(image=image, timestep=3)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name == "pyrdiff.pipelines.pipeline_parallel_trajectory"
    assert f"up to {math.exp(5):.2g} times" in record.message and "mode='structure'" in record.message


# Generators


class Flat(ScaleAutoencoder):
    """Its latents are the structure's pixels: what is left is noise."""

    def decode(self, latents):
        return (4e-3 + (1 - 4e-3) * torch.sigmoid(latents)).unflatten(1, SHAPE)


class Pointwise(ParallelTrajectoryUNet2DModel):
    """The same answer for a pixel in any batch."""

    def forward(self, sample, timestep, structure=None, steps=None, return_dict=True):
        return ParallelTrajectoryOutput(sample=torch.sin(3 * sample + 2 * structure) * timestep / T)


@pytest.mark.parametrize("prior", ["normal", "gmm"])
@pytest.mark.parametrize("passes", [1, 5])
def test_the_noise_of_an_image_is_its_generators(passes, prior):
    pipeline = quiet(network(kind=Pointwise), autoencoder(kind=Flat, prior=prior, latent_dim=64))
    run = dict(num_passes=passes, output_type="latent")
    together = pipeline(4, generator=generators(4), **run)
    for index in range(4):
        for generator in (seeded(index), generators(1, index)):
            alone = pipeline(1, generator=generator, **run)
            assert torch.equal(alone.images[0], together.images[index])
            assert torch.equal(alone.structure[0], together.structure[index])
    assert len({image.sum().item() for image in together.images}) == 4


@pytest.mark.parametrize("prior", ["normal", "gmm"])
def test_an_image_does_not_depend_on_its_batch(prior):
    pipeline = quiet(vae=autoencoder(prior=prior))
    run = dict(num_passes=5, output_type="np", return_trajectory=True, trajectory_steps=[9])
    together = pipeline(4, generator=generators(4), **run)
    for index in (0, 3):
        alone = pipeline(generator=seeded(index), **run)
        for ours, theirs in ((alone.images, together.images), (alone.trajectory[0], together.trajectory[0])):
            np.testing.assert_allclose(ours[0], theirs[index], atol=1 / 255)


@pytest.mark.parametrize("arguments", [dict(), dict(image=pictures(1), timestep=9, mode="paper")], ids=["", "paper"])
def test_what_is_random_comes_from_the_generator(arguments):
    pipeline, state = quiet(vae=autoencoder(prior="gmm")), torch.get_rng_state()
    passes = 1 if arguments else 4
    first, second, other = (
        pipeline(num_passes=passes, generator=seeded(seed), output_type="latent", **arguments).images
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_prior_is_the_autoencoders():
    """The fitted mixture, dimensions 2 and 0, is what is drawn from; and without one nothing is."""
    pipeline, seen = quiet(vae=autoencoder(kind=Flat, prior="gmm", latent_dim=64), unet=network(kind=Pointwise)), []
    result = pipeline(2000, generator=seeded(), output_type="latent")
    latents = torch.logit((result.structure.flatten(1).double() - 4e-3) / (1 - 4e-3))
    for dimension, mean in ((2, 0.5 * 2 + 0.3 * -3), (0, 0.5 * -1 + 0.3 * 4 + 0.2 * 9), (1, 0.0), (63, 0.0)):
        spread = latents[:, dimension].std()
        assert abs(latents[:, dimension].mean() - mean) < 4 * spread / 2000**0.5
        assert (spread > 1.5) == (dimension in (0, 2))
    pipeline = quiet(vae=ScaleAutoencoder(**VAE, num_train_timesteps=T))
    pipeline.unet.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError, match="no mixture was fitted"):
        pipeline()
    assert not seen


# Without structure


@pytest.mark.parametrize("passes", [1, 5])
def test_without_structure_images_grow_from_gray(passes):
    scheduler, image = process(residual_std=0.3), pictures(2, low=4e-3)
    unet = oracle(image, scheduler, use_structure=False, sample_size=8)
    pipeline = quiet(unet, None, scheduler)
    calls = watch(unet)
    result = pipeline(2, num_passes=passes, generator=seeded(), output_type="latent")
    torch.testing.assert_close(result.images, image, atol=1e-6, rtol=0)
    assert torch.equal(result.structure, torch.full((2, *SHAPE), 0.5)) and "structure" not in calls[0]
    start = scheduler.prior_sample(result.structure, generator=seeded())
    assert torch.equal(calls[0]["sample"], scheduler.precondition(start, T, result.structure)[0])
    noisy = draw(2, *SHAPE)
    restored = pipeline(image=noisy, timestep=6, output_type="latent", return_trajectory=True)
    torch.testing.assert_close(restored.images, image, atol=1e-6, rtol=0)
    torch.testing.assert_close(restored.trajectory[0], noisy, atol=2e-5, rtol=0)


def test_sizes_that_are_not_square():
    unet = network(use_structure=False, sample_size=(4, 8))
    assert quiet(unet, None)(2, output_type="pt").images.shape == (2, 1, 4, 8)
    assert quiet(vae=autoencoder(sample_size=(8, 4)))(2, output_type="pt").structure.shape == (2, 1, 8, 4)


# What comes out


def test_kinds_of_output():
    pipeline = quiet(network(image_channels=3), autoencoder(image_channels=3))
    steps = dict(return_trajectory=True, trajectory_steps=[3, T])
    latent, tensors, arrays, pils = (
        pipeline(2, generator=seeded(), output_type=kind, clip_sample=False, **steps)
        for kind in ("latent", "pt", "np", "pil")
    )
    assert latent.trajectory[0].max() > 1 and latent.images.min() < 0  # as they are

    for name in ("images", "structure", "trajectory"):
        of = lambda output: output[name] if name == "trajectory" else [output[name]]  # noqa: B023, E731
        for raw, tensor, array, pictured in zip(of(latent), of(tensors), of(arrays), of(pils), strict=True):
            torch.testing.assert_close(tensor, ((raw - 4e-3) / (1 - 4e-3)).clamp(0, 1), atol=1e-6, rtol=0)
            assert array.shape == (2, 8, 8, 3) and np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
            for image, pixels in zip(pictured, array, strict=True):
                assert image.mode == "RGB" and np.array_equal(np.array(image), (pixels * 255).round())
    assert tensors.trajectory_steps == [T, 3]
    gray = quiet()(1).images[0]
    assert gray.mode == "L" and gray.size == (8, 8)
    assert quiet()().images[0].size == (8, 8)


@pytest.mark.parametrize("arguments", [dict(), dict(image=pictures(2), timestep=9, mode="paper")], ids=["", "paper"])
def test_a_tuple_has_the_same(arguments):
    run = dict(output_type="pt", return_trajectory=True, trajectory_steps=[4, 2], **arguments)
    output = quiet()(generator=seeded(), **run)
    result = quiet()(generator=seeded(), return_dict=False, **run)
    assert isinstance(result, tuple) and len(result) == 4 and result[3] == [4, 2] == output.trajectory_steps
    assert torch.equal(result[0], output.images) and torch.equal(result[1], output.structure)
    assert all(torch.equal(*pair) for pair in zip(result[2], output.trajectory, strict=True))
    assert quiet()(return_dict=False)[2:] == (None, None)


def test_changed_latents_are_used():
    pipeline, seen, changed = quiet(), [], draw(2, *SHAPE)

    def change(pipe, step, time, tensors):
        seen.append((step, time, list(tensors)))
        return {"latents": changed} if step == 1 else None

    calls = watch(pipeline.unet)
    pipeline(2, num_passes=4, callback_on_step_end=change)
    assert seen == [(0, 20, ["latents"]), (1, 15, ["latents"]), (2, 10, ["latents"]), (3, 5, ["latents"])]
    wanted = pipeline.scheduler.precondition(changed, 10, calls[2]["structure"])[0]
    assert torch.equal(calls[2]["sample"], wanted)
    last = lambda pipe, step, time, tensors: {"latents": changed}  # noqa: E731
    assert torch.equal(pipeline(2, callback_on_step_end=last, output_type="latent").images, changed)
    seen.clear()
    pipeline(callback_on_step_end=change, callback_on_step_end_tensor_inputs=[])
    assert seen == [(0, 20, [])]


def test_interrupt():
    pipeline, states = quiet(), []
    calls = watch(pipeline.unet)

    def stop(pipe, step, time, tensors):
        states.append(tensors["latents"])
        pipe._interrupt = step == 1

    run = dict(num_passes=4, output_type="latent", return_trajectory=True)
    result = pipeline(2, callback_on_step_end=stop, **run)
    assert len(calls) == len(states) == 2 and torch.equal(result.images, states[-1])
    assert result.trajectory_steps == list(range(20, 10, -1)) and len(result.trajectory) == 10
    assert pipeline.interrupt
    assert pipeline(2, **run).trajectory_steps == list(range(20, 0, -1)) and not pipeline.interrupt


def test_progress_bar(capsys):
    pipeline = quiet()
    pipeline.set_progress_bar_config(disable=False)
    pipeline(num_passes=3)
    assert "3/3" in capsys.readouterr().err


# Bad input

MISFIT = dict(image=pictures(1), timestep=3)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("batch_size=0", dict(batch_size=0)),
        ("batch_size=2.0", dict(batch_size=2.0)),
        ("batch_size=True", dict(batch_size=True)),
        ("mode='fast'", dict(mode="fast")),
        ("timestep=21", dict(image=pictures(1), timestep=21)),
        ("timestep=-1", dict(image=pictures(1), timestep=-1)),
        ("timestep=2.5", dict(image=pictures(1), timestep=2.5)),
        ("timestep=True", dict(image=pictures(1), timestep=True)),
        ("timestep=False", dict(image=pictures(1), timestep=False)),
        ("image without timestep", dict(image=pictures(1))),
        ("image missing with timestep", dict(timestep=4)),
        ("image missing with timestep", dict(timestep=0)),
        ("num_passes=2, timesteps=", dict(num_passes=2, timesteps=[20, 5])),
        ("timesteps=.* from 20", dict(timesteps=[19, 5])),
        ("timesteps=.* from 3", dict(timesteps=[20, 1], **MISFIT)),
        ("timesteps=.* descending", dict(timesteps=[20, 5, 5])),
        ("timesteps=.* or more", dict(timesteps=[20, 0])),
        ("timesteps=.* whole", dict(timesteps=[20, 1.5])),
        ("num_passes=0", dict(num_passes=0)),
        ("num_passes=21", dict(num_passes=21)),
        ("num_passes=1.0", dict(num_passes=1.0)),
        ("num_passes=True", dict(num_passes=True)),
        ("num_passes=4: .* to 3", dict(num_passes=4, **MISFIT)),
        ("mode='paper' needs a noisy image and its timestep", dict(mode="paper")),
        ("mode='paper' needs a noisy image and its timestep", dict(mode="paper", image=pictures(1), timestep=0)),
        ("num_passes=2 in mode='paper'", dict(mode="paper", num_passes=2, **MISFIT)),
        ("mode='paper' needs an autoencoder", dict(mode="paper", without=True, **MISFIT)),
        ("mode='structure': this unet", dict(target="noise")),
        ("latents: .* beside image", dict(latents=draw(1, LATENTS), **MISFIT)),
        ("latents: .* without an autoencoder", dict(latents=draw(1, LATENTS), without=True)),
        ("latents: got", dict(latents=draw(1, LATENTS + 1))),
        ("latents: got", dict(latents=draw(LATENTS))),
        ("latents: got", dict(latents=draw(0, LATENTS))),
        ("latents: got", dict(latents=[0.0] * LATENTS)),
        ("eta=-0.1", dict(eta=-0.1)),
        ("eta=1.5", dict(eta=1.5)),
        ("eta=nan", dict(eta=math.nan)),
        ("eta=1.5", dict(eta=1.5, mode="paper", **MISFIT)),
        ("reading='C'", dict(reading="C")),
        ("reading='C'", dict(reading="C", mode="paper", **MISFIT)),
        ("generator=3: expected a torch.Generator", dict(generator=3)),
        ("generator=3: expected", dict(generator=[3])),
        (r"generator=\(<torch._C.Generator", dict(generator=(seeded(),))),
        ("generator has 2 entries", dict(generator=generators(2))),
        ("generator has 0 entries", dict(generator=[])),
        ("generator has 3 entries", dict(generator=generators(3), image=pictures(2), timestep=3)),
        ("generator has 3 entries", dict(generator=generators(3), latents=draw(2, LATENTS))),
        ("output_type='tensor'", dict(output_type="tensor")),
        ("callback_on_step_end_tensor_inputs", dict(callback_on_step_end_tensor_inputs=["x"])),
        ("trajectory_steps without", dict(trajectory_steps=[3])),
        ("trajectory_steps", dict(return_trajectory=True, trajectory_steps=[])),
        ("trajectory_steps", dict(return_trajectory=True, trajectory_steps=[0])),
        ("trajectory_steps", dict(return_trajectory=True, trajectory_steps=[21])),
        ("trajectory_steps", dict(return_trajectory=True, trajectory_steps=[4, 4])),
        ("trajectory_steps", dict(return_trajectory=True, trajectory_steps=[2.0])),
        ("trajectory_steps", dict(return_trajectory=True, trajectory_steps=[True])),
        ("trajectory_steps.*to 3", dict(return_trajectory=True, trajectory_steps=[4], **MISFIT)),
        ("image of type ndarray at timestep=3", dict(image=np.zeros((1, 8, 8, 1)), timestep=3)),
        ("image of type list at timestep=3", dict(image=[torch.zeros(*SHAPE)], timestep=3)),
        ("image of type Image at timestep=3", dict(image=PIL.Image.new("L", (8, 8)), timestep=3)),
        ("image: expected a list of images of one kind", dict(image=[], timestep=0)),
        ("image is in mode RGB", dict(image=PIL.Image.new("RGB", (8, 8)), timestep=0)),
        ("image: got uint8", dict(image=np.zeros((8, 8, 1), np.uint8), timestep=0)),
        ("image: got float64", dict(image=np.zeros((8, 8)), timestep=0)),
        ("image of type str", dict(image="photo.png", timestep=0)),
        ("image: expected a list of images of one kind", dict(image=[3], timestep=0)),
        ("image: got torch.uint8", dict(image=torch.zeros(1, *SHAPE, dtype=torch.uint8), timestep=0)),
        ("image: got torch.float32", dict(image=torch.zeros(8, 8), timestep=0)),
        ("image: got torch.float32", dict(image=torch.zeros(0, *SHAPE), timestep=3)),
        ("image has 3 channels: expected 1", dict(image=torch.zeros(1, 3, 8, 8), timestep=0)),
        (r"image is 8x4: expected 8x8", dict(image=torch.zeros(1, 1, 8, 4), timestep=3)),
        (r"image is 8x4: expected 8x8", dict(image=PIL.Image.new("L", (4, 8)), timestep=0)),
        ("image has values that are not finite", dict(image=torch.full((1, *SHAPE), math.nan), timestep=3)),
        ("image has values that are not finite", dict(image=torch.full((1, *SHAPE), math.inf), timestep=0)),
        ("image has values from -0.1 to", dict(image=pictures(1, low=-0.1, high=-0.1), timestep=0)),
        ("image has values from .* to 1.1", dict(image=pictures(1, low=1.1, high=1.1), timestep=0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named_before_a_network_runs(name, arguments, monkeypatch):
    arguments = dict(arguments)
    without, target = arguments.pop("without", False), arguments.pop("target", "clean")
    unet = network(use_structure=not without, sample_size=8, target=target, head="literal")
    pipeline = quiet(unet, None if without else "own")
    unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    if pipeline.autoencoder is not None:
        for part in ("encode", "decode", "sample_prior"):
            monkeypatch.setattr(pipeline.autoencoder, part, lambda *_, **__: pytest.fail("the autoencoder ran"))
    with pytest.raises(ValueError, match=name):
        pipeline(**arguments)


def other_network() -> ResidualSRUNet2DModel:
    return ResidualSRUNet2DModel(
        image_channels=1, scale_factors=(2,), block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8
    )


@pytest.mark.parametrize(
    "name, parts",
    [
        ("scheduler=DDPMScheduler", lambda: (network(), autoencoder(), DDPMScheduler())),
        ("unet=ResidualSRUNet2DModel", lambda: (other_network(), autoencoder(), process())),
        ("use_structure=True, with no autoencoder", lambda: (network(), None, process())),
        ("use_structure=False, with an auto", lambda: (network(use_structure=False), autoencoder(), process())),
        ("unet has num_train_timesteps=20", lambda: (network(), autoencoder(), process(num_train_timesteps=30))),
        ("autoencoder has image_channels=3", lambda: (network(), autoencoder(image_channels=3), process())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_do_not_fit_are_named(name, parts):
    with pytest.raises(ValueError, match=name):
        ParallelTrajectoryPipeline(*parts())


# Loading, and what it shares with the other pipelines

ELSEWHERE = """
import sys
import torch
from diffusers import DiffusionPipeline
for name in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(3, num_passes=4, output_type="pt", return_trajectory=True, generator=generator)
    torch.save([images.images, *images.trajectory], name + ".pt")
    pipeline.save_pretrained(name + "-again")
"""


def same_pixels(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    first, second = torch.stack(first), torch.stack(second)
    return torch.allclose(first, second, atol=1e-5) and torch.equal((first * 255).round(), (second * 255).round())


def sampled(pipeline) -> list[torch.Tensor]:
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(3, num_passes=4, output_type="pt", return_trajectory=True, generator=seeded())
    return [result.images, *result.trajectory]


def test_it_loads_where_pyrdiff_is_not_installed(tmp_path):
    scheduler = process(residual_std=0.2, eta=0.5)
    pipelines = {
        "fitted": quiet(network(head="literal"), autoencoder(prior="gmm"), scheduler),
        "without": quiet(network(use_structure=False, sample_size=8), None, scheduler),
    }
    expected = {name: sampled(pipeline) for name, pipeline in pipelines.items()}
    for name, pipeline in pipelines.items():
        pyrdiff.hub.export(pipeline, tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert "pipeline_tag: unconditional-image-generation" in card and "pipeline(batch_size=4)" in card
    folders = [str(tmp_path / name) for name in pipelines]
    warm.run(ELSEWHERE, *folders, without=["pyrdiff"], check=True, cwd=tmp_path)
    for name, pipeline in pipelines.items():
        assert same_pixels(torch.load(tmp_path / f"{name}.pt"), expected[name])
        for folder in (name, f"{name}-again"):
            assert (tmp_path / folder / "pipeline_parallel_trajectory.py").is_file()
            assert (tmp_path / folder / "autoencoder").exists() == (name != "without")
            load = pyrdiff.load if folder == name else ParallelTrajectoryPipeline.from_pretrained
            loaded = load(tmp_path / folder)
            assert type(loaded) is ParallelTrajectoryPipeline and loaded.scheduler.config.residual_std == 0.2
            for part in ("unet", "autoencoder", "scheduler"):  # the installed classes, not the folder's
                assert type(getattr(loaded, part)) is type(getattr(pipeline, part))
            assert same_pixels(sampled(loaded), expected[name])


def test_a_fitted_prior_is_saved(tmp_path):
    pipeline = quiet(vae=autoencoder(prior="gmm"))
    pipeline.save_pretrained(tmp_path)
    loaded = pyrdiff.load(tmp_path)
    ours, theirs = pipeline.autoencoder, loaded.autoencoder
    assert loaded.autoencoder.config.prior == "gmm"
    assert torch.equal(*(vae.sample_prior(6, generator=seeded()) for vae in (ours, theirs)))
