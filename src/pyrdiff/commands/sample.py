"""
Generate images with a model.

Example: pyrdiff sample noto-emoji -n 16 --plan fast -o samples

Image k has a generator of its own, seeded with --seed + k, so that it is the same in every batch and on every run. On a
GPU it is another than on the CPU, since the generator is where the model is. It is written as a file of that number as
soon as it is done; report.json says how they were made, and so does each file: pyrdiff sample --config 00003.png -o
again draws it again. A folder holds the images of one model and one way of sampling.

Exit code: 0 all done, 2 bad input, 130 or 143 after Ctrl-C or SIGTERM; the images that were finished by then stay.
"""

import inspect
import json
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pyrdiff.cli import announce, expect, parse
from pyrdiff.commands.paths import check_paths
from pyrdiff.commands.recipes import text_of
from pyrdiff.machine import open_device, seeded, versions
from pyrdiff.parts.files import replacing
from pyrdiff.parts.json_files import parse_json
from pyrdiff.parts.outputs import Outputs, made_by
from pyrdiff.parts.settings import did_you_mean
from pyrdiff.training.settings import parse_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

FLAGS = (
    "plan",
    "num_inference_steps",
    "refine_steps",
    "refine_strength",
    "num_passes",
    "resolutions",
    "classes",
    "guidance_scale",
    "guidance_interval",
)
OURS = ("batch_size", "generator", "output_type", "return_dict")  # arguments of the call that the command sets
RECIPE = (*FLAGS, "budget_ms", "arguments", "dtype", "revision")  # flags that decide how the image of a seed looks
IN_GRID = 64


@dataclass(kw_only=True)
class SampleSettings:
    """Flags of `pyrdiff sample`."""

    in_pictures: ClassVar[tuple[str, ...]] = ("model", "adapter", "seed", "num_images", *RECIPE)  # of --config FILE.png

    model: str
    """Exported folder, or a repository on the Hub; none of its code is run."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    adapter: tuple[str, ...] | None = None
    """Adapters that were trained over the model: folders or repositories, each perhaps with a weight, FOLDER:0.7."""
    output: str = "samples"
    """Folder for the images and report.json; nothing else, so that it can be measured as it is."""
    grid: str | None = None
    """Also draw the first 64 images as one picture, into this file."""
    num_images: int = 16
    """Images to draw."""
    batch_size: int = 8
    """Images sampled together."""
    seed: int = 0
    """Of the first image; the next one has the next number."""
    plan: str | None = None
    """A plan that the model carries, such as fast, instead of the next flags; auto is the best within --budget_ms."""
    budget_ms: float | None = None
    """Milliseconds an image may take, for --plan auto."""
    num_inference_steps: int | None = None
    """Network calls, of a pyramidal model at the lowest level."""
    refine_steps: tuple[int, ...] | None = None
    """Network calls at each higher level: one number, or one a level."""
    refine_strength: float | None = None
    """Noise that higher levels start from, (0, 1]."""
    num_passes: int | None = None
    """Network calls of a pixel-aware model."""
    resolutions: tuple[str, ...] | None = None
    """The levels, low to high, each a number or HEIGHTxWIDTH."""
    classes: tuple[str, ...] | None = None
    """What to draw, of a model that was trained with classes: names or numbers; the images take turns."""
    guidance_scale: float | None = None
    """How much more typical of their classes images become, at the cost of variety and of two network calls a step: 1
    is not at all, 1.5 to 3 is usual."""
    guidance_interval: tuple[float, float] | None = None
    """Shares of the noise process, low and high, within which there is guidance; by default everywhere."""
    arguments: str | None = None
    """Further arguments of the model's call, as a JSON object."""
    device: str | None = None
    """By default the GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the network."""
    max_megapixels: float = 64
    """The most pixels, in millions, of an image that the model or --resolutions ask for."""
    skip_existing: bool = False
    """Leave out images that are there already, made the same way; the others are the same as without."""
    overwrite: bool = False
    """Replace what lies in --output: images of other models or settings, and files that sample did not make."""

    def __post_init__(self):
        for name in ("num_images", "batch_size"):
            expect(self, name, getattr(self, name) >= 1, "1 or more")
        given = self.budget_ms is not None and self.budget_ms > 0
        expect(self, "budget_ms", given if self.plan == "auto" else self.budget_ms is None, "a time with --plan auto")
        expect(self, "grid", self.grid is None or not Path(self.grid).is_dir(), "a file to write")
        expect(self, "output", not Path(self.output).exists() or Path(self.output).is_dir(), "a folder")
        expect(self, "max_megapixels", self.max_megapixels > 0, "a number above 0")
        expect(self, "seed", 0 <= self.seed <= 2**63 - self.num_images, "0 or more, below 2**63 for the last image")
        call_arguments(self)


def call_arguments(settings: SampleSettings) -> dict:
    """
    The arguments of the pipeline's call: those of the flags that were given, and those of `--arguments`.

    Raises:
        ValueError: if `--arguments` is no JSON object, or says what a flag says; for a size that is none.
    """
    arguments = {name: getattr(settings, name) for name in FLAGS if getattr(settings, name) is not None}
    if len(arguments.get("refine_steps", ())) == 1:
        arguments["refine_steps"] = settings.refine_steps[0]
    if "resolutions" in arguments:
        sizes = arguments["resolutions"] = [parse_size(text) for text in settings.resolutions]
        expect(settings, "resolutions", None not in sizes, "sizes such as 64, or 48x64 for height x width")
    try:
        further = {} if settings.arguments is None else parse_json(settings.arguments, "--arguments")
    except ValueError:
        further = None
    expect(settings, "arguments", isinstance(further, dict), "a JSON object")
    twice = [name for name in further if name in arguments or name in OURS]
    expect(settings, "arguments", not twice, f"other arguments than {twice}, which the command sets")
    return {**arguments, **further}


def check_call(pipeline: "DiffusionPipeline", arguments: dict) -> None:
    """
    Refuses a pipeline that does not generate images from these arguments and a generator alone, as far as the signature
    of its call says.

    Args:
        pipeline: Any of diffusers.
        arguments: {argument of the call, which is a flag or a key of `--arguments`: value}.

    Raises:
        ValueError: the argument and the pipeline's class are named.
    """
    name, known = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [key for key, value in known.items() if value.default is value.empty and value.kind not in several]
    if "image" in needed:
        raise ValueError(f"--model: a {name} enlarges images; expected a model that generates (use pyrdiff upscale)")
    if "generator" not in known:
        raise ValueError(f"--model: a {name} takes no generator; expected a model that does, for --seed")
    for key in arguments:
        if key not in known:
            what = f"--{key}: not" if key in FLAGS else f"--arguments: {key!r} is not"
            accepted = [key for key in known if key not in OURS]
            raise ValueError(f"{what} for a {name}; expected some of {accepted}{did_you_mean(key, accepted)}")
    missing = [key for key in needed if key not in arguments and key not in OURS]
    if missing:
        raise ValueError(f"--model: a {name} needs {missing}; expected them in --arguments of pyrdiff sample")


def generate(
    pipeline: "DiffusionPipeline", seeds: Sequence[int], batch_size: int, arguments: dict
) -> "Iterator[Image.Image]":
    """
    One PIL image a seed, in their order. Each has its own generator, whatever the batch. A pipeline whose call takes no
    `batch_size` makes one image a call. Of several `classes`, seed k takes number k, then again the first.
    """
    classes = classes_of(arguments)
    batched = "batch_size" in inspect.signature(pipeline.__call__).parameters
    step = batch_size if batched else 1
    for start in range(0, len(seeds), step):
        generators = seeded(seeds[start : start + step], pipeline.device)
        count = {"batch_size": len(generators)} if batched else {}
        told = {"classes": [classes[seed % len(classes)] for seed in seeds[start : start + step]]} if classes else {}
        images = pipeline(**count, generator=generators, **{**arguments, **told}).images
        if len(images) != len(generators):
            raise ValueError(f"{type(pipeline).__name__} gave {len(images)} images: expected {len(generators)}")
        yield from images


def classes_of(arguments: dict) -> list:
    """The classes that images take turns in; none if the call is not told any."""
    classes = arguments.get("classes")
    several = isinstance(classes, (list, tuple))
    return list(classes) if several else [] if classes is None else [classes]


def classes_for(pipeline: "DiffusionPipeline", numbers: Sequence[int]) -> dict[str, list[str]]:
    """
    The argument `classes` for images that are to be compared with real ones: each class as often as in training. Empty
    for a model without classes.
    """
    from pyrdiff.parts.labels import spread_classes
    from pyrdiff.parts.wrappers import plain

    network = getattr(pipeline, "unet", None)
    if network is None or "classes" not in inspect.signature(pipeline.__call__).parameters:
        return {}
    told = spread_classes(plain(network).config, pipeline.config.get("colors"), numbers)
    return {} if told is None else {"classes": told}


