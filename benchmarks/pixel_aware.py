"""
Quality against time of models that generate (paper X, tables 1 and 2): pixel-aware models by 1, 2, 4 ... passes beside
diffusion models of the same data by stock samplers, all on the same real images, in one run.

    python benchmarks/pixel_aware.py --models "pixel-aware:0=runs/x/pipeline" "DDPM:0=runs/pddpm/pipeline" ... \
        --reference test_images --train train_images --output benchmarks/results/mine.json

A model is METHOD:SEED=FOLDER; models of one METHOD are one row of each table. What an exported folder is run with
follows from its class: a `ParallelTrajectoryPipeline` with structure by passes, without one (EDM's preconditioning) as
the many-step sampler that it then is, in mode "paper" by algorithm 1 from N(0, I); a `PyramidalPipeline` of one
resolution by DDPM, DDIM and DPM-Solver++.
"""

import inspect
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import diffusers
import numpy as np
import report
import residual_sr
import scoring
import torch
from diffusers import DiffusionPipeline
from flags import SCORED, parser_of
from pictures import write_grid
from samplers import Sampler
from torch.utils.flop_counter import FlopCounterMode

import pyrdiff
from pyrdiff.data import ImageLevels, open_source
from pyrdiff.machine import in_turn

PASSES = (1, 2, 4, 8, 16)
NO_STRUCTURE = (1, 4, 8, 16, 32, 100)
STOCK = {
    "DDPM 100, trailing": ("DDPMScheduler", {"timestep_spacing": "trailing"}, 100),
    "DDIM 50, trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}, 50),
    "DDIM 10, trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}, 10),
    "DPM-Solver++ 20": ("DPMSolverMultistepScheduler", {}, 20),
    "DPM-Solver++ 10": ("DPMSolverMultistepScheduler", {}, 10),
    "DPM-Solver++ 10, log-SNR": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, 10),
    "SDE-DPM-Solver++ 20": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 20),
}


class Arm(NamedTuple):
    """A way of sampling a model: its network calls, and f(count, generator) -> [count, C, H, W] in [-1, 1]."""

    method: str
    seed: int
    name: str
    pipeline: DiffusionPipeline
    calls: int
    sample: Callable[[int, torch.Generator], torch.Tensor]


