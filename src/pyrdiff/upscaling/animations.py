"""Animations, and files of several pages, enlarged frame by frame."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageSequence

from pyrdiff.data import Picture
from pyrdiff.data.alpha import is_opaque
from pyrdiff.data.images import naming_errors, open_any_size, without_warnings

KINDS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}  # that hold several frames
READ = ("PNG", "WEBP", "GIF", "TIFF")


class Animation(NamedTuple):
    """Frames of one size, how long each is shown in milliseconds (0 for pages), and how often all are (0: always)."""

    frames: list[Picture]
    durations: list[int]
    loop: int | None


def check_animation(path: Path) -> None:
    """
    Raises:
        ValueError: if a file of this name holds one frame only.
    """
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"several frames: files {path.suffix!r} hold one; expected one of {', '.join(KINDS)}")


def open_animation(path: Path) -> Animation:
    """
    The frames as they are shown, each as a whole.

    Raises:
        BadImageError: when one of them cannot be read.
    """
    frames, durations = [], []
    with naming_errors(str(path)), without_warnings(), Image.open(path, formats=READ) as image:
        loop = image.info.get("loop")
        for frame in ImageSequence.Iterator(image):
            shown = frame.convert("RGBA")  # WebP says the duration only when the frame is loaded
            durations.append(int(frame.info.get("duration", 0)))
            alpha = shown.getchannel("A")
            frames.append(Picture(shown.convert("RGB"), None if is_opaque(alpha) else alpha))
    return Animation(frames, durations, loop)


def save_animation(
    animation: Animation, path: Path, replacing: Callable[[Path], AbstractContextManager[Path]], options: dict
) -> list[str]:
    """
    Writes the frames into one file, whole or not at all.

    Args:
        animation: At least one frame.
        path: Its extension says the format.
        replacing: How the file is replaced: f(path) -> a context with the path to write to.
        options: Of `Image.save`, such as the quality.

    Returns:
        What the file does not hold as it was, a phrase each.

    Raises:
        OSError: when it was read back with other sides or another duration.
    """
    kind = KINDS[path.suffix.lower()]
    seen_through = any(frame.alpha is not None for frame in animation.frames)
    images = [frame.color.convert("RGBA" if seen_through else "RGB") for frame in animation.frames]
    for image, frame in zip(images, animation.frames, strict=True):
        if frame.alpha is not None:
            image.putalpha(frame.alpha)
    if kind != "TIFF":
        options = options | {"duration": animation.durations}
        loop = animation.loop
        if loop is not None or kind == "WEBP":
            options["loop"] = 1 if loop is None else loop
    if kind == "GIF":
        options["disposal"] = 2
    with replacing(path) as beside, without_warnings():
        with open(beside, "w+b") as file:
            images[0].save(file, kind, save_all=True, append_images=images[1:], **options)
        with open(beside, "rb") as file, open_any_size(file, [kind]) as back:
            shown = 0
            for frame in ImageSequence.Iterator(back):
                frame.load()
                shown += int(frame.info.get("duration", 0))
            off = 0 if kind == "TIFF" else abs(shown - sum(animation.durations))
            if back.size != images[0].size or off > 10 * len(images):  # GIF counts in hundredths of a second
                raise OSError("frames read back different from what was written")
    return ["colours reduced to 256 a frame, as GIF has them"] if kind == "GIF" else []
