"""Image levels: what they hold, bad images, and the cache on disk."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyrdiff.data import ImageLevels, fit_image, open_source
from pyrdiff.data import levels as levels_module
from pyrdiff.data.sources import ImageSource, Some


def noise(count: int = 5, height: int = 32, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three good images in two folders, named in order; returns the folder."""
    path = tmp_path / "images"
    (path / "sub").mkdir(parents=True)
    for name, pixels in zip(["a.png", "c.png", "sub/d.png"], noise(3), strict=True):
        Image.fromarray(pixels).save(path / name)
    return path


def add_bad(folder: Path) -> None:
    (folder / "b.png").write_bytes(b"")
    (folder / "e.png").write_text("not an image")
    whole = (folder / "a.png").read_bytes()
    (folder / "f.png").write_bytes(whole[: len(whole) // 2])


def same(one: ImageLevels, two: ImageLevels) -> bool:
    arrays = all(np.array_equal(a, b) for a, b in zip(one.arrays, two.arrays, strict=True))
    fields = ("sizes", "names", "bad", "composited", "enlarged", "fingerprint")
    return arrays and all(getattr(one, field) == getattr(two, field) for field in fields)


def count_decoding(monkeypatch) -> list:
    decoded = []

    def decode_image(*args):
        decoded.append(args[-1])
        return original(*args)

    original = levels_module.decode_image
    monkeypatch.setattr(levels_module, "decode_image", decode_image)
    return decoded


def test_every_level_is_made_from_the_original(folder, monkeypatch):
    decoded = count_decoding(monkeypatch)
    levels = ImageLevels.build(folder, [8, (16, 20), 32])
    assert levels.sizes == [(8, 8), (16, 20), (32, 32)] and levels.channels == 3 and len(levels) == 3
    assert sorted(decoded) == levels.names == [str(folder / name) for name in ("a.png", "c.png", "sub/d.png")]
    for size, array in zip(levels.sizes, levels.arrays, strict=True):
        for pixels, original in zip(array, noise(3), strict=True):
            assert np.array_equal(pixels, np.asarray(fit_image(Image.fromarray(original), *size)))


def test_gray_arrays():
    images = noise(7, 28, 28, 1)[..., 0]
    levels = ImageLevels.build(images, [7, 14, 28], channels=1)
    assert [array.shape for array in levels.arrays] == [(7, 7, 7, 1), (7, 14, 14, 1), (7, 28, 28, 1)]
    assert np.array_equal(levels.arrays[-1][..., 0], images)


def test_threads_do_not_change_the_order():
    images = noise(150, 8, 8)
    one, two = (ImageLevels.build(images, [4, 8], num_threads=threads) for threads in (1, 2))
    assert same(one, two) and np.array_equal(two.arrays[-1], images)


def test_stop_names_the_first_bad_image(folder):
    add_bad(folder)
    with pytest.raises(ValueError, match="bad image .*b.png: empty file"):
        ImageLevels.build(folder, [8, 16])


@pytest.mark.parametrize("cached", [False, True])
def test_skip_names_each_bad_image_once(folder, tmp_path, caplog, cached):
    good = ImageLevels.build(folder, [8, 16])
    add_bad(folder)
    with caplog.at_level(logging.WARNING):
        levels = ImageLevels.build(folder, [8, 16], on_bad_image="skip", cache_dir=tmp_path / "c" if cached else None)
    names = [str(folder / name) for name in ("b.png", "e.png", "f.png")]
    assert [name for name, _ in levels.bad] == names
    assert [record.message for record in caplog.records] == [f"skipped {name}: {reason}" for name, reason in levels.bad]
    assert levels.names == good.names and levels.fingerprint == good.fingerprint
    assert all(np.array_equal(a, b) for a, b in zip(levels.arrays, good.arrays, strict=True))


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").write_text("text")
    with pytest.raises(ValueError, match="none of its 2 images.*a.png: empty"):
        ImageLevels.build(tmp_path, [8], on_bad_image="skip")


def test_large_images_are_bad(folder):
    Image.new("RGB", (40, 40)).save(folder / "b.png")
    levels = ImageLevels.build(folder, [8], on_bad_image="skip", max_pixels=32 * 32)
    assert levels.bad == [(str(folder / "b.png"), "too large: 40×40 pixels, more than max_pixels=1024")]


def test_composited_and_enlarged_are_counted():
    images = noise(4, 16, 16, 4)
    images[..., 3] = 255
    images[1, 0, 0, 3] = 254
    images[3, ..., 3] = 0
    levels = ImageLevels.build(images, [8, 16], background=(1, 2, 3))
    assert levels.composited == 2 and levels.enlarged == 0
    assert (levels.arrays[0][3] == [1, 2, 3]).all()
    assert ImageLevels.build(images, [8, 17]).enlarged == 4
    assert ImageLevels.build(noise(4, 16, 32), [8, 17]).enlarged == 4  # in height alone


def test_fingerprint_follows_pixels_sizes_and_channels(monkeypatch):
    monkeypatch.setattr(levels_module, "HASH_ROWS", 3)  # the changed image is in the second chunk
    images = noise(4, 16, 16)
    fingerprint = ImageLevels.build(images, [8, 16]).fingerprint
    assert fingerprint == ImageLevels.build(images, [8, 16]).fingerprint
    changed = images.copy()
    changed[3, 15, 15, 2] ^= 1
    others = [
        ImageLevels.build(changed, [8, 16]),
        ImageLevels.build(images, [4, 16]),
        ImageLevels.build(images, [8, 16], channels=1),
    ]
    assert len({fingerprint} | {other.fingerprint for other in others}) == 4


def test_cache_is_reused(folder, tmp_path, monkeypatch):
    add_bad(folder)
    options = {"sizes": [8, 16], "on_bad_image": "skip", "cache_dir": tmp_path / "cache"}
    first = ImageLevels.build(folder, **options)
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in first.arrays)
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert same(first, ImageLevels.build(folder, **options | {"cache_dir": None}))

    decoded = count_decoding(monkeypatch)
    assert same(first, ImageLevels.build(folder, **options)) and not decoded
    with pytest.raises(ValueError, match="b.png: empty file"):
        ImageLevels.build(folder, **options | {"on_bad_image": "stop"})
    assert not decoded


def test_cache_is_not_reused_for_something_else(folder, tmp_path, monkeypatch):
    options = {"sizes": [8, 16], "cache_dir": tmp_path / "cache"}
    ImageLevels.build(folder, **options)
    decoded = count_decoding(monkeypatch)
    for change in ({"sizes": [8, 12]}, {"channels": 1}, {"background": (0, 0, 0)}):
        ImageLevels.build(folder, **options | change)
        assert len(decoded) == 3
        decoded.clear()
    Image.fromarray(noise(1, seed=1)[0]).save(folder / "b.png")
    assert len(ImageLevels.build(folder, **options)) == 4 and len(decoded) == 4


@pytest.mark.parametrize("damage", ["truncate", "remove", "empty json", "no json", "other shape"])
def test_damaged_cache_is_made_anew(folder, tmp_path, monkeypatch, damage):
    options = {"sizes": [8, 16], "cache_dir": tmp_path / "cache"}
    first = ImageLevels.build(folder, **options)
    expected = ImageLevels(first.sizes, [np.array(array) for array in first.arrays], first.names)
    del first
    (array,) = (tmp_path / "cache").rglob("16x16.npy")
    if damage == "truncate":
        array.write_bytes(array.read_bytes()[:-1])
    elif damage == "remove":
        array.unlink()
    elif damage == "empty json":
        (array.parent / "levels.json").write_text("")
    elif damage == "no json":
        (array.parent / "levels.json").unlink()
    else:
        np.save(array, noise(2, 16, 16))
    decoded = count_decoding(monkeypatch)
    assert same(expected, ImageLevels.build(folder, **options)) and len(decoded) == 3
    assert same(expected, ImageLevels.build(folder, **options)) and len(decoded) == 3


def test_failed_build_leaves_nothing_that_counts(folder, tmp_path):
    add_bad(folder)
    with pytest.raises(ValueError, match="bad image"):
        ImageLevels.build(folder, [8, 16], cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_cache_says_what_it_is(folder, tmp_path):
    levels = ImageLevels.build(folder, [8, (16, 12)][:1] + [(16, 12)], channels=1, cache_dir=tmp_path)
    (path,) = tmp_path.rglob("levels.json")
    record = json.loads(path.read_text())
    assert record["sizes"] == [[8, 8], [16, 12]] and record["channels"] == 1 and record["count"] == 3
    assert record["fingerprint"] == levels.fingerprint and record["source"] == open_source(folder).key()


def test_two_at_once_make_the_same_cache(folder, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(ImageLevels.build, folder, [8, 16], cache_dir=tmp_path / "cache") for _ in range(2)]
        one, two = (build.result() for build in builds)
    assert same(one, two) and same(one, ImageLevels.build(folder, [8, 16]))
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 3


def test_array_cache(tmp_path, monkeypatch):
    images = noise(4, 16, 16)
    first = ImageLevels.build(images, [8, 16], cache_dir=tmp_path)
    decoded = count_decoding(monkeypatch)
    assert same(first, ImageLevels.build(images.copy(), [8, 16], cache_dir=tmp_path)) and not decoded


@pytest.mark.parametrize("sizes", [[], [0], [16, 8], [8, 8], [(8, 8), (16, 8)], [(8, 8, 3)], [8.0]])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="^sizes="):
        ImageLevels.build(noise(), sizes)


@pytest.mark.parametrize("name, value", [("channels", 2), ("on_bad_image", "ignore"), ("num_threads", 0)])
def test_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value!r}"):
        ImageLevels.build(noise(), [8], **{name: value})


