import inspect
import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from pyrdiff import CosineResidualScheduler

SHAPE = (2, 3, 4, 4)
COSINE = dict(num_train_timesteps=500, beta_schedule="squaredcos_cap_v2", clip_sample=False)
DDPM_SETTINGS = [
    dict(),
    dict(beta_schedule="linear", num_train_timesteps=60),
    dict(prediction_type="v_prediction", num_train_timesteps=60),
    dict(prediction_type="sample", clip_sample=True, clip_sample_range=0.7, num_train_timesteps=60),
    dict(timestep_spacing="trailing", num_train_timesteps=60),
    dict(timestep_spacing="linspace", num_train_timesteps=60),
    dict(trained_betas=[0.1, 0.2, 0.3] * 20, num_train_timesteps=60),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed: int = 0, **kind) -> torch.Tensor:
    return torch.randn(shape or SHAPE, generator=seeded(seed), **kind)


def ready(steps: int = 500, **settings) -> CosineResidualScheduler:
    scheduler = CosineResidualScheduler(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


# Beside diffusers.


@pytest.mark.parametrize("settings", DDPM_SETTINGS, ids=str)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("share", [1, 10, 7])
def test_ancestral_steps_are_those_of_ddpm(settings, variance_type, share):
    theirs = DDPMScheduler(**{**COSINE, **settings}, variance_type=variance_type)
    ours = CosineResidualScheduler(**settings, variance_type=variance_type)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(len(ours) // share)
    assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    for index, time in enumerate(ours.timesteps):
        channels = 6 if variance_type == "learned_range" else 3
        arguments = (draw(2, channels, 4, 4, seed=index), time, draw(seed=-1 - index))
        found = ours.step(*arguments, generator=seeded(1))
        wanted = theirs.step(*arguments, generator=seeded(1))
        if time > 0 and index == len(ours.timesteps) - 1:  # theirs leaves noise in the result
            wanted = dict(prev_sample=wanted.pred_original_sample, pred_original_sample=wanted.pred_original_sample)
            assert torch.allclose(found["prev_sample"], wanted["prev_sample"], atol=1e-5)
            continue
        assert torch.allclose(found["prev_sample"], wanted["prev_sample"], atol=1e-6, rtol=1e-7)
        assert torch.allclose(found["pred_original_sample"], wanted["pred_original_sample"], atol=1e-6, rtol=1e-6)


def test_steps_before_set_timesteps_are_those_of_ddpm():
    theirs, ours = DDPMScheduler(**COSINE), CosineResidualScheduler()
    for time in (499, 250, 1, 0):
        found, wanted = (part.step(draw(), time, draw(seed=1), generator=seeded(1)) for part in (ours, theirs))
        assert torch.allclose(found.prev_sample, wanted.prev_sample, atol=1e-6, rtol=1e-7)
        assert ours.previous_timestep(time) == theirs.previous_timestep(time)


@pytest.mark.parametrize(
    "prediction_type, steps", [("epsilon", 500), ("epsilon", 50), ("epsilon", 4), ("sample", 50), ("v_prediction", 50)]
)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_steps_with_eta_are_those_of_ddim(eta, steps, prediction_type):
    theirs, ours = (
        DDIMScheduler(**COSINE, prediction_type=prediction_type),
        ready(steps, prediction_type=prediction_type),
    )
    theirs.set_timesteps(steps)
    for index, time in enumerate(ours.timesteps):
        arguments = (draw(seed=index), time, draw(seed=-1 - index), eta)
        found, wanted = (part.step(*arguments, generator=seeded(1)).prev_sample for part in (ours, theirs))
        assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-6)


def test_full_eta_is_the_ancestral_step():
    scheduler = ready(20)
    for time in scheduler.timesteps:
        results = [
            scheduler.step(draw(seed=1), time, draw(), eta=eta, generator=seeded()).prev_sample for eta in (1.0, None)
        ]
        assert torch.allclose(*results, atol=2e-4)


@pytest.mark.parametrize("settings", [dict(), dict(num_train_timesteps=60, beta_schedule="linear")])
def test_every_compatible_solver_has_the_same_noise_process(settings):
    scheduler = CosineResidualScheduler(**settings, residual_scale=6.5)
    solvers = scheduler.compatibles
    assert len(solvers) > 8 and {CosineResidualScheduler, DPMSolverMultistepScheduler} <= set(solvers)
    for solver in solvers:
        other = solver.from_config(scheduler.config)
        assert torch.equal(other.alphas_cumprod, scheduler.alphas_cumprod), solver
        assert not other.config.get("clip_sample"), solver  # which is on by default in DDIM and DDPM
        assert CosineResidualScheduler.from_config(other.config).config == scheduler.config


@pytest.mark.parametrize("given", [{}, {"timestep_spacing": "trailing"}])
def test_a_solver_spaces_its_steps_as_this_one_also_when_it_was_saved_between(given, tmp_path):
    scheduler = CosineResidualScheduler(**given)
    scheduler.save_pretrained(tmp_path)
    for source in (scheduler, CosineResidualScheduler.from_pretrained(tmp_path)):
        solver = DPMSolverMultistepScheduler.from_config(source.config)
        assert solver.config.timestep_spacing == given.get("timestep_spacing", "leading")


# Closed forms.


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.7])
@pytest.mark.parametrize("steps", [500, 20, 1])
def test_forward_then_oracle_reverse_returns_the_residual(kind, eta, steps):
    scheduler, residual = ready(steps, variance_type=kind), draw(dtype=torch.float64)
    sample = scheduler.add_noise(residual, draw(seed=1, dtype=torch.float64), scheduler.timesteps[:1])
    for time in scheduler.timesteps:
        gamma = scheduler.alphas_cumprod[time].double()
        noise = (sample - gamma.sqrt() * residual) / (1 - gamma).sqrt()
        output = torch.cat([noise, draw(seed=2).double()], 1) if kind == "learned_range" else noise
        sample = scheduler.step(output, time, sample, eta=eta, generator=seeded(3)).prev_sample
    assert torch.allclose(sample, residual, atol=1e-4)


