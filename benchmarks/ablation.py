"""
Score trainings that differ in one thing, on the same noise, over several seeds of training:

    python benchmarks/ablation.py --reference my_images --features squeezenet --weights squeezenet.pth \
        --arm "with coordinates, seed 0=runs/with-0/pipeline" --arm "without, seed 0=runs/without-0/pipeline" \
        --output benchmarks/results/coordinates.json

The part of a name before the comma is the group that its mean is taken over. `--grids` writes samples to look at.
"""

import statistics
import time
from pathlib import Path

import report
import scoring
import torch
from flags import SCORED, parser_of
from pictures import write_grid

import pyrdiff

SAMPLERS = {
    "pyramid": dict(num_inference_steps=100, refine_steps=8),
    "top only": dict(num_inference_steps=50),
}


def measure(options) -> dict:
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
        scorer = scorer or scoring.Scorer.of(options, *shape, device, held=0)
        for sampler, arguments in SAMPLERS.items():
            arguments = {**arguments, "resolutions": [size]} if sampler == "top only" else arguments
            count = options.images if sampler == "pyramid" else options.top_images
            if not count:
                continue

            def make(indices: range, pipeline=pipeline, arguments=arguments) -> torch.Tensor:
                generators = scoring.generators(options.seed, indices)
                return pipeline(len(indices), generator=generators, output_type="latent", **arguments).images.float()

            began = time.perf_counter()
            images = scoring.to_uint8(scoring.in_batches(make, count, options.batch_size))
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
                write_grid(images[:48], Path(options.grids) / f"{name} {sampler}.png", columns=12)
    return {
        "bench": "ablation",
        "title": options.title,
        "seed": options.seed,
        **scorer.description,
        **report.surroundings(options.threads),
        "rows": rows,
    }


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
    parser = parser_of(__doc__, *SCORED, "batch_size", "seed", "grids", images=256, title="")
    parser.add_argument("--arm", action="append", required=True, help="NAME=FOLDER of an exported pipeline")
    parser.add_argument("--top_images", type=int, default=0, help="sampled at the top level only")
    options = parser.parse_args()
    for arm in options.arm:
        if "=" not in arm or not Path(arm.rsplit("=", 1)[1]).is_dir():
            parser.error(f"--arm {arm!r}: expected NAME=FOLDER of an exported pipeline")
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
