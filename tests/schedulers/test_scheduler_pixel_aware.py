import itertools
import json
import math
from decimal import Decimal

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from pyrdiff.schedulers import PixelAwareScheduler

SHAPE = (2, 3, 4, 4)
SETTINGS = [
    dict(),
    dict(mode="paper"),
    dict(mode="paper", num_train_timesteps=500, gamma=50.0),
    dict(schedule="uniform", ramp_power=2.0),
    dict(num_train_timesteps=30, gamma=60.0, ramp_power=1.0),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed: int = 0, dtype=torch.float64, **kind) -> torch.Tensor:
    return torch.randn(shape or SHAPE, generator=seeded(seed), dtype=dtype, **kind)


def images(*shape, seed: int = 10, epsilon: float = 4e-3, dtype=torch.float64) -> torch.Tensor:
    return epsilon + (1 - epsilon) * torch.rand(shape or SHAPE, generator=seeded(seed), dtype=torch.float64).to(dtype)


def ramp_of_brightness(count: int = 100, dtype=torch.float64) -> torch.Tensor:
    return torch.linspace(4e-3, 1, count, dtype=torch.float64).to(dtype).reshape(1, 1, 1, count)


def repeated(count: int, *brightness: float) -> torch.Tensor:
    """Of each brightness `count` equal pixels, float64 [count, 1, 1, len(brightness)]."""
    return torch.tensor(brightness, dtype=torch.float64).expand(count, 1, 1, len(brightness)).contiguous()


def paper(**settings) -> PixelAwareScheduler:
    return PixelAwareScheduler(mode="paper", **settings)