def gaussian_run(scheduler, variances: torch.Tensor, **arguments) -> torch.Tensor:
    """The share of variance reached with the best noise prediction, E[eps | x] = s x / (a^2 v + s^2), by channel."""
    generator = seeded(4)
    sample = torch.randn(2500, len(variances), 2, 2, generator=generator)
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = generator
    for time in scheduler.timesteps:
        gamma = scheduler.alphas_cumprod[time]
        gain = (1 - gamma).sqrt() / (gamma * variances + 1 - gamma)
        sample = scheduler.step(gain[:, None, None] * sample, time, sample, **arguments).prev_sample
    return sample.var((0, 2, 3)) / variances


def exact_power(scheduler, variance: float, kind: str) -> float:
    """The variance that ancestral steps deliver: a recursion in one number, from the posterior (eq. 4, 5, 7) itself."""
    gammas = scheduler.alphas_cumprod.double()[scheduler.timesteps].tolist()
    power = 1.0
    for gamma, before in itertools.zip_longest(gammas, gammas[1:], fillvalue=1.0):
        beta, mean = 1 - gamma / before, gamma**0.5 * variance / (gamma * variance + 1 - gamma)
        gain = before**0.5 * beta / (1 - gamma) * mean + (gamma / before) ** 0.5 * (1 - before) / (1 - gamma)
        noise = (beta if kind == "fixed_large" else beta * (1 - before) / (1 - gamma)) if before < 1 else 0.0
        power = gain**2 * power + noise
    return power / variance


VARIANCES = torch.tensor([8.0, 1.0, 0.3, 0.02])


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [500, 20])
def test_gaussian_data_keep_their_power(kind, steps):
    scheduler = ready(steps, variance_type=kind)
    wanted = [exact_power(scheduler, variance, kind) for variance in VARIANCES.tolist()]
    assert gaussian_run(scheduler, VARIANCES).tolist() == pytest.approx(wanted, rel=0.05)
    if steps == 500:
        assert wanted == pytest.approx([1] * 4, abs=0.1)


def test_a_fitted_scale_makes_twenty_evaluations_enough():
    """The table of performance.md: unscaled .97 .84 .65 .43 of the variance, scaled .96 .99 1.01 .99."""
    variances, shares = torch.tensor([8.0, 3.0, 1.0, 0.3]) * 0.145**2 / 3.075, {}
    residuals = draw(500, 4, 8, 8, seed=5) * variances.sqrt()[:, None, None]
    fitted = CosineResidualScheduler.fit_residual_scale(residuals.split(100))
    assert fitted == pytest.approx(1 / 0.145, rel=0.01)
    for scale in (1.0, fitted):
        config = CosineResidualScheduler(residual_scale=scale).config
        solver = DPMSolverMultistepScheduler.from_config(config)
        solver.set_timesteps(20)
        shares[scale] = gaussian_run(solver, variances * scale**2).tolist()
    assert shares[fitted] == pytest.approx([1] * 4, abs=0.1)
    assert min(shares[1.0]) < 0.6