def test_arrays_must_fit():
    with pytest.raises(ValueError, match=r"^arrays=uint8 \[5, 32, 32, 3\] for level 16×16"):
        ImageLevels([16], [noise()], list("abcde"))
    with pytest.raises(ValueError, match="^arrays=float64"):
        ImageLevels([32], [noise().astype(float)], list("abcde"))


# Images that would be enlarged.


def test_a_small_image_is_a_bad_image_where_enlarging_is_not_allowed(folder, caplog):
    Image.fromarray(noise(1, 32, 31)[0]).save(folder / "b.png")
    Image.fromarray(noise(1, 31, 40)[0]).save(folder / "sub" / "e.png")
    Image.fromarray(noise(1, 40, 33)[0]).save(folder / "f.png")
    with pytest.raises(ValueError, match=r"bad image .*b.png: 32x31 pixels, smaller than 32x32 .*on_bad_image='skip'"):
        ImageLevels.build(folder, [8, 32], allow_enlarging=False)
    with caplog.at_level(logging.WARNING):
        levels = ImageLevels.build(folder, [8, 32], on_bad_image="skip", allow_enlarging=False)
    assert [Path(name).name for name in levels.names] == ["a.png", "c.png", "f.png", "d.png"]
    assert [(Path(name).name, reason) for name, reason in levels.bad] == [
        ("b.png", "32x31 pixels, smaller than 32x32"),
        ("e.png", "31x40 pixels, smaller than 32x32"),
    ]
    assert [record.message for record in caplog.records] == [f"skipped {name}: {reason}" for name, reason in levels.bad]
    assert levels.enlarged == 0
    allowed = ImageLevels.build(folder, [8, 32])
    assert len(allowed) == 6 and allowed.enlarged == 2 and allowed.bad == []
    with pytest.raises(ValueError, match="none of its 5 images.*32x32 pixels, smaller than 32x33"):
        ImageLevels.build(noise(), [(32, 33)], on_bad_image="skip", allow_enlarging=False)


