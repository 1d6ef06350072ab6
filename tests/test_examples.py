"""The short examples, each run as a script on toy sizes."""

from pathlib import Path

import numpy as np
import pytest
import warm
from diffusers import DDPMScheduler
from PIL import Image

import pyrdiff
from pyrdiff.data import draw_glyphs

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ("classes", "enlarge_folder", "inpaint", "modular", "own_scheduler", "train_sample_publish")
TOY = ("--minutes", "0.02", "--resolution", "8", "16", "--preset", "tiny")


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """A folder of coloured letters with a sub-folder for A and one for B."""
    folder = tmp_path_factory.mktemp("letters")
    for letter in "AB":
        (folder / letter).mkdir()
        for number, pixels in enumerate(draw_glyphs(16, 12, letter)):
            Image.fromarray(np.stack([pixels] * 3, -1)).save(folder / letter / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(letters, tmp_path_factory) -> Path:
    """What the first example makes."""
    folder = tmp_path_factory.mktemp("run")
    warm.run(EXAMPLES / "train_sample_publish.py", letters, folder, *TOY, check=True)
    return folder


@pytest.mark.parametrize("name", SHORT)
def test_they_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 40


def test_train_sample_publish(run):
    assert all(Image.open(run / f"sample-{number}.png").size == (16, 16) for number in range(4))
    assert pyrdiff.load(run / "pipeline").unet.config.resolutions == [8, 16]


def test_enlarge_folder(run, letters, tmp_path):
    done = warm.run(EXAMPLES / "enlarge_folder.py", run / "pipeline", letters / "A", tmp_path, check=True)
    assert {Image.open(path).size for path in tmp_path.glob("*.png")} == {(32, 32)}
    assert done.stdout.count("it differs from the input by 0.") == 12


def test_classes(letters, tmp_path):
    warm.run(EXAMPLES / "classes.py", letters, tmp_path, *TOY, check=True)
    assert Image.open(tmp_path / "classes.png").size == (8 * 16, 2 * 16)


def test_inpaint(letters, tmp_path):
    picture = Image.open(letters / "A" / "0.png").resize((64, 64))
    picture.save(tmp_path / "in.png")
    network = pyrdiff.CoordinateUNet2DModel.from_preset("tiny", resolutions=(64,))
    pyrdiff.hub.export(pyrdiff.PyramidalPipeline(network, DDPMScheduler(clip_sample=True)), tmp_path / "model")
    arguments = (tmp_path / "model", tmp_path / "in.png", tmp_path / "out.png", "--box", 0, 0, 64, 32)
    warm.run(EXAMPLES / "inpaint.py", *map(str, arguments), check=True)
    before, after = (np.asarray(image, dtype=float) for image in (picture, Image.open(tmp_path / "out.png")))
    assert np.abs(after - before)[32:].max() <= 1 and np.abs(after - before)[:32].max() > 50


def test_own_scheduler(tmp_path):
    warm.run(EXAMPLES / "own_scheduler.py", "noto-emoji", tmp_path / "out.png", check=True)
    pixels = np.asarray(Image.open(tmp_path / "out.png"), dtype=float)
    assert pixels.shape == (128, 512, 3) and np.abs(pixels[:64] - pixels[64:]).mean() > 1


def test_modular(tmp_path):
    warm.run(EXAMPLES / "modular.py", "noto-emoji", tmp_path / "out.png", check=True)
    assert Image.open(tmp_path / "out.png").size == (128, 128)
