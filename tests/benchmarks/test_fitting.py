"""Fitted plans, and the spectra that they are fitted to."""

import math

import numpy as np
import pytest
import torch
from calculus import LevelSteps, half_log_snr
from diffusers import DDPMScheduler
from fitting import SCHEDULERS, fit, octave_shares
from oracles import GaussianNoisePredictor, octave_power
from spectra import Spectra
from test_calculus import natural_spectra

from pyrdiff import PyramidalPipeline
from pyrdiff.data import ImageLevels

ALPHAS = DDPMScheduler().alphas_cumprod


def test_a_fitted_plan_keeps_every_octave_and_runs():
    """10/4/4: each octave within 5 %, by the calculus and in a run of the pipeline; the scheduler's own times lose."""
    fitted = fit(natural_spectra(), ALPHAS, (10, 4, 4))
    assert fitted.octaves == pytest.approx([1] * 5, abs=0.05)
    assert fitted.nfe_eq == 10 / 16 + 4 / 4 + 4
    assert [len(times) for times in fitted.plan["spacing"]] == [10, 4, 4]

    pipeline = PyramidalPipeline(
        GaussianNoisePredictor(resolutions=(8, 16, 32)), DDPMScheduler(), plans={"fitted": fitted.plan}
    )
    pipeline.set_progress_bar_config(disable=True)
    unclipped = {**fitted.plan, "scheduler": [SCHEDULERS["dpmsolver++"][0], {}], "refine_scheduler": None}
    arguments = dict(output_type="latent", generator=torch.Generator().manual_seed(0))
    images = pipeline(3000, plan=unclipped, **arguments).images
    assert octave_power(images) == pytest.approx([1] * 5, abs=0.05)
    plain = {"num_inference_steps": 10, "refine_steps": 4, "scheduler": unclipped["scheduler"]}
    images = pipeline(500, plan=plain, **arguments).images
    assert max(abs(power - 1) for power in octave_power(images)) > 0.2
    assert pipeline.plan(plan="fitted").nfe_eq == fitted.nfe_eq
    assert pipeline(1, plan="fitted", output_type="pt").images.shape == (1, 1, 32, 32)


@pytest.mark.parametrize("solver", ["sde-dpmsolver++", ("ddpm", "dpmsolver++")])
def test_fitting_beats_even_steps(solver):
    spectra, calls = natural_spectra(), (12, 4, 4)
    fitted = fit(spectra, ALPHAS, calls, solver, iterations=25)
    solvers = [solver] * 2 if isinstance(solver, str) else solver
    grid, even = half_log_snr(ALPHAS), []
    for index, (size, count) in enumerate(zip(spectra.sizes, calls, strict=True)):
        begin = grid[-1] if index == 0 else grid[299]
        even.append(LevelSteps(size, solvers[min(index, 1)], torch.linspace(begin, grid[0], count).double()))
    worst = (octave_shares(even, spectra) - 1).abs().max().item()
    assert max(abs(share - 1) for share in fitted.octaves) < worst


def test_a_residual_at_one_size():
    """SR4's case: one level, a cosine schedule, unit variance in all; 6 calls reach it in every octave."""
    alphas = DDPMScheduler(500, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    k = torch.arange(17).double()
    power = (k / 8) ** 2 * torch.exp(-k / 4)
    residual = Spectra(torch.ones(1, 1).double(), [(32, 32)], [(power / power.mean())[None].clamp(min=1e-3)])
    assert fit(residual, alphas, (6,)).octaves == pytest.approx([1] * 5, abs=0.05)


def test_wrong_input():
    for arguments, message in [
        (dict(calls=(10, 4)), r"calls=\[10, 4\]: expected 1 to 1000 for each of the 3"),
        (dict(calls=(10, 4, 1001)), "calls="),
        (dict(calls=(10, 4, 0)), "calls="),
        (dict(calls=(10, 4, 4), solver="heun"), "solver='heun': expected one or two of"),
        (dict(calls=(10, 4, 4), solver=("ddpm",) * 3), "solver="),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(natural_spectra(), ALPHAS, **arguments)
    with pytest.raises(ValueError, match="^alphas_cumprod ends at 0.0: expected values between 0 and 1"):
        fit(natural_spectra(), DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod, (10, 4, 4))


def coloured_levels(count: int = 600) -> tuple[ImageLevels, np.ndarray]:
    """Gaussian images about a mean image, with one colour axis three times as strong as the others."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    arrays = []
    for side in (8, 16):
        mean = rng.uniform(100, 150, (1, side, side, 3))
        noise = rng.normal(size=(count, side, side, 3)) * [24, 8, 8] @ axes.T
        arrays.append(np.clip(np.rint(mean + noise), 0, 255).astype(np.uint8))
    return ImageLevels([8, 16], arrays, [str(index) for index in range(count)]), axes


def test_spectra_are_about_the_mean_image_and_along_the_colours():
    levels, axes = coloured_levels()
    spectra = Spectra.of(levels)
    assert spectra.sizes == [(8, 8), (16, 16)]
    assert abs(spectra.colors[0] @ torch.from_numpy(axes[:, 0])) > 0.999
    assert torch.allclose(spectra.colors @ spectra.colors.T, torch.eye(3).double(), atol=1e-9)
    for power in spectra.power:
        assert torch.allclose(power[0], torch.full_like(power[0], (24 / 127.5) ** 2), rtol=0.15)
        assert torch.allclose(power[1:], torch.full_like(power[1:], (8 / 127.5) ** 2), rtol=0.15)
    assert spectra.modes(1).shape == (3, 9 * 9)


def test_the_images_that_are_measured_come_from_the_generator():
    levels, _ = coloured_levels(60)

    def power(*seed) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(number) for number in seed]
        return Spectra.of(levels, 20, *generators).power[0]

    assert torch.equal(power(), power(0)) and torch.equal(power(1), power(1)) and not torch.equal(power(), power(1))


def test_spectra_need_two_images():
    levels, _ = coloured_levels(2)
    assert math.isfinite(Spectra.of(levels).power[0].sum())
    with pytest.raises(ValueError, match="^images=2, max_images=1: expected 2 or more"):
        Spectra.of(levels, max_images=1)
