"""The training loop at toy size: stops, kills, damage, divergence, processes, budgets (R1-R3, R5, R10, R11)."""

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm

import pyrdiff
from pyrdiff.data import ImageLevels, MultiScaleBatches
from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.training.checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    verify_checkpoint,
)
from pyrdiff.training.loop import prepare, train
from pyrdiff.training.settings import TrainingDiverged, TrainingStopped

SCRIPT = Path(__file__).parents[2] / "examples" / "train_pddpm.py"


def fit_toy(flags: dict, method=METHOD) -> Path:
    """Trains, without an export, and returns the run's folder."""
    run = prepare(method, PyramidalSettings(**flags))
    run.fit()
    run.close()
    return Path(flags["output_dir"])


def train_toy(flags: dict) -> Path:
    """Trains, exports, and returns the run's folder."""
    folder = Path(flags["output_dir"])
    assert train(METHOD, PyramidalSettings(**flags)) == folder / "pipeline"
    return folder


def with_loss(change: Callable):
    """The method with change(number of the call, loss, network) in place of its loss, unless that is None."""
    calls = iter(range(10**6))

    def loss(network, scheduler, settings, batch, draws):
        value = METHOD.loss(network, scheduler, settings, batch, draws)
        changed = change(next(calls), value, network)
        return value if changed is None else changed

    return dataclasses.replace(METHOD, loss=loss)


def train_until_stopped(flags: dict, step: int, number: int = signal.SIGTERM) -> Path:
    """Trains; a signal comes while the first batch of step `step` (from 1) is under way. Returns the run's folder."""
    folder = Path(flags["output_dir"])
    newest = newest_checkpoint(folder)
    done = 0 if newest is None else load_checkpoint(newest)[1]["step"]
    wanted = (step - 1 - done) * flags.get("gradient_accumulation_steps", 1)
    with pytest.raises(TrainingStopped) as caught:
        fit_toy(flags, with_loss(lambda call, *_: signal.raise_signal(number) if call == wanted else None))
    assert caught.value.exit_code == 128 + number
    assert list_checkpoints(folder)[-1].name == f"checkpoint-{step}"
    return folder


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    groups, state = load_checkpoint(folder / f"checkpoint-{step}")
    assert state["step"] == step
    return {f"{group}/{name}": value for group, entries in groups.items() for name, value in entries.items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and len(left) > 100
    for name, value in left.items():
        assert value.dtype == right[name].dtype and value.shape == right[name].shape, name
        assert torch.equal(value.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)), name


