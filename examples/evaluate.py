"""
Measure generated images, in one table and one JSON that says how:

    python examples/evaluate.py --generated samples --reference my_images --features inception --output scores.json
    python examples/evaluate.py --model runs/pddpm/pipeline --num_images 500 --reference my_images --output scores.json
    python examples/evaluate.py --paired --generated upscaled --reference originals --channels y --crop_border 4

Images are compared at the size they have; where sizes differ, --resolution says what to fit them to.
"""

import argparse
import inspect
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

SETS, PAIRS = ("frechet_distance", "kid", "precision_recall"), ("psnr", "ssim", "lpips", "consistency")
PLAN = ("plan", "num_inference_steps", "refine_steps", "refine_strength", "num_passes")
UNIT = (0, 1)  # the range of images here


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", help="folder, .npy or .npz of images to measure")
    parser.add_argument("--model", help="instead: an exported pipeline, or a repository on the Hub, to sample")
    parser.add_argument("--reference", required=True, help="folder, .npy or .npz of real images; best held out")
    parser.add_argument("--array_key", help="array of an .npz reference")
    parser.add_argument("--paired", action="store_true", help="compare images of the same name, one by one")
    parser.add_argument("--low_res", help="folder of the inputs, for consistency")
    parser.add_argument("--metrics", nargs="+", choices=(*SETS, *PAIRS), help="by default those that need no weights")
    parser.add_argument("--features", default="inception", help="squeezenet, alexnet, inception, dinov2 or classifier")
    parser.add_argument("--weights", help="file of the feature network; by default downloaded")
    parser.add_argument("--lpips_network", default="alex", choices=("alex", "squeeze", "vgg"))
    parser.add_argument("--lpips_weights", help="file of its trunk; by default downloaded")
    parser.add_argument("--resolution", type=int, nargs="+", help="side, or height and width, to fit all images to")
    parser.add_argument("--channels", default="rgb", choices=("rgb", "y"), help="for PSNR and SSIM")
    parser.add_argument("--crop_border", type=int, default=0, help="for PSNR and SSIM, pixels at each side")
    parser.add_argument("--num_images", type=int, default=100, help="to sample from --model")
    parser.add_argument("--plan", help="a plan that the model carries, such as fast; or with flags:")
    parser.add_argument("--num_inference_steps", type=int, help="network calls at the lowest level")
    parser.add_argument("--refine_steps", type=int, help="network calls at each higher level")
    parser.add_argument("--refine_strength", type=float, help="noise that higher levels start from, (0, 1]")
    parser.add_argument("--num_passes", type=int, help="network calls of a pixel-aware model")
    parser.add_argument("--resamples", type=int, default=100, help="for the 95%% intervals; 0 for none")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="by default the GPU if there is one")
    parser.add_argument("--output", help="JSON to write")
    options = parser.parse_args()
    if options.metrics is None:
        options.metrics = ["psnr", "ssim"] if options.paired else list(SETS)
    return options


def check(options: argparse.Namespace) -> None:
    """What can be said about the flags alone."""
    accepted = PAIRS if options.paired else SETS
    wrong = [name for name in options.metrics if name not in accepted]
    if wrong:
        mode = "with --paired" if options.paired else "without --paired"
        raise ValueError(f"--metrics: got {wrong} {mode}; accepted are {list(accepted)}")
    if (options.generated is None) == (options.model is None):
        raise ValueError("--generated, --model: got both or none; accepted is one of them")
    if options.paired and options.model is not None:
        raise ValueError("--model: got one with --paired; accepted there is --generated")
    if ("consistency" in options.metrics) != (options.low_res is not None):
        raise ValueError("--low_res: accepted is the folder of the inputs, with --metrics consistency and only there")
    if options.resolution and (len(options.resolution) > 2 or min(options.resolution) < 1):
        raise ValueError(f"--resolution: got {options.resolution}; accepted are one or two sides of 1 or more")
    if min(options.num_images, options.batch_size) < 1:
        raise ValueError("--num_images, --batch_size: accepted is 1 or more")
    if options.resamples != 0 and options.resamples < 2:
        raise ValueError(f"--resamples: got {options.resamples}; accepted are 0 and 2 or more")
    if options.output and Path(options.output).is_dir():
        raise ValueError(f"--output: got the folder {options.output!r}; accepted is a file to write")


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


def compare_pairs(options: argparse.Namespace, device) -> list:
    import torch

    from pyrdiff import metrics
    from pyrdiff.data import open_source

    folders = [options.generated, options.reference, *([options.low_res] if options.low_res else [])]
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
        if ours != theirs and not options.resolution:
            raise ValueError(f"{stem}: got sizes {ours} and {theirs}; accepted are equal ones, or --resolution")
    lpips = dict(network=options.lpips_network, weights=options.lpips_weights, data_range=UNIT)
    if "lpips" in options.metrics:
        probe = torch.zeros(1, 3, 64, 64, device=device)
        metrics.lpips(probe, probe, **lpips)

    results = {name: [] for name in options.metrics}
    for stem in names[0]:
        pair = [
            read(source, found[stem], 3, options.resolution)[None].to(device)
            for source, found in zip(sources[:2], names[:2], strict=True)
        ]
        for name, kept in results.items():
            if name == "lpips":
                kept.append(metrics.lpips(*pair, **lpips))
            elif name == "consistency":
                small = read(sources[2], names[2][stem], 3, None)[None].to(device)
                kept.append(metrics.consistency(pair[0], small, data_range=UNIT))
            else:
                settings = dict(channels=options.channels, crop_border=options.crop_border, data_range=UNIT)
                kept.append(getattr(metrics, name)(*pair, **settings))
    combined = [metrics.combine(kept) for kept in results.values()]
    return [(result, interval(mean, result.per_image, options)) for result in combined]


