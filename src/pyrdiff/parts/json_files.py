"""Reading JSON of others: of bounded size and depth, and one `ValueError` for whatever is wrong with it."""

import json
import os
from pathlib import Path

LARGEST = 16 * 2**20  # bytes
DEEPEST = 64  # lists and objects inside each other
MOST_DIGITS = 300  # of a whole number: it fits into a float
LONGEST = 400  # characters of what a message repeats


def read_json(path: str | os.PathLike, largest: int = LARGEST) -> object:
    """
    The value in a JSON file.

    Args:
        path: The file.
        largest: The most bytes that it may have.

    Raises:
        ValueError: if it cannot be read, is larger, is no JSON, has NaN in it or is nested too deeply.
    """
    try:
        size = Path(path).stat().st_size
        if size > largest:
            raise ValueError(f"{path}: has {size} bytes; expected at most {largest}")
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json(data, str(path))


def parse_json(data: str | bytes, where: str) -> object:
    """
    A JSON value.

    Args:
        data: The text.
        where: What the message names.

    Raises:
        ValueError: if it is no JSON, has NaN or a whole number of more than 300 digits in it, or is nested more than 64
            times.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, parse_constant=_constant, parse_int=_whole)
    except RecursionError as error:
        raise ValueError(f"{where}: expected JSON, nested at most {DEEPEST} times") from error
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON, {' '.join(str(error).split())[:LONGEST]}") from error
    inside = [value]
    for _ in range(DEEPEST):
        inside = [item for container in inside for item in _items(container)]
        if not inside:
            return value
    raise ValueError(f"{where}: expected JSON, nested at most {DEEPEST} times")


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is not a value; expected numbers")
    return float(text)  # an infinite bound is a default of some schedulers


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits; expected at most {MOST_DIGITS}")
    return int(text)


def _items(value: object) -> list:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
