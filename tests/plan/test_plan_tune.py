"""The search for a model's own plans, on Gaussian images whose best network is a closed form."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from oracles import GaussianNoisePredictor, natural_spectrum, radius, spectrum_of_means

from pyrdiff import PyramidalPipeline
from pyrdiff.metrics.features import ImageFeatures
from pyrdiff.plan.tune import SDE, Judge, Judged, auto_plan, candidates, choose_three, tune

POWER, SIDE = 0.002, 16
ROUGH, FINE = (
    {"num_inference_steps": low, "refine_steps": high, "spacing": spacing, "scheduler": SDE}
    for low, high, spacing in ((8, 1, "scheduler"), (30, 12, "log_snr"))
)
FEW = [
    *({**ROUGH, "refine_steps": steps} for steps in (1, 2, 3, 4, 6)),
    *({**FINE, "refine_steps": steps} for steps in (4, 6, 8, 12)),
]


def real_images(count: int, seed: int = 1) -> torch.Tensor:
    """Gaussian images [count, 1, 16, 16] with the spectrum that the network knows, in [0, 1]."""
    spectrum = spectrum_of_means(natural_spectrum(32, 32, POWER))
    noise = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    images = torch.fft.ifft2(torch.fft.fft2(noise) * spectrum.sqrt()).real
    return (images / 2 + 0.5).clamp(0, 1).float()


def amplitudes(images: torch.Tensor) -> torch.Tensor:
    """Root of the power in each ring of frequencies, [B, 8], about 1 in each."""
    spectrum = spectrum_of_means(natural_spectrum(32, 32, POWER))
    power = torch.fft.fft2(2 * images[:, 0].double() - 1, norm="ortho").abs().square() / spectrum
    rings = radius(SIDE, SIDE).round()
    return torch.stack([power[:, rings == ring].mean(1).sqrt() for ring in range(1, 9)], 1).float()


@pytest.fixture
def pipeline() -> PyramidalPipeline:
    unet = GaussianNoisePredictor(resolutions=(4, 8, 16), sample_size=16, power=POWER, means_of=32)
    pipeline = PyramidalPipeline(unet, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def search(pipeline):
    """search(**changes): a tuning whose clock counts the pixels that the network is called for."""
    features = ImageFeatures("rings", 1, {"network": "rings"}, amplitudes, torch.device("cpu"))

    def work() -> float:
        return sum(math.prod(size) for size in pipeline.unet.calls) / 2_000

    def run(**changes):
        said = []
        options = {"minutes": 0.5, "clock": work, "say": said.append, "plans": FEW, **changes}
        return tune(pipeline, options.pop("held_out", real_images(256)), features, **options), said

    return run


def test_the_search_finds_the_plan_that_is_nearest_to_real_images(search):
    tuned, said = search()
    best = tuned.plans["best"].plan
    assert best["spacing"] == "log_snr" and best["refine_steps"] >= 8, "what is best for a perfect network"
    assert tuned.plans["best"].distance < 0.2 * tuned.finalists[0].distance
    assert tuned.plans["balanced"].nfe_eq <= tuned.plans["best"].nfe_eq
    assert all(found.distance <= tuned.yardstick.interval[1] for name, found in tuned.plans.items() if name == "fast")
    counts, samples = zip(*tuned.rounds, strict=True)
    assert counts == (9, 5, 4) and samples[2] >= samples[1] >= samples[0] >= 32
    assert [f"{count} samples each" in line for count, line in zip(samples, said, strict=True)] == [True] * 3
    assert tuned.seconds < 1.2 * 30


def test_a_search_is_repeated_by_its_seed(search):
    one, other, third = (search(seed=seed, minutes=0.3)[0] for seed in (3, 3, 4))
    assert one.plans == other.plans and one.finalists == other.finalists
    assert one.finalists[0].distance != third.finalists[0].distance


def test_every_round_sees_other_noise_than_the_rounds_before(search, monkeypatch):
    judge, asked = Judge.features_of, []
    monkeypatch.setattr(Judge, "features_of", lambda self, *which: asked.append(which[1:]) or judge(self, *which))
    tuned, _ = search(minutes=0.3)  # enough for every second plan
    (plans, first), (better, second), (best, last) = tuned.rounds
    expected = [(0, first)] * plans + [(first, second)] * better
    expected += [(first + second, last)] * (best + 1)  # with the yardstick
    assert asked[2:] == expected, "after the two that are timed"


def judged(nfe_eq: float, distance: float, spread: float = 1.0) -> Judged:
    return Judged({"num_inference_steps": int(nfe_eq)}, nfe_eq, 64, distance, (distance - spread, distance + spread))


def test_names_by_interval():
    finalists = [judged(3, 9), judged(4, 4.5), judged(6, 2.5), judged(12, 2)]
    named = choose_three(finalists, judged(20, 4))
    assert [named[name].nfe_eq for name in ("fast", "balanced", "best")] == [4, 6, 12]
    assert choose_three(finalists, judged(20, 1.5))["fast"].nfe_eq == 6
    assert "fast" not in choose_three(finalists, judged(20, 0.5)), "none is as good as the full-size solver"
    assert choose_three(finalists, None)["fast"].nfe_eq == 6, "within half as much again as the best, or as balanced"
    spread = [judged(5, 4), judged(8, 1)]  # the first cannot be told from the second
    assert choose_three([replace(spread[0], interval=(0.5, 9)), spread[1]], None)["fast"].nfe_eq == 5
    named = choose_three([replace(spread[0], interval=(0.5, 9)), spread[1]], judged(20, 1))
    assert list(named) == ["balanced", "best"], "what is as good as the full size costs more than balanced"


@pytest.mark.parametrize(("resolutions", "levels"), [((4, 8, 16), 3), ((8, 16), 2), ((16,), 1)])
def test_candidates_run_and_keep_to_the_window(resolutions, levels):
    unet = GaussianNoisePredictor(resolutions=resolutions, sample_size=16)
    pipeline = PyramidalPipeline(unet, DDPMScheduler())
    plans = [pipeline.plan(plan=plan) for plan in candidates(pipeline)]
    assert all(len(plan.levels) == levels for plan in plans) and len(plans) >= 6
    assert all(level.timesteps[0] <= 350 for plan in plans for level in plan.levels[1:])
    costs = [plan.nfe_eq for plan in plans]
    assert costs == sorted(costs) and len(set(costs)) >= 5


def test_plans_go_into_the_folder_with_their_figures(search, tmp_path):
    tuned, _ = search(minutes=0.3)
    (tmp_path / "model_index.json").write_text(json.dumps({"plans": {"paper": {}, "fast": {"refine_steps": 3}}}))
    tuned.save(tmp_path)
    plans = json.loads((tmp_path / "model_index.json").read_text())["plans"]
    figures = json.loads((tmp_path / "tuning.json").read_text())
    assert plans["paper"] == {} and plans["best"] == tuned.plans["best"].plan
    assert plans.get("fast") != {"refine_steps": 3}, "that was fast before"
    assert figures["plans"]["best"]["distance"] == tuned.plans["best"].distance
    assert figures["held_out"] == 256 and figures["kind"] == "pyrdiff tuning"
    with pytest.raises(ValueError, match="folder=.*nothing"):
        tuned.save(tmp_path / "nothing")


def test_auto_takes_what_cannot_be_told_from_the_best_within_the_budget(pipeline, tmp_path):
    plans = {name: {"num_inference_steps": count, "refine_steps": 2} for name, count in (("fast", 4), ("best", 40))}
    pipeline.register_to_config(plans=plans)
    assert auto_plan(pipeline, 1e6, 2, tmp_path) == "best", "without figures, the longest"

    def figures(best: float, fast: tuple[float, float], fast_plan=plans["fast"]) -> None:
        rows = {
            "best": {"plan": plans["best"], "distance": best, "interval": [best - 1, best + 1]},
            "fast": {"plan": fast_plan, "distance": sum(fast) / 2, "interval": fast},
        }
        (tmp_path / "tuning.json").write_text(json.dumps({"plans": rows}))

    figures(best=2, fast=(1.5, 4))
    assert auto_plan(pipeline, 1e6, 2, tmp_path) == "fast"
    figures(best=2, fast=(3, 4))
    assert auto_plan(pipeline, 1e6, 2, tmp_path) == "best"
    figures(best=2, fast=(1.5, 4), fast_plan={})
    assert auto_plan(pipeline, 1e6, 2, tmp_path) == "best", "the figures of another plan of that name do not count"
    with pytest.raises(ValueError, match="budget_ms=1e-06: expected at least"):
        auto_plan(pipeline, 1e-6, 2, tmp_path)
    (tmp_path / "tuning.json").write_text("[]")
    with pytest.raises(ValueError, match="tuning.json is not of a search"):
        auto_plan(pipeline, 1e6, 2, tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"held_out": torch.zeros(31, 1, 16, 16)}, "held_out: got 31 images; expected 32 or more"),
        ({"held_out": torch.zeros(32, 1, 8, 8)}, r"held_out has size \(8, 8\): expected \(16, 16\)"),
        ({"minutes": 0.01}, "minutes=0.01: expected at least"),
    ],
)
def test_bad_input(search, changes, named):
    with pytest.raises(ValueError, match=named):
        search(**changes)


def test_the_plans_of_the_pipeline_are_among_the_candidates(pipeline):
    own = {"mine": ROUGH, "endless": {"num_inference_steps": 900, "refine_steps": 200}}
    given = PyramidalPipeline(pipeline.unet, pipeline.scheduler, plans=own)
    plans = candidates(given)
    assert ROUGH in plans and own["endless"] not in plans and len(plans) == len(candidates(pipeline)) + 1
    costs = [given.plan(plan=plan).nfe_eq for plan in plans]
    assert costs == sorted(costs)
