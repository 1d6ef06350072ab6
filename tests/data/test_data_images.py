"""Reading images: what is decoded how, and what is refused with which reason."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pyrdiff.data import (
    BadImageError,
    ImageLevels,
    decode_image,
    fit_image,
    list_images,
    open_picture,
    open_source,
    sources,
)
from pyrdiff.web.pictures import read_picture


def png_bytes(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that claims to be width × height."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def noise(height: int = 12, width: int = 10, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_folder_is_listed_recursively_in_order(tmp_path):
    inside = tmp_path / "folder"
    for name in ["b.png", "a/z.JPG", "a/b/c.webp", ".hidden.png", ".cache/x.png", "notes.txt", "paper.pdf"]:
        path = inside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "linked.png").touch()
    (inside / "link").symlink_to(outside)
    (inside / "a" / "loop").symlink_to(inside)
    (inside / "broken.png").symlink_to(tmp_path / "nowhere.png")
    listed = [path.relative_to(inside).as_posix() for path in list_images(inside)]
    assert listed == ["a/b/c.webp", "a/z.JPG", "b.png", "broken.png", "link/linked.png"]


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="folder.*missing.*does not exist"):
        list_images(tmp_path / "missing")
    (tmp_path / "file.png").touch()
    with pytest.raises(ValueError, match="expected a folder"):
        list_images(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        list_images(tmp_path / "empty")


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("source_mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "RGBA", "LA", "PA", "I;16"])
def test_every_mode_becomes_gray_or_rgb(source_mode, channels, mode):
    image = decode_image(Image.new(source_mode, (3, 2)), channels)
    assert (image.mode, image.size) == (mode, (3, 2))


def test_alpha_is_composited():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]  # opaque, clear, a fifth
    image = decode_image(png_bytes(Image.fromarray(pixels)), 3, background=(0, 50, 100))
    assert np.asarray(image).tolist() == [[[200, 100, 0], [0, 50, 100], [40, 60, 80]]]
    assert image.info["composited"] is True


def test_gray_with_alpha_and_palette_and_trns():
    gray = np.array([[[10, 255], [10, 0]]], np.uint8)
    assert np.asarray(decode_image(Image.fromarray(gray, "LA"), 1, background=(7, 7, 7))).tolist() == [[10, 7]]

    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 200, 201, 202])
    palette.putpixel((1, 0), 1)
    decoded = decode_image(png_bytes(palette, transparency=0), 3, background=(1, 2, 3))
    assert np.asarray(decoded).tolist() == [[[1, 2, 3], [200, 201, 202]]]

    keyed = Image.fromarray(np.array([[5, 6]], np.uint8))
    decoded = decode_image(png_bytes(keyed, transparency=6), 3, background=(90, 91, 92))
    assert np.asarray(decoded).tolist() == [[[5, 5, 5], [90, 91, 92]]]


def test_opaque_images_are_not_called_composited():
    assert decode_image(Image.fromarray(noise()), 3).info["composited"] is False
    assert decode_image(Image.fromarray(noise()).convert("RGBA"), 3).info["composited"] is False


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_gray_is_scaled(dtype):
    image = Image.fromarray(np.array([[0, 257, 128 * 257, 129 * 257 - 100, 65535]], dtype))
    decoded = decode_image(image, 1)
    assert np.asarray(decoded).tolist() == [[0, 1, 128, 129, 255]]
    if dtype == np.uint16:
        assert np.array_equal(decode_image(png_bytes(image), 1), decoded)
        keyed = decode_image(png_bytes(image, transparency=257), 1, background=(77, 77, 77))
        assert np.asarray(keyed).tolist() == [[0, 77, 128, 129, 255]]


def test_pixels_without_a_known_range_are_refused():
    with pytest.raises(BadImageError, match="-1..70000"):
        decode_image(Image.fromarray(np.array([[-1, 70000]], np.int32)), 1)
    with pytest.raises(BadImageError, match="float"):
        decode_image(Image.fromarray(np.zeros((2, 2), np.float32)), 1)


def test_exif_orientation_is_applied():
    pixels = noise()
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[274] = 6  # to be turned by 90° clockwise
    decoded = decode_image(png_bytes(image, exif=exif), 3)
    assert np.array_equal(np.asarray(decoded), np.rot90(pixels, -1))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in [(255, 0, 0), (0, 255, 0)]]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(file.getvalue(), 3).getpixel((0, 0)) == (255, 0, 0)


def test_the_callers_image_is_left_alone():
    image = Image.fromarray(noise(channels=4))
    before = image.copy()
    decoded = decode_image(image, 3)
    assert image == before and "composited" not in image.info and decoded is not image


def test_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *args: pytest.fail("pixels were decoded"))
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(50_000, 50_000))
    with pytest.raises(BadImageError, match="too large") as error:
        decode_image(path, 3)
    assert error.value.name == str(path)
    with pytest.raises(BadImageError, match="100×100 pixels, more than max_pixels=9999"):
        decode_image(png_header(100, 100), 3, max_pixels=9_999)


def test_bad_files_say_why(tmp_path):
    whole = png_bytes(Image.fromarray(noise(64, 64)))
    files = {
        "truncated.png": (whole[: len(whole) // 2], "truncated"),
        "cut.jpg": (b"\xff\xd8\xff", "not an image"),
        "empty.png": (b"", "empty"),
        "text.png": (b"hello", "not an image"),
        "zero.png": (png_header(0, 5), "."),
        "vector.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
    }
    for name, (content, reason) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BadImageError, match=reason) as error:
            decode_image(path, 3)
        assert error.value.name == str(path) and str(path) in str(error.value) and error.value.reason
    with pytest.raises(BadImageError, match="No such file"):
        decode_image(tmp_path / "missing.png", 3)
    with pytest.raises(BadImageError, match="no pixels"):
        decode_image(Image.new("RGB", (0, 3)), 3)


def test_running_out_of_file_handles_is_no_bad_image(tmp_path, monkeypatch):
    Image.fromarray(noise()).save(tmp_path / "a.png")

    def refuse(*args, **kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(OSError, match="Too many"):
        decode_image(tmp_path / "a.png", 3)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"channels": 4}, "channels"),
        ({"channels": 3, "background": (0, 0, 256)}, "background"),
        ({"channels": 3, "max_pixels": 0}, "max_pixels"),
    ],
)
def test_decoding_arguments_are_checked(options, name):
    with pytest.raises(ValueError, match=f"^{name}="):
        decode_image(Image.new("RGB", (2, 2)), **options)


def test_fit_keeps_the_aspect_and_the_centre():
    # Thirds of a wide image in three colours: a square from its centre shows the middle one alone.
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20, 0], wide[:, 20:40, 1], wide[:, 40:, 2] = 255, 255, 255
    for pixels in (wide, wide.transpose(1, 0, 2)):
        fitted = np.asarray(fit_image(Image.fromarray(np.ascontiguousarray(pixels)), 10, 10))
        assert fitted.shape == (10, 10, 3) and (fitted[2:-2, 2:-2] == [0, 255, 0]).all()
        assert (fitted[..., 1] > 230).all() and np.array_equal(fitted[..., 0], np.rot90(fitted[..., 2], 2))


def test_fit_at_the_same_size_changes_nothing_and_halving_averages():
    pixels = noise(8, 6)
    assert np.array_equal(np.asarray(fit_image(Image.fromarray(pixels), 8, 6)), pixels)
    stripes = np.tile(np.array([0, 255], np.uint8), (16, 8))  # the finest there are: antialiasing leaves gray
    halved = np.asarray(fit_image(Image.fromarray(stripes), 8, 8)).astype(int)
    assert np.abs(halved[:, 2:-2] - 127.5).max() <= 2


@pytest.mark.parametrize("size, target", [((1, 999), (16, 16)), ((333, 7), (64, 24)), ((3, 3), (31, 17))])
def test_fit_odd_shapes(size, target):
    assert fit_image(Image.new("L", size), *target).size == (target[1], target[0])


def test_npz_array_is_found_or_asked_for(tmp_path):
    gray, other = noise(5, 28 * 28, 1).reshape(5, 28, 28), noise(4, 28 * 28, 1).reshape(4, 28, 28)
    labels = np.arange(5)
    objects = np.array([None], object)

    np.savez(tmp_path / "one.npz", images=gray, labels=labels, objects=objects)
    source = open_source(tmp_path / "one.npz")
    assert len(source) == 5 and np.array_equal(np.asarray(source.read(3)), gray[3])
    assert source.names[3].endswith("one.npz:images[3]")

    np.savez(tmp_path / "keras.npz", x_test=other, x_train=gray)
    assert len(open_source(tmp_path / "keras.npz")) == 5
    assert len(open_source(tmp_path / "keras.npz", array_key="x_test")) == 4

    np.savez(tmp_path / "two.npz", first=gray, second=other)
    with pytest.raises(ValueError, match=r"array_key.*\['first', 'second'\]"):
        open_source(tmp_path / "two.npz")
    with pytest.raises(ValueError, match=r"array_key='third'.*\['first', 'second'\]"):
        open_source(tmp_path / "two.npz", array_key="third")

    whole = (tmp_path / "two.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-200])
    with pytest.raises(ValueError, match="cut.npz.*cannot be read"):
        open_source(tmp_path / "cut.npz")


def npz(path: Path, name: str, header: bytes, data: bytes) -> Path:
    """A .npz file of one array whose header may say what it likes."""
    text = header.ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return path


@pytest.mark.parametrize("key", [None, "images"])
def test_a_npz_that_holds_far_more_than_its_size_is_refused(tmp_path, monkeypatch, key):
    """What deflate can make of 1.6 MB are 1.6 GB; nothing of it is unpacked."""
    monkeypatch.setattr(sources, "UNPACKED_FREELY", 10**6)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((100, 200, 200), np.uint8), labels=np.arange(100))
    with pytest.raises(ValueError, match=r"bomb.npz'.*images would unpack to 0.004 GB, more than 100 times.*\.npy"):
        open_source(tmp_path / "bomb.npz", array_key=key)
    np.savez_compressed(tmp_path / "small.npz", images=np.zeros((10, 200, 200), np.uint8))
    assert len(open_source(tmp_path / "small.npz", array_key=key)) == 10  # up to a limit, whatever the ratio
    np.savez_compressed(tmp_path / "full.npz", images=noise(2000, 1000, 1).reshape(10, 200, 1000))
    assert len(open_source(tmp_path / "full.npz", array_key=key)) == 10


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 4000, 4000)}",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 8, 8)}",  # more than there is
        b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 8, 8)}",
        b"{'descr': '|u1', 'shape': (2, 8, 8)}",
        b"[" * 100,
        b"__import__('os').abort()",
    ],
)
def test_a_npz_whose_header_lies(tmp_path, header):
    path = npz(tmp_path / "lies.npz", "images.npy", header, b"x" * 10)
    for key in (None, "images"):
        with pytest.raises(ValueError, match="lies.npz") as caught:
            open_source(path, array_key=key)
        assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    right = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 5)}"
    assert len(open_source(npz(path, "images.npy", right, b"x" * 10))) == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_npy_and_arrays(tmp_path, channels):
    images = noise(6, 8 * 9, channels).reshape(6, 8, 9, channels)
    np.save(tmp_path / "a.npy", images)
    for source in (open_source(tmp_path / "a.npy"), open_source(images)):
        assert len(source) == 6
        assert np.array_equal(np.asarray(source.read(2)).reshape(8, 9, channels), images[2])


def test_source_errors(tmp_path):
    (tmp_path / "a.txt").touch()
    np.save(tmp_path / "objects.npy", np.array([None], object), allow_pickle=True)
    for source, message in [
        (tmp_path / "a.txt", "a.txt': expected"),
        (tmp_path / "missing", "does not exist: expected"),
        (str(tmp_path / "missing"), "does not exist: expected"),
        ("./missing", "does not exist: expected"),
        (tmp_path / "objects.npy", "objects.npy.*cannot be read"),
        (np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((2, 8, 8, 2), np.uint8), r"\[2, 8, 8, 2\]"),
        (np.zeros((0, 8, 8), np.uint8), "none empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(source)
    with pytest.raises(ValueError, match="array_key='x' for 'glyphs'"):
        open_source("glyphs", array_key="x")
    with pytest.raises(ValueError, match="image_column='x' for an array"):
        open_source(np.zeros((2, 8, 8), np.uint8), image_column="x")


def hub(monkeypatch, columns: dict, images: list[str]):
    """Have `datasets.load_dataset` give an in-memory data set; returns the list of its calls."""
    import datasets

    dataset = datasets.Dataset.from_dict(columns)
    for column in images:
        dataset = dataset.cast_column(column, datasets.Image())
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_data_set(monkeypatch, tmp_path):
    pixels = [noise(seed=index) for index in range(3)]
    Image.fromarray(pixels[1]).save(tmp_path / "stored.png")
    stored = [
        {"bytes": png_bytes(Image.fromarray(pixels[0])), "path": None},
        {"bytes": None, "path": str(tmp_path / "stored.png")},
        None,
    ]
    calls = hub(monkeypatch, {"label": [0, 1, 2], "picture": stored}, ["picture"])
    source = open_source("owner/name", dataset_config="small", split="test")
    assert calls == [(("owner/name", "small"), {"split": "test"})]
    assert len(source) == 3 and source.names[1] == "owner/name:small:test[1]"
    for index in range(2):
        assert np.array_equal(np.asarray(decode_image(source.read(index), 3)), pixels[index])
    with pytest.raises(BadImageError, match="no image in this row"):
        source.read(2)


def test_hub_columns(monkeypatch):
    picture = {"bytes": png_bytes(Image.fromarray(noise())), "path": None}
    hub(monkeypatch, {"label": [0], "caption": ["a"]}, [])
    with pytest.raises(ValueError, match="'label', 'caption'"):
        open_source("name")
    hub(monkeypatch, {"label": [0], "a": [picture], "b": [picture]}, ["a", "b"])
    with pytest.raises(ValueError, match=r"image_column=None.*\['a', 'b'\]"):
        open_source("name")
    with pytest.raises(ValueError, match="image_column='label'"):
        open_source("name", image_column="label")
    assert len(open_source("name", image_column="b")) == 1


def test_hub_name_that_is_not_found(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="'no/where' is not an existing path.*no such data set"):
        open_source("no/where")


def test_folder_key_follows_its_files(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise()).save(path)
    key = open_source(tmp_path).key()
    assert open_source(tmp_path).key() == key
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_source(tmp_path).key() != key


def profile_of(primaries: list[tuple[float, float, float]], gamma: float) -> bytes:
    """An ICC profile of red, green and blue (XYZ under D50) and one gamma; a gray one where there are no primaries."""

    def xyz(values) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = "made by a test".encode("utf-16-be")
    told = b"mluc\0\0\0\0" + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(text), 28) + text
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = [(b"desc", told), (b"cprt", told), (b"wtpt", xyz((0.9642, 1.0, 0.8249)))]
    tags += [(name + b"XYZ", xyz(one)) for name, one in zip((b"r", b"g", b"b"), primaries, strict=bool(primaries))]
    tags += [(name + b"TRC", curve) for name in ((b"r", b"g", b"b") if primaries else (b"k",))]
    table, data, offset = b"", b"", 132 + 12 * len(tags)
    for name, body in tags:
        body += b"\0" * (-len(body) % 4)
        table += name + struct.pack(">II", offset + len(data), len(body))
        data += body
    head = struct.pack(
        ">I4sI4s4s4s", offset + len(data), b"", 0x04300000, b"mntr", b"RGB " if primaries else b"GRAY", b"XYZ "
    )
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


DISPLAY_P3 = profile_of([(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)], 2.2)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_converted_to_srgb(mode):
    """(183, 72, 54) of Display P3 is (200, 60, 40) of sRGB."""
    image = Image.new("RGB", (4, 4), (183, 72, 54)).convert(mode, palette=Image.Palette.ADAPTIVE)
    decoded = decode_image(png_bytes(image, icc_profile=DISPLAY_P3), 3)
    assert np.abs(np.asarray(decoded).astype(int) - (200, 60, 40)).max() <= 3
    assert decoded.info["notes"] == ["colours converted to sRGB, by the ICC profile"]
    gray = decode_image(png_bytes(image, icc_profile=DISPLAY_P3), 1)
    assert abs(gray.getpixel((0, 0)) - 99.6) <= 3  # the luma of (200, 60, 40)


def test_an_image_of_srgb_is_left_as_it_is():
    for channels in (3, 1):
        image = Image.fromarray(noise(channels=channels))
        decoded = decode_image(png_bytes(image, icc_profile=SRGB), channels)
        assert decoded.tobytes() == image.tobytes() and decoded.info["notes"] == []


def test_a_gray_profile_and_one_that_is_none():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    linear = np.asarray(decode_image(png_bytes(ramp, icc_profile=profile_of([], 1.0)), 1))[0]
    x = np.arange(256) / 255
    expected = 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    assert np.abs(linear - expected)[8:].max() <= 2
    for profile in (b"damaged", SRGB[:200], profile_of([], 1.0)):
        decoded = decode_image(png_bytes(Image.fromarray(noise()), icc_profile=profile), 3)
        assert np.array_equal(decoded, noise())
        assert decoded.info["notes"] == ["the ICC profile cannot be used, and colours are taken as sRGB"]


def test_the_gamma_of_a_png_counts():
    data = png_bytes(Image.fromarray(np.arange(256, dtype=np.uint8)[None]))

    def with_chunk(kind: bytes, body: bytes) -> bytes:
        return (
            data[:33]
            + struct.pack(">I", len(body))
            + kind
            + body
            + struct.pack(">I", zlib.crc32(kind + body))
            + data[33:]
        )

    linear = decode_image(with_chunk(b"gAMA", struct.pack(">I", 100_000)), 1)
    assert [linear.getpixel((value, 0)) for value in (0, 55, 128, 255)] == [0, 128, 188, 255]
    assert linear.info["notes"] == ["colours converted to sRGB, by the gamma of the PNG (gAMA)"]
    usual = decode_image(with_chunk(b"gAMA", struct.pack(">I", 45_455)), 1)
    assert np.array_equal(usual, np.arange(256)[None]) and usual.info["notes"] == []


def test_values_of_12_bits_in_16_are_said(caplog):
    deep = Image.fromarray(np.linspace(0, 4095, 48).reshape(6, 8).astype(np.uint16))
    (note,) = decode_image(deep, 1).info["notes"]
    assert "12 bits only, up to 4095 of 65535" in note and "multiply them by 16" in note
    assert decode_image(Image.fromarray(np.asarray(deep) * 16), 1).info["notes"] == []


def test_levels_say_what_was_converted(tmp_path, caplog):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    for name in ("b.png", "c.png"):
        Image.fromarray(noise()).save(tmp_path / name, icc_profile=DISPLAY_P3)
    note = "colours converted to sRGB, by the ICC profile"
    for _ in range(2):  # made, and found in the cache
        caplog.clear()
        levels = ImageLevels.build(tmp_path, [8], cache_dir=tmp_path / ".cache")
        assert levels.notes == {note: (2, str(tmp_path / "b.png"))}
        assert caplog.messages == [f"2 of 3 images, {tmp_path / 'b.png'} the first: {note}"]


def test_a_row_that_no_decoder_takes_is_a_bad_image(tmp_path):
    """Pillow raises MemoryError for it, which would end a training that skips bad images."""
    (tmp_path / "wide.png").write_bytes(png_header(89_478_485, 1))
    Image.fromarray(noise()).save(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="too large: 89478485"):
        decode_image(tmp_path / "wide.png", 3)
    with pytest.raises(BadImageError, match="too large: 89478485"):
        open_picture(tmp_path / "wide.png")
    levels = ImageLevels.build(tmp_path, [8], on_bad_image="skip")
    assert len(levels) == 1 and "too large" in levels.bad[0][1]


def test_the_page_reads_pictures_in_srgb(tmp_path):
    """Its results carry no profile."""
    Image.new("RGB", (4, 4), (183, 72, 54)).save(tmp_path / "a.png", icc_profile=DISPLAY_P3)
    image, notes = read_picture(str(tmp_path / "a.png"), 3, 100)
    assert np.abs(np.asarray(image).astype(int) - (200, 60, 40)).max() <= 3
    assert notes == ["colours converted to sRGB, by the ICC profile"]
