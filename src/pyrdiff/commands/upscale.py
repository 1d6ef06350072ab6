"""
Enlarge a picture, or a folder with the folders below it.

Example: pyrdiff upscale noto-emoji -i photos -o larger -s 4

Each result keeps the alpha channel (enlarged bicubically), EXIF, ICC profile, DPI, XMP, IPTC, comments and PNG texts of
its file as far as its format has a place for them; what could not be kept is in the report. Pictures are enlarged as
they are shown, and stored as they were. The consistency in the report is that of the file that was written. Files are
written beside, read back and renamed, so that none is ever half written; files that runs with the same model and flags
did not make are replaced with --overwrite only. The seed of a picture depends on --seed and on its path below --input
only.

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
from typing import TYPE_CHECKING, Literal, NoReturn

from pyrdiff.cli import complain, expect, parse
from pyrdiff.commands.paths import BUNDLED, check_paths
from pyrdiff.commands.sample import write_json
from pyrdiff.commands.upscale_work import Plan, Work, find_work
from pyrdiff.machine import open_device, versions
from pyrdiff.parts.outputs import Outputs
from pyrdiff.upscaling.sizes import Goal
from pyrdiff.upscaling.telling import Progress, one_line, reason, say

if TYPE_CHECKING:
    import torch

    from pyrdiff.upscaling.enlarger import Enlarger

# Flags that are arguments of the pipeline's call, by its name for them.
ARGUMENTS = {
    name: name for name in ("guidance", "operator", "refine_steps", "plan", "num_inference_steps", "color_fix")
}
ARGUMENTS |= {"hard_consistency": "hard_consistency", "tile": "tile", "tile_pad": "tile_overlap"}
DIALS = ("detail", "restore")  # arguments as well, of which 0 is one
# What decides how a result looks, beside the model.
RECIPE = (*ARGUMENTS, "outscale", "seed")
# The same of later versions, where they are not these.
ADDED = {**dict.fromkeys((*DIALS, "width", "height")), "quality": 95, "lossless": False, "half": False}


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
    """Any number from 1 up, such as 1.5. What the model cannot make is resampled from the next larger that it can."""
    width: int | None = None
    """Of the result, instead of --scale_factor; --height follows unless it is given."""
    height: int | None = None
    """Of the result, instead of --scale_factor; --width follows unless it is given."""
    max_megapixels: float = 256
    """The most pixels, in millions, of a result."""
    tile: int | None = None
    """Side of the network's windows on the output; by default what suits the device."""
    tile_pad: int | None = None
    """Pixels that they overlap by; by default a quarter of --tile."""
    suffix: str = ""
    """Added to the name of each file, such as _x4."""
    ext: Literal["auto", "png", "jpg", "webp", "tif"] = "auto"
    """auto: as the input; of HEIC, jpg."""
    quality: int = 95
    """Of JPEG and WebP, 1 to 100."""
    lossless: bool = False
    """WebP without loss."""
    frames: bool = False
    """Enlarge animations and files of several pages frame by frame, into gif, webp, png or tif."""
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
    detail: float | None = None
    """Of models that have this dial: from 0, the nearest to the truth and smooth, to 1, as sharp as they can."""
    restore: float | None = None
    """Of models that have this dial: how much blur, noise and JPEG they undo, from 0 to 1."""
    color_fix: bool = False
    """Of models trained to enlarge: give each channel the input's mean."""
    hard_consistency: bool = False
    """Made smaller, the output gives the input."""
    seed: int = 0
    """Of the first noise; each picture has its own, by its path."""
    device: str | None = None
    """By default the GPU if there is one."""
    half: bool = False
    """The network in bfloat16, faster on most devices; on a photograph results differed by 3 of 255 at most."""
    report: str | None = None
    """JSON to write; by default report.json in --output, for a folder."""

    def __post_init__(self):
        expect(self, "outscale", 1 <= self.outscale < math.inf, "1 or more")
        expect(self, "outscale", self.outscale == 4 or self.width is self.height is None, "either it or a size")
        for name in DIALS:
            expect(self, name, getattr(self, name) is None or 0 <= getattr(self, name) <= 1, "0 to 1")
        expect(self, "quality", 1 <= self.quality <= 100, "1 to 100")
        expect(self, "max_megapixels", self.max_megapixels > 0, "a number above 0")
        for name in ("width", "height", "tile", "refine_steps", "num_inference_steps"):
            expect(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        overlap = self.tile_pad is None or (self.tile is not None and 0 < self.tile_pad < self.tile)
        expect(self, "tile_pad", overlap, "1 or more, less than --tile")
        expect(self, "num_inference_steps", not (self.num_inference_steps and self.plan), "either it or --plan")
        expect(self, "suffix", not set(self.suffix) & {"/", os.sep, "\0"}, "a part of a file name")

    @property
    def goal(self) -> Goal:
        return Goal(self.outscale, self.width, self.height)

    @property
    def recipe(self) -> dict:
        """The flags that decide how a result looks, as records of earlier versions have them where these suffice."""
        given = {name: getattr(self, name) for name in ADDED if getattr(self, name) != ADDED[name]}
        return {name: getattr(self, name) for name in RECIPE} | given


def load(settings: UpscaleSettings) -> "Enlarger":
    """The pipeline that enlarges, on the device."""
    import pyrdiff
    from pyrdiff import hub
    from pyrdiff.hub.enlarging import arguments_of, enlarging
    from pyrdiff.upscaling.enlarger import Enlarger

    device = open_device(settings.device)
    saved = pyrdiff.load(settings.model, adapters=hub.parse_adapters(settings.adapter or ()))
    if settings.adapter:
        hub.merge_adapters(saved)
    try:
        pipeline = enlarging(saved)
    except ValueError as error:
        raise ValueError(f"--model={settings.model!r}: {error}") from error
    known = arguments_of(pipeline)
    given = {argument: getattr(settings, name) for name, argument in ARGUMENTS.items() if getattr(settings, name)}
    given |= {name: getattr(settings, name) for name in DIALS if getattr(settings, name) is not None}
    for name, argument in {**ARGUMENTS, **dict(zip(DIALS, DIALS, strict=True))}.items():
        kind = "enlarge" if pipeline is saved else "generate"
        good = argument in known or argument not in given
        expect(settings, name, good, f"nothing for a model trained to {kind}, a {type(pipeline).__name__}")
    if hasattr(pipeline, "cost"):
        factors = getattr(getattr(pipeline, "unet", None), "config", {}).get("scale_factors")
        pipeline.cost(64, max(factors or [2]), settings.num_inference_steps, plan=settings.plan)  # checks the plan
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "unet"):
        prepare(pipeline.unet, device, settings.half)
    tile, overlap = given.pop("tile", None), given.pop("tile_overlap", None)
    enlarger = Enlarger(pipeline, given, tile, overlap, saved)
    if enlarger.channels not in (1, 3):
        raise ValueError(f"--model={settings.model!r}: has {enlarger.channels} channels; expected 1 (gray) or 3 (RGB)")
    return enlarger


