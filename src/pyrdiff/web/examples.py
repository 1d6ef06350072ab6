"""Pictures and settings to begin with, so that no tab is empty. Nothing of it comes from a network."""

import shutil
from pathlib import Path

import gradio as gr
from PIL import Image, ImageDraw, ImageFont

from .files import file_name, temporary
from .model import Model
from .pictures import read_picture

PHOTOS = ("cheetah1.jpg", "tower.jpg", "lion.jpg")  # come with gradio
SMALL = 128  # pixels of a side: models that generate up to here take tiny pictures


def pictures(model: Model) -> list[str]:
    """Paths of small pictures to enlarge: drawn ones for models of small images, photographs for the others."""
    folder = temporary() / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    size = model.size
    if size is not None and max(size) <= SMALL:
        side = max(min(size) // 4, 8)
        found = {f"{name}-{side}.png": _drawn(name, side) for name in ("face", "sun", "letter")}
    else:
        found = {f"{Path(name).stem}-96.png": photo for name in PHOTOS if (photo := _photo(name)) is not None}
        found["landscape-96.png"] = _drawn("landscape", 96)
    for name, image in found.items():
        image.save(folder / name)
    return [str(folder / name) for name in found]


def card_picture(model: Model) -> str | None:
    """The path of a copy of the samples on the model's card, if there are any that can be shown."""
    path = None if model.folder is None else model.folder / "samples.png"
    if path is None or not path.is_file():
        return None
    try:
        read_picture(str(path), 3, 16_000_000)
    except ValueError:
        return None
    folder = temporary() / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.copyfile(path, folder / f"card-{file_name(model.title)}.png")


def _photo(name: str) -> Image.Image | None:
    """A photograph that comes with gradio, 96 pixels wide or high; None where this gradio has none of this name."""
    path = Path(gr.__file__).parent / "media_assets" / "images" / name
    if not path.is_file():
        return None
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    photo.thumbnail((96, 96), Image.Resampling.BICUBIC)
    return photo


def _drawn(name: str, side: int) -> Image.Image:
    """A picture of this side, drawn sixteen times as large and made smaller."""
    large = Image.new("RGB", (512, 512), "white")
    {"face": _face, "sun": _sun, "letter": _letter, "landscape": _landscape}[name](ImageDraw.Draw(large))
    return large.resize((side, side), Image.Resampling.BICUBIC)


def _face(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((24, 24, 488, 488), fill="#fcc21b", outline="#e2a610", width=12)
    for left in (150, 306):
        draw.ellipse((left, 160, left + 56, 250), fill="#3b2a17")
    draw.arc((130, 190, 382, 410), 20, 160, fill="#3b2a17", width=30)


def _sun(draw: ImageDraw.ImageDraw) -> None:
    for side in (0, 1):
        draw.regular_polygon((256, 256, 240), 8, rotation=22 * side, fill="#f79329")
    draw.ellipse((110, 110, 402, 402), fill="#ffd32c")


def _letter(draw: ImageDraw.ImageDraw) -> None:
    draw.rounded_rectangle((30, 30, 482, 482), 80, fill="#2f6fd0")
    draw.text((256, 256), "A", fill="white", font=ImageFont.load_default(360), anchor="mm")


def _landscape(draw: ImageDraw.ImageDraw) -> None:
    for row in range(512):
        draw.line((0, row, 512, row), fill=(90 + row // 4, 150 + row // 8, 230 - row // 8))
    draw.ellipse((330, 60, 430, 160), fill="#fff2b0")
    draw.polygon([(0, 380), (140, 190), (260, 330), (360, 230), (512, 400), (512, 512), (0, 512)], fill="#5d7285")
    draw.polygon([(0, 430), (200, 370), (512, 450), (512, 512), (0, 512)], fill="#4d8a3c")
    for left in range(30, 480, 60):
        draw.polygon([(left, 470), (left + 20, 400), (left + 40, 470)], fill="#275a2a")
