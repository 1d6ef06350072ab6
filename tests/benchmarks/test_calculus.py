"""The calculus against diffusers' own steps and against runs of the real pipeline."""

import pytest
import torch
import torch.nn.functional as F
from calculus import (
    LevelSteps,
    Modes,
    delivered,
    enlarge,
    half_log_snr,
    perfect_response,
    signal_and_noise,
    solver_of,
    step_coefficients,
)
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from fitting import level_steps, octave_shares
from oracles import GaussianNoisePredictor, natural_spectrum
from spectra import Spectra, radial_covariance

from pyrdiff import PyramidalPipeline

ALPHAS = DDPMScheduler().alphas_cumprod
SCHEDULERS = {
    "ddpm": lambda: DDPMScheduler(clip_sample=False),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpmsolver++": lambda: DPMSolverMultistepScheduler(),
    "sde-dpmsolver++": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
}
SIZES = [(8, 8), (16, 16), (32, 32)]


def natural_spectra(sizes=SIZES) -> Spectra:
    """The oracle's spectrum by bins: exact on the axes, so both sides of a comparison use the bins."""
    power = [0.05 * h * w * torch.arange(max(h, w) // 2 + 1).double().clamp(min=1) ** -2.5 for h, w in sizes]
    return Spectra(torch.ones(1, 1, dtype=torch.float64), list(sizes), [part[None] for part in power])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_is_that_of_diffusers(name):
    scheduler = SCHEDULERS[name]()
    assert solver_of(scheduler) == name
    scheduler.set_timesteps(9)
    times = scheduler.timesteps
    coefficients = step_coefficients(name, half_log_snr(ALPHAS)[times]).float()
    generator = torch.Generator().manual_seed(0)
    x, before = torch.randn(1, 64, generator=generator), torch.zeros(1, 64)
    a, s = (part.float() for part in signal_and_noise(half_log_snr(ALPHAS)[times]))
    for i, time in enumerate(times):
        clean = torch.randn(1, 64, generator=generator)
        arguments = {} if name in ("ddim", "dpmsolver++") else {"generator": torch.Generator().manual_seed(i)}
        noise = torch.randn(1, 64, generator=torch.Generator().manual_seed(i))
        A, B, C, S = coefficients[i]
        expected = A * x + B * clean + C * before + S * noise
        x = scheduler.step((x - a[i] * clean) / s[i], time, x, **arguments).prev_sample
        assert torch.allclose(x, expected, atol=3e-4), f"step {i}"
        before = clean


def test_unknown_schedulers_are_refused():
    for scheduler in (
        UniPCMultistepScheduler(),
        HeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(solver_order=3),
        DPMSolverMultistepScheduler(use_lu_lambdas=True),
        DDIMScheduler(timestep_spacing="trailing"),
        DDIMScheduler(set_alpha_to_one=False),
        DDPMScheduler(variance_type="fixed_large"),
    ):
        with pytest.raises(ValueError, match="^scheduler=.*: expected DDPMScheduler"):
            solver_of(scheduler)
    with pytest.raises(ValueError, match="^solver='euler': expected one of"):
        step_coefficients("euler", torch.linspace(-3, 3, 4))


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (16, 10)])
def test_modes_stand_for_every_frequency(size):
    modes = Modes.of(*size)
    assert modes.count.sum() == size[0] * size[1]
    noise = torch.randn(4, 1, *size, generator=torch.Generator().manual_seed(0))
    by_bin = radial_covariance(noise)[:, 0, 0]
    assert ((by_bin[modes.bins] * modes.count).sum() / modes.count.sum()).item() == pytest.approx(
        noise.square().mean().item()
    ), "the same bins: Parseval holds"