def test_learned_range_interpolates_its_two_ends():
    learned, noise = ready(20, variance_type="learned_range"), draw(seed=1)
    for time in learned.timesteps[:-1]:
        steps = [
            learned.step(torch.cat([noise, torch.full(SHAPE, place)], 1), time, draw(), generator=seeded(2)).prev_sample
            for place in (-1.0, 0.0, 1.0)
        ]
        ends = {
            kind: ready(20, variance_type=kind).step(noise, time, draw(), generator=seeded(2)).prev_sample
            for kind in ("fixed_small", "fixed_large")
        }
        assert torch.allclose(steps[0], ends["fixed_small"], atol=1e-6)
        assert torch.allclose(steps[2], ends["fixed_large"], atol=1e-6)
        mean, white = ready(20).step(noise, time, draw(), eta=1.0, generator=seeded(2)), draw(seed=2)
        spreads = [((step - steps[0]) / white).median() for step in steps]
        low = ((ends["fixed_small"] - mean.prev_sample) / white).median().abs()
        assert low < 1e-3 and 0 < spreads[1] < spreads[2]
    # Half way in the logarithm: the geometric mean of the two spreads.
    time, gammas = learned.timesteps[0], learned.alphas_cumprod.double()[learned.timesteps[:2]]
    beta = 1 - gammas[0] / gammas[1]
    small, large = (beta * (1 - gammas[1]) / (1 - gammas[0])).sqrt(), beta.sqrt()
    half = learned.step(torch.cat([noise, torch.zeros(SHAPE)], 1), time, draw(), generator=seeded(2)).prev_sample
    found = (half - ready(20).step(noise, time, draw(), generator=seeded(2)).prev_sample) / draw(seed=2)
    assert found.median().item() == pytest.approx(((small * large).sqrt() - small).item(), rel=1e-3)


# What is diffused.


@pytest.mark.parametrize("scale", [1.0, 6.9, 0.3])
def test_compose_undoes_residual(scale):
    scheduler = CosineResidualScheduler(residual_scale=scale)
    high, low = torch.rand(2, 8, 3, 64, 64, generator=seeded()) * 2 - 1
    residual = scheduler.residual(high, low)
    assert torch.allclose(residual, scale * (high - low), atol=1e-6)
    assert (scheduler.compose(residual, low) - high).abs().max() <= 7 * torch.finfo(torch.float32).eps / 2
    back = scheduler.compose(scheduler.residual(high.bfloat16(), low.bfloat16()), low.bfloat16())
    assert back.dtype == torch.bfloat16
    assert (back - high.bfloat16()).abs().max() <= 7 * torch.finfo(torch.bfloat16).eps / 2


def test_the_image_itself_is_diffused_when_asked():
    scheduler = CosineResidualScheduler(prediction_target="image")
    assert torch.equal(scheduler.residual(draw(), draw(seed=1)), draw())
    assert torch.equal(scheduler.compose(draw(), draw(seed=1)), draw())


def test_the_fit_is_one_pass_over_any_iterable():
    parts = [0.3 + 0.05 * draw(7, 3, 5, 6), 0.3 + 0.2 * draw(2, 3, 9, 9, seed=1)]
    wanted = 1 / torch.cat([part.flatten() for part in parts]).double().std(correction=0).item()
    assert CosineResidualScheduler.fit_residual_scale(part for part in parts) == pytest.approx(wanted, rel=1e-9)


# Noise levels.


def test_noise_levels_are_sqrt_alpha_bar():
    scheduler = CosineResidualScheduler()
    assert scheduler.noise_level(-1) == 1 and scheduler.noise_level(7) == scheduler.alphas_cumprod[7].sqrt()
    levels = scheduler.noise_level(torch.arange(500))
    assert levels.shape == (500,) and levels.dtype == torch.float32 and (levels.diff() < 0).all()


def test_training_levels_are_uniform_between_neighbours():
    scheduler = CosineResidualScheduler()
    for time in (0, 1, 250, 499):
        times = torch.full((20000,), time)
        levels = scheduler.sample_noise_level(times, seeded())
        low, high = scheduler.noise_level(time), scheduler.noise_level(time - 1)
        assert (levels >= low).all() and (levels <= high).all() and levels.dtype == torch.float32
        places = ((levels - low) / (high - low)).double().sort().values
        assert (places - torch.linspace(0, 1, 20000).double()).abs().max() < 0.015  # Kolmogorov-Smirnov, p ~ 1e-4
        assert torch.equal(levels, scheduler.sample_noise_level(times, seeded()))


