"""
Enlarge a picture, or a folder with the folders below it.

Example: pyrdiff upscale noto-emoji -i photos -o larger -s 4

Each result keeps the alpha channel (enlarged bicubically), EXIF, ICC profile, DPI, XMP, IPTC, comments and PNG texts of
its file as far as its format has a place for them; what could not be kept is in the report. Pictures are enlarged as
they are shown, and stored as they were. The consistency in the report is that of the file that was written. Files are
written beside, read back and renamed, so that none is ever half written; files that runs with the same model and flags
did not make are replaced with --overwrite only. JPEG and WebP have quality 95. The seed of a picture depends on --seed
and on its path below --input only.

Exit code: 0 all done, 1 some failed and the others are done (--keep_going), 2 bad arguments, nothing to do or stopped
at the first failure, 130 or 143 after Ctrl-C or SIGTERM. Each failure is one line on stderr.
"""

import hashlib
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

from pyrdiff.cli import complain, expect, parse
from pyrdiff.commands.paths import check_paths
from pyrdiff.commands.sample import adapters_as_they_are, model_as_it_is, write_json
from pyrdiff.machine import open_device, versions
from pyrdiff.parts.outputs import Outputs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from pyrdiff.data import Picture
    from pyrdiff.parts.operators import SeparableOperator

# Flags that are arguments of the pipeline's call, by its name for them.
ARGUMENTS = {
    name: name for name in ("guidance", "operator", "refine_steps", "plan", "num_inference_steps", "color_fix")
}
ARGUMENTS |= {"hard_consistency": "hard_consistency", "tile": "tile", "tile_pad": "tile_overlap"}
# What decides how a result looks, beside the model.
RECIPE = (*ARGUMENTS, "outscale", "seed")


