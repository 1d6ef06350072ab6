"""
Enlarge a picture, or a folder with the folders below it.

Each result keeps the alpha channel (enlarged bicubically), EXIF, ICC profile and DPI of its file, and what could not be
kept is in the report. Files are written beside, read back and renamed, so that none is ever half written. JPEG and WebP
have quality 95. The seed of a picture depends on --seed and on its path below --input only.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

from pyrdiff.cli import complain, expect, parse
from pyrdiff.commands.paths import check_paths
from pyrdiff.commands.sample import write_json
from pyrdiff.machine import open_device, versions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from pyrdiff.data import Picture

GUIDED, TRAINED = ("guidance", "operator", "refine_steps"), ("plan", "num_inference_steps", "color_fix")  # flags


@dataclass(kw_only=True)
class UpscaleSettings:
    """Flags of `pyrdiff upscale`."""

    model: str
    """Exported folder, or a repository on the Hub; none of its code is run."""
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
    """Leave out what has its result already."""
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


def find_work(settings: UpscaleSettings) -> tuple[Path, list[Work]]:
    """
    The folder of the results, and what is to be done.

    Raises:
        ValueError: if there is nothing to do, or a picture would be written over.
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
    work = without_results(list(map(Work, names, sources, targets)), settings.skip_existing)
    if not work:
        raise ValueError(f"--input={settings.input!r}: has nothing to enlarge; expected a folder of images")
    return output, work


def find_pictures(place: Path, output: Path) -> list[Path]:
    """The picture, or those of a folder but for what lies in the folder of the results."""
    from pyrdiff.data import list_images

    if not place.is_dir():
        return [place]
    results = output.resolve()
    if results == place.resolve():
        return list_images(place)
    return [path for path in list_images(place) if not path.resolve().is_relative_to(results)]


def without_results(work: list[Work], skip_existing: bool) -> list[Work]:
    """
    The work, with `skip_existing` without the results of an earlier run.

    Raises:
        ValueError: if a result would replace an input, or another result.
    """
    inputs = {os.path.realpath(source): name for name, source, _ in work}
    results = {os.path.realpath(target) for _, source, target in work if not same_file(source, target)}
    if skip_existing:
        work = [item for item in work if os.path.realpath(item.source) not in results]
    made: dict[str, str] = {}
    for name, _, target in work:
        place = os.path.realpath(target)
        if place in made:
            raise ValueError(f"--output: {made[place]} and {name} would both be {target}; expected --ext auto")
        if place in inputs and not (skip_existing and place in results):
            raise ValueError(
                f"--output: {name} would replace the input {inputs[place]}; expected another folder or --suffix"
            )
        made[place] = name
    return work


def same_file(source: Path, target: Path) -> bool:
    """True if both paths lead to one file."""
    return os.path.realpath(source) == os.path.realpath(target)


def load(settings: UpscaleSettings) -> "DiffusionPipeline":
    """The pipeline, on the device; of a model that was trained to generate, the one that guides it."""
    import pyrdiff

    device = open_device(settings.device)
    pipeline = pyrdiff.load(settings.model)
    trained = isinstance(pipeline, pyrdiff.ResidualSRPipeline)
    if not trained:
        if not {"unet", "scheduler"} <= set(pipeline.components):
            raise ValueError(f"--model: a {type(pipeline).__name__}; expected a model with a unet and a scheduler")
        pipeline = pyrdiff.GuidedSRPipeline(pipeline.unet, pipeline.scheduler)
    for name in GUIDED if trained else TRAINED:
        kind = "enlarge" if trained else "generate"
        expect(settings, name, not getattr(settings, name), f"nothing for a model trained to {kind}")
    if trained:
        factors = pipeline.unet.config.scale_factors
        accepted = f"one of {list(factors)}" if factors else "a whole number"
        good = settings.outscale in (factors or [round(settings.outscale)])
        expect(settings, "outscale", good, f"{accepted} for this model")
        pipeline.cost(64, int(settings.outscale), settings.num_inference_steps, plan=settings.plan)  # checks the plan
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    channels = pipeline.unet.config.in_channels
    if channels not in (1, 3):
        raise ValueError(f"--model={settings.model!r}: has {channels} channels; expected 1 (gray) or 3 (RGB)")
    return pipeline


