"""What all commands have in common, asked of each of them by the real parser."""

import functools
import importlib
import re
import shlex
from dataclasses import MISSING, dataclass, fields

import pytest

from pyrdiff import cli
from pyrdiff.commands import arguments
from pyrdiff.plugins import methods


def described() -> dict[str, tuple[type, str]]:
    """{command line up to the flags: its settings, its module's text} of every command and method."""
    describe = importlib.import_module("pyrdiff.commands.train").describe
    found = {f"train {name}": (method.settings, describe(name, method)) for name, method in methods().items()}
    for command in set(cli.COMMANDS) - {"train"}:
        module = importlib.import_module(f"pyrdiff.commands.{command}")
        found[command] = (getattr(module, f"{command.capitalize()}Settings"), module.__doc__)
    return found


COMMANDS = sorted(described())


@functools.cache
def unchecked(settings: type) -> type:
    """The same flags, whatever their values: paths need not be there."""
    return type(settings.__name__, (settings,), {"__post_init__": lambda self: None})


def example(command: str) -> list[str]:
    """The flags of the example that a command shows."""
    shown = arguments.example_of(described()[command][1])
    words = shlex.split(shown)
    assert words[: len(command.split()) + 1] == ["pyrdiff", *command.split()], shown
    return words[len(command.split()) + 1 :]


