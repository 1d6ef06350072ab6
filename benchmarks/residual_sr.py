"""
Super-resolution models trained by `examples/train_sr.py` (paper S, table 1), and one of them with fewer and fewer
network calls: every arm on the same held-out images, made smaller as in training.

    python benchmarks/residual_sr.py --arms table --models SR3=runs/sr3/pipeline SR4=runs/sr4/pipeline ...
    python benchmarks/residual_sr.py --arms frontier --models SR4=runs/sr4/pipeline ...

"table": each model by its own ancestral steps, all of them on --slow_images and 100 of them on all images. "frontier":
ancestral steps, DDIM, and solvers of diffusers made from the model's scheduler, from 500 calls to 2, placed as it does
(which begins where the last stride ends); --plans adds the spacings that `few_steps.py` found, down to 1 call.
"""

import argparse
import json
import time
from pathlib import Path

import report
import scoring
import torch
from flags import FLAGS, LPIPS, SCORED, parser_of
from pictures import write_rows
from samplers import DPM, SDE, UNIPC

import pyrdiff
from pyrdiff.data import shrink
from pyrdiff.metrics import consistency

# Placed as the model's own scheduler places its steps. The default of diffusers begins at the last training step, where
# a cosine schedule leaves next to no signal, and a noise prediction says nothing of the image: one arm shows it.
FROM_THE_END = ["DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}]


def table_arms(train_steps: int) -> dict[str, dict]:
    """{name: a plan of the pipeline; "slow": on few images only; "call": further arguments of the call}."""
    return {
        f"all {train_steps}": {"slow": True, "num_inference_steps": train_steps},
        "100": {"num_inference_steps": 100},
    }


def frontier_arms(train_steps: int) -> dict[str, dict]:
    arms = {f"ancestral {train_steps}": {"slow": True, "num_inference_steps": train_steps}}
    for calls in (50, 20, 8, 4, 2):
        samplers = {
            "ancestral": {},
            "DDIM": {"eta": 0.0},
            "DPM-Solver++": {"scheduler": DPM},
            "SDE-DPM-Solver++": {"scheduler": SDE},
            "UniPC": {"scheduler": UNIPC},
            "DPM-Solver++, log-SNR": {"scheduler": DPM, "spacing": "log_snr"},
            "DPM-Solver++, linspace": {"scheduler": FROM_THE_END},
        }
        for name, plan in samplers.items():
            if calls == 20 or name in ("ancestral", "DDIM", "SDE-DPM-Solver++"):
                arms[f"{name} {calls}"] = {"num_inference_steps": calls, **plan}
        if calls in (4, 20):
            plan = {"num_inference_steps": calls, "call": {"hard_consistency": True}}
            arms[f"ancestral {calls}, hard consistency"] = plan
    for calls, strength in ((8, 0.5), (4, 0.5)):
        arms[f"DDIM {calls} from {strength}"] = {"num_inference_steps": calls, "eta": 0.0, "strength": strength}
    return arms


class Pairs:
    """Held-out images, what the models get of them, and how near an output is to them."""

    def __init__(self, options, size: int, channels: int, factor: int):
        self.options = options
        self.scorer = scoring.Scorer.of(options, size, channels, "cpu", held=options.images)
        self.truth = torch.from_numpy(self.scorer.held).permute(0, 3, 1, 2).float() / 255
        self.low = shrink(2 * self.truth - 1, factor) / 2 + 0.5

    def scores(self, images: torch.Tensor) -> dict:
        """Of float [N, C, H, W] in [0, 1], rounded to 8 bits as a file is; the first N images."""
        truth, low = self.truth[: len(images)], self.low[: len(images)]
        options, images = self.options, (images * 255).round() / 255
        each = scoring.fidelity(images, truth, options)
        each["consistency"] = consistency(images, low, data_range=(0, 1)).per_image
        found = {"images": len(images), **{name: values.mean().item() for name, values in each.items()}}
        found |= {f"{name}_interval": scoring.interval_of_mean(each[name]) for name in ("psnr", "lpips")}
        found["slow"] = {name: values[: options.slow_images].mean().item() for name, values in each.items()}
        if len(images) >= 32:
            pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
            found.update({k: v for k, v in self.scorer(pixels).items() if k.startswith("frechet") or k == "octaves"})
        return found


def enlarge(pipeline, low: torch.Tensor, batch_size: int, seed: int, **arguments) -> torch.Tensor:
    """Float [N, C, H, W] in [0, 1], each image with its own generator."""

    def make(indices: range) -> torch.Tensor:
        generators = scoring.generators(seed, indices)
        part = low[indices.start : indices.stop]
        return pipeline(part, generator=generators, output_type="pt", **arguments).images

    return scoring.in_batches(make, len(low), batch_size)


def open_models(options) -> dict:
    """{name: (pipeline, folder)}."""
    found = {}
    for text in options.models:
        name, _, folder = text.partition("=")
        if not folder:
            raise SystemExit(f"--models: got {text!r}; expected NAME=FOLDER")
        pipeline = pyrdiff.load(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        pipeline.set_progress_bar_config(disable=True)
        found[name] = (pipeline, folder)
    return found


def training_of(folder: str) -> dict:
    """Steps and minutes that a model was trained for, from the log beside it."""
    path = Path(folder).parent / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if "loss" in line]
    if not lines:
        return {}
    settings = json.loads((path.parent / "settings.json").read_text())
    return {
        "steps": lines[-1]["step"],
        "minutes": lines[-1]["seconds"] / 60,
        "images": lines[-1]["step"] * settings["train_batch_size"],
    }


def measure(options) -> dict:
    torch.set_num_threads(options.threads)
    models = open_models(options)
    unet = next(iter(models.values()))[0].unet
    factor, size = max(unet.config.scale_factors), unet.config.sample_size
    pairs = Pairs(options, size, unet.config.image_channels, factor)
    rows = [{"model": "bicubic", "name": "bicubic", "calls": 0, "seconds_an_image": None}]
    bicubic = next(iter(models.values()))[0].upsample(pairs.low, (size, size)).clamp(0, 1)
    rows[0].update(pairs.scores(bicubic))
    found = {}
    for model, (pipeline, folder) in models.items():
        train_steps = pipeline.scheduler.config.num_train_timesteps
        arms = (table_arms if options.arms == "table" else frontier_arms)(train_steps)
        if options.plans:
            arms.update(json.loads(Path(options.plans).read_text())["plans"])
        for name, arm in arms.items():
            if options.only and not any(part in name for part in options.only):
                continue
            plan = {key: value for key, value in arm.items() if key not in ("slow", "call")}
            low = pairs.low[: options.slow_images] if arm.get("slow") else pairs.low
            began = time.perf_counter()
            images = enlarge(pipeline, low, options.batch_size, options.seed, plan=plan, **arm.get("call", {}))
            seconds = (time.perf_counter() - began) / len(low)
            row = {"model": model, "name": name, "plan": plan, "calls": pipeline.num_timesteps}
            rows.append({**row, "seconds_an_image": seconds, **pairs.scores(images)})
            print(f"{model}, {name}: {rows[-1]['psnr']:.2f} dB, LPIPS {rows[-1]['lpips']:.4f}", flush=True)
            if options.grids:
                shown = [part[: len(images)][:8] for part in (pairs.low, bicubic, images, pairs.truth)]
                write_rows(shown, Path(options.grids) / f"{model}-{name}.png")
        found[model] = {
            "hash": scoring.model_hash(folder),
            "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
            "training": training_of(folder),
            "train_steps": train_steps,
            "residual_scale": pipeline.scheduler.config.residual_scale,
        }
    return {
        "bench": "residual_sr",
        "arms": options.arms,
        "title": options.title,
        "factor": factor,
        "size": size,
        "images": options.images,
        "slow_images": options.slow_images,
        "batch_size": options.batch_size,
        "lpips": options.lpips,
        "seed": options.seed,
        "models": found,
        **pairs.scorer.description,
        **report.surroundings(options.threads),
        "rows": rows,
    }


def table(result: dict) -> str:
    size, factor, slow = result["size"], result["factor"], result["slow_images"]
    lines = [
        f"{result['title']} x{factor}, {size // factor} to {size} pixels a side (bicubic), {result['images']} "
        f'held-out images, arms of all steps on the first {slow}, on which every row\'s "first {slow}" are; LPIPS '
        f"{result['lpips']}; consistency is the mean squared error at the input's size, x 1e-5; Fréchet distance of "
        f"{result['features']} features against {result['compared_with']['frechet']} others; finest octave is its "
        f"power, a share of theirs. Seed {result['seed']}, batches of {result['batch_size']}. {report.caption(result)}",
        "",
    ]
    trained = {name: model["training"] for name, model in result["models"].items() if model["training"]}
    if result["arms"] == "table":
        steps = sorted({value["steps"] for value in trained.values()})
        lines[0] += f" Each trained for {' or '.join(map(str, steps))} steps, minutes as in the table."
    lines += [
        "| model | steps | training, min | PSNR | SSIM | LPIPS [95 %] | consistency | Fréchet | finest octave | "
        f"first {slow}: PSNR, SSIM, LPIPS, consistency | s an image |",
        "|---" * 11 + "|",
    ]
    for row in result["rows"]:
        minutes = trained.get(row["model"], {}).get("minutes")
        few, whole = row["slow"], row["images"] > slow
        cells = ["-"] * 6
        if whole:
            cells[:4] = [
                f"{row['psnr']:.2f}",
                f"{row['ssim']:.3f}",
                "{:.3f} [{:.3f}, {:.3f}]".format(row["lpips"], *row["lpips_interval"]),
                f"{row['consistency']:.1f}",
            ]
            if "frechet" in row:
                cells[4], cells[5] = f"{row['frechet']:.0f}", f"{row['octaves'][-1]:.2f}"
        seconds = row["seconds_an_image"]
        lines.append(
            f"| {row['model']} | {row['name']} | {'-' if minutes is None else f'{minutes:.0f}'} | "
            f"{' | '.join(cells)} | "
            f"{few['psnr']:.2f}, {few['ssim']:.3f}, {few['lpips']:.3f}, {few['consistency']:.1f} | "
            f"{'-' if seconds is None else f'{seconds:.2f}'} |"
        )
    return "\n".join(lines)


def parser_for(doc: str) -> argparse.ArgumentParser:
    """With the flags that every bench of these models has."""
    parser = parser_of(doc, *SCORED, *LPIPS, "images", "batch_size", "seed", "title")
    parser.add_argument("--models", required=True, nargs="+", help="NAME=FOLDER of exported pipelines")
    parser.add_argument("--slow_images", type=int, default=16, help="of the images, by the arms of all steps")
    return parser


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--arms", default="table", choices=("table", "frontier"))
    parser.add_argument("--plans", help="JSON of few_steps.py")
    for name in ("only", "grids"):
        parser.add_argument(f"--{name}", **FLAGS[name])
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
