"""Image files with what they carry: read one to work on its pixels, write the result back in the same form."""

import io
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pyrdiff.parts.files import replacing

from .images import MAX_PIXELS, BadImageError, naming_errors, open_any_size, without_warnings

READ = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")  # whose bits a channel are known before Pillow reduces them to 8
WRITTEN = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383}
LOSSY = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}  # alpha is lossless in WebP

EXIF_PREFIX = b"Exif\0\0"
TAG, GROUPS = ExifTags.Base, (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
# In a TIFF these tags lie among those that say how the pixels are stored, which are those of one file only.
PICTURE_TAGS = {TAG.ImageDescription, TAG.Make, TAG.Model, TAG.Orientation, TAG.Software, TAG.DateTime, TAG.Artist}
PICTURE_TAGS |= {TAG.HostComputer, TAG.Copyright}
COLOR_SPACES = {"L": b"GRAY", "RGB": b"RGB "}  # as bytes 16 to 20 of an ICC profile name them


@dataclass
class Picture:
    """The pixels of an image file, as they are stored, and what it carries besides.

    Attributes:
        color: Mode "L" or "RGB", [H, W] pixels in 0..255. The orientation tag of the EXIF is not applied.
        alpha: Mode "L" of the same size, or None for an opaque file.
        exif: The EXIF block with its prefix, byte for byte as it was; empty for none.
        icc_profile: The colour profile of `color`; empty for none.
        dpi: Pixels per inch (horizontal, vertical), or None.
        notes: What was changed or left out, one phrase each.
    """

    color: Image.Image
    alpha: Image.Image | None = None
    exif: bytes = b""
    icc_profile: bytes = b""
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)