@dataclass(kw_only=True)
class UpscaleSettings:
    """Flags of `pyrdiff upscale`."""

    model: str
    """Exported folder, or a repository on the Hub; none of its code is run."""
    adapter: tuple[str, ...] | None = None
    """Adapters that were trained over the model: folders or repositories, each perhaps with a weight, FOLDER:0.7."""
    input: str
    """File or folder."""
    output: str
    """Folder that mirrors --input; for one file also a file."""
    outscale: float = 4
    """1 or more; sides must come out whole."""
    tile: int | None = None
    """Side of the network's windows on the output, to save memory."""
    tile_pad: int | None = None
    """Pixels that they overlap by; by default a quarter of --tile."""
    suffix: str = ""
    """Added to the name of each file, such as _x4."""
    ext: Literal["auto", "png", "jpg", "webp", "tif"] = "auto"
    """auto: as the input."""
    skip_existing: bool = False
    """Leave out what has its result already: made by this model with these flags, after the picture last changed."""
    overwrite: bool = False
    """Replace files in --output that this model with these flags did not make."""
    keep_going: bool = False
    """Go on after a failure."""
    guidance: Literal["projection", "gradient", "none"] | None = None
    """Of models trained to generate; by default projection."""
    operator: Literal["bicubic", "bicubic_matlab", "area", "lanczos", "gaussian"] | None = None
    """Of models trained to generate: how the input was made smaller; by default bicubic."""
    refine_steps: int | None = None
    """Of models trained to generate: network calls at each level; by default 8."""
    plan: str | None = None
    """Of models trained to enlarge: network calls by name, fast, balanced, default (the default), paper ..."""
    num_inference_steps: int | None = None
    """Of models trained to enlarge: network calls, instead of a plan."""
    color_fix: bool = False
    """Of models trained to enlarge: give each channel the input's mean."""
    hard_consistency: bool = False
    """Made smaller, the output gives the input."""
    seed: int = 0
    """Of the first noise; each picture has its own, by its path."""
    device: str | None = None
    """By default the GPU if there is one."""
    report: str | None = None
    """JSON to write; by default report.json in --output, for a folder."""

    def __post_init__(self):
        expect(self, "outscale", 1 <= self.outscale < math.inf, "1 or more")
        for name in ("tile", "refine_steps", "num_inference_steps"):
            expect(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        overlap = self.tile_pad is None or (self.tile is not None and 0 < self.tile_pad < self.tile)
        expect(self, "tile_pad", overlap, "1 or more, less than --tile")
        expect(self, "num_inference_steps", not (self.num_inference_steps and self.plan), "either it or --plan")
        expect(self, "suffix", not set(self.suffix) & {"/", os.sep, "\0"}, "a part of a file name")


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


def find_work(settings: UpscaleSettings) -> Plan:
    """
    What is to be done.

    Raises:
        ValueError: if there is nothing to do, or a file would be written over or could not be written.
    """
    from pyrdiff.data.files import WRITTEN

    folder, output = Path(settings.input), Path(settings.output)
    expect(settings, "input", folder.exists(), "a file or a folder")
    expect(settings, "output", not (folder.is_dir() and output.is_file()), "a folder, as --input is one")
    expect(settings, "report", not (settings.report and os.path.isdir(settings.report)), "a file to write")
    sources = find_pictures(folder, output)
    folder = folder if folder.is_dir() else folder.parent
    if os.path.isfile(settings.input) and output.suffix.lower() in WRITTEN and not output.is_dir():
        changed = settings.suffix or settings.ext != "auto"
        expect(settings, "output", not changed, "a folder, with --suffix or --ext")
        targets, output = [output], output.parent
    else:
        ends = [path.suffix if settings.ext == "auto" else f".{settings.ext}" for path in sources]
        named = [path.with_name(path.stem + settings.suffix + end) for path, end in zip(sources, ends, strict=True)]
        targets = [output / path.relative_to(folder) for path in named]
    names = [path.relative_to(folder).as_posix() for path in sources]
    work = list(map(Work, names, sources, targets))
    if not work:
        raise ValueError(f"--input={settings.input!r}: has nothing to enlarge; expected a folder of images")
    recipe = {**model_as_it_is(settings.model), **adapters_as_they_are(settings.adapter)}
    recipe |= {name: getattr(settings, name) for name in RECIPE}
    outputs = Outputs("upscale", recipe, settings.overwrite)
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


def check_targets(work: list[Work], settings: UpscaleSettings) -> None:
    """
    Raises:
        ValueError: if a result would replace an input, or another result, or its format is not written.
    """
    from pyrdiff.data.files import WRITTEN

    inputs = {os.path.realpath(source): name for name, source, _ in work}
    made: dict[str, str] = {}
    for name, _, target in work:
        place = os.path.realpath(target)
        if place in made:
            raise ValueError(f"--output: {made[place]} and {name} would both be {target}; expected --ext auto")
        if target.suffix.lower() not in WRITTEN and not settings.keep_going:
            raise ValueError(
                f"--output: {name}: files {target.suffix!r} are not written; expected --ext png or another"
            )
        if place in inputs:
            raise ValueError(
                f"--output: {name} would replace the input {inputs[place]}; expected another folder or --suffix"
            )
        made[place] = name


def load(settings: UpscaleSettings) -> "DiffusionPipeline":
    """The pipeline that enlarges, on the device."""
    import pyrdiff
    from pyrdiff import hub
    from pyrdiff.hub.enlarging import arguments_of, enlarging, image_channels

    device = open_device(settings.device)
    saved = pyrdiff.load(settings.model, adapters=hub.parse_adapters(settings.adapter or ()))
    if settings.adapter:
        hub.merge_adapters(saved)
    try:
        pipeline = enlarging(saved)
    except ValueError as error:
        raise ValueError(f"--model={settings.model!r}: {error}") from error
    known = arguments_of(pipeline)
    for name, argument in ARGUMENTS.items():
        kind = "enlarge" if pipeline is saved else "generate"
        good = argument in known or not getattr(settings, name)
        expect(settings, name, good, f"nothing for a model trained to {kind}, a {type(pipeline).__name__}")
    factors = getattr(getattr(pipeline, "unet", None), "config", {}).get("scale_factors")
    if pipeline is saved:
        accepted = f"one of {list(factors)}" if factors else "a whole number"
        good = settings.outscale in (factors or [round(settings.outscale)])
        expect(settings, "outscale", good, f"{accepted} for this model")
    if hasattr(pipeline, "cost"):
        pipeline.cost(64, int(settings.outscale), settings.num_inference_steps, plan=settings.plan)  # checks the plan
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    channels = image_channels(pipeline)
    if channels not in (1, 3):
        raise ValueError(f"--model={settings.model!r}: has {channels} channels; expected 1 (gray) or 3 (RGB)")
    return pipeline


def enlarge(pipeline: "DiffusionPipeline", picture: "Picture", seed: int, settings: UpscaleSettings) -> "Picture":
    """The enlarged picture. It is worked on upright, and without the colours that its alpha hides."""
    import torch

    from pyrdiff.data import fill_hidden
    from pyrdiff.hub.enlarging import arguments_of, image_channels

    gray, channels = picture.color.mode == "L", image_channels(pipeline)
    if channels == 1 and not gray:
        raise ValueError("a colour image: expected a gray one, for this model of one channel")
    color, alpha = picture.upright()
    size = tuple(round(side * settings.outscale) for side in color.size)
    if alpha is not None:
        color, alpha = fill_hidden(color, alpha), enlarged_alpha(alpha, size, settings)
    known = arguments_of(pipeline)
    given = {argument: getattr(settings, name) for name, argument in ARGUMENTS.items() if getattr(settings, name)}
    if "scale_factor" in known:
        whole = settings.outscale == round(settings.outscale)
        given["scale_factor"] = int(settings.outscale) if whole else settings.outscale
    if "generator" in known:
        given["generator"] = torch.Generator().manual_seed(seed)
    output = pipeline(color if channels == 1 else color.convert("RGB"), **given)
    if not math.isfinite(getattr(output, "consistency", torch.zeros(())).sum().item()):
        raise ValueError("the model gave values that are no numbers")
    color = output.images[0]
    if color.size != size:
        raise ValueError("a {}x{} image came of it: expected {}x{}".format(*color.size, *size))
    enlarged = picture.with_shown(color.convert("L") if gray and channels == 3 else color, alpha)
    if gray and channels == 3:
        enlarged.notes.append("gray, enlarged as RGB and saved as its luma")
    return enlarged


def enlarged_alpha(alpha: "Image.Image", size: tuple[int, int], settings: UpscaleSettings) -> "Image.Image":
    """Bicubic; with --hard_consistency projected so that, made smaller, it gives the alpha of the picture."""
    from PIL import Image

    from pyrdiff.data import image_tensor
    from pyrdiff.parts.operators import project_onto

    larger = alpha.resize(size, Image.Resampling.BICUBIC)
    if not settings.hard_consistency:
        return larger
    operator = shrinking(size, alpha.size, settings)
    projected = project_onto(2 * image_tensor([larger], 1) - 1, image_tensor([alpha], 1), operator)
    return Image.fromarray(((projected[0, 0] + 1) * 127.5).round().byte().numpy())


def shrinking(large: tuple[int, int], small: tuple[int, int], settings: UpscaleSettings) -> "SeparableOperator":
    """The operator that makes (width, height) `small` of `large`."""
    from pyrdiff.parts.operators import SeparableOperator

    return SeparableOperator.named(settings.operator or "bicubic", large[::-1], small[::-1], 1)


def difference(picture: "Picture", made: "Picture", settings: UpscaleSettings) -> tuple[float, float]:
    """
    How far the file that was written, made smaller, is from the picture: mean and largest absolute difference in
    [0, 1], over the colours that are seen and the alpha.
    """
    import torch

    from pyrdiff.data import fill_hidden, image_tensor

    (color, alpha), (larger, larger_alpha) = picture.upright(), made.upright()
    channels = 1 if color.mode == "L" else 3
    operator = shrinking(larger.size, color.size, settings)
    seen = torch.ones(())
    if alpha is not None:
        color, seen = fill_hidden(color, alpha), image_tensor([alpha], 1)
    bands = [(operator.A(image_tensor([larger], channels)) - image_tensor([color], channels)).abs() * seen]
    if alpha is not None:
        opaque = torch.ones(1, 1, *larger.size[::-1])
        written = opaque if larger_alpha is None else image_tensor([larger_alpha], 1)
        bands.append((operator.A(written) - seen).abs())
    distance = torch.cat(bands, 1)
    return distance.mean().item(), distance.max().item()


def process(pipeline: "DiffusionPipeline", work: Work, settings: UpscaleSettings, outputs: Outputs) -> dict:
    """Enlarges one file. Returns what the report says of it."""
    from pyrdiff.data import check_saving, open_picture, reopen_picture, save_picture, seed_of

    began = time.perf_counter()
    path_number = int.from_bytes(hashlib.sha256(work.name.encode("utf-8", "surrogateescape")).digest(), "big")
    seed = seed_of(settings.seed, path_number)
    picture = open_picture(work.source)
    check_saving(picture, work.target, *(round(side * settings.outscale) for side in picture.color.size))
    enlarged = enlarge(pipeline, picture, seed, settings)
    notes = save_picture(enlarged, work.target, outputs.replacing)
    mean, largest = difference(picture, reopen_picture(work.target), settings)
    if settings.hard_consistency and largest > 1.5 / 255:
        notes.append(f"--hard_consistency is not met: up to {255 * largest:.1f}/255 is left in the file")
    told = {"input_size": picture.color.size, "output_size": enlarged.color.size}  # (width, height)
    told |= {"seconds": round(time.perf_counter() - began, 3), "seed": seed}
    return {"status": "done", **told, "consistency": mean, "largest_difference": largest, "notes": notes}


def enlarge_all(pipeline: "DiffusionPipeline | None", plan: Plan, settings: UpscaleSettings, files: list[dict]) -> None:
    """Enlarges the files and adds to `files` what became of each. Without `--keep_going` it stops at a failure."""
    for item in plan.work:
        file = {"input": item.name, "output": item.target.relative_to(plan.output).as_posix()}
        if item in plan.done:
            files.append({**file, "status": "skipped", "reason": "the output exists"})
            continue
        try:
            files.append({**file, **process(pipeline, item, settings, plan.outputs)})
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            files.append({**file, "status": "failed", "reason": reason(error)})
            complain(error, f"{one_line(item.name)}: {reason(error)}")
            if not settings.keep_going:
                return
            continue
        say("; ".join([f"{one_line(item.name)}: {files[-1]['seconds']} s", *files[-1]["notes"]]))


def say(line: str) -> None:
    """Prints a line, unless nobody listens any more, as after `| head`: the work goes on."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reason(error: Exception) -> str:
    """What went wrong with a file, in one line."""
    text = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return one_line(text)


def one_line(text: object) -> str:
    """The text without line breaks, and with what stdout cannot show spelt out."""
    return " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())


def describe(settings: UpscaleSettings, files: list[dict], planned: int) -> dict:
    """The report."""
    counts = {status: sum(file["status"] == status for file in files) for status in ("done", "skipped", "failed")}
    counts["not reached"] = planned - len(files)
    return {"settings": asdict(settings), "versions": versions(), "counts": counts, "files": files}


def stop(*_: object) -> NoReturn:
    """Handler of SIGTERM."""
    sys.exit(143)


def main(args: list[str]) -> dict:
    settings = parse(UpscaleSettings, __doc__, args, prog="pyrdiff upscale")
    check_paths(settings, models=["model"], written=["report"])
    expect(settings, "input", Path(settings.input).exists(), "a file or a folder")
    plan = find_work(settings)
    output, work = plan.output, plan.work
    report_path = Path(settings.report) if settings.report else output / "report.json"
    reports = Outputs("upscale report", {}, settings.overwrite)  # of all runs alike: each has its own settings in it
    if settings.report or os.path.isdir(settings.input):
        reports.check([report_path], "report" if settings.report else "output")
    for folder in {output, report_path.parent}:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can be written to
    pipeline = load(settings) if len(plan.done) < len(work) else None

    files: list[dict] = []
    code, after_failure = 0, 1 if settings.keep_going else 2
    before = signal.signal(signal.SIGTERM, stop)
    try:
        enlarge_all(pipeline, plan, settings, files)
    except (KeyboardInterrupt, SystemExit) as stopped:
        code = getattr(stopped, "code", 130)
    finally:
        signal.signal(signal.SIGTERM, before)
        report = describe(settings, files, len(work))
        if report["counts"]["failed"]:
            code = code or after_failure
        if settings.report or os.path.isdir(settings.input):
            try:
                write_json(report, report_path, reports)
            except OSError as error:
                complain(error, f"{report_path}: {reason(error)}")
                code = code or after_failure
    return {**report, "exit_code": code}