def prepare(network: "torch.nn.Module", device: "torch.device", half: bool) -> None:
    """
    Lays the network out as it is fastest. Channels last took 17 % less time in SR4 mini on a processor, and bfloat16
    another 48 % where the processor has it; both are what tensor cores want.
    """
    import torch

    network.to(memory_format=torch.channels_last)
    if half:
        narrow = device.type == "cpu" or torch.cuda.is_bf16_supported()
        torch.nn.Module.to(network, torch.bfloat16 if narrow else torch.float16)


def process(enlarger: "Enlarger", work: Work, settings: UpscaleSettings, outputs: Outputs) -> dict:
    """Enlarges one file. Returns what the report says of it."""
    from pyrdiff.data import seed_of
    from pyrdiff.data.files import read_header

    began = time.perf_counter()
    path_number = int.from_bytes(hashlib.sha256(work.name.encode("utf-8", "surrogateescape")).digest(), "big")
    seed = seed_of(settings.seed, path_number)
    header = read_header(work.source)
    if header is not None and header.frames > 1:
        expect(settings, "frames", settings.frames, f"True for a file of {header.frames} frames or pages")
        told = process_frames(enlarger, work, settings, outputs, seed)
    else:
        told = process_picture(enlarger, work, settings, outputs, seed)
    return {"status": "done", "seconds": round(time.perf_counter() - began, 3), "seed": seed, **told}


def process_picture(
    enlarger: "Enlarger", work: Work, settings: UpscaleSettings, outputs: Outputs, seed: int
) -> dict[str, object]:
    from pyrdiff.data import check_saving, open_picture, reopen_picture, save_picture
    from pyrdiff.upscaling.fitness import doubts_of_colors, doubts_of_result
    from pyrdiff.upscaling.pictures import difference, enlarge

    picture = open_picture(work.source, deep=True)
    shown = picture.upright()[0].size
    target = settings.goal.of(shown)
    check_size(target, 1, settings.max_megapixels)
    check_saving(picture, work.target, *target, settings.lossless)
    route = enlarger.route(shown, target)
    enlarger.check_memory(route)
    enlarged = enlarge(enlarger, picture, route, seed)
    notes = save_picture(enlarged, work.target, outputs.replacing, settings.quality, settings.lossless)
    told = {"input_size": picture.color.size, "output_size": enlarged.color.size}  # (width, height)
    if all(small <= large for small, large in zip(shown, target, strict=True)):
        mean, largest = difference(enlarger, picture, reopen_picture(work.target))
        told |= {"consistency": mean, "largest_difference": largest}
        if settings.hard_consistency and largest > 1.5 / 255:
            notes.append(f"--hard_consistency is not met: up to {255 * largest:.1f}/255 is left in the file")
        notes += filter(None, [doubts_of_result(enlarger, picture, target, mean), doubts_of_colors(enlarger, picture)])
    return told | {"notes": notes}


