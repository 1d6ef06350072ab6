"""Checkpoints whose hashes fit and whose content does not: each is refused in one line, before a run uses it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from pyrdiff.training.loop import Run, prepare
from pyrdiff.training.settings import TrainingDiverged

STEP = 3
WEIGHT, FIRST, SQUARES = "conv_in.weight", "0.exp_avg", "0.exp_avg_sq"
HUGE = 10**12


def state(**changes) -> Callable[[dict, dict], None]:
    return lambda tensors, state: state.update(changes)


def without(key: str) -> Callable[[dict, dict], None]:
    return lambda tensors, state: state.pop(key)


def tensor(group: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
    return lambda tensors, state: tensors[group].update({name: change(tensors[group][name])})


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(found: torch.Tensor) -> torch.Tensor:
        found = found.clone()
        found.view(-1)[0] = value
        return found

    return change


def every_step(value: float) -> Callable[[dict, dict], None]:
    def change(tensors: dict, state: dict) -> None:
        state["step"] = state["total_steps"] = int(value)
        for name in tensors["optimizer"]:
            if name.endswith(".step"):
                tensors["optimizer"][name] = torch.tensor(value)

    return change


def longer(found: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1000, *found.shape)


# What is changed, by the file and the key that the message has to name.
POISONS: dict[str, tuple[Callable[[dict, dict], None], str, str]] = {
    "step far ahead": (state(step=HUGE), "state.json", "step"),
    "steps far ahead": (every_step(HUGE), "state.json", "step"),
    "step below zero": (state(step=-1), "state.json", "step"),
    "step of text": (state(step="3"), "state.json", "step"),
    "no step": (without("step"), "state.json", "step"),
    "fewer steps than done": (state(total_steps=1), "state.json", "total_steps"),
    "time of text": (state(seconds="a while"), "state.json", "seconds"),
    "time below zero": (state(step_seconds=-1), "state.json", "step_seconds"),
    "time without end": (state(seconds=10**400), "state.json", "401 digits"),
    "no time": (without("seconds"), "state.json", "seconds"),
    "identity as a list": (state(identity=["pddpm"]), "state.json", "identity"),
    "average's steps": (state(ema={"optimization_step": HUGE}), "state.json", "ema"),
    "no state of the average": (without("ema"), "state.json", "ema"),
    "average's state as a list": (state(ema=[1]), "state.json", "ema"),
    "scaler of zero": (state(scaler={"scale": 0.0}), "state.json", "scaler"),
    "scaler of text": (state(scaler={"scale": "much"}), "state.json", "scaler"),
    "weights of another shape": (tensor("model", WEIGHT, longer), "model.safetensors", WEIGHT),
    "weights that are whole": (tensor("model", WEIGHT, torch.Tensor.int), "model.safetensors", WEIGHT),
    "weights that are nan": (tensor("model", WEIGHT, set_first(float("nan"))), "model.safetensors", WEIGHT),
    "weights that diverged": (tensor("model", WEIGHT, set_first(1e37)), "model.safetensors", WEIGHT),
    "a weight less": (lambda tensors, state: tensors["model"].pop(WEIGHT), "model.safetensors", WEIGHT),
    "a weight more": (lambda tensors, state: tensors["model"].update(evil=torch.ones(1)), "model.safetensors", "evil"),
    "average of another shape": (tensor("ema", WEIGHT, longer), "ema.safetensors", WEIGHT),
    "average that is inf": (tensor("ema", WEIGHT, set_first(float("inf"))), "ema.safetensors", WEIGHT),
    "an average less": (lambda tensors, state: tensors["ema"].pop(WEIGHT), "ema.safetensors", WEIGHT),
    "moments of another shape": (tensor("optimizer", FIRST, longer), "optimizer.safetensors", FIRST),
    "moments that are shorter": (tensor("optimizer", FIRST, lambda found: found[:1]), "optimizer.safetensors", FIRST),
    "moments that are nan": (tensor("optimizer", FIRST, set_first(float("nan"))), "optimizer.safetensors", FIRST),
    "moments that are whole": (tensor("optimizer", FIRST, torch.Tensor.long), "optimizer.safetensors", FIRST),
    "squares below zero": (tensor("optimizer", SQUARES, set_first(-1.0)), "optimizer.safetensors", SQUARES),
    "optimiser's step": (tensor("optimizer", "0.step", lambda found: found + HUGE), "optimizer.safetensors", "0.step"),
    "optimiser's step as a vector": (tensor("optimizer", "0.step", longer), "optimizer.safetensors", "0.step"),
    "a moment less": (lambda tensors, state: tensors["optimizer"].pop(FIRST), "optimizer.safetensors", FIRST),
    "moments of no weight": (
        lambda tensors, state: tensors["optimizer"].update({"99999.exp_avg": torch.ones(1)}),
        "optimizer.safetensors",
        "99999.exp_avg",
    ),
    "a moment without number": (
        lambda tensors, state: tensors["optimizer"].update(exp_avg=torch.ones(1)),
        "optimizer.safetensors",
        "exp_avg",
    ),
    "no optimiser": (lambda tensors, state: tensors.pop("optimizer"), "checkpoint-", "optimizer"),
    "another group": (lambda tensors, state: tensors.update(evil={"a": torch.ones(1)}), "checkpoint-", "evil"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(toy) -> tuple[dict, Path]:
    """Flags of a toy run, and its checkpoint."""
    flags = toy(max_train_steps=STEP)
    prepare(METHOD, PyramidalSettings(**flags)).fit()
    return flags, Path(flags["output_dir"]) / f"checkpoint-{STEP}"


def poisoned(sound: tuple[dict, Path], folder: Path, change: Callable[[dict, dict], None]) -> dict:
    """Flags of a run whose only checkpoint is a changed one, with hashes that fit."""
    flags, original = sound
    shutil.copytree(original.parent, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors, values = load_checkpoint(original)
    change(tensors, values)
    step = values.get("step")
    save_checkpoint(folder, step if type(step) is int and step >= 0 else STEP, tensors, values)
    return {**flags, "output_dir": str(folder), "max_train_steps": STEP + 1}


@pytest.fixture(scope="module")
def run(sound) -> Run:
    """A run of the same flags that has not begun, to resume with."""
    flags, original = sound
    flags = {**flags, "output_dir": f"{original.parent}-again", "max_train_steps": STEP + 1}
    return prepare(METHOD, PyramidalSettings(**flags))


def resumed(run: Run, folder: Path) -> Run:
    """The run as it resumes from a folder: what `prepare` does last."""
    run.folder.path = folder
    run._resume()
    return run


@pytest.mark.parametrize("kind", POISONS)
def test_poisoned_checkpoints_are_refused(sound, run, tmp_path, kind):
    change, file, key = POISONS[kind]
    poisoned(sound, tmp_path / "run", change)
    (path,) = list_checkpoints(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        resumed(run, tmp_path / "run")
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000 and run.step == 0
    assert str(path.parent) in text and file in text and key in text, text


def test_the_unchanged_one_is_taken(sound, tmp_path):
    """As the others are made, but for the change."""
    flags = poisoned(sound, tmp_path / "run", lambda tensors, state: None)
    run = prepare(METHOD, PyramidalSettings(**flags))
    assert run.step == STEP
    run.fit()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [
        f"checkpoint-{STEP}",
        f"checkpoint-{STEP + 1}",
    ]


@pytest.mark.parametrize("content", [b"[]", b"null", b"5", b"[" * 3000, b"{" + b'"a":' * 200 + b"1"])
def test_a_state_that_is_no_object(sound, run, tmp_path, content, monkeypatch):
    from pyrdiff.training import checkpoints

    monkeypatch.setattr(checkpoints, "_state_bytes", lambda state: content)
    poisoned(sound, tmp_path / "run", lambda tensors, state: None)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"checkpoint-{STEP}/state.json") as caught:
        resumed(run, tmp_path / "run")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e37])
def test_a_run_that_diverged_saves_nothing(sound, tmp_path, value):
    """The loss may still be a number when the weights are none."""
    flags = poisoned(sound, tmp_path / "run", lambda tensors, state: None)
    run = prepare(METHOD, PyramidalSettings(**flags))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    for weights in (run.learner.ema.shadow_params[0], run.learner.parameters[0]):
        kept = weights.data.clone()
        weights.data.view(-1)[0] = value
        with pytest.raises(TrainingDiverged, match=f"{WEIGHT}.* at step {STEP}.*learning_rate"):
            run._save()
        weights.data.copy_(kept)
    run.learner.parameters[0].data.view(-1)[0] = value
    with pytest.raises(ValueError, match=f"unet: {WEIGHT} has values that are not finite"):
        run.pipeline.save_pretrained(tmp_path / "export")
    with pytest.raises(ValueError, match=f"finished: {WEIGHT} has values that are not finite"):
        run.folder.keep_finished(run.learner.network)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert not (tmp_path / "export").exists()
