"""Image files with what they carry: read one to work on its pixels, write the result back in the same form."""

import io
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from pyrdiff.parts.files import replacing

from .alpha import is_opaque
from .carried import PICTURE_TAGS, TIFF_OWN, carried, options_for
from .deep import deepen_png, read_deep
from .images import (
    FEW_BITS,
    MAX_PIXELS,
    MAX_SIDE,
    BadImageError,
    extensions,
    naming_errors,
    open_any_size,
    without_warnings,
)
from .listing import HEIF
from .srgb import by_profile

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
    ".bmp": "BMP",
}
LONGEST = {"JPEG": 65_500, "WEBP": 16_383}
# Alpha is lossless in WebP; "exact" keeps the colours under it, which spread when the file is enlarged again.
LOSSY = {"JPEG": {"subsampling": 0}, "WEBP": {"exact": True}}
QUALITY = 95

EXIF_PREFIX = b"Exif\0\0"
TAG, GROUPS = ExifTags.Base, (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
TURN = Image.Transpose
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
UPRIGHT |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}  # by orientation tag
BACK = {**UPRIGHT, 6: TURN.ROTATE_90, 8: TURN.ROTATE_270}
TURNED = {  # what UPRIGHT does, of arrays
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, 3),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}
TURNED_BACK = {**TURNED, 6: TURNED[8], 8: TURNED[6]}
COLOR_SPACES = {"L": b"GRAY", "RGB": b"RGB "}  # as bytes 16 to 20 of an ICC profile name them


@dataclass
class Picture:
    """The pixels of an image file, as they are stored, and what it carries besides.

    Attributes:
        color: Mode "L" or "RGB", [H, W] pixels in 0..255. The orientation tag of the EXIF is not applied.
        alpha: Mode "L" of the same size, or None for an opaque file, also for one whose alpha is 255 everywhere.
        exif: The EXIF block with its prefix, byte for byte as it was; empty for none.
        icc_profile: The colour profile of `color`; empty for none.
        dpi: Pixels per inch (horizontal, vertical), or None.
        notes: What was changed or left out, one phrase each.
        orientation: How the pixels are shown, 1 to 8, as the EXIF tag counts.
        extras: What else the file carries, by name: PNG text, comments, XMP, IPTC and the like.
        deep: uint16 [H, W] or [H, W, 3], the colours with 16 bits a channel as they are stored; None for 8.
    """

    color: Image.Image
    alpha: Image.Image | None = None
    exif: bytes = b""
    icc_profile: bytes = b""
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)
    orientation: int = 1
    extras: dict[str, object] = field(default_factory=dict)
    deep: np.ndarray | None = None

    def deep_upright(self) -> np.ndarray | None:
        """`deep` as it is shown."""
        return None if self.deep is None else TURNED.get(self.orientation, np.asarray)(self.deep)

    def upright(self) -> tuple[Image.Image, Image.Image | None]:
        """Colour and alpha as they are shown."""
        turn = UPRIGHT.get(self.orientation)
        return tuple(one if one is None or turn is None else one.transpose(turn) for one in (self.color, self.alpha))

    def with_shown(self, color: Image.Image, alpha: Image.Image | None, deep: np.ndarray | None = None) -> "Picture":
        """This picture with other pixels, which are given as they are shown and turned to how they are stored."""
        deep = None if deep is None else np.ascontiguousarray(TURNED_BACK.get(self.orientation, np.asarray)(deep))
        turn = BACK.get(self.orientation)
        stored = (one if one is None or turn is None else one.transpose(turn) for one in (color, alpha))
        color, alpha = stored
        return replace(self, color=color, alpha=alpha, deep=deep, notes=list(self.notes))


