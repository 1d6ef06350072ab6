"""
Enlarge a picture, or a folder with the folders below it, by a model that pyrdiff exported:

    python examples/upscale.py --model runs/mine/pipeline --input photos --output larger --outscale 4 --keep_going

Each result keeps the alpha channel (enlarged bicubically), EXIF, ICC profile and DPI of its file, and what could not be
kept is in the report. Files are written beside, read back and renamed, so that none is ever half written. JPEG and WebP
have quality 95. The seed of a picture depends on --seed and on its path below --input only.

Exit code: 0 all done, 1 some failed and the others are done (--keep_going), 2 bad arguments, nothing to do or stopped
at the first failure, 130 or 143 after Ctrl-C or SIGTERM. Each failure is one line on stderr.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

GUIDED, TRAINED = ("guidance", "operator", "refine_steps"), ("plan", "num_inference_steps", "color_fix")  # flags
OPERATORS = ("bicubic", "bicubic_matlab", "area", "lanczos", "gaussian")
EXTENSIONS = ("auto", "png", "jpg", "webp", "tif")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported folder, or a repository on the Hub; none of its code")
    parser.add_argument("--input", required=True, help="file or folder")
    parser.add_argument("--output", required=True, help="folder that mirrors --input; for one file also a file")
    parser.add_argument("--outscale", type=float, default=4, help="1 or more; sides must come out whole (4)")
    parser.add_argument("--tile", type=int, help="side of the network's windows on the output, to save memory")
    parser.add_argument("--tile_pad", type=int, help="pixels that they overlap by; by default a quarter of --tile")
    parser.add_argument("--suffix", default="", help="added to the name of each file, such as _x4")
    parser.add_argument("--ext", default="auto", choices=EXTENSIONS, help="auto: as the input")
    parser.add_argument("--skip_existing", action="store_true", help="leave out what has its result already")
    parser.add_argument("--keep_going", action="store_true", help="go on after a failure")
    guided = parser.add_argument_group("models trained to generate (train_pddpm.py)")
    guided.add_argument("--guidance", choices=("projection", "gradient", "none"), help="by default projection")
    guided.add_argument("--operator", choices=OPERATORS, help="how the input was made smaller; by default bicubic")
    guided.add_argument("--refine_steps", type=int, help="network calls at each level; by default 8")
    trained = parser.add_argument_group("models trained to enlarge (train_sr.py)")
    trained.add_argument("--plan", help="network calls by name: fast, balanced, default (the default), paper ...")
    trained.add_argument("--num_inference_steps", type=int, help="network calls, instead of a plan")
    trained.add_argument("--color_fix", action="store_true", help="give each channel the input's mean")
    parser.add_argument("--hard_consistency", action="store_true", help="made smaller, the output gives the input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="by default the GPU if there is one")
    parser.add_argument("--report", help="JSON to write; by default report.json in --output, for a folder")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """What can be said about the flags and paths alone."""
    if not math.isfinite(options.outscale) or options.outscale < 1:
        raise ValueError(f"--outscale: got {options.outscale}; accepted is 1 or more")
    if options.tile is not None and options.tile < 1:
        raise ValueError(f"--tile: got {options.tile}; accepted is 1 or more")
    if options.tile_pad is not None and not (options.tile and 0 < options.tile_pad < options.tile):
        raise ValueError(f"--tile_pad: got {options.tile_pad}; accepted with --tile is 1 or more, less than --tile")
    for name in ("refine_steps", "num_inference_steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name}: got {getattr(options, name)}; accepted is 1 or more")
    if options.plan and options.num_inference_steps:
        raise ValueError(
            f"--num_inference_steps: got {options.num_inference_steps} with --plan; accepted is one of them"
        )
    if set(options.suffix) & {"/", os.sep, "\0"}:
        raise ValueError(f"--suffix: got {options.suffix!r}; accepted is a part of a file name")
    if not os.path.exists(options.input):
        raise ValueError(f"--input: {options.input!r} does not exist; accepted is a file or a folder")
    if os.path.isdir(options.input) and os.path.isfile(options.output):
        raise ValueError(f"--output: got the file {options.output!r}; accepted for a folder is a folder")
    if options.report and os.path.isdir(options.report):
        raise ValueError(f"--report: got the folder {options.report!r}; accepted is a file to write")


def find_work(options: argparse.Namespace) -> tuple[Path, list[tuple[str, Path, Path]]]:
    """The folder of the results, and for each picture its path below --input, its file and the file to write."""
    from pyrdiff.data import list_images
    from pyrdiff.data.files import WRITTEN

    folder, output = Path(options.input), Path(options.output)
    if folder.is_dir():
        sources = list_images(folder)
        if output.resolve() != folder.resolve() and output.resolve().is_relative_to(folder.resolve()):
            sources = [path for path in sources if not path.resolve().is_relative_to(output.resolve())]
    else:
        folder, sources = folder.parent, [folder]

    if os.path.isfile(options.input) and output.suffix.lower() in WRITTEN and not output.is_dir():
        if options.suffix or options.ext != "auto":
            raise ValueError(f"--output: got the file {options.output!r} with --suffix or --ext; accepted is a folder")
        targets, output = [output], output.parent
    else:
        ends = [path.suffix if options.ext == "auto" else f".{options.ext}" for path in sources]
        named = [path.with_name(path.stem + options.suffix + end) for path, end in zip(sources, ends, strict=True)]
        targets = [output / path.relative_to(folder) for path in named]
    names = [path.relative_to(folder).as_posix() for path in sources]
    work = list(zip(names, sources, targets, strict=True))

    # No picture of the user's is ever replaced, and none is a result of another one.
    inputs = {os.path.realpath(source): name for name, source, _ in work}
    earlier = {os.path.realpath(target) for _, source, target in work if not same_file(source, target)}
    if options.skip_existing:
        work = [item for item in work if os.path.realpath(item[1]) not in earlier]
    made = {}
    for name, _, target in work:
        place = os.path.realpath(target)
        if place in made:
            raise ValueError(f"--output: {made[place]} and {name} would both be {target}; accepted is --ext auto")
        if place in inputs and not (options.skip_existing and place in earlier):
            raise ValueError(
                f"--output: {name} would replace the input {inputs[place]}; accepted is another folder or --suffix"
            )
        made[place] = name
    if not work:
        raise ValueError(f"--input: {options.input!r} has nothing to enlarge; accepted is a folder of images")
    return output, work


def same_file(source: Path, target: Path) -> bool:
    return os.path.realpath(source) == os.path.realpath(target)


def load(options: argparse.Namespace):
    """The pipeline, on the device; of a model that was trained to generate, the one that guides it."""
    import torch
    from diffusers.utils import logging

    import pyrdiff

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: got {options.device!r}: {one_line(error)}") from error
    logging.disable_progress_bar()
    pipeline = pyrdiff.load(options.model)
    trained = isinstance(pipeline, pyrdiff.ResidualSRPipeline)
    if not trained:
        pipeline = pyrdiff.GuidedSRPipeline(pipeline.unet, pipeline.scheduler)
    for name in GUIDED if trained else TRAINED:
        if getattr(options, name):
            kind = "enlarge (train_sr.py)" if trained else "generate (train_pddpm.py)"
            raise ValueError(
                f"--{name}: got {getattr(options, name)!r}; accepted is nothing for a model trained to {kind}"
            )
    if trained:
        factors = pipeline.unet.config.scale_factors
        if options.outscale not in (factors or [round(options.outscale)]):
            accepted = f"one of {list(factors)}" if factors else "a whole number"
            raise ValueError(f"--outscale: got {options.outscale:g}; accepted for this model is {accepted}")
        pipeline.cost(64, int(options.outscale), options.num_inference_steps, plan=options.plan)  # checks the plan
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    channels = pipeline.unet.config.in_channels
    if channels not in (1, 3):
        raise ValueError(f"--model: {options.model!r} has {channels} channels; accepted are 1 (gray) and 3 (RGB)")
    return pipeline


def enlarge(pipeline, picture, seed: int, options: argparse.Namespace):
    """The enlarged picture, and how far it is from the input when it is made smaller again (in [0, 1])."""
    import torch
    from PIL import Image

    import pyrdiff

    gray, channels = picture.color.mode == "L", pipeline.unet.config.in_channels
    if channels == 1 and not gray:
        raise ValueError("a colour image: expected a gray one, for this model of one channel")
    trained = isinstance(pipeline, pyrdiff.ResidualSRPipeline)
    given = {name: getattr(options, name) for name in (TRAINED if trained else GUIDED) if getattr(options, name)}
    output = pipeline(
        picture.color if channels == 1 else picture.color.convert("RGB"),
        scale_factor=int(options.outscale) if trained else options.outscale,
        **given,
        hard_consistency=options.hard_consistency,
        tile=options.tile,
        tile_overlap=options.tile_pad,
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


def process(pipeline, name: str, source: Path, target: Path, options: argparse.Namespace) -> dict:
    """Enlarges one file; what the report says of it."""
    from pyrdiff.data import check_saving, open_picture, save_picture, seed_of

    began = time.perf_counter()
    path_number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big")
    seed = seed_of(options.seed, path_number)
    picture = open_picture(source)
    check_saving(picture, target, *(round(side * options.outscale) for side in picture.color.size))
    enlarged, consistency = enlarge(pipeline, picture, seed, options)
    notes = save_picture(enlarged, target)
    sizes = {"input_size": picture.color.size, "output_size": enlarged.color.size}  # (width, height)
    seconds = round(time.perf_counter() - began, 3)
    return {"status": "done", **sizes, "seconds": seconds, "seed": seed, "consistency": consistency, "notes": notes}


def reason(error: Exception) -> str:
    text = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return one_line(text)


def one_line(text) -> str:
    return " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())


def write_report(path: Path, options: argparse.Namespace, files: list[dict], planned: int) -> None:
    from pyrdiff.data import replacing

    counts = {status: sum(file["status"] == status for file in files) for status in ("done", "skipped", "failed")}
    counts["not reached"] = planned - len(files)
    packages = ("pyrdiff", "torch", "diffusers", "pillow", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    report = {"settings": vars(options), "versions": versions, "counts": counts, "files": files}
    with replacing(path) as beside:
        beside.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def stop(*_):
    sys.exit(143)


def main() -> None:
    options = arguments()
    try:
        check(options)
        output, work = find_work(options)
        report = Path(options.report) if options.report else output / "report.json"
        for folder in {output, report.parent}:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # can be written to
        pending = [target for _, _, target in work if not (options.skip_existing and target.is_file())]
        pipeline = load(options) if pending else None
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)

    signal.signal(signal.SIGTERM, stop)
    files, code, after_failure = [], 0, 1 if options.keep_going else 2
    try:
        for name, source, target in work:
            found = {"input": name, "output": target.relative_to(output).as_posix()}
            if options.skip_existing and target.is_file():
                files.append({**found, "status": "skipped", "reason": "the output exists"})
                continue
            try:
                files.append({**found, **process(pipeline, name, source, target, options)})
                print(f"{one_line(name)}: {files[-1]['seconds']} s", *files[-1]["notes"], sep="; ", flush=True)
            except (ValueError, RuntimeError, OSError, MemoryError) as error:
                files.append({**found, "status": "failed", "reason": reason(error)})
                print(f"error: {one_line(name)}: {reason(error)}", file=sys.stderr, flush=True)
                code = after_failure
                if not options.keep_going:
                    break
    except KeyboardInterrupt:
        code = 130
    finally:
        if options.report or os.path.isdir(options.input):
            try:
                write_report(report, options, files, len(work))
            except OSError as error:
                print(f"error: {report}: {reason(error)}", file=sys.stderr)
                code = code or after_failure
    sys.exit(code)


if __name__ == "__main__":
    main()
