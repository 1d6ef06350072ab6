"""Names and paths that are wrong, and errors of other packages: one line each, with the way out."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from pyrdiff import cli
from pyrdiff.training.settings import TrainingSettings

DEEP = "[" * 100_000


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command in a folder with a picture, a folder of pictures and JSON files: its code, and what it says."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("RGB", (8, 8)).save("images/a.png")
    Path("deep.json").write_text(DEEP)
    Path("run/pipeline").mkdir(parents=True)
    Path("run/pipeline/model_index.json").write_text("{}")

    def call(*args: str, main=cli.dispatch) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pyrdiff", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.run(main)
        lines = capsys.readouterr().err.splitlines(True)
        complaint = "".join(line for line in lines if line.strip())
        assert complaint.count("\n") == 1 and complaint.startswith("error: "), complaint
        return stopped.value.code, complaint[len("error: ") : -1]

    return call


@pytest.mark.parametrize(
    "line, said",
    [
        ("pddpm", "did you mean 'train pddpm'?"),
        ("pixel-aware --seed 1", "did you mean 'train pixel-aware'?"),
        ("trian pddpm", "did you mean 'train'?"),
        ("train pdpm", "did you mean 'pddpm'?"),
        (
            "sample --modle noto-emoji",
            "--modle: no flag of pyrdiff sample; did you mean '--model'? (--help lists the flags)",
        ),
        ("sample --model noto-emojii", "did you mean 'noto-emoji'?"),
        ("sample --model run", "did you mean 'run/pipeline'?"),
        ("sample --model noto-emoji --plan balancd", "did you mean 'balanced'?"),
        ("sample --config flags.yaml", "has the unknown key 'modle'.*did you mean 'model'?"),
        ('sample --model noto-emoji --arguments {"boxx":1}', "did you mean 'box'?"),
        (
            "train pddpm --train_data_dir glyphs --report_to tensorbord",
            "report_to='tensorbord'.*did you mean 'tensorboard'?",
        ),
    ],
)
def test_the_nearest_name_is_offered(run, line, said):
    Path("flags.yaml").write_text("modle: noto-emoji")
    code, complaint = run(*line.split())
    assert code == 2 and complaint.endswith(said.split(".*")[-1]) and said.split(".*")[0] in complaint, complaint


def test_nothing_is_offered_where_nothing_is_near(run):
    assert "did you mean" not in run("paint")[1]


PATHS = [
    ("train pddpm --train_data_dir nope", "--train_data_dir='nope'"),
    ("train pddpm --train_data_dir images/a.png", "--train_data_dir='images/a.png'"),
    ("sample --model ./nope", "--model='./nope'"),
    ("sample --model images", "--model='images'"),
    ("sample --model images/a.png", "--model='images/a.png'"),
    ("sample --model noto-emoji --grid images", "--grid='images'"),
    ("sample --model noto-emoji --grid images/a.png/b", "--grid='images/a.png/b'"),
    ("upscale --model ./nope --input images --output o", "--model='./nope'"),
    ("upscale --model noto-emoji --input nope --output o", "--input='nope'"),
    ("evaluate --generated nope --reference images", "--generated='nope'"),
    ("evaluate --generated images --reference nope", "--reference='nope'"),
    ("evaluate --generated images --reference images --weights nope", "--weights='nope'"),
    ("evaluate --generated images --reference images --lpips_weights nope", "--lpips_weights='nope'"),
    ("bench --model ./nope --reference images --output o.json", "--model='./nope'"),
    ("bench --model noto-emoji --reference nope --output o.json", "--reference='nope'"),
    ("bench --model noto-emoji --reference images --output o.json --arms nope", "--arms='nope'"),
    ("plan --model ./nope", "--model='./nope'"),
    ("plan --model noto-emoji --bench nope --budget_ms 1", "--bench='nope'"),
    ("check ./nope", "--model='./nope'"),
    ("push images me/x --bench nope", "--bench='nope'"),
    ("push images me/x --pictures nope", "--pictures=('nope',)"),
    ("demo --model ./nope", "--model='./nope'"),
    ("demo ./nope", "--model='./nope'"),
]
WITHOUT_TORCH = """
import contextlib, io, json, os, sys
from pyrdiff import cli
os.chdir(sys.argv[1])
rows = []
for line in json.loads(sys.argv[2]):
    sys.argv, said = ["pyrdiff", *line.split()], io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        cli.main()
    rows.append([said.getvalue(), sorted({"torch", "diffusers", "numpy"} & set(sys.modules))])
