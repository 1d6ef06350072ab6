"""What a picture of `pyrdiff sample` says of itself, in a text of its PNG: the flags that draw it again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyrdiff
from pyrdiff.parts.json_files import parse_json

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

KEY = "pyrdiff"  # of the text


def text_of(flags: Mapping[str, object]) -> "PngInfo":
    """The texts of a picture that these flags draw. A flag that is None was not given."""
    from PIL.PngImagePlugin import PngInfo

    given = {name: value for name, value in flags.items() if value is not None}
    texts = PngInfo()
    texts.add_text("Software", f"pyrdiff {pyrdiff.__version__}")
    texts.add_itxt(KEY, json.dumps({"version": pyrdiff.__version__, "flags": given}, ensure_ascii=False))
    return texts


def flags_in(path: str, accepted: Sequence[str]) -> dict[str, object]:
    """
    The flags that a picture was drawn with.

    Args:
        path: A PNG file, of anybody.
        accepted: The flags that a picture may say. Others, such as what to write where, are the user's own.

    Raises:
        ValueError: for a file that says none, or others.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()  # texts may come after the pixels
            text = picture.text.get(KEY)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path!r} cannot be read as a PNG file: {error}") from error
    if text is None:
        raise ValueError(f"{path!r}: does not say how it was made; expected a PNG file as pyrdiff sample writes it")
    said = parse_json(text, repr(Path(path).name))
    flags = said.get("flags") if isinstance(said, dict) else None
    if not isinstance(flags, dict) or not set(flags) <= set(accepted):
        raise ValueError(
            f"{path!r}: what it says of itself is not what pyrdiff sample writes; expected {list(accepted)}"
        )
    if said.get("version") != pyrdiff.__version__:
        print(f"note: {path} was drawn by pyrdiff {said.get('version')}, this is {pyrdiff.__version__}", flush=True)
    return flags
