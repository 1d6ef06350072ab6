"""How trainings begin and end beside other things: their own pictures, other trainings, removed folders, signals."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from PIL import Image

from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.training.checkpoints import list_checkpoints, load_checkpoint
from pyrdiff.training.lock import FolderLock
from pyrdiff.training.loop import prepare, train
from pyrdiff.training.settings import TrainingDiverged

COMMAND = "from pyrdiff.cli import main; main()"


def pictures(folder: Path, count: int = 12) -> Path:
    """A folder of images of 16×16 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def words(flags: dict) -> list[str]:
    """The flags on the command line."""
    words = ["train", "pddpm"]
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def before_step(step: int, act: Callable[[], None]):
    """The method; `act` is called before step `step`, from 1."""
    calls = iter(range(1, 10**6))

    def loss(*arguments):
        if next(calls) == step:
            act()
        return METHOD.loss(*arguments)

    return dataclasses.replace(METHOD, loss=loss)


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


# Their own pictures, and folders of others.


def test_a_training_does_not_train_on_its_own_pictures(toy, tmp_path, capsys):
    folder = pictures(tmp_path / "data")
    changes = dict(train_data_dir=str(folder), output_dir=str(folder / "run"), save_images_steps=1, eval_batch_size=1)
    train(METHOD, PyramidalSettings(**toy(**changes, max_train_steps=2)))
    assert len(list((folder / "run" / "samples").glob("*.png"))) == 2
    (folder / "photo.heix").touch()
    capsys.readouterr()
    run = prepare(METHOD, PyramidalSettings(**toy(**changes, max_train_steps=2)))
    run.close()
    assert len(run.images) == 12 and run.step == 2, "the same images, so that it resumes"
    line = f"{folder}: 12 images taken (12 .png); not taken: "
    (said,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith(line)]
    assert "1 .heix" in said and "2 that runs of pyrdiff wrote" in said


def test_settings_of_another_program_do_not_make_a_folder_ours(toy, tmp_path):
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 12}')
    with pytest.raises(ValueError, match="expected a new, an empty or an earlier run's folder"):
        prepare(METHOD, PyramidalSettings(**toy(output_dir=str(tmp_path))))
    assert names(tmp_path) == ["settings.json"] and "fontSize" in (tmp_path / "settings.json").read_text()


# Two at once.


def test_a_folder_takes_one_training_at_a_time(toy, tmp_path):
    flags = toy(max_train_steps=100_000, checkpointing_steps=1)
    folder = Path(flags["output_dir"])
    with (tmp_path / "said").open("wb") as said:
        process = warm.start(COMMAND, *words(flags), stdout=said, stderr=said)
    try:
        while not list_checkpoints(folder):
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.02)
        with pytest.raises(ValueError, match=f"^output_dir='{folder}': process {process.pid} of .* trains there"):
            prepare(METHOD, PyramidalSettings(**flags))
        process.kill()
        process.wait()
        assert FolderLock.FILES[0] in names(folder), "as kill -9 leaves it"
        run = prepare(METHOD, PyramidalSettings(**flags))
        assert run.step >= 1
        run.close()
    finally:
        process.kill()
    assert not set(FolderLock.FILES) & set(names(folder))


def test_a_run_that_is_refused_leaves_no_folder(toy, tmp_path):
    flags = toy(output_dir=str(tmp_path / "runs" / "new"), train_data_dir=str(tmp_path / "nowhere.npy"))
    with pytest.raises(ValueError, match="nowhere"):
        prepare(METHOD, PyramidalSettings(**flags))
    assert names(tmp_path) == []


# Removed while training.


@pytest.mark.parametrize("instead", ["nothing", "another folder"])
def test_a_folder_that_is_removed_ends_the_run_and_stays_removed(toy, instead):
    flags = toy()
    folder = Path(flags["output_dir"])

    def remove():
        shutil.rmtree(folder)
        if instead == "another folder":
            folder.mkdir()

    run = prepare(before_step(5, remove), PyramidalSettings(**flags))
    with pytest.raises(FileNotFoundError, match="output_dir=.*was removed or replaced") as caught:
        run.fit()
    assert str(folder) in str(caught.value) and run.step == 5
    assert names(folder) == [] if instead == "another folder" else not folder.exists()


# What is logged.


