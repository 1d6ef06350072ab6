"""pyrdiff sample: every image is its seed's, what the model's call does not take is refused before any work."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, ImagePipelineOutput, UNet2DModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import pyrdiff
from pyrdiff import cli, hub
from pyrdiff.commands.sample import check_call, generate
from pyrdiff.parts.outputs import RECORD

FEW = ("--num_inference_steps", 2, "--refine_steps", 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Exports of untrained networks: one that generates, and one that enlarges."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, block_out_channels=(8, 8))
    unet = pyrdiff.CoordinateUNet2DModel(
        image_channels=1, resolutions=(4, 8), layers_per_block=1, norm_num_groups=4, **blocks
    )
    plans = {"short": {"num_inference_steps": 3, "refine_steps": 3}}
    folder = tmp_path_factory.mktemp("models")
    hub.export(pyrdiff.PyramidalPipeline(unet, DDPMScheduler(), plans=plans), folder / "pyramid")
    unet = pyrdiff.ResidualSRUNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8)
    hub.export(pyrdiff.ResidualSRPipeline(unet, pyrdiff.CosineResidualScheduler(100)), folder / "sr")
    return {"pyramid": folder / "pyramid", "sr": folder / "sr"}


@pytest.fixture
def run(monkeypatch, capsys, models):
    """Runs the command with flags: its exit code, stdout and stderr."""

    def call(output, *flags, model: str = "pyramid") -> tuple[int, str, str]:
        flags = ["--model", models[model], "--output_dir", output, *flags]
        monkeypatch.setattr(sys, "argv", ["pyrdiff", "sample", *map(str, flags)])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return call


def names(folder: Path) -> list[str]:
    """The files, without the record of what the run made."""
    return sorted(path.name for path in folder.iterdir() if path.name != RECORD)


def read(folder: Path, seed: int) -> np.ndarray:
    return np.asarray(Image.open(folder / f"{seed:05d}.png")).astype(int)


def sampled(model: Path, seed: int, **arguments) -> np.ndarray:
    """The image of a seed as the pipeline gives it."""
    pipeline = pyrdiff.load(model)
    pipeline.set_progress_bar_config(disable=True)
    return np.asarray(pipeline(1, generator=torch.Generator().manual_seed(seed), **arguments).images[0]).astype(int)


def test_images_grid_and_report(run, tmp_path, models):
    code, printed, bar = run(
        tmp_path / "out", "--num_images", 5, "--batch_size", 2, "--seed", 3, "--grid", tmp_path / "grid.png", *FEW
    )
    assert code == 0
    files = [f"0000{number}.png" for number in range(3, 8)]
    assert names(tmp_path / "out") == [*files, "report.json"]
    assert Image.open(tmp_path / "grid.png").size == (2 + 3 * 10, 2 + 2 * 10), "3 columns of 8 pixels"
    plan = str(pyrdiff.load(models["pyramid"]).plan(num_inference_steps=2, refine_steps=2))
    assert plan in printed and printed.splitlines()[-2].endswith(str(tmp_path / "out"))
    assert printed.splitlines()[0].startswith(f"5 images of {models['pyramid']} into {tmp_path / 'out'} (Ctrl-C")
    assert bar == "", "no bar where nobody looks"
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [(file["file"], file["seed"]) for file in report["files"]] == list(zip(files, range(3, 8), strict=True))
    assert report["counts"] == {"done": 5, "skipped": 0, "not reached": 0}
    assert report["model"] == {"name": str(models["pyramid"]), "pipeline": "PyramidalPipeline"}
    assert report["versions"]["torch"] == torch.__version__ and report["settings"]["batch_size"] == 2
    assert report["ms_per_image"] == pytest.approx(1000 * report["seconds"] / 5, rel=0.1)


def test_an_image_is_its_seeds_whatever_the_batch(run, tmp_path, models):
    run(tmp_path / "all", "--num_images", 4, *FEW)
    run(tmp_path / "two", "--num_images", 4, "--batch_size", 3, *FEW)
    run(tmp_path / "later", "--num_images", 2, "--seed", 2, *FEW)
    for seed in range(4):
        expected = sampled(models["pyramid"], seed, num_inference_steps=2, refine_steps=2)
        for folder in ("all", "two", *(["later"] if seed > 1 else [])):
            assert np.abs(read(tmp_path / folder, seed) - expected).max() <= 1
    assert np.abs(read(tmp_path / "all", 0) - read(tmp_path / "all", 1)).max() > 9


@pytest.mark.parametrize("flags, arguments", [
    (["--plan", "short"], {"plan": "short"}),
    (["--num_inference_steps", 3, "--refine_steps", 2, 3, "--refine_strength", 0.5, "--resolutions", 4, "6x8", 8],
     {"num_inference_steps": 3, "refine_steps": [2, 3], "refine_strength": 0.5, "resolutions": [4, (6, 8), 8]}),
    ([*FEW, "--arguments", '{"box": [0, 0, 0.5, 0.5], "refine_strength": [0.6]}'],
     {"num_inference_steps": 2, "refine_steps": 2, "box": (0, 0, 0.5, 0.5), "refine_strength": 0.6}),
])  # fmt: skip
def test_flags_reach_the_call(run, tmp_path, models, flags, arguments):
    code, _, complaint = run(tmp_path, "--num_images", 1, *flags)
    assert code == 0, complaint
    assert np.abs(read(tmp_path, 0) - sampled(models["pyramid"], 0, **arguments)).max() <= 1


def test_the_plan_that_fits_a_budget(run, tmp_path, models):
    code, printed, complaint = run(tmp_path, "--num_images", 1, "--plan", "auto", "--budget_ms", 1e6)
    assert code == 0 and "plan short:" in printed, complaint
    assert np.abs(read(tmp_path, 0) - sampled(models["pyramid"], 0, plan="short")).max() <= 1


def test_skip_existing(run, tmp_path, monkeypatch):
    flags = ["--num_images", 4, "--batch_size", 3, *FEW]
    run(tmp_path, *flags)
    before = [read(tmp_path, seed) for seed in range(4)]
    for seed in (0, 3):
        (tmp_path / f"0000{seed}.png").unlink()
    code, printed, _ = run(tmp_path, *flags, "--skip_existing")
    assert code == 0 and "2 done, 2 skipped" in printed
    for seed in range(4):
        assert np.abs(read(tmp_path, seed) - before[seed]).max() <= 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [file["status"] for file in report["files"]] == ["done", "skipped", "skipped", "done"]
    with monkeypatch.context() as patch:  # with nothing left to do, no model is loaded
        patch.setattr(hub, "load", None)
        code, printed, _ = run(tmp_path, *flags, "--skip_existing")
    assert code == 0 and "4 skipped" in printed
    code, printed, _ = run(tmp_path, *flags, "--seed", 2)  # more images of the same kind
    assert code == 0 and len(names(tmp_path)) == 7 and "4 done" in printed


@pytest.mark.parametrize("what", ["empty", "other picture"])
def test_what_is_skipped_is_what_the_run_would_make(run, tmp_path, what):
    flags = ["--num_images", 3, *FEW]
    run(tmp_path, *flags)
    path, whole = tmp_path / "00001.png", read(tmp_path, 1)
    path.write_bytes(b"") if what == "empty" else Image.new("L", (8, 8), 77).save(path)
    spoilt = path.read_bytes()
    for further in ([], ["--skip_existing"]):
        code, _, complaint = run(tmp_path, *flags, *further)
        assert code == 2 and "--output: " in complaint and "00001.png is there" in complaint
        assert "--overwrite" in complaint and path.read_bytes() == spoilt
    code, printed, _ = run(tmp_path, *flags, "--skip_existing", "--overwrite")
    assert code == 0 and "1 done, 2 skipped" in printed
    assert np.abs(read(tmp_path, 1) - whole).max() <= 1


def test_images_of_two_kinds_are_not_mixed(run, tmp_path, models):
    folder = tmp_path / "out"
    run(folder, "--num_images", 4, *FEW)
    Image.new("L", (8, 8), 77).save(folder / "mine.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for number in (2, 4):
        code, _, complaint = run(folder, "--num_images", number, "--plan", "short", "--skip_existing")
        assert code == 2 and complaint.count("\n") == 1 and "--overwrite" in complaint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    code, _, complaint = run(folder, "--num_images", 2, "--plan", "short", "--overwrite")
    assert code == 0 and names(folder) == ["00000.png", "00001.png", "mine.png", "report.json"], complaint
    assert np.abs(read(folder, 1) - sampled(models["pyramid"], 1, plan="short")).max() <= 1


def test_the_same_name_with_another_model_in_it_is_another_model(run, tmp_path, models, monkeypatch):
    model = shutil.copytree(models["pyramid"], tmp_path / "model")
    monkeypatch.setitem(models, "changing", model)
    run(tmp_path / "out", "--num_images", 2, *FEW, model="changing")
    hub.export(pyrdiff.load(model), model)  # trained again, as it were
    code, _, complaint = run(tmp_path / "out", "--num_images", 2, *FEW, "--skip_existing", model="changing")
    assert code == 2 and "00000.png (and 1 more) is there" in complaint


@pytest.mark.parametrize("name", ["report.json", "grid.png", "out"])
def test_files_of_others_are_not_replaced(run, tmp_path, name):
    folder = tmp_path / "out"
    path = folder / name if name == "report.json" else tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("not ours")
    code, _, complaint = run(folder, "--num_images", 1, *FEW, "--grid", tmp_path / "grid.png")
    assert code == 2 and complaint.startswith("error: --") and complaint.count("\n") == 1
    assert path.read_text() == "not ours" and not list(tmp_path.rglob("0*.png"))
    if name != "out":
        code, _, _ = run(folder, "--num_images", 1, *FEW, "--grid", tmp_path / "grid.png", "--overwrite")
        assert code == 0 and path.read_bytes() != b"not ours"


@pytest.mark.parametrize("flags, said", [
    (["--num_passes", 2], "--num_passes: not for a PyramidalPipeline"),
    (["--arguments", '{"eta": 0}'], "--arguments: 'eta' is not for a PyramidalPipeline"),
    (["--arguments", "[1]"], "--arguments='[1]': expected a JSON object"),
    (["--arguments", "eta=0"], "--arguments='eta=0': expected a JSON object"),
    ([*FEW, "--arguments", '{"refine_steps": 2}'], "expected other arguments than ['refine_steps'], which"),
    (["--arguments", '{"generator": 2}'], "expected other arguments than ['generator'], which"),
    (["--plan", "long"], "plan='long': expected one of ['short']"),
    (["--plan", "auto"], "--budget_ms=None: expected a time with --plan auto"),
    (["--plan", "short", "--budget_ms", 9], "--budget_ms=9.0: expected a time with --plan auto"),
    (["--plan", "auto", "--budget_ms", "1e-6"], "budget_ms=1e-06: expected at least"),
    (["--refine_steps", 2, 2], "refine_steps=[2, 2]"),
    (["--resolutions", 8, "4x"], "--resolutions=('8', '4x'): expected sizes"),
    (["--resolutions", 8, 60000], "resolutions has (60000, 60000), 3,600 megapixels: an image takes 43.2 GB"),
    (["--resolutions", 8, "90x100", "--max_megapixels", 0.008], "expected at most 0.008 megapixels"),
    (["--arguments", '{"resolutions": [8, [60000, 50000]]}'], "resolutions has [60000, 50000]"),
    (["--arguments", "[" * 3000], "expected a JSON object"),
    (["--max_megapixels", 0], "--max_megapixels=0.0: expected a number above 0"),
    (["--resolutions", 8, 4], "resolutions=[(8, 8), (4, 4)]"),
    (["--num_images", 0], "--num_images=0"),
    (["--batch_size", 0], "--batch_size=0"),
    (["--seed", -1], "--seed=-1"),
    (["--seed", 2**63], f"--seed={2**63}"),
    (["--dtype", "float8"], "'float8'"),
    (["--device", "abacus"], "device='abacus'"),
    (["--model", "nowhere"], "'nowhere'"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(run, tmp_path, flags, said):
    code, printed, complaint = run(tmp_path / "out", *flags)
    lines = [line for line in complaint.splitlines() if "Loading" not in line]
    assert (code, len(lines)) == (2, 1) and lines[0].startswith("error: ") and said in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_what_enlarges_is_refused(run, tmp_path):
    code, _, complaint = run(tmp_path / "out", model="sr")
    assert code == 2 and "a ResidualSRPipeline enlarges images" in complaint and "pyrdiff upscale" in complaint
    assert not (tmp_path / "out").exists()


def test_revision_and_dtype_are_the_loaders(run, tmp_path, monkeypatch, models):
    load, asked = hub.load, []
    monkeypatch.setattr(hub, "load", lambda name, **options: asked.append(options) or load(name, **options))
    code, printed, _ = run(tmp_path, "--num_images", 1, "--revision", "v1", "--dtype", "bfloat16", *FEW)
    asked_for = {"revision": "v1", "dtype": torch.bfloat16, "max_megapixels": 64, "adapters": {}}
    assert code == 0 and asked == [asked_for] and "bfloat16" in printed


def test_a_pipeline_of_another_package(run, tmp_path, monkeypatch):
    """Nothing is known of it but the signature of its call: no plan, no levels, `num_inference_steps`."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,))
    unet = UNet2DModel(8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    monkeypatch.setattr(hub, "load", lambda name, **options: pipeline)
    code, printed, _ = run(tmp_path / "out", "--num_images", 3, "--batch_size", 2, "--num_inference_steps", 2)
    assert code == 0 and len(names(tmp_path / "out")) == 4 and "level" not in printed
    expected = pipeline(generator=[torch.Generator().manual_seed(2)], num_inference_steps=2).images[0]
    assert np.abs(read(tmp_path / "out", 2) - np.asarray(expected).astype(int)).max() <= 1
    code, _, complaint = run(tmp_path / "other", *FEW)
    assert code == 2 and "--refine_steps: not for a DDPMPipeline" in complaint


class ByPrompt:
    device = "cpu"

    def __call__(self, prompt, generator=None):
        return ImagePipelineOutput([f"{prompt} {generator[0].initial_seed()}"])


class Unseeded:
    def __call__(self, batch_size=1):
        raise AssertionError("is not called")


def test_what_a_call_needs_is_said():
    with pytest.raises(ValueError, match=r"a ByPrompt needs \['prompt'\]"):
        check_call(ByPrompt(), {})
    check_call(ByPrompt(), {"prompt": "a cat"})
    with pytest.raises(ValueError, match="a Unseeded takes no generator"):
        check_call(Unseeded(), {})
    assert list(generate(ByPrompt(), range(5, 7), 8, {"prompt": "a cat"})) == ["a cat 5", "a cat 6"], "one a call"


@pytest.mark.parametrize("number, ending", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_a_signal_the_finished_images_stay(run, tmp_path, monkeypatch, number, ending):
    whole = Image.Image.save

    def slow(image, file, *args, **options):
        if "00002.png" in str(file):
            Path(file).write_bytes(b"half")
            os.kill(os.getpid(), number)
            time.sleep(5)
        whole(image, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        code, printed, _ = run(tmp_path, "--num_images", 4, *FEW)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == ending and "2 not reached" in printed
    assert names(tmp_path) == ["00000.png", "00001.png", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["counts"]["done"] == 2


def test_json_is_all_that_is_on_stdout(run, tmp_path):
    code, printed, rest = run(tmp_path, "--num_images", 1, "--json", *FEW)
    report = json.loads(printed)
    assert code == 0 and report.pop("exit_code") == 0
    assert report == json.loads((tmp_path / "report.json").read_text()) and "NFE-eq" in rest


def test_a_picture_says_how_it_was_drawn_and_is_drawn_again(run, tmp_path, models, monkeypatch, capsys):
    """The same pixels in a batch of the same size; elsewhere up to the last bit of a sum, a level in 255."""
    code, printed, _ = run(tmp_path / "a", "--num_images", 3, "--batch_size", 1, "--seed", 4, "--plan", "short")
    assert (
        code == 0 and printed.splitlines()[-1] == f"again: pyrdiff sample --config {tmp_path / 'a/00004.png'} -o again"
    )
    texts = Image.open(tmp_path / "a/00005.png").text
    assert texts["Software"] == f"pyrdiff {pyrdiff.__version__}"
    said = json.loads(texts["pyrdiff"])
    assert said["version"] == pyrdiff.__version__
    flags = {"model": str(models["pyramid"]), "seed": 5, "num_images": 1, "plan": "short", "dtype": "float32"}
    assert said["flags"] == flags

    monkeypatch.chdir(tmp_path)
    for words in ("sample --config a/00005.png -o b", "sample --config a/00005.png -o c --seed 6 -n 1"):
        monkeypatch.setattr(sys, "argv", ["pyrdiff", *words.split()])
        cli.main()
    assert capsys.readouterr().err == ""
    assert (read(tmp_path / "b", 5) == read(tmp_path / "a", 5)).all() and names(tmp_path / "b") == [
        "00005.png",
        "report.json",
    ]
    assert (read(tmp_path / "c", 6) == read(tmp_path / "a", 6)).all(), "flags beside it count more"


def test_the_plan_that_was_found_is_in_the_picture(run, tmp_path):
    run(tmp_path, "--num_images", 1, "--plan", "auto", "--budget_ms", 1e6)
    flags = json.loads(Image.open(tmp_path / "00000.png").text["pyrdiff"])["flags"]
    assert flags["plan"] == "short" and "budget_ms" not in flags


@pytest.mark.parametrize("text, said", [
    (None, "does not say how it was made"),
    ("[" * 100_000, "expected JSON, nested at most"),
    ("[1]", "is not what pyrdiff sample writes"),
    ('{"flags": {"model": "m", "output": "/etc", "overwrite": true}}', "is not what pyrdiff sample writes"),
    ('{"flags": {"model": "m", "classes": ["--overwrite"]}}', "classes has '--overwrite'; expected values"),
    ('{"flags": {"model": "m", "seed": "many"}}', "'many'"),
])  # fmt: skip
def test_a_picture_of_a_stranger_says_only_how_it_was_drawn(tmp_path, monkeypatch, capsys, text, said):
    texts = PngInfo()
    if text is not None:
        texts.add_itxt("pyrdiff", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=texts)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pyrdiff", "sample", "--config", "a.png"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    complaint = capsys.readouterr().err
    assert stopped.value.code == 2 and said in complaint and [complaint.count("\n"), os.listdir()] == [1, ["a.png"]]


def test_a_file_that_is_no_picture_is_no_config(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.png").write_bytes(b"no picture")
    monkeypatch.setattr(sys, "argv", ["pyrdiff", "sample", "--config", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "cannot be read as a PNG file" in capsys.readouterr().err
