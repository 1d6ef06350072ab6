"""Averages of any length after a run: closed forms, known trajectories, and runs that were interrupted."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.parts.files import MACHINE
from pyrdiff.training import snapshots
from pyrdiff.training.averages import LENGTHS, PowerAverages, coefficients, exponent, inner_product
from pyrdiff.training.checkpoints import load_checkpoint
from pyrdiff.training.loop import prepare
from pyrdiff.training.settings import TrainingStopped

STEPS = 700


def profile(length: float, steps: int, at: int | None = None) -> np.ndarray:
    """Weight of each step 1 to `steps` in an average that ends at `at`, by its definition: s**gamma, integrated."""
    at = steps if at is None else at
    edges = (np.minimum(np.arange(steps + 1), at) / at) ** (exponent(length) + 1)
    return np.diff(edges)


def walk(kind: str) -> torch.Tensor:
    """A trajectory of 6 weights over STEPS steps, float64 [steps, 6]."""
    generator = np.random.default_rng(0)
    if kind == "polynomial":
        time = np.arange(1, STEPS + 1)[:, None] / STEPS
        return torch.from_numpy(np.stack([time[:, 0] ** power for power in range(6)], 1))
    steps = generator.standard_normal((STEPS, 6)) / STEPS**0.5
    return torch.from_numpy(np.cumsum(steps, 0) + generator.standard_normal(6))


def keep(run: Path, path: torch.Tensor) -> None:
    """What a run with these weights leaves in its folder."""
    averages = PowerAverages([torch.zeros(path.shape[1])])
    for step, weights in enumerate(path.float(), start=1):
        averages.step([weights], step)
        if snapshots.is_due(step) or step == len(path):
            named = {length: {"w": values[0]} for length, values in averages.values.items()}
            snapshots.write_snapshot(run, step, named)


def test_the_length_is_the_spread_of_the_profile():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.10) == pytest.approx(6.94, abs=0.01)
    for length in (0.02, 0.1, 0.25):
        weights, times = profile(length, 200_000), (np.arange(200_000) + 0.5) / 200_000
        mean = (weights * times).sum()
        assert ((weights * (times - mean) ** 2).sum()) ** 0.5 == pytest.approx(length, rel=1e-4)
    for wrong in (0.0, 0.3, float("nan")):
        with pytest.raises(ValueError, match=r"^length="):
            exponent(wrong)


def test_inner_products_are_the_integrals():
    for step_a, gamma_a, step_b, gamma_b in ((300, 17.0, 700, 1.8), (700, 6.9, 300, 6.9), (500, 0.4, 500, 17.0)):
        times = (np.arange(700_000) + 0.5) / 1000
        a = np.where(times < step_a, (gamma_a + 1) * times**gamma_a / step_a ** (gamma_a + 1), 0)
        b = np.where(times < step_b, (gamma_b + 1) * times**gamma_b / step_b ** (gamma_b + 1), 0)
        assert inner_product(step_a, gamma_a, step_b, gamma_b) == pytest.approx((a * b).sum() / 1000, rel=1e-4)


def test_an_average_is_that_of_its_definition():
    path, averages = walk("random walk"), PowerAverages([torch.zeros(6, dtype=torch.float64)], (0.05, 0.2))
    for step, weights in enumerate(path, start=1):
        averages.step([weights], step)
    for length, values in averages.values.items():
        wanted = torch.from_numpy(profile(length, STEPS)) @ path
        assert torch.allclose(values[0], wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["polynomial", "random walk"])
def test_other_lengths_come_from_the_copies(kind, tmp_path):
    path = walk(kind)
    keep(tmp_path, path)
    kept = [snapshot.step for snapshot in snapshots.list_snapshots(tmp_path)]
    assert kept == [*range(64, STEPS, 64), STEPS] and len(kept) <= snapshots.MOST + 1
    spread = float(path.std(0).max())
    for length in (0.05, 0.1, 0.15, 0.2):
        wanted = torch.from_numpy(profile(length, STEPS)) @ path
        made = snapshots.average(tmp_path, length, {"w": torch.zeros(6)})["w"].double()
        # What few copies cost, beside the rounding of float16.
        tolerance = 3e-3 if kind == "polynomial" else 1e-2
        assert float((made - wanted).abs().max()) < tolerance * spread, length
        last = path[-1] - wanted
        assert float((made - wanted).abs().max()) < 0.05 * float(last.abs().max())  # and far from the last weights


def test_an_average_may_end_early(tmp_path):
    path = walk("polynomial")
    keep(tmp_path, path)
    wanted = torch.from_numpy(profile(0.1, STEPS, at=256)) @ path
    made = snapshots.average(tmp_path, 0.1, {"w": torch.zeros(6)}, step=256)["w"].double()
    assert torch.allclose(made, wanted, atol=2e-3)
    with pytest.raises(ValueError, match=r"step=63: expected one from 64 up"):
        snapshots.average(tmp_path, 0.1, {"w": torch.zeros(6)}, step=63)


def test_what_does_not_change_is_kept():
    for steps in ((64, 128), range(1, 9), range(1, 17)):
        for length in (0.02, 0.1, 0.28):
            copies = [(step, kept) for step in steps for kept in LENGTHS]
            assert coefficients(copies, length, max(steps)).sum() == pytest.approx(1, abs=1e-9)


def test_copies_are_few_and_small(tmp_path):
    value = torch.randn(50)
    for step in range(1, 2000):
        if snapshots.is_due(step):
            snapshots.write_snapshot(tmp_path, step, {0.05: {"w": value}, 0.15: {"w": 1e5 * value}})
            steps = [snapshot.step for snapshot in snapshots.list_snapshots(tmp_path)]
            assert steps == list(range(snapshots.spacing(step), step + 1, snapshots.spacing(step)))
            assert len(steps) <= snapshots.MOST
    tensors = load_file(snapshots.list_snapshots(tmp_path)[-1].path)
    assert tensors["0.05/w"].dtype == torch.float16 and tensors["0.15/w"].dtype == torch.float32
    assert torch.allclose(tensors["0.05/w"].float(), value, rtol=5e-4) and torch.equal(tensors["0.15/w"], 1e5 * value)


def test_bad_copies_are_one_line(tmp_path):
    network = {"w": torch.zeros(6)}
    with pytest.raises(ValueError, match=r"no copies of averages; expected a run with --keep_averages"):
        snapshots.average(tmp_path, 0.1, network)
    keep(tmp_path, walk("polynomial")[:40])
    for parameters, said in (
        ({"v": torch.zeros(6)}, r"lacks 0.05/v; expected \(6,\)"),
        ({"w": torch.zeros(5)}, r"has the shape \(6,\) for 0.05/w; expected \(5,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            snapshots.average(tmp_path, 0.05, parameters)
    path = snapshots.list_snapshots(tmp_path)[-1].path
    save_file({f"{length}/w": torch.full((6,), float("nan")) for length in LENGTHS}, path)
    with pytest.raises(ValueError, match="w is not finite"):
        snapshots.average(tmp_path, 0.1, network)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="expected copies of averages"):
        snapshots.average(tmp_path, 0.1, network)


# In a run.


def fit(flags: dict, method=METHOD) -> Path:
    run = prepare(method, PyramidalSettings(**flags))
    try:
        run.fit()
    finally:
        run.close()
    return Path(flags["output_dir"])


@pytest.fixture(scope="module")
def often():
    """Copies as often as a long run has them, in a short one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "FIRST", 1)
        patch.setattr(snapshots, "MOST", 4)
        yield


