"""
Measure generated or enlarged images, in one table and one JSON that says how.

Example: pyrdiff evaluate runs/mine/pipeline -n 500 --reference my_test_images -o scores.json

A set of images is compared with a set of real ones (--generated or a model, and --reference), or with --paired each
image with the one of its name. Images are compared at the size that the generated ones have, to which the reference is
fitted, or at --resolution; pairs must have one size.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pyrdiff.cli import announce, expect, parse
from pyrdiff.commands.paths import check_paths
from pyrdiff.commands.sample import check_call, classes_for, generate, write_json
from pyrdiff.machine import open_device, versions

if TYPE_CHECKING:
    import torch

    from pyrdiff.data import ImageSource
    from pyrdiff.data.labels import Labels
    from pyrdiff.metrics import MetricResult, Score

SetMetric = Literal["frechet_distance", "kid", "precision_recall"]  # as pyrdiff.metrics, without importing torch
PairMetric = Literal["psnr", "ssim", "lpips", "consistency"]
SETS, PAIRS = get_args(SetMetric), get_args(PairMetric)
PLAN = ("plan", "num_inference_steps", "refine_steps", "refine_strength", "num_passes")
UNIT = (0, 1)  # the range of images here


@dataclass(kw_only=True)
class EvaluateSettings:
    """Flags of `pyrdiff evaluate`."""

    generated: str | None = None
    """Folder, .npy or .npz of images to measure."""
    model: str | None = None
    """Instead: an exported pipeline, or a repository on the Hub, to sample."""
    reference: str
    """Folder, .npy or .npz of real images; best held out."""
    array_key: str | None = None
    """Array of an .npz reference."""
    paired: bool = False
    """Compare images of the same name, one by one."""
    low_res: str | None = None
    """Folder of the inputs, for consistency."""
    metrics: tuple[SetMetric | PairMetric, ...] | None = None
    """By default those that need no weights of their own: the first three, or psnr and ssim with --paired."""
    features: str = "inception"
    """squeezenet, alexnet, inception, dinov2 or classifier."""
    weights: str | None = None
    """File of the feature network; by default downloaded."""
    lpips_network: Literal["alex", "squeeze", "vgg"] = "alex"
    """Trunk of LPIPS."""
    lpips_weights: str | None = None
    """File of its trunk; by default downloaded."""
    resolution: tuple[int, ...] | None = None
    """Side, or height and width, to fit all images to; by default the reference is fitted to the others' size."""
    channels: Literal["rgb", "y"] = "rgb"
    """For PSNR and SSIM."""
    crop_border: int = 0
    """For PSNR and SSIM, pixels at each side."""
    num_images: int = 100
    """To sample from the model. Of a model with classes each is drawn as often as it was in training."""
    per_class: bool = False
    """Also compare the images of each class: --reference and --generated have sub-folders for them, or are an .npz with
    labels."""
    plan: str | None = None
    """A plan that the model carries, such as fast, instead of the next flags."""
    num_inference_steps: int | None = None
    """Network calls at the lowest level."""
    refine_steps: int | None = None
    """Network calls at each higher level."""
    refine_strength: float | None = None
    """Noise that higher levels start from, (0, 1]."""
    num_passes: int | None = None
    """Network calls of a pixel-aware model."""
    resamples: int = 100
    """For the 95 % intervals; 0 for none."""
    batch_size: int = 16
    """Images sampled, or measured, together."""
    seed: int = 0
    """Image k has the seed SEED + k."""
    device: str | None = None
    """By default the GPU if there is one."""
    output: str | None = None
    """JSON to write."""

    def __post_init__(self):
        if self.metrics is None:
            self.metrics = ("psnr", "ssim") if self.paired else SETS
        accepted = PAIRS if self.paired else SETS
        mode = "with --paired" if self.paired else "without --paired"
        expect(self, "metrics", set(self.metrics) <= set(accepted), f"some of {list(accepted)} {mode}")
        expect(self, "model", (self.generated is None) != (self.model is None), "either it or --generated")
        expect(self, "model", not self.paired or self.model is None, "--generated instead, with --paired")
        given = self.low_res is not None
        expect(
            self, "low_res", given == ("consistency" in self.metrics), "the inputs' folder if --metrics has consistency"
        )
        check_resolution(self)
        for name in ("num_images", "batch_size"):
            expect(self, name, getattr(self, name) >= 1, "1 or more")
        expect(self, "per_class", not (self.per_class and self.paired), "no --paired beside it")
        expect(self, "resamples", self.resamples == 0 or self.resamples >= 2, "0, or 2 or more")
        expect(self, "output", self.output is None or not Path(self.output).is_dir(), "a file to write")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) that images are fitted to."""
        return (self.resolution[0], self.resolution[-1]) if self.resolution else None


def check_resolution(settings: object) -> None:
    """Raises `ValueError` unless `--resolution` is none, a side, or a height and a width."""
    sides = settings.resolution
    good = sides is None or (len(sides) in (1, 2) and min(sides) >= 1)
    expect(settings, "resolution", good, "one or two sides of 1 or more")


def stems(source: "ImageSource", folder: str) -> dict[str, int]:
    """Index of each image by its path below the folder, without the suffix."""
    indices = {}
    for index, name in enumerate(source.names):
        stem = Path(name).relative_to(folder).with_suffix("").as_posix()
        if stem in indices:
            raise ValueError(f"{folder}: has two images called {stem!r}; expected one of each name with --paired")
        indices[stem] = index
    return indices


def compare_pairs(settings: EvaluateSettings, device: "torch.device") -> "list[Score]":
    """Each image with the one of its name."""
    import torch
    from tqdm import tqdm

    from pyrdiff import metrics
    from pyrdiff.data import image_tensor, read_image

    sources, names = open_pairs(settings)
    lpips = dict(network=settings.lpips_network, weights=settings.lpips_weights, data_range=UNIT)
    if "lpips" in settings.metrics:  # fails before any work if its weights are missing
        probe = torch.zeros(1, 3, 64, 64, device=device)
        metrics.lpips(probe, probe, **lpips)

    def read(kind: int, stem: str, size: tuple[int, int] | None) -> torch.Tensor:
        return image_tensor([read_image(sources[kind], names[kind][stem], 3, size)]).to(device)

    results: dict[str, list[MetricResult]] = {name: [] for name in settings.metrics}
    for stem in tqdm(names[0], desc="comparing", unit="pair", disable=None):
        ours, theirs = (read(kind, stem, settings.size) for kind in (0, 1))
        for name, kept in results.items():
            if name == "lpips":
                kept.append(metrics.lpips(ours, theirs, **lpips))
            elif name == "consistency":
                kept.append(metrics.consistency(ours, read(2, stem, None), data_range=UNIT))
            else:
                arguments = dict(channels=settings.channels, crop_border=settings.crop_border, data_range=UNIT)
                kept.append(getattr(metrics, name)(ours, theirs, **arguments))
    return [
        metrics.score_of_mean(metrics.combine(kept), settings.resamples, name in ("psnr", "ssim"))
        for name, kept in results.items()
    ]


def open_pairs(settings: EvaluateSettings) -> "tuple[list[ImageSource], list[dict[str, int]]]":
    """
    The generated, the real and perhaps the small images, and for each the index by name.

    Raises:
        ValueError: if a name is missing in one of them, or sizes differ; every image is decoded for that.
    """
    from pyrdiff.data import open_source, sizes_of

    folders = [settings.generated, settings.reference, *([settings.low_res] if settings.low_res else [])]
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder!r} is no folder: expected folders of images with --paired")
    sources = [open_source(Path(folder)) for folder in folders]
    names = [stems(source, folder) for source, folder in zip(sources, folders, strict=True)]
    for folder, known in zip(folders, names, strict=True):
        odd = sorted(set(known) ^ set(names[0]))
        if odd:
            raise ValueError(f"{folders[0]}, {folder}: {len(odd)} names are in one only, such as {odd[0]!r}")
    sizes = [sizes_of(source, progress="reading") for source in sources]
    for stem, index in names[0].items():
        ours, theirs = sizes[0][index], sizes[1][names[1][stem]]
        if ours != theirs and not settings.resolution:
            raise ValueError(f"{stem}: has sizes {ours} and {theirs}; expected equal ones, or --resolution")
    return sources, names


def sample(settings: EvaluateSettings, reference: "ImageSource", device: "torch.device") -> "ImageSource":
    """Images of the model as a source, with their classes. Image k has the seed `--seed` + k, whatever the batch."""
    import numpy as np
    from tqdm import tqdm

    import pyrdiff
    from pyrdiff.data.labels import Labels
    from pyrdiff.data.sources import ArrayImages

    pipeline = pyrdiff.load(settings.model).to(device)
    plan = {name: getattr(settings, name) for name in PLAN if getattr(settings, name) is not None}
    check_call(pipeline, plan)
    pipeline.set_progress_bar_config(disable=True)
    seeds = range(settings.seed, settings.seed + settings.num_images)
    plan |= classes_for(pipeline, seeds)
    told = plan.get("classes")  # of seed k the one at k modulo their number, as `generate` takes them
    labels = None if told is None else Labels.of(np.array([told[seed % len(told)] for seed in seeds]))
    if settings.per_class:
        if labels is None:
            raise ValueError(f"--per_class: {settings.model!r} was trained without classes; expected a model with some")
        members(labels, reference.labels)
    images = generate(pipeline, seeds, settings.batch_size, plan)
    images = tqdm(images, total=len(seeds), desc="sampling", unit="image", disable=None)
    return ArrayImages(np.stack([np.asarray(image) for image in images]), labels=labels)


def compare_sets(settings: EvaluateSettings, device: "torch.device") -> "list[Score]":
    """A set of generated images with a set of real ones."""
    import torch
    from tqdm import tqdm

    from pyrdiff import metrics
    from pyrdiff.data import image_tensor, open_source, read_image

    network = metrics.open_features(settings.features, settings.weights, device=device, batch_size=settings.batch_size)
    known = dict(class_labels=settings.per_class)
    reference = open_source(Path(settings.reference), array_key=settings.array_key, **known)
    generated = None if settings.model else open_source(Path(settings.generated), **known)
    counts = {"--reference": len(reference), "--generated": len(generated) if generated else settings.num_images}
    for flag, count in counts.items():
        if count < 4:
            raise ValueError(f"{flag}: has {count} images; expected 4 or more")
    if generated is None:
        generated = sample(settings, reference, device)
    settings.resolution = settings.resolution or fitting(generated, reference)

    def features(source: "ImageSource", title: str) -> torch.Tensor:
        batches, starts = [], range(0, len(source), settings.batch_size)
        for start in tqdm(starts, desc=title, unit="batch", disable=None):
            indices = range(start, min(start + settings.batch_size, len(source)))
            images = [read_image(source, index, network.channels, settings.size) for index in indices]
            batches.append(network(image_tensor(images, network.channels), data_range=UNIT))
        return torch.cat(batches)

    ours, theirs = members(generated.labels, reference.labels) if settings.per_class else ({}, {})
    real, fake = features(reference, "the reference"), features(generated, "generated")
    scores = metrics.SetComparison(real, network, settings.resamples).scores(fake, settings.metrics)
    for name, chosen in theirs.items():
        comparison = metrics.SetComparison(real[chosen], network, settings.resamples)
        for score in comparison.scores(fake[ours[name]], settings.metrics):
            scores.append(score._replace(result=replace(score.result, name=f"{score.result.name}, {name}")))
    return scores


def members(generated: "Labels", reference: "Labels") -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """
    {class: numbers of its images} of two sets.

    Raises:
        ValueError: unless they have the same classes, each with 4 images or more in both.
    """
    found = [
        {name: (labels.numbers == index).nonzero()[0].tolist() for index, name in enumerate(labels.names)}
        for labels in (generated, reference)
    ]
    odd = sorted(set(found[0]) ^ set(found[1]))
    if odd:
        where = "generated" if odd[0] in found[0] else "real"
        raise ValueError(f"--per_class: only the {where} images have the class {odd[0]!r}; expected the same classes")
    for images, flag in zip(found, ("--num_images or --generated", "--reference"), strict=True):
        few = min(images, key=lambda name: len(images[name]))
        if len(images[few]) < 4:
            raise ValueError(f"--per_class: {few!r} has {len(images[few])} images in {flag}; expected 4 or more")
    return found[0], found[1]


def fitting(generated: "ImageSource", reference: "ImageSource") -> tuple[int, int] | None:
    """(height, width) of the generated images if the reference is to be fitted to it; None if it has this size."""
    from pyrdiff.data import sizes_of

    sizes = set(sizes_of(generated, progress="reading"))
    if len(sizes) > 1:
        raise ValueError(f"--generated: has sizes {sorted(sizes)[:4]}; expected one, or --resolution")
    if set(sizes_of(reference, progress="reading the reference")) == sizes:
        return None
    (size,) = sizes
    print("the reference is fitted to the {}x{} of the images".format(*size), flush=True)
    return size


def table(results: Sequence[dict]) -> str:
    """The results, a line each."""
    rows = [("metric", "value", "95 % interval", "images", "reference images")]
    for result in results:
        between = "-" if result["interval"] is None else "{:.5g} to {:.5g}".format(*result["interval"])
        conventions = result["conventions"]
        counts = conventions["count"], conventions.get("count_real", conventions["count"])
        rows.append((result["name"], f"{float(result['value']):.5g}", between, *map(str, counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def main(args: list[str]) -> dict:
    settings = parse(EvaluateSettings, __doc__, args, prog="pyrdiff evaluate")
    images, files = ["generated", "reference", "low_res"], ["weights", "lpips_weights"]
    check_paths(settings, models=["model"], images=images, files=files, written=["output"])
    measured = f"{settings.num_images} images of {settings.model}" if settings.model else settings.generated
    announce(f"{', '.join(settings.metrics)} of {measured} beside {settings.reference}")
    device = open_device(settings.device)
    scores = compare_pairs(settings, device) if settings.paired else compare_sets(settings, device)

    results = []
    for result, interval, _ in scores:
        value = result.value if math.isfinite(result.value) else str(result.value)  # JSON has no infinity
        interval = None if interval is None else list(interval)
        results.append({"name": result.name, "value": value, "interval": interval, "conventions": result.conventions})
    resize = "fitted to settings' resolution: cut to its aspect, bicubic, antialiased" if settings.resolution else None
    report = {
        "settings": asdict(settings),
        "images": {"bits": 8, "data_range": UNIT, "resize": resize},
        "interval": "95 %, bootstrap over the generated images, for the figure at this count",
        "versions": versions(),
        "results": results,
    }
    print(table(results))
    if settings.output:
        write_json(report, Path(settings.output))
        print(f"scores, and how they were made: {settings.output}")
    return report