@pytest.mark.parametrize("low, high", [((4, 4), (8, 8)), ((4, 6), (12, 12)), ((5, 8), (8, 11))])
def test_enlarging_is_that_of_torch(low, high):
    """Monte Carlo: white and coloured images through F.interpolate, factors that are whole and that are not."""
    modes = Modes.of(*low)
    power = 1.0 / (1 + modes.rows + 2 * modes.columns).double()
    shape = tuple(side // 2 + 1 for side in low)
    rows, columns = ((torch.fft.fftfreq(side) * side).abs().round().long() for side in low)
    filters = power.reshape(shape)[rows][:, columns].sqrt()
    noise = torch.randn(20000, 1, *low, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = torch.fft.ifft2(torch.fft.fft2(noise) * filters).real
    large = F.interpolate(images, high, mode="bicubic", align_corners=False)
    measured = torch.fft.fft2(large, norm="ortho").abs().square().mean((0, 1))
    measured = measured[: high[0] // 2 + 1, : high[1] // 2 + 1].flatten()
    expected = enlarge(power, low, high)
    assert torch.allclose(measured, expected, rtol=0.06, atol=1e-3 * expected.max())


def test_many_steps_of_a_perfect_network_give_the_spectrum():
    spectra = natural_spectra([(16, 16)])
    for solver in SCHEDULERS:
        steps = LevelSteps((16, 16), solver, half_log_snr(ALPHAS)[torch.arange(999, -1, -1)])
        shares = octave_shares([steps], spectra)
        assert shares.flatten().tolist() == pytest.approx([1] * 4, abs=0.03), solver


@pytest.mark.parametrize(
    "low, high, arguments",
    [
        ("ddim", "ddim", dict(num_inference_steps=12, refine_steps=[4, 6], refine_strength=[0.5, 0.2])),
        ("dpmsolver++", "dpmsolver++", dict(num_inference_steps=10, refine_steps=4, spacing="log_snr")),
        ("sde-dpmsolver++", "ddpm", dict(num_inference_steps=20, refine_steps=5)),
        ("ddpm", "dpmsolver++", dict(num_inference_steps=20, refine_steps=5, resolutions=[8, 32])),
    ],
)
def test_the_calculus_is_a_run_of_the_pipeline(low, high, arguments):
    """Within 3 % in every octave, at every kind of step and jump."""
    schedulers = (SCHEDULERS[low](), SCHEDULERS[high]())
    pipeline = PyramidalPipeline(GaussianNoisePredictor(resolutions=(8, 16, 32)), *schedulers)
    pipeline.set_progress_bar_config(disable=True)
    plan = pipeline.plan(**arguments)
    levels = level_steps(plan, schedulers, ALPHAS)

    def modes_of(size):  # the oracle's own spectrum, mode by mode
        modes = Modes.of(*size)
        return natural_spectrum(*size)[: size[0] // 2 + 1, : size[1] // 2 + 1].flatten(), modes

    known = [modes_of(level.size)[0] for level in levels]
    power, modes = delivered(levels, perfect_response(known)), modes_of((32, 32))[1]
    images = pipeline(4000, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments).images
    measured = torch.fft.fft2(images.double(), norm="ortho").abs().square().mean((0, 1))[:17, :17].flatten()
    for mask in modes.octaves():
        ours, theirs = ((part * modes.count)[mask].sum().item() for part in (power, measured))
        assert ours == pytest.approx(theirs, rel=0.03)


def test_every_colour_axis_has_a_spectrum_of_its_own():
    """One axis a thousand times as strong as another: each is what it is alone."""
    gray = natural_spectra()
    two = Spectra(torch.eye(2).double(), gray.sizes, [torch.cat((part, part / 1000)) for part in gray.power])
    weak = Spectra(gray.colors, gray.sizes, [part / 1000 for part in gray.power])
    grid = half_log_snr(ALPHAS)
    levels = [
        LevelSteps(size, "ddpm", grid[torch.linspace(start, 0, 12).long()])
        for size, start in zip(SIZES, (999, 300, 300), strict=True)
    ]
    both = octave_shares(levels, two)
    assert torch.allclose(both[:, :1], octave_shares(levels, gray)) and torch.allclose(
        both[:, 1:], octave_shares(levels, weak)
    )
    assert (both[:, 0] / both[:, 1]).max() > 1.2


def test_a_size_that_was_not_measured_is_refused():
    steps = LevelSteps((16, 24), "ddpm", half_log_snr(ALPHAS)[[999, 500, 0]])
    with pytest.raises(ValueError, match=r"^level \(16, 24\): expected one of the measured sizes"):
        octave_shares([steps], natural_spectra())
