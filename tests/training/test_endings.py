"""How trainings begin and end beside other things: their own pictures, other trainings, removed folders, signals."""

from pathlib import Path

import numpy as np
from PIL import Image

from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
from pyrdiff.training.loop import prepare, train


def pictures(folder: Path, count: int = 12) -> Path:
    """A folder of images of 16×16 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def test_a_training_does_not_train_on_its_own_pictures(toy, tmp_path, capsys):
    folder = pictures(tmp_path / "data")
    changes = dict(train_data_dir=str(folder), output_dir=str(folder / "run"), save_images_steps=1, eval_batch_size=1)
    train(METHOD, PyramidalSettings(**toy(**changes, max_train_steps=2)))
    assert len(list((folder / "run" / "samples").glob("*.png"))) == 2
    (folder / "photo.heix").touch()
    capsys.readouterr()
    run = prepare(METHOD, PyramidalSettings(**toy(**changes, max_train_steps=2)))
    assert len(run.images) == 12 and run.step == 2, "the same images, so that it resumes"
    line = f"{folder}: 12 images taken (12 .png); not taken: "
    (said,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith(line)]
    assert "1 .heix" in said and "2 that runs of pyrdiff wrote" in said