def log_of(folder: Path) -> dict[int, tuple]:
    """Loss, learning rate and resolution by step; a step that was done twice must have been the same."""
    steps = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        values = json.loads(line)
        result = (values["loss"], values["learning_rate"], values["resolution"])
        assert steps.setdefault(values["step"], result) == result
    return steps


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def words(flags: dict) -> list[str]:
    """The flags on the command line."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture(scope="module")
def straight(toy) -> Path:
    """The folder of a run of the toy flags that nothing interrupted."""
    return train_toy(toy())


# Stops and resumes.

VARIANTS = {
    "accumulation": dict(gradient_accumulation_steps=2, random_flip=True, max_train_steps=20),
    "patches": dict(patch_size=8, random_flip=True, prediction_type="v_prediction", snr_gamma=5.0, max_train_steps=14),
    "channels last": dict(channels_last=True),
    "no average": dict(use_ema=False, resolution=["8", "12x16"], gradient_accumulation_steps=3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(toy, variant):
    flags = toy(**VARIANTS[variant])
    last = flags["max_train_steps"]
    train_until_stopped(flags, 5)
    train_until_stopped(flags, 10, signal.SIGINT)
    resumed, whole = fit_toy(flags), fit_toy(toy(**VARIANTS[variant]))

    assert_same_bits(tensors_of(resumed, last), tensors_of(whole, last))
    assert log_of(resumed) == log_of(whole)
    assert sorted(log_of(resumed)) == list(range(1, last + 1))
    averages = [load_checkpoint(folder / f"checkpoint-{last}")[1].get("ema") for folder in (resumed, whole)]
    assert averages[0] == averages[1] and bool(averages[0]) == flags.get("use_ema", True)


def test_the_learning_rate_is_a_cosine_over_optimiser_steps(toy):
    rates = [rate for _, rate, _ in log_of(fit_toy(toy(gradient_accumulation_steps=2))).values()]
    warming = [1e-3 * step / 4 for step in range(4)]
    falling = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    np.testing.assert_allclose(rates, warming + falling, rtol=1e-9)


def test_the_same_command_after_the_end_only_exports_again(toy):
    flags = toy(max_train_steps=2)
    folder = train_toy(flags)
    before = contents(folder)
    for path in (folder / "pipeline").rglob("*.safetensors"):
        path.unlink()
    train_toy(flags)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(toy, straight, capsys, name):
    flags = toy(checkpointing_steps=3)
    folder = train_until_stopped(flags, 8)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-6", "checkpoint-8"]
    flip_a_byte(folder / "checkpoint-8" / name)
    capsys.readouterr()
    fit_toy(flags)
    output = capsys.readouterr().out
    assert f"passing over {folder / 'checkpoint-8'}: {folder / 'checkpoint-8' / name}" in output
    assert f"resuming from {folder / 'checkpoint-6'}" in output
    assert_same_bits(tensors_of(folder, 12), tensors_of(straight, 12))
    assert log_of(folder) == log_of(straight)


def test_resuming_from_a_named_checkpoint_into_a_new_folder(toy, straight):
    folder = train_until_stopped(toy(), 5)
    flags = toy(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert_same_bits(tensors_of(fit_toy(flags), 12), tensors_of(straight, 12))
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-5"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_script_saves_the_step_it_was_at(toy, tmp_path, number, code):
    flags = toy(max_train_steps=100_000, checkpointing_steps=100_000)
    folder = Path(flags["output_dir"])
    with (tmp_path / "said").open("wb") as said:
        process = warm.start(SCRIPT, *words(flags), stderr=said)
    try:
        while not (folder / "log.jsonl").is_file() or len(log_of(folder)) < 2:
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.02)
        process.send_signal(number)
        done = max(log_of(folder))
        process.wait()
    finally:
        process.kill()
    said = (tmp_path / "said").read_text()
    assert process.returncode == code and "Traceback" not in said, said
    assert "the same command resumes" in said
    (checkpoint,) = list_checkpoints(folder)
    step = verify_checkpoint(checkpoint)["step"]
    assert step == max(log_of(folder)) and done <= step <= done + 3
    assert not (folder / "pipeline").exists()


# Kills.

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.training import checkpoints
from pyrdiff.training.loop import prepare

torch.set_num_threads(1)
settings, errors, rounds = PyramidalSettings(**json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3])
folder = Path(settings.output_dir)
chance = random.Random(0)
DISK_CALLS = 9  # of a save before its rename: four files, each written and synced, and the folder synced


def die_in_second_save(call):
    # As the process of kill -9: at this write or sync, of all that come after the first save.
    left = [DISK_CALLS + 1 + call]
    def dying(function):
        def counted(*arguments):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments)
        return counted
    checkpoints._write, os.fsync = dying(checkpoints._write), dying(os.fsync)

def train_and_tell(pipe, call):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    save = checkpoints.save_checkpoint
    def save_and_tell(folder, step, *content):
        os.write(pipe, f"begun {step}\\n".encode())
        path = save(folder, step, *content)
        os.write(pipe, f"done {step}\\n".encode())
        return path
    checkpoints.save_checkpoint = save_and_tell
    if call is not None:
        die_in_second_save(call)
    prepare(METHOD, settings).fit()

reports, before = [], 0
for moment in ["starting", "saving", "anywhere", "saving"] * rounds:
    reader, writer = os.pipe()
    call = chance.randrange(DISK_CALLS) if moment == "saving" else None
    pid = os.fork()
    if pid == 0:
        try:
            train_and_tell(writer, call)
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(1)
    os.close(writer)
    events, reached = open(reader), dict(begun=0, done=0)
    if moment == "starting":
        time.sleep(chance.uniform(0, 0.4))
    elif moment == "anywhere":
        for _ in range(2):
            word, step = events.readline().split()
            reached[word] = int(step)
        time.sleep(chance.uniform(0, 0.1))
    if moment != "saving":
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    for line in events:
        word, step = line.split()
        reached[word] = int(step)
    events.close()
    damaged, newest = [], checkpoints.newest_checkpoint(folder, lambda *said: damaged.append(str(said)))
    step = 0 if newest is None else checkpoints.load_checkpoint(newest)[1]["step"]
    strays = [path.name for path in folder.glob(".checkpoint-*")] if folder.exists() else []
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    found = dict(step=step, damaged=damaged, strays=strays)
    reports.append(dict(moment=moment, killed=killed, before=before, **found, **reached))
    before = step
print(json.dumps(reports))
sys.stdout.flush()
os.dup2(2, 1)
prepare(METHOD, settings).fit()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_kills_lose_no_checkpoint_and_change_no_bit(toy, tmp_path, runslow):
    rounds = 5 if runslow else 2
    flags = toy(max_train_steps=12 * rounds, checkpointing_steps=1)
    result = warm.run(KILLS, json.dumps(flags), tmp_path / "errors", rounds)
    assert result.returncode == 0, result.stderr[-3000:]
    reports = json.loads(result.stdout.splitlines()[0])
    assert len(reports) == 4 * rounds
    for report in reports:
        assert report["killed"] and report["damaged"] == [], report
        assert max(report["before"], report["done"]) <= report["step"] <= max(report["before"], report["begun"]), report
        writing = [name for name in report["strays"] if ".writing-" in name]
        if report["moment"] == "saving":
            assert len(writing) == 1 and report["step"] == report["before"] + 1, report
        else:
            assert len(report["strays"]) <= 1, report

    killed, whole = Path(flags["output_dir"]), fit_toy(toy(max_train_steps=12 * rounds))
    assert_same_bits(tensors_of(killed, 12 * rounds), tensors_of(whole, 12 * rounds))
    assert log_of(killed) == log_of(whole)
    assert not list(killed.glob(".*"))


# Divergence.


@pytest.mark.parametrize("what", ["nan loss", "infinite loss", "infinite gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_is_written_down(toy, straight, what):
    def spoil(call, loss, network):
        if call == 7 and what == "infinite gradient":
            parameter = next(network.parameters())
            parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        elif call == 7:
            return loss * (math.nan if what == "nan loss" else math.inf)

    flags = toy(checkpointing_steps=1)
    folder = Path(flags["output_dir"])
    with pytest.raises(TrainingDiverged, match="at step 8.*failure-8.json"):
        fit_toy(flags, with_loss(spoil))

    (failure,) = folder.glob("failure-*.json")
    assert failure.name == "failure-8.json"
    report = json.loads(failure.read_text())
    images = ImageLevels.build(flags["train_data_dir"], [8, 16])
    batch = MultiScaleBatches(images, 4, seed=5).draw(7)
    assert report["step"] == 8 and report["seed"] == 5
    assert report["images"] == [images.names[index] for index in batch.indices]
    assert report["resolution"] == list(images.sizes[batch.level])
    assert math.isfinite(float(report["loss"])) == (what == "infinite gradient")
    assert not math.isfinite(float(report["gradient_norm"]))

    assert newest_checkpoint(folder) == list_checkpoints(folder)[-1] == folder / "checkpoint-7"
    assert all(value.isfinite().all() for value in tensors_of(folder, 7).values())
    assert max(log_of(folder)) == 7
    if what == "nan loss":
        assert_same_bits(tensors_of(fit_toy(flags), 12), tensors_of(straight, 12))


def test_one_bad_batch_of_an_accumulated_step_is_enough(toy):
    flags = toy(gradient_accumulation_steps=3, random_flip=True)
    with pytest.raises(TrainingDiverged, match="at step 2"):
        fit_toy(flags, with_loss(lambda call, loss, _: loss * math.nan if call == 4 else None))
    report = json.loads((Path(flags["output_dir"]) / "failure-2.json").read_text())
    images = ImageLevels.build(flags["train_data_dir"], [8, 16])
    batches = MultiScaleBatches(images, 4, random_flip=True, seed=5, accumulation=3)
    expected = [images.names[index] for micro in range(3) for index in batches.draw(1, micro).indices]
    assert report["images"] == expected
    assert list_checkpoints(Path(flags["output_dir"])) == []


# Steps that are checked while the next one is running, as on a GPU.


def fit_late(flags: dict, method=METHOD) -> Path:
    run = prepare(method, PyramidalSettings(**flags))
    run.checks_late = True
    run.fit()
    run.close()
    return Path(flags["output_dir"])


def test_a_step_that_is_checked_late_stops_the_run_before_it_is_saved(toy):
    flags = toy(logging_steps=100, checkpointing_steps=100)
    with pytest.raises(TrainingDiverged, match="at step 8.*failure-8.json"):
        fit_late(flags, with_loss(lambda call, loss, _: loss * math.nan if call == 7 else None))
    assert list_checkpoints(Path(flags["output_dir"])) == []


def test_the_step_after_a_signal_that_is_read_late_is_checked_before_it_is_saved(toy):
    def signal_then_nan(call, loss, network):
        if call == 4:
            signal.raise_signal(signal.SIGTERM)
        return loss * math.nan if call == 5 else None

    flags = toy(logging_steps=100)
    with pytest.raises(TrainingDiverged, match="at step 6"):
        fit_late(flags, with_loss(signal_then_nan))
    assert list_checkpoints(Path(flags["output_dir"])) == []


def test_a_signal_that_is_read_late_costs_no_bit(toy, straight):
    flags = toy(logging_steps=100)
    folder = Path(flags["output_dir"])
    with pytest.raises(TrainingStopped, match="after step 6"):  # it came in step 5
        fit_late(flags, with_loss(lambda call, *_: signal.raise_signal(signal.SIGTERM) if call == 4 else None))
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-6"]
    assert_same_bits(tensors_of(fit_late(flags), 12), tensors_of(straight, 12))


# Several processes.


@pytest.fixture(scope="module")
def processes(toy, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """1 process with a batch of 8; 2 processes with batches of 4 and a sample grid, and what each of them printed."""
    changes = dict(gradient_accumulation_steps=2, random_flip=True)
    flags = toy(**changes, train_batch_size=4, save_images_steps=12, eval_batch_size=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched, places = [], [tmp_path_factory.mktemp("process") / "said" for _ in range(2)]
    for rank, place in enumerate(places):  # as torchrun starts them
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        of_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in of_rank.items()}}
        with place.open("wb") as said:
            launched.append(warm.start(SCRIPT, *words(flags), env=environment, stdout=said, stderr=said))
    codes = [process.wait() for process in launched]
    said = [place.read_text() for place in places]
    assert codes == [0, 0], said
    return fit_toy(toy(**changes, train_batch_size=8)), Path(flags["output_dir"]), said


def test_two_processes_train_like_one_with_twice_the_batch(processes):
    one, two, said = processes
    assert "of 2 processes" in said[0] and said[1].count("\n") < 5
    expected, found = log_of(one), log_of(two)
    assert list(found) == list(expected) == list(range(1, 13))
    for step, (loss, rate, resolution) in expected.items():
        assert found[step][1:] == (rate, resolution)
        assert found[step][0] == pytest.approx(loss, rel=1e-5), step

    one, two = tensors_of(one, 12), tensors_of(two, 12)
    assert one.keys() == two.keys()
    # A few biases have no effect, as a norm of their channel alone follows: their gradient is rounding error, and Adam
    # scales it up.
    names = [name for name in one if name.startswith(("model/", "ema/"))]
    difference = torch.cat([(one[name] - two[name]).abs().flatten() for name in names])
    assert difference.quantile(0.99) < 1e-3 * 1e-3, "more than a thousandth of the learning rate"


def test_two_processes_export_the_pipeline(processes):
    _, two, _ = processes
    assert (two / "samples" / "step-0000012.png").is_file()
    assert pyrdiff.load(two / "pipeline") is not None


# What is refused.


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(block_out_channels=[16, 16, 32]), "network="),
        (dict(use_coordinates=False), "network="),
        (dict(prediction_type="sample"), "scheduler="),
        (dict(ddpm_num_steps=500), "scheduler="),
        (dict(train_batch_size=8), "batch="),
        (dict(gradient_accumulation_steps=2), "accumulation=1, this run has 2"),
        (dict(patch_size=16), "patch_size=null, this run has 16"),
        (dict(random_flip=True), "random_flip=false, this run has true"),
        (dict(seed=6), "seed=5, this run has 6"),
        (dict(image_channels=1), "network="),
        (dict(background=[0, 0, 256]), "background="),
        (dict(resume_from_checkpoint="none"), "output_dir="),
        (dict(resume_from_checkpoint="no/such/folder"), "resume_from_checkpoint='no/such/folder'"),
    ],
    ids=str,
)
def test_a_run_that_does_not_fit_its_folder_is_refused_and_writes_nothing(toy, straight, tmp_path, changes, named):
    folder = shutil.copytree(straight, tmp_path / "run")
    before = contents(folder)
    with pytest.raises(ValueError) as caught:
        fit_toy(toy(output_dir=str(folder), **changes))
    assert named in str(caught.value) and "expected" in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize("count", [24, 25])
def test_a_checkpoint_of_other_images_is_refused_and_their_numbers_are_said(toy, straight, tmp_path, count):
    np.save(tmp_path / "others.npy", np.zeros((count, 16, 16, 3), np.uint8))
    before = contents(straight)
    then = len(np.load(json.loads((straight / "settings.json").read_text())["train_data_dir"]))
    said = f"{then} then, {count} now" if count != then else "as many then as now, with other pixels"
    with pytest.raises(ValueError, match=f"checkpoint-12 is of other images.*{said}"):
        fit_toy(toy(output_dir=str(straight), train_data_dir=str(tmp_path / "others.npy")))
    assert contents(straight) == before


def test_a_checkpoint_without_average_is_refused_where_one_is_wanted(toy):
    flags = toy(use_ema=False, max_train_steps=1)
    folder = fit_toy(flags)
    before = contents(folder)
    with pytest.raises(ValueError, match="use_ema=True.*checkpoint-1.*expected use_ema=False"):
        fit_toy({**flags, "use_ema": True})
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["an empty folder", "a damaged checkpoint"])
def test_resuming_from_something_that_is_not_a_checkpoint(toy, straight, tmp_path, kind):
    path = tmp_path / "checkpoint-12"
    if kind == "an empty folder":
        path.mkdir()
    else:
        shutil.copytree(straight / "checkpoint-12", path)
        flip_a_byte(path / "ema.safetensors")
    flags = toy(resume_from_checkpoint=str(path))
    with pytest.raises(CheckpointError) as caught:
        fit_toy(flags)
    assert str(path / ("manifest.json" if kind == "an empty folder" else "ema.safetensors")) in str(caught.value)
    assert not Path(flags["output_dir"]).exists()


def test_a_folder_that_is_something_else_is_refused(toy, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_my_mother.txt").write_text("Dear")
    (tmp_path / "file").write_text("a file")
    before = contents(tmp_path)
    for path in (tmp_path / "letters", tmp_path / "file"):
        with pytest.raises(ValueError) as caught:
            fit_toy(toy(output_dir=str(path)))
        assert f"output_dir={str(path)!r}: expected" in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(resolution=["8", "18"]), "resolution 18x18"),
        (dict(patch_size=6), "6x6"),
        (dict(train_data_dir="./no/such/folder"), "./no/such/folder"),
        (dict(array_key="x"), "array_key"),
        pytest.param(
            dict(block_out_channels=[8, 8, 16]),
            "block_out_channels",
        ),
    ],
    ids=str,
)
def test_what_no_run_can_be_made_of_is_refused_and_writes_nothing(toy, changes, named):
    flags = toy(**changes)
    with pytest.raises(ValueError) as caught:
        fit_toy(flags)
    assert named in str(caught.value)
    assert not Path(flags["output_dir"]).exists()


# Budget, samples, export.


class Clock:
    """A clock that stands still but for the seconds that a step and a preview are said to take."""

    def __init__(self, step: float, preview: float = 0.0):
        self.now, self.method = 1000.0, METHOD

        def passing(function: Callable, seconds: float) -> Callable:
            def wrapped(*args):
                self.now += seconds
                return function(*args)

            return wrapped

        self.method = dataclasses.replace(
            METHOD, loss=passing(METHOD.loss, step), preview=passing(lambda *_: {}, preview)
        )

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("clock", "changes", "steps"),
    [
        (Clock(step=1), {}, 55),  # a minute, less the 5 seconds that are kept for the end
        (Clock(step=2), {}, 27),
        (Clock(step=1, preview=3), dict(save_images_steps=1000), 46),  # one early, to be timed, and one at the end
        (Clock(step=100), {}, 1),
    ],
    ids=["1 s a step", "2 s a step", "with previews", "no step fits"],
)
def test_a_budget_in_minutes_is_kept_and_used_up(toy, clock, changes, steps):
    flags = toy(minutes=1, lr_warmup_steps=10, checkpointing_steps=1000, **changes)
    del flags["max_train_steps"]
    folder = Path(flags["output_dir"])
    run = prepare(clock.method, PyramidalSettings(**flags), clock=clock)
    run.fit()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == steps and newest_checkpoint(folder) == folder / f"checkpoint-{steps}"
    if steps > 1:
        assert clock.now - 1000 <= 60 and lines[-1]["total_steps"] == steps
        rates = [line["learning_rate"] for line in lines]
        assert rates[-1] < 0.1 * max(rates) and max(rates) > 0.5e-3


def test_sample_grids_are_written_and_change_nothing(toy, straight):
    folder = train_toy(toy(save_images_steps=8, eval_batch_size=1))
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000008.png", "step-0000012.png"]
    assert_same_bits(tensors_of(folder, 12), tensors_of(straight, 12))


def test_a_short_noise_process_trains_with_sample_grids_or_is_refused_at_once(toy):
    flags = toy(ddpm_num_steps=20, save_images_steps=1, eval_batch_size=1, max_train_steps=1)
    try:
        fit_toy(flags)
    except ValueError:
        assert not Path(flags["output_dir"]).exists()


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_exported_pipeline_has_the_averaged_weights(toy, straight, use_ema):
    folder = straight if use_ema else train_toy(toy(use_ema=False))
    groups, _ = load_checkpoint(folder / "checkpoint-12")
    weights = pyrdiff.load(folder / "pipeline").unet.state_dict()
    expected = groups["ema" if use_ema else "model"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    if use_ema:
        assert not all(torch.equal(weights[name], value) for name, value in groups["model"].items())