def test_noise_is_added_at_timesteps_or_at_levels():
    scheduler, times = CosineResidualScheduler(), torch.tensor([0, 499])
    theirs = DDPMScheduler(**COSINE)
    for ours, reference in (
        (scheduler.add_noise, theirs.add_noise),
        (scheduler.get_velocity, theirs.get_velocity),
    ):
        wanted = reference(draw(), draw(seed=1), times)
        assert torch.allclose(ours(draw(), draw(seed=1), times), wanted, atol=1e-6, rtol=0)
        level = scheduler.noise_level(times)
        assert torch.allclose(ours(draw(), draw(seed=1), noise_level=level), wanted, atol=1e-5, rtol=0)
    between = scheduler.add_noise(draw(), draw(seed=1), noise_level=torch.tensor([0.6, 0.6]))
    assert torch.allclose(between, 0.6 * draw() + 0.8 * draw(seed=1), atol=1e-6)
    assert torch.equal(scheduler.add_noise(draw(), draw(seed=1), torch.tensor([-1])), draw())


# The object.


def test_saved_and_loaded(tmp_path):
    scheduler = CosineResidualScheduler(40, residual_scale=6.9, variance_type="learned_range")
    scheduler.save_pretrained(tmp_path)
    loaded = CosineResidualScheduler.from_pretrained(tmp_path)
    plain = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == plain
    assert loaded.config.residual_scale == 6.9 and torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    solver = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert torch.equal(solver.alphas_cumprod, scheduler.alphas_cumprod) and solver.config.residual_scale == 6.9
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["residual_scale"] == 6.9