def test_a_step_is_logged_once_however_often_it_was_done(toy):
    flags = toy(checkpointing_steps=3)
    folder = Path(flags["output_dir"])

    def fail():
        raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        prepare(before_step(9, fail), PyramidalSettings(**flags)).fit()
    assert logged(folder) == list(range(1, 9)) and list_checkpoints(folder)[-1].name == "checkpoint-6"
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 2')  # cut off
    run = prepare(METHOD, PyramidalSettings(**flags))
    run.folder.open(run.step)
    assert logged(folder) == list(range(1, 7))
    run.fit()
    run.close()
    assert logged(folder) == list(range(1, 13))


# Signals outside the loop.

TERMINATED = """
import signal, sys
from pyrdiff import cli
from pyrdiff.data import levels
from pyrdiff.hub import folders
from pyrdiff.training import previews

def ending(module, name):
    function = getattr(module, name)
    def call(*arguments, **options):
        result = function(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)
        return result
    setattr(module, name, call)

place = sys.argv.pop(1)
if place == "caching":
    ending(levels, "fit_image")
elif place == "preview":
    ending(previews, "image_grid")
else:
    ending(folders, "write_licence")
cli.main()
"""


@pytest.mark.parametrize("place", ["caching", "preview", "export"])
def test_sigterm_outside_the_loop_leaves_nothing_half_written(toy, tmp_path, place):
    changes = dict(max_train_steps=1, save_images_steps=100 if place == "preview" else 0, eval_batch_size=1)
    flags = toy(**changes, cache_dir=str(tmp_path / "cache"))
    folder = Path(flags["output_dir"])
    done = warm.run(TERMINATED, place, *words(flags))
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    assert hidden(tmp_path) == [] and (not folder.exists() or hidden(folder) == [])
    if place == "caching":
        assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not folder.exists()
    else:
        assert not (folder / "pipeline").exists() and list_checkpoints(folder)


# Disks that refuse.

LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from pyrdiff.cli import main
main()
"""


@pytest.mark.parametrize("limit, file", [(1000, "settings.json"), (2000, "16x16.npy"), (100_000, "checkpoint-1")])
def test_a_disk_that_refuses_is_one_line_with_path_and_bytes(toy, tmp_path, limit, file):
    cache = dict(cache_dir=str(tmp_path / "cache")) if file == "16x16.npy" else {}
    flags = toy(**cache, max_train_steps=1)
    done = warm.run(LIMITED, limit, *words(flags))
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "File too large" in line and f"/{file}" in line and " bytes" in line, line
    folder = Path(flags["output_dir"])
    assert hidden(tmp_path) == [] and (not folder.exists() or hidden(folder) == [])


# The environment of accelerate.


def test_the_flag_counts_more_than_the_environment(toy, monkeypatch):
    folders = []
    for steps in (None, "4"):
        if steps:
            monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        run = prepare(METHOD, PyramidalSettings(**toy(max_train_steps=3)))
        run.fit()
        run.close()
        folders.append(run.folder.path)
    one, other = (load_checkpoint(folder / "checkpoint-3")[0]["model"] for folder in folders)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_what_accelerate_config_may_say_and_is_not_supported_is_refused(toy, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    flags = toy()
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{name}=true: expected plain data parallelism"):
        prepare(METHOD, PyramidalSettings(**flags))
    assert not Path(flags["output_dir"]).exists()


# fp16.


def fp16_run(flags: dict, change: Callable[[int, torch.Tensor], torch.Tensor]):
    """A run with torch's scaler of fp16, which is there on the CPU, too. `change` gets each loss with its number."""
    calls = iter(range(1, 10**6))

    def loss(*arguments):
        return change(next(calls), METHOD.loss(*arguments))

    run = prepare(dataclasses.replace(METHOD, loss=loss), PyramidalSettings(**flags))
    scaler = run.accelerator.scaler = torch.amp.GradScaler("cpu")
    run.learner.prepare()
    return run, scaler


class Infinite(torch.autograd.Function):
    """The loss; its gradient is infinite."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def test_fp16_that_skips_every_step_stops(toy):
    flags = toy(max_train_steps=100, logging_steps=100)
    run, scaler = fp16_run(flags, lambda number, loss: Infinite.apply(loss))
    with pytest.raises(TrainingDiverged, match="at step 30 .the 30th step in a row that fp16 skipped.*bf16"):
        run.fit()
    assert scaler.get_scale() == 2.0 ** (16 - 30)
    assert (run.folder.path / "failure-30.json").is_file()


def test_fp16_that_skips_now_and_then_goes_on(toy):
    flags = toy(max_train_steps=45, logging_steps=100)
    run, _ = fp16_run(flags, lambda number, loss: loss if number == 29 else Infinite.apply(loss))
    run.fit()
    run.close()
    assert run.step == 45
