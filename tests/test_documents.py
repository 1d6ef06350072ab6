"""What the documents say is what the files say."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import warm

from pyrdiff.cli import COMMANDS
from pyrdiff.commands import arguments
from pyrdiff.plugins import find, plugins

ROOT = Path(__file__).parents[1]


def test_the_tables_are_printed_from_the_results():
    warm.run(ROOT / "benchmarks" / "report.py", "--check", check=True)
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"<!-- table: (\S+)(?: \S+)? -->", text))  # some in several tables
    assert sorted(shown) == sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.json"))


DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "examples" / "README.md"]
EVERYWHERE = {"help", "config", "json", "version"}


def settings_of(command: str, method: str) -> type:
    """The flags of a command; of `train` those of the method."""
    if command == "train":
        return find(method).settings
    return getattr(importlib.import_module(f"pyrdiff.commands.{command}"), f"{command.capitalize()}Settings")


def flags_of(settings: type) -> set[str]:
    return {arguments.flag_of(field.name) for field in fields(settings)}


def unchecked(settings: type) -> type:
    """The same flags, whatever their values."""
    return type(settings.__name__, (settings,), {"__post_init__": lambda self: None})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_their_flags_exist(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        lines += [line.partition(" #")[0] for line in block.splitlines() if line.startswith("pyrdiff ")]
    for piece in [*re.findall(r"`(pyrdiff [a-z][^`]*)`", text), *lines]:
        _, command, *words = piece.split()
        assert command in COMMANDS, piece
        if command == "train" and words[:1] in ([], ["METHOD"], ["lanczos-pyramid"]):
            continue
        settings = settings_of(command, words[0] if words else "")
        flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")} - EVERYWHERE
        assert flags <= flags_of(settings), piece
        assert not {"--model", "--output_dir", "--outscale"} & set(words), f"{piece}: the names that are shown"
        if piece in lines and not {"--help", "--config"} & set(words):
            given = shlex.split(piece)[3 if command == "train" else 2 :]
            arguments.read(unchecked(settings), "", [word for word in given if word != "--json"])


@pytest.mark.parametrize(
    ("page", "begin", "end", "method"),
    [
        ("training.md", "", "## Averages of any length", "pddpm"),
        ("enlarging.md", "## Train to enlarge", None, "sr"),
        ("one_call.md", "", None, "pixel_aware"),
    ],
)
def test_flags_of_the_training_pages_exist(page, begin, end, method):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    part = text[text.index(begin) : text.index(end) if end else None]
    flags = set(re.findall(r"`[^`]*?--([a-z_0-9]+)", part)) - EVERYWHERE
    assert flags and flags <= set(find(method).settings.__dataclass_fields__)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    for name in re.findall(r"(?<![\w/])(?:examples|benchmarks)/[\w.]+", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_every_method_has_a_row_and_a_script():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for plugin in plugins():
        if plugin.package == "pyrdiff":
            assert f"examples/train_{plugin.name}.py" in text, plugin.name
