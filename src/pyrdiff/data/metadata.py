"""The table beside images that Hugging Face's `imagefolder` reads: metadata.csv or metadata.jsonl, a row an image."""

import csv
import io
from pathlib import Path

from pyrdiff.parts.json_files import parse_json

NAMES = ("metadata.csv", "metadata.jsonl")
LARGEST = 256 * 2**20  # bytes
FILE, LABEL = "file_name", "label"


def find_metadata(folder: Path) -> Path | None:
    """The table in a folder of images, if there is one."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def read_labels(path: Path) -> dict[str, str | int]:
    """
    The label of each image.

    Args:
        path: The table. Its column `file_name` has paths below its folder, its column `label`, or the only other one,
            strings or whole numbers.

    Returns:
        {path with slashes: label}.

    Raises:
        ValueError: for another file; the line is named.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"class_labels: {str(path)!r} has {path.stat().st_size} bytes; expected at most {LARGEST}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _of_csv(text, path) if path.suffix == ".csv" else _of_jsonl(text, path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"class_labels: {str(path)!r} cannot be read: {error}") from error
    labels, column = {}, None
    for number, row in rows:
        where = f"class_labels: line {number} of {str(path)!r}"
        column = _column(row, where) if column is None else column
        name, label = row.get(FILE), row.get(column)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} has {FILE}={name!r}; expected the path of an image")
        if not isinstance(label, (str, int)) or isinstance(label, bool) or label == "":
            raise ValueError(f"{where} has {column}={label!r}; expected a name or a whole number")
        name = Path(name).as_posix()
        if labels.setdefault(name, label) != label:
            raise ValueError(f"{where} has {name!r} again, with another {column}; expected one row an image")
    return labels


def _column(row: dict, where: str) -> str:
    """Which column has the labels."""
    others = [name for name in row if name != FILE]
    column = LABEL if LABEL in others else others[0] if len(others) == 1 else None
    if FILE not in row or column is None:
        raise ValueError(f"{where} has the columns {list(row)}; expected {FILE}, and {LABEL} or just one other")
    return column


def _of_csv(text: str, path: Path) -> list[tuple[int, dict]]:
    """(line, row) of each; a row with more or fewer cells than the first line is refused."""
    head, *rows = csv.reader(io.StringIO(text, newline="")) if text.strip() else [[]]
    numbered = [(number, row) for number, row in enumerate(rows, start=2) if row]
    for number, row in numbered:
        if len(row) != len(head):
            raise ValueError(
                f"class_labels: line {number} of {str(path)!r} has {len(row)} cells; expected {len(head)}, as the first"
            )
    return [(number, dict(zip(head, row, strict=True))) for number, row in numbered]


def _of_jsonl(text: str, path: Path) -> list[tuple[int, dict]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            row = parse_json(line, f"class_labels: line {number} of {str(path)!r}")
            if not isinstance(row, dict):
                raise ValueError(f"class_labels: line {number} of {str(path)!r} is no object; expected one an image")
            rows.append((number, row))
    return rows
