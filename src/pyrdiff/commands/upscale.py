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
from typing import Literal

from pyrdiff.cli import complain, parse
from pyrdiff.commands.sample import open_device, write_json
from pyrdiff.machine import versions

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
        if not math.isfinite(self.outscale) or self.outscale < 1:
            raise ValueError(f"--outscale: got {self.outscale}; accepted is 1 or more")
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"--tile: got {self.tile}; accepted is 1 or more")
        if self.tile_pad is not None and not (self.tile and 0 < self.tile_pad < self.tile):
            raise ValueError(f"--tile_pad: got {self.tile_pad}; accepted with --tile is 1 or more, less than --tile")
        for name in ("refine_steps", "num_inference_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}; accepted is 1 or more")
        if self.plan and self.num_inference_steps:
            raise ValueError(
                f"--num_inference_steps: got {self.num_inference_steps} with --plan; accepted is one of them"
            )
        if set(self.suffix) & {"/", os.sep, "\0"}:
            raise ValueError(f"--suffix: got {self.suffix!r}; accepted is a part of a file name")


def find_work(settings: UpscaleSettings) -> tuple[Path, list[tuple[str, Path, Path]]]:
    """The folder of the results, and for each picture its path below --input, its file and the file to write."""
    from pyrdiff.data import list_images
    from pyrdiff.data.files import WRITTEN

    folder, output = Path(settings.input), Path(settings.output)
    if not folder.exists():
        raise ValueError(f"--input: {settings.input!r} does not exist; accepted is a file or a folder")
    if folder.is_dir() and output.is_file():
        raise ValueError(f"--output: got the file {settings.output!r}; accepted for a folder is a folder")
    if settings.report and os.path.isdir(settings.report):
        raise ValueError(f"--report: got the folder {settings.report!r}; accepted is a file to write")
    if folder.is_dir():
        sources = list_images(folder)
        if output.resolve() != folder.resolve() and output.resolve().is_relative_to(folder.resolve()):
            sources = [path for path in sources if not path.resolve().is_relative_to(output.resolve())]
    else:
        folder, sources = folder.parent, [folder]

    if os.path.isfile(settings.input) and output.suffix.lower() in WRITTEN and not output.is_dir():
        if settings.suffix or settings.ext != "auto":
            raise ValueError(f"--output: got the file {settings.output!r} with --suffix or --ext; accepted is a folder")
        targets, output = [output], output.parent
    else:
        ends = [path.suffix if settings.ext == "auto" else f".{settings.ext}" for path in sources]
        named = [path.with_name(path.stem + settings.suffix + end) for path, end in zip(sources, ends, strict=True)]
        targets = [output / path.relative_to(folder) for path in named]
    names = [path.relative_to(folder).as_posix() for path in sources]
    work = list(zip(names, sources, targets, strict=True))

    # No picture of the user's is ever replaced, and none is a result of another one.
    inputs = {os.path.realpath(source): name for name, source, _ in work}
    earlier = {os.path.realpath(target) for _, source, target in work if not same_file(source, target)}
    if settings.skip_existing:
        work = [item for item in work if os.path.realpath(item[1]) not in earlier]
    made = {}
    for name, _, target in work:
        place = os.path.realpath(target)
        if place in made:
            raise ValueError(f"--output: {made[place]} and {name} would both be {target}; accepted is --ext auto")
        if place in inputs and not (settings.skip_existing and place in earlier):
            raise ValueError(
                f"--output: {name} would replace the input {inputs[place]}; accepted is another folder or --suffix"
            )
        made[place] = name
    if not work:
        raise ValueError(f"--input: {settings.input!r} has nothing to enlarge; accepted is a folder of images")
    return output, work


def same_file(source: Path, target: Path) -> bool:
    return os.path.realpath(source) == os.path.realpath(target)