def test_a_run_keeps_averages_and_resumes_with_them(toy, often):
    straight = fit(toy(keep_averages=True))
    steps = [snapshot.step for snapshot in snapshots.list_snapshots(straight)]
    assert steps == [4, 8, 12]
    groups, _ = load_checkpoint(straight / "checkpoint-12")
    assert set(groups) == {"model", "optimizer", "ema", "average-0.05", "average-0.15"}

    flags = toy(keep_averages=True, checkpointing_steps=5)
    calls = iter(range(100))

    def loss(*arguments):
        if next(calls) == 6:  # in step 7; the checkpoint of step 5 is what a kill would leave
            signal.raise_signal(signal.SIGTERM)
        return METHOD.loss(*arguments)

    with pytest.raises(TrainingStopped):
        fit(flags, dataclasses.replace(METHOD, loss=loss))
    folder = Path(flags["output_dir"])
    assert [snapshot.step for snapshot in snapshots.list_snapshots(folder)] == [2, 4, 6]
    shutil.rmtree(folder / "checkpoint-7")
    (folder / "averages" / f".step-0000008.safetensors.writing-999999999-{MACHINE}-1").write_bytes(b"half")
    stale = folder / "averages" / "step-0000006.safetensors"
    stale.write_bytes(b"of a step that the run is to do again")
    fit(flags)
    for snapshot in snapshots.list_snapshots(straight):
        assert (folder / "averages" / snapshot.path.name).read_bytes() == snapshot.path.read_bytes()
    assert sorted(path.name for path in (folder / "averages").iterdir()) == [
        snapshot.path.name for snapshot in snapshots.list_snapshots(straight)
    ]
    mine, _ = load_checkpoint(folder / "checkpoint-12")
    for group, tensors in groups.items():
        assert all(torch.equal(value, mine[group][name]) for name, value in tensors.items()), group


def test_the_averages_are_those_of_the_weights(toy, often, monkeypatch):
    run = prepare(METHOD, PyramidalSettings(**toy(keep_averages=True)))
    seen, step = [], run.optimise

    def watched():
        launched = step()
        seen.append([value.detach().clone() for value in run.learner.parameters])
        return launched

    run.optimise = watched
    run.fit()
    run.close()
    weights = profile(0.1, 12)
    names = dict(run.learner.network.named_parameters())
    made = snapshots.average(run.folder.path, 0.1, names)
    for index, (name, value) in enumerate(made.items()):
        wanted = sum(weight * step[index] for weight, step in zip(weights.tolist(), seen, strict=True))
        assert torch.allclose(value, wanted, atol=2e-3 * float(wanted.abs().max()) + 1e-4), name


def test_a_run_that_began_without_goes_on_without(toy, capsys):
    flags = toy(max_train_steps=4)
    fit(flags)
    folder = fit({**flags, "keep_averages": True, "max_train_steps": 6})
    assert "was trained without; the run goes on without" in capsys.readouterr().out
    assert not snapshots.list_snapshots(folder)
    assert json.loads((folder / "settings.json").read_text())["keep_averages"]
