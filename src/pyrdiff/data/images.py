"""Reading images: decode one, fit it to a size."""

import contextlib
import errno
import functools
import importlib
import io
import os
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .srgb import to_srgb

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte as 24-bit RGB
MAX_SIDE = 2**24  # Pillow's decoders count the bits of a row in 32 bits, and raise MemoryError beyond
WHITE = (255, 255, 255)
FEW_BITS = 14  # 16-bit values that need no more come from a sensor of so many bits, most likely

# Pillow identifies these but cannot decode them without further programs; EPS would run Ghostscript on what is read.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# These say that the machine is short of something, not that the image is bad.
MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class BadImageError(ValueError):
    """An image that cannot be read.

    Attributes:
        name: The path, or what else the image is called.
        reason: What is wrong with it, in a few words.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"bad image {name}: {reason}")
        self.name = name
        self.reason = reason


@functools.cache
def _formats() -> list[str]:
    Image.init()
    with contextlib.suppress(ImportError):  # the extra "heif"
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in Image.ID if name not in NOT_DECODED]


@functools.cache
def extensions() -> frozenset[str]:
    """The endings of the files that can be decoded, in lower case, with their dot."""
    formats = _formats()  # first: the extra registers its own
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in formats)


def decode_image(
    source: str | os.PathLike | bytes | Image.Image,
    channels: Literal[1, 3],
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """Decode one image fully, upright, opaque, in sRGB and with 8 bits a channel.

    The EXIF orientation is applied. Transparency of any kind is composited on `background`, and whether there was any
    (a pixel that is not fully opaque) is said in `info["composited"]` of the result. Integer pixels of more than 8 bits
    are read as 16 bits, 0..65535, and divided by 257. The first of several frames is taken. Colours of another ICC
    profile, or another gamma (PNG), are converted to sRGB. `info["notes"]` of the result is a list of phrases: what was
    converted, what could not be, and values that look as if they had another range.

    Args:
        source: A path, the bytes of an image file, or a Pillow image (left as it is).
        channels: 3 for mode "RGB", 1 for mode "L".
        background: (red, green, blue) in 0..255.
        max_pixels: The most pixels (width × height) that are decoded. The header is asked, before any decoding.
            Pillow's own limit, twice `PIL.Image.MAX_IMAGE_PIXELS`, holds too.
        name: What errors call the image; the path, "bytes" or "image" when None.

    Returns:
        A new Pillow image of mode "RGB" or "L", [H, W] pixels in 0..255.

    Raises:
        BadImageError: when the image cannot be read.
        ValueError: when an argument is out of range.
    """
    check_decoding(channels, background, max_pixels)
    if name is None:
        name = str(source)
        if isinstance(source, (bytes, Image.Image)):
            name = "bytes" if isinstance(source, bytes) else "image"
    with naming_errors(name):
        if isinstance(source, Image.Image):
            return _decode(source, channels, background, max_pixels, name)
        size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
        if size == 0:
            raise BadImageError(name, "empty file")
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_formats()) as image:
            return _decode(image, channels, background, max_pixels, name)


def open_any_size(file: BinaryIO, formats: Sequence[str]) -> Image.Image:
    """
    `Image.open` without Pillow's limit on pixels. The limit is a setting of the whole process, where other threads read
    files of strangers at the same time: it stays as it is. Nothing is decoded yet.

    Args:
        file: The file, at its beginning.
        formats: Those to try, as Pillow names them.

    Raises:
        UnidentifiedImageError: if it is none of these.
    """
    Image.init()
    prefix = file.read(16)
    for factory, accepts in (Image.OPEN[name] for name in formats):
        accepted = accepts is None or accepts(prefix)
        if accepted and not isinstance(accepted, str):  # a string says what is missing
            file.seek(0)
            with contextlib.suppress(
                SyntaxError, IndexError, TypeError, struct.error
            ):  # as Pillow has it: not this one
                return factory(file, "")
    raise UnidentifiedImageError(f"expected one of {', '.join(formats)}")


@contextmanager
def without_warnings() -> Iterator[None]:
    """
    In the block, Python's warnings are off. Blocks of several threads may overlap: `warnings.catch_warnings` alone
    would then leave them off for good.
    """
    with _warnings.lock:
        _warnings.blocks += 1
        if _warnings.blocks == 1:
            _warnings.before.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
    try:
        yield
    finally:
        with _warnings.lock:
            _warnings.blocks -= 1
            if _warnings.blocks == 0:
                _warnings.before.close()


class _Warnings:
    """How many blocks have warnings off, and what was before the first one."""

    def __init__(self):
        self.lock, self.blocks, self.before = threading.Lock(), 0, contextlib.ExitStack()


_warnings = _Warnings()


@contextmanager
def naming_errors(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises in the block into a `BadImageError`; what the machine is short of stays."""
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(name, "not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(name, f"too large: {error}") from error
    except Exception as error:  # decoders meet damage with all sorts: OSError, SyntaxError, struct.error, IndexError, …
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise BadImageError(name, text) from error


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre of `image` at height × width: scaled to cover it with the aspect kept, the rest cut off.

    Bicubic, antialiased when it shrinks. Cut and scaling are one resampling, so the cut may fall between pixels.

    Args:
        image: Mode "RGB" or "L", as `decode_image` gives it.
        height: Rows of the result, at least 1.
        width: Columns of the result, at least 1.

    Raises:
        ValueError: for another mode or a size below 1.
    """
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"image.mode={image.mode!r}: expected 'RGB' or 'L'")
    if height < 1 or width < 1:
        raise ValueError(f"height={height}, width={width}: expected 1 or more")
    box_width, box_height = float(image.width), float(image.height)
    if image.width * height > image.height * width:
        box_width = image.height * width / height
    else:
        box_height = image.width * height / width
    left = max(0.0, (image.width - box_width) / 2)
    top = max(0.0, (image.height - box_height) / 2)
    box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def image_tensor(images: Sequence[Image.Image], channels: Literal[1, 3] = 3) -> torch.Tensor:
    """Pillow images of one size as float32 [B, channels, H, W] in [0, 1]."""
    mode = "L" if channels == 1 else "RGB"
    pixels = np.stack([np.asarray(image.convert(mode)).reshape(image.height, image.width, -1) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous() / 255


def check_decoding(channels: int, background: tuple[int, int, int], max_pixels: int) -> None:
    """Raise ValueError unless these are values `decode_image` accepts."""
    if channels not in (1, 3):
        raise ValueError(f"channels={channels!r}: expected 1 (gray) or 3 (RGB)")
    if len(background) != 3 or any(not isinstance(value, int) or not 0 <= value <= 255 for value in background):
        raise ValueError(f"background={background!r}: expected three ints in 0..255")
    if max_pixels < 1:
        raise ValueError(f"max_pixels={max_pixels!r}: expected 1 or more")


def _decode(image: Image.Image, channels: int, background: tuple, max_pixels: int, name: str) -> Image.Image:
    width, height = image.size
    if width == 0 or height == 0:
        raise BadImageError(name, f"no pixels ({width}×{height})")
    if max(width, height) > MAX_SIDE:
        raise BadImageError(name, f"too large: {width}×{height} pixels, a side of more than {MAX_SIDE}")
    if width * height > max_pixels:
        raise BadImageError(name, f"too large: {width}×{height} pixels, more than max_pixels={max_pixels}")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise BadImageError(name, "float pixels (mode 'F') have no defined range")
    notes: list[str] = []
    if image.mode.startswith("I"):
        image = _to_8_bits(image, name, notes)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = to_srgb(_opaque(image), notes)
    composited = alpha is not None and alpha.getextrema()[0] < 255
    if composited:
        laid = Image.new("RGB", image.size, background)
        laid.paste(image.convert("RGB"), mask=alpha)
        image = laid
    if channels == 1 and image.mode not in ("L", "1"):
        image = image.convert("RGB")  # what is neither gray nor RGB (CMYK, LAB, …) has no direct way to gray
    image = image.convert("RGB" if channels == 3 else "L")
    image.info["composited"], image.info["notes"] = composited, notes
    return image


def _opaque(image: Image.Image) -> Image.Image:
    """The colours without their transparency, in a mode that profiles are of where there is one."""
    mode = {"1": "L", "LA": "L", "La": "L", "RGBX": "RGB", "RGBA": "RGB", "RGBa": "RGB", "P": "RGB", "PA": "RGB"}
    return image.convert(mode.get(image.mode, image.mode)) if image.mode in mode else image.copy()


def _to_8_bits(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Modes "I" and "I;16…" with values in 0..65535 to "L", or "LA" where one value is marked as transparent."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError(name, f"integer pixels in {values.min()}..{values.max()}: expected 0..65535")
    bits = int(values.max()).bit_length()
    if 0 < bits <= FEW_BITS:
        notes.append(
            f"16-bit values that use {bits} bits only, up to {2**bits - 1} of 65535, so the image is dark; to use the "
            f"full range multiply them by {2 ** (16 - bits)}"
        )
    gray = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    gray.info = {key: value for key, value in image.info.items() if key != "transparency"}
    if "transparency" in image.info:
        gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray
