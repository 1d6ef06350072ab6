"""examples/upscale.py, as a user runs it: every file is enlarged with what it carries, or named."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import warm
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image, ImageCms, ImageOps, ImageSequence

import pyrdiff
from pyrdiff import (
    CoordinateUNet2DModel,
    CosineResidualScheduler,
    PyramidalPipeline,
    ResidualSRPipeline,
    ResidualSRUNet2DModel,
    hub,
)
from pyrdiff.commands.upscale import UpscaleSettings, main
from pyrdiff.data import fill_hidden
from pyrdiff.hub.enlarging import enlarging
from pyrdiff.parts.operators import SeparableOperator
from pyrdiff.parts.outputs import RECORD
from pyrdiff.upscaling.enlarger import Enlarger

SCRIPT = Path(__file__).parents[2] / "examples" / "upscale.py"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int | str, Path]:
    """Exports of untrained networks: gray and colour, made to generate, and one made to enlarge."""
    folders = {}
    for channels in (1, 3):
        torch.manual_seed(0)
        unet = CoordinateUNet2DModel(
            image_channels=channels,
            resolutions=(4, 8),
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
        folder = tmp_path_factory.mktemp("models") / str(channels)
        folders[channels] = hub.export(PyramidalPipeline(unet, DDPMScheduler()), folder)
    unet = ResidualSRUNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8, scale_factors=(2, 3)
    )  # fmt: skip
    plans = {"default": {"num_inference_steps": 3}, "short": {"num_inference_steps": 2, "eta": 0.0}}
    pipeline = ResidualSRPipeline(unet, CosineResidualScheduler(100), plans)
    folders["sr"] = hub.export(pipeline, tmp_path_factory.mktemp("models") / "sr")
    return folders


@pytest.fixture
def run(monkeypatch, capsys, models):
    """Runs the script with flags: its exit code, the lines of stderr that are errors, and the report."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the script's own handler is to replace this one

    def call(source, output, *flags, channels: int | str = 3) -> tuple[int, list[str], dict | None]:
        few = [] if channels == "sr" else ["--refine_steps", 2]
        flags = ["--model", models[channels], "--input", source, "--output", output, *few, *flags]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code or 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "Loading" not in line]
        report = Path(output) / "report.json"
        return code, lines, json.loads(report.read_text()) if report.is_file() else None

    yield call
    signal.signal(signal.SIGTERM, before)


