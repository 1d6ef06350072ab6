"""Results as files: PNGs that say how they were made, and a ZIP of all of a run."""

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import pyrdiff
from pyrdiff.commands.recipes import text_of


@dataclass
class Saved:
    """The images of a run, and the ZIP with all of them and their settings."""

    images: list[str]
    archive: str


def save_run(owner: str, images: list[Image.Image], names: list[str], flags: list[dict], title: str) -> Saved:
    """
    Writes the images of a run into a folder of its own.

    Args:
        owner: Whatever the client says: no word of it becomes part of a path.
        images: The images.
        names: Of their files, without ending; cut and cleaned here.
        flags: Those that draw each again, of `pyrdiff sample` or `upscale`: written into its PNG as the commands do.
        title: Of the ZIP.
    """
    folder = results_folder(owner) / secrets.token_hex(6)
    folder.mkdir(parents=True)
    paths = [folder / f"{file_name(name)}.png" for name in names]
    for path, image, given in zip(paths, images, flags, strict=True):
        image.save(path, pnginfo=text_of(given))
    archive = folder / f"{file_name(title)}.zip"
    with zipfile.ZipFile(archive, "w") as together:  # PNGs are compressed already
        for path in paths:
            together.write(path, path.name)
        settings = {"version": pyrdiff.__version__}
        settings |= {path.name: given for path, given in zip(paths, flags, strict=True)}
        together.writestr("settings.json", json.dumps(settings, indent=1) + "\n")
    return Saved([str(path) for path in paths], str(archive))


def results_folder(owner: str) -> Path:
    """Where the results of a visitor are."""
    name = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return temporary() / f"results-{name}"


def forget(owner: str) -> None:
    """Removes the results of a visitor who has left."""
    shutil.rmtree(results_folder(owner), ignore_errors=True)


def temporary() -> Path:
    """The folder of the page's files, removed when the command ends."""
    return Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())


def file_name(text: str) -> str:
    """A text as a part of a file's name, on all systems: letters, digits, dashes and dots, 50 from both ends."""
    clean = re.sub(r"[^\w.-]+", "-", text).strip("-.") or "image"
    return clean if len(clean) <= 50 else f"{clean[:24]}-{clean[-25:]}"
