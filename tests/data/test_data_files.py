"""Image files that are worked on and written back: what is kept, what is said, what is refused."""

import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import IFDRational

from pyrdiff.data import BadImageError, Picture, check_saving, fill_hidden, list_images, open_picture, save_picture
from pyrdiff.data.deep import deepen_png
from pyrdiff.data.files import read_header

RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CMYK_PROFILE = RGB_PROFILE[:16] + b"CMYK" + RGB_PROFILE[20:]


def noise(mode: str = "RGB", height: int = 12, width: int = 10, seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def exif(orientation: int = 6) -> Image.Exif:
    block = Image.Exif()
    block[0x0112], block[0x010F] = orientation, "Camera"
    block[0x0100] = 1234  # a width, as some cameras write it
    block[0x8769] = {0x9003: "2024:05:06 07:08:09", 0x927C: b"maker's own", 0x829A: IFDRational(1, 60)}
    block[0x8769][0xA432] = (IFDRational(0, 0),) * 4  # a lens of which the camera knows nothing
    block[0x8825] = {1: "N", 2: (47.0, 22.0, 1.5)}
    return block


def tags(path) -> tuple[dict, dict, dict]:
    with Image.open(path) as image:
        block = image.getexif()
        ours = {tag: block.get(tag) for tag in (0x0112, 0x010F)}
        return ours, {t: str(v) for t, v in block.get_ifd(0x8769).items()}, dict(block.get_ifd(0x8825))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(color_type: int = 2, bits: int = 16) -> bytes:
    """A PNG of 4 x 4 pixels."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    header = struct.pack(">IIBBBBB", 4, 4, bits, color_type, 0, 0, 0)
    rows = (b"\0" + bytes(4 * channels * bits // 8)) * 4
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_tiff() -> bytes:
    """An RGB TIFF of 1 x 1 pixel with 16 bits a channel, which Pillow opens as 8 bits."""
    entries = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 6)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 20) + struct.pack("<3H", 16, 16, 16) + bytes(6) + directory + bytes(4)


HOLDS = {".png": ("L", "LA", "RGB", "RGBA"), ".jpg": ("L", "RGB"), ".webp": ("RGB", "RGBA")}
HOLDS[".tif"] = HOLDS[".png"]


@pytest.mark.parametrize("suffix, mode", [(suffix, mode) for suffix, modes in HOLDS.items() for mode in modes])
def test_what_a_file_carries_comes_back(tmp_path, suffix, mode):
    path = tmp_path / f"a{suffix}"
    block = exif()
    if suffix == ".tif":  # whose width is its own, and which is turned upright
        del block[0x0100], block[0x0112]
    options = {"exif": block.tobytes(), "dpi": (300, 300)}
    if mode.startswith("RGB"):
        options["icc_profile"] = RGB_PROFILE
    noise(mode).save(path, **options)
    picture = open_picture(path)
    assert picture.notes == [] and picture.color.size == (10, 12)
    with Image.open(path) as before:
        before.load()
        assert picture.color.tobytes() == before.convert(picture.color.mode).tobytes()

    written = tmp_path / "out" / f"b{suffix}"
    notes = save_picture(picture, written)
    with Image.open(written) as after:
        assert after.mode == mode
        assert after.info.get("icc_profile", b"") == options.get("icc_profile", b"")
        if suffix != ".webp":
            assert after.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            assert notes == []
        if mode.endswith("A"):
            assert after.getchannel("A").tobytes() == picture.alpha.tobytes() == before.getchannel("A").tobytes()
    assert tags(written) == tags(path) and tags(path)[2][2] == (47.0, 22.0, 1.5)
    if suffix != ".tif":
        assert picture.exif == open_picture(written).exif == open_picture(path).exif
        assert tags(written)[0][0x0112] == 6
    assert [each.name for each in written.parent.iterdir()] == [written.name]


def test_a_tiff_of_a_turned_photo(tmp_path):
    noise().save(tmp_path / "a.png", exif=exif())
    picture = open_picture(tmp_path / "a.png")
    save_picture(picture, tmp_path / "b.tif")  # with the tag and not the width of the EXIF
    with Image.open(tmp_path / "b.tif") as image:
        assert image.getexif()[0x0112] == 6 and image.size == (12, 10)  # as a viewer shows it
    turned = open_picture(tmp_path / "b.tif")
    assert turned.notes == ["turned upright, as its orientation tag says"]
    assert turned.color.tobytes() == picture.color.transpose(Image.Transpose.ROTATE_270).tobytes()
    save_picture(turned, tmp_path / "c.png")
    assert tags(tmp_path / "c.png")[0] == {0x0112: None, 0x010F: "Camera"}


def test_from_one_format_to_another(tmp_path):
    noise().save(tmp_path / "a.webp", exif=exif().tobytes(), lossless=True)
    picture = open_picture(tmp_path / "a.webp")
    for suffix in (".jpg", ".png", ".webp"):
        save_picture(picture, tmp_path / f"b{suffix}")
        assert tags(tmp_path / f"b{suffix}") == tags(tmp_path / "a.webp")
    error = np.asarray(Image.open(tmp_path / "b.jpg")).astype(float) - np.asarray(picture.color)
    assert np.abs(error).mean() < 4  # of noise in full colour; Pillow's own settings give 50


def test_an_upright_tiff(tmp_path):
    noise().save(tmp_path / "a.tif", tiffinfo={0x0112: 1, 0x010F: "Camera"})
    picture = open_picture(tmp_path / "a.tif")
    assert picture.notes == []
    save_picture(picture, tmp_path / "b.tif")
    assert tags(tmp_path / "b.tif")[0][0x010F] == "Camera"
    save_picture(Picture(Image.new("RGB", (99, 99))), tmp_path / "c.tif")
    assert (tmp_path / "c.tif").stat().st_size < 99 * 99  # compressed


@pytest.mark.parametrize("mode, options, becomes, alpha", [
    ("P", {}, "RGB", False),
    ("P", {"transparency": 3}, "RGBA", True),
    ("1", {}, "L", False),
    ("L", {"transparency": 7}, "LA", True),
    ("RGB", {"transparency": (1, 2, 3)}, "RGBA", True),
])  # fmt: skip
def test_conversions_are_said(tmp_path, mode, options, becomes, alpha):
    image = noise("RGB" if mode == "1" else mode).convert(mode)
    if mode == "P":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    if options:
        image.putpixel((0, 0), options["transparency"])
    image.save(tmp_path / "a.png", **options)
    picture = open_picture(tmp_path / "a.png")
    assert picture.notes == [f"{mode} converted to {becomes}"]
    assert picture.color.mode == becomes.removesuffix("A") and (picture.alpha is not None) == alpha
    assert picture.color.tobytes() == image.convert(picture.color.mode).tobytes()
    if mode == "L":
        assert picture.alpha.tobytes() == image.point(lambda value: 0 if value == 7 else 255).tobytes()


def test_a_profile_stays_only_where_it_fits(tmp_path):
    noise("CMYK").save(tmp_path / "a.jpg", icc_profile=CMYK_PROFILE)
    picture = open_picture(tmp_path / "a.jpg")
    assert picture.notes == ["CMYK converted to RGB", "ICC profile left out: it is not for RGB"]
    assert picture.color.mode == "RGB" and picture.icc_profile == b""
    noise("P").save(tmp_path / "a.png", icc_profile=RGB_PROFILE)
    assert open_picture(tmp_path / "a.png").icc_profile == RGB_PROFILE
    noise("L").save(tmp_path / "b.jpg", icc_profile=RGB_PROFILE)  # wrong, but as it came
    assert open_picture(tmp_path / "b.jpg").icc_profile == RGB_PROFILE
    gray = Picture(noise("L"), icc_profile=RGB_PROFILE[:16] + b"GRAY" + RGB_PROFILE[20:], dpi=(72, 72))
    said = ["gray saved as RGB, since WebP has no gray", "ICC profile left out: it is not for RGB"]
    assert save_picture(gray, tmp_path / "a.webp") == [*said, "DPI left out, since WebP has none"]


@pytest.mark.parametrize("color_type", [0, 2, 4, 6])
def test_16_bit_png_is_refused(tmp_path, color_type):
    path = tmp_path / "a.png"
    path.write_bytes(deep_png(color_type))
    with pytest.raises(BadImageError, match="16-bit pixels: expected 8 bits a channel"):
        open_picture(path)
    path.write_bytes(deep_png(color_type, bits=8))
    assert open_picture(path).color.size == (4, 4)


def test_deep_tiff_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(deep_tiff())
    assert Image.open(path).mode == "RGB"  # Pillow would say nothing
    with pytest.raises(BadImageError, match="16-bit"):
        open_picture(path)
    for array, bits in ((np.zeros((3, 3), np.uint16), 16), (np.zeros((3, 3), np.float32), 32)):
        Image.fromarray(array).save(path)
        with pytest.raises(BadImageError, match=f"{bits}-bit"):
            open_picture(path)


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.webp", "a.png"])
def test_several_frames_are_refused(tmp_path, name):
    frames = [noise(), noise().transpose(Image.Transpose.ROTATE_180)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(BadImageError, match="2 frames or pages"):
        open_picture(tmp_path / name)


def test_the_photo_in_an_mpo_is_taken(tmp_path):
    noise().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[noise("RGB", 4, 4)])
    picture = open_picture(tmp_path / "a.jpg")
    assert picture.color.size == (10, 12) and picture.notes == ["the first of 2 pictures in the file"]


def test_damage_is_named(tmp_path):
    whole = {}
    for suffix in ("png", "jpg", "webp", "tif"):
        noise().save(tmp_path / f"whole.{suffix}")
        whole[suffix] = (tmp_path / f"whole.{suffix}").read_bytes()
    for suffix, data in whole.items():
        path = tmp_path / f"a.{suffix}"
        for part in (data[: len(data) * 2 // 3], data[:20], b"text", b""):
            path.write_bytes(part)
            with pytest.raises(BadImageError) as caught:
                open_picture(path)
            assert caught.value.name == str(path) and "\n" not in caught.value.reason
    with pytest.raises(BadImageError, match="too large: 10x12"):
        open_picture(tmp_path / "whole.png", max_pixels=119)
    with pytest.raises(BadImageError, match="No such file"):
        open_picture(tmp_path / "nothing.png")


def test_bombs_are_refused_without_decoding(tmp_path):
    for side in (9_500, 40_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        with pytest.raises(BadImageError, match="too large"):
            open_picture(tmp_path / "bomb.png")


def test_what_a_format_cannot_hold_is_refused():
    clear = Picture(noise(), alpha=noise("L"))
    with pytest.raises(ValueError, match="JPEG holds no transparency"):
        check_saving(clear, "a.JPG", 10, 12)
    with pytest.raises(ValueError, match="'.gif' are not written"):
        check_saving(clear, "a.gif", 10, 12)
    with pytest.raises(ValueError, match="WEBP holds sides of at most 16383"):
        check_saving(clear, "a.webp", 16_384, 1)
    check_saving(clear, "a.png", 16_384, 1)


def test_a_file_that_reads_back_different_never_takes_its_name(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"earlier")
    save, picture = Image.Image.save, Picture(noise(), exif=exif().tobytes(), icc_profile=RGB_PROFILE)

    def damaged(change):
        def run(image, file, kind, **options):
            save(*change(image, file, options), kind, **options)

        monkeypatch.setattr(Image.Image, "save", run)
        with pytest.raises(OSError) as caught:
            save_picture(picture, path)
        assert path.read_bytes() == b"earlier" and [each.name for each in tmp_path.iterdir()] == ["a.png"]
        return str(caught.value)

    def dropped(name):
        return lambda image, file, options: (options.pop(name), (image, file))[1]

    assert "pixels read back different" in damaged(lambda image, file, _: (noise("L").convert("RGB"), file))
    assert "EXIF read back different" in damaged(dropped("exif"))
    assert "ICC profile read back different" in damaged(dropped("icc_profile"))
    torn = damaged(lambda image, file, _: (image, Torn(file)))
    assert "No space" in torn and " bytes were written" in torn


class Torn(io.RawIOBase):
    """A file on a disk that is full."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        raise OSError(28, "no space")

    def flush(self):
        pass


def test_damaged_exif_is_kept_or_named(tmp_path):
    noise().save(tmp_path / "a.jpg", exif=b"Exif\0\0damaged")
    picture = open_picture(tmp_path / "a.jpg")
    save_picture(picture, tmp_path / "b.jpg")
    assert open_picture(tmp_path / "b.jpg").exif == b"Exif\0\0damaged"
    with pytest.raises(ValueError, match="TIFF cannot be written with what the file carries"):
        save_picture(picture, tmp_path / "b.tif")
    assert not (tmp_path / "b.tif").exists()


def test_xmp_is_kept_or_named_and_old_exif_is_read(tmp_path):
    noise().save(tmp_path / "a.webp", xmp=b"<x:xmpmeta/>")
    for suffix in ("webp", "jpg", "png"):
        assert save_picture(open_picture(tmp_path / "a.webp"), tmp_path / f"b.{suffix}") == []
        with Image.open(tmp_path / f"b.{suffix}") as image:
            image.load()
            assert image.info["xmp"] == b"<x:xmpmeta/>"
    assert save_picture(open_picture(tmp_path / "a.webp"), tmp_path / "b.tif") == ["left out: XMP"]
    text = PngImagePlugin.PngInfo()
    block = exif().tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n")
    noise().save(tmp_path / "a.png", pnginfo=text)
    save_picture(open_picture(tmp_path / "a.png"), tmp_path / "b.png")
    assert tags(tmp_path / "b.png")[0] == {0x0112: 6, 0x010F: "Camera"}


@pytest.mark.parametrize("resolution", [{282: IFDRational(0, 0), 283: IFDRational(0, 0)}, {282: 0.0, 283: 0.0}])
def test_a_resolution_that_is_none(tmp_path, resolution):
    noise().save(tmp_path / "a.tif", tiffinfo={296: 2, **resolution})
    picture = open_picture(tmp_path / "a.tif")
    assert picture.dpi is None
    save_picture(picture, tmp_path / "b.tif")


def test_a_large_result_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # 12 x 10 is more than twice that
    save_picture(Picture(noise()), tmp_path / "a.png")
    assert Image.MAX_IMAGE_PIXELS == 50 and (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "tagged.tif"])
