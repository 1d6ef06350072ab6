"""examples/plan.py, as a user runs it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import pyrdiff
from pyrdiff.commands.plan import PlanSettings
from pyrdiff.methods.pddpm import plans

EXAMPLE = Path(__file__).parents[2] / "examples" / "plan.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script with flags: its exit code, what it printed, and the last line of stderr."""

    def call(*flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code or 0
        printed, said = capsys.readouterr()
        return code, printed, (said.strip().splitlines() or [""])[-1]

    return call


def test_it_prints_the_plans_and_chooses(run, tmp_path):
    torch.manual_seed(0)
    network = pyrdiff.CoordinateUNet2DModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        resolutions=(4, 8, 16),
        image_channels=1,
    )
    model = pyrdiff.hub.export(pyrdiff.PyramidalPipeline(network, DDPMScheduler(), plans=plans()), tmp_path / "model")
    flags = ["--model", model, "--costs", tmp_path / "costs.json", "--device", "cpu", "--batch_size"]
    code, printed, said = run(*flags, 2, "--budget_ms", 1000000)
    assert code == 0 and all(f"  {name} " in printed for name in plans()) and "chosen: paper" in printed, said
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs["batch_size"] == 2 and len(costs["seconds"]) == 2, "DDPM and the solver of the shorter plans"
    code, _, said = run(*flags, 2, "--budget_ms", 0.000001)
    assert code == 2 and said.startswith("error: budget_ms=1e-06: expected")
    code, _, said = run(*flags, 3)
    assert (code, said) == (2, "error: costs were measured with batch_size=2: expected batch_size=3")

    score = {"frechet": 9.0, "frechet_interval": [8.0, 10.0]}
    arm = {"settings": {"loop": "saved", "arguments": {"plan": plans()["fast"]}}, "score": score}
    best = {"settings": {"loop": "saved", "arguments": {"plan": plans()["paper"]}}, "score": {**score, "frechet": 8.5}}
    (tmp_path / "bench.json").write_text(json.dumps({"arms": {"quick": arm, "long": best}}))
    code, printed, said = run(*flags, 2, "--budget_ms", 1000000, "--bench", tmp_path / "bench.json")
    assert code == 0 and "distance 9 [8, 10]" in printed and "chosen: quick" in printed, said
    code, printed, _ = run(*flags, 2, "--json")
    result = json.loads(printed)
    assert code == 0 and set(result["plans"]) == set(plans()) and result["chosen"] is None
    assert result["plans"]["fast"]["calls"] == [20, 3, 3] and result["plans"]["fast"]["ms_per_image"] > 0


@pytest.mark.parametrize("flags, said", [
    ({"batch_size": 0}, "--batch_size=0"),
    ({"budget_ms": 1.0, "target": 1.0, "bench": "b"}, "--target=1.0: expected either it or --budget_ms"),
    ({"target": 1.0}, "--target=1.0: expected none without --bench"),
])  # fmt: skip
def test_what_flags_alone_get_wrong_is_said_before_any_timing(flags, said):
    with pytest.raises(ValueError, match=said):
        PlanSettings(model="nowhere", **flags)