def ready(steps: int = 200, **settings) -> PixelAwareScheduler:
    scheduler = PixelAwareScheduler(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def alpha_bar(scheduler, brightness: torch.Tensor, timestep: float) -> torch.Tensor:
    """Eq. 9 with floor and ramp, written out once more, in float64."""
    c = scheduler.config
    rate = c.gamma / 2 if c.schedule == "uniform" else c.gamma * (brightness.double() + c.floor)
    return torch.exp(-rate * (timestep / c.num_train_timesteps) ** c.ramp_power * torch.ones_like(brightness.double()))


def run_paper(scheduler, noises: torch.Tensor, sample: torch.Tensor, structure: torch.Tensor, **arguments):
    """Algorithm 1, lines 5 to 10, with Z^1 ... Z^i given."""
    for step in range(len(noises), 0, -1):
        sample = scheduler.step_paper(noises[step - 1], step, sample, structure, **arguments)
    return sample


# The noise process.


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_forward_jump_is_equation_3_of_equation_9(settings):
    scheduler, image, structure, noise = PixelAwareScheduler(**settings), images(), images(seed=11), draw()
    for time in (0, 1, 7, 12.5, 29):
        for given, brightness in ((None, image), (structure, structure)):
            left = alpha_bar(scheduler, brightness, time)
            found = scheduler.add_noise(image, noise, time, given)
            assert torch.allclose(found, left.sqrt() * image + (1 - left).sqrt() * noise, rtol=0, atol=1e-10)
            assert torch.allclose(scheduler.noise_of(found, image, time, given), noise) or time == 0
            velocity = left.sqrt() * noise - (1 - left).sqrt() * image
            assert torch.allclose(scheduler.get_velocity(image, noise, time, given), velocity, rtol=0, atol=1e-10)
            if time:
                wanted = image**2 * left / (1 - left)
                assert torch.allclose(scheduler.snr(image, time, given), wanted, rtol=1e-9)
    assert torch.allclose(scheduler.image_scale(image), alpha_bar(scheduler, image, len(scheduler)), rtol=1e-12)
    assert torch.equal(scheduler.add_noise(image, noise, 5), scheduler.add_noise(image, noise, 5, image))


def test_the_defaults_are_those_of_the_modes():
    config, literal = PixelAwareScheduler().config, paper().config
    assert (config.floor, config.ramp_power, literal.floor, literal.ramp_power) == (0.1, 3.0, 0.0, 1.0)
    assert paper(floor=0.2, ramp_power=2.0).config.floor == 0.2 and paper(ramp_power=2.0).config.ramp_power == 2.0
    assert (PixelAwareScheduler(schedule="uniform").rate(images()) == 10).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_image_has_its_own_timestep(settings):
    scheduler, image, noise, clean = PixelAwareScheduler(**settings), images(), draw(), images(seed=12)
    calls = [
        lambda rows, time: scheduler.add_noise(image[rows], noise[rows], time),
        lambda rows, time: scheduler.get_velocity(image[rows], noise[rows], time),
        lambda rows, time: scheduler.snr(image[rows], time),
        lambda rows, time: scheduler.noise_of(noise[rows], clean[rows], time, image[rows]),
        lambda rows, time: torch.stack(scheduler.precondition(noise[rows], time, image[rows]), 1),
        lambda rows, time: scheduler.log_alpha_bar(scheduler.rate(image[rows]), time),
        lambda rows, time: scheduler.rho(scheduler.rate(image[rows]), time, 2),
        lambda rows, time: scheduler.tied_noise(noise[rows], clean[rows], time, [1, 9, 17], image[rows]).transpose(
            0, 1
        ),
    ]
    for times in (torch.tensor([9, 23]), torch.tensor([2.5, 17.0])):
        for call in calls:
            both = call(slice(None), times)
            for row, time in enumerate(times.tolist()):
                one = slice(row, row + 1)
                for same in (time, torch.tensor(time, dtype=torch.float64), torch.tensor([time])):
                    assert torch.allclose(both[one], call(one, same), rtol=1e-9, atol=1e-12)


def test_at_timestep_0_there_is_no_noise():
    for settings in SETTINGS:
        scheduler, image = PixelAwareScheduler(**settings), images(dtype=torch.float32)
        rate = scheduler.rate(image)
        assert (scheduler.log_alpha_bar(rate, 0) == 0).all()
        assert torch.equal(scheduler.add_noise(image, draw(dtype=torch.float32), 0), image)
        assert (scheduler.rho(rate, 5, 0) == 0).all() and (scheduler.rho(rate, 5, 5) == 1).all()
        # The variance of eq. 4 at the first step: none either.
        assert (scheduler._paper_step(rate, 1).variance == 0).all() and (scheduler.fresh_variance(rate, 1) == 0).all()
        ends = [scheduler.step_paper(image, 1, image, image, eta=eta, generator=seeded()) for eta in (0.0, 1.0)]
        assert torch.equal(*ends)


def test_the_first_step_of_the_paper_is_coarse():
    """Section 3.6 of our notes: noise of 0.31 at brightness 1 in both of the paper's settings; u^3 gives 1.7e-3."""
    white, first = torch.ones(1, 1, 1, 1).double(), {}
    for ramp, scheduler in ((1, paper()), (2, paper(ramp_power=2.0, floor=0.1)), (3, PixelAwareScheduler())):
        first[ramp] = scheduler.add_noise(white, white, 1) - scheduler.add_noise(white, 0 * white, 1)
    assert [round(first[ramp].item(), 4) for ramp in (1, 2, 3)] == [0.3085, 0.0234, 0.0017]
    assert paper(num_train_timesteps=500, gamma=50.0).snr(white, 1).item() == pytest.approx(1 / math.expm1(0.1))


# Several timesteps of one chain.


@pytest.mark.parametrize("settings", [dict(), dict(mode="paper"), dict(schedule="uniform")], ids=str)
@pytest.mark.parametrize("own", [True, False])
def test_paths_are_in_law_the_chain_of_equation_2(settings, own):
    scheduler, image = PixelAwareScheduler(20, **settings), repeated(30000, 0.004, 0.1, 0.5, 1.0)
    structure = image if own else repeated(30000, 0.9, 0.3, 0.5, 0.01)
    anchors, generator = [1, 4, 11, 20], seeded(1)
    states, noises = scheduler.sample_path(image, anchors, None if own else structure, generator)
    chain, stepwise = image, []
    for step in range(1, 21):
        alpha = alpha_bar(scheduler, structure[:1], step) / alpha_bar(scheduler, structure[:1], step - 1)
        white = torch.randn(image.shape, generator=generator, dtype=image.dtype)
        chain = alpha.sqrt() * chain + (1 - alpha).sqrt() * white
        stepwise += [chain] if step in anchors else []

    left = torch.stack([alpha_bar(scheduler, structure[0], step) for step in anchors]).reshape(4, 4)
    power = 1 / left - 1  # S
    wanted = (torch.minimum(power[:, None], power) / torch.maximum(power[:, None], power)).sqrt()
    for found in (states, torch.stack(stepwise)):
        white = (found.reshape(4, -1, 4) - left.sqrt()[:, None] * image[0].flatten()) / (1 - left).sqrt()[:, None]
        assert white.mean(1).abs().max() < 0.025
        assert (torch.einsum("inp,jnp->ijp", white, white) / 30000 - wanted).abs().max() < 0.035
    assert (torch.einsum("inp,jnp->ijp", *[noises.reshape(4, -1, 4)] * 2) / 30000 - wanted).abs().max() < 0.035
    rate = scheduler.rate(structure[:1])
    rho = [torch.stack([scheduler.rho(rate, max(i, j), min(i, j)).flatten() for j in anchors]) for i in anchors]
    assert torch.allclose(torch.stack(rho), wanted, rtol=1e-9)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_states_of_a_path_are_those_of_its_noises(settings):
    scheduler, image, structure = PixelAwareScheduler(**settings), images(), images(seed=11)
    steps = [1, 2, 9, 30]
    for given in (None, structure):
        states, noises = scheduler.sample_path(image, steps, given, seeded())
        assert states.shape == noises.shape == (4, *SHAPE)
        assert torch.equal(states, scheduler.trajectory(image, noises, steps, given))
        for state, noise, step in zip(states, noises, steps, strict=True):
            assert torch.allclose(state, scheduler.add_noise(image, noise, step, given), rtol=0, atol=1e-12)
            assert torch.allclose(scheduler.noise_of(state, image, step, given), noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_tied_noises_are_the_share_rho_of_the_sample_s_own(settings):
    scheduler, sample, clean, structure = PixelAwareScheduler(**settings), draw(), images(), images(seed=11)
    times, steps = torch.tensor([9, 23]), [23, 1, 9, 10, 24]
    for given in (None, structure):
        found = scheduler.tied_noise(sample, clean, times, steps, given)
        assert found.shape == (5, *SHAPE)
        for row, time in enumerate((9, 23)):
            brightness = (clean if given is None else given)[row]
            left = alpha_bar(scheduler, brightness, time)
            own = (sample[row] - left.sqrt() * clean[row]) / (1 - left).sqrt()
            for step, noise in zip(steps, found[:, row], strict=True):
                before = alpha_bar(scheduler, brightness, step)
                rho = ((1 / before - 1) / (1 / left - 1)).sqrt()
                assert torch.allclose(noise, rho * own, rtol=1e-8) if step <= time else (noise == 0).all()
            at = steps.index(time) if time in steps else None
            assert torch.allclose(found[at, row], own, rtol=1e-12)
            states = scheduler.trajectory(clean, found, steps, given)
            assert torch.allclose(states[at, row], sample[row], rtol=0, atol=1e-12)


def test_the_expected_noise_teaches_as_much_as_a_sampled_one():
    """Rao-Blackwell (3.3): rho * noise_i as the target of Z^j has the gradient of noise_j, and less variance."""
    scheduler, count, late, early = paper(), 100000, 120, 60
    image = repeated(count, 0.004, 0.05, 0.2)
    states, noises = scheduler.sample_path(image, [early, late], generator=seeded(2))
    expected = scheduler.tied_noise(states[1], image, late, [early])[0]

    def gradient(target: torch.Tensor) -> torch.Tensor:
        layer = torch.nn.Linear(1, 1).double()
        torch.nn.init.constant_(layer.weight, 0.4)
        torch.nn.init.constant_(layer.bias, -0.2)
        (layer(states[1].reshape(-1, 1)) - target.reshape(-1, 1)).square().mean().backward()
        return torch.cat([layer.weight.grad.flatten(), layer.bias.grad])

    assert torch.allclose(gradient(expected), gradient(noises[0]), rtol=0, atol=0.02)
    assert (gradient(noises[1]) - gradient(noises[0])).abs().max() > 0.1  # the noise at i itself does not do
    rho = scheduler.rho(scheduler.rate(image[:1]), late, early)
    saved = noises[0].var((0, 1, 2)) - expected.var((0, 1, 2))
    assert torch.allclose(saved, (1 - rho**2).flatten(), rtol=0, atol=0.025)


# Algorithm 1.


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-2), (torch.float64, 1e-8)])
def test_algorithm_1_returns_the_image_from_exact_scale_and_expected_noises(dtype, tolerance):
    scheduler, image = paper(), ramp_of_brightness(1000, dtype)
    sample = scheduler.add_noise(image, draw(1, 1, 1, 1000, dtype=dtype), 200)
    noises = scheduler.tied_noise(sample, image, 200, range(1, 201))
    found = run_paper(scheduler, noises, sample, image, eta=0.0)
    assert found.dtype == dtype and (found - image).abs().max() < tolerance
    assert (scheduler.collapse(noises, sample, image, eta=0.0) - image).abs().max() < tolerance
    assert (run_paper(scheduler, 1.01 * noises, sample, image, eta=0.0) - image).abs().max() > 10  # and only from them


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-20)])
def test_line_9_as_printed_undoes_the_steps_of_equation_2(dtype, tolerance):
    scheduler = paper()
    image = ramp_of_brightness(1000, dtype)
    states, _ = scheduler.sample_path(image, range(1, 201), generator=seeded())
    before, noises = torch.zeros_like(image), []
    for step, state in enumerate(states, start=1):
        left, alpha = (-20 * image * step / 200).exp(), (-20 * image / 200).exp()
        noise = state - left.sqrt() * image
        noises.append((noise - alpha.sqrt() * before) / (1 - alpha).sqrt())
        before = noise
    found = run_paper(scheduler, torch.stack(noises), states[-1], image, reading="B", eta=0.0)
    assert (found - image).square().mean() < tolerance
    worse = run_paper(scheduler, torch.stack(noises), states[-1], image, reading="B", generator=seeded(1))
    assert (worse - image).square().mean() > 100  # as printed, with fresh noise


