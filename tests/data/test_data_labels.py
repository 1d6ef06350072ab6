"""Classes of images: where they are read from, and how they travel with their images."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pyrdiff.data import ImageLevels, MultiScaleBatches, open_source
from pyrdiff.data.labels import Labels
from pyrdiff.data.sources import HubImages

COLORS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 200, 30)}


@pytest.fixture
def folder(tmp_path):
    """Sub-folders called as the colour of their images; one of them is deeper."""
    for index in range(9):
        name = list(COLORS)[index % 3]
        path = tmp_path / "images" / name / ("deep/er" if index == 4 else "") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), COLORS[name]).save(path)
    return tmp_path / "images"


def color_of(pixels: np.ndarray) -> str:
    """The name of what an image [H, W, C] or its mean [C] shows."""
    mean = pixels.reshape(-1, 3).mean(0)
    return min(COLORS, key=lambda name: np.abs(mean - COLORS[name]).sum())


def test_sub_folders_are_classes_and_stay_with_their_images(folder):
    source = open_source(folder, class_labels=True)
    assert source.labels.names == ("blue", "green", "red")
    images = ImageLevels.build(source, [4, 8])
    for array in images.arrays:
        assert [color_of(image) for image in array] == [images.labels.names[n] for n in images.labels.numbers]
    batches = MultiScaleBatches(images, 4, random_flip=True, seed=3)
    seen = set()
    for step in range(12):
        batch = batches.draw(step)
        assert batch.labels.dtype == torch.int64
        pixels = batch.images.permute(0, 2, 3, 1).numpy()
        assert [color_of(image) for image in pixels] == [images.labels.names[n] for n in batch.labels]
        seen |= set(batch.labels.tolist())
    assert seen == {0, 1, 2}
    assert MultiScaleBatches(ImageLevels.build(folder, [4, 8]), 4).draw(0).labels is None


def test_classes_are_part_of_the_fingerprint_and_share_the_cache(folder, tmp_path):
    def build(labelled: bool) -> ImageLevels:
        return ImageLevels.build(open_source(folder, class_labels=labelled), [8], cache_dir=tmp_path / "cache")

    plain, first, second = build(False), build(True), build(True)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert first.fingerprint == second.fingerprint != plain.fingerprint
    assert list(first.labels.numbers) == list(second.labels.numbers)
    pixels = np.stack(plain.arrays[0])
    names = open_source(folder).names
    swapped = ImageLevels([8], [pixels], names, labels=first.labels._replace(numbers=2 - first.labels.numbers))
    renamed = ImageLevels([8], [pixels], names, labels=first.labels._replace(names=("a", "b", "c")))
    same = ImageLevels([8], [pixels], names, labels=first.labels)
    assert same.fingerprint == first.fingerprint
    assert len({same.fingerprint, swapped.fingerprint, renamed.fingerprint}) == 3


def test_an_image_that_is_left_out_takes_its_label_with_it(folder):
    (folder / "blue" / "0broken.png").write_bytes(b"no image")
    images = ImageLevels.build(open_source(folder, class_labels=True), [8], on_bad_image="skip")
    assert len(images.bad) == 1 and len(images.labels.numbers) == len(images) == 9
    assert [color_of(image) for image in images.arrays[0]] == [images.labels.names[n] for n in images.labels.numbers]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("beside", r"1 images of .* lie in no sub-folder, such as beside.png"),
        ("empty", r"class_labels: .*yellow' has no image"),
        ("text", r"class_labels: .*yellow' has no image"),
        ("unreadable", "class 'yellow' has no image that can be read"),
        ("control", r"a class is called 'a\\nb'"),
        ("undecodable", r"a class is called 'a\\udcff'"),
    ],
)
def test_folders_that_are_refused(folder, damage, named):
    images = folder / {"control": "a\nb", "undecodable": "a\udcff"}.get(damage, "yellow")
    if damage == "beside":
        Image.new("RGB", (8, 8)).save(folder / "beside.png")
    else:
        images.mkdir()
    if damage in ("text", "unreadable"):
        (images / ("notes.txt" if damage == "text" else "broken.png")).write_bytes(b"no image")
    if damage in ("control", "undecodable"):
        with open(images / "image.png", "wb") as file:
            Image.new("RGB", (8, 8)).save(file, "PNG")
    with pytest.raises(ValueError, match=named):
        ImageLevels.build(open_source(folder, class_labels=True), [8], on_bad_image="skip")
    if damage in ("empty", "text"):
        assert len(open_source(folder)) == 9, "without classes it is no matter"


def test_what_runs_of_ours_wrote_is_no_class(folder):
    settings = json.dumps({"output_dir": "runs/mine", "train_data_dir": ".", "max_train_steps": 3})
    (folder / "runs" / "mine").mkdir(parents=True)
    (folder / "runs" / "mine" / "settings.json").write_text(settings)
    (folder / "other" / "samples").mkdir(parents=True)
    (folder / "other" / "settings.json").write_text(settings)
    Image.new("RGB", (8, 8)).save(folder / "other" / "samples" / "step-3.png")
    (folder / ".hidden").mkdir()
    assert open_source(folder, leave_out_runs=True, class_labels=True).labels.names == ("blue", "green", "red")


ARRAY = np.zeros((4, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "names", "numbers"),
    [
        ({"x_train": ARRAY, "y_train": np.array([9, 2, 10, 2])}, ("2", "9", "10"), [1, 0, 2, 0]),
        ({"images": ARRAY, "labels": np.array([[1], [0], [1], [1]], np.uint8)}, ("0", "1"), [1, 0, 1, 1]),
        ({"images": ARRAY, "labels": np.array(["cat", "dog", "cat", "ape"])}, ("ape", "cat", "dog"), [1, 2, 1, 0]),
    ],
)
def test_classes_beside_the_images_of_an_npz(tmp_path, arrays, names, numbers):
    np.savez(tmp_path / "set.npz", **arrays)
    labels = open_source(tmp_path / "set.npz", class_labels=True).labels
    assert labels.names == names and labels.numbers.tolist() == numbers
    assert open_source(tmp_path / "set.npz").labels is None


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ({}, r"has only \['x_train'\]; expected one of"),
        ({"y_train": np.arange(3)}, r"is int64 \[3\]; expected whole numbers or strings, \[4\]"),
        ({"y_train": np.arange(4.0)}, r"is float64 \[4\]"),
        ({"y_train": np.eye(4, dtype=int)}, r"is int64 \[4, 4\]"),
        ({"y_train": np.array(["a", None, "b", "c"], object)}, "cannot be read"),
        ({"y_train": np.array(["a", "", "b", "c"])}, "a class is called ''"),
    ],
)
def test_arrays_that_are_refused(tmp_path, labels, named):
    np.savez(tmp_path / "set.npz", x_train=ARRAY, **labels)
    with pytest.raises(ValueError, match=named):
        open_source(tmp_path / "set.npz", class_labels=True)


def test_arrays_without_names_have_no_classes(tmp_path):
    np.save(tmp_path / "images.npy", ARRAY)
    for source in ("glyphs", ARRAY, tmp_path / "images.npy"):
        with pytest.raises(ValueError, match="expected for a folder, a .npz file or a Hub data set only"):
            open_source(source, class_labels=True)


def test_the_column_of_classes_of_a_data_set():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "ape", "cat"])})
    images = [Image.new("L", (8, 8)) for _ in range(4)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [2, 0, 2, 2]}, features=features)
    labels = HubImages(rows, "pets", class_labels=True).labels
    assert labels.names == ("cat", "dog") and labels.numbers.tolist() == [0, 1, 0, 0]
    unknown = datasets.Dataset.from_dict({"image": images, "label": [2, -1, 2, None]}, features=features)
    with pytest.raises(ValueError, match="label of pets has rows without a class"):
        HubImages(unknown, "pets", class_labels=True)
    with pytest.raises(ValueError, match=re.escape("has the columns of classes []; expected one")):
        HubImages(rows.remove_columns("label"), "pets", class_labels=True)


def test_labels_that_do_not_fit_their_images():
    with pytest.raises(ValueError, match="labels: 3 for 4 images"):
        ImageLevels([8], [ARRAY[..., None]], list("abcd"), labels=Labels(("x",), np.zeros(3, int)))


# A table beside the images.


@pytest.fixture
def flat(tmp_path):
    """Images of three colours, one of them in a sub-folder, and {path: colour}."""
    colors = {"a.png": "red", "b.png": "blue", "more/c.png": "red", "d.png": "green"}
    for name, color in colors.items():
        (tmp_path / "flat" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), COLORS[color]).save(tmp_path / "flat" / name)
    return tmp_path / "flat", colors


def as_table(rows: list[dict], kind: str) -> str:
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("extra", [{}, {"text": "a picture"}])
def test_a_table_says_the_classes(flat, kind, extra):
    folder, colors = flat
    column = "label" if extra else "colour"
    rows = [{"file_name": name, **extra, column: color} for name, color in reversed(colors.items())]
    (folder / f"metadata.{kind}").write_text(as_table(rows, kind), encoding="utf-8-sig" if kind == "csv" else "utf-8")
    source = open_source(folder, class_labels=True)
    assert source.labels.names == ("blue", "green", "red")
    images = ImageLevels.build(source, [8])
    assert [color_of(image) for image in images.arrays[0]] == [images.labels.names[n] for n in images.labels.numbers]


def test_numbers_in_a_table_are_sorted_as_such(flat):
    folder, colors = flat
    rows = [{"file_name": name, "label": 10 * index} for index, name in enumerate(colors)]
    (folder / "metadata.jsonl").write_text(as_table(rows, "jsonl"))
    assert open_source(folder, class_labels=True).labels.names == ("0", "10", "20", "30")


HEAD = "file_name,label\n"
ROWS = "a.png,x\nb.png,x\nd.png,y\nmore/c.png,y\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metadata.csv", HEAD + ROWS.replace("d.png,y\n", ""), "has no row for 'd.png', an image beside it"),
        ("metadata.csv", HEAD + ROWS + "e.png,x\n", "has a row for 'e.png', which is no image there"),
        ("metadata.csv", HEAD + ROWS + "../a.png,x\n", "has a row for '../a.png', which is no image there"),
        ("metadata.csv", HEAD + ROWS + "a.png,y\n", "line 6 .* has 'a.png' again, with another label"),
        ("metadata.csv", HEAD + "a.png\n", "line 2 .* has 1 cells; expected 2"),
        ("metadata.csv", HEAD + "a.png,\n", "line 2 .* has label=''; expected a name or a whole number"),
        ("metadata.csv", "file,label\na.png,x\n", r"line 2 .* has the columns \['file', 'label'\]; expected file_name"),
        ("metadata.csv", "file_name,a,b\na.png,1,2\n", "expected file_name, and label or just one other"),
        ("metadata.csv", "", "has no row for 'a.png'"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1.5}\n', "line 1 .* has label=1.5; expected a name"),
        ("metadata.jsonl", '{"file_name": 3, "label": 1}\n', "line 1 .* has file_name=3; expected the path"),
        ("metadata.jsonl", "[1]\n", "line 1 .* is no object"),
        ("metadata.jsonl", "{\n", "line 1 of"),
        ("metadata.csv", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_tables_are_one_line(flat, name, text, said):
    folder, _ = flat
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said) as caught:
        open_source(folder, class_labels=True)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("class_labels")
    assert len(open_source(folder)) == 4  # and is nothing to a training without classes
