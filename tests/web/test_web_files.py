"""Results as files: they say how they were made, and a client's words are no paths."""

import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import pyrdiff
from pyrdiff.web.files import file_name, forget, results_folder, save_run


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temp"))
    return tmp_path / "temp"


def test_a_run_is_saved_with_how_it_was_made():
    images = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    facts = [{"model": "m", "seed": 7, "plan": "fast"}, {"model": "m", "seed": 8, "plan": "fast"}]
    saved = save_run("owner", images, ["m_seed7", "m_seed8"], facts, "m")
    assert [Path(path).name for path in saved.images] == ["m_seed7.png", "m_seed8.png"]
    for path, image, fact in zip(saved.images, images, facts, strict=True):
        with Image.open(path) as again:
            assert again.tobytes() == image.tobytes()
            assert json.loads(again.text["pyrdiff"]) == {"flags": fact, "version": pyrdiff.__version__}
    with zipfile.ZipFile(saved.archive) as together:
        assert together.namelist() == ["m_seed7.png", "m_seed8.png", "settings.json"]
        assert json.loads(together.read("settings.json"))["m_seed8.png"]["seed"] == 8
        assert together.read("m_seed7.png") == Path(saved.images[0]).read_bytes()


def test_runs_and_visitors_do_not_write_over_each_other(temporary):
    image = Image.new("L", (3, 2))
    paths = [save_run(owner, [image], ["same"], [{}], "same").images[0] for owner in ("one", "one", "a/../../two")]
    assert len(set(paths)) == 3 and len({Path(path).parent.parent for path in paths}) == 2
    assert all(Path(path).is_relative_to(temporary) for path in paths)
    forget("one")
    assert not results_folder("one").exists() and Path(paths[2]).is_file()


@pytest.mark.parametrize("text, name", [
    ("noto-emoji_fast_seed7", "noto-emoji_fast_seed7"),
    ("../../etc/passwd", "etc-passwd"),
    ("a b\x00c/d\\e:f", "a-b-c-d-e-f"),
    ("..", "image"),
    ("", "image"),
    ("漢" * 80, "漢" * 24 + "-" + "漢" * 25),
])  # fmt: skip
def test_names_are_those_of_files_everywhere(text, name):
    assert file_name(text) == name


def test_long_names_keep_their_seeds_apart():
    one, two = (file_name(f"{'long' * 20}_seed{seed}") for seed in (11, 12))
    assert one != two and one.endswith("_seed11") and len(one) == 50