def test_algorithm_1_s_own_noise_diverges_as_predicted():
    """3.5 of our notes: Var e_0 = V_i with the expected noises, 2 V_i with the true ones."""
    scheduler, image = paper(), repeated(3000, 0.004, 0.1, 0.5)
    variance = scheduler.fresh_variance(scheduler.rate(image[:1]), 200).flatten()
    assert [f"{value:.3g}" for value in variance.sqrt().tolist()] == ["0.284", "2.5", "145"]
    assert variance[2].sqrt().item() == pytest.approx(144.7, abs=0.05)
    assert (variance < scheduler.image_scale(image[0]).flatten() ** -1 - 1).all()
    states, noises = scheduler.sample_path(image, range(1, 201), generator=seeded(3))
    expected = scheduler.tied_noise(states[-1], image, 200, range(1, 201))
    for given, factor in ((expected, 1), (noises, 2)):
        error = run_paper(scheduler, given, states[-1], image, generator=seeded(4)) - image
        assert error.var((0, 1, 2)).tolist() == pytest.approx((factor * variance).tolist(), rel=0.09)
        assert error.mean((0, 1, 2)).abs().max() < 5 * (2 * variance.max() / 3000).sqrt()


def test_fresh_variance_is_the_sum_of_3_5():
    for settings in SETTINGS:
        scheduler, brightness = PixelAwareScheduler(**settings), images()
        for time in (1, 2, 17, 30):
            power = [1 / alpha_bar(scheduler, brightness, step) - 1 for step in range(time + 1)]
            terms = [power[j - 1] * (power[j] - power[j - 1]) / power[j] for j in range(2, time + 1)]
            found = scheduler.fresh_variance(scheduler.rate(brightness), time)
            assert torch.allclose(found, sum(terms, torch.zeros_like(brightness)), rtol=1e-8)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("reading", ["A", "B"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_the_collapsed_sum_is_the_loop(settings, reading, dtype, tolerance):
    scheduler, structure, sample = PixelAwareScheduler(**settings), images(dtype=dtype), draw(dtype=dtype)
    for time in (1, 2, 30, len(scheduler)):
        noises = draw(time, *SHAPE, seed=5, dtype=dtype)
        loop = run_paper(scheduler, noises, sample, structure, reading=reading, eta=0.0)
        found = scheduler.collapse(noises, sample, structure, reading=reading, eta=0.0)
        size = 1 / alpha_bar(scheduler, structure, time).sqrt()  # of the terms that are added up
        assert found.dtype == dtype and ((found - loop).abs() / size).max() < 10 * tolerance
        exact = run_paper(scheduler, noises.double(), sample.double(), structure.double(), reading=reading, eta=0.0)
        assert ((found - exact).abs() / size).max() < tolerance  # the loop itself rounds more often


@pytest.mark.parametrize("settings", [dict(mode="paper"), dict(gamma=8.0, floor=0.3)], ids=str)
@pytest.mark.parametrize("eta", [None, 0.5])
def test_the_collapsed_noise_is_the_loop_s_in_law(settings, eta):
    scheduler, structure = PixelAwareScheduler(40, **settings), repeated(4000, 0.004, 0.3, 1.0)
    noises, sample = draw(40, 1, 1, 1, 3).expand(40, *structure.shape), draw(1, 1, 1, 3).expand(structure.shape)
    mean = scheduler.collapse(noises, sample, structure, eta=0.0)
    wanted = (1.0 if eta is None else eta) * scheduler.fresh_variance(scheduler.rate(structure[0]), 40).sqrt().flatten()
    assert (mean == mean[0]).all() and torch.equal(mean, scheduler.collapse(noises, sample, structure, eta=0.0))
    for run in (scheduler.collapse, lambda *given, **kind: run_paper(scheduler, *given, **kind)):
        spread = run(noises, sample, structure, eta=eta, generator=seeded(6)) - mean
        assert spread.std((0, 1, 2)).tolist() == pytest.approx(wanted.tolist(), rel=0.05)


# The reverse steps.


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("prev", [None, 1, 2, 13, 28])
def test_a_full_step_is_the_posterior_of_equation_4(settings, prev):
    scheduler, sample, clean, structure = PixelAwareScheduler(**settings), draw(), images(), images(seed=11)
    for given, brightness in ((structure, structure), (None, clean)):
        late, early = (alpha_bar(scheduler, brightness, time) for time in (29, 28 if prev is None else prev))
        alpha = late / early
        share = (1 - early) / (1 - late)
        mean = alpha.sqrt() * share * sample + early.sqrt() * (1 - alpha) / (1 - late) * clean
        wanted = mean + (share * (1 - alpha)).sqrt() * draw(seed=7)
        found = scheduler.step(clean, 29, sample, given, prev, eta=1.0, generator=seeded(7))
        assert torch.allclose(found.prev_sample, wanted, rtol=0, atol=1e-7)
        assert torch.equal(found.pred_original_sample, clean)
        # Half of the fresh noise, the rest from the sample: the spread about the clean part stays the process's.
        noise = (sample - late.sqrt() * clean) / (1 - late).sqrt()
        rest = (1 - early - 0.25 * share * (1 - alpha)).sqrt()
        wanted = early.sqrt() * clean + rest * noise + 0.5 * (share * (1 - alpha)).sqrt() * draw(seed=7)
        found = scheduler.step(clean, 29, sample, given, prev, eta=0.5, generator=seeded(7)).prev_sample
        assert torch.allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", [dict(), dict(mode="paper")], ids=str)
def test_steps_compose(settings):
    scheduler, clean, count = PixelAwareScheduler(**settings), repeated(40000, 0.01, 0.3, 0.9), 40000
    sample, rate = draw(1, 1, 1, 3).expand(clean.shape), scheduler.rate(clean[:1])
    for late, middle, early in ((200, 90, 20), (60, 59, 1)):
        rho = scheduler.rho(rate, late, early)
        assert torch.allclose(rho, scheduler.rho(rate, late, middle) * scheduler.rho(rate, middle, early), rtol=1e-9)
        left = alpha_bar(scheduler, clean[:1], early)
        noise = scheduler.noise_of(sample[:1], clean[:1], late)
        mean, spread = left.sqrt() * clean[:1] + (1 - left).sqrt() * rho * noise, ((1 - left) * (1 - rho**2)).sqrt()
        generator = seeded(8)
        halfway = scheduler.step(clean, late, sample, prev_timestep=middle, generator=generator).prev_sample
        for found in (
            scheduler.step(clean, middle, halfway, prev_timestep=early, generator=generator).prev_sample,
            scheduler.step(clean, late, sample, prev_timestep=early, generator=generator).prev_sample,
        ):
            white = (found - mean) / spread
            assert white.mean((0, 1, 2)).abs().max() < 5 / count**0.5
            assert white.var((0, 1, 2)).tolist() == pytest.approx([1] * 3, abs=5 * (2 / count) ** 0.5)


@pytest.mark.parametrize("ramp_power", [1.0, 2.0])
@pytest.mark.parametrize("steps", [200, 50, 8, 1])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, "ancestral"])
def test_with_one_rate_for_all_pixels_the_steps_are_those_of_diffusers(ramp_power, steps, eta):
    ours = ready(steps, schedule="uniform", ramp_power=ramp_power)
    left = [math.exp(-10 * (i / 200) ** ramp_power) for i in range(201)]
    settings = dict(
        trained_betas=[1 - late / early for early, late in itertools.pairwise(left)],
        num_train_timesteps=200,
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    if eta == "ancestral":
        theirs, ours_eta, arguments = DDPMScheduler(**settings, variance_type="fixed_small"), None, {}
    else:
        theirs, ours_eta, arguments = DDIMScheduler(**settings, set_alpha_to_one=True), eta, dict(eta=eta)
    theirs.set_timesteps(steps)
    assert (ours.timesteps - 1).tolist() == theirs.timesteps.tolist()
    clean, noise, structure = images(dtype=torch.float32), draw(dtype=torch.float32), images(seed=11)
    for time in ours.timesteps.tolist():
        sample = ours.add_noise(clean, noise, time)
        assert torch.allclose(sample, theirs.add_noise(clean, noise, torch.tensor([time - 1] * 2)), atol=1e-5)
        estimate = (clean + 0.2 * draw(seed=time, dtype=torch.float32)).clamp(4e-3, 1)
        wanted = theirs.step(estimate, time - 1, sample, generator=seeded(9), **arguments).prev_sample
        found = ours.step(estimate, time, sample, structure, eta=ours_eta, generator=seeded(9)).prev_sample
        # Theirs loses digits at the last steps: 1 - alpha_bar in float32 is near its rounding there.
        tolerance = 1e-5 * max(1, 0.05 / (1 - left[time]))
        assert torch.allclose(found, wanted, rtol=0, atol=tolerance), time


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("eta", [0.0, 0.5, None])
def test_a_known_image_is_returned_and_an_error_is_not_amplified(settings, steps, eta):
    scheduler, image, structure = ready(steps, **settings), images(), images(seed=11)
    for offset in (0.0, 0.25):
        for given in (structure, image):
            sample = scheduler.add_noise(image, draw(), len(scheduler), given)
            for time in scheduler.timesteps:
                output = scheduler.step(image + offset, time, sample, given, eta=eta, generator=seeded(time.item()))
                sample = output.prev_sample
                assert sample.abs().max() < 7  # no state on the way grows
            assert torch.equal(sample, image + offset)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_with_a_known_image_every_state_on_the_way_is_of_the_process(eta):
    scheduler, image = ready(5), repeated(40000, 0.004, 0.4, 1.0)
    generator = seeded(11)
    sample = scheduler.add_noise(image, torch.randn(image.shape, generator=generator).double(), 200)
    for time in scheduler.timesteps[:-1].tolist():
        sample = scheduler.step(image, time, sample, image, eta=eta, generator=generator).prev_sample
        noise = scheduler.noise_of(sample, image, scheduler.previous_timestep(time))
        assert noise.mean((0, 1, 2)).abs().max() < 0.025
        assert noise.var((0, 1, 2)).tolist() == pytest.approx([1] * 3, abs=0.04)


# Gaussian data: the structure their mean, residual_std their spread.


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.07, 0.4])
def test_preconditioning_is_the_posterior_of_gaussian_images(settings, spread):
    scheduler, structure, sample = PixelAwareScheduler(**settings, residual_std=spread), images(), draw()
    for time in (1, 9, 30, len(scheduler)):
        signal = (left := alpha_bar(scheduler, structure, time)).sqrt()
        # Precisions add up: 1 / spread^2 about the structure, alpha_bar / (1 - alpha_bar) about sample / signal.
        precision = spread**-2 + left / (1 - left)
        mean = (structure / spread**2 + signal / (1 - left) * sample) / precision
        given, skip, scale = scheduler.precondition(sample, time, structure)
        assert torch.allclose(skip, mean, rtol=1e-8) and torch.allclose(scale**2, 1 / precision, rtol=1e-8)
        assert torch.allclose(given, (sample - signal * structure) / (left * spread**2 + 1 - left).sqrt(), rtol=1e-8)


