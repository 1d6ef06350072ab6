"""Pictures of users: read in the form that a model takes, or refused in a sentence."""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from pyrdiff.data import BadImageError, Picture, open_picture
from pyrdiff.data.files import READ
from pyrdiff.data.images import open_any_size, without_warnings
from pyrdiff.data.srgb import to_srgb

MAX_FILE_MB = 64
MODES = {1: "L", 3: "RGB"}  # by channels


def read_picture(path: str | None, channels: int, max_pixels: int) -> tuple[Image.Image, list[str]]:
    """
    A picture in a model's mode, upright and opaque, and what was done to it. Its size is read from the header before
    anything is decoded.

    Args:
        path: The file.
        channels: Of the model's images.
        max_pixels: The most pixels that are decoded.

    Raises:
        ValueError: for no picture, or one that is broken, too large, animated or of more than 8 bits a channel.
    """
    if not path:
        raise ValueError("No picture yet: drop one first.")
    name = Path(path).name
    try:
        megabytes = Path(path).stat().st_size / 1e6
        if megabytes > MAX_FILE_MB:
            raise ValueError(f"{name} cannot be used: {megabytes:.0f} MB; expected at most {MAX_FILE_MB}.")
        width, height = _header_size(path)
        if width * height > max_pixels:
            raise ValueError(
                f"{name} cannot be used: {width}×{height} are {width * height / 1e6:.0f} megapixels; expected at "
                f"most {max_pixels / 1e6:g}."
            )
        picture = open_picture(path, max_pixels)
    except BadImageError as error:
        raise ValueError(f"{name} cannot be used: {error.reason}.") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}.") from error
    notes = list(picture.notes)
    picture.color.info["icc_profile"] = picture.icc_profile
    picture.color = to_srgb(picture.color, notes)
    image = _upright(_opaque(picture, notes), picture.exif, notes)
    mode = MODES.get(channels, "RGB")
    if image.mode != mode:
        notes.append("made gray, for this model" if mode == "L" else "gray taken as colour, for this model")
        image = image.convert(mode)
    return image, notes


def view(image: Image.Image, side: int) -> Image.Image:
    """An image for the screen: a small one enlarged by whole pixels, a large one made smaller, `side` at most."""
    longest = max(image.size)
    if longest > side:
        size = tuple(max(round(length * side / longest), 1) for length in image.size)
        return image.resize(size, Image.Resampling.BOX)
    times = max(side // longest, 1)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _opaque(picture: Picture, notes: list[str]) -> Image.Image:
    if picture.alpha is None:
        return picture.color
    notes.append("transparency laid on white")
    white = Image.new(picture.color.mode, picture.color.size, "white")
    return Image.composite(picture.color, white, picture.alpha)


def _upright(image: Image.Image, exif: bytes, notes: list[str]) -> Image.Image:
    """Turned as the orientation tag says, if there is one."""
    if not exif:
        return image
    try:
        image.info["exif"] = exif
        turned = ImageOps.exif_transpose(image)
        if turned.size != image.size or turned.tobytes() != image.tobytes():
            notes.append("turned upright, as its orientation tag says")
        image = turned
    except Exception:  # damaged EXIF shows as all sorts; the pixels are good
        pass
    image.info.clear()
    return image


def _header_size(path: str) -> tuple[int, int]:
    """(width, height) from the header of an image file of any size; nothing is decoded."""
    try:
        with without_warnings(), open(path, "rb") as file:
            return open_any_size(file, READ).size
    except UnidentifiedImageError as error:
        raise BadImageError(path, f"not an image; expected one of {', '.join(READ)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise BadImageError(path, f"damaged ({error})") from error
    except Exception as error:
        raise BadImageError(path, f"damaged ({error})") from error