def process_frames(
    enlarger: "Enlarger", work: Work, settings: UpscaleSettings, outputs: Outputs, seed: int
) -> dict[str, object]:
    """Each frame from the same noise, so that what stands still stays so."""
    from pyrdiff.data.files import save_options
    from pyrdiff.upscaling.animations import KINDS, check_animation, open_animation, save_animation
    from pyrdiff.upscaling.pictures import difference, enlarge

    check_animation(work.target)
    animation = open_animation(work.source)
    shown = animation.frames[0].color.size
    target = settings.goal.of(shown)
    check_size(target, len(animation.frames), settings.max_megapixels)
    route = enlarger.route(shown, target)
    enlarger.check_memory(route)
    made = [enlarge(enlarger, frame, route, seed) for frame in animation.frames]
    options = save_options(KINDS[work.target.suffix.lower()], settings.quality, settings.lossless)
    notes = save_animation(animation._replace(frames=made), work.target, outputs.replacing, options)
    told = {"input_size": shown, "output_size": target, "frames": len(made)}
    if all(small <= large for small, large in zip(shown, target, strict=True)):
        off = [difference(enlarger, *pair) for pair in zip(animation.frames, made, strict=True)]
        told |= {"consistency": sum(mean for mean, _ in off) / len(off), "largest_difference": max(off)[1]}
    return told | {"notes": [*route.notes, f"{len(made)} frames, without what else the file carries", *notes]}


def check_size(target: tuple[int, int], frames: int, most: float) -> None:
    """
    Raises:
        ValueError: for a result of more megapixels, all frames together.
    """
    width, height = target
    pixels = width * height * frames / 1e6
    if pixels > most:
        of = f"{frames} frames of " if frames > 1 else ""
        raise ValueError(
            f"would be {of}{width}x{height}, {pixels:,.0f} megapixels: expected at most {most:g} (--max_megapixels)"
        )


def announce(enlarger: "Enlarger", plan: Plan, settings: UpscaleSettings) -> list[int]:
    """Says what is going to be done. Returns for each picture how often a window will go through the network."""
    from pyrdiff.data.files import read_header
    from pyrdiff.upscaling.fitness import doubts_of_size, said_of_images

    counts, first, left, largest = [], "", 0, (0, 0)
    for item in plan.work:
        header = None if item in plan.done else read_header(item.source)
        left += item not in plan.done
        counts.append(0)
        if header is None or math.prod(target := settings.goal.of(header.size)) > settings.max_megapixels * 1e6:
            continue
        route = enlarger.route(header.size, target)
        counts[-1] = route.windows * (header.frames if settings.frames else 1)
        by = " and ".join(str(each.counts) for each in route.passes if each.counts)
        first = first or "{}×{} → {}×{}".format(*header.size, *target) + (f" by {by}" if by else "")
        largest = max(largest, target, key=max)
    pictures = "1 picture, " if left == 1 else f"{left} pictures, the first "
    say(f"{pictures}{first or 'which cannot be read'}, by {settings.model} on {enlarger.device}")
    here = Path(settings.model) if os.path.isdir(settings.model) else BUNDLED / settings.model
    doubt = doubts_of_size(enlarger, largest, said_of_images(here))
    if doubt:
        say(f"warning: {doubt}")
    return counts


def enlarge_all(enlarger: "Enlarger | None", plan: Plan, settings: UpscaleSettings, files: list[dict]) -> None:
    """Enlarges the files and adds to `files` what became of each. Without `--keep_going` it stops at a failure."""
    from pyrdiff.upscaling.watching import watched

    counts = [0] * len(plan.work) if enlarger is None else announce(enlarger, plan, settings)
    progress = Progress(sum(counts), len(plan.work))
    with watched(None if enlarger is None else enlarger.pipeline, progress):
        for number, item in enumerate(plan.work, 1):
            file = {"input": item.name, "output": item.target.relative_to(plan.output).as_posix()}
            if item in plan.done:
                files.append({**file, "status": "skipped", "reason": "the output exists"})
                continue
            progress.start(item.name, number)
            try:
                files.append({**file, **process(enlarger, item, settings, plan.outputs)})
            except (ValueError, RuntimeError, OSError, MemoryError) as error:
                files.append({**file, "status": "failed", "reason": reason(error)})
                complain(error, f"{one_line(item.name)}: {reason(error)}")
                if not settings.keep_going:
                    return
                continue
            finally:
                progress.finish(sum(counts[:number]))
            progress.write("; ".join([f"{one_line(item.name)}: {files[-1]['seconds']} s", *files[-1]["notes"]]))


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
    say(f"{settings.input} enlarged by {settings.model} into {settings.output} (Ctrl-C keeps the finished)")
    plan = find_work(settings, settings.recipe)
    output, work = plan.output, plan.work
    report_path = Path(settings.report) if settings.report else output / "report.json"
    reports = Outputs("upscale report", {}, settings.overwrite)  # of all runs alike: each has its own settings in it
    if settings.report or os.path.isdir(settings.input):
        reports.check([report_path], "report" if settings.report else "output")
    for folder in {output, report_path.parent}:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can be written to
    enlarger = load(settings) if len(plan.done) < len(work) else None

    files: list[dict] = []
    code, after_failure = 0, 1 if settings.keep_going else 2
    before = signal.signal(signal.SIGTERM, stop)
    try:
        enlarge_all(enlarger, plan, settings, files)
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