def test_the_cache_of_one_setting_is_not_used_for_the_other(folder, tmp_path, monkeypatch):
    Image.fromarray(noise(1, 16, 16)[0]).save(folder / "b.png")
    options = {"sizes": [8, 32], "on_bad_image": "skip", "cache_dir": tmp_path / "cache"}
    decoded = count_decoding(monkeypatch)
    for _ in range(2):
        assert len(ImageLevels.build(folder, **options)) == 4 and len(decoded) == 4
    for _ in range(2):
        refusing = ImageLevels.build(folder, **options, allow_enlarging=False)
        assert len(refusing) == 3 and len(decoded) == 8
        assert [Path(name).name for name, _ in refusing.bad] == ["b.png"]
    with pytest.raises(ValueError, match="b.png: 16x16 pixels"):
        ImageLevels.build(folder, **options | {"on_bad_image": "stop"}, allow_enlarging=False)
    assert len(decoded) == 8


# Some images of a source.


def test_some_images_of_a_source(folder):
    source, images = open_source(folder), noise(3)
    some = Some(source, [2, 0])
    assert isinstance(some, ImageSource) and len(some) == 2
    levels = ImageLevels.build(some, [32])
    assert levels.names == some.names == [source.names[2], source.names[0]]
    assert np.array_equal(levels.arrays[0], images[[2, 0]])
    keys = [Some(source, chosen).key() for chosen in ([2, 0], [0, 2], range(2))] + [source.key()]
    assert all(one != other for index, one in enumerate(keys) for other in keys[:index])
    assert Some(source, range(2)).key() == Some(open_source(folder), (0, 1)).key() == json.loads(json.dumps(keys[2]))
