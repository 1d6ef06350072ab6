"""
Score trainings that differ in one thing, on the same noise, over several seeds of training:

    python benchmarks/ablation.py --reference my_images --features squeezenet --weights squeezenet.pth \
        --arm "with coordinates, seed 0=runs/with-0/pipeline" --arm "without, seed 0=runs/without-0/pipeline" \
        --output benchmarks/results/coordinates.json

The part of a name before the comma is the group that its mean is taken over. `--grids` writes samples to look at.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import report
import scoring

SAMPLERS = {
    "pyramid": dict(num_inference_steps=100, refine_steps=8),
    "top only": dict(num_inference_steps=50),
}


def measure(options) -> dict:
    import torch

    import pyrdiff

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer, rows, shape = None, [], None
    for name, folder in (arm.rsplit("=", 1) for arm in options.arm):
        pipeline = pyrdiff.load(folder).to(device)
        pipeline.set_progress_bar_config(disable=True)
        size, channels = pipeline.plan().levels[-1].size, pipeline.unet.config.image_channels
        if shape not in (None, (size, channels)):
            raise ValueError(f"--arm {name!r}: gives {size}, {channels} channels; expected {shape} as the first does")
        shape = (size, channels)
        if scorer is None:
            scorer = scoring.Scorer(
                options.reference,
                options.array_key,
                *shape,
                options.features,
                options.weights,
                device,
                0,
                options.reference_images,
                options.seed,
                resamples=100,
            )
        for sampler, arguments in SAMPLERS.items():
            if sampler == "top only":
                arguments = {**arguments, "resolutions": [size]}
            count = options.images if sampler == "pyramid" else options.top_images
            began, images = time.perf_counter(), []
            for first in range(0, count, options.batch_size):
                seeds = range(first, min(first + options.batch_size, count))
                generators = [torch.Generator().manual_seed(options.seed * 1_000_000 + seed) for seed in seeds]
                part = pipeline(len(seeds), generator=generators, output_type="latent", **arguments).images
                images.append(scoring.to_uint8(part.float().cpu()))
            if not images:
                continue
            images = np.concatenate(images)
            row = {
                "name": name,
                "group": name.split(",")[0],
                "sampler": sampler,
                "arguments": {**arguments, "scheduler": type(pipeline.scheduler).__name__},
                "model": scoring.model_hash(folder),
                "use_coordinates": pipeline.unet.config.use_coordinates,
                **scorer(images),
            }
            rows.append(row)
            print(f"{name}, {sampler}: {row['frechet']:.1f} in {time.perf_counter() - began:.0f} s", flush=True)
            if options.grids:
                save_grid(images[:48], Path(options.grids) / f"{name} {sampler}.png".replace(" ", "_"))
    return {
        "bench": "ablation",
        "title": options.title,
        "seed": options.seed,
        **scorer.description,
        **report.surroundings(options.threads),
        "rows": rows,
    }


def save_grid(images, path: Path) -> None:
    """Samples, uint8 [N, H, W, C], twelve a row."""
    from PIL import Image

    count, height, width, channels = images.shape
    columns = min(12, count)
    rows = count // columns
    grid = images[: rows * columns].reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    pixels = grid.reshape(rows * height, columns * width, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(path)


def table(result: dict) -> str:
    lines = [
        f"{result['title']} {result['features']} features against {result['compared_with']['frechet']} images; noise "
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