def read(command: str, *args: object):
    return arguments.read(unchecked(described()[command][0]), "", [*map(str, args)], f"pyrdiff {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_read(command):
    read(command, *example(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_model_has_its_place_and_its_flag(command):
    settings = described()[command][0]
    if "model" not in {field.name for field in fields(settings)}:
        assert command == "plugins" or command.startswith("train "), "every other command is about a model"
        return
    rest = example(command)[0 if example(command)[0].startswith("-") else 1 :]
    wanted = read(command, "m", *rest)
    assert wanted.model == "m"
    forms = (["-m", "m"], ["--model", "m"], ["--model=m"])
    assert all(read(command, *form, *rest) == read(command, *rest, *form) == wanted for form in forms)
    if not any(word.startswith("-") for word in rest):
        assert read(command, *rest, "--model=m") == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_one_meaning_have_one_name_and_one_short_form(command):
    settings = described()[command][0]
    flags = {arguments.flag_of(field.name): field for field in fields(settings)}
    assert len(flags) == len(fields(settings)), "no two fields are the same flag"
    shown = {re.sub(r"_(dir|file|path)$", "", name) for name in flags}
    assert "out" not in shown and "factor" not in shown and "outdir" not in shown
    for short in {arguments.SHORT[name] for name in flags if name in arguments.SHORT} - {"-m"}:
        (name,) = [name for name, its_short in arguments.SHORT.items() if its_short == short]
        value = "2" if "int" in str(flags[name].type) or "float" in str(flags[name].type) else "x"
        words = [word for word in given_without(command, name)]
        by_short, by_name = read(command, *words, short, value), read(command, *words, f"--{name}={value}")
        assert by_short == by_name
        assert str(getattr(by_short, flags[name].name)).strip("(),'").split(".")[0] == value
    for old, new in arguments.RENAMED.items():
        if new in flags:
            value, words = ("2" if new == "scale_factor" else "x"), given_without(command, new)
            assert read(command, *words, f"--{old}", value) == read(command, *words, f"--{new}", value)
            assert read(command, *words, f"--{old.replace('_', '-')}={value}") == read(
                command, *words, f"--{new}={value}"
            )


def given_without(command: str, name: str) -> list[str]:
    """The example without a flag."""
    words, short = example(command), arguments.SHORT.get(name)
    for form in (f"--{name}", short):
        if form in words:
            at = words.index(form)
            words = words[:at] + words[at + 2 :]
    return words


def test_short_forms_are_few_and_different():
    shorts = list(arguments.SHORT.values())
    assert len(set(shorts)) == len(shorts) <= 8 and "-h" not in shorts
    everywhere = {arguments.flag_of(field.name) for settings, _ in described().values() for field in fields(settings)}
    assert set(arguments.SHORT) <= everywhere
    grouped = [name for names in arguments.GROUPS.values() for name in names.split()]
    assert len(set(grouped)) == len(grouped) and set(grouped) <= everywhere, "no flag twice, none that is gone"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_groups_with_an_example_and_a_line_for_each_flag(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no line is broken
    settings, description = described()[command]
    with pytest.raises(SystemExit) as stopped:
        arguments.read(settings, description, ["--help"], f"pyrdiff {command}")
    said = capsys.readouterr().out
    assert not stopped.value.code and f"Example: pyrdiff {command}" in said
    titles = re.findall(r"(?<=\W) (\w+) options \W", said)
    assert len(set(titles)) == len(titles) and set(titles) <= set(arguments.GROUPS)
    trains = command.startswith(("train ", "distill"))
    assert "method" not in titles or trains, "flags of commands are in groups by what they do"
    texts = arguments._texts(settings)
    for field in fields(settings):
        flag = arguments.flag_of(field.name)
        label = arguments.POSITIONAL.get(field.name, f"--{flag} ")
        assert label in said, flag
        assert texts.get(field.name) or trains, f"--{flag} says what it is"
        if flag in arguments.SHORT:
            assert f"{arguments.SHORT[flag]} " in said
    assert not {f"--{old}" for old in arguments.RENAMED} & set(said.split()) and "{None}" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_missing_is_named_with_an_example(command):
    settings, description = described()[command]
    needed = [field.name for field in fields(settings) if field.default is MISSING]
    if not needed:
        return
    labels = [arguments.POSITIONAL.get(name, f"--{arguments.flag_of(name)}") for name in needed]
    with pytest.raises(ValueError) as caught:
        arguments.read(settings, description, [], f"pyrdiff {command}")
    example = arguments.example_of(description)
    assert str(caught.value) == f"missing: {', '.join(labels)}; for example: {example} (--help lists the flags)"


@pytest.mark.parametrize("flags, said", [
    (["m", "-q"], "-q: no flag of pyrdiff sample (--help lists the flags)"),
    (["m", "--outptu", "o"], "--outptu: no flag of pyrdiff sample; did you mean '--output'? (--help lists the flags)"),
    (["m", "extra"], "Unrecognized options: extra (--help lists the flags)"),
    (["-n", "x", "m"],
     "Error parsing -n/--num_images: invalid literal for int() with base 10: 'x' (--help lists the flags)"),
    (["-m"], "Missing value for argument '-m/--model'. Expected 1 values. (--help lists the flags)"),
])  # fmt: skip
def test_what_is_not_understood_is_named(flags, said):
    with pytest.raises(ValueError) as caught:
        read("sample", *flags)
    assert str(caught.value) == said


def test_a_file_of_settings_gives_the_model_and_the_command_line_counts_more(tmp_path):
    (tmp_path / "a.yaml").write_text("model: of the file\noutput_dir: there\nnum_images: 3\n")
    config = ["--config", tmp_path / "a.yaml"]
    assert read("sample", *config).model == "of the file"
    for args in (["mine", *config], [*config, "mine"], [*config, "-m", "mine"], ["--model=mine", *config]):
        settings = read("sample", *args)
        assert (settings.model, settings.output, settings.num_images) == ("mine", "there", 3)


def test_a_switch_before_a_word(tmp_path):
    for args in (["--dry_run", "m", "me/x"], ["m", "--dry_run", "me/x"], ["m", "me/x", "--dry-run"]):
        settings = read("push", *args)
        assert (settings.model, settings.repo_id, settings.dry_run) == ("m", "me/x", True)


@dataclass(kw_only=True)
class OfOthers:
    """Flags of a command of another package."""

    model: str = "m"
    """Text of it."""
    their_own: int = 3
    """What only it knows."""


def test_settings_of_other_packages_follow_by_the_names_of_their_fields(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert arguments.read(OfOthers, "About.", ["x", "--their-own", "4"]) == OfOthers(model="x", their_own=4)
    with pytest.raises(SystemExit):
        arguments.read(OfOthers, "About.", ["--help"])
    said = capsys.readouterr().out
    assert "Text of it. Also by -m or --model." in said and " method options " in said and "What only it" in said