def arms_of(pipeline) -> dict[str, tuple]:
    """{name: (network calls, f(count, generator) -> float [count, C, H, W] in [-1, 1], not clipped)}."""
    if not hasattr(pipeline.scheduler, "precondition"):
        found = {}
        for name, (kind, changes, steps) in STOCK.items():
            settings, arguments = {"_class_name": kind, **changes}, {"num_inference_steps": steps}
            arm = {"loop": "stock", "scheduler": settings, "arguments": arguments}
            found[name] = (steps, Sampler(arm, pipeline, pipeline.unet))
        return found

    def by_passes(passes, **more):
        def sample(count, generator):
            found = pipeline(count, num_passes=passes, generator=generator, output_type="latent", **more).images
            return 2 * pipeline.scheduler.from_range(found) - 1

        return passes, sample

    def structure(count, generator):
        structure = pipeline.autoencoder.decode(pipeline.autoencoder.sample_prior(count, generator=generator))
        return 2 * pipeline.scheduler.from_range(structure) - 1

    def normal_prior(count, generator):
        latents = pipeline.autoencoder.sample_prior(count, generator=generator, prior="normal")
        found = pipeline(latents=latents, generator=generator, output_type="latent").images
        return 2 * pipeline.scheduler.from_range(found) - 1

    def algorithm_1(count, generator):
        size, total = (pipeline.unet.config.image_channels, *pipeline._size()), len(pipeline.scheduler)
        noise = torch.randn((count, *size), generator=generator, device=generator.device)
        found = pipeline(image=noise, timestep=total, mode="paper", generator=generator, output_type="latent").images
        return 2 * pipeline.scheduler.from_range(found).nan_to_num(0.5).clamp(-10, 10) - 1

    if pipeline.scheduler.config.mode == "paper":
        return {"algorithm 1 from N(0, I)": (1, algorithm_1)}
    if pipeline.autoencoder is None:
        found = {f"its own step, {passes}": by_passes(passes) for passes in NO_STRUCTURE}
        found |= {f"its own step, {passes}, eta 0": by_passes(passes, eta=0.0) for passes in (8, 16)}
        for name, (kind, changes, steps) in STOCK.items():
            found[name] = (steps, StockSampler(pipeline, kind, changes, steps))
        return found
    found = {"structure only": (0, structure)}
    found.update({f"{passes} pass{'es' * (passes > 1)}": by_passes(passes) for passes in PASSES})
    total = len(pipeline.scheduler)
    found[f"2 passes, at {total} and {total // 4}"] = (2, by_passes(1, timesteps=[total, total // 4])[1])
    return {**found, "4 passes, eta 0": by_passes(4, eta=0.0), "1 pass, prior N(0, I)": (1, normal_prior)}


class StockSampler:
    """A scheduler of diffusers on a network without structure, whose process has one rate and so is an ordinary one."""

    def __init__(self, pipeline, kind: str, changes: dict, steps: int):
        process = pipeline.scheduler
        rate = process.rate(torch.full((1,), pipeline.NO_STRUCTURE, dtype=torch.float64))
        log = torch.cat([process.log_alpha_bar(rate, step) for step in range(len(process) + 1)])
        betas = -torch.expm1(log[1:] - log[:-1])
        known = dict(trained_betas=betas.numpy(), num_train_timesteps=len(process), prediction_type="sample")
        known |= {"clip_sample": False} if kind in ("DDPMScheduler", "DDIMScheduler") else {}
        self.scheduler = getattr(diffusers, kind)(**known, **changes)
        self.pipeline, self.steps = pipeline, steps

    def __call__(self, count: int, generator):
        pipeline, process, scheduler = self.pipeline, self.pipeline.scheduler, self.scheduler
        scheduler.set_timesteps(self.steps)
        shape = (count, pipeline.unet.config.image_channels, *pipeline._size())
        structure = torch.full(shape, pipeline.NO_STRUCTURE, device=pipeline.unet.device)
        sample = process.prior_sample(structure, generator)
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for timestep in scheduler.timesteps:
            step = int(timestep) + 1
            network_input, skip, scale = process.precondition(sample, step, structure)
            clean = (skip + scale * pipeline.unet(network_input, step).sample).clamp(process.config.epsilon, 1)
            sample = scheduler.step(clean, timestep, sample, **extra).prev_sample
        return 2 * process.from_range(sample) - 1


def parse_models(options) -> dict[tuple[str, int], str]:
    found = {}
    for text in options.models:
        name, _, folder = text.partition("=")
        method, _, seed = name.rpartition(":")
        if not folder or not method or not seed.isdecimal():
            raise SystemExit(f"--models: got {text!r}; expected METHOD:SEED=FOLDER")
        found[method, int(seed)] = folder
    return found


def multiplications(work) -> float:
    """Multiply-adds of all network parts that a call runs."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def call_once(pipeline, shape) -> None:
    """One call of a pipeline's UNet for an image [C, H, W]; for one step, where it predicts nothing else."""
    config, blank = pipeline.unet.config, torch.zeros(1, *shape, device=pipeline.unet.device)
    arguments = {"structure": blank} if config.get("use_structure") else {}
    arguments |= {"steps": [1]} if config.get("target") == "noise" else {}
    pipeline.unet(blank, torch.ones(1, device=blank.device), **arguments)


def nearest(images, real, batch: int = 200):
    """RMS difference per value, in [0, 1], of each of uint8 [N, H, W, C] to the nearest of `real`."""
    real = torch.from_numpy(real).flatten(1).float() / 255
    found = []
    for part in torch.from_numpy(images).flatten(1).float().div(255).split(batch):
        found.append(torch.cdist(part, real).amin(1) / part.shape[1] ** 0.5)
    return torch.cat(found)


def open_arms(options, device: str) -> tuple[list[Arm], dict]:
    """The arms of all models that were asked for, and what is said of each model."""
    arms, models = [], {}
    for (method, seed), folder in parse_models(options).items():
        pipeline = pyrdiff.load(folder).to(device)
        pipeline.set_progress_bar_config(disable=True)
        for name, (calls, sample) in arms_of(pipeline).items():
            if not options.only or any(part in f"{method}, {name}" for part in options.only):
                arms.append(Arm(method, seed, name, pipeline, calls, sample))
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        models[f"{method}:{seed}"] = {
            "hash": scoring.model_hash(folder),
            "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
            "training": residual_sr.training_of(folder),
        }
    if not arms:
        raise SystemExit(f"--only={options.only}: expected a part of some 'METHOD, ARM'")
    return arms, models


def train_images(options, size: tuple[int, int], channels: int) -> np.ndarray:
    """Some of the images that the models were trained on, uint8 [N, H, W, C]."""
    source = open_source(options.train, array_key=options.train_key)
    images = ImageLevels.build(source, [size], channels=channels).arrays[-1]
    count = min(len(images), options.train_images)
    return images[np.unique(np.linspace(0, len(images) - 1, count).astype(int))]


@torch.no_grad()
def samples(arm: Arm, options, device: str) -> np.ndarray:
    """Images of an arm, uint8 [N, H, W, C]: fewer of one that takes many calls. A batch has one generator."""
    count = options.images if arm.calls <= options.slow_calls else options.slow_images

    def make(indices: range) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(options.seed * 1_000_000 + indices.start)
        return arm.sample(len(indices), generator)

    return scoring.to_uint8(scoring.in_batches(make, count, options.batch_size))


@torch.no_grad()
def time_arms(arms: list[Arm], options, device: torch.device) -> dict[tuple, float]:
    """{(method, name, batch): seconds an image}; the networks of one method and different seeds do the same work."""
    distinct = {(arm.method, arm.name): arm for arm in arms}

    def run(arm: Arm, batch: int, turn: int) -> None:
        arm.sample(batch, torch.Generator(device).manual_seed(turn + 1))

    works = {
        (*key, batch): partial(run, arm, batch) for key, arm in distinct.items() for batch in (1, options.time_batch)
    }
    fewer = {key: 1 for key in works if distinct[key[:2]].calls > options.slow_calls and options.runs > 1}
    seconds = in_turn(works, options.runs, device, fewer)
    return {key: statistics.median(values) / key[2] for key, values in seconds.items()}


def measure(options) -> dict:
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arms, models = open_arms(options, device)
    shape = arms[0].sample(1, torch.Generator(device).manual_seed(0)).shape
    channels, size = shape[1], tuple(shape[-2:])
    scorer = scoring.Scorer.of(options, size, channels, device, held=options.held)
    real = train_images(options, size, channels)
    distances = nearest(scorer.held, real)
    near = distances.quantile(0.01).item()  # nearer than 99 % of unseen images are

    rows = [{"method": "held-out images", "seed": None, "name": "", "calls": None, **scorer(scorer.held)}]
    rows[0]["nearest"], rows[0]["copies"] = distances.mean().item(), 0.01
    seconds = time_arms(arms, options, torch.device(device))
    for arm in arms:
        images = samples(arm, options, device)
        distances = nearest(images, real)
        with torch.no_grad():
            macs = multiplications(partial(arm.sample, 1, torch.Generator(device).manual_seed(0)))
            one = multiplications(partial(call_once, arm.pipeline, shape[1:]))
        row = {"method": arm.method, "seed": arm.seed, "name": arm.name, "calls": arm.calls}
        row |= {"nfe_eq": macs / one, "macs": macs, **scorer(images)}
        row |= {"nearest": distances.mean().item(), "copies": (distances < near).float().mean().item()}
        row["seconds"] = seconds[arm.method, arm.name, options.time_batch]
        row["seconds_alone"] = seconds[arm.method, arm.name, 1]
        rows.append(row)
        print(f"{arm.method}:{arm.seed}, {arm.name}: Fréchet {row['frechet']:.1f}, {macs / one:.2f} NFE-eq", flush=True)
        if options.grids:
            write_grid(images[:64], f"{options.grids}/{arm.method}-{arm.seed}-{arm.name}.png", columns=8)
    return {
        "bench": "pixel_aware",
        "title": options.title,
        "size": list(size),
        "images": options.images,
        "slow": [options.slow_calls, options.slow_images],
        "runs": options.runs,
        "time_batch": options.time_batch,
        "train_images": len(real),
        "seed": options.seed,
        "models": models,
        **scorer.description,
        **report.surroundings(options.threads),
        "rows": rows,
    }


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def grouped(result: dict) -> dict[tuple, list[dict]]:
    """Rows of all seeds by (method, arm)."""
    found: dict[tuple, list[dict]] = {}
    for row in result["rows"][1:]:
        found.setdefault((row["method"], row["name"]), []).append(row)
    return found


def table(result: dict) -> str:
    slow_calls, slow_images = result["slow"]
    lines = [
        f"{result['title']} {result['size'][0]}x{result['size'][1]}, {result['images']} samples an arm and seed "
        f"({slow_images} of arms with more than {slow_calls} calls, whose Fréchet distance is then biased up); Fréchet "
        f"distance, precision and recall of {result['features']} features against "
        f"{result['compared_with']['frechet']} unseen images: the mean over seeds and each seed's value. NFE-eq: "
        "multiply-adds of everything run, over those of one call of the row's own UNet. Nearest: RMS difference of a "
        f"sample to the nearest of {result['train_images']} training images; copies: the share of samples nearer than "
        f"99 % of unseen images are. Seconds an image, the median of {result['runs']} turns through all arms, in "
        f"batches of {result['time_batch']} and alone. Seed {result['seed']}. {report.caption(result)}",
        "",
        "| model | sampled by | calls | NFE-eq | Fréchet | precision, recall | nearest | copies | s an image | alone |",
        "|---" * 10 + "|",
    ]
    held = result["rows"][0]
    lines.append(
        f"| unseen images | | | | {digits(held['frechet'])} | {held['precision_recall'][0]:.2f}, "
        f"{held['precision_recall'][1]:.2f} | {held['nearest']:.3f} | {held['copies']:.2f} | | |"
    )
    for (method, name), rows in grouped(result).items():

        def mean(key, rows=rows):
            return statistics.mean(row[key] for row in rows)

        values = ", ".join(digits(row["frechet"]) for row in rows)
        each = f" ({values})" if len(rows) > 1 else ""
        sides = [statistics.mean(row["precision_recall"][k] for row in rows) for k in (0, 1)]
        lines.append(
            f"| {method} | {name} | {rows[0]['calls']} | {mean('nfe_eq'):.2f} | {digits(mean('frechet'))}{each} | "
            f"{sides[0]:.2f}, {sides[1]:.2f} | {mean('nearest'):.3f} | {mean('copies'):.2f} | {mean('seconds'):.4f} | "
            f"{mean('seconds_alone'):.4f} |"
        )
    lines += ["", "| model | parameters | training: steps, images seen, minutes |", "|---|---|---|"]
    for name, model in result["models"].items():
        sizes = " + ".join(f"{part} {count / 1e6:.2f}M" for part, count in model["parameters"].items())
        trained = model["training"]
        shown = f"{trained['steps']}, {trained['images']}, {trained['minutes']:.0f}" if trained else "-"
        lines.append(f"| {name} | {sizes} | {shown} |")
    return "\n".join(lines)


def plot(result: dict, path) -> None:
    """Fréchet distance against seconds an image, a curve for each method, its seeds as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    found = grouped(result)
    for method in dict.fromkeys(method for method, _ in found):
        arms = [rows for (m, n), rows in found.items() if m == method and rows[0]["calls"] and "prior" not in n]
        arms.sort(key=lambda rows: rows[0]["seconds"])
        line = axes.plot(
            [1000 * statistics.mean(row["seconds"] for row in rows) for rows in arms],
            [statistics.mean(row["frechet"] for row in rows) for rows in arms],
            label=method,
        )[0]
        points = [(1000 * row["seconds"], row["frechet"]) for rows in arms for row in rows]
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color(), markersize=3)
    axes.axhline(result["rows"][0]["frechet"], color="gray", linestyle=":", label="unseen images")
    axes.set(
        xscale="log", yscale="log", xlabel="milliseconds an image", ylabel=f"Fréchet distance, {result['features']}"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = parser_of(
        __doc__, *SCORED, "only", "grids", "title", "seed",
        reference_images=9000, resamples=20, images=1000, batch_size=100, runs=3,
    )  # fmt: skip
    parser.add_argument("--models", required=True, nargs="+", help="METHOD:SEED=FOLDER of exported pipelines")
    parser.add_argument("--train", required=True, help="images that they were trained on")
    parser.add_argument("--train_key", help="array of an .npz of those")
    parser.add_argument("--train_images", type=int, default=20_000, help="of them, at most, for nearest neighbours")
    parser.add_argument("--slow_calls", type=int, default=20, help="calls above which an arm makes --slow_images only")
    parser.add_argument("--slow_images", type=int, default=300)
    parser.add_argument("--held", type=int, default=1000, help="real images scored like samples")
    parser.add_argument("--time_batch", type=int, default=16)
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
