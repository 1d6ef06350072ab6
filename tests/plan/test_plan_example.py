"""examples/plan.py, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import pyrdiff
from pyrdiff.commands.plan import PlanSettings
from pyrdiff.methods.pddpm import plans

EXAMPLE = Path(__file__).parents[2] / "examples" / "plan.py"


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(EXAMPLE), *flags], capture_output=True, text=True)


def test_it_prints_the_plans_and_chooses(tmp_path):
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
    model = tmp_path / "model"
    pyrdiff.hub.export(pyrdiff.PyramidalPipeline(network, DDPMScheduler(), plans=plans()), model)
    flags = ["--model", str(model), "--batch_size", "2", "--costs", str(tmp_path / "costs.json"), "--device", "cpu"]
    done = run(*flags, "--budget_ms", "1000000")
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in plans()) and "chosen: paper" in done.stdout
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs["batch_size"] == 2 and len(costs["seconds"]) == 2, "DDPM and the solver of the shorter plans"
    done = run(*flags, "--budget_ms", "0.000001")
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: budget_ms=1e-06: expected")
    done = run(*flags[:2], "--batch_size", "3", *flags[4:])
    expected = "error: costs were measured with batch_size=2: expected batch_size=3"
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1] == expected

    score = {"frechet": 9.0, "frechet_interval": [8.0, 10.0]}
    arm = {"settings": {"loop": "saved", "arguments": {"plan": plans()["fast"]}}, "score": score}
    best = {"settings": {"loop": "saved", "arguments": {"plan": plans()["paper"]}}, "score": {**score, "frechet": 8.5}}
    (tmp_path / "bench.json").write_text(json.dumps({"arms": {"quick": arm, "long": best}}))
    done = run(*flags, "--budget_ms", "1000000", "--bench", str(tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    assert "distance 9 [8, 10]" in done.stdout and "chosen: quick" in done.stdout
    done = run(*flags, "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and set(result["plans"]) == set(plans()) and result["chosen"] is None
    assert result["plans"]["fast"]["calls"] == [20, 3, 2] and result["plans"]["fast"]["ms_per_image"] > 0


@pytest.mark.parametrize("flags, said", [
    ({"batch_size": 0}, "--batch_size: got 0"),
    ({"budget_ms": 1.0, "target": 1.0, "bench": "b"}, "--budget_ms, --target: got both"),
    ({"target": 1.0}, "--target: got 1.0 without --bench"),
])  # fmt: skip
def test_what_flags_alone_get_wrong_is_said_before_any_timing(flags, said):
    with pytest.raises(ValueError, match=said):
        PlanSettings(model="nowhere", **flags)
