"""The command line: settings from flags and files, errors in one line, results as text or JSON."""

import contextlib
import importlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import pyrdiff
from pyrdiff.training.settings import TrainingDiverged, TrainingStopped

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3

COMMANDS = {
    "train": "Train a model on a folder of images: pyrdiff train METHOD.",
    "sample": "Generate images with a model.",
    "upscale": "Enlarge a picture, or a folder of pictures.",
    "evaluate": "Measure generated or enlarged images.",
    "bench": "Time and measure a model's plans side by side.",
    "plan": "Say what a model's plans cost here, and which one fits a budget.",
    "check": "Say whether a model's folder or repository is sound, and whether it loads.",
    "push": "Publish a model on the Hub, with its card.",
    "demo": "Open a page in the browser that drives a model.",
    "plugins": "List the installed methods, and what failed to load.",
}

HELP = """usage: pyrdiff COMMAND [flags]

{summary}

{commands}

Every command: --help lists its flags; --config FILE reads flags from a YAML or JSON file, those given beside it count
more; --json prints the result as JSON on stdout, and all else on stderr. Exit codes: 0 done, 1 done in part or found
wanting, 2 bad input (one line on stderr), 3 a loss that is not finite, 130 and 143 stopped by a signal.
"""

S = TypeVar("S")


def main() -> None:
    """Entry point of `pyrdiff`."""
    run(dispatch)


def dispatch(args: list[str]) -> dict | None:
    """Runs the command that `args` begin with; what it returns is its result."""
    if not args or args[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
        print(HELP.format(summary=pyrdiff.__doc__.splitlines()[0], commands=commands))
        return None
    if args[0] == "--version":
        print(pyrdiff.__version__)
        return {"version": pyrdiff.__version__}
    if args[0] not in COMMANDS:
        raise ValueError(f"command {args[0]!r}: expected one of {', '.join(COMMANDS)}")
    return importlib.import_module(f"pyrdiff.commands.{args[0]}").main(args[1:])


def parse(settings: type[S], description: str, args: list[str], prog: str | None = None) -> S:
    """
    Settings from flags, and from the file that `--config` names. For an unknown flag or a bad value it prints one line
    and exits with 2.
    """
    import tyro

    # The values are checked after parsing, by us: tyro would put the message into a frame, wrapped to the terminal.
    unchecked = type(settings.__name__, (settings,), {"__post_init__": lambda self: None})
    said = io.StringIO()
    try:
        args = _with_true(settings, _with_file(settings, args))
        with contextlib.redirect_stderr(said):
            values = tyro.cli(
                unchecked,
                prog=prog,
                args=args,
                description=description.strip(),
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
            )
        return settings(**{field.name: getattr(values, field.name) for field in fields(settings)})
    except SystemExit as stop:
        if stop.code:
            print(f"error: {_unframed(said.getvalue())}", file=sys.stderr)
        raise
    except ValueError as error:
        _exit(error, EXIT_BAD_INPUT)


def _with_file(settings: type, args: list[str]) -> list[str]:
    """`--config FILE` replaced by the flags in it; they come first, so that flags of the command line count more."""
    given, rest, args = [], [], list(args)
    known = {field.name: field for field in fields(settings)}
    while args:
        arg = args.pop(0)
        name, separator, path = arg.partition("=")
        if name != "--config" or "config" in known:
            rest.append(arg)
            continue
        if not separator and not args:
            raise ValueError("--config: expected a YAML or JSON file")
        path = path if separator else args.pop(0)
        for key, value in _read_settings(path).items():
            if key not in known:
                raise ValueError(f"--config: {path} has the unknown key {key!r}; expected one of {sorted(known)}")
            if value is None and known[key].default is None:
                continue
            if value is None:
                raise ValueError(f"--config: {path} has no value for {key!r}")
            if isinstance(value, list):
                given += [f"--{key}", *map(str, value)]
            else:  # with "=", a value may begin with a dash
                given.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return given + rest


def _read_settings(path: str) -> dict:
    import yaml  # reads JSON, too

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config: {path!r} cannot be read as YAML or JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path!r} holds a {type(values).__name__}; expected names and values")
    return values


def _with_true(settings: type, args: list[str]) -> list[str]:
    """A flag of yes or no may stand alone: `--use_ema` is `--use_ema True`."""
    flags = {f"--{field.name}" for field in fields(settings) if field.type in (bool, "bool", bool | None)}
    found = []
    for index, arg in enumerate(args):
        found.append(arg)
        if arg.replace("-", "_").replace("__", "--", 1) in flags and (args[index + 1 :] or ["--"])[0].startswith("--"):
            found.append("True")
    return found


def _unframed(text: str) -> str:
    """tyro's message without its title, frame (of dashes, where the encoding has no better), help and advice."""
    lines = [re.sub(r"[│╭╮╰╯─]+|-{5,}", " ", line).strip() for line in text.splitlines()[1:]]
    text = " ".join(line for line in lines if line)
    for advice in ("Argument helptext:", "For full helptext"):
        text = text.partition(advice)[0]
    return f"{text.strip()} (--help lists the flags)"


def run(main: Callable[[list[str]], dict | None]) -> None:
    """
    Runs a command with the program's arguments. What a user can mend is one line on stderr and an exit code, not a
    traceback. A result may carry an "exit_code".
    """
    _end_with_launcher()
    args = [arg for arg in sys.argv[1:] if arg != "--json"]
    as_json = len(args) < len(sys.argv) - 1
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = main(args)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except TrainingDiverged as error:
        _exit(error, EXIT_DIVERGED)
    except BrokenPipeError:  # who reads our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, ImportError) as error:
        _exit(error, EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        from pyrdiff.training.checkpoints import CheckpointError  # only now: it imports torch, and --help must not

        if not isinstance(error, CheckpointError):
            raise
        _exit(error, EXIT_BAD_INPUT)
    if as_json and result is not None:
        print(json.dumps(result, indent=1, default=str))
    if result and result.get("exit_code"):
        sys.exit(result["exit_code"])


def _end_with_launcher() -> None:
    """`accelerate launch` passes no signal on: when it ends, Linux then sends SIGTERM here, which saves."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _exit(error: Exception, code: int):
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)
