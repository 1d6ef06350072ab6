"""Flags: what is accepted, what is refused and how, and that --help is quick."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyrdiff
from pyrdiff.cli import parse, run
from pyrdiff.methods.pddpm import PyramidalSettings
from pyrdiff.training.checkpoints import CheckpointError
from pyrdiff.training.settings import TrainingDiverged, TrainingStopped

SOURCE = Path(pyrdiff.__file__).parents[1]
SCRIPT = SOURCE.parent / "examples" / "train_pddpm.py"


def parsed(*args: str, images: tuple[str, ...] = ("--train_data_dir", "images")) -> PyramidalSettings:
    return parse(PyramidalSettings, "Pyramidal DDPM.", [*images, *args])


def refused(capsys, *args: str, **options) -> str:
    """What is said on stderr, without the frame and line breaks that the parser may lay it out with."""
    with pytest.raises(SystemExit) as caught:
        parsed(*args, **options)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and "Traceback" not in output.err
    return " ".join(output.err.replace("│", " ").split())


def test_values_arrive():
    settings = parsed("--resolution", "16", "48x64", "--minutes", "2.5", "--use_ema", "False", "--seed", "7")
    assert settings.sizes == [(16, 16), (48, 64)]
    assert (settings.minutes, settings.use_ema, settings.seed) == (2.5, False, 7)
    assert parsed().sizes == [(16, 16), (32, 32), (64, 64)]
    assert parsed("--resolution", "32").sizes == [(32, 32)]
    assert parsed("--block_out_channels", "8", "16", "32").block_out_channels == (8, 16, 32)


def test_an_unknown_flag_is_named(capsys):
    message = refused(capsys, "--minuts", "5")
    assert "--minuts" in message and "--minutes" in message
    assert "--no_such_thing" in refused(capsys, "--no_such_thing")


REFUSED = [
    (("--train_batch_size", "0"), "train_batch_size=0: expected 1 or more"),
    (("--max_train_steps", "-1"), "max_train_steps=-1: expected 1 or more"),
    (("--gradient_accumulation_steps", "0"), "gradient_accumulation_steps=0: expected 1 or more"),
    (("--checkpointing_steps", "0"), "checkpointing_steps=0: expected 1 or more"),
    (("--checkpoints_total_limit", "0"), "checkpoints_total_limit=0: expected 1 or more"),
    (("--logging_steps", "0"), "logging_steps=0: expected 1 or more"),
    (("--save_images_steps", "-1"), "save_images_steps=-1: expected 0 or more"),
    (("--seed", "-1"), "seed=-1: expected 0 or more"),
    (("--learning_rate", "0"), "learning_rate=0.0: expected a number above 0"),
    (("--learning_rate", "nan"), "learning_rate=nan: expected a number above 0"),
    (("--learning_rate", "inf"), "learning_rate=inf: expected a number above 0"),
    (("--adam_beta2", "1"), "adam_beta2=1.0: expected a number in [0, 1)"),
    (("--ema_max_decay", "1.5"), "ema_max_decay=1.5: expected a number in [0, 1)"),
    (("--minutes", "0"), "minutes=0.0: expected a number above 0"),
    (("--background", "0", "0", "256"), "background=(0, 0, 256): expected numbers from 0 to 255"),
    (("--resolution", "16", "16"), "resolution=('16', '16'): expected each to be larger than the one before"),
    (("--resolution", "32", "64x16"), "resolution=('32', '64x16'): expected each to be larger than the one before"),
    (("--resolution", "16", "a"), "resolution=('16', 'a'): expected numbers such as 64, or 48x64 for height x width"),
    (("--resolution", "0"), "resolution=('0',): expected numbers such as 64"),
    (("--resolution", "1x2x3"), "resolution=('1x2x3',): expected numbers such as 64"),
    (("--patch_size", "0"), "patch_size=0: expected 1 or more"),
    (("--ddpm_num_steps", "1"), "ddpm_num_steps=1: expected 100 or more"),
    (("--snr_gamma", "0"), "snr_gamma=0.0: expected a number above 0"),
    (("--dataset_name", "someone/something"), "expected one of train_data_dir and dataset_name"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=[" ".join(args) for args, _ in REFUSED])
def test_a_bad_value_is_named_with_what_is_accepted(capsys, args, message):
    assert message in refused(capsys, *args)


@pytest.mark.parametrize(("args", "message"), REFUSED[::8])
def test_a_bad_value_is_one_line(capsys, args, message):
    with pytest.raises(SystemExit):
        parsed(*args)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--train_batch_size", "abc"), ["--train_batch_size", "abc", "int"]),
        (("--prediction_type", "noise"), ["--prediction_type", "noise", "epsilon", "v_prediction", "sample"]),
        (("--on_bad_image", "ignore"), ["--on_bad_image", "ignore", "stop", "skip"]),
        (("--image_channels", "4"), ["--image_channels", "4", "1", "3"]),
        (("--random_flip", "perhaps"), ["--random_flip", "perhaps", "True", "False"]),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_accepted(capsys, args, named):
    message = refused(capsys, *args)
    assert all(word in message for word in named), message


def test_neither_folder_nor_data_set(capsys):
    assert "expected one of train_data_dir and dataset_name" in refused(capsys, images=())


def test_settings_made_in_python_are_checked_too():
    with pytest.raises(ValueError, match="train_batch_size=0: expected 1 or more"):
        PyramidalSettings(train_data_dir="images", train_batch_size=0)
    with pytest.raises(ValueError, match="seed=None: expected 0 or more"):
        PyramidalSettings(train_data_dir="images", seed=None)
    assert PyramidalSettings(train_data_dir="images", minutes=None, patch_size=None).minutes is None
    with pytest.raises(ValueError, match="expected one of train_data_dir and dataset_name"):
        PyramidalSettings()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingStopped(15, 3), 143),
        (TrainingStopped(2, 3), 130),
        (TrainingDiverged("loss nan\nat step 3"), 3),
        (ValueError("width=0:\n expected 1 or more"), 2),
        (CheckpointError("state.json is missing"), 2),
    ],
)
def test_what_ends_a_script_is_one_line_and_a_code(capsys, error, code):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert " ".join(str(error).split()) in output.err


def test_other_errors_keep_their_traceback():
    def main(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


HELP = """
import runpy, sys
script = sys.argv[1]
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as done:
    print("code", done.code)
print("slow", sorted({"torch", "diffusers", "accelerate", "transformers", "numpy", "PIL"} & set(sys.modules)))
"""


def test_help_lists_the_flags_without_importing_torch():
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", HELP, str(SCRIPT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.stderr == ""
    assert result.stdout.endswith("code 0\nslow []\n"), result.stdout[-200:]
    flags = (
        "train_data_dir resolution train_batch_size gradient_accumulation_steps use_ema mixed_precision "
        "checkpointing_steps resume_from_checkpoint report_to minutes prediction_type snr_gamma compile on_bad_image"
    )
    for flag in flags.split():
        assert f"--{flag} " in result.stdout, flag