print(json.dumps(rows))
"""


def test_paths_that_lead_nowhere_are_named_by_their_flags_before_torch_is_imported(run, tmp_path):
    import subprocess

    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path), json.dumps([line for line, _ in PATHS])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for (line, said), (complaint, slow) in zip(PATHS, json.loads(done.stdout), strict=True):
        assert complaint.startswith(f"error: {said}: expected ") and complaint.count("\n") == 1, (line, complaint)
        assert not slow, (line, slow)


FIRST_LINES = [
    ("train pddpm --train_data_dir images -o run2", "pddpm on images at 16, 32, 64, 10,000 steps, in run2 "),
    ("sample noto-emoji", "16 images of noto-emoji into samples "),
    ("upscale noto-emoji -i images -o larger -s 2", "images enlarged by noto-emoji into larger "),
    (
        "evaluate --generated images --reference images",
        "frechet_distance, kid, precision_recall of images beside images",
    ),
    (
        "bench noto-emoji --reference images -o b.json",
        "noto-emoji beside images of images: each way is timed 5 times and",
    ),
    (
        "distill noto-emoji --train_data_dir images -o run3",
        "reading the model that is to be distilled",
    ),
    ("ema kept -o averages", "the weights of kept averaged over 0.05, 0.1, 0.2 of its training"),
    ("plan noto-emoji", "what the plans of noto-emoji cost, timed here, 16 images together"),
    ("check noto-emoji", "checking noto-emoji: its files, its code, "),
    ("merge noto-emoji --adapter run/a -o merged", "noto-emoji with run/a merged into it, in merged"),
    ("push run/pipeline me/x", "run/pipeline: checked first, then published as me/x in one commit"),
    ("demo noto-emoji --port 0", "loading noto-emoji, for a page on 127.0.0.1, port "),
    ("plugins", "loading the installed methods"),
]
UNTIL_TORCH = """
import contextlib, io, json, os, sys
from pyrdiff import cli
os.chdir(sys.argv[1])

class Reached(BaseException):
    pass

class Gate:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "numpy", "PIL", "gradio"):
            raise Reached(name)

sys.meta_path.insert(0, Gate)
rows = []
for line in json.loads(sys.argv[2]):
    sys.argv, said, reached = ["pyrdiff", *line.split()], io.StringIO(), False
    with contextlib.redirect_stdout(said):
        try:
            cli.main()
        except Reached:
            reached = True
    rows.append([said.getvalue(), reached])
