"""Examples in docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import pyrdiff

SOURCE = Path(pyrdiff.__file__).parent
FILES = [*SOURCE.rglob("*.py"), *SOURCE.glob("pipelines/*.py"), *SOURCE.glob("schedulers/*.py")]
WITH_EXAMPLES = sorted({path for path in FILES if ">>> " in path.read_text(encoding="utf-8")})
NAMES = [".".join(("pyrdiff", *path.relative_to(SOURCE).with_suffix("").parts)) for path in WITH_EXAMPLES]


def test_the_main_doors_have_examples():
    doors = ("hub.loading", "metrics.fidelity", "schedulers.scheduling_pixel_aware", "plugins", "modular")
    assert {f"pyrdiff.{name}" for name in doors} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed
