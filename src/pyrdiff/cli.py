"""The command line: settings from flags and files, errors in one line, results as text or JSON."""

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

import pyrdiff
from pyrdiff.commands import arguments
from pyrdiff.commands.borders import explained, in_flags
from pyrdiff.parts.settings import did_you_mean
from pyrdiff.training.settings import TrainingDiverged, TrainingStopped

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3

COMMANDS = {
    "train": "Train a model on a folder of images: pyrdiff train METHOD.",
    "distill": "Make a trained model draw, or enlarge, in one or two calls: pyrdiff distill MODEL.",
    "sample": "Generate images with a model.",
    "upscale": "Enlarge a picture, or a folder of pictures.",
    "evaluate": "Measure generated or enlarged images.",
    "bench": "Time and measure a model's plans side by side.",
    "plan": "Say what a model's plans cost here, and which one fits a budget.",
    "check": "Say whether a model's folder or repository is sound, and whether it loads.",
    "ema": "Average a training's weights over another length, afterwards.",
    "merge": "Write a model with adapters merged into it.",
    "push": "Publish a model on the Hub, with its card.",
    "demo": "Open a page in the browser that drives a model.",
    "plugins": "List the installed methods, and what failed to load.",
}

HELP = """usage: pyrdiff COMMAND [MODEL] [flags]

{summary}

{commands}

Every command: --help lists its flags, with an example; -m (the model), -i (input), -o (output), -n (images), -b (images
together), -s (scale factor) and -p (plan) are short for flags of the same meaning everywhere; --config FILE reads flags
from a YAML or JSON file, those given beside it count more; --json prints the result as JSON on stdout, and all else on
stderr; --debug (or PYRDIFF_DEBUG=1) shows the traceback behind an error. Exit codes: 0 done, 1 done in part or not
sound, 2 bad input (one line on stderr), 3 a loss that is not finite, 130 and 143 stopped by a signal.
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
        raise ValueError(f"command {args[0]!r}: expected one of {', '.join(COMMANDS)}{_nearest_command(args[0])}")
    return importlib.import_module(f"pyrdiff.commands.{args[0]}").main(args[1:])


def _nearest_command(name: str) -> str:
    """What may have been meant: a method, which `train` takes, or the command that is nearest."""
    from pyrdiff.plugins import methods

    if name.replace("-", "_") in methods():
        return f"; did you mean 'train {name}'?"
    return did_you_mean(name, COMMANDS)


def parse(settings: type[S], description: str, args: list[str], prog: str | None = None) -> S:
    """
    Settings from flags, and from the file that `--config` names. For an unknown flag or a bad value it prints one line
    and exits with 2.

    Args:
        settings: Dataclass of the flags; its `__post_init__` checks their values.
        description: Text of `--help`.
        args: The flags.
        prog: How the command is called, for `--help`.
    """
    try:
        return arguments.read(settings, description, args, prog)
    except ValueError as error:
        _exit(error, EXIT_BAD_INPUT)


def announce(line: str) -> None:
    """Says what will be done, before what takes seconds to import is imported."""
    print(line, flush=True)


def expect(settings: object, name: str, good: bool, expected: str) -> None:
    """Raises `ValueError` unless the value of a flag is good; `expected` says what is, as in "1 or more"."""
    if not good:
        raise ValueError(f"--{arguments.flag_of(name)}={getattr(settings, name)!r}: expected {expected}")


def run(main: Callable[[list[str]], dict | None]) -> None:
    """
    Runs a command with the program's arguments. What a user can mend is one line on stderr and an exit code, not a
    traceback (unless `debugging`).

    Args:
        main: f(flags) -> its result, which may carry an "exit_code".
    """
    _end_with_launcher()
    signal.signal(signal.SIGTERM, _end)  # as an exception, so that nothing half-written is left
    args = [arg for arg in sys.argv[1:] if arg not in ("--json", "--debug")]
    as_json = "--json" in sys.argv[1:]
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
        _exit(error, EXIT_BAD_INPUT, in_flags(str(error), args))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = explained(error, args)
        if message is None and isinstance(error, RuntimeError):
            from pyrdiff.training.checkpoints import CheckpointError  # only now: it imports torch, and --help must not

            message = str(error) if isinstance(error, CheckpointError) else None
        if message is None:
            raise
        _exit(error, EXIT_BAD_INPUT, message)
    if as_json and result is not None:
        print(json.dumps(result, indent=1, default=str))
    if result and result.get("exit_code"):
        sys.exit(result["exit_code"])


def debugging() -> bool:
    """True if the user asked for tracebacks, by `--debug` or by the environment variable PYRDIFF_DEBUG."""
    return "--debug" in sys.argv[1:] or os.environ.get("PYRDIFF_DEBUG", "0") not in ("", "0")


def complain(error: BaseException, message: str) -> None:
    """One line on stderr about an error, after its traceback if the user asked for that."""
    if debugging():
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _end_with_launcher() -> None:
    """`accelerate launch` passes no signal on: when it ends, Linux then sends SIGTERM here, which saves."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(number: int, frame: object) -> NoReturn:
    """Handler of a signal."""
    sys.exit(128 + number)


def _exit(error: Exception, code: int, message: str | None = None) -> NoReturn:
    complain(error, str(error) if message is None else message)
    sys.exit(code)
