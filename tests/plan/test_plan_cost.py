"""Costs of steps and the choice of a plan."""

import json
import time

import pytest
import torch
from diffusers import DDPMScheduler

from pyrdiff import CoordinateUNet2DModel, PyramidalPipeline
from pyrdiff.plan import StepCosts, bench_plans, choose, measure_costs

PLANS = {
    "fast": {"num_inference_steps": 4, "refine_steps": [2, 1], "scheduler": ["DPMSolverMultistepScheduler", {}]},
    "balanced": {"num_inference_steps": 10, "refine_steps": 4},
    "paper": {"num_inference_steps": 100, "refine_steps": 10},
}


@pytest.fixture
def pipeline() -> PyramidalPipeline:
    torch.manual_seed(0)
    unet = CoordinateUNet2DModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        resolutions=(4, 8, 16),
        image_channels=1,
    ).eval()
    return PyramidalPipeline(unet, DDPMScheduler(), plans=PLANS)


def costs(**seconds) -> StepCosts:
    seconds = seconds or {"4x4": 0.001, "8x8": 0.01, "16x16": 0.1}
    return StepCosts(10, seconds, dict.fromkeys(seconds, 0.0), "cpu", 1, "float32")


def test_every_level_is_timed_once_and_the_calls_are_those_that_were_asked_for(pipeline):
    sizes = []
    pipeline.unet.register_forward_pre_hook(lambda module, arguments: sizes.append(tuple(arguments[0].shape)))
    measured = measure_costs(pipeline, batch_size=3, steps=6, rounds=2)
    assert list(measured.seconds) == ["4x4", "8x8", "16x16"] and min(measured.seconds.values()) > 0
    assert [sizes.count((3, 1, side, side)) for side in (4, 8, 16)] == [24] * 3, "a warm-up and two rounds of 2 + 6"
    assert (measured.batch_size, measured.device, measured.dtype) == (3, "cpu", "float32")


def test_a_prediction_is_the_sum_over_the_calls(pipeline):
    plan = pipeline.plan(plan="balanced")
    assert costs().predict(plan) == pytest.approx(10 * 0.001 + 4 * 0.01 + 4 * 0.1)
    with pytest.raises(ValueError, match="^plan has a level of 16x16: expected one of the timed sizes"):
        costs(**{"4x4": 1.0, "8x8": 1.0}).predict(plan)


def test_steps_and_overhead_are_told_apart(pipeline):
    """A network that only sleeps: 30 ms a call, and 100 ms more where a run begins."""
    calls = []

    def slow(module, arguments):
        time.sleep(0.03)
        if calls and calls[-1] >= int(arguments[1]):  # the times of a run fall
            calls.append(int(arguments[1]))
            return
        time.sleep(0.1)
        calls.append(int(arguments[1]))

    pipeline.unet.register_forward_pre_hook(slow)
    measured = measure_costs(pipeline, batch_size=1, steps=4, rounds=2)
    for name in measured.seconds:
        assert 0.03 <= measured.seconds[name] < 0.06
        assert 0.05 < measured.overhead[name] < 0.3
    plan = pipeline.plan(num_inference_steps=3, refine_steps=[2, 2])
    expected = sum(measured.overhead.values()) + 3 * measured.seconds["4x4"]
    assert measured.predict(plan) == pytest.approx(
        expected + 2 * measured.seconds["8x8"] + 2 * measured.seconds["16x16"]
    )


def test_costs_are_kept(tmp_path):
    costs().save(tmp_path / "costs.json")
    assert StepCosts.load(tmp_path / "costs.json") == costs()
    (tmp_path / "other.json").write_text("[1]")
    for name in ("other.json", "none.json"):
        with pytest.raises(ValueError, match="^path=.*: expected step costs"):
            StepCosts.load(tmp_path / name)


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


def test_wrong_choices_say_how_near_one_comes(pipeline):
    quality = {"fast": 300.0, "balanced": 100.0, "paper": 110.0}
    for arguments, message in [
        (dict(), "budget_ms=None, target=None: expected one of them"),
        (dict(budget_ms=1, target=2, quality=quality), "expected one of them"),
        (dict(target=2), "expected one of them, and quality with target"),
        (dict(budget_ms=5), "budget_ms=5: expected at least 12.4, what the plan 'fast' takes"),
        (dict(target=5, quality=quality), "target=5: expected at least 100, what the plan 'balanced' reaches"),
        (dict(target=5, quality={"other": 1.0}), "quality: got"),
        (dict(budget_ms=5, plans={}), "plans: got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose(pipeline, costs(), **arguments)
    with pytest.raises(ValueError, match="^batch_size=0: expected 1 or more"):
        measure_costs(pipeline, batch_size=0)


def test_plans_of_a_bench(pipeline, tmp_path):
    arm = {
        "settings": {
            "loop": "pyramid",
            "changed": [{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, None],
            "spacings": ["leading", None],
            "arguments": {"num_inference_steps": 4, "refine_steps": [2, 2]},
        },
        "score": {"frechet": 7.0},
    }
    saved = {"settings": {"loop": "saved", "arguments": {"plan": PLANS["fast"]}}, "score": {"frechet": 9.0}}
    stock = {"settings": {"loop": "stock"}, "score": {"frechet": 1.0}}
    unscored = {"settings": arm["settings"]}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"arms": {"a": arm, "b": saved, "c": stock, "d": unscored}}))
    plans, quality = bench_plans(path)
    assert quality == {"a": 7.0, "b": 9.0} and plans["b"] == PLANS["fast"]
    assert pipeline.plan(plan=plans["a"]).network_calls == 8
    scheduler = pipeline._named_plan(plans["a"], {})[1][0]
    assert scheduler.config.timestep_spacing == "leading" and scheduler.config.algorithm_type == "sde-dpmsolver++"
    assert choose(pipeline, costs(), plans, target=8, quality=quality) == "a"
    path.write_text("{}")
    with pytest.raises(ValueError, match="^path=.*: expected a result of benchmarks/bench.py"):
        bench_plans(path)
    path.write_text(json.dumps({"arms": {"c": stock}}))
    with pytest.raises(ValueError, match="expected a result with scored pyramids"):
        bench_plans(path)