def test_a_large_result_of_any_format_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    save_picture(Picture(noise(), exif=exif().tobytes() if name.startswith("tagged") else b""), tmp_path / name)
    assert (tmp_path / name).exists()


def test_two_at_once_leave_the_settings_of_the_process(tmp_path, monkeypatch):
    """The second begins before the first ends, and ends after it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    filters = list(warnings.filters)
    entered, both_in, first_done = threading.Event(), threading.Event(), threading.Event()
    load, limits = ImageFile.ImageFile.load, []

    def slow(image):
        limits.append(Image.MAX_IMAGE_PIXELS)
        if threading.current_thread().name == "first":
            entered.set()
            assert both_in.wait(60)
        else:
            both_in.set()
            assert first_done.wait(60)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", slow)
    first, second = (
        threading.Thread(target=save_picture, args=(Picture(noise()), tmp_path / f"{name}.png"), name=name)
        for name in ("first", "second")
    )
    first.start()
    assert entered.wait(60)
    second.start()
    first.join()
    first_done.set()
    second.join()
    assert {path.name for path in tmp_path.iterdir()} == {"first.png", "second.png"}
    assert set(limits) == {50} and Image.MAX_IMAGE_PIXELS == 50
    assert list(warnings.filters) == filters


def with_png_chunk(data: bytes, kind: bytes, body: bytes) -> bytes:
    return data[:33] + chunk(kind, body) + data[33:]


def with_segment(data: bytes, code: int, body: bytes) -> bytes:
    return data[:2] + struct.pack(">BBH", 0xFF, code, len(body) + 2) + body + data[2:]


def test_what_a_png_says_is_kept_in_a_png_and_named_elsewhere(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "steps: 20")
    text.add_itxt("Title", "Größe", "de", "Titel")
    noise().save(tmp_path / "a.png", pnginfo=text)
    data = with_png_chunk((tmp_path / "a.png").read_bytes(), b"gAMA", struct.pack(">I", 100_000))
    (tmp_path / "a.png").write_bytes(with_png_chunk(data, b"tIME", bytes([7, 232, 1, 2, 3, 4, 5])))
    picture = open_picture(tmp_path / "a.png")
    assert save_picture(picture, tmp_path / "b.png") == ["left out: PNG chunk tIME"]
    with Image.open(tmp_path / "b.png") as image:
        image.load()
        assert image.text == {"parameters": "steps: 20", "Title": "Größe"} and image.info["gamma"] == 1.0
    for suffix in ("jpg", "webp", "tif"):
        (note,) = save_picture(picture, tmp_path / f"b.{suffix}")
        for lost in ("'parameters'", "'Title'", "gAMA", "tIME"):
            assert lost in note


def test_what_a_jpeg_says_is_kept_in_a_jpeg_and_named_elsewhere(tmp_path):
    noise().save(tmp_path / "a.jpg", comment=b"a comment")
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", 12) + b"\x1c\x02\x19\0\x07keyword"
    data = with_segment((tmp_path / "a.jpg").read_bytes(), 0xED, iptc)
    (tmp_path / "a.jpg").write_bytes(with_segment(data, 0xEB, b"JP signed"))
    picture = open_picture(tmp_path / "a.jpg")
    assert save_picture(picture, tmp_path / "b.jpg") == ["left out: JPEG segment APP11"]
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.info["comment"] == b"a comment" and ("APP13", iptc) in image.applist
    (note,) = save_picture(picture, tmp_path / "b.png")
    assert "JPEG comment" in note and "IPTC" in note and "APP11" in note


def test_tags_that_a_tiff_does_not_keep_are_named(tmp_path):
    block = Image.Exif()
    block[0x010F], block[0x4746] = "Camera", 4  # a rating
    noise().save(tmp_path / "a.png", exif=block)
    assert save_picture(open_picture(tmp_path / "a.png"), tmp_path / "b.tif") == ["left out: EXIF Rating"]
    noise().save(tmp_path / "c.tif", tiffinfo={0x010F: "Camera", 65000: "own"})
    (note,) = save_picture(open_picture(tmp_path / "c.tif"), tmp_path / "d.tif")
    assert "65000" in note


def test_alpha_of_255_everywhere_is_no_alpha(tmp_path):
    for mode in ("RGBA", "LA"):
        image = noise(mode)
        image.putalpha(255)
        image.save(tmp_path / "a.png")
        picture = open_picture(tmp_path / "a.png")
        assert picture.alpha is None and picture.notes == ["alpha left out: it is opaque everywhere"]
        for suffix in ("jpg", "webp", "bmp"):
            save_picture(picture, tmp_path / f"b.{suffix}")
    save_picture(Picture(noise(), alpha=Image.new("L", (10, 12), 255)), tmp_path / "c.webp")
    assert Image.open(tmp_path / "c.webp").mode == "RGB"


def test_a_bitmap(tmp_path):
    for mode in ("L", "RGB"):
        noise(mode).save(tmp_path / "a.png", exif=exif(), icc_profile=RGB_PROFILE)
        said = save_picture(open_picture(tmp_path / "a.png"), tmp_path / "b.bmp")
        assert [note.split(",")[0] for note in said] == ["ICC profile left out", "EXIF left out", "turned upright"]
        upright = noise(mode).transpose(Image.Transpose.ROTATE_270)
        assert Image.open(tmp_path / "b.bmp").tobytes() == upright.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_shown_and_stored(tmp_path, orientation):
    noise().save(tmp_path / "a.png", exif=exif(orientation))
    picture = open_picture(tmp_path / "a.png")
    (shown, _), viewed = picture.upright(), ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert shown.tobytes() == viewed.tobytes() and shown.size == viewed.size
    assert picture.with_shown(shown, None).color.tobytes() == picture.color.tobytes() == noise().tobytes()


def test_hidden_colours_come_from_what_is_seen():
    rows, columns = np.mgrid[0:13, 0:10]
    alpha = np.where((rows - 6) ** 2 + (columns - 5) ** 2 < 9, 255, 0).astype(np.uint8)
    alpha[0, 0] = 1
    seen = np.uint8([230, 60, 40])
    filled = []
    for hidden in (0, 255, 77):
        color = np.where(alpha[..., None] > 0, seen, np.uint8(hidden)).astype(np.uint8)
        filled.append(fill_hidden(Image.fromarray(color), Image.fromarray(alpha)))
        assert (np.asarray(filled[-1]) == seen).all()
    gray = noise("L", 13, 10)
    kept = np.asarray(fill_hidden(gray, Image.fromarray(alpha)))
    assert (kept == np.asarray(gray))[alpha > 0].all() and not (kept == np.asarray(gray))[alpha == 0].all()
    nothing = fill_hidden(gray, Image.new("L", gray.size, 0))
    assert nothing.size == gray.size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode, suffix", [("L", ".png"), ("RGB", ".png"), ("RGBA", ".png"), ("L", ".tif")])
def test_16_bits_come_back(tmp_path, mode, suffix, orientation):
    random = np.random.default_rng(0)
    deep = random.integers(0, 65536, (6, 5) if mode == "L" else (6, 5, 3), dtype=np.uint16)
    color = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    alpha = Image.fromarray(random.integers(0, 255, (6, 5), dtype=np.uint8)) if mode == "RGBA" else None
    exif = Image.Exif()
    exif[0x0112] = orientation
    carried = {"exif": b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")} if orientation > 1 else {}
    picture = Picture(color, alpha, dpi=(96.0, 96.0), orientation=orientation, deep=deep, **carried)
    notes = save_picture(picture, tmp_path / f"a{suffix}")
    assert notes == []
    back = open_picture(tmp_path / f"a{suffix}", deep=True)
    np.testing.assert_array_equal(back.deep_upright(), picture.deep_upright())
    assert back.dpi == pytest.approx((96, 96), abs=0.1) and back.exif == picture.exif or suffix == ".tif"
    assert (back.alpha is None) == (alpha is None) and (alpha is None or back.alpha.tobytes() == alpha.tobytes())
    shown, _ = back.upright()  # the 8 bits are the same picture
    assert np.abs(np.asarray(shown).astype(int) - np.rint(back.deep_upright() / 257)).max() <= 1
    with pytest.raises(BadImageError, match="16-bit pixels"):
        open_picture(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("order", "<>")
def test_16_bit_colours_of_a_tiff_are_read(tmp_path, order):
    tifffile = pytest.importorskip("tifffile")
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", deep, byteorder=order, photometric="rgb")
    picture = open_picture(tmp_path / "a.tif", deep=True)
    np.testing.assert_array_equal(picture.deep, deep)
    for name in ("a.jpg", "b.tif", "a.webp"):
        notes = save_picture(picture, tmp_path / ("to" + name))
        assert any("saved with 8 bits a channel" in note for note in notes)


def test_what_16_bits_are_used_for_is_said(tmp_path):
    Image.fromarray(np.linspace(0, 4095, 30).reshape(5, 6).astype(np.uint16)).save(tmp_path / "a.png")
    picture = open_picture(tmp_path / "a.png", deep=True)
    assert picture.notes[0].startswith("16-bit values that use 12 bits only") and picture.deep.max() == 4095
    half = Image.fromarray(np.zeros((5, 6), np.uint8))
    half.putalpha(Image.fromarray(np.full((5, 6), 99, np.uint8)))
    half.save(tmp_path / "b.png")
    deepen_png(tmp_path / "b.png", np.full((5, 6), 300, np.uint16), half.getchannel("A"))
    picture = open_picture(tmp_path / "b.png", deep=True)  # Pillow has no way to the lower bits of these
    assert picture.deep is None and "16 bits a channel read as 8" in picture.notes
    assert picture.alpha.getextrema() == (99, 99) and set(picture.color.getdata()) == {(1, 1, 1)}


def test_quality_and_loss(tmp_path):
    picture = Picture(noise("RGB", 40, 40))
    for name in ("a.jpg", "a.webp"):
        sizes = []
        for quality in (20, 95):
            save_picture(picture, tmp_path / name, quality=quality)
            sizes.append((tmp_path / name).stat().st_size)
        assert sizes[0] < sizes[1] / 1.5
    save_picture(picture, tmp_path / "b.webp", lossless=True)
    assert open_picture(tmp_path / "b.webp").color.tobytes() == picture.color.tobytes()
    with pytest.raises(ValueError, match="JPEG is never lossless"):
        save_picture(picture, tmp_path / "b.jpg", lossless=True)


def test_headers(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise("RGB", 6, 5).save(tmp_path / "a.jpg", exif=exif)
    noise("RGB", 6, 5).save(tmp_path / "b.gif", save_all=True, append_images=[noise("RGB", 6, 5, seed=1)])
    (tmp_path / "c.png").write_text("no")
    assert read_header(tmp_path / "a.jpg") == ((6, 5), 1)
    assert read_header(tmp_path / "b.gif") == ((5, 6), 2)
    assert read_header(tmp_path / "c.png") is None


def test_heic(tmp_path):
    """Where pillow-heif is installed it is read; elsewhere the message says how."""
    try:
        import pillow_heif
    except ImportError:
        (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
        with pytest.raises(BadImageError, match="a HEIC file; expected pillow-heif to be installed"):
            open_picture(tmp_path / "phone.HEIC")
        with pytest.raises(ValueError, match="no image, only 1 .heic: .*pip install pillow-heif"):
            list_images(tmp_path)
        return
    pillow_heif.from_pillow(noise()).save(tmp_path / "phone.HEIC")
    assert open_picture(tmp_path / "phone.HEIC").color.size == noise().size
    assert len(list_images(tmp_path)) == 1
