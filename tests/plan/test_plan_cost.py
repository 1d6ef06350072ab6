"""Costs of steps and the choice of a plan."""

import functools
import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from pyrdiff import CoordinateUNet2DModel, PyramidalPipeline, machine
from pyrdiff.plan import StepCosts, bench_plans, choose, measure_costs

PLANS = {
    "fast": {"num_inference_steps": 4, "refine_steps": [2, 1], "scheduler": ["DPMSolverMultistepScheduler", {}]},
    "balanced": {"num_inference_steps": 10, "refine_steps": 4},
    "paper": {"num_inference_steps": 100, "refine_steps": 10},
}
DDPM, SOLVER = "DDPMScheduler()", "DPMSolverMultistepScheduler()"
SDE = "DPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++', thresholding=True, timestep_spacing='leading')"


def toy(scheduler=None, plans=PLANS, **settings) -> PyramidalPipeline:
    torch.manual_seed(0)
    unet = CoordinateUNet2DModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        resolutions=(4, 8, 16),
        **{"image_channels": 1, **settings},
    ).eval()
    return PyramidalPipeline(unet, scheduler or DDPMScheduler(), plans=plans)


@pytest.fixture
def pipeline() -> PyramidalPipeline:
    return toy()


def costs(**seconds) -> StepCosts:
    sizes = {"4x4": 0.001, "8x8": 0.01, "16x16": 0.1}
    seconds = seconds or {name: sizes for name in (DDPM, SOLVER, SDE)}
    overhead = {name: dict.fromkeys(sizes, 0.0) for name, sizes in seconds.items()}
    return StepCosts(seconds, overhead, 10, "a processor", 1, "float32", "a network")


def test_every_scheduler_is_timed_at_every_level_and_the_calls_are_those_that_were_asked_for(pipeline):
    sizes = []
    pipeline.unet.register_forward_pre_hook(lambda module, arguments: sizes.append(tuple(arguments[0].shape)))
    pipeline.set_progress_bar_config(desc="mine")
    own = pipeline.scheduler, pipeline.refine_scheduler, dict(pipeline.config)
    measured = measure_costs(pipeline, batch_size=3, steps=6, rounds=2)
    assert list(measured.seconds) == list(measured.overhead) == [DDPM, SOLVER]
    for seconds in measured.seconds.values():
        assert list(seconds) == ["4x4", "8x8", "16x16"] and min(seconds.values()) > 0
    assert [sizes.count((3, 1, side, side)) for side in (4, 8, 16)] == [48] * 3, "2 x a warm-up, two rounds of 2 + 6"
    assert (measured.batch_size, measured.dtype) == (3, "float32")
    assert own == (pipeline.scheduler, pipeline.refine_scheduler, dict(pipeline.config)), "the pipeline is as it was"
    assert pipeline._progress_bar_config == {"desc": "mine"}


def test_only_what_the_plans_run_is_timed(pipeline):
    mixed = {
        "resolutions": [4, 8],
        "num_inference_steps": 3,
        "refine_steps": 2,
        "scheduler": ["DDPMScheduler", {"variance_type": "fixed_large"}],
        "refine_scheduler": ["DPMSolverMultistepScheduler", {"solver_order": 2}],
    }
    measured = measure_costs(pipeline, 1, {"mixed": mixed}, steps=3, rounds=1)
    large = "DDPMScheduler(variance_type='fixed_large')"
    assert {name: list(sizes) for name, sizes in measured.seconds.items()} == {large: ["4x4"], SOLVER: ["8x8"]}
    with pytest.raises(ValueError, match=re.escape(f"a level of 4x4 with {DDPM}: expected what was timed: {large} at")):
        measured.predict(pipeline, "balanced")


def test_few_training_steps_are_enough():
    assert list(measure_costs(toy(DDPMScheduler(12), None), 1, rounds=1).seconds) == [DDPM]


