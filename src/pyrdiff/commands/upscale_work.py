"""What a run of `pyrdiff upscale` is to do: which pictures, and where the results go."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyrdiff.cli import expect
from pyrdiff.commands.sample import adapters_as_they_are, model_as_it_is
from pyrdiff.parts.outputs import Outputs
from pyrdiff.upscaling.telling import say

if TYPE_CHECKING:
    from pyrdiff.commands.upscale import UpscaleSettings


class Work(NamedTuple):
    """A picture: its path below `--input`, its file, and the file to write."""

    name: str
    source: Path
    target: Path


class Plan(NamedTuple):
    """The folder of the results, what is to be done, those whose results are there, and the rule for files there."""

    output: Path
    work: list[Work]
    done: set[Work]
    outputs: Outputs


def find_work(settings: "UpscaleSettings", recipe: Mapping[str, object]) -> Plan:
    """
    What is to be done.

    Args:
        settings: The flags.
        recipe: Those that decide how a result looks, beside the model.

    Raises:
        ValueError: if there is nothing to do, or a file would be written over or could not be written.
    """
    from pyrdiff.data.files import WRITTEN
    from pyrdiff.data.listing import HEIF

    folder, output = Path(settings.input), Path(settings.output)
    expect(settings, "input", folder.exists(), "a file or a folder")
    expect(settings, "output", not (folder.is_dir() and output.is_file()), "a folder, as --input is one")
    expect(settings, "report", not (settings.report and os.path.isdir(settings.report)), "a file to write")
    sources = find_pictures(folder, output)
    folder = folder if folder.is_dir() else folder.parent
    if os.path.isfile(settings.input) and output.suffix.lower() in (*WRITTEN, ".gif") and not output.is_dir():
        changed = settings.suffix or settings.ext != "auto"
        expect(settings, "output", not changed, "a folder, with --suffix or --ext")
        targets, output = [output], output.parent
    else:
        ends = [path.suffix if settings.ext == "auto" else f".{settings.ext}" for path in sources]
        ends = [".jpg" if end.lower() in HEIF else end for end in ends]  # which is read, and not written
        named = [path.with_name(path.stem + settings.suffix + end) for path, end in zip(sources, ends, strict=True)]
        targets = [output / path.relative_to(folder) for path in named]
    names = [path.relative_to(folder).as_posix() for path in sources]
    work = list(map(Work, names, sources, targets))
    if not work:
        raise ValueError(f"--input={settings.input!r}: has nothing to enlarge; expected a folder of images")
    models = {**model_as_it_is(settings.model), **adapters_as_they_are(settings.adapter)}
    outputs = Outputs("upscale", {**models, **recipe}, settings.overwrite)
    check_targets(work, settings)
    outputs.check(targets, "output")
    done = {item for item in work if settings.skip_existing and is_done(item, outputs)}
    return Plan(output, work, done, outputs)


def find_pictures(place: Path, output: Path) -> list[Path]:
    """The picture, or those of a folder but for what runs of ours wrote and what lies in the folder of the results."""
    from pyrdiff.data.listing import look_into

    if not place.is_dir():
        return [place]
    found, results = look_into(place, leave_out_runs=True), output.resolve()
    say(str(found))
    if results == place.resolve():
        return found.images
    return [path for path in found.images if not path.resolve().is_relative_to(results)]


def is_done(item: Work, outputs: Outputs) -> bool:
    """True if the result is there as a run with this model and these flags made it, after the picture last changed."""
    return outputs.has(item.target) and item.target.stat().st_mtime_ns >= item.source.stat().st_mtime_ns


def check_targets(work: list[Work], settings: "UpscaleSettings") -> None:
    """
    Raises:
        ValueError: if a result would replace an input, or another result, or its format is not written.
    """
    from pyrdiff.data.files import WRITTEN
    from pyrdiff.upscaling.animations import KINDS

    written = {*WRITTEN, *(KINDS if settings.frames else ())}
    inputs = {os.path.realpath(source): name for name, source, _ in work}
    made: dict[str, str] = {}
    for name, _, target in work:
        place = os.path.realpath(target)
        if place in made:
            raise ValueError(f"--output: {made[place]} and {name} would both be {target}; expected --ext auto")
        if target.suffix.lower() not in written and not settings.keep_going:
            raise ValueError(
                f"--output: {name}: files {target.suffix!r} are not written; expected --ext png or another"
            )
        if place in inputs:
            raise ValueError(
                f"--output: {name} would replace the input {inputs[place]}; expected another folder or --suffix"
            )
        made[place] = name