def test_trained_betas_are_used_and_counted(tmp_path):
    scheduler = CosineResidualScheduler(trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    loaded = CosineResidualScheduler.from_pretrained(tmp_path)
    assert len(loaded) == 2 and loaded.betas.tolist() == scheduler.betas.tolist() == pytest.approx([0.1, 0.3])


@pytest.mark.parametrize("spacing", CosineResidualScheduler.CHOICES["timestep_spacing"])
def test_any_number_of_steps(spacing):
    scheduler = CosineResidualScheduler(150, timestep_spacing=spacing)
    for steps in range(1, 151):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()
        assert len(times) == steps == scheduler.num_inference_steps
        assert times == sorted(set(times), reverse=True) and 0 <= times[-1] and times[0] <= 149
        assert [scheduler.previous_timestep(time) for time in times] == [*times[1:], -1]


def test_chosen_timesteps_and_steps_to_come():
    scheduler = CosineResidualScheduler()
    assert scheduler.previous_timestep(7) == 6 and scheduler.previous_timestep(0) == -1
    scheduler.set_timesteps(timesteps=[400, 100, 3])
    theirs = DDPMScheduler(**COSINE)
    theirs.set_timesteps(timesteps=[400, 100, 3])
    for time in (400, 100):
        found, wanted = (
            part.step(draw(), time, draw(seed=1), generator=seeded()).prev_sample for part in (scheduler, theirs)
        )
        assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.equal(*scheduler.step(draw(), 3, draw(seed=1), eta=0.0, return_dict=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eta", [None, 0.0])
def test_dtypes_are_kept(dtype, eta):
    scheduler = ready(10)
    sample, noise = draw().to(dtype), draw(seed=1).to(dtype)
    for time in scheduler.timesteps:
        outputs = scheduler.step(noise, time, sample, eta=eta, generator=seeded(), return_dict=False)
        exact = scheduler.step(noise.double(), time, sample.double(), eta=0.0).prev_sample
        assert all(output.dtype == dtype for output in outputs)
        if eta == 0:
            tolerance = max(torch.finfo(dtype).eps, 1e-7)  # one rounding: the arithmetic is float32's
            assert torch.allclose(outputs[0].double(), exact, rtol=tolerance, atol=1e-4)
    assert scheduler.add_noise(sample, noise, torch.tensor([3])).dtype == dtype
    assert scheduler.scale_model_input(sample, 3) is sample


def test_randomness_comes_from_the_generators():
    scheduler = ready(10)

    def step(generator, images=slice(None), **arguments):
        arguments = dict(generator=generator, return_dict=False, **arguments)
        return scheduler.step(draw(seed=1)[images], scheduler.timesteps[0], draw()[images], **arguments)[0]

    assert torch.equal(step(seeded()), step(seeded())) and not torch.equal(step(seeded()), step(seeded(1)))
    assert torch.equal(step(None, eta=0.0), step(seeded(), eta=0.0))
    pair = step([seeded(7), seeded(8)])
    assert torch.equal(pair[1:], step([seeded(8)], slice(1, 2)))


def test_a_step_waits_for_no_device():
    """On the meta device no number can be read back, so whatever would wait for a GPU raises."""
    for kind in ("fixed_small", "learned_range"):
        scheduler = ready(10, variance_type=kind, clip_sample=True)
        output = torch.empty(2, 6 if kind == "learned_range" else 3, 4, 4, device="meta")
        for eta in (None, 0.5):
            scheduler.step(output, scheduler.timesteps[0], torch.empty(SHAPE, device="meta"), eta=eta)


BAD_SETTINGS = {
    "beta_schedule": "quadratic",
    "prediction_target": "pixels",
    "prediction_type": "noise",
    "variance_type": "learned",
    "timestep_spacing": "log",
    "residual_scale": 0.0,
    "num_train_timesteps": 0,
    "clip_sample_range": -1.0,
    "trained_betas": [0.1, 1.0],
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name):
    with pytest.raises(ValueError, match=rf"{name}=.*expected"):
        CosineResidualScheduler(**{name: BAD_SETTINGS[name]})


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda s: CosineResidualScheduler(beta_schedule="linear", beta_start=0.5, beta_end=0.1),
            "beta_start=0.5.*exp",
        ),
        (lambda s: CosineResidualScheduler(prediction_target="image", residual_scale=2.0), "residual_scale=2.0.*exp"),
        (lambda s: CosineResidualScheduler().step(draw(), 500, draw()), "timestep=500.*expected one of"),
        (lambda s: s.step(draw(), 4, draw()), "timestep=4.*expected one of"),
        (lambda s: s.step(draw(), 0, draw(), eta=1.5), "eta=1.5.*expected"),
        (lambda s: s.step(draw(2, 6, 4, 4), 0, draw()), r"model_output has shape \(2, 6, 4, 4\).*fixed_small"),
        (lambda s: ready(variance_type="learned_range").step(draw(), 0, draw()), r"expected \(2, 6, 4, 4\)"),
        (lambda s: s.set_timesteps(), "num_inference_steps=None, timesteps=None.*expected one"),
        (lambda s: s.set_timesteps(5, timesteps=[3, 2]), "num_inference_steps=5.*expected one"),
        (lambda s: s.set_timesteps(501), "num_inference_steps=501.*from 1 to 500"),
        (lambda s: s.set_timesteps(0), "num_inference_steps=0.*from 1 to 500"),
        (lambda s: s.set_timesteps(timesteps=[3, 3]), r"timesteps=\[3, 3\].*descending"),
        (lambda s: s.set_timesteps(timesteps=[2.5, 1]), r"timesteps=\[2.5, 1\].*whole"),
        (lambda s: s.set_timesteps(timesteps=[500, 1]), r"timesteps=\[500, 1\].*499"),
        (lambda s: s.set_timesteps(timesteps=[]), r"timesteps=\[\].*descending"),
        (lambda s: s.noise_level(500), "timesteps=500.*499"),
        (lambda s: s.add_noise(draw(), draw(), torch.tensor([3.7, 1.0])), r"timesteps=\[3.7.*whole"),
        (lambda s: s.add_noise(draw(), draw(), torch.tensor([torch.nan, 1.0])), r"timesteps=\[nan.*whole"),
        (lambda s: s.add_noise(draw(), draw(), noise_level=torch.tensor([2.0, 0.5])), r"noise_level=\[2.0.*\(0, 1\]"),
        (lambda s: s.add_noise(draw(), draw(), noise_level=torch.nan), r"noise_level=nan.*\(0, 1\]"),
        (lambda s: s.get_velocity(draw(), draw(), noise_level=-0.5), r"noise_level=-0.5.*\(0, 1\]"),
        (lambda s: s.add_noise(draw(), draw()), "expected one of the two"),
        (lambda s: s.residual(draw(), draw(2, 3, 2, 2)), r"upsampled has shape \(2, 3, 2, 2\).*high"),
        (lambda s: s.compose(draw(), draw(2, 3, 2, 2)), r"upsampled has shape.*residual"),
        (lambda s: s.fit_residual_scale([]), "residuals: 0 values"),
        (lambda s: s.fit_residual_scale([torch.full((4,), torch.nan)]), "residuals: 4 values"),
        (lambda s: s.fit_residual_scale([torch.ones(4)]), "residuals: 4 values of variance 0"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(ready(10))
