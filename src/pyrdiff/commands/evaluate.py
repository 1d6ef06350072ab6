"""
Measure generated or enlarged images, in one table and one JSON that says how.

A set of images is compared with a set of real ones (--generated or --model, and --reference), or with --paired each
image with the one of its name. Images are compared at the size they have; where sizes differ, --resolution says what to
fit them to.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from pyrdiff.cli import parse
from pyrdiff.commands.sample import check_call, generate, open_device, write_json
from pyrdiff.machine import versions

SetMetric = Literal["frechet_distance", "kid", "precision_recall"]
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
    lpips_weights: str | None = None
    """File of its trunk; by default downloaded."""
    resolution: tuple[int, ...] | None = None
    """Side, or height and width, to fit all images to."""
    channels: Literal["rgb", "y"] = "rgb"
    """For PSNR and SSIM."""
    crop_border: int = 0
    """For PSNR and SSIM, pixels at each side."""
    num_images: int = 100
    """To sample from --model."""
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
    seed: int = 0
    device: str | None = None
    """By default the GPU if there is one."""
    output: str | None = None
    """JSON to write."""

    def __post_init__(self):
        if self.metrics is None:
            self.metrics = ("psnr", "ssim") if self.paired else SETS
        accepted = PAIRS if self.paired else SETS
        wrong = [name for name in self.metrics if name not in accepted]
        if wrong:
            mode = "with --paired" if self.paired else "without --paired"
            raise ValueError(f"--metrics: got {wrong} {mode}; accepted are {list(accepted)}")
        if (self.generated is None) == (self.model is None):
            raise ValueError("--generated, --model: got both or none; accepted is one of them")
        if self.paired and self.model is not None:
            raise ValueError("--model: got one with --paired; accepted there is --generated")
        if ("consistency" in self.metrics) != (self.low_res is not None):
            raise ValueError(
                "--low_res: accepted is the folder of the inputs, with --metrics consistency and only there"
            )
        if self.resolution and (len(self.resolution) > 2 or min(self.resolution) < 1):
            raise ValueError(f"--resolution: got {list(self.resolution)}; accepted are one or two sides of 1 or more")
        if min(self.num_images, self.batch_size) < 1:
            raise ValueError("--num_images, --batch_size: accepted is 1 or more")
        if self.resamples != 0 and self.resamples < 2:
            raise ValueError(f"--resamples: got {self.resamples}; accepted are 0 and 2 or more")


def read(source, index: int, channels: int, resolution: list[int] | None):
    """Image `index` as float [C, H, W] in [0, 1], fitted to `resolution` if there is one."""
    import numpy as np
    import torch

    from pyrdiff.data import decode_image, fit_image

    image = decode_image(source.read(index), channels, name=source.names[index])
    if resolution:
        image = fit_image(image, resolution[0], resolution[-1])
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, channels)).permute(2, 0, 1).float() / 255


def sizes(source) -> list[tuple[int, int]]:
    """(height, width) of each image. Every image is decoded, so a bad one stops everything before any work."""
    from pyrdiff.data import decode_image

    images = (decode_image(source.read(index), 3, name=source.names[index]) for index in range(len(source)))
    return [(image.height, image.width) for image in images]


def stems(source, folder: str) -> dict[str, int]:
    """Index by path below the folder, without the suffix."""
    found = {}
    for index, name in enumerate(source.names):
        stem = Path(name).relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(f"{folder}: got two images called {stem!r}; accepted is one of each name with --paired")
        found[stem] = index
    return found


def compare_pairs(settings: EvaluateSettings, device) -> list:
    import torch

    from pyrdiff import metrics
    from pyrdiff.data import open_source

    folders = [settings.generated, settings.reference, *([settings.low_res] if settings.low_res else [])]
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder!r} is no folder; accepted with --paired are folders of images")
    sources = [open_source(Path(folder)) for folder in folders]
    names = [stems(source, folder) for source, folder in zip(sources, folders, strict=True)]
    for folder, found in zip(folders, names, strict=True):
        odd = sorted(set(found) ^ set(names[0]))
        if odd:
            raise ValueError(f"{folders[0]}, {folder}: {len(odd)} names are in one only, such as {odd[0]!r}")
    known = [sizes(source) for source in sources]
    for stem, index in names[0].items():
        ours, theirs = known[0][index], known[1][names[1][stem]]
        if ours != theirs and not settings.resolution:
            raise ValueError(f"{stem}: got sizes {ours} and {theirs}; accepted are equal ones, or --resolution")
    lpips = dict(network=settings.lpips_network, weights=settings.lpips_weights, data_range=UNIT)
    if "lpips" in settings.metrics:
        probe = torch.zeros(1, 3, 64, 64, device=device)
        metrics.lpips(probe, probe, **lpips)

    results = {name: [] for name in settings.metrics}
    for stem in names[0]:
        pair = [
            read(source, found[stem], 3, settings.resolution)[None].to(device)
            for source, found in zip(sources[:2], names[:2], strict=True)
        ]
        for name, kept in results.items():
            if name == "lpips":
                kept.append(metrics.lpips(*pair, **lpips))
            elif name == "consistency":
                small = read(sources[2], names[2][stem], 3, None)[None].to(device)
                kept.append(metrics.consistency(pair[0], small, data_range=UNIT))
            else:
                arguments = dict(channels=settings.channels, crop_border=settings.crop_border, data_range=UNIT)
                kept.append(getattr(metrics, name)(*pair, **arguments))
    combined = [metrics.combine(kept) for kept in results.values()]
    return [(result, interval(mean, result.per_image, settings)) for result in combined]


def sample(settings: EvaluateSettings, accepted: tuple[int, int] | None, device):
    """Images of the model as a source. Image k has seed + k, whatever the batch."""
    import numpy as np

    import pyrdiff
    from pyrdiff.data import open_source

    pipeline = pyrdiff.load(settings.model).to(device)
    plan = {name: getattr(settings, name) for name in PLAN if getattr(settings, name) is not None}
    check_call(pipeline, plan)
    pipeline.set_progress_bar_config(disable=True)
    seeds, images = range(settings.seed, settings.seed + settings.num_images), []
    for image in generate(pipeline, seeds, settings.batch_size, plan):
        size = image.height, image.width
        if accepted and size != accepted:
            raise ValueError(
                f"--model: its images have size {size}, the reference {accepted}; accepted is --resolution"
            )
        images.append(np.asarray(image))
    return open_source(np.stack(images))


def compare_sets(settings: EvaluateSettings, device) -> list:
    import torch

    from pyrdiff import metrics
    from pyrdiff.data import open_source

    network = metrics.open_features(settings.features, settings.weights, device=device, batch_size=settings.batch_size)
    reference = open_source(Path(settings.reference), array_key=settings.array_key)
    generated = None if settings.model else open_source(Path(settings.generated))
    found = set(sizes(reference)) | (set(sizes(generated)) if generated else set())
    if len(found) > 1 and not settings.resolution:
        raise ValueError(f"--generated, --reference: got sizes {sorted(found)[:4]}; accepted is one, or --resolution")
    counts = {"--reference": len(reference), "--generated": len(generated) if generated else settings.num_images}
    for flag, count in counts.items():
        if count < 4:
            raise ValueError(f"{flag}: got {count} images; accepted are 4 or more")
    if generated is None:
        generated = sample(settings, None if settings.resolution else found.pop(), device)

    def features(source):
        collected = []
        for start in range(0, len(source), settings.batch_size):
            indices = range(start, min(start + settings.batch_size, len(source)))
            images = torch.stack([read(source, index, network.channels, settings.resolution) for index in indices])
            collected.append(network(images, data_range=UNIT))
        return torch.cat(collected)

    real, fake = features(reference), features(generated)
    statistics = metrics.FeatureStatistics(real.shape[1], device).update(real)

    def distance(part):
        return statistics.distance(metrics.FeatureStatistics(real.shape[1], device).update(part))

    results = []
    for name in settings.metrics:
        if name == "frechet_distance":
            result = metrics.frechet_distance(real, fake, features=network)
            results.append((result, interval(distance, fake, settings)))
        elif name == "kid":
            result = metrics.kid(real, fake, features=network)
            results.append((result, interval(metrics.KernelReference(real).distance, fake, settings)))
        else:
            precision, recall = metrics.precision_recall(real, fake, features=network)
            results += [(precision, interval(mean, precision.per_image, settings)), (recall, None)]
    return results


def mean(values):
    return values.mean()


def interval(statistic, sample, settings: EvaluateSettings) -> list[float] | None:
    """95 % about the figure at this count, over the generated images; None where it does not exist."""
    from pyrdiff.metrics import bootstrap_interval

    if settings.resamples == 0 or len(sample) < 2 or not sample.isfinite().all():
        return None
    return list(bootstrap_interval(statistic, sample, resamples=settings.resamples))


def table(results: list[dict]) -> str:
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
    if settings.output and Path(settings.output).is_dir():
        raise ValueError(f"--output: got the folder {settings.output!r}; accepted is a file to write")
    device = open_device(settings.device)
    found = compare_pairs(settings, device) if settings.paired else compare_sets(settings, device)

    results = []
    for result, between in found:
        value = result.value if abs(result.value) < float("inf") else str(result.value)  # JSON has no infinity
        results.append({"name": result.name, "value": value, "interval": between, "conventions": result.conventions})
    resize = "fitted to --resolution: cut to its aspect, bicubic, antialiased" if settings.resolution else None
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
    return report