def test_a_prediction_is_the_sum_over_the_calls(pipeline):
    assert costs().predict(pipeline, "balanced") == pytest.approx(10 * 0.001 + 4 * 0.01 + 4 * 0.1)
    ddpm, solver = {"4x4": 1.0, "8x8": 2.0, "16x16": 3.0}, {"4x4": 10.0, "8x8": 20.0, "16x16": 30.0}
    both = costs(**{DDPM: ddpm, SOLVER: solver})
    assert both.predict(pipeline, PLANS["fast"]) == pytest.approx(4 * 10 + 2 * 20 + 30)
    refined = {**PLANS["fast"], "scheduler": None, "refine_scheduler": PLANS["fast"]["scheduler"]}
    assert both.predict(pipeline, refined) == pytest.approx(4 * 1 + 2 * 20 + 30)
    with pytest.raises(ValueError, match=r"^plan has a level of 16x16 with DDPMScheduler\(\): expected what was timed"):
        costs(**{DDPM: {"4x4": 1.0, "8x8": 1.0}}).predict(pipeline, "balanced")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that the timing sees, in seconds: it stands still, but for what a test adds."""
    now = [0.0]
    monkeypatch.setattr(machine, "perf_counter", lambda: now[0])
    return now


def test_a_scheduler_has_its_own_time(pipeline, monkeypatch, clock):
    """A solver whose step takes 50 ms, against DDPM, whose step takes none; then the time of a plan with it."""
    step = DPMSolverMultistepScheduler.step

    @functools.wraps(step)
    def slow(*arguments, **named):
        clock[0] += 0.05
        return step(*arguments, **named)

    monkeypatch.setattr(DPMSolverMultistepScheduler, "step", slow)
    measured = measure_costs(pipeline, batch_size=1, steps=4)
    assert list(measured.seconds[SOLVER].values()) == pytest.approx([0.05] * 3)
    assert not any(measured.seconds[DDPM].values()) and measured.overhead[SOLVER]["4x4"] == pytest.approx(0)
    before = clock[0]
    pipeline(1, plan="fast", output_type="latent")
    assert measured.predict(pipeline, "fast") == pytest.approx(clock[0] - before) and clock[0] > before


def test_steps_and_overhead_are_told_apart(pipeline, clock):
    """A network that takes 30 ms a call, and 100 ms more where a run begins."""
    calls = []

    def slow(module, arguments):
        clock[0] += 0.03 if calls and calls[-1] >= int(arguments[1]) else 0.13  # the times of a run fall
        calls.append(int(arguments[1]))

    pipeline.unet.register_forward_pre_hook(slow)
    measured = measure_costs(pipeline, batch_size=1, steps=4, rounds=2)
    seconds, overhead = measured.seconds[DDPM], measured.overhead[DDPM]
    assert list(seconds.values()) == pytest.approx([0.03] * 3) and list(overhead.values()) == pytest.approx([0.1] * 3)
    plan = {"num_inference_steps": 3, "refine_steps": 2}
    assert measured.predict(pipeline, plan) == pytest.approx(3 * 0.1 + 7 * 0.03)


def test_measuring_changes_nothing_in_the_pipeline(pipeline):
    """Not even in the middle of a run, whose scheduler has its steps laid out."""
    pipeline.scheduler.set_timesteps(7)
    pipeline._num_timesteps = 7
    before = pipeline.scheduler.timesteps.clone()
    measure_costs(pipeline, 1, {"one": {"resolutions": [4], "num_inference_steps": 3}}, steps=3, rounds=1)
    assert torch.equal(pipeline.scheduler.timesteps, before) and pipeline.num_timesteps == 7


def test_costs_are_kept(tmp_path):
    costs().save(tmp_path / "costs.json")
    assert StepCosts.load(tmp_path / "costs.json") == costs()
    (tmp_path / "other.json").write_text("[1]")
    for name in ("other.json", "none.json"):
        with pytest.raises(ValueError, match="^path=.*: expected step costs"):
            StepCosts.load(tmp_path / name)


def test_costs_say_what_they_were_measured_for(pipeline):
    measured = measure_costs(pipeline, 2, {"one": {"resolutions": [4]}}, steps=3, rounds=1)
    measured.check(pipeline, 2)
    measured.check(toy(), 2)
    for name, other in dict(device="abacus", threads=99, dtype="bfloat16", model="other").items():
        expected = f"costs were measured with {name}={other!r}: expected {name}={getattr(measured, name)!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            replace(measured, **{name: other}).check(pipeline, 2)
    with pytest.raises(ValueError, match="^costs were measured with batch_size=2: expected batch_size=3$"):
        measured.check(pipeline, 3)
    for settings in (dict(image_channels=3), dict(num_frequencies=2), dict(act_fn="relu")):
        with pytest.raises(ValueError, match="^costs were measured with model='CoordinateUNet2DModel, "):
            measured.check(toy(**settings), 2)


def test_the_choice(pipeline):
    # Milliseconds an image: fast 12.4, balanced 45, paper 120.
    assert choose(pipeline, costs(), budget_ms=200) == "paper"
    assert choose(pipeline, costs(), budget_ms=50) == "balanced"
    quality = {"fast": 300.0, "balanced": 100.0, "paper": 110.0}
    assert choose(pipeline, costs(), budget_ms=200, quality=quality) == "balanced"
    assert choose(pipeline, costs(), budget_ms=20, quality=quality) == "fast"
    assert choose(pipeline, costs(), target=120, quality=quality) == "balanced"
    assert choose(pipeline, costs(), target=400, quality=quality) == "fast"
    own = {"one": {"num_inference_steps": 1, "resolutions": [4]}}
    assert choose(pipeline, costs(), own, budget_ms=1) == "one"


def test_within_a_budget_the_cheapest_that_cannot_be_told_from_the_best_is_chosen(pipeline):
    quality = {"fast": 104.0, "balanced": 100.0, "paper": 99.0}
    intervals = {"fast": (101.0, 107.0), "balanced": (98.0, 103.0), "paper": (90.0, 105.0)}
    arguments = dict(budget_ms=200, quality=quality)
    assert choose(pipeline, costs(), **arguments) == "paper"
    assert choose(pipeline, costs(), **arguments, intervals=intervals) == "balanced"
    assert choose(pipeline, costs(), **arguments, intervals={**intervals, "fast": (99.0, 109.0)}) == "fast"
    assert choose(pipeline, costs(), **arguments, intervals={"paper": (90.0, 105.0)}) == "paper", "others are points"
    arguments["budget_ms"] = 50
    assert choose(pipeline, costs(), **arguments, intervals=intervals) == "balanced", "100 is the best in this budget"
    arguments = dict(target=99.5, quality=quality, intervals=intervals)
    assert choose(pipeline, costs(), **arguments) == "paper", "a target is for the distance itself"


def test_wrong_choices_say_how_near_one_comes(pipeline):
    quality = {"fast": 300.0, "balanced": 100.0, "paper": 110.0}
    for arguments, message in [
        (dict(), "budget_ms=None, target=None: expected one of them"),
        (dict(budget_ms=1, target=2, quality=quality), "expected one of them"),
        (dict(target=2), "expected one of them, and quality with target"),
        (dict(budget_ms=5), "budget_ms=5: expected at least 12.4, what the plan 'fast' takes"),
        (dict(target=5, quality=quality), "target=5: expected at least 100, what the plan 'balanced' reaches"),
        (dict(target=5, quality={"other": 1.0}), "quality={"),
        (dict(budget_ms=5, plans={}), "plans={}: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose(pipeline, costs(), **arguments)
    with pytest.raises(ValueError, match="^batch_size=0: expected 1 or more"):
        measure_costs(pipeline, batch_size=0)
    with pytest.raises(ValueError, match="^plans={}: expected"):
        measure_costs(pipeline, plans={})


def test_plans_of_a_bench(pipeline, tmp_path):
    arm = {
        "settings": {
            "loop": "pyramid",
            "changed": [{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, None],
            "spacings": ["leading", None],
            "arguments": {"num_inference_steps": 4, "refine_steps": [2, 2]},
        },
        "score": {"frechet": 7.0, "frechet_interval": [6.0, 8.0]},
    }
    score = {"frechet": 9.0, "frechet_interval": [8.0, 10.0]}
    saved = {"settings": {"loop": "saved", "arguments": {"plan": PLANS["fast"]}}, "score": score}
    stock = {"settings": {"loop": "stock"}, "score": {"frechet": 1.0}}
    unscored = {"settings": arm["settings"]}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"arms": {"a": arm, "b": saved, "c": stock, "d": unscored}}))
    plans, quality, intervals = bench_plans(path)
    assert quality == {"a": 7.0, "b": 9.0} and plans["b"] == PLANS["fast"]
    assert intervals == {"a": (6.0, 8.0), "b": (8.0, 10.0)}
    assert pipeline.plan(plan=plans["a"]).network_calls == 8
    scheduler = pipeline.lay_out(plans["a"])[0].steps.scheduler
    assert scheduler.config.timestep_spacing == "leading" and scheduler.config.algorithm_type == "sde-dpmsolver++"
    assert choose(pipeline, costs(), plans, target=8, quality=quality) == "a"
    path.write_text("{}")
    with pytest.raises(ValueError, match="^path=.*: expected a result of benchmarks/bench.py"):
        bench_plans(path)
    path.write_text(json.dumps({"arms": {"c": stock}}))
    with pytest.raises(ValueError, match="expected a result with scored pyramids"):
        bench_plans(path)
