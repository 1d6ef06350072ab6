"""
Trainings of one network that differ in what they draw, for the same time of one processor core, each sampled by the
plans that suit it:

    python benchmarks/engine.py train --train_data_dir faces/train --output runs/engine --arm full --seed 0
    python benchmarks/engine.py score --train_data_dir faces/train --held_out faces/test --output runs/engine \
        --weights squeezenet.pth --result benchmarks/results/engine.json

`--minutes` are minutes of processor time of the process, so that a busy machine does not bend them. Both go on where
they were stopped: a training at its last checkpoint, the scoring after its last batch of samples. `score` takes the
arms that are trained by then.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import report
import scoring

CLIP = {"thresholding": True, "sample_max_value": 1.0}
SDE = ["DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **CLIP}]
ODE = ["DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **CLIP}]
UNIPC = ["UniPCMultistepScheduler", CLIP]
DDIM = ["DDIMScheduler", {"clip_sample": True}]
BATCH = 50  # samples at a time

STEPS = {
    "20 + 285 170 80 20": [285, 170, 80, 20],
    "20 + 285 200 130 70 25": [285, 200, 130, 70, 25],
    "20 + 250 120 30": [250, 120, 30],
    "20 + 200 60": [200, 60],
}  # times of each higher level

# The network and the levels, by the top size.
SIZES = {
    64: {"preset": "mini", "train_batch_size": 64, "resolution": ("16", "32", "64")},
    32: {"preset": "tiny", "train_batch_size": 128, "resolution": ("8", "16", "32")},
}
# What each arm trains on, beside the flags that all share.
ARMS = {
    "full": {},  # its last resolution only
    "paper": {"noise_window": 1.0, "level_share": (1, 1, 1)},
    "new": {},
}
TITLES = {
    "full": "full size only",
    "paper": "all times, levels 1:1:1",
    "new": "noise window .35, levels 1:2:6",
}
SHARED = {
    "random_flip": True,
    "learning_rate": 6e-4,
    "checkpointing_steps": 200,
    "save_images_steps": 0,
    "mixed_precision": "no",
    "prediction_type": "epsilon",
}


def plans(arm: str, pipeline) -> dict[str, dict]:
    """What an arm is sampled by: name -> arguments of a plan."""
    from pyrdiff.methods import pddpm

    top = pipeline.unet.config.resolutions[-1]
    signal, count = pipeline.scheduler.alphas_cumprod.tolist(), len(pipeline.unet.config.resolutions)
    full = {
        f"full size, {name}": {"resolutions": [top], "num_inference_steps": calls, "scheduler": scheduler}
        for name, calls, scheduler in (
            ("SDE-DPM-Solver++ 20", 20, SDE),
            ("DPM-Solver++ 20", 20, ODE),
            ("UniPC 20", 20, UNIPC),
            ("DDIM 50", 50, DDIM),
        )
    }
    sde = full["full size, SDE-DPM-Solver++ 20"]
    full["full size, SDE-DPM-Solver++ 20, from colours"] = {
        **sde,
        "start_strength": pddpm.start_strength(signal, (top, top)),
    }
    if arm == "full":
        return full
    from_noise = {
        "/".join(map(str, calls)): {"num_inference_steps": calls[0], "refine_steps": calls[1:], "scheduler": SDE}
        for calls in ([20, 3, 2], [20, 4, 4], [30, 4, 4])
    }
    low = pipeline.unet.config.resolutions[0]
    start = pddpm.start_strength(signal, (low, low))
    balanced = pddpm.plans(len(signal), count, start)["balanced"]
    from_colors = {
        f"{name}, from colours": {**balanced, "spacing": [balanced["spacing"][0], *[times] * (count - 1)]}
        for name, times in STEPS.items()
    }
    if arm == "paper":
        return {**from_noise, **from_colors, "full size, SDE-DPM-Solver++ 20": sde}
    return {**from_colors, **from_noise}


def flags_of(arm: str, size: int) -> dict:
    """The flags of a training; that at the full size alone sees as many pixels a step as the others."""
    flags = {**SHARED, **SIZES[size], **ARMS[arm]}
    if arm == "full":
        low, top = int(flags["resolution"][0]), int(flags["resolution"][-1])
        batch = max(1, flags["train_batch_size"] * low**2 // top**2)
        flags |= {"resolution": flags["resolution"][-1:], "train_batch_size": batch}
    return flags


def train(options) -> None:
    """Trains one arm, or goes on with it; its pipeline is in OUTPUT/ARM-SEED/pipeline."""
    import torch

    from pyrdiff.data import ImageLevels, open_source
    from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
    from pyrdiff.training import loop

    torch.set_num_threads(1)
    folder = Path(options.output) / f"{options.arm}-{options.seed}"
    if (folder / "pipeline").is_dir():
        print(f"{folder}: is trained", flush=True)
        return
    flags = flags_of(options.arm, options.size)
    settings = PyramidalSettings(
        train_data_dir=options.train_data_dir,
        output_dir=str(folder),
        cache_dir=str(Path(options.output) / "cache"),
        minutes=options.minutes,
        seed=options.seed,
        **flags,
    )
    # The images are decoded before the clock of the run starts: the time is for the network.
    source = open_source(options.train_data_dir)
    ImageLevels.build(source, settings.sizes, channels=3, cache_dir=settings.cache_dir)
    loop.train(METHOD, settings, clock=time.process_time)


def sample(pipeline, plan: dict, count: int, path: Path, bf16: bool):
    """The first `count` samples of a plan, uint8 [N, H, W, C]; those of earlier calls are found at `path`."""
    import torch

    images = list(np.load(path)) if path.exists() else []
    for first in range(len(images), count, BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            generator = torch.Generator().manual_seed(first)
            part = pipeline(BATCH, plan=plan, generator=generator, output_type="latent").images
        images.extend(scoring.to_uint8(part.float()))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".writing.npy"), np.stack(images))
        path.with_suffix(".writing.npy").replace(path)
    return np.stack(images[:count])


def color_spread(images) -> list[float]:
    """Standard deviation over images, uint8 [N, H, W, 3], of mean R - G and G - B, in [0, 1]: casts widen it."""
    red, green, blue = (images.mean((1, 2), dtype=np.float64) / 255).T
    return [float((red - green).std()), float((green - blue).std())]


def score(options) -> dict:
    """Scores every plan of the arms that are trained; writes the result after each."""
    import torch

    import pyrdiff

    torch.set_num_threads(options.threads)
    output, size, seeds = Path(options.output), (options.size,) * 2, options.seeds
    scorer = scoring.Scorer(
        options.train_data_dir, None, size, 3, options.features, options.weights, torch.device("cpu"), 0, 3000, 0, 200
    )
    held_out = scoring.load_images(options.held_out, size, 3)
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))  # names may sort them by content
    held_out = held_out[order[: options.count].numpy()]
    result = {
        "bench": "engine",
        "minutes": options.minutes,
        "shared": {**SHARED, **SIZES[options.size]},
        "precision": "bfloat16" if options.bf16 else "float32",
        **scorer.description,
        "real": {**scorer(held_out), "color_spread": color_spread(held_out)},
        "rows": [],
    }
    arms = options.only or ARMS
    for arm, seed in ((arm, seed) for seed in seeds for arm in arms):
        folder = output / f"{arm}-{seed}"
        if not (folder / "pipeline").is_dir():
            continue
        pipeline = pyrdiff.load(folder / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        steps = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
        for name, plan in plans(arm, pipeline).items():
            if options.plans and not any(part in name for part in options.plans):
                continue
            path = output / "samples" / f"{arm}-{seed} {name}.npy".replace(" ", "_").replace("/", "-")
            images = sample(pipeline, plan, options.count, path, options.bf16)
            row = {
                "arm": arm,
                "seed": seed,
                "flags": ARMS[arm],
                "steps": steps,
                "plan": name,
                "arguments": plan,
                "nfe_eq": pipeline.plan(plan=plan).nfe_eq,
                "model": scoring.model_hash(str(folder / "pipeline")),
                **scorer(images),
                "color_spread": color_spread(images),
            }
            result["rows"].append(row)
            shown = f"{row['frechet']:.0f}, KID {row['kid']:.0f}, colours {np.round(row['color_spread'], 3)}"
            print(f"{arm} {seed}, {name} ({row['nfe_eq']:.2f} NFE-eq): {shown}", flush=True)
            write(result, options)
    return result


def write(result: dict, options) -> None:
    result.update(report.surroundings(options.threads, gpu=False))
    report.write(result, options.result)


def table(result: dict) -> str:
    """Every plan of every arm, the seeds side by side."""
    data, minutes = result["real"], result["minutes"]
    lines = [
        f"{minutes:g} minutes of one core a training, `{result['shared']['preset']}`; {data['images']} samples a "
        f"plan against {result['compared_with']['frechet']} training images, {result['features']} features (not FID), "
        f"sampled in {result['precision']}. {report.caption(result)}",
        "",
        "| training | plan | NFE-eq | Fréchet [95 %], by seed | KID, by seed | spread of R-G, G-B | power an octave |",
        "|---|---|---|---|---|---|---|",
    ]

    def line(arm: str, plan: str, cost: str, rows: list[dict]) -> str:
        distance = " · ".join("{:.0f} [{:.0f}, {:.0f}]".format(r["frechet"], *r["frechet_interval"]) for r in rows)
        kid = " · ".join(f"{row['kid']:.3g}" for row in rows)
        colors = " · ".join("{:.3f} {:.3f}".format(*row["color_spread"]) for row in rows)
        power = " ".join(f"{value:.2f}" for value in np.mean([row["octaves"] for row in rows], 0))
        return f"| {arm} | {plan} | {cost} | {distance} | {kid} | {colors} | {power} |"

    groups = {}
    for row in result["rows"]:
        groups.setdefault((row["arm"], row["plan"]), []).append(row)
    order = [*ARMS, *(row["arm"] for row in result["rows"])]
    for (arm, plan), rows in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        steps = "/".join(str(row["steps"]) for row in rows)
        lines.append(line(f"{TITLES.get(arm, arm)} ({steps} steps)", plan, f"{rows[0]['nfe_eq']:.1f}", rows))
    lines.append(line("held-out images", "-", "-", [data]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training, scored = commands.add_parser("train"), commands.add_parser("score")
    for command in (training, scored):
        command.add_argument("--train_data_dir", required=True)
        command.add_argument("--output", required=True, help="folder of the trainings and samples")
        command.add_argument("--size", type=int, default=64, choices=SIZES, help="of the top level")
        command.add_argument("--minutes", type=float, default=30.0, help="of processor time, a training")
    training.add_argument("--arm", required=True, choices=ARMS)
    training.add_argument("--seed", type=int, default=0)
    scored.add_argument("--held_out", required=True, help="images that were not trained on: what real ones score")
    scored.add_argument("--only", nargs="+", choices=ARMS, help="these arms")
    scored.add_argument("--plans", nargs="+", help="those with one of these in their names")
    scored.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    scored.add_argument("--count", type=int, default=1000, help="samples a plan")
    scored.add_argument("--features", default="squeezenet")
    scored.add_argument("--weights", help="of the feature network")
    scored.add_argument("--threads", type=int, default=1)
    scored.add_argument("--bf16", action="store_true", help="sample in bfloat16")
    scored.add_argument("--result", required=True, help="JSON to write")
    options = parser.parse_args()
    if options.command == "train":
        train(options)
    else:
        print(table(score(options)))


if __name__ == "__main__":
    main()
