"""Checks of the paths that a command was given, before anything heavy is imported."""

from collections.abc import Sequence
from pathlib import Path

import pyrdiff
from pyrdiff.parts.settings import did_you_mean

INDEX = "model_index.json"
BUNDLED = Path(pyrdiff.__file__).parent / "pretrained"
ARRAYS = (".npy", ".npz")


def check_paths(
    settings: object,
    models: Sequence[str] = (),
    images: Sequence[str] = (),
    files: Sequence[str] = (),
    written: Sequence[str] = (),
) -> None:
    """
    Refuses flags whose paths lead nowhere. A flag that is None was not given.

    Args:
        settings: The flags.
        models: Those that name a saved pipeline: a folder, a bundled model, or a repository.
        images: Those that name images: a folder, an array file, or "glyphs".
        files: Those that name a file to read, or several.
        written: Those that name a file to write.

    Raises:
        ValueError: naming the flag, its value and what is accepted.
    """
    checks = ((models, _model), (images, _images), (files, _file), (written, _written))
    for names, problem_of in checks:
        for name in names:
            value = getattr(settings, name)
            for path in value if isinstance(value, (list, tuple)) else [value]:
                problem = None if path is None else problem_of(str(path))
                if problem is not None:
                    raise ValueError(f"--{name}={path!r}: {problem}")


def _model(path: str) -> str | None:
    folder = Path(path)
    bundled = sorted(one.name for one in BUNDLED.iterdir() if (one / INDEX).is_file())
    if path in bundled or (folder / INDEX).is_file():
        return None
    if folder.is_dir():
        inside = folder / "pipeline"
        hint = f"; did you mean {str(inside)!r}?" if (inside / INDEX).is_file() else ""
        return f"expected a saved pipeline, with {INDEX} in its folder{hint}"
    if folder.exists():
        return "expected the folder of a saved pipeline, not a file"
    if path.count("/") == 1 and not path.startswith((".", "~", "/")) and not path.endswith("/"):
        return None  # a repository on the Hub
    return f"expected a folder, a repository such as user/name, or one of {bundled}{did_you_mean(path, bundled)}"


def _images(path: str) -> str | None:
    place = Path(path)
    if path == "glyphs" or place.is_dir():
        return None
    if place.exists():
        return None if place.suffix in ARRAYS else "expected a folder of images, a .npy or a .npz file"
    return "expected a folder of images, a .npy or .npz file that is there, or glyphs"


def _file(path: str) -> str | None:
    return None if Path(path).is_file() else "expected a file that is there"


def _written(path: str) -> str | None:
    target = Path(path)
    if target.is_dir():
        return "expected a file to write, not a folder"
    blocked = next((folder for folder in target.parents if folder.exists() and not folder.is_dir()), None)
    return None if blocked is None else f"expected a file in a folder; {str(blocked)!r} is a file"
