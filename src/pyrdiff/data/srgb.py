"""What the numbers in an image file mean: its colours as sRGB has them, by the ICC profile or the gamma of the file."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # of Pillow, by the colour space that a profile is of
NEAR = 1  # a profile that changes no colour by more, in 0..255, is taken for sRGB
SRGB_GAMMA = 1 / 2.2
# White, red, green, blue as a PNG of sRGB has them.
SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


def to_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """
    The image in sRGB, if its file says what its numbers mean; what is not said is sRGB.

    Args:
        image: Mode "L", "RGB" or "CMYK", opaque, 0..255, with the `info` of its file.
        notes: What was done, or could not be, is added here, a phrase each.

    Returns:
        The image itself where nothing changes; or mode "L" for "L", and "RGB" for others.
    """
    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = by_profile(image, profile)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes.append("the ICC profile cannot be used, and colours are taken as sRGB")
            return image
        if converted is not image:
            notes.append("colours converted to sRGB, by the ICC profile")
        return converted
    if image.mode not in ("L", "RGB") or "srgb" in image.info:
        return image
    primaries = image.info.get("chromaticity", SRGB_PRIMARIES)
    if max(abs(one - other) for one, other in zip(primaries, SRGB_PRIMARIES, strict=False)) > 0.01:
        notes.append("the primaries of the PNG (cHRM) are not those of sRGB, and are left out of account")
    gamma = image.info.get("gamma", SRGB_GAMMA)
    if not 0.01 < gamma < 10 or abs(gamma - SRGB_GAMMA) < 0.02:
        return image
    notes.append("colours converted to sRGB, by the gamma of the PNG (gAMA)")
    linear = (np.arange(256) / 255) ** (1 / gamma)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return image.point(np.rint(255 * encoded).astype(int).tolist() * len(image.getbands()))


def by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """
    As `to_srgb`, for an ICC profile.

    Raises:
        ImageCms.PyCMSError, ValueError: if the profile is damaged, or is not of such an image.
    """
    space, transform = _transform(profile)
    if image.mode not in (space, "L"):
        raise ValueError(f"a profile of {space} for {image.mode}")
    if transform is None:
        return image
    colours = image.convert("RGB") if image.mode == "L" and space == "RGB" else image
    if colours.mode != space:
        raise ValueError(f"a profile of {space} for {image.mode}")
    converted = ImageCms.applyTransform(colours, transform)
    converted.info = dict(image.info)
    return converted.convert(image.mode) if image.mode == "L" else converted


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a profile is of, and the way to sRGB; none if it is sRGB."""
    read = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = MODES.get(read.profile.xcolor_space.strip())
    if mode is None:
        raise ValueError(f"a profile of {read.profile.xcolor_space.strip()!r}")
    transform = ImageCms.buildTransform(
        read,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return mode, transform
    values = np.arange(0, 256, 15 if mode == "RGB" else 1, dtype=np.uint8)
    grid = np.stack(np.meshgrid(values, values, values), -1).reshape(1, -1, 3) if mode == "RGB" else values[None]
    probe = Image.fromarray(grid)
    made = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    same = np.abs(made - np.asarray(probe.convert("RGB"))).max() <= NEAR
    return mode, None if same else transform
