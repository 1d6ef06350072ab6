"""What an image file carries beside its pixels, by name: what went out is compared with what came in."""

import struct
from collections.abc import Iterator

from PIL import ExifTags, Image, TiffTags
from PIL.PngImagePlugin import PngInfo

# What `Picture` has fields for, what says how pixels are stored, and what says that colours are sRGB.
PNG_OWN = {"IHDR", "PLTE", "IDAT", "IEND", "tRNS", "iCCP", "eXIf", "pHYs", "tEXt", "zTXt", "iTXt", "sRGB"}
PNG_KEPT = ("gAMA", "cHRM", "cICP")  # as they are, in a PNG
JPEG_OWN = (b"JFIF", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0", b"MPF\0", b"Adobe")
JPEG_KEPT = {"COM": "JPEG comment", "APP13": "IPTC (APP13)"}  # as they are, in a JPEG
JPEG_CODES = {"COM": 0xFE, "APP13": 0xED}
WEBP_OWN = {"VP8 ", "VP8L", "VP8X", "ALPH", "ICCP", "EXIF", "XMP "}
TIFF_OWN = {*range(254, 270), *range(273, 285), 290, 291, 292, 293, 296, 297, 317, 320, 338, 339, 340, 341, 347}
TIFF_OWN |= {322, 323, 324, 325, 512, 513, 514, 519, 520, 521, 529, 530, 531, 532, 700, 34665, 34675, 34853}
TAG = ExifTags.Base
# In a TIFF these tags lie among those that say how the pixels are stored, which are those of one file only.
PICTURE_TAGS = {TAG.ImageDescription, TAG.Make, TAG.Model, TAG.Orientation, TAG.Software, TAG.DateTime, TAG.Artist}
PICTURE_TAGS |= {TAG.HostComputer, TAG.Copyright}
MAX_SEGMENT = 65_533 - 29  # of a JPEG, less the name of what is in it
OLD_EXIF, XMP_TEXT = "Raw profile type exif", "XML:com.adobe.xmp"


def carried(image: Image.Image, data: bytes) -> dict[str, object]:
    """
    {name: value} of what a loaded image file carries besides pixels, EXIF, ICC profile and DPI.

    Args:
        image: As Pillow opened it.
        data: The content of the file.
    """
    found: dict[str, object] = {}
    if image.info.get("xmp"):
        found["XMP"] = image.info["xmp"]
    if image.format == "PNG":
        texts = {key: text for key, text in image.text.items() if key not in (OLD_EXIF, XMP_TEXT)}
        found |= {f"PNG text {key!r}": text for key, text in texts.items()}
        found |= {f"PNG chunk {name}": body for name, body in png_chunks(data) if name not in PNG_OWN}
    elif image.format in ("JPEG", "MPO"):
        for name, body in image.applist:
            if not body.startswith(JPEG_OWN) or name == "COM":
                found.setdefault(JPEG_KEPT.get(name, f"JPEG segment {name}"), []).append(body)
    elif image.format == "WEBP":
        found |= {f"WebP chunk {name}": body for name, body in webp_chunks(data) if name not in WEBP_OWN}
    elif image.format == "TIFF":
        tags = set(image.tag_v2) - TIFF_OWN - set(PICTURE_TAGS)
        found |= {f"TIFF tag {TiffTags.lookup(tag).name} ({tag})": image.tag_v2[tag] for tag in tags}
    elif image.info.get("comment"):
        found["comment"] = image.info["comment"]
    return found


def options_for(kind: str, extras: dict[str, object]) -> dict[str, object]:
    """What `Image.save` is told to write as much of `carried` as a format can hold."""
    options: dict[str, object] = {}
    xmp = extras.get("XMP")
    if xmp and (kind == "WEBP" or (kind == "JPEG" and len(xmp) <= MAX_SEGMENT)):
        options["xmp"] = xmp
    if kind == "PNG":
        info = PngInfo()
        for name, value in extras.items():
            if name.startswith("PNG text "):
                info.add_text(name.removeprefix("PNG text ")[1:-1], value)
            elif name.removeprefix("PNG chunk ") in PNG_KEPT:
                info.add(name.removeprefix("PNG chunk ").encode(), value)
        if xmp:
            info.add_itxt(XMP_TEXT, xmp.decode("utf-8", "replace"))
        options["pnginfo"] = info
    if kind == "JPEG":
        kept = ((code, extras.get(JPEG_KEPT[name], ())) for name, code in JPEG_CODES.items())
        options["extra"] = b"".join(
            struct.pack(">BBH", 0xFF, code, len(body) + 2) + body for code, bodies in kept for body in bodies
        )
    return options


def png_chunks(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each chunk of a PNG."""
    place = 8
    while place + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        yield data[place + 4 : place + 8].decode("latin-1"), data[place + 8 : place + 8 + size]
        place += size + 12


def webp_chunks(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each chunk of a WebP."""
    place = 12
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        yield data[place : place + 4].decode("latin-1"), data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2