print(json.dumps(rows))
"""


def test_a_line_says_what_will_happen_before_anything_slow_is_imported(run, tmp_path):
    import subprocess

    assert {line.split()[0] for line, _ in FIRST_LINES} == set(cli.COMMANDS)
    for folder in ("averages", "pipeline"):  # a training that kept averages, as far as this command looks by then
        (tmp_path / "kept" / folder).mkdir(parents=True)
    (tmp_path / "kept" / "pipeline" / "model_index.json").touch()
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-c", UNTIL_TORCH, str(tmp_path), json.dumps([line for line, _ in FIRST_LINES])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for (line, expected), (said, reached) in zip(FIRST_LINES, json.loads(done.stdout), strict=True):
        assert reached and said.startswith(expected) and said.count("\n") == 1, (line, said)


def test_what_a_function_refuses_is_said_of_the_flag_that_gave_it(run):
    Path("broken.npy").write_bytes(b"no array")
    Path("empty").mkdir()
    for line, said in [
        ("train pddpm --train_data_dir broken.npy", "--train_data_dir='broken.npy' cannot be read"),
        ("bench --model noto-emoji --output o.json --reference=broken.npy", "--reference='broken.npy' cannot be read"),
        ("plan --model noto-emoji --bench deep.json --budget_ms 1", "--bench='deep.json'"),
    ]:
        code, complaint = run(*line.split())
        assert code == 2 and complaint.startswith(said), complaint


@pytest.mark.parametrize(
    "line, said",
    [
        (f"sample --model noto-emoji --arguments {DEEP}", "--arguments="),
        ("sample --config deep.json", "--config: 'deep.json' is nested too deeply"),
        (
            "bench --model noto-emoji --reference images --output o.json --arms deep.json",
            "--arms: deep.json: expected JSON, nested",
        ),
    ],
)
def test_what_is_nested_too_deeply_is_refused(run, line, said):
    code, complaint = run(*line.split())
    assert code == 2 and complaint.startswith(said)


def test_memory_that_is_not_there_is_said_with_the_flag_that_needs_less(run):
    def of_torch(args):
        torch.empty(2**52)

    def of_numpy(args):
        import numpy

        numpy.empty(2**52)

    for command, flag in [("train", "--train_batch_size"), ("sample", "--batch_size"), ("upscale", "--tile")]:
        for main in (of_torch, of_numpy):
            code, complaint = run(command, main=main)
            assert code == 2 and complaint.startswith("out of memory on the CPU (") and flag in complaint
    code, complaint = run("sample", main=raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert code == 2 and complaint.startswith("out of memory on the GPU (CUDA out of memory)")


def raising(error: Exception):
    def main(args):
        raise error

    return main


def test_errors_of_data_sets_and_endless_recursion_are_one_line(run):
    import datasets

    Path("data").mkdir()
    Path("data/train.json").write_text("[1, 2")

    def load(args):
        datasets.disable_progress_bars()
        datasets.load_dataset("json", data_files="data/train.json", cache_dir="cache")

    code, complaint = run("train", main=load)
    assert code == 2 and complaint.startswith("the data set cannot be read: DatasetGenerationError")
    assert "decoding array value" in complaint and "--dataset_name" in complaint

    def endless(args):
        return endless(args)

    assert run("sample", main=endless) == (2, run("sample", main=endless)[1])
    assert "nested too deeply" in run("sample", main=endless)[1]


def test_what_is_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pyrdiff", "sample"])
    for error in (KeyError("k"), RuntimeError("shape mismatch"), AttributeError("a")):
        with pytest.raises(type(error)):
            cli.run(raising(error))


def test_every_flag_that_is_advised_is_one_of_its_command():
    from dataclasses import fields
    from importlib import import_module

    from pyrdiff.commands.borders import SMALLER

    for command, advice in SMALLER.items():
        known = {field.name for field in fields(TrainingSettings)}
        if command != "train":
            module = import_module(f"pyrdiff.commands.{command}")
            known = {field.name for field in fields(getattr(module, f"{command.capitalize()}Settings"))}
        flags = {word.strip(",")[2:] for word in advice.split() if word.startswith("--")}
        assert flags and flags <= known, (command, flags)


class LoggedOut(GeneralTracker):
    """A tracker that nobody is logged in to."""

    name, requires_logging_directory = "loggedout", False

    def __init__(self, run_name: str, **settings):
        raise PermissionError("no key: log in first")


def test_a_tracker_that_does_not_start_is_named(run, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "loggedout", LoggedOut)
    flags = "--report_to loggedout --resolution 8 --max_train_steps 1 --output_dir out --preset tiny"
    code, complaint = run("train", "pddpm", "--train_data_dir", "images", *flags.split())
    assert code == 2 and complaint.startswith("report_to='loggedout': could not start (PermissionError: no key")