def open_picture(path: str | os.PathLike, max_pixels: int = MAX_PIXELS, deep: bool = False) -> Picture:
    """Read an image file: PNG, JPEG, WebP, TIFF, BMP or GIF.

    Palettes, CMYK and other colour spaces become RGB, one transparent colour or entry becomes an alpha channel, and 1
    bit becomes gray; `notes` says so. Of a photo with further pictures inside (MPO: a preview, a gain map) the first
    is taken. A TIFF is turned upright, since Pillow does that; in other files pixels and orientation tag stay.

    Args:
        path: The file.
        max_pixels: The most pixels (width × height) that are decoded.
        deep: Whether 16 bits a channel are taken, as `Picture.deep`.

    Raises:
        BadImageError: when it cannot be read whole, has several frames, or more bits a channel than are taken.
    """
    name = str(path)
    with naming_errors(name), without_warnings():
        data = Path(path).read_bytes()
        if not data:
            raise BadImageError(name, "empty file")
        try:
            image = Image.open(io.BytesIO(data), formats=readable())
        except UnidentifiedImageError as error:
            heif = Path(path).suffix.lower() in HEIF and not HEIF & extensions()
            expected = "pillow-heif to be installed (pip install pillow-heif)" if heif else ", ".join(readable())
            kind = "a HEIC file" if heif else "not an image"
            raise BadImageError(name, f"{kind}; expected {'' if heif else 'one of '}{expected}") from error
        with image:
            reopen = (lambda: Image.open(io.BytesIO(data), formats=readable())) if deep else None
            return _read(image, data, max_pixels, name, reopen)


class Header(NamedTuple):
    """(width, height) of a picture as it is shown, and its frames; further pictures in a photo (MPO) are none."""

    size: tuple[int, int]
    frames: int


def read_header(path: str | os.PathLike) -> Header | None:
    """What the header of a picture says; `None` if it cannot be read."""
    try:
        with without_warnings(), open(path, "rb") as file, open_any_size(file, readable()) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            return Header(image.size[::-1] if _orientation(image) >= 5 else image.size, frames)
    except Exception:  # whoever opens it to work on it says what is wrong
        return None


def readable() -> tuple[str, ...]:
    """The formats that pictures are read from."""
    return READ + (("HEIF",) if HEIF & extensions() else ())


def reopen_picture(path: str | os.PathLike) -> Picture:
    """A picture that `save_picture` wrote, of any number of pixels, as `open_picture` reads it."""
    name, data = str(path), Path(path).read_bytes()
    kind = WRITTEN[Path(path).suffix.lower()]
    with naming_errors(name), without_warnings():
        return _read(_any_size(data, kind), data, math.inf, name, lambda: _any_size(data, kind))


def _any_size(data: bytes, kind: str) -> Image.Image:
    image = open_any_size(io.BytesIO(data), [kind])
    if kind == "TIFF":  # looks at the limit once more when it makes room for the pixels
        stored = (image.tag_v2[TAG.ImageWidth], image.tag_v2[TAG.ImageLength])
        image.im = Image.new(image.mode, stored).im
    return image


def _read(image: Image.Image, data: bytes, max_pixels: float, name: str, reopen: Callable | None) -> Picture:
    if max(image.size) > MAX_SIDE:
        raise BadImageError(name, f"too large: {image.width}x{image.height}; expected sides of at most {MAX_SIDE}")
    if image.width * image.height > max_pixels:
        raise BadImageError(name, f"too large: {image.width}x{image.height}; expected at most {max_pixels} pixels")
    bits, notes = _bits(image), []
    if bits > 8 and (bits != 16 or reopen is None):
        raise BadImageError(name, f"{bits}-bit pixels: expected 8 bits a channel{' or 16' if reopen else ''}")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise BadImageError(name, f"{frames} frames or pages: expected one")
    if frames > 1:
        notes.append(f"the first of {frames} pictures in the file")
    turned = image.format == "TIFF" and image.getexif().get(TAG.Orientation, 1) != 1
    if turned:
        notes.append("turned upright, as its orientation tag says")
    deep = _deep(image, reopen, name, notes) if bits == 16 else None
    image.load()
    if deep is not None and image.mode.startswith("I"):
        image = _as_8_bits(image, deep)
    extras, orientation = carried(image, data), 1 if image.format == "TIFF" else _orientation(image)

    mode, target = image.mode, {"1": "L", "L": "L", "LA": "L"}.get(image.mode, "RGB")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if alpha is not None and is_opaque(alpha):
        notes.append("alpha left out: it is opaque everywhere")
        alpha, mode = None, {"RGBA": "RGB", "LA": "L"}.get(mode, mode)
    full = {"L": "LA", "RGB": "RGBA"}[target] if alpha is not None else target
    if mode != full:
        notes.append(f"{mode} converted to {full}")
    icc_profile = image.info.get("icc_profile") or b""
    if icc_profile and mode not in (target, full) and icc_profile[16:20] != COLOR_SPACES[target]:
        try:
            image, icc_profile = by_profile(image, icc_profile), b""
            notes.append("colours converted to sRGB, by the ICC profile")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes.append(f"ICC profile left out: it is not for {target}")
            icc_profile = b""
    dpi = tuple(float(value) for value in image.info.get("dpi", ()))
    if len(dpi) != 2 or not all(math.isfinite(value) and value > 0 for value in dpi):
        dpi = None
    exif = _exif(image)
    color = image.convert(full).convert(target)
    color.info.clear()
    return Picture(color, alpha, exif, icc_profile, dpi, notes, orientation, extras, deep)


