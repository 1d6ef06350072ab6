"""The embedded image set: letters in the upright DejaVu fonts that come with matplotlib."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

OVERSAMPLING = 4  # letters are drawn this much larger and averaged down
FILL = (0.70, 0.80)  # the longer side of a letter, as a part of the frame
SHIFT = 0.04  # the most that its centre lies off the frame's centre, along each axis


def draw_glyphs(
    size: int = 32, count: int = 4096, letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", seed: int = 0
) -> np.ndarray:
    """White letters on black, antialiased; letter, font, scale and shift are random.

    Args:
        size: Height and width of an image in pixels, at least 4.
        count: Number of images, at least 1.
        letters: What to draw; repeated letters come up more often.
        seed: The same seed gives the same images (with the same fonts and Pillow).

    Returns:
        uint8 [count, size, size], 0 (black) to 255 (white).

    Raises:
        ValueError: when an argument is out of range or a letter leaves no mark.
    """
    if size < 4:
        raise ValueError(f"size={size}: expected 4 or more")
    if count < 1:
        raise ValueError(f"count={count}: expected 1 or more")
    if not letters or any(letter.isspace() for letter in letters):
        raise ValueError(f"letters={letters!r}: expected one or more characters, none of them white space")

    side = size * OVERSAMPLING
    fonts = [ImageFont.truetype(path, side) for path in _font_paths()]
    generator = torch.Generator().manual_seed(seed)
    chosen_letters = torch.randint(len(letters), (count,), generator=generator).tolist()
    chosen_fonts = torch.randint(len(fonts), (count,), generator=generator).tolist()
    fills = (FILL[0] + (FILL[1] - FILL[0]) * torch.rand(count, generator=generator)).tolist()
    shifts = (SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)).tolist()

    masks: dict[tuple[int, int], Image.Image] = {}
    images = np.empty((count, size, size), np.uint8)
    for index, choice in enumerate(zip(chosen_letters, chosen_fonts, strict=True)):
        if choice not in masks:
            masks[choice] = _draw_letter(letters[choice[0]], fonts[choice[1]])
        mask = masks[choice]
        scale = fills[index] * side / max(mask.size)
        mask = mask.resize([max(1, round(length * scale)) for length in mask.size], Image.Resampling.BILINEAR)
        canvas = Image.new("L", (side, side))
        left, top = ((0.5 + shift) * side - length / 2 for shift, length in zip(shifts[index], mask.size, strict=True))
        canvas.paste(mask, (round(left), round(top)))
        images[index] = canvas.reduce(OVERSAMPLING)
    return images


def _font_paths() -> list[Path]:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"the letters are drawn with the fonts of matplotlib: pip install matplotlib ({error})"
        ) from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # The Display variants hold only a few mathematical characters.
    # Upright faces: a network that trains for minutes learns them to the point where its letters can be read.
    left_out = ("Display", "Oblique", "Italic")
    paths = sorted(path for path in folder.glob("DejaVu*.ttf") if not any(word in path.name for word in left_out))
    if not paths:
        raise FileNotFoundError(f"no DejaVu font in {folder}, where matplotlib keeps its fonts")
    return paths


def _draw_letter(letter: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The letter alone, mode "L", cut to its edges."""
    left, top, right, bottom = font.getbbox(letter)
    if right <= left or bottom <= top:
        raise ValueError(f"letters={letter!r} leaves no mark: expected characters that can be seen")
    image = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=font)
    return image.crop(image.getbbox())