def check_classes(pipeline: "DiffusionPipeline", arguments: dict) -> None:
    """Refuses classes that the model does not have."""
    from pyrdiff.parts.labels import label_numbers
    from pyrdiff.parts.wrappers import plain

    classes = classes_of(arguments)
    if classes:
        label_numbers(classes, len(classes), plain(pipeline.unet).config)


def load(settings: SampleSettings, arguments: dict) -> "DiffusionPipeline":
    """The pipeline, checked and on the device."""
    import torch

    import pyrdiff
    from pyrdiff import hub
    from pyrdiff.hub.loading import check_megapixels

    check_megapixels("the call", arguments, settings.max_megapixels)
    device = open_device(settings.device)
    pipeline = pyrdiff.load(
        settings.model,
        revision=settings.revision,
        dtype=getattr(torch, settings.dtype),
        max_megapixels=settings.max_megapixels,
        adapters=hub.parse_adapters(settings.adapter or ()),
    )
    if settings.adapter:
        hub.merge_adapters(pipeline)  # as quick as without
    check_call(pipeline, arguments)
    check_classes(pipeline, arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def find_plan(pipeline: "DiffusionPipeline", settings: SampleSettings) -> str:
    """The plan that `--plan auto` stands for. Raises ValueError for a model without plans, or if none fits."""
    from pyrdiff.plan import auto_plan

    plans = getattr(pipeline.config, "plans", None)
    if not plans or not hasattr(pipeline, "plan"):
        raise ValueError(f"--plan: auto with a {type(pipeline).__name__} that carries no plans; expected one that does")
    name = auto_plan(pipeline, settings.budget_ms, settings.batch_size, settings.model)
    print(f"plan {name}: {plans[name]}", flush=True)
    return name


def print_plan(pipeline: "DiffusionPipeline", arguments: dict) -> None:
    """What an image will cost, if the pipeline can say. Raises ValueError for arguments that it refuses."""
    if hasattr(pipeline, "plan"):
        known = inspect.signature(pipeline.plan).parameters
        plan = pipeline.plan(**{name: value for name, value in arguments.items() if name in known})
        guided = any(getattr(level, "guided", 0) for level in plan.levels) if hasattr(plan, "levels") else False
        if guided and not classes_of(arguments) and getattr(pipeline, "guide", None) is None:
            raise ValueError("guidance without --classes: expected both, since it draws images towards their classes")
        print(plan, flush=True)


def write_grid(paths: list[Path], target: Path, outputs: Outputs) -> None:
    """The images of these files in rows, in one picture."""
    from PIL import Image

    from pyrdiff.training.previews import image_grid

    images = [Image.open(path) for path in paths]
    columns = math.ceil(math.sqrt(len(images)))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    with outputs.replacing(target) as beside:
        image_grid(rows).save(beside, "PNG")


def write_json(report: dict, target: Path, outputs: Outputs | None = None) -> None:
    """Writes a report, whole or not at all."""
    with (replacing if outputs is None else outputs.replacing)(target) as beside:
        beside.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def recipe(settings: SampleSettings) -> dict:
    """What decides how the image of a seed looks: the model as it is now, and the flags of the call."""
    return {
        **model_as_it_is(settings.model),
        **adapters_as_they_are(settings.adapter),
        **{flag: getattr(settings, flag) for flag in RECIPE},
    }


def model_as_it_is(name: str) -> dict:
    """The model of a flag, and the state of its files where they are here."""
    model = Path(name)
    endings = (".safetensors", ".bin", "_config.json", "model_index.json")
    found = [path for path in sorted(model.rglob("*")) if path.name.endswith(endings)] if model.is_dir() else []
    stats = {path.relative_to(model).as_posix(): path.stat() for path in found}
    parts = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return {"model": str(model.resolve()) if parts else name, "parts": parts}


def adapters_as_they_are(adapters: Sequence[str] | None) -> dict:
    """The adapters of a flag, their weights, and the state of their files; nothing if there are none."""
    if not adapters:
        return {}
    from pyrdiff.hub import parse_adapters

    return {"adapters": [[model_as_it_is(place), weight] for place, weight in parse_adapters(adapters).items()]}


def drawn_by(settings: SampleSettings, arguments: dict, seed: int) -> dict:
    """The flags that draw one image: the plan that was found for `--plan auto`, and the class that it has."""
    flags = {flag: getattr(settings, flag) for flag in RECIPE}
    if settings.plan == "auto":
        flags |= {"plan": arguments["plan"], "budget_ms": None}
    if settings.classes:
        flags["classes"] = [settings.classes[seed % len(settings.classes)]]
    return {"model": settings.model, "adapter": settings.adapter, "seed": seed, "num_images": 1, **flags}


def refuse_mixing(paths: list[Path], outputs: Outputs) -> list[Path]:
    """
    Refuses a folder of other images, since images of one kind are measured together.

    Args:
        paths: The images that are to be there in the end, in one folder.
        outputs: Those of the run.

    Returns:
        With `--overwrite`: the images of other runs, which are to go.

    Raises:
        ValueError: if other images are in the folder, and `--overwrite` was not given.
    """
    from pyrdiff.data.images import extensions

    outputs.check(paths, "output")
    folder, known = paths[0].parent, set(paths)
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    images = [path for path in there if path.suffix.lower() in extensions() and not path.name.startswith(".")]
    others = [path for path in images if path not in known and not outputs.has(path)]
    if others and not outputs.overwrite:
        raise ValueError(
            f"--output={str(folder)!r}: holds {len(others)} images of other models, settings or origin, such as "
            f"{others[0].name}; expected a folder of its own, or --overwrite"
        )
    return [path for path in others if (made_by(path) or "").startswith("sample ")]


def main(args: list[str]) -> dict:
    settings = parse(SampleSettings, __doc__, args, prog="pyrdiff sample")
    check_paths(settings, models=["model"], written=["grid"])
    plan = f", plan {settings.plan}" if settings.plan else ""
    announce(
        f"{settings.num_images} images of {settings.model}{plan} into {settings.output} (Ctrl-C keeps the finished)"
    )
    from tqdm import tqdm

    folder, arguments = Path(settings.output), call_arguments(settings)
    paths = {seed: folder / f"{seed:05d}.png" for seed in range(settings.seed, settings.seed + settings.num_images)}
    outputs = Outputs("sample", recipe(settings), settings.overwrite)
    reports = Outputs("sample report", {}, settings.overwrite)  # of all runs alike: each has its own settings in it
    of_others = refuse_mixing(list(paths.values()), outputs)
    reports.check([folder / "report.json"], "output")
    reports.check([settings.grid] if settings.grid is not None else [], "grid")
    skipped = [seed for seed, path in paths.items() if settings.skip_existing and outputs.has(path)]
    seeds = [seed for seed in paths if seed not in set(skipped)]
    pipeline = load(settings, arguments) if seeds else None
    if pipeline:
        print(f"{len(seeds)} images with {type(pipeline).__name__} on {pipeline.device}, {settings.dtype}", flush=True)
        if settings.plan == "auto":
            arguments["plan"] = find_plan(pipeline, settings)
        print_plan(pipeline, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    for path in of_others:
        path.unlink()

    done, code, began = [], 0, time.perf_counter()
    images = generate(pipeline, seeds, settings.batch_size, arguments) if pipeline else ()
    try:
        for seed, image in tqdm(
            zip(seeds, images, strict=True), total=len(seeds), unit="image", disable=None if seeds else True
        ):
            with outputs.replacing(paths[seed]) as beside:
                image.save(beside, "PNG", pnginfo=text_of(drawn_by(settings, arguments, seed)))
            done.append(seed)
    except (KeyboardInterrupt, SystemExit) as stopped:  # Ctrl-C and SIGTERM
        code = getattr(stopped, "code", 130)
    seconds = time.perf_counter() - began

    status = dict.fromkeys(skipped, "skipped") | dict.fromkeys(done, "done")
    classes = classes_of(arguments)
    files = [
        {"file": paths[seed].name, "seed": seed, "status": status[seed]}
        | ({"class": classes[seed % len(classes)]} if classes else {})
        for seed in sorted(status)
    ]
    report = {
        "settings": asdict(settings),
        "model": {"name": settings.model, "pipeline": pipeline and type(pipeline).__name__},
        "device": pipeline and str(pipeline.device),
        "seconds": round(seconds, 3),
        "ms_per_image": round(1000 * seconds / len(done), 3) if done else None,
        "versions": versions(),
        "counts": {"done": len(done), "skipped": len(skipped), "not reached": len(seeds) - len(done)},
        "files": files,
    }
    write_json(report, folder / "report.json", reports)
    if files and settings.grid is not None:
        write_grid([folder / file["file"] for file in files[:IN_GRID]], Path(settings.grid), reports)
    counts = ", ".join(f"{count} {name}" for name, count in report["counts"].items())
    print(f"{counts}, in {seconds:.1f} s: {folder}")
    if done and code == 0:
        print(f"again: pyrdiff sample --config {shlex.quote(str(paths[done[0]]))} -o again")
    return {**report, "exit_code": code}
