"""Pixels of 16 bits a channel, which Pillow knows for gray images only: read from PNG and TIFF, written to PNG."""

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .carried import png_chunks

COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of a PNG, by its channels: gray, gray and alpha, RGB, RGBA
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_deep(image: Image.Image, reopen: Callable[[], Image.Image]) -> np.ndarray | None:
    """
    The colours of an image of 16 bits a channel.

    Args:
        image: As Pillow opened it, not loaded.
        reopen: Opens it once more.

    Returns:
        uint16 [H, W] or [H, W, 3], without alpha, turned as Pillow turns what it loads; None where Pillow has no way to
        the lower bits.
    """
    if image.mode.startswith("I"):
        with reopen() as whole:
            values = np.asarray(whole)
        return values.astype(np.uint16) if values.min() >= 0 and values.max() <= 65535 else None
    raw = str(_raw_mode(image))
    if image.mode not in ("RGB", "RGBA") or ";16" not in raw:
        return None
    kind, order = raw.split(";16")
    high, low = (_bytes_of(reopen, f"{kind};16{one}") for one in ("L", "B"))
    if high is None or low is None:
        return None
    if order == "B" or (order == "N" and sys.byteorder == "big"):
        high, low = low, high  # each reads the byte that it takes for the upper one
    return (high.astype(np.uint16) << 8 | low)[..., :3]


def _raw_mode(image: Image.Image) -> object:
    """How the pixels lie in the file, by the decoder's first argument."""
    given = image.tile[0].args if image.tile else ""
    return given if isinstance(given, str) else given[0]


def _bytes_of(reopen: Callable[[], Image.Image], raw: str) -> np.ndarray | None:
    """One of the two bytes of each value: the one that is the upper one if they lie as `raw` says."""
    with reopen() as image:
        tile = image.tile[0]
        args = raw if isinstance(tile.args, str) else (raw, *tile.args[1:])
        image.tile = [tile._replace(args=args) for tile in image.tile]
        try:
            return np.asarray(image)
        except ValueError:  # no such order for this mode
            return None


def deepen_png(path: Path, color: np.ndarray, alpha: Image.Image | None) -> None:
    """
    Puts pixels of 16 bits into a PNG that Pillow wrote with 8, whose other chunks stay.

    Args:
        path: The file.
        color: uint16 [H, W] or [H, W, 3].
        alpha: Mode "L" of the same size, or None.
    """
    pixels = color.reshape(*color.shape[:2], -1)
    if alpha is not None:
        pixels = np.concatenate([pixels, np.asarray(alpha, np.uint16)[..., None] * 257], axis=-1)
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    filtered = np.zeros((height, rows.shape[1] + 1), np.uint8)
    filtered[1:, 0] = 2  # each byte less the one above it
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 16, COLOR_TYPES[channels], 0, 0, 0)
    chunks = [(name, body) for name, body in png_chunks(path.read_bytes()) if name not in ("IHDR", "IDAT", "IEND")]
    with open(path, "wb") as file:
        file.write(SIGNATURE)
        for name, body in [("IHDR", header), *chunks, ("IDAT", zlib.compress(filtered, 6)), ("IEND", b"")]:
            tag = name.encode("latin-1")
            file.write(struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)))