def test_a_network_sees_and_is_asked_for_unit_variance():
    scheduler, structure = PixelAwareScheduler(residual_std=0.07), repeated(40000, 0.05, 0.5, 0.9)
    image = structure + 0.07 * draw(40000, 1, 1, 3)
    for time in (1.5, 60, 200):
        left = alpha_bar(scheduler, structure, time)
        sample = left.sqrt() * image + (1 - left).sqrt() * draw(40000, 1, 1, 3, seed=1)
        given, skip, scale = scheduler.precondition(sample, time, structure)
        for white in (given, (image - skip) / scale):
            assert white.var((0, 1, 2)).tolist() == pytest.approx([1] * 3, abs=0.04)


def test_the_start_has_the_spread_of_images_at_the_last_step():
    structure = repeated(40000, 0.05, 0.5, 0.9)
    for spread in (0.5, 2.0):
        scheduler = PixelAwareScheduler(gamma=1.0, floor=2.0, residual_std=spread)  # much of an image is left
        left = alpha_bar(scheduler, structure[0], 200).flatten()
        found = scheduler.prior_sample(structure, seeded(2))
        wanted = left * spread**2 + 1 - left
        assert found.var((0, 1, 2)).tolist() == pytest.approx(wanted.tolist(), rel=0.03)
        assert found.mean((0, 1, 2)).tolist() == pytest.approx(
            (left.sqrt() * structure[0].flatten()).tolist(), abs=0.03
        )