def _deep(image: Image.Image, reopen: Callable, name: str, notes: list[str]) -> np.ndarray | None:
    """The colours with 16 bits a channel; None if they are taken with 8."""
    try:
        found = read_deep(image, reopen)
    except MemoryError:
        raise
    except Exception as error:  # as a decoder's
        raise BadImageError(name, str(error) or type(error).__name__) from error
    if found is None:
        notes.append("16 bits a channel read as 8")
        return None
    bits = int(found.max()).bit_length()
    if 0 < bits <= FEW_BITS:
        notes.append(f"16-bit values that use {bits} bits only, so the picture is dark as it is")
    return found


def _as_8_bits(image: Image.Image, deep: np.ndarray) -> Image.Image:
    """A gray image of 16 bits as one of 8, with what it carries."""
    made = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    made.info, made.format = dict(image.info), image.format
    key = made.info.pop("transparency", None)
    if key is not None:
        made.putalpha(Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8)))
    for name in ("text", "tag_v2", "applist"):
        if hasattr(image, name):
            setattr(made, name, getattr(image, name))
    made.getexif = image.getexif
    return made


def _orientation(image: Image.Image) -> int:
    """1 to 8, as training takes it: from the EXIF or the XMP; 1 where these are damaged."""
    try:
        found = image.getexif().get(TAG.Orientation, 1)
    except Exception:  # damaged EXIF shows as all sorts; the pixels are good
        return 1
    return found if found in UPRIGHT else 1


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


def save_options(kind: str, quality: int = QUALITY, lossless: bool = False) -> dict[str, object]:
    """What `Image.save` is told of the loss; see `save_picture`."""
    if lossless and kind == "WEBP":
        return {"lossless": True, "exact": True}
    return {**LOSSY[kind], "quality": quality} if kind in LOSSY else {}