def open_picture(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read an image file of 8 bits a channel: PNG, JPEG, WebP, TIFF, BMP or GIF.

    Palettes, CMYK and other colour spaces become RGB, one transparent colour or entry becomes an alpha channel, and 1
    bit becomes gray; `notes` says so. Of a photo with further pictures inside (MPO: a preview, a gain map) the first
    is taken. A TIFF is turned upright, since Pillow does that; in other files pixels and orientation tag stay.

    Args:
        path: The file.
        max_pixels: The most pixels (width × height) that are decoded.

    Raises:
        BadImageError: when it cannot be read whole, has more than 8 bits a channel or several frames.
    """
    name = str(path)
    with naming_errors(name), without_warnings():
        data = Path(path).read_bytes()
        if not data:
            raise BadImageError(name, "empty file")
        try:
            image = Image.open(io.BytesIO(data), formats=READ)
        except UnidentifiedImageError as error:
            raise BadImageError(name, f"not an image; expected one of {', '.join(READ)}") from error
        with image:
            return _read(image, max_pixels, name)


def _read(image: Image.Image, max_pixels: int, name: str) -> Picture:
    if image.width * image.height > max_pixels:
        raise BadImageError(name, f"too large: {image.width}x{image.height}; expected at most {max_pixels} pixels")
    bits = _bits(image)
    if bits > 8:
        raise BadImageError(name, f"{bits}-bit pixels: expected 8 bits a channel")
    frames, notes = getattr(image, "n_frames", 1), []
    if frames > 1 and image.format != "MPO":
        raise BadImageError(name, f"{frames} frames or pages: expected one")
    if frames > 1:
        notes.append(f"the first of {frames} pictures in the file")
    turned = image.format == "TIFF" and image.getexif().get(TAG.Orientation, 1) != 1
    if turned:
        notes.append("turned upright, as its orientation tag says")
    image.load()

    mode, target = image.mode, {"1": "L", "L": "L", "LA": "L"}.get(image.mode, "RGB")
    transparent = image.has_transparency_data
    full = {"L": "LA", "RGB": "RGBA"}[target] if transparent else target
    if mode != full:
        notes.append(f"{mode} converted to {full}")
    icc_profile = image.info.get("icc_profile") or b""
    if icc_profile and mode not in (target, full) and icc_profile[16:20] != COLOR_SPACES[target]:
        notes.append(f"ICC profile left out: it is not for {target}")
        icc_profile = b""
    if "xmp" in image.info:
        notes.append("XMP left out")
    dpi = tuple(float(value) for value in image.info.get("dpi", ()))
    if len(dpi) != 2 or not all(math.isfinite(value) and value > 0 for value in dpi):
        dpi = None
    exif = _exif(image)
    image = image.convert(full)
    image.info.clear()
    alpha = image.getchannel("A") if transparent else None
    return Picture(image.convert(target), alpha, exif, icc_profile, dpi, notes)


def _bits(image: Image.Image) -> int:
    """Bits a channel in the file; Pillow gives 8 where a PNG has 16, unless it is gray."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(TAG.BitsPerSample, (1,)))
    return 16 if image.format == "PNG" and image.tile and ";16" in str(image.tile[0].args) else 8


def _exif(image: Image.Image) -> bytes:
    if image.format == "TIFF":
        return _picture_exif(image.getexif(), leave_out={TAG.Orientation})  # Pillow applied it
    exif = image.info.get("exif") or b""
    if not exif and "Raw profile type exif" in image.info:  # how PNGs had it before there was a chunk for it
        exif = image.getexif().tobytes()
    return exif if not exif or exif.startswith(EXIF_PREFIX) else EXIF_PREFIX + exif


def _picture_exif(exif: Image.Exif, leave_out: set[int] = frozenset()) -> bytes:
    """An EXIF block of those tags that say nothing about how pixels are stored; empty if there are none."""
    kept = Image.Exif()
    for tag in (PICTURE_TAGS & set(exif)) - leave_out:
        kept[tag] = exif[tag]
    for group in GROUPS:
        tags = exif.get_ifd(group)
        if tags:
            kept[group] = dict(tags)
    return kept.tobytes() if len(kept) else b""


def _parsed(block: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(block)
    return exif


def check_saving(picture: Picture, path: str | os.PathLike, width: int, height: int) -> None:
    """Raise ValueError unless `picture` can be kept whole, enlarged to width × height, in a file of this extension."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITTEN:
        raise ValueError(f"files {suffix!r} are not written; expected one of {', '.join(WRITTEN)}")
    if suffix in (".jpg", ".jpeg", ".jpe", ".jfif") and picture.alpha is not None:
        raise ValueError("JPEG holds no transparency; expected png, webp or tif")
    most = MAX_SIDE.get(WRITTEN[suffix], math.inf)
    if max(width, height) > most:
        raise ValueError(f"{width}x{height} pixels: {WRITTEN[suffix]} holds sides of at most {most}")


def save_picture(picture: Picture, path: str | os.PathLike) -> list[str]:
    """Write a picture, in the format that the extension of `path` says, with its alpha, EXIF, ICC profile and DPI.

    The file is written beside, read back, compared with what it should hold and only then takes its name. PNG and TIFF
    are lossless; JPEG is written with quality 95 and full colour resolution, WebP with quality 95.

    Returns:
        The notes of the picture, and what the format could not hold as it was.

    Raises:
        ValueError: when the format cannot hold it; see `check_saving`.
        OSError: when the disk refuses, or the file was read back different.
    """
    path, notes = Path(path), list(picture.notes)
    check_saving(picture, path, *picture.color.size)
    kind, color, icc_profile, options = WRITTEN[path.suffix.lower()], picture.color, picture.icc_profile, {}
    if kind == "WEBP" and color.mode == "L":
        notes.append("gray saved as RGB, since WebP has no gray")
        color = color.convert("RGB")
        if icc_profile and icc_profile[16:20] != COLOR_SPACES["RGB"]:
            notes.append("ICC profile left out: it is not for RGB")
            icc_profile = b""
    if kind == "WEBP" and picture.dpi:
        notes.append("DPI left out, since WebP has none")
    image = color.copy()
    if picture.alpha is not None:
        image.putalpha(picture.alpha)
    options = {"icc_profile": icc_profile or None, **LOSSY.get(kind, {})}
    if picture.dpi and kind != "WEBP":
        options["dpi"] = picture.dpi
    if kind == "TIFF" and not picture.exif:  # Pillow loses the EXIF of what it compresses
        options["compression"] = "tiff_lzw"
    with replacing(path) as beside, without_warnings():
        try:
            if picture.exif:
                options["exif"] = _picture_exif(_parsed(picture.exif)) if kind == "TIFF" else picture.exif
            with open(beside, "wb") as file:
                image.save(file, kind, **options)
            _verify(beside, kind, image, picture.exif, icc_profile)
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:  # damaged EXIF shows as all sorts: SyntaxError, struct.error, TypeError, ...
            raise ValueError(f"{kind} cannot be written with what the file carries: {error}") from error
    return notes


def _verify(path: Path, kind: str, image: Image.Image, exif: bytes, icc_profile: bytes) -> None:
    """Raises OSError unless the file holds this image: its pixels (their number, if lossy), EXIF and profile."""
    if kind == "TIFF" and exif:  # reading applies the orientation
        image.info["exif"] = exif
        image = ImageOps.exif_transpose(image)
        exif = _picture_exif(_parsed(exif), leave_out={TAG.Orientation})
    with open(path, "rb") as file:
        back = open_any_size(file, [kind])
        if kind == "TIFF":  # looks at the limit once more when it makes room for the pixels
            stored = (back.tag_v2[TAG.ImageWidth], back.tag_v2[TAG.ImageLength])
            back.im = Image.new(back.mode, stored).im
        back.load()
    same = {
        "pixels": (back.mode, back.size) == (image.mode, image.size)
        and (kind in LOSSY or back.tobytes() == image.tobytes()),
        "ICC profile": (back.info.get("icc_profile") or b"") == icc_profile,
        "EXIF": _exif(back) == exif,
    }
    wrong = [name for name, kept in same.items() if not kept]
    if wrong:
        raise OSError(f"{' and '.join(wrong)} read back different from what was written")
