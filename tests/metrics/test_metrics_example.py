"""examples/evaluate.py: one table, one JSON; bad input is one line and exit code 2 before any work."""

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

import pyrdiff
from pyrdiff import hub, metrics
from pyrdiff.metrics import distribution

SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script with flags; what it printed, what it complained of, and its exit code."""

    def call(*flags) -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return *capsys.readouterr(), code

    return call


def write(folder: Path, count: int, seed: int, side: int = 36, suffix: str = ".png") -> np.ndarray:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"image {index}{suffix}")
    return pixels


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_help_does_not_wait_for_torch():
    code = f"import runpy, sys; sys.argv = ['evaluate.py', '--help']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name="
    code += "'__main__')\nexcept SystemExit as stop: assert not stop.code\nassert 'torch' not in sys.modules"
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--reference" in text


def test_two_sets(run, tmp_path, squeezenet_file):
    fake, real = write(tmp_path / "fake", 7, 0), write(tmp_path / "real", 9, 1, suffix=".bmp")
    flags = ["--generated", tmp_path / "fake", "--reference", tmp_path / "real", "--output", tmp_path / "a/scores.json"]
    flags += ["--features", "squeezenet", "--weights", squeezenet_file, "--resamples", 5, "--batch_size", 4]
    printed, complaint, code = run(*flags)
    assert (complaint, code) == ("", 0)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["scores.json"]
    report = json.loads((tmp_path / "a/scores.json").read_text())
    found = {result["name"]: result for result in report["results"]}
    assert list(found) == ["FD-squeezenet", "KD-squeezenet", "precision", "recall"]
    first, *lines, last = printed.splitlines()
    assert "beside" in first and last.endswith(str(tmp_path / "a/scores.json"))
    assert [line.split()[0] for line in lines] == ["metric", *found]
    network = metrics.open_features("squeezenet", squeezenet_file)
    settings = dict(features=network, data_range=(0, 1))
    frechet = metrics.frechet_distance(tensor(real), tensor(fake), **settings)
    assert found["FD-squeezenet"]["value"] == pytest.approx(frechet.value, rel=1e-5)
    low, high = found["FD-squeezenet"]["interval"]
    assert low < frechet.value < high
    conventions = found["KD-squeezenet"]["conventions"]
    assert (conventions["count"], conventions["count_real"]) == (7, 9)
    assert conventions["features"] == network.conventions
    assert report["versions"]["torch"] == torch.__version__ and report["settings"]["seed"] == 0
    assert report["images"]["resize"] is None


def test_the_kernel_of_the_real_images_is_not_summed_again_for_resamples(run, tmp_path, squeezenet_file, monkeypatch):
    fake, real = write(tmp_path / "fake", 7, 0), write(tmp_path / "real", 9, 1)
    flags = ["--generated", tmp_path / "fake", "--reference", tmp_path / "real", "--output", tmp_path / "scores.json"]
    flags += ["--features", "squeezenet", "--weights", squeezenet_file, "--metrics", "kid", "--resamples", 20]
    mean_kernel, counts = distribution._mean_kernel, []
    monkeypatch.setattr(distribution, "_mean_kernel", lambda part: counts.append(len(part)) or mean_kernel(part))
    assert run(*flags)[2] == 0
    assert counts.count(9) == 2, "for the figure and for the interval"
    assert counts.count(7) == 22, "the figure, the interval's figure, and the resamples"
    monkeypatch.undo()
    (found,) = json.loads((tmp_path / "scores.json").read_text())["results"]
    network = metrics.open_features("squeezenet", squeezenet_file)
    features = [network(tensor(part), data_range=(0, 1)) for part in (real, fake)]
    expected = metrics.bootstrap_interval(lambda part: metrics.kid(features[0], part).value, features[1], resamples=20)
    assert found["interval"] == pytest.approx(expected, rel=1e-4)


def test_pairs(run, tmp_path, lpips_heads, alexnet_file):
    ours = [write(tmp_path / "ours", 3, 0), write(tmp_path / "low", 3, 2, side=9)]
    theirs = write(tmp_path / "theirs", 3, 1, suffix=".bmp")
    flags = ["--paired", "--generated", tmp_path / "ours", "--reference", tmp_path / "theirs", "--channels", "y"]
    flags += ["--metrics", "psnr", "ssim", "lpips", "consistency", "--low_res", tmp_path / "low", "--crop_border", 2]
    flags += ["--lpips_weights", alexnet_file, "--output", tmp_path / "scores.json", "--resamples", 50]
    _, complaint, code = run(*flags)
    assert (complaint, code) == ("", 0)
    found = {r["name"]: r for r in json.loads((tmp_path / "scores.json").read_text())["results"]}
    a, b, small = tensor(ours[0]), tensor(theirs), tensor(ours[1])
    unit = dict(data_range=(0, 1))
    expected = [
        metrics.psnr(a, b, channels="y", crop_border=2, **unit),
        metrics.ssim(a, b, channels="y", crop_border=2, **unit),
        metrics.lpips(a, b, weights=alexnet_file, **unit),
        metrics.consistency(a, small, **unit),
    ]
    for result in expected:
        assert found[result.name]["value"] == pytest.approx(result.value, rel=1e-5)
        assert found[result.name]["conventions"] == json.loads(json.dumps(result.conventions))
        low, high = found[result.name]["interval"]
        assert low < result.value < high


def test_equal_pairs_and_a_resolution(run, tmp_path):
    write(tmp_path / "a", 2, 0)
    write(tmp_path / "b", 2, 0, side=40)
    flags = ["--paired", "--generated", tmp_path / "a", "--output", tmp_path / "scores.json", "--reference"]
    assert run(*flags, tmp_path / "a")[2] == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    assert float(report["results"][0]["value"]) == math.inf and report["results"][0]["interval"] is None
    _, complaint, code = run(*flags, tmp_path / "b")
    assert code == 2 and complaint.startswith("error: image 0: has sizes (36, 36) and (40, 40); expected equal ones")
    assert run(*flags, tmp_path / "b", "--resolution", 24)[2] == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    assert "bicubic" in report["images"]["resize"] and report["settings"]["resolution"] == [24]


def test_a_model_against_a_folder(run, tmp_path, squeezenet_file):
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,))
    unet = pyrdiff.CoordinateUNet2DModel(
        image_channels=1, resolutions=(20, 40), layers_per_block=1, norm_num_groups=4, **blocks
    )
    hub.export(pyrdiff.PyramidalPipeline(unet, DDPMScheduler()), tmp_path / "model")
    write(tmp_path / "real", 5, 1, side=40)
    flags = ["--model", tmp_path / "model", "--num_images", 5, "--num_inference_steps", 2, "--refine_steps", 2]
    flags += ["--features", "squeezenet", "--weights", squeezenet_file, "--resamples", 0]
    flags += ["--metrics", "frechet_distance", "--reference", tmp_path / "real", "--output", tmp_path / "scores.json"]
    values = []
    for batch_size in (5, 2):
        _, complaint, code = run(*flags, "--batch_size", batch_size)
        assert code == 0, complaint
        (result,) = json.loads((tmp_path / "scores.json").read_text())["results"]
        assert result["conventions"]["count"] == 5 and result["interval"] is None
        values.append(result["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-2), "image k has its own seed, whatever the batch"
    write(tmp_path / "other", 5, 1, side=38)
    fitted = []
    for more in ([], ["--resolution", 40]):
        printed, complaint, code = run(*flags, "--reference", tmp_path / "other", *more)
        assert code == 0 and ("the reference is fitted to the 40x40" in printed) == (not more), complaint
        fitted.append(json.loads((tmp_path / "scores.json").read_text())["results"][0]["value"])
    assert fitted[0] == fitted[1]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--generated X", "--generated: has sizes"),
        ("--generated none", "--generated='none': expected"),
        ("", "--model=None: expected either it or --generated"),
        ("--generated G --model M", "--model='.*': expected either it or --generated"),
        ("--generated R --metrics psnr", r"--metrics=\('psnr',\): expected some of .* without --paired"),
        ("--generated R --paired --metrics kid", r"--metrics=\('kid',\): expected some of .* with --paired"),
        ("--generated G --paired", "G, .*R: 1 names are in one only, such as 'image 4'"),
        ("--generated R --paired --metrics consistency", "--low_res=None: expected the inputs"),
        ("--generated R --paired --crop_border 99", "crop_border=99"),
        ("--generated R --features resnet", "--features='resnet'"),
        ("--generated R --weights none", "--weights='none': expected a file"),
        ("--generated R --resolution 0", r"--resolution=\(0,\)"),
        ("--generated R --batch_size 0", "--batch_size=0"),
        ("--generated R --resamples 1", "--resamples=1"),
        ("--generated R --device abacus", "device='abacus'"),
        ("--generated R --metrics fid", "argument '--metrics'.*'kid'"),
        ("--model SR", "--model: a ResidualSRPipeline enlarges images; .*pyrdiff upscale"),
        ("--generated B", "bad image .*image 1.png: "),
        ("--generated R --paired --metrics lpips --lpips_weights none", "weights='none'"),
        ("--model none", "--model='none': expected a folder"),
        ("--model R", "--model='R': expected a saved pipeline"),
    ],
)
def test_bad_input_is_one_line(flags, message, run, tmp_path, monkeypatch, squeezenet_file, lpips_heads):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "R", 5, 0, side=34)
    write(tmp_path / "G", 4, 0, side=36)
    write(tmp_path / "X", 5, 0, side=36)
    write(tmp_path / "X", 4, 0, side=34)
    write(tmp_path / "B", 5, 0, side=34)
    if "SR" in flags:
        unet = pyrdiff.ResidualSRUNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8)
        pyrdiff.ResidualSRPipeline(unet, pyrdiff.CosineResidualScheduler(100)).save_pretrained(tmp_path / "SR")
    (tmp_path / "B/image 1.png").write_bytes((tmp_path / "B/image 1.png").read_bytes()[:300])
    flags = flags.split()
    if "--weights" not in flags:
        flags += ["--weights", str(squeezenet_file)]
    if "--features" not in flags:
        flags += ["--features", "squeezenet"]
    printed, complaint, code = run(*flags, "--reference", "R", "--output", "scores.json")
    assert code == 2 and printed.count("\n") <= 1 and "metric  " not in printed, "what would be done, at most"
    assert complaint.count("\n") == 1
    assert complaint.startswith("error: ")
    assert re.search(message, complaint), complaint
    assert not (tmp_path / "scores.json").exists()