def sample(options: argparse.Namespace, accepted: tuple[int, int] | None, device):
    """Images of the model as a source. Image k has seed + k, whatever the batch."""
    import numpy as np
    import torch

    import pyrdiff
    from pyrdiff.data import open_source

    pipeline = pyrdiff.load(options.model).to(device)
    config = pipeline.unet.config
    side = config.resolutions[-1] if "resolutions" in config else config.sample_size
    size = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    if accepted and size != accepted:
        raise ValueError(f"--model: its images have size {size}, the reference {accepted}; accepted is --resolution")
    plan = {name: getattr(options, name) for name in PLAN if getattr(options, name) is not None}
    unknown = [f"--{name}" for name in plan if name not in inspect.signature(pipeline.__call__).parameters]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not for a {type(pipeline).__name__}")
    if hasattr(pipeline, "plan"):
        pipeline.plan(**plan)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, options.num_images, options.batch_size):
        seeds = range(options.seed + start, options.seed + min(start + options.batch_size, options.num_images))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images += [np.asarray(image) for image in pipeline(len(seeds), generator=generators, **plan).images]
    return open_source(np.stack(images))


def compare_sets(options: argparse.Namespace, device) -> list:
    import torch

    from pyrdiff import metrics
    from pyrdiff.data import open_source

    network = metrics.open_features(options.features, options.weights, device=device, batch_size=options.batch_size)
    reference = open_source(Path(options.reference), array_key=options.array_key)
    generated = None if options.model else open_source(Path(options.generated))
    found = set(sizes(reference)) | (set(sizes(generated)) if generated else set())
    if len(found) > 1 and not options.resolution:
        raise ValueError(f"--generated, --reference: got sizes {sorted(found)[:4]}; accepted is one, or --resolution")
    counts = {"--reference": len(reference), "--generated": len(generated) if generated else options.num_images}
    for flag, count in counts.items():
        if count < 4:
            raise ValueError(f"{flag}: got {count} images; accepted are 4 or more")
    if generated is None:
        generated = sample(options, None if options.resolution else found.pop(), device)

    def features(source):
        collected = []
        for start in range(0, len(source), options.batch_size):
            indices = range(start, min(start + options.batch_size, len(source)))
            images = torch.stack([read(source, index, network.channels, options.resolution) for index in indices])
            collected.append(network(images, data_range=UNIT))
        return torch.cat(collected)

    real, fake = features(reference), features(generated)
    statistics = metrics.FeatureStatistics(real.shape[1], device).update(real)

    def distance(part):
        return statistics.distance(metrics.FeatureStatistics(real.shape[1], device).update(part))

    results = []
    for name in options.metrics:
        if name == "frechet_distance":
            result = metrics.frechet_distance(real, fake, features=network)
            results.append((result, interval(distance, fake, options)))
        elif name == "kid":
            result = metrics.kid(real, fake, features=network)
            results.append((result, interval(metrics.KernelReference(real).distance, fake, options)))
        else:
            precision, recall = metrics.precision_recall(real, fake, features=network)
            results += [(precision, interval(mean, precision.per_image, options)), (recall, None)]
    return results


def mean(values):
    return values.mean()


def interval(statistic, sample, options: argparse.Namespace) -> list[float] | None:
    """95 % about the figure at this count, over the generated images; None where it does not exist."""
    from pyrdiff.metrics import bootstrap_interval

    if options.resamples == 0 or len(sample) < 2 or not sample.isfinite().all():
        return None
    return list(bootstrap_interval(statistic, sample, resamples=options.resamples))


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


def main() -> None:
    options = arguments()
    try:
        check(options)
        import torch

        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        found = compare_pairs(options, device) if options.paired else compare_sets(options, device)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    results = []
    for result, between in found:
        value = result.value if abs(result.value) < float("inf") else str(result.value)  # JSON has no infinity
        results.append({"name": result.name, "value": value, "interval": between, "conventions": result.conventions})
    resize = "fitted to --resolution: cut to its aspect, bicubic, antialiased" if options.resolution else None
    packages = ("pyrdiff", "torch", "diffusers", "torchmetrics", "pillow", "numpy")
    report = {
        "settings": vars(options),
        "images": {"bits": 8, "data_range": UNIT, "resize": resize},
        "interval": "95 %, bootstrap over the generated images, for the figure at this count",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "results": results,
    }
    print(table(results))
    if options.output:
        target = Path(options.output)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        beside.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(target)


if __name__ == "__main__":
    main()
