"""What a folder of images holds: what is taken and what is not is said in one line, and what runs wrote is left out."""

import numpy as np
import pytest
from PIL import Image

from pyrdiff.data import list_images, look_into, open_source
from pyrdiff.parts.outputs import Outputs


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def said(folder, **options) -> str:
    return str(look_into(folder, **options)).removeprefix(f"{folder}: ")


def test_what_is_not_taken_is_counted_by_ending(tmp_path):
    fill(tmp_path, *(f"{number}.jpg" for number in range(4)), "a.PNG", "labels.txt", ".hidden.txt", "README")
    fill(tmp_path, *(f"{number}.xyz" for number in range(30)))
    assert said(tmp_path) == "5 images taken (4 .jpg, 1 .png); not taken: 30 .xyz, 1 without ending, 1 .txt"


def test_folders_that_are_merged_are_counted(tmp_path):
    fill(tmp_path, "images/a.png", "images/deep/b.png", "masks/a.png", "top.png")
    assert said(tmp_path) == "4 images taken (4 .png; from 2 images/, 1 masks/, 1 beside)"
    fill(tmp_path, *(f"class {number}/a.png" for number in range(20)))
    assert said(tmp_path).endswith("1 class 14/, 14 others, 1 beside)")


def test_a_folder_without_images_says_what_is_there(tmp_path):
    fill(tmp_path, "a.raw", "b.raw", "notes.txt")
    with pytest.raises(ValueError, match=r"has no image, only 2 .raw, 1 .txt: expected files such as"):
        list_images(tmp_path)


def test_heic_is_read_where_the_extra_is_and_named_where_not(tmp_path):
    try:
        import pillow_heif
    except ImportError:
        fill(tmp_path, "a.jpg", *(f"{number}.HEIC" for number in range(30)))
        line = "1 images taken (1 .jpg); not taken: 30 .heic (pip install pillow-heif to read .heic)"
        assert said(tmp_path) == line
        return
    pixels = np.full((16, 24, 3), (200, 60, 40), np.uint8)
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "a.HEIC", quality=100)
    source = open_source(tmp_path)
    assert len(source) == 1 and said(tmp_path) == "1 images taken (1 .heic)"
    from pyrdiff.data import decode_image

    assert np.abs(np.asarray(decode_image(source.read(0), 3)).astype(int) - pixels).max() <= 6


def test_what_runs_wrote_is_left_out_unless_it_is_all_there_is(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    run = Outputs("upscale", {})
    for name in ("a_x4.png", "larger/b.png"):
        (tmp_path / "larger").mkdir(exist_ok=True)
        with run.replacing(tmp_path / name) as beside:
            beside.write_text(name)
    assert said(tmp_path, leave_out_runs=True).endswith("not taken: 2 that runs of pyrdiff wrote")
    assert [path.name for path in look_into(tmp_path, leave_out_runs=True).images] == ["a.png", "b.png"]
    assert open_source(tmp_path, leave_out_runs=True).paths == [tmp_path / "a.png", tmp_path / "b.png"]
    assert len(list_images(tmp_path)) == 4
    assert look_into(tmp_path / "larger", leave_out_runs=True).images == [tmp_path / "larger" / "b.png"]
    (tmp_path / "a_x4.png").write_text("the user's, by now")
    assert len(look_into(tmp_path, leave_out_runs=True).images) == 3