def load(settings: UpscaleSettings):
    """The pipeline, on the device; of a model that was trained to generate, the one that guides it."""
    import pyrdiff

    device = open_device(settings.device)
    pipeline = pyrdiff.load(settings.model)
    trained = isinstance(pipeline, pyrdiff.ResidualSRPipeline)
    if not trained and not {"unet", "scheduler"} <= set(pipeline.components):
        raise ValueError(f"--model: got a {type(pipeline).__name__}; accepted is a model with a unet and a scheduler")
    if not trained:
        pipeline = pyrdiff.GuidedSRPipeline(pipeline.unet, pipeline.scheduler)
    for name in GUIDED if trained else TRAINED:
        if getattr(settings, name):
            kind = "enlarge" if trained else "generate"
            raise ValueError(
                f"--{name}: got {getattr(settings, name)!r}; accepted is nothing for a model trained to {kind}"
            )
    if trained:
        factors = pipeline.unet.config.scale_factors
        if settings.outscale not in (factors or [round(settings.outscale)]):
            accepted = f"one of {list(factors)}" if factors else "a whole number"
            raise ValueError(f"--outscale: got {settings.outscale:g}; accepted for this model is {accepted}")
        pipeline.cost(64, int(settings.outscale), settings.num_inference_steps, plan=settings.plan)  # checks the plan
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    channels = pipeline.unet.config.in_channels
    if channels not in (1, 3):
        raise ValueError(f"--model: {settings.model!r} has {channels} channels; accepted are 1 (gray) and 3 (RGB)")
    return pipeline


def enlarge(pipeline, picture, seed: int, settings: UpscaleSettings):
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


def process(pipeline, name: str, source: Path, target: Path, settings: UpscaleSettings) -> dict:
    """Enlarges one file; what the report says of it."""
    from pyrdiff.data import check_saving, open_picture, save_picture, seed_of

    began = time.perf_counter()
    path_number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big")
    seed = seed_of(settings.seed, path_number)
    picture = open_picture(source)
    check_saving(picture, target, *(round(side * settings.outscale) for side in picture.color.size))
    enlarged, consistency = enlarge(pipeline, picture, seed, settings)
    notes = save_picture(enlarged, target)
    sizes = {"input_size": picture.color.size, "output_size": enlarged.color.size}  # (width, height)
    seconds = round(time.perf_counter() - began, 3)
    return {"status": "done", **sizes, "seconds": seconds, "seed": seed, "consistency": consistency, "notes": notes}


def reason(error: Exception) -> str:
    text = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return one_line(text)


def one_line(text) -> str:
    return " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())


def describe(settings: UpscaleSettings, files: list[dict], planned: int) -> dict:
    """The report."""
    counts = {status: sum(file["status"] == status for file in files) for status in ("done", "skipped", "failed")}
    counts["not reached"] = planned - len(files)
    return {"settings": asdict(settings), "versions": versions(), "counts": counts, "files": files}


def stop(*_):
    sys.exit(143)


def main(args: list[str]) -> dict:
    settings = parse(UpscaleSettings, __doc__, args, prog="pyrdiff upscale")
    output, work = find_work(settings)
    report_path = Path(settings.report) if settings.report else output / "report.json"
    for folder in {output, report_path.parent}:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can be written to
    pending = [target for _, _, target in work if not (settings.skip_existing and target.is_file())]
    pipeline = load(settings) if pending else None

    files, code, after_failure = [], 0, 1 if settings.keep_going else 2
    before = signal.signal(signal.SIGTERM, stop)
    try:
        for name, source, target in work:
            found = {"input": name, "output": target.relative_to(output).as_posix()}
            if settings.skip_existing and target.is_file():
                files.append({**found, "status": "skipped", "reason": "the output exists"})
                continue
            try:
                files.append({**found, **process(pipeline, name, source, target, settings)})
                print(f"{one_line(name)}: {files[-1]['seconds']} s", *files[-1]["notes"], sep="; ", flush=True)
            except (ValueError, RuntimeError, OSError, MemoryError) as error:
                files.append({**found, "status": "failed", "reason": reason(error)})
                complain(error, f"{one_line(name)}: {reason(error)}")
                code = after_failure
                if not settings.keep_going:
                    break
    except (KeyboardInterrupt, SystemExit) as stopped:
        code = getattr(stopped, "code", 130)
    finally:
        signal.signal(signal.SIGTERM, before)
        report = describe(settings, files, len(work))
        if settings.report or os.path.isdir(settings.input):
            try:
                write_json(report, report_path)
            except OSError as error:
                complain(error, f"{report_path}: {reason(error)}")
                code = code or after_failure
    return {**report, "exit_code": code}
