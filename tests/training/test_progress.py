"""What a person sees while a run trains: a bar on a terminal, lines elsewhere, notes, and what to type next."""

import io
import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from pyrdiff import cli
from pyrdiff.data import ImageLevels
from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.methods.sr import SuperResolutionSettings
from pyrdiff.training.loop import train
from pyrdiff.training.notes import FEW_IMAGES, notes_on_images, notes_on_length


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_are_lines_and_no_bar(toy, capsys):
    flags = toy(checkpointing_steps=6)
    target = train(METHOD, PyramidalSettings(**flags))
    printed, errors = capsys.readouterr()
    lines = printed.splitlines()
    assert "pddpm:" not in errors and len(lines) < 12, "no bar, and not the sixty settings"
    assert f"settings, log and checkpoints: {flags['output_dir']}" in lines
    assert json.loads((Path(flags["output_dir"]) / "settings.json").read_text())["learning_rate"] == 1e-3
    (end,) = [line for line in lines if "done about" in line]
    assert re.fullmatch(r"12 steps, \S+ s each: done about \d\d:\d\d, in \d+ (s|min)", end)
    saved = [line for line in lines if "checkpoint saved" in line]
    assert [line.partition(":")[0] for line in saved] == ["step 6 of 12", "step 12 of 12"]
    losses = [json.loads(line)["loss"] for line in (target.parent / "log.jsonl").read_text().splitlines()]
    shown = [float(line.split("loss ")[1].split(",")[0]) for line in saved]
    assert shown == [pytest.approx(np.mean(losses[:count]), abs=1e-4) for count in (6, 12)], "of few steps the mean"
    assert lines.index(end) < lines.index(saved[-1])
    assert "note: 24 images: trained on fewer than 50" in printed
    assert lines[-1] == f"next: pyrdiff sample {target} --plan fast -o samples"


def test_on_a_terminal_there_is_a_bar_with_loss_speed_and_time_left(toy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    train(METHOD, PyramidalSettings(**toy()))
    shown = sys.stderr.getvalue()
    assert "checkpoint saved" not in capsys.readouterr().out, "the bar shows it"
    last = [piece for piece in shown.split("\r") if piece.startswith("pddpm:")][-1]
    assert re.search(r"pddpm: 100%.* 12/12 \[.*, loss \d\.\d{4}, [\d.e+]+ images/s", last), last


def test_the_next_command_is_one_that_the_parser_takes(toy, monkeypatch, capsys, tmp_path):
    """Also with a blank in the path, and given as a command."""
    flags = toy(output_dir=str(tmp_path / "my run"), max_train_steps=2, lr_warmup_steps=5)
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    monkeypatch.setattr(sys, "argv", ["pyrdiff", "train", "pddpm", "--config", str(tmp_path / "flags.json")])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    first = (
        f"pddpm on {flags['train_data_dir']} at 8, 16, 2 steps, in {tmp_path / 'my run'} (Ctrl-C saves a checkpoint; "
    )
    assert lines[0] == first + "the same command goes on)"
    assert "note: 2 steps are no more than --lr_warmup_steps: the model will learn next to nothing" in lines
    (following,) = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
    words = shlex.split(following)
    assert words[:3] == ["pyrdiff", "sample", str(tmp_path / "my run" / "pipeline")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*words, "-n", "1"])
    cli.main()
    assert (tmp_path / "samples/00000.png").is_file()


def test_with_minutes_the_end_is_said_once_the_steps_are_planned(toy, capsys):
    settings = PyramidalSettings(**toy(minutes=0.5, max_train_steps=10**9, checkpointing_steps=4))
    ticks = itertools.count()
    train(METHOD, settings, clock=lambda: next(ticks) / 4)  # a second or so a step
    lines = capsys.readouterr().out.splitlines()
    (end,) = [line for line in lines if "done about" in line]
    first, *_, last = [line.partition(":")[0] for line in lines if "checkpoint saved" in line]
    assert first == "step 4" and lines.index(end) > [line.startswith("step 4:") for line in lines].index(True)
    steps = int(end.split(" steps")[0])
    assert 8 < steps < 40 and f" of {steps}" in last, "as many as fit"


def levels(array: np.ndarray) -> ImageLevels:
    return ImageLevels.build(array, [4, 8])


SETTINGS = PyramidalSettings(train_data_dir="x", lr_warmup_steps=10)


def colourful(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_images_that_nothing_is_said_of():
    assert notes_on_images(levels(colourful(FEW_IMAGES)), SETTINGS) == []
    assert notes_on_length(11, SETTINGS) == []
    few = levels(colourful(3))
    assert notes_on_images(few, PyramidalSettings(train_data_dir="x", patch_size=4)) == [], "windows are many"
    started = PyramidalSettings(train_data_dir="x", init_from="noto-emoji")
    assert notes_on_images(few, started) == [], "what a trained model draws it draws already"
    assert notes_on_images(few, SuperResolutionSettings(train_data_dir="x")) == [], "details are many"


def test_notes_on_images():
    (said,) = notes_on_images(levels(colourful(FEW_IMAGES - 1)), SETTINGS)
    assert said.startswith(f"{FEW_IMAGES - 1} images: trained on fewer than {FEW_IMAGES}")
    gray = colourful(60)
    gray[..., 1:] = gray[..., :1]
    (said,) = notes_on_images(levels(gray), SETTINGS)
    assert said.startswith("all images are gray: --image_channels 1")
    gray[59, 0, 0, 0] ^= 128
    assert notes_on_images(levels(gray), SETTINGS) == [], "one pixel of the last image has a colour"
    assert notes_on_images(ImageLevels.build(colourful(60)[..., 0], [4, 8], channels=1), SETTINGS) == []


def test_notes_on_images_of_one_colour():
    flat = colourful(60)
    flat[7], flat[9] = (10, 20, 30), (0, 0, 0)
    (said,) = notes_on_images(levels(flat), SETTINGS)
    assert said == "2 of 60 images are of one colour, and so will be some that the model draws: array[7]"
    faint = colourful(60)
    faint[7] = 100
    faint[7, 0, 0] = 101
    assert notes_on_images(levels(faint), SETTINGS) == [], "gone at the lowest level, there at the highest"
