"""
Super-resolution in one network call: a model distilled from SR4, and a plain network of the same size that sees no
noise and was trained by the same loss, for the minutes of SR4 and of the distillation together.

    python benchmarks/one_call_sr.py train --arm teacher --train_data_dir faces/train --trained runs/sr --minutes 10
    python benchmarks/one_call_sr.py train --arm distilled --train_data_dir faces/train --trained runs/sr --minutes 8
    python benchmarks/one_call_sr.py train --arm plain --train_data_dir faces/train --trained runs/sr --minutes 18
    python benchmarks/one_call_sr.py score --trained runs/sr --reference faces/test --output one_call_sr.json

`--minutes` are minutes of processor time of the process. What is trained by then is scored, on the same images.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pictures
import report
import residual_sr
import scoring
import torch
from flags import LPIPS, SCORED, parser_of

import pyrdiff
from pyrdiff.data import ImageLevels, open_source
from pyrdiff.methods import distill, sr
from pyrdiff.training import loop

SHARED = {
    "random_flip": True,
    "train_batch_size": 4,
    "learning_rate": 3e-4,
    "checkpointing_steps": 200,
    "save_images_steps": 0,
    "mixed_precision": "bf16",
}
NETWORK = {"resolution": ("64",), "scale_factor": (4,), "preset": "mini", "lr_warmup_steps": 200}
PLANS = ("default", "balanced", "fast", "one", "two")


@dataclass(kw_only=True)
class PlainSettings(sr.SuperResolutionSettings):
    """Of a network that makes what the enlarged input lacks of the enlarged input alone."""

    lpips_weight: float = 0.5
    LPIPS_NETWORK: ClassVar[str] = "alex"

    def __post_init__(self):
        self.lpips_network = self.LPIPS_NETWORK
        super().__post_init__()


def plain_images(network, upsampled: torch.Tensor) -> torch.Tensor:
    """In [-1, 1], of enlarged inputs [B, C, H, W]: the network sees no noise, and says so."""
    level = torch.ones(len(upsampled), device=upsampled.device)
    return upsampled + network(torch.zeros_like(upsampled), level, upsampled, return_dict=False)[0].float()


def plain_loss(network, scheduler, settings, batch, draws):
    upsampled = sr.pair(settings, batch.images, draws.choice(settings.scale_factor), draws)
    return distill.difference(settings, plain_images(network, upsampled), batch.images)


PLAIN = replace(sr.METHOD, name="plain", settings=PlainSettings, loss=plain_loss)


def train(options) -> None:
    """Trains an arm, or goes on with it; its pipeline is in OUTPUT/ARM-SEED/pipeline."""
    torch.set_num_threads(1)
    output = Path(options.trained)
    folder = output / f"{options.arm}-{options.seed}"
    if (folder / "pipeline").is_dir():
        print(f"{folder}: is trained", flush=True)
        return
    shared = {
        **SHARED,
        "train_data_dir": options.train_data_dir,
        "output_dir": str(folder),
        "cache_dir": str(output / "cache"),
        "minutes": options.minutes,
        "seed": options.seed,
    }
    method, flags = {
        "teacher": (sr.METHOD, NETWORK),
        "plain": (PLAIN, {**NETWORK, "lpips_weights": options.lpips_weights}),
    }.get(options.arm, (distill.METHOD, {"lpips_weights": options.lpips_weights}))
    if method is distill.METHOD:
        flags["model"] = str(output / f"teacher-{options.seed}" / "pipeline")
    settings = method.settings(**{**shared, **flags, **json.loads(options.flags)})
    # The images are decoded before the clock of the run starts: the time is for the network.
    ImageLevels.build(open_source(options.train_data_dir), settings.sizes, channels=3, cache_dir=settings.cache_dir)
    loop.train(method, settings, clock=time.process_time)


@torch.no_grad()
def score(options) -> dict:
    """Scores every plan of every arm that is trained, and bicubic."""
    torch.set_num_threads(1)
    output = Path(options.trained)
    folders = [path for seed in options.seeds for path in sorted(output.glob(f"*-{seed}/pipeline"))]
    pipelines = {path: pyrdiff.load(path) for path in folders}
    config = next(iter(pipelines.values())).unet.config
    size, factor = config.sample_size, max(config.scale_factors)
    pairs = residual_sr.Pairs(options, size, config.image_channels, factor)
    bicubic = next(iter(pipelines.values())).upsample(2 * pairs.low - 1, (size, size))
    rows = [{"arm": "bicubic", "seed": 0, "plan": "-", "calls": 0, **pairs.scores((bicubic / 2 + 0.5).clamp(0, 1))}]
    shown = {"bicubic": (bicubic / 2 + 0.5).clamp(0, 1)}
    for folder, pipeline in pipelines.items():
        arm, _, seed = folder.parent.name.rpartition("-")
        pipeline.set_progress_bar_config(disable=True)
        for plan in ["-"] if arm == "plain" else [name for name in PLANS if name in pipeline.config.plans]:
            if plan == "default" and "one" in pipeline.config.plans:
                continue
            began = time.process_time()
            if arm == "plain":
                images = scoring.in_batches(
                    lambda indices, net=pipeline.unet: plain_images(net, bicubic[indices.start : indices.stop]),
                    len(bicubic), options.batch_size,
                )  # fmt: skip
                images = (images / 2 + 0.5).clamp(0, 1)
            else:
                images = residual_sr.enlarge(pipeline, pairs.low, options.batch_size, int(seed), plan=plan)
            seconds = (time.process_time() - began) / len(images)
            calls = 1 if arm == "plain" else len(pipeline.cost(size // factor, factor, plan=plan).timesteps)
            row = {"arm": arm, "seed": int(seed), "plan": plan, "calls": calls, "seconds_an_image": seconds}
            row |= {"training": residual_sr.training_of(str(folder)), "model": scoring.model_hash(str(folder))}
            rows.append({**row, **pairs.scores(images)})
            shown[f"{arm}-{seed} {plan}"] = images
            print(f"{arm} {seed}, {plan}: {rows[-1]['psnr']:.2f} dB, LPIPS {rows[-1]['lpips']:.4f}", flush=True)
    if options.grids:
        rows_shown = [part[:8] for part in (pairs.low, *shown.values(), pairs.truth)]
        pictures.write_rows(rows_shown, Path(options.grids) / "one_call_sr.png")
        print("rows: input,", ", ".join(shown), "truth")
    result = {"bench": "one_call_sr", "title": options.title, "factor": factor, "size": size, "images": options.images}
    result |= {"lpips": options.lpips, "flags": {**SHARED, **NETWORK}, **pairs.scorer.description, "rows": rows}
    result |= report.surroundings(1, gpu=False)
    return result


def table(result: dict) -> str:
    size, factor = result["size"], result["factor"]
    lines = [
        f"{result['title']} x{factor}, {size // factor} to {size} pixels a side (bicubic), {result['images']} held-out "
        f"images, LPIPS {result['lpips']} (the losses have another network of it); Fréchet distance of "
        f"{result['features']} features. {report.caption(result)}",
        "",
        "| model | plan | calls | minutes | PSNR [95 %] | SSIM | LPIPS [95 %] | consistency | Fréchet | "
        "finest octave | s an image |",
        "|---" * 11 + "|",
    ]
    for row in result["rows"]:
        training = row.get("training") or {}
        minutes = f"{training['minutes']:.0f} ({training['steps']} steps)" if training else "-"
        psnr = "{:.2f} [{:.2f}, {:.2f}]".format(row["psnr"], *row["psnr_interval"])
        lpips = "{:.3f} [{:.3f}, {:.3f}]".format(row["lpips"], *row["lpips_interval"])
        seconds = f"{row['seconds_an_image']:.2f}" if "seconds_an_image" in row else "-"
        fine = f"{row['frechet']:.0f} | {row['octaves'][-1]:.2f}" if "frechet" in row else "- | -"
        lines.append(
            f"| {row['arm']}, seed {row['seed']} | {row['plan']} | {row['calls']} | {minutes} | {psnr} | "
            f"{row['ssim']:.3f} | {lpips} | {row['consistency']:.1f} | {fine} | {seconds} |"
        )
    return "\n".join(lines)


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "train":
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--train_data_dir", required=True)
        parser.add_argument("--arm", required=True, help="teacher, plain, or a name of a distillation")
        parser.add_argument("--flags", default="{}", help="further flags of the training, as JSON")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--minutes", type=float, required=True, help="of processor time")
        parser.add_argument("--lpips_weights", help="file of the network of LPIPS in the loss")
    else:
        parser = parser_of(__doc__, *SCORED, *LPIPS, "images", "batch_size", "seed", "title", "grids")
        parser.add_argument("--slow_images", type=int, default=4, help=argparse.SUPPRESS)
        parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--trained", required=True, help="folder of the trainings")
    parser.add_argument("command", choices=("train", "score"))
    options = parser.parse_args()
    if options.command == "train":
        train(options)
    else:
        report.save(score(options), options.output)


if __name__ == "__main__":
    main()