@pytest.mark.parametrize("steps", [200, 5])
def test_ancestral_steps_return_gaussian_images(steps):
    scheduler, structure = ready(steps, residual_std=0.2), repeated(4000, 0.05, 0.5, 0.9)
    generator = seeded(12)
    sample, power = scheduler.prior_sample(structure, generator), None
    for time in scheduler.timesteps.tolist():
        late, early = (alpha_bar(scheduler, structure[0], t) for t in (time, scheduler.previous_timestep(time)))
        # The variance, a recursion: gain of the posterior mean, eq. 4's two factors, eq. 4's variance.
        power = late * 0.04 + 1 - late if power is None else power
        alpha, share = late / early, (1 - early) / (1 - late)
        mean = late.sqrt() * 0.04 / (late * 0.04 + 1 - late)
        power = (alpha.sqrt() * share + early.sqrt() * (1 - alpha) / (1 - late) * mean) ** 2 * power
        power = power + share * (1 - alpha)
        skip = scheduler.precondition(sample, time, structure)[1]
        sample = scheduler.step(skip, time, sample, structure, generator=generator).prev_sample
    assert sample.mean((0, 1, 2)).tolist() == pytest.approx([0.05, 0.5, 0.9], abs=0.015)
    assert sample.var((0, 1, 2)).tolist() == pytest.approx(power.flatten().tolist(), rel=0.1)
    if steps == 200:
        assert power.flatten().tolist() == pytest.approx([0.04] * 3, rel=0.1)


# What x_T tells of the image.

# Section 2 of our notes: brightness, variance at gamma 20, and nats at gamma 10, 20, 50.
LEAKS = """
.004  .077  1.139   .821    .445
.01   .181  .724    .445    .163
.02   .330  .445    .220    .045
.05   .632  .164    .0459   .0019
.1    .865  .047    .0057   4.5e-5
.2    .982  .0077   4.5e-4  1e-6
.5    1.000 8.5e-4  6e-6    0
"""


@pytest.mark.parametrize("row", LEAKS.strip().splitlines(), ids=lambda row: row.split()[0])
def test_the_paper_s_last_step_is_not_noise(row):
    brightness, variance, *nats = row.split()
    pixel = torch.tensor(float(brightness), dtype=torch.float64)
    found = [1 - paper().image_scale(pixel)]
    found += [PixelAwareScheduler._gap(pixel, paper(gamma=gamma).image_scale(pixel)) for gamma in (10.0, 20.0, 50.0)]
    for value, printed in zip(found, (variance, *nats), strict=True):
        unit = 10.0 ** Decimal(printed).as_tuple().exponent
        assert value.item() == pytest.approx(float(printed), abs=0.5001 * unit if float(printed) else 1e-9)


