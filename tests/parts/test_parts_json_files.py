"""JSON of others: bounded in size and depth, and one line for whatever is wrong."""

import json

import pytest

from pyrdiff.hub.card import read_bench
from pyrdiff.parts.json_files import DEEPEST, parse_json, read_json
from pyrdiff.plan import StepCosts, bench_plans


def test_what_is_read():
    value = {"a": [1, 2.5, None, True, "\u00e9"], "b": {}}
    assert parse_json(json.dumps(value), "x") == parse_json(json.dumps(value).encode(), "x") == value
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "x") and parse_json("-Infinity", "x") == float("-inf")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"NaN",
        b'{"a": [NaN]}',
        b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1),
        b"[" * 900 + b"]" * 900,
        b"[" * 3000,
        b'{"a":' * 100_000,
        b"9" * 301,
        b"9" * 10_000,
        b"1 " + b"x" * 10_000,
    ],
)
def test_what_is_refused(tmp_path, data):
    path = tmp_path / "theirs.json"
    path.write_bytes(data)
    for read in (read_json, read_bench, StepCosts.load, bench_plans):
        with pytest.raises(ValueError) as caught:
            read(path)
        text = str(caught.value)
        assert type(caught.value) is ValueError and "\n" not in text and len(text) < 1000 and "theirs.json" in text


def test_files_that_are_too_large_or_none(tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text(" " * 100 + "1")
    assert read_json(path, largest=101) == 1
    with pytest.raises(ValueError, match="theirs.json: has 101 bytes; expected at most 100"):
        read_json(path, largest=100)
    for place in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ValueError, match=f"{place}: cannot be read"):
            read_json(place)