def check_saving(picture: Picture, path: str | os.PathLike, width: int, height: int, lossless: bool = False) -> None:
    """
    Raise ValueError unless `picture` can be kept whole, enlarged to width × height, in a file of this extension, and
    without loss if that is asked for.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITTEN:
        raise ValueError(f"files {suffix!r} are not written; expected one of {', '.join(WRITTEN)}")
    if WRITTEN[suffix] in ("JPEG", "BMP") and picture.alpha is not None:
        raise ValueError(f"{WRITTEN[suffix]} holds no transparency; expected png, webp or tif")
    if lossless and WRITTEN[suffix] == "JPEG":
        raise ValueError("JPEG is never lossless; expected png, webp or tif")
    most = LONGEST.get(WRITTEN[suffix], math.inf)
    if max(width, height) > most:
        raise ValueError(f"{width}x{height} pixels: {WRITTEN[suffix]} holds sides of at most {most}")


def save_picture(
    picture: Picture,
    path: str | os.PathLike,
    replacing: Callable[[Path], AbstractContextManager[Path]] = replacing,
    quality: int = QUALITY,
    lossless: bool = False,
) -> list[str]:
    """Write a picture, in the format that the extension of `path` says, with as much of what it carries as that holds.

    The file is written beside, read back, compared with what it should hold and only then takes its name. PNG, TIFF and
    BMP are lossless; JPEG is written with full colour resolution.

    Args:
        picture: What to write.
        path: The file.
        replacing: How it is replaced: f(path) -> a context with the path to write to.
        quality: Of JPEG and WebP, 1 to 100.
        lossless: Whether WebP keeps every pixel.

    Returns:
        The notes of the picture, and what the file does not hold as it was.

    Raises:
        ValueError: when the format cannot hold it; see `check_saving`.
        OSError: when the disk refuses, or the file was read back different.
    """
    path, notes = Path(path), list(picture.notes)
    check_saving(picture, path, *picture.color.size, lossless)
    kind = WRITTEN[path.suffix.lower()]
    picture = _as_held(picture, kind, notes)
    image = picture.color.copy()
    if picture.alpha is not None and not is_opaque(picture.alpha):
        image.putalpha(picture.alpha)
    if kind == "TIFF" and picture.deep is not None:
        image = Image.fromarray(picture.deep)
    loss = save_options(kind, quality, lossless)
    options = {"icc_profile": picture.icc_profile or None, **loss, **options_for(kind, picture.extras)}
    if picture.dpi:
        options["dpi"] = picture.dpi
    if kind == "TIFF" and not picture.exif:  # Pillow loses the EXIF of what it compresses
        options["compression"] = "tiff_lzw"
    with replacing(path) as beside, without_warnings():
        try:
            if picture.exif:
                options["exif"] = _picture_exif(_parsed(picture.exif)) if kind == "TIFF" else picture.exif
            with open(beside, "wb") as file:
                image.save(file, kind, **options)
            if kind == "PNG" and picture.deep is not None:
                deepen_png(beside, picture.deep, picture.alpha)
            back = _verify(beside, kind, image, picture, lossy="quality" in loss)
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:  # damaged EXIF shows as all sorts: SyntaxError, struct.error, TypeError, ...
            raise ValueError(f"{kind} cannot be written with what the file carries: {error}") from error
    lost = [name for name, value in picture.extras.items() if back.get(name) != value]
    if kind == "TIFF" and picture.exif:
        tags = set(_parsed(picture.exif)) - PICTURE_TAGS - TIFF_OWN
        lost += sorted(f"EXIF {ExifTags.TAGS.get(tag, tag)}" for tag in tags - {int(group) for group in GROUPS})
    return notes + ([f"left out: {', '.join(lost)}"] if lost else [])


def _as_held(picture: Picture, kind: str, notes: list[str]) -> Picture:
    """The picture without what a format has no place for; what goes is noted."""
    color, icc_profile, exif, dpi = picture.color, picture.icc_profile, picture.exif, picture.dpi
    if kind == "WEBP" and color.mode == "L":
        notes.append("gray saved as RGB, since WebP has no gray")
        color = color.convert("RGB")
        if icc_profile and icc_profile[16:20] != COLOR_SPACES["RGB"]:
            notes.append("ICC profile left out: it is not for RGB")
            icc_profile = b""
    if kind == "WEBP" and dpi:
        notes.append("DPI left out, since WebP has none")
        dpi = None
    if kind == "BMP" and icc_profile:
        notes.append("ICC profile left out, since BMP has none")
        icc_profile = b""
    if exif and (kind == "BMP" or (kind == "JPEG" and len(exif) > 65_533)):
        notes.append("EXIF left out, since BMP has none" if kind == "BMP" else "EXIF left out: too long for JPEG")
        exif = b""
    if kind == "BMP" and picture.orientation in UPRIGHT:
        notes.append("turned upright, since BMP has no orientation")
        color = picture.upright()[0]
    deep = picture.deep
    if deep is not None and kind != "PNG" and (kind != "TIFF" or deep.ndim == 3 or picture.alpha is not None):
        notes.append(f"saved with 8 bits a channel, as {kind} is written here; png keeps 16")
        deep = None
    return replace(picture, color=color, icc_profile=icc_profile, exif=exif, dpi=dpi, deep=deep)


def _verify(path: Path, kind: str, image: Image.Image, picture: Picture, lossy: bool) -> dict[str, object]:
    """
    Raises OSError unless the file holds this image: its pixels (their number, if lossy), EXIF and profile. Returns what
    else it carries.
    """
    exif, deep = picture.exif, picture.deep
    if kind == "TIFF" and exif:  # reading applies the orientation
        image.info["exif"] = exif
        image = ImageOps.exif_transpose(image)
        exif = _picture_exif(_parsed(exif), leave_out={TAG.Orientation})
    data = path.read_bytes()
    back = _any_size(data, kind)
    if deep is None:
        back.load()
        alike = (back.mode, back.size) == (image.mode, image.size)
        alike = alike and (lossy or back.tobytes() == image.tobytes())
    else:
        found = read_deep(back, lambda: _any_size(data, kind))
        turn = TURNED.get(picture.orientation, np.asarray) if kind == "TIFF" else np.asarray
        back.load()
        alike = found is None or np.array_equal(found, turn(deep))
        alike = alike and (picture.alpha is None or back.getchannel("A").tobytes() == picture.alpha.tobytes())
    same = {
        "pixels": alike,
        "ICC profile": (back.info.get("icc_profile") or b"") == picture.icc_profile,
        "EXIF": _exif(back) == exif,
    }
    wrong = [name for name, kept in same.items() if not kept]
    if wrong:
        raise OSError(f"{' and '.join(wrong)} read back different from what was written")
    return carried(back, data)