def enlarge(
    pipeline: "DiffusionPipeline", picture: "Picture", seed: int, settings: UpscaleSettings
) -> "tuple[Picture, float]":
    """The enlarged picture, and how far it is from the input when it is made smaller again (in [0, 1])."""
    import torch
    from PIL import Image

    import pyrdiff

    gray, channels = picture.color.mode == "L", pipeline.unet.config.in_channels
    if channels == 1 and not gray:
        raise ValueError("a colour image: expected a gray one, for this model of one channel")
    trained = isinstance(pipeline, pyrdiff.ResidualSRPipeline)
    given = {name: getattr(settings, name) for name in (TRAINED if trained else GUIDED) if getattr(settings, name)}
    output = pipeline(
        picture.color if channels == 1 else picture.color.convert("RGB"),
        scale_factor=int(settings.outscale) if trained else settings.outscale,
        **given,
        hard_consistency=settings.hard_consistency,
        tile=settings.tile,
        tile_overlap=settings.tile_pad,
        generator=torch.Generator().manual_seed(seed),
    )
    consistency = output.consistency.item()
    if not math.isfinite(consistency):
        raise ValueError("the model gave values that are no numbers")
    color, alpha, notes = output.images[0], picture.alpha, list(picture.notes)
    if gray and channels == 3:
        notes.append("gray, enlarged as RGB and saved as its luma")
        color = color.convert("L")
    if alpha is not None:
        alpha = alpha.resize(color.size, Image.Resampling.BICUBIC)
    return replace(picture, color=color, alpha=alpha, notes=notes), consistency


def process(pipeline: "DiffusionPipeline", work: Work, settings: UpscaleSettings) -> dict:
    """Enlarges one file. Returns what the report says of it."""
    from pyrdiff.data import check_saving, open_picture, save_picture, seed_of

    began = time.perf_counter()
    path_number = int.from_bytes(hashlib.sha256(work.name.encode("utf-8", "surrogateescape")).digest(), "big")
    seed = seed_of(settings.seed, path_number)
    picture = open_picture(work.source)
    check_saving(picture, work.target, *(round(side * settings.outscale) for side in picture.color.size))
    enlarged, consistency = enlarge(pipeline, picture, seed, settings)
    notes = save_picture(enlarged, work.target)
    sizes = {"input_size": picture.color.size, "output_size": enlarged.color.size}  # (width, height)
    seconds = round(time.perf_counter() - began, 3)
    return {"status": "done", **sizes, "seconds": seconds, "seed": seed, "consistency": consistency, "notes": notes}


def enlarge_all(
    pipeline: "DiffusionPipeline | None", work: list[Work], output: Path, settings: UpscaleSettings, files: list[dict]
) -> None:
    """Enlarges the files and adds to `files` what became of each. Without `--keep_going` it stops at a failure."""
    for item in work:
        file = {"input": item.name, "output": item.target.relative_to(output).as_posix()}
        if settings.skip_existing and item.target.is_file():
            files.append({**file, "status": "skipped", "reason": "the output exists"})
            continue
        try:
            files.append({**file, **process(pipeline, item, settings)})
            print(f"{one_line(item.name)}: {files[-1]['seconds']} s", *files[-1]["notes"], sep="; ", flush=True)
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            files.append({**file, "status": "failed", "reason": reason(error)})
            complain(error, f"{one_line(item.name)}: {reason(error)}")
            if not settings.keep_going:
                return


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
    output, work = find_work(settings)
    report_path = Path(settings.report) if settings.report else output / "report.json"
    for folder in {output, report_path.parent}:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can be written to
    pending = [item for item in work if not (settings.skip_existing and item.target.is_file())]
    pipeline = load(settings) if pending else None

    files: list[dict] = []
    code, after_failure = 0, 1 if settings.keep_going else 2
    before = signal.signal(signal.SIGTERM, stop)
    try:
        enlarge_all(pipeline, work, output, settings, files)
    except (KeyboardInterrupt, SystemExit) as stopped:
        code = getattr(stopped, "code", 130)
    finally:
        signal.signal(signal.SIGTERM, before)
        report = describe(settings, files, len(work))
        if report["counts"]["failed"]:
            code = code or after_failure
        if settings.report or os.path.isdir(settings.input):
            try:
                write_json(report, report_path)
            except OSError as error:
                complain(error, f"{report_path}: {reason(error)}")
                code = code or after_failure
    return {**report, "exit_code": code}