def noise(mode: str = "RGB", height: int = 6, width: int = 5, seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = number, "Camera"
    return exif


def files(folder: Path) -> list[str]:
    """All of them, hidden ones too, but the record of what a run made."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return sorted(path.relative_to(folder).as_posix() for path in found)


def good_files(folder: Path) -> None:
    """20 files: name → what is to come back is checked by the test."""
    palette = np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes()
    indexed = noise("P")
    indexed.putpalette(palette)
    save(noise(), folder / "a.png")
    save(noise(height=1, width=9), folder / "row.png")
    save(noise(height=13, width=7), folder / "odd.tif", dpi=(300, 300))
    save(noise(), folder / "b.jpg", exif=orientation(6), icc_profile=PROFILE, dpi=(240, 240))
    save(noise(), folder / "c.JPEG")
    save(noise(), folder / "d.webp", exif=orientation(8), icc_profile=PROFILE)
    save(noise("RGBA"), folder / "e.webp")
    save(noise("L"), folder / "gray.png")
    save(noise("L"), folder / "gray.jpg", exif=orientation(3))
    save(noise("L"), folder / "gray.tiff")
    save(noise("LA"), folder / "gray alpha.png")
    save(noise("RGBA"), folder / "deep/deeper/alpha.png", icc_profile=PROFILE)
    save(noise("RGBA"), folder / "deep/alpha.tif", icc_profile=PROFILE)
    save(indexed, folder / "deep/palette.png")
    save(indexed, folder / "deep/palette clear.png", transparency=indexed.getpixel((0, 0)))
    save(noise().convert("1"), folder / "deep/one bit.png")
    save(noise("CMYK"), folder / "deep/cmyk.jpg")
    save(noise("L"), folder / "deep/keyed.png", transparency=noise("L").getpixel((0, 0)))
    save(noise(), folder / "ünï cödé.png", exif=orientation(5))
    save(noise(), folder / "deep/a.png")


def broken_files(folder: Path) -> dict[str, str]:
    """9 files, and a part of the reason that is to be given for each."""
    whole = save(noise(height=60, width=50), folder / "bad/whole.png").read_bytes()
    jpeg = save(noise(height=60, width=50), folder / "bad/whole.jpg").read_bytes()
    for name in ("whole.png", "whole.jpg"):
        (folder / "bad" / name).unlink()
    (folder / "bad/truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bad/truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "bad/empty.png").touch()
    (folder / "bad/text.png").write_text("not a picture")
    save(Image.fromarray(np.zeros((3, 3), np.float32)), folder / "bad/float.tif")
    frames = [noise(), noise(seed=1)]
    frames[0].save(folder / "bad/moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "bad/pages.tif", save_all=True, append_images=frames[1:])
    (folder / "bad/link.png").symlink_to(folder / "nowhere.png")
    save(noise(), folder / "bad/still.gif")
    return {
        "bad/truncated.png": "truncated",
        "bad/truncated.jpg": "truncated",
        "bad/empty.png": "empty file",
        "bad/text.png": "not an image",
        "bad/float.tif": "32-bit pixels",
        "bad/moving.gif": "2 frames",
        "bad/pages.tif": "2 frames",
        "bad/link.png": "No such file",
        "bad/still.gif": "'.gif' are not written",
    }


def test_help_does_not_wait_for_torch():
    code = f"import runpy, sys; sys.argv = ['upscale.py', '--help']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name="
    code += "'__main__')\nexcept SystemExit as stop: assert not stop.code\nassert 'torch' not in sys.modules"
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "Exit code: 0" in text


def test_a_folder_of_20_good_and_9_broken_files(run, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    good_files(source)
    good = files(source)
    broken = broken_files(source)
    assert (len(good), len(broken)) == (20, 9)

    code, lines, report = run(source, output, "--outscale", 2, "--keep_going")
    assert code == 1
    assert files(output) == sorted([*good, "report.json"])
    assert [line.split(": ")[1] for line in lines] == sorted(broken)
    by_name = {file["input"]: file for file in report["files"]}
    for line, (name, why) in zip(lines, sorted(broken.items()), strict=True):
        assert line.startswith("error: ") and why in line
        assert by_name[name]["status"] == "failed" and why in by_name[name]["reason"]
    assert report["counts"] == {"done": 20, "skipped": 0, "failed": 9, "not reached": 0}
    assert str(tmp_path) not in json.dumps(report["files"])
    assert report["versions"]["torch"] == torch.__version__ and report["settings"]["outscale"] == 2

    changed = {"deep/palette.png": "RGB", "deep/palette clear.png": "RGBA", "deep/one bit.png": "L"}
    changed |= {"deep/cmyk.jpg": "RGB", "deep/keyed.png": "LA"}
    for name in good:
        with Image.open(source / name) as before, Image.open(output / name) as after:
            for image in (before, after):
                image.load()
            assert after.format == before.format
            assert after.size == tuple(2 * side for side in before.size)
            assert after.mode == changed.get(name, before.mode), name
            assert after.info.get("icc_profile") == before.info.get("icc_profile")
            assert dict(after.getexif()) == dict(before.getexif()) or after.format == "TIFF", name
            if "dpi" in before.info:
                assert after.info["dpi"] == pytest.approx(before.info["dpi"])
            if after.has_transparency_data:
                alpha = before.convert("LA" if after.mode == "LA" else "RGBA").getchannel("A")
                assert after.getchannel("A").tobytes() == alpha.resize(after.size, Image.BICUBIC).tobytes()
            notes = " ".join(by_name[name]["notes"])
            assert (f"{before.mode} converted to {after.mode}" in notes) == (name in changed), name
            assert ("luma" in notes) == after.mode.startswith("L"), name
            assert by_name[name]["output_size"] == list(after.size)
    assert Image.open(output / "b.jpg").getexif()[0x0112] == 6
    assert Image.open(output / "b.jpg").info["icc_profile"] == PROFILE


def test_the_pixels_are_the_pipelines(run, tmp_path, models):
    source = save(noise(), tmp_path / "in/a.png").parent
    save(noise("L"), source / "gray.png")
    flags = ["--outscale", 3, "--guidance", "gradient", "--operator", "area", "--hard_consistency", "--tile", 8]
    code, _, report = run(source, tmp_path / "out", *flags, "--tile_pad", 4, "--seed", 5)
    assert code == 0
    pipeline = pyrdiff.load(models[3], pipeline_class="GuidedSRPipeline")
    pipeline.set_progress_bar_config(disable=True)
    arguments = dict(guidance="gradient", operator="area", hard_consistency=True, tile=8, tile_overlap=4)
    for file, image in zip(report["files"], (noise(), noise("L").convert("RGB")), strict=True):
        generator = torch.Generator().manual_seed(file["seed"])
        expected = pipeline(image, scale_factor=3, refine_steps=2, generator=generator, **arguments).images[0]
        given = Image.open(tmp_path / "out" / file["output"])
        difference = np.asarray(given).astype(int) - np.asarray(expected.convert(given.mode))
        assert np.abs(difference).max() <= 1


def test_without_keep_going_it_stops_at_the_first_failure(run, tmp_path):
    for name in ("a.png", "c.png"):
        save(noise(), tmp_path / "in" / name)
    (tmp_path / "in/b.png").touch()
    code, lines, report = run(tmp_path / "in", tmp_path / "out")
    assert (code, lines) == (2, ["error: b.png: empty file"])
    assert files(tmp_path / "out") == ["a.png", "report.json"]
    assert report["counts"] == {"done": 1, "skipped": 0, "failed": 1, "not reached": 1}


def test_a_result_depends_on_seed_and_name_and_not_on_its_neighbours(run, tmp_path):
    for name in ("a.png", "b.png", "below/a.png"):
        save(noise(), tmp_path / "in" / name)
    save(noise(), tmp_path / "alone/b.png")
    run(tmp_path / "in", tmp_path / "out")
    code, _, report = run(tmp_path / "alone", tmp_path / "first")
    code, *_ = run(tmp_path / "alone/b.png", tmp_path / "second")
    run(tmp_path / "alone", tmp_path / "other", "--seed", 1)
    read = [tmp_path / place for place in ("out/b.png", "first/b.png", "second/b.png")]
    first, *others = [path.read_bytes() for path in read]
    assert others == [first, first] and report["files"][0]["seed"] < 2**63
    for place in ("out/a.png", "out/below/a.png", "other/b.png"):  # the same picture under another name or seed
        assert (tmp_path / place).read_bytes() != first


def test_skip_existing(run, tmp_path, monkeypatch):
    """Skipped is what this run would have made, and nothing else."""
    for name in ("a.png", "b.png"):
        save(noise(), tmp_path / "in" / name)
    made = ["--outscale", 2, "--skip_existing"]
    code, *_ = run(tmp_path / "in/a.png", tmp_path / "out", *made)
    kept = (tmp_path / "out/a.png").read_bytes()
    code, _, report = run(tmp_path / "in", tmp_path / "out", *made)
    assert code == 0 and [file["status"] for file in report["files"]] == ["skipped", "done"]
    assert (tmp_path / "out/a.png").read_bytes() == kept
    with monkeypatch.context() as patch:  # with nothing left to do, no model is loaded
        patch.setattr(hub, "load", None)
        code, _, report = run(tmp_path / "in", tmp_path / "out", *made)
    assert code == 0 and report["counts"]["skipped"] == 2
    code, lines, _ = run(tmp_path / "in", tmp_path / "out", "--outscale", 4, "--skip_existing")  # x2 is not x4
    assert code == 2 and "a.png" in lines[0] and "not made by this run" in lines[0] and "--overwrite" in lines[0]
    os.utime(tmp_path / "in/b.png")  # a picture that changed since
    code, _, report = run(tmp_path / "in", tmp_path / "out", *made)
    assert code == 0 and [file["status"] for file in report["files"]] == ["skipped", "done"]


def test_files_of_others_are_not_replaced(run, tmp_path, monkeypatch):
    source = save(noise(), tmp_path / "in/a.png").parent
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").touch()  # of 0 bytes: neither a result nor ours
    for flags in ([], ["--skip_existing"]):
        with monkeypatch.context() as patch:
            patch.setattr(hub, "load", None)  # nothing is done before it is said
            code, lines, _ = run(source, tmp_path / "out", *flags)
        assert code == 2 and "a.png" in lines[0]
    (tmp_path / "out/a.png").unlink()
    (tmp_path / "out/report.json").write_text("{}")
    code, lines, _ = run(source, tmp_path / "out")
    assert code == 2 and "report.json" in lines[0] and (tmp_path / "out/report.json").read_text() == "{}"
    code, _, report = run(source, tmp_path / "out", "--overwrite")
    assert code == 0 and report["counts"]["done"] == 1


def test_results_are_no_inputs(run, tmp_path, capsys):
    source = save(noise(), tmp_path / "in/a.png").parent
    for _ in range(2):  # inside the input folder, but not read the second time
        code, _, report = run(source, source / "larger")
        assert code == 0 and [file["input"] for file in report["files"]] == ["a.png"]
    shutil.rmtree(source / "larger")

    code, lines, _ = run(source, source)
    assert code == 2 and "would replace the input a.png" in lines[0]
    for flags in ([], ["--skip_existing"], []):
        code, _, report = run(source, source, "--suffix", "_x4", *flags)
        assert code == 0 and [file["output"] for file in report["files"]] == ["a_x4.png"]
    assert files(source) == ["a.png", "a_x4.png", "report.json"]


def test_two_inputs_with_one_result(run, tmp_path):
    save(noise(), tmp_path / "in/a.png")
    save(noise(), tmp_path / "in/a.jpg")
    code, lines, _ = run(tmp_path / "in", tmp_path / "out", "--ext", "png")
    assert code == 2 and "a.jpg and a.png would both be" in lines[0] and not (tmp_path / "out").exists()
    code, *_ = run(tmp_path / "in", tmp_path / "out", "--suffix", "_x2", "--outscale", 2)
    assert code == 0 and files(tmp_path / "out") == ["a_x2.jpg", "a_x2.png", "report.json"]


def test_another_extension(run, tmp_path, monkeypatch):
    save(noise("RGBA"), tmp_path / "in/a.png")
    with monkeypatch.context() as patch:  # no time is spent on what could not be written
        patch.setattr(Enlarger, "enlarge", None)
        code, lines, _ = run(tmp_path / "in", tmp_path / "out", "--ext", "jpg")
    assert code == 2 and lines == ["error: a.png: JPEG holds no transparency; expected png, webp or tif"]
    save(noise(), tmp_path / "in/b.gif")
    code, *_ = run(tmp_path / "in", tmp_path / "out", "--ext", "jpg", "--keep_going")
    assert code == 1 and files(tmp_path / "out") == ["b.jpg", "report.json"]
    code, *_ = run(tmp_path / "in", tmp_path / "out", "--ext", "webp")
    assert code == 0 and files(tmp_path / "out") == ["a.webp", "b.jpg", "b.webp", "report.json"]


def test_one_file(run, tmp_path):
    source = save(noise(), tmp_path / "a.png")
    code, _, report = run(source, tmp_path / "out/b.tif", "--outscale", 2)
    assert (code, report) == (0, None) and Image.open(tmp_path / "out/b.tif").size == (10, 12)
    code, *_ = run(source, tmp_path / "folder", "--report", tmp_path / "told/r.json")
    assert code == 0 and files(tmp_path / "folder") == ["a.png"]
    assert json.loads((tmp_path / "told/r.json").read_text())["files"][0]["output"] == "a.png"


def test_a_gray_model(run, tmp_path):
    save(noise("L"), tmp_path / "in/a.png")
    save(noise(), tmp_path / "in/b.png")
    code, lines, report = run(tmp_path / "in", tmp_path / "out", "--keep_going", channels=1)
    assert code == 1 and lines == ["error: b.png: a colour image: expected a gray one, for this model of one channel"]
    assert report["files"][0]["notes"] == [] and Image.open(tmp_path / "out/a.png").mode == "L"


def test_a_model_made_to_enlarge(run, tmp_path, models):
    source = save(noise("RGBA"), tmp_path / "in/a.png")
    flags = ["--outscale", 3, "--plan", "short", "--color_fix", "--hard_consistency", "--tile", 8, "--seed", 5]
    code, lines, report = run(source.parent, tmp_path / "out", *flags, channels="sr")
    assert (code, lines) == (0, [])
    pipeline = pyrdiff.load(models["sr"])
    pipeline.set_progress_bar_config(disable=True)
    seen = fill_hidden(noise("RGBA").convert("RGB"), noise("RGBA").getchannel("A"))
    expected = pipeline(
        seen, 3, plan="short", color_fix=True, hard_consistency=True, tile=8,
        generator=torch.Generator().manual_seed(report["files"][0]["seed"]),
    ).images[0]  # fmt: skip
    given = Image.open(tmp_path / "out/a.png")
    assert given.mode == "RGBA" and given.size == expected.size == (15, 18)
    assert np.abs(np.asarray(given)[..., :3].astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("flags, said, channels", [
    (["--outscale", 2, "--refine_steps", 2], "--refine_steps=2: expected nothing for a model", "sr"),
    (["--outscale", 2, "--plan", "long"], "plan='long'", "sr"),
    (["--outscale", 2, "--plan", "short", "--num_inference_steps", 2], "--num_inference_steps=2: expected", "sr"),
    (["--plan", "short"], "--plan='short': expected nothing for a model trained to generate", 3),
])  # fmt: skip
def test_flags_of_the_other_kind_of_model(run, tmp_path, flags, said, channels):
    save(noise(), tmp_path / "in/a.png")
    code, lines, report = run(tmp_path / "in", tmp_path / "out", *flags, channels=channels)
    assert (code, len(lines), report) == (2, 1, None) and said in lines[0], lines


@pytest.mark.parametrize("flags, said", [
    (["--outscale", 0.5], "--scale_factor=0.5"),
    (["--outscale", "nan"], "--scale_factor=nan"),
    (["--tile", 0], "--tile=0"),
    (["--width", 0], "--width=0"),
    (["--width", 9, "--outscale", 2], "--scale_factor=2.0: expected either it or a size"),
    (["--max_megapixels", 0], "--max_megapixels=0"),
    (["--quality", 101], "--quality=101"),
    (["--detail", 1.5], "--detail=1.5"),
    (["--detail", 0], "--detail=0.0: expected nothing for a model trained to generate"),
    (["--tile", 7], "tile=7"),
    (["--tile", 16, "--tile_pad", 16], "--tile_pad=16"),
    (["--tile_pad", 4], "--tile_pad=4"),
    (["--refine_steps", 0], "--refine_steps=0"),
    (["--suffix", "/x"], "--suffix='/x'"),
    (["--input", "nowhere"], "--input='nowhere': expected a file or a folder"),
    (["--report", "."], "--report='.': expected a file"),
    (["--output", SCRIPT], "expected a folder, as --input is one"),
    (["--output", SCRIPT / "below"], "Not a directory"),
    (["--model", "nowhere"], "'nowhere'"),
    (["--device", "abacus"], "device='abacus'"),
])  # fmt: skip
def test_bad_arguments_are_one_line_and_nothing_is_written(run, tmp_path, flags, said):
    save(noise(), tmp_path / "in/a.png")
    code, lines, report = run(tmp_path / "in", tmp_path / "out", *flags)
    assert (code, len(lines), report) == (2, 1, None) and said in lines[0], lines
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out")


def test_a_folder_that_cannot_be_written_to(run, tmp_path, monkeypatch):
    def refused(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    save(noise(), tmp_path / "in/a.png")
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(hub, "load", None)  # is not reached
    code, lines, _ = run(tmp_path / "in", tmp_path / "out")
    assert code == 2 and len(lines) == 1 and "Permission denied" in lines[0]


def test_nothing_to_do(run, tmp_path):
    (tmp_path / "in").mkdir()
    code, lines, _ = run(tmp_path / "in", tmp_path / "out")
    assert code == 2 and "has no image" in lines[0] and len(lines) == 1


def test_operators_are_the_pipelines():
    (names,) = (field.type for field in fields(UpscaleSettings) if field.name == "operator")
    names = get_args(get_args(names)[0])
    assert set(names) == set(SeparableOperator.NAMES) - {"gray"}  # which turns colour into gray


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_leaves_no_partial_file(run, tmp_path, monkeypatch, number, code):
    for name in ("a.png", "b.png", "c.png"):
        save(noise(), tmp_path / "in" / name)
    whole, seen = Image.Image.save, []

    def slow(image, file, *args, **options):
        if "/.b.png" in file.name:
            file.write(b"half")
            file.flush()
            seen.extend(files(tmp_path / "out"))
            os.kill(os.getpid(), number)
            time.sleep(5)
        whole(image, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        stopped, _, report = run(tmp_path / "in", tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[0].startswith(f".b.png.writing-{os.getpid()}-") and seen[1:] == ["a.png"]
    assert stopped == code and files(tmp_path / "out") == ["a.png", "report.json"]
    assert Image.open(tmp_path / "out/a.png").size == (20, 24)
    assert report["counts"] == {"done": 1, "skipped": 0, "failed": 0, "not reached": 2}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_model_that_gives_no_numbers(run, tmp_path, models):
    pipeline = pyrdiff.load(models[3])
    torch.nn.init.constant_(pipeline.unet.conv_in.weight, 9e17)  # numbers, whose squares are none
    torch.nn.init.normal_(pipeline.unet.conv_in.bias, std=3e17)
    pipeline.save_pretrained(tmp_path / "model")
    source = save(noise(), tmp_path / "a.png")
    code, lines, _ = run(source, tmp_path / "out", "--model", tmp_path / "model")
    assert code == 2 and lines == ["error: a.png: the model gave values that are no numbers"]
    assert not files(tmp_path / "out")


def test_a_full_disk_is_said(run, tmp_path, monkeypatch):
    save(noise(), tmp_path / "in/a.png")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, lines, report = run(tmp_path / "in", tmp_path / "out")
    place = tmp_path / "out/report.json"
    assert code == 2 and len(lines) == 2 and all("bytes were written" in line for line in lines)
    for line, name in zip(lines, ("a.png", place), strict=True):
        assert line.startswith(f"error: {name}: No space left on device (")
    assert report is None and not files(tmp_path / "out")


@pytest.mark.parametrize("channels", [3, "sr"])
def test_a_turned_photograph_is_enlarged_as_it_is_shown(run, tmp_path, channels):
    """All eight are shown as one picture: what comes of them is, too, with the tag as it was."""
    picture = noise(height=6, width=8)
    turns = {1: None, 3: Image.ROTATE_180, 6: Image.ROTATE_90, 8: Image.ROTATE_270, 2: Image.FLIP_LEFT_RIGHT}
    shown = []
    for number, turn in turns.items():
        stored = picture if turn is None else picture.transpose(turn)
        save(stored, tmp_path / f"{number}/a.png", exif=orientation(number))
        run(tmp_path / f"{number}/a.png", tmp_path / f"out{number}", "--outscale", 2, channels=channels)
        with Image.open(tmp_path / f"out{number}/a.png") as image:
            assert image.getexif()[0x0112] == number
            shown.append(np.asarray(ImageOps.exif_transpose(image)))
    for each in shown[1:]:
        np.testing.assert_array_equal(each, shown[0])


def test_hidden_colours_do_not_bleed(run, tmp_path):
    """A disc with three colours under its transparent part looks the same, laid on any colour."""
    rows, columns = np.mgrid[0:16, 0:16]
    alpha = np.where((rows - 8) ** 2 + (columns - 8) ** 2 < 36, 255, 0)[..., None]
    results = []
    for hidden in (0, 60, 255):
        color = np.where(alpha > 0, [230, 60, 40], hidden)
        save(Image.fromarray(np.concatenate([color, alpha], -1).astype(np.uint8)), tmp_path / f"{hidden}/a.png")
        run(tmp_path / f"{hidden}/a.png", tmp_path / "out" / str(hidden), "--outscale", 2)
        results.append(np.asarray(Image.open(tmp_path / "out" / str(hidden) / "a.png")))
    for each in results[1:]:
        np.testing.assert_array_equal(each, results[0])


def test_the_consistency_is_that_of_the_file(run, tmp_path):
    picture = save(noise("RGBA", 12, 12), tmp_path / "in/a.png").parent
    save(noise(height=12, width=12), picture / "b.jpg", quality=95)
    flags = ["--outscale", 2, "--hard_consistency"]
    code, _, report = run(picture, tmp_path / "out", *flags)
    assert code == 0
    for file in report["files"]:
        written, given = Image.open(tmp_path / "out" / file["output"]), Image.open(picture / file["input"])
        operator = SeparableOperator.named("bicubic", (24, 24), (12, 12), 1)
        planes = [np.asarray(each, np.float32).transpose(2, 0, 1)[:, None] / 255 for each in (written, given)]
        off = (operator.A(torch.from_numpy(planes[0])) - torch.from_numpy(planes[1])).abs()
        seen = torch.from_numpy(planes[1][3:]) if len(off) == 4 else torch.ones(1)
        off[:3] *= seen
        assert file["consistency"] == pytest.approx(off.mean().item(), abs=2e-3)
        said = any("hard_consistency is not met" in note for note in file["notes"])
        assert (
            said == (file["largest_difference"] > 1.5 / 255) and file["largest_difference"] >= off.max().item() - 0.01
        )
    assert report["files"][1]["largest_difference"] > 3 / 255  # noise in a JPEG


def test_a_pipe_that_nobody_reads_any_more(tmp_path, models):
    for name in ("a.png", "b.png"):
        save(noise(), tmp_path / "in" / name)
    reader, writer = os.pipe()
    os.close(reader)
    flags = ["--model", models[3], "--input", tmp_path / "in", "--output", tmp_path / "out", "--refine_steps", 2]
    process = warm.start(SCRIPT, *flags, stdout=writer)
    os.close(writer)
    assert process.wait() == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["counts"] == {"done": 2, "skipped": 0, "failed": 0, "not reached": 0}


@pytest.mark.parametrize("height, width", [(1, 9), (9, 1), (3, 5)])
def test_sides_of_few_pixels(run, tmp_path, height, width):
    source = save(noise(height=height, width=width), tmp_path / "a.png")
    for channels in (3, "sr"):
        code, lines, _ = run(source, tmp_path / str(channels) / "b.png", "--outscale", 2, channels=channels)
        assert (code, lines) == (0, []) and Image.open(tmp_path / str(channels) / "b.png").size == (
            2 * width,
            2 * height,
        )


def test_a_format_that_is_not_written_is_refused_before_any_work(run, tmp_path, monkeypatch):
    save(noise(), tmp_path / "in/a.png")
    save(noise("L"), tmp_path / "in/b.gif")
    monkeypatch.setattr(hub, "load", None)
    code, lines, _ = run(tmp_path / "in", tmp_path / "out")
    assert code == 2 and "b.gif: files '.gif' are not written" in lines[0] and not (tmp_path / "out").exists()


class Doubling(DiffusionPipeline):
    """Of another package: it enlarges, and has a network as pipelines have that generate."""

    def __init__(self, unet: CoordinateUNet2DModel, scheduler: DDPMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, image, scale_factor=2, generator=None):
        return BaseOutput(images=[image.resize([side * scale_factor for side in image.size], Image.NEAREST)])


def test_a_pipeline_of_others_that_enlarges_is_used_as_it_is(run, tmp_path, monkeypatch, models):
    saved = pyrdiff.load(models[3])
    monkeypatch.setattr(pyrdiff, "load", lambda model, **_: Doubling(saved.unet, saved.scheduler))
    source = save(noise(), tmp_path / "a.png")
    code, lines, _ = run(source, tmp_path / "out", "--outscale", 2, channels="sr")
    assert (code, lines) == (0, [])
    expected = noise().resize((10, 12), Image.NEAREST)
    assert Image.open(tmp_path / "out/a.png").tobytes() == expected.tobytes()
    code, lines, _ = run(source, tmp_path / "other", "--outscale", 2, "--tile", 8, channels="sr")
    assert code == 2 and "--tile=8: expected nothing for a model trained to enlarge, a Doubling" in lines[0]


def test_what_generates_is_guided_by_the_pipeline_of_its_method(models):
    saved, enlarger = pyrdiff.load(models[3]), enlarging(pyrdiff.load(models["sr"]))
    assert type(enlarging(saved)) is pyrdiff.GuidedSRPipeline and enlarging(saved).unet is saved.unet
    assert type(enlarger) is ResidualSRPipeline


def test_a_name_as_long_as_names_can_be(run, tmp_path):
    source = save(noise(), tmp_path / "in" / ("n" * 251 + ".png")).parent
    code, lines, report = run(source, tmp_path / "out", "--outscale", 2)
    assert (code, lines) == (0, []) and report["counts"]["done"] == 1


@pytest.mark.parametrize("flags, size", [
    (["--outscale", 1.5], (8, 10)),  # of 5 x 7
    (["--outscale", 3.3], (16, 23)),
    (["--outscale", 1], (5, 7)),
    (["--outscale", 4], (20, 28)),
    (["--width", 11], (11, 15)),
    (["--height", 14], (10, 14)),
    (["--width", 12, "--height", 9], (12, 9)),
    (["--width", 4, "--height", 9], (4, 9)),
    (["--width", 3], (3, 4)),
])  # fmt: skip
@pytest.mark.parametrize("channels", [3, "sr"])
def test_any_size(run, tmp_path, flags, size, channels):
    source = save(noise("RGBA", height=7, width=5), tmp_path / "in/a.png").parent
    code, lines, report = run(source, tmp_path / "out", *flags, channels=channels)
    assert (code, lines) == (0, []) and Image.open(tmp_path / "out/a.png").size == size
    (file,) = report["files"]
    assert ("consistency" in file) == (min(size[0] - 5, size[1] - 7) >= 0)
    if channels == "sr":  # made for x2 and x3
        resampled = size not in ((10, 14), (20, 28))
        assert any("{}x{} by Lanczos".format(*size) in note for note in file["notes"]) == resampled
    assert any("enlarged ×2 and ×2" in note for note in file["notes"]) == (channels == "sr" and size[1] in (28, 23))


def test_what_is_resampled_is_the_models_result(run, tmp_path, models):
    source = save(noise(), tmp_path / "in/a.png").parent
    _, _, report = run(source, tmp_path / "out", "--outscale", 2.5, channels="sr")
    pipeline = pyrdiff.load(models["sr"])
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(report["files"][0]["seed"])
    made = pipeline(noise(), 3, generator=generator, output_type="np").images[0]
    bands = [Image.fromarray(made[..., band]).resize((12, 15), Image.LANCZOS) for band in range(3)]
    expected = np.stack([np.asarray(band) for band in bands], -1).clip(0, 1) * 255
    assert np.abs(np.asarray(Image.open(tmp_path / "out/a.png")) - expected).max() <= 1


def test_an_input_is_met_at_any_size(run, tmp_path):
    rows, columns = np.mgrid[60:180:10, 60:180:10]
    smooth = Image.fromarray(np.stack([rows, columns, rows], -1).astype(np.uint8))
    source = save(smooth, tmp_path / "in/a.png").parent
    _, _, report = run(source, tmp_path / "out", "--outscale", 1.7, "--hard_consistency", channels="sr")
    assert report["files"][0]["output_size"] == [20, 20] and report["files"][0]["largest_difference"] < 1.6 / 255


def test_a_result_that_is_too_large(run, tmp_path, monkeypatch):
    source = save(noise(), tmp_path / "in/a.png").parent
    code, lines, _ = run(source, tmp_path / "out", "--width", 50_000, channels="sr")
    assert code == 2 and "a.png: would be 50000x60000, 3,000 megapixels: expected at most 256" in lines[0]
    monkeypatch.setattr("pyrdiff.upscaling.enlarger.free_bytes", lambda device: 2**20)
    code, lines, _ = run(source, tmp_path / "out", "--width", 500, channels="sr")
    assert code == 2 and "500x600 pixels need" in lines[0] and "0.0 GiB are free" in lines[0]


def test_16_bits_go_through_the_network(run, tmp_path, models):
    deep = np.random.default_rng(0).integers(20000, 40000, (6, 5), dtype=np.uint16)
    source = save(Image.fromarray(deep), tmp_path / "in/a.png").parent
    code, lines, report = run(source, tmp_path / "out", "--outscale", 2, channels="sr")
    assert (code, lines) == (0, [])
    pipeline = pyrdiff.load(models["sr"])
    pipeline.set_progress_bar_config(disable=True)
    image = torch.from_numpy(deep / np.float32(65535)).expand(1, 3, -1, -1)
    generator = torch.Generator().manual_seed(report["files"][0]["seed"])
    made = pipeline(image, 2, generator=generator, output_type="np").images[0]
    found = np.asarray(Image.open(tmp_path / "out/a.png")).astype(int)
    assert np.abs(found - 65535 * (made @ np.float32([0.299, 0.587, 0.114]))).max() < 30  # of 257 a level of 8 bits
    assert "gray, enlarged as RGB and saved as its luma" in report["files"][0]["notes"]


@pytest.mark.parametrize("suffix, mode", [(".gif", "RGB"), (".webp", "RGBA"), (".png", "RGB"), (".tif", "RGB")])
def test_frames(run, tmp_path, suffix, mode):
    frames = [noise(mode, seed=seed) for seed in (0, 1, 1, 2)]
    timed = {} if suffix == ".tif" else {"duration": [100, 200, 300, 400], "loop": 3}
    lossless = {"lossless": True} if suffix == ".webp" else {}
    (tmp_path / "in").mkdir()
    frames[0].save(tmp_path / f"in/a{suffix}", save_all=True, append_images=frames[1:], **timed, **lossless)
    code, lines, _ = run(tmp_path / "in", tmp_path / "none", "--outscale", 2, "--keep_going", channels="sr")
    assert code == 1 and "frames" in lines[0] and not list((tmp_path / "none").glob(f"*{suffix}"))
    flags = ["--outscale", 2, "--frames", *(["--lossless"] if lossless else [])]
    code, lines, report = run(tmp_path / "in", tmp_path / "out", *flags, channels="sr")
    assert (code, lines) == (0, [])
    with Image.open(tmp_path / f"out/a{suffix}") as made:
        assert made.size == (10, 12) and report["files"][0]["frames"] in (3, 4) and made.n_frames in (3, 4)
        shown = [(frame.convert("RGBA"), frame.info.get("duration", 0)) for frame in ImageSequence.Iterator(made)]
        assert sum(duration for _, duration in shown) == (0 if suffix == ".tif" else 1000)
        assert made.info.get("loop") == timed.get("loop")
    if suffix != ".gif":  # of few colours; the others have each frame as it is alone, from the same noise
        if made.n_frames == 4:
            assert shown[1][0].tobytes() == shown[2][0].tobytes()
        assert shown[0][0].tobytes() != shown[1][0].tobytes()
    code, lines, _ = run(tmp_path / "in", tmp_path / "other", *flags, "--ext", "jpg", channels="sr")
    assert code == 2 and "hold one" in lines[0]


def test_half(run, tmp_path):
    source = save(noise(height=12, width=12), tmp_path / "in/a.png").parent
    results = []
    for flags in ([], ["--half"]):
        code, lines, _ = run(source, tmp_path / f"out{len(flags)}", "--outscale", 2, *flags, channels="sr")
        assert (code, lines) == (0, [])
        results.append(np.asarray(Image.open(tmp_path / f"out{len(flags)}/a.png")).astype(int))
    assert 0 < np.abs(results[0] - results[1]).mean() < 2


def test_a_model_for_other_pictures_is_said(run, tmp_path, capsys):
    source = save(noise(height=40, width=40), tmp_path / "a.png")
    flags = ["--outscale", 4, "--refine_steps", 2, "--tile", 64]
    main(["--model", "noto-emoji", "--input", str(source), "--output", str(tmp_path / "out"), *map(str, flags)])
    lines = capsys.readouterr().out.splitlines()
    assert "enlarged by noto-emoji into " in lines[0]
    assert lines[1].startswith("1 picture, 40×40 → 160×160 by ") and lines[1].endswith(", by noto-emoji on cpu")
    assert lines[2].startswith("warning: this model draws images of 64x64 (Noto Emoji by Google (Apache-2.0)")


def test_a_result_that_is_far_from_its_picture_is_said(run, tmp_path, models):
    pipeline = pyrdiff.load(models["sr"])
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, 2.0)
    pipeline.save_pretrained(tmp_path / "model")
    source = save(noise().resize((12, 12), Image.BICUBIC), tmp_path / "in/a.png").parent
    flags = ["--outscale", 2, "--model", tmp_path / "model"]
    _, _, report = run(source, tmp_path / "out", *flags, channels="sr")
    assert any("look at it before you use it" in note for note in report["files"][0]["notes"])