@pytest.mark.parametrize("settings", [dict(mode="paper"), dict(), dict(schedule="uniform", gamma=4.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gap_is_the_closed_form_of_every_pixel(settings, dtype):
    scheduler, image = PixelAwareScheduler(**settings), images(3, 2, 5, 4, dtype=dtype)
    left = alpha_bar(scheduler, image, 200)
    nats = 0.5 * (image.double() ** 2 * left - left - torch.log1p(-left))
    wanted = {
        "kl_per_pixel": nats.mean().item(),
        "kl_per_image": nats.sum((1, 2, 3)).mean().item(),
        "worst_pixel": nats.max().item(),
    }
    assert scheduler.prior_gap_report(image) == pytest.approx(wanted, rel=1e-6)
    assert wanted["worst_pixel"] > wanted["kl_per_pixel"] > 0


def test_a_floor_of_2_over_gamma_closes_the_gap():
    for gamma in (10.0, 20.0, 50.0):
        report = PixelAwareScheduler(gamma=gamma, floor=2 / gamma).prior_gap_report(images(2, 3, 32, 32))
        assert report["worst_pixel"] < 0.02 < paper(gamma=gamma).prior_gap_report(images(2, 3, 32, 32))["worst_pixel"]


@pytest.mark.parametrize("gamma, time", [(20.0, 40), (20.0, 100), (20.0, 200), (50.0, 120), (3.0, 200)])
def test_bright_pixels_lose_signal_to_noise_faster_up_to_t_delta(gamma, time):
    """Proposition 1, with its t_delta: while gamma * t * brightness <= 2.5757, and the other way round beyond."""
    scheduler, brightness, width = paper(gamma=gamma), ramp_of_brightness(500).flatten(), 1e-3
    snr = [scheduler.snr(brightness, time - width * side) for side in (1, -1)] if time < 200 else None
    snr = snr or [scheduler.snr(brightness, time - 2 * width), scheduler.snr(brightness, time)]
    slope = (snr[1] - snr[0]).abs() / (2 * width)
    reach = gamma * time / 200 * brightness
    inside, beyond = slope[reach <= 2.5757], slope[reach > 2.5757]
    assert (inside.diff() > 0).all() and (beyond.diff() < 0).all() and len(inside) > 20
    if len(beyond):
        assert reach[slope.argmax()] == pytest.approx(2.5757, abs=1.01 * (reach[1] - reach[0]).item())


# Numbers.

BATCHED = dict(time=torch.tensor([3, 150]))
PUBLIC = {
    "to_range": lambda s, x, a, n: s.to_range(a),
    "from_range": lambda s, x, a, n: s.from_range(a),
    "rate": lambda s, x, a, n: s.rate(a),
    "image_scale": lambda s, x, a, n: s.image_scale(a),
    "log_alpha_bar": lambda s, x, a, n: s.log_alpha_bar(s.rate(a), BATCHED["time"]),
    "snr": lambda s, x, a, n: torch.stack([s.snr(a, time) for time in (1, 50, 200)]),
    "rho": lambda s, x, a, n: torch.stack([s.rho(s.rate(a), i, j) for i, j in ((200, 1), (200, 199), (2, 1))]),
    "add_noise": lambda s, x, a, n: torch.stack([s.add_noise(a, n[0], time) for time in (0, 1, 77, 200)]),
    "get_velocity": lambda s, x, a, n: s.get_velocity(a, n[0], BATCHED["time"]),
    "precondition": lambda s, x, a, n: torch.stack([p for t in (1, 9, 200) for p in s.precondition(x, t, a)]),
    "noise_of": lambda s, x, a, n: s.noise_of(x, a, BATCHED["time"]),
    "tied_noise": lambda s, x, a, n: s.tied_noise(x, a, BATCHED["time"], range(1, 201)),
    "trajectory": lambda s, x, a, n: s.trajectory(a, n, range(1, 201)),
    "step": lambda s, x, a, n: torch.stack([s.step(a, i, x, a, i - 1, eta=0.0)[0] for i in range(1, 201)]),
    "fresh_step": lambda s, x, a, n: s.step(a, 200, x, a, 100, eta=1.0, generator=seeded()).pred_original_sample,
    "step_paper": lambda s, x, a, n: torch.stack([s.step_paper(n[0], i, x, a, eta=0.0) for i in range(1, 201)]),
    "collapse": lambda s, x, a, n: s.collapse(n, x, a, eta=0.0) * s.image_scale(a).sqrt(),
    "collapse_b": lambda s, x, a, n: s.collapse(n, x, a, "B", eta=0.0) * s.image_scale(a).sqrt(),
    "fresh_variance": lambda s, x, a, n: s.fresh_variance(s.rate(a), 200),
}


@pytest.mark.parametrize("settings", [dict(gamma=60.0), dict(gamma=60.0, ramp_power=1.0), dict(mode="paper"), dict()])
@pytest.mark.parametrize("name", PUBLIC)
def test_float32_suffices(name, settings):
    scheduler = PixelAwareScheduler(**{"floor": 0.1, **settings})
    structure, sample, noises = images(2, 1, 1, 50), draw(2, 1, 1, 50), draw(200, 2, 1, 1, 50, seed=1)
    structure[:, ..., 0], structure[:, ..., 1] = 4e-3, 1.0
    exact = PUBLIC[name](scheduler, sample, structure, noises)
    found = PUBLIC[name](scheduler, sample.float(), structure.float(), noises.float())
    assert found.isfinite().all() and found.dtype == torch.float32 and exact.dtype == torch.float64
    assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [dict(gamma=60.0), dict(gamma=72.7), dict(gamma=80.0, mode="paper")], ids=str)
def test_random_functions_are_finite_at_the_largest_rates(settings):
    scheduler, structure = ready(**settings), images(dtype=torch.float32)
    structure[0, 0, 0] = torch.tensor([4e-3, 1.0, 4e-3, 1.0])
    states, noises = scheduler.sample_path(structure, range(1, 201), generator=seeded())
    sample = scheduler.prior_sample(structure, seeded())
    assert states.isfinite().all() and 0.8 < noises.std() < 1.2 and sample.isfinite().all()
    for time in scheduler.timesteps:
        sample = scheduler.step(structure, time, sample, structure, generator=seeded(1)).prev_sample
        assert sample.isfinite().all()
    assert scheduler.collapse(noises, states[-1], structure, generator=seeded(2)).isfinite().all()
    assert all(math.isfinite(value) for value in scheduler.prior_gap_report(structure).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dtypes_are_kept(dtype, eta):
    scheduler, clean, sample = ready(7), images().to(dtype), draw().to(dtype)
    for time in scheduler.timesteps:
        outputs = scheduler.step(clean, time, sample, clean, eta=eta, generator=seeded(), return_dict=False)
        assert all(output.dtype == dtype for output in outputs) and torch.equal(outputs[1], clean)
        exact = scheduler.step(clean.double(), time, sample.double(), clean.double(), eta=0.0).prev_sample
        if eta == 0:
            tolerance = max(torch.finfo(dtype).eps, 1e-6)  # one rounding: the arithmetic is float32's
            assert torch.allclose(outputs[0].double(), exact, rtol=tolerance, atol=1e-5)
    assert scheduler.scale_model_input(sample, 3) is sample
    bright = clean.clamp(min=0.01)
    assert scheduler.add_noise(bright, sample, torch.tensor([3, 9])).dtype == dtype
    assert scheduler.prior_sample(bright, seeded()).dtype == dtype


def test_ranges():
    scheduler, picture = PixelAwareScheduler(epsilon=0.01), torch.rand(SHAPE, generator=seeded())
    inside = scheduler.to_range(picture)
    assert torch.allclose(scheduler.from_range(inside), picture, atol=1e-6)
    assert scheduler.to_range(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.01, 1.0])
    assert scheduler.from_range(torch.tensor([0.01, 1.0, 1.99])).tolist() == pytest.approx([0.0, 1.0, 2.0], abs=1e-6)
    scheduler.check_images("picture", inside)
    scheduler.check_images("ends", scheduler.to_range(torch.tensor([0.0, 1.0])))


# The object.


def test_saved_and_loaded(tmp_path):
    scheduler = PixelAwareScheduler(
        num_train_timesteps=40, gamma=30.0, ramp_power=2.0, epsilon=0.01, eta=0.5, residual_std=0.06
    )
    scheduler.save_pretrained(tmp_path)
    loaded = PixelAwareScheduler.from_pretrained(tmp_path)

    def settings(other):
        return {key: value for key, value in other.config.items() if not key.startswith("_")}

    assert settings(loaded) == settings(scheduler) and len(settings(loaded)) == 9
    assert settings(PixelAwareScheduler.from_config(scheduler.config)) == settings(scheduler)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert stored["floor"] == 0.1 and stored["residual_std"] == 0.06 and stored["_class_name"] == "PixelAwareScheduler"
    assert scheduler.compatibles == [PixelAwareScheduler]
    # A process is taken over as it is, also what was a default there.
    other = PixelAwareScheduler.from_config(scheduler.config, mode="paper").config
    assert (other.floor, other.ramp_power, other.gamma) == (0.1, 2.0, 30.0)


def test_what_diffusers_expects_of_a_scheduler():
    scheduler = PixelAwareScheduler(50)
    assert len(scheduler) == 50 and scheduler.order == 1 and scheduler.init_noise_sigma == 1
    assert scheduler.timesteps.tolist() == list(range(50, 0, -1)) and scheduler.num_inference_steps is None
    assert scheduler.previous_timestep(7) == 6 and scheduler.previous_timestep(torch.tensor(1)) == 0
    scheduler.set_timesteps(4)
    output = scheduler.step(images(), 25, draw(), generator=seeded())
    pair = scheduler.step(images(), torch.tensor(25), draw(), generator=seeded(), return_dict=False)
    assert len(pair) == 2 and torch.equal(pair[0], output.prev_sample)
    assert torch.equal(pair[1], output.pred_original_sample) and torch.equal(output[0], pair[0])
    assert torch.equal(pair[0], scheduler.step(images(), 25, draw(), None, 12, 1.0, seeded()).prev_sample)


@pytest.mark.parametrize("length", [1, 50, 33])
def test_any_number_of_steps(length):
    scheduler = PixelAwareScheduler(length)
    for steps in range(1, length + 1):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()
        assert len(times) == steps == scheduler.num_inference_steps and times[0] == length and times[-1] >= 1
        assert times == sorted(set(times), reverse=True)
        gaps = [late - early for late, early in itertools.pairwise([*times, 0])]
        assert max(gaps) - min(gaps) <= 1 + (steps > 1)
        assert [scheduler.previous_timestep(time) for time in scheduler.timesteps] == [*times[1:], 0]


def test_chosen_timesteps():
    scheduler = PixelAwareScheduler()
    scheduler.set_timesteps(timesteps=[180, 100, 3])
    assert scheduler.timesteps.tolist() == [180, 100, 3] and scheduler.num_inference_steps == 3
    found = scheduler.step(images(), 180, draw(), eta=0.0).prev_sample
    assert torch.equal(found, scheduler.step(images(), 180, draw(), prev_timestep=100, eta=0.0).prev_sample)
    assert torch.equal(scheduler.step(images(), 3, draw()).prev_sample, images())


def test_randomness_comes_from_the_generators():
    scheduler, image, sample, noises = ready(10), images(), draw(), draw(200, *SHAPE, seed=3)
    calls = [
        lambda g, rows: scheduler.step(image[rows], 200, sample[rows], generator=g).prev_sample,
        lambda g, rows: scheduler.prior_sample(image[rows], g),
        lambda g, rows: torch.cat(scheduler.sample_path(image[rows], [3, 90], generator=g)).transpose(0, 1),
        lambda g, rows: scheduler.step_paper(noises[0][rows], 9, sample[rows], image[rows], generator=g),
        lambda g, rows: scheduler.collapse(noises[:, rows], sample[rows], image[rows], generator=g),
    ]
    whole, state = slice(None), torch.get_rng_state()
    for call in calls:
        assert torch.equal(call(seeded(), whole), call(seeded(), whole))
        assert not torch.equal(call(seeded(), whole), call(seeded(1), whole))
        pair = call([seeded(7), seeded(8)], whole)
        assert torch.equal(pair[1:], call([seeded(8)], slice(1, 2)))
        assert torch.equal(pair[:1], call(seeded(7), slice(0, 1)))
    assert torch.equal(state, torch.get_rng_state())


def test_eta_is_by_default_the_config_s():
    scheduler, image, noises = ready(10, eta=0.3), images(), draw(200, *SHAPE)
    for call in (
        lambda **given: scheduler.step(image, 200, draw(), generator=seeded(), **given).prev_sample,
        lambda **given: scheduler.step_paper(noises[0], 9, draw(), image, generator=seeded(), **given),
        lambda **given: scheduler.collapse(noises, draw(), image, generator=seeded(), **given),
    ):
        assert torch.equal(call(), call(eta=0.3)) and not torch.equal(call(), call(eta=0.0))


def test_nothing_in_training_or_sampling_waits_for_a_device():
    """On the meta device no number can be read back, so whatever would wait for a GPU raises."""
    scheduler, times = ready(10), torch.empty(2, dtype=torch.long, device="meta")
    image = torch.empty(SHAPE, device="meta")
    scheduler.add_noise(image, image, times, image)
    scheduler.precondition(image, times, image)
    scheduler.tied_noise(image, image, times, [1, 5], image)
    scheduler.snr(image, times)
    for eta in (None, 0.0):
        scheduler.step(image, scheduler.timesteps[0], scheduler.prior_sample(image), image, eta=eta)
        scheduler.step_paper(image, 3, image, image, eta=eta)
        scheduler.collapse(image[None].expand(20, *SHAPE), image, image, eta=eta)


def test_a_gap_at_dark_pixels_is_warned_of(caplog):
    for quiet in (dict(), dict(mode="paper"), dict(schedule="uniform", floor=0.0), dict(gamma=40.0, floor=0.05)):
        PixelAwareScheduler(**quiet)
    assert not caplog.records
    scheduler = PixelAwareScheduler(floor=0.05)
    worst = scheduler.prior_gap_report(torch.full(SHAPE, 4e-3, dtype=torch.float64))["worst_pixel"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("gamma=20.0", "floor=0.05", "34%", f"{worst:.3g} nats", "from 2 up"):
        assert part in record.getMessage(), record.getMessage()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mode="pixel"), "mode='pixel': expected.*structure.*paper"),
        (dict(schedule="linear"), "schedule='linear': expected.*pixel.*uniform"),
        (dict(num_train_timesteps=0), "num_train_timesteps=0: expected"),
        (dict(num_train_timesteps=2.5), "num_train_timesteps=2.5: expected"),
        (dict(num_train_timesteps=True), "num_train_timesteps=True: expected"),
        (dict(floor=-0.1), "floor=-0.1: expected"),
        (dict(floor=math.inf), "floor=inf: expected"),
        (dict(gamma=0.0), "gamma=0.0, floor=0.1: expected"),
        (dict(gamma=73.0), r"gamma=73.0, floor=0.1: expected.*up to 80"),
        (dict(gamma=math.nan), "gamma=nan.*expected"),
        (dict(ramp_power=0.0), "ramp_power=0.0: expected"),
        (dict(epsilon=0.0), "epsilon=0.0: expected"),
        (dict(epsilon=1.0), "epsilon=1.0: expected"),
        (dict(residual_std=0.0), "residual_std=0.0: expected"),
        (dict(eta=1.5), "eta=1.5: expected"),
        (dict(eta=-0.5), "eta=-0.5: expected"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PixelAwareScheduler(**settings)


OTHER = (2, 3, 2, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, x: s.check_images("pictures", 2 * x), r"pictures has values.*expected \[0.004, 1\].*to_range"),
        (
            lambda s, x: s.add_noise(x - 1, x, 3),
            r"original_samples has values from -0.983 to .*\[0.004, 1\].*`to_range`",
        ),
        (lambda s, x: s.add_noise(0 * x, x, 3), "original_samples has values from 0 to 0.*`to_range`"),
        (lambda s, x: s.add_noise(math.nan * x, x, 3), "original_samples has values from nan"),
        (lambda s, x: s.add_noise(x, x, 201), "timestep=201: expected.*0 to 200"),
        (lambda s, x: s.add_noise(x, x, -1), "timestep=-1: expected.*0 to 200"),
        (lambda s, x: s.add_noise(x, x, torch.tensor([3, 201])), "timestep=3..201: expected.*0 to 200"),
        (lambda s, x: s.add_noise(x, x, torch.tensor([1, 2, 3])), r"timestep has shape \(3,\): expected.*\(2,\)"),
        (lambda s, x: s.add_noise(x, x, 3, images(*OTHER)), r"structure has shape \(2, 3, 2, 2\): expected \(2, 3, 4,"),
        (lambda s, x: s.snr(x, 3, images(*OTHER)), "structure has shape"),
        (lambda s, x: s.noise_of(x, x, 3, images(*OTHER)), "structure has shape"),
        (lambda s, x: s.precondition(x, 3, images(*OTHER)), "structure has shape"),
        (lambda s, x: s.tied_noise(x, x, torch.tensor([1, 2, 3]), [1]), "timestep has shape"),
        (lambda s, x: s.tied_noise(x, x, 3, [0]), "steps=0: expected whole numbers from 1 to 200"),
        (lambda s, x: s.tied_noise(x, x, 3, [201]), "steps=201"),
        (lambda s, x: s.tied_noise(x, x, 3, [1.5]), "steps=1.5"),
        (lambda s, x: s.tied_noise(x, x, 3, [True]), "steps=True"),
        (lambda s, x: s.trajectory(x, x[None], [1, 2]), r"noises has shape \(1, 2, 3, 4, 4\): expected 2 first"),
        (lambda s, x: s.sample_path(x, []), r"timesteps=\[\]: expected ascending"),
        (lambda s, x: s.sample_path(x, [3, 2]), r"timesteps=\[3, 2\]: expected ascending"),
        (lambda s, x: s.sample_path(x, [3, 3]), r"timesteps=\[3, 3\]: expected ascending"),
        (lambda s, x: s.sample_path(x, [0, 3]), r"timesteps=\[0, 3\]: expected ascending numbers above 0, up to 200"),
        (lambda s, x: s.sample_path(x, [3, 201]), r"timesteps=\[3, 201\]: expected ascending"),
        (lambda s, x: s.sample_path(2 * x, [3]), "original has values"),
        (lambda s, x: s.set_timesteps(), "num_inference_steps=None, timesteps=None: expected one"),
        (lambda s, x: s.set_timesteps(5, timesteps=[3, 2]), r"num_inference_steps=5, timesteps=\[3, 2\]: expected one"),
        (lambda s, x: s.set_timesteps(201), "num_inference_steps=201: expected.*1 to 200"),
        (lambda s, x: s.set_timesteps(0), "num_inference_steps=0: expected.*1 to 200"),
        (lambda s, x: s.set_timesteps(2.5), "num_inference_steps=2.5: expected"),
        (lambda s, x: s.set_timesteps(timesteps=[3, 3]), r"timesteps=\[3, 3\]: expected descending"),
        (lambda s, x: s.set_timesteps(timesteps=[]), r"timesteps=\[\]: expected descending"),
        (
            lambda s, x: s.set_timesteps(timesteps=[2.5, 1]),
            r"timesteps=\[2.5, 1\]: expected descending whole numbers from 200 to 1",
        ),
        (lambda s, x: s.set_timesteps(timesteps=[201, 1]), r"timesteps=\[201, 1\]: expected descending"),
        (lambda s, x: s.step(x, 199, x), "timestep=199: expected one of `timesteps`.*200"),
        (lambda s, x: s.step(x, 20, x, prev_timestep=20), "prev_timestep=20: expected.*below timestep=20"),
        (lambda s, x: s.step(x, 20, x, prev_timestep=-1), "prev_timestep=-1: expected"),
        (
            lambda s, x: s.step(x, 200, images(*OTHER)),
            r"model_output has shape \(2, 3, 4, 4\): expected \(2, 3, 2, 2\)",
        ),
        (lambda s, x: s.step(x, 200, x, images(*OTHER)), "structure has shape"),
        (lambda s, x: s.step(x, 200, x, eta=1.5), r"eta=1.5: expected a number in \[0, 1\]"),
        (lambda s, x: s.step_paper(x, 0, x, x), "steps=0"),
        (lambda s, x: s.step_paper(x, 3, x, x, reading="C"), "reading='C': expected 'A' or 'B'"),
        (lambda s, x: s.step_paper(x, 3, x, x, eta=2), "eta=2: expected"),
        (lambda s, x: s.step_paper(x, 3, x, images(*OTHER)), "structure has shape"),
        (lambda s, x: s.collapse(x[None], x, x, reading="a"), "reading='a': expected"),
        (lambda s, x: s.collapse(x[None], x, x, eta=-1), "eta=-1: expected"),
        (lambda s, x: s.collapse(x, x, x), r"noises has shape \(2, 3, 4, 4\): expected \[i,.*200"),
        (lambda s, x: s.collapse(x[None].expand(201, *SHAPE), x, x), r"noises has shape \(201, .*: expected \[i,"),
        (lambda s, x: s.collapse(x[None], x, images(*OTHER)), "structure has shape"),
        (lambda s, x: s.fresh_variance(x, 201), "steps=201"),
        (lambda s, x: s.prior_gap_report(x[0]), r"images has shape \(3, 4, 4\): expected \[B, C, H, W\]"),
        (lambda s, x: s.prior_gap_report(x[:0]), r"images has shape \(0, 3, 4, 4\): expected"),
        (lambda s, x: s.prior_gap_report(2 * x), "images has values"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(ready(10), images())
