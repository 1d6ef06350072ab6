"""
Score trainings that differ in one thing, on the same noise, over several seeds of training:

    python benchmarks/ablation.py --reference my_images --features squeezenet --weights squeezenet.pth \
        --arm "with coordinates, seed 0=runs/with-0/pipeline" --arm "without, seed 0=runs/without-0/pipeline" \
        --output benchmarks/results/coordinates.json

The part of a name before the comma is the group that its mean is taken over. `--grids` writes samples to look at.
"""

import argparse
import hashlib
import os
import statistics
import time
from pathlib import Path

import report

SAMPLERS = {
    "pyramid": dict(num_inference_steps=100, refine_steps=8),
    "top only": dict(num_inference_steps=50),
}


def measure(options) -> dict:
    import torch
    from bench import octaves

    import pyrdiff
    from pyrdiff.data import ImageLevels, open_source
    from pyrdiff.metrics import FeatureStatistics, bootstrap_interval, kid, open_features

    torch.set_num_threads(options.threads)
    arms = dict(arm.rsplit("=", 1) for arm in options.arm)
    network = open_features(options.features, weights=options.weights)
    source, rows, truth = open_source(options.reference, array_key=options.array_key), [], None

    def statistics_of(features):
        return FeatureStatistics(features.shape[1]).update(features)

    for name, folder in arms.items():
        pipeline = pyrdiff.load(folder)
        pipeline.set_progress_bar_config(disable=True)
        size = pipeline.plan().levels[-1].size
        if truth is None:
            reference = ImageLevels.build(source, [size], channels=pipeline.unet.config.image_channels)
            chosen = torch.randperm(len(reference), generator=torch.Generator().manual_seed(options.seed))
            truth = reference.arrays[-1][chosen[: options.reference_images].numpy()]
            truth = torch.from_numpy(truth).permute(0, 3, 1, 2).float() / 255
            real = network(truth, data_range=(0, 1)).double()
            all_real = statistics_of(real)
        digest = hashlib.sha256()
        for path in sorted(Path(folder).glob("unet/*.safetensors")):
            digest.update(path.read_bytes())
        for sampler, arguments in SAMPLERS.items():
            if sampler == "top only":
                arguments = {**arguments, "resolutions": [size]}
            count = options.images if sampler == "pyramid" else options.top_images
            began, images = time.perf_counter(), []
            for first in range(0, count, options.batch_size):
                seeds = range(first, min(first + options.batch_size, count))
                generators = [torch.Generator().manual_seed(options.seed * 1_000_000 + seed) for seed in seeds]
                images.append(pipeline(len(seeds), generator=generators, output_type="pt", **arguments).images)
            if not images:
                continue
            images = torch.cat(images)
            features = network(images, data_range=(0, 1)).double()
            low, high = bootstrap_interval(
                lambda part, real=all_real: real.distance(statistics_of(part)), features, resamples=100
            )
            row = {
                "name": name,
                "group": name.split(",")[0],
                "sampler": sampler,
                "arguments": {**arguments, "scheduler": type(pipeline.scheduler).__name__},
                "images": len(images),
                "frechet": all_real.distance(statistics_of(features)),
                "frechet_interval": [low, high],
                "kid": kid(real, features).value,
                "octaves": [round(value, 4) for value in octaves(images, truth)],
                "model": digest.hexdigest(),
                "use_coordinates": pipeline.unet.config.use_coordinates,
            }
            rows.append(row)
            print(f"{name}, {sampler}: {row['frechet']:.1f} in {time.perf_counter() - began:.0f} s", flush=True)
            if options.grids:
                save_grid(images[:48], Path(options.grids) / f"{name} {sampler}.png".replace(" ", "_"))
    return {
        "bench": "ablation",
        "title": options.title,
        "features": network.conventions,
        "data": {"fingerprint": reference.fingerprint, "images": len(truth)},
        "seed": options.seed,
        **report.surroundings(options.threads),
        "rows": rows,
    }


def save_grid(images, path: Path) -> None:
    """Samples [N, C, H, W] in [0, 1], twelve a row."""
    from PIL import Image

    count, channels, height, width = images.shape
    columns = min(12, count)
    rows = count // columns
    grid = images[: rows * columns].reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(rows * height, columns * width, channels) * 255).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(path)


def table(result: dict) -> str:
    lines = [
        f"{result['title']} {result['features']['network']} features against {result['data']['images']} images; noise "
        f"seed {result['seed']}. {report.caption(result)}",
        "",
        "| training | sampled by | Fréchet [95 %] | KID | power an octave |",
        "|---|---|---|---|---|",
    ]
    for sampler in SAMPLERS:
        rows = [row for row in result["rows"] if row["sampler"] == sampler]
        for row in rows:
            low, high = row["frechet_interval"]
            power = " ".join(f"{value:.2f}" for value in row["octaves"])
            shown = f"{sampler} ({row['images']} images)"
            distance = f"{row['frechet']:.0f} [{low:.0f}, {high:.0f}]"
            lines.append(f"| {row['name']} | {shown} | {distance} | {row['kid']:.3g} | {power} |")
        groups = list(dict.fromkeys(row["group"] for row in rows))
        for group in groups:
            values = [row["frechet"] for row in rows if row["group"] == group]
            if len(values) > 1:
                seeds = f"{min(values):.0f} to {max(values):.0f} over {len(values)} seeds"
                lines.append(f"| **{group}**, mean | {sampler} | **{statistics.mean(values):.0f}** ({seeds}) | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", required=True, help="NAME=FOLDER of an exported pipeline")
    parser.add_argument("--reference", required=True, help="images to compare with, best held out")
    parser.add_argument("--array_key", help="array of an .npz reference")
    parser.add_argument("--features", default="squeezenet")
    parser.add_argument("--weights", help="of the feature network")
    parser.add_argument("--images", type=int, default=256, help="sampled by the pyramid")
    parser.add_argument("--top_images", type=int, default=0, help="sampled at the top level only")
    parser.add_argument("--reference_images", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--grids", help="folder for samples to look at")
    parser.add_argument("--title", default="", help="what the table says first")
    parser.add_argument("--output", required=True, help="JSON to write")
    options = parser.parse_args()
    for arm in options.arm:
        if "=" not in arm or not Path(arm.rsplit("=", 1)[1]).is_dir():
            parser.error(f"--arm {arm!r}: expected NAME=FOLDER of an exported pipeline")
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
