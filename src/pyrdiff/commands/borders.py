"""Errors of other packages, said in one line with the way out."""

import re
from collections.abc import Sequence
from itertools import takewhile

from pyrdiff.commands.arguments import POSITIONAL, SHORT

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Unable to allocate", re.IGNORECASE)
LONG = {short: f"--{name}" for name, short in SHORT.items()}
SMALLER = {  # by command, what makes it need less memory
    "train": "a smaller --train_batch_size or --patch_size",
    "distill": "a smaller --train_batch_size",
    "sample": "a smaller --batch_size",
    "upscale": "--tile, or a smaller one",
    "evaluate": "a smaller --batch_size",
    "bench": "a smaller --batch_size",
    "plan": "a smaller --batch_size",
    "demo": "a smaller --max_megapixels",
}


def explained(error: BaseException, args: Sequence[str]) -> str | None:
    """
    What to tell a user of an error that is not ours; None for what only a traceback explains.

    Args:
        error: Any.
        args: The command and its flags.
    """
    name, said = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "what was given is nested too deeply to be read (--debug shows where); expected a flat list or object"
    short = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(said)
    if short or isinstance(error, MemoryError):
        where = "GPU" if "CUDA" in said or "HIP" in said or "MPS" in said else "CPU"
        advice = SMALLER.get(args[0] if args else "", "less at a time")
        detail = f" ({said.partition('. ')[0]})" if said else ""
        return f"out of memory on the {where}{detail}; expected to fit with {advice}"
    if type(error).__module__.partition(".")[0] == "datasets":
        cause = f" ({' '.join(str(error.__cause__).split())})" if error.__cause__ else ""
        expected = "expected another --dataset_name or --dataset_config_name"
        return f"the data set cannot be read: {name}: {said}{cause}; {expected}"
    return None


def in_flags(message: str, args: Sequence[str]) -> str:
    """
    The message with the flag that a value was given by, where it begins with a name that is no flag, such as
    `path_or_repo='x': ...` after `--model x`, or after `x` in the place of the model.
    """
    named = re.match(r"(\w+)(?:=|: )('[^']*'|\"[^\"]*\")", message)
    if named is None:
        return message
    flags = [arg.partition("=") for arg in args if arg.startswith("--")]
    given = [(flag, value) for flag, equals, value in flags if equals]
    given += [(arg, value) for arg, value in zip(args, args[1:], strict=False) if arg.startswith("-")]
    words = list(takewhile(lambda arg: not arg.startswith("-"), args[1:]))  # after the command
    given += [(f"--{name}", word) for name, word in zip(POSITIONAL, words, strict=False)]
    given = [(LONG.get(flag, flag), value) for flag, value in given]
    if any(flag[2:].replace("-", "_") == named[1] for flag, _ in given):
        return message
    for flag, value in given:
        if repr(value) == named[2]:
            return f"{flag}={named[2]}{message[named.end() :]}"
    return message
