"""What the documents say is what the files say."""

import importlib
import re
from pathlib import Path

import pytest
import warm

from pyrdiff.cli import COMMANDS
from pyrdiff.plugins import find, plugins

ROOT = Path(__file__).parents[1]


def test_the_tables_are_printed_from_the_results():
    warm.run(ROOT / "benchmarks" / "report.py", "--check", check=True)
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"<!-- table: (\S+)(?: \S+)? -->", text))  # some in several tables
    assert sorted(shown) == sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.json"))


DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "examples" / "README.md"]
SETTINGS = {  # of each command, and of the scripts that do the same
    "bench": "bench.BenchSettings",
    "check": "check.CheckSettings",
    "demo": "demo.DemoSettings",
    "evaluate": "evaluate.EvaluateSettings",
    "plan": "plan.PlanSettings",
    "plugins": "plugins.PluginsSettings",
    "push": "push.PushSettings",
    "sample": "sample.SampleSettings",
    "upscale": "upscale.UpscaleSettings",
}
EVERYWHERE = {"help", "config", "json", "version"}


def flags_of(command: str, method: str) -> set[str]:
    """The flags that a command has; of `train` those of the method."""
    if command == "train":
        return set(find(method).settings.__dataclass_fields__)
    module, name = SETTINGS[command].split(".")
    return set(getattr(importlib.import_module(f"pyrdiff.commands.{module}"), name).__dataclass_fields__)


def test_every_command_has_settings_here():
    assert {*SETTINGS, "train"} == set(COMMANDS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_their_flags_exist(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    pieces = re.findall(r"`(pyrdiff [a-z][^`]*)`", text)
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        pieces += [line.partition(" #")[0] for line in block.splitlines() if line.startswith("pyrdiff ")]
    for piece in pieces:
        _, command, *words = piece.split()
        assert command in COMMANDS, piece
        if command == "train" and words[:1] in ([], ["METHOD"], ["lanczos-pyramid"]):
            continue
        flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")} - EVERYWHERE
        assert flags <= flags_of(command, words[0] if words else ""), piece


@pytest.mark.parametrize(
    ("page", "begin", "end", "method"),
    [
        ("training.md", "", None, "pddpm"),
        ("enlarging.md", "## Train to enlarge", None, "sr"),
        ("one_call.md", "", None, "pixel_aware"),
    ],
)
def test_flags_of_the_training_pages_exist(page, begin, end, method):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    flags = set(re.findall(r"`[^`]*?--([a-z_0-9]+)", text[text.index(begin) :])) - EVERYWHERE
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
