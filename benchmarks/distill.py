"""
Pyramids distilled to one call or two above the lowest level, beside their teacher and a network of the full size alone:

    python benchmarks/distill.py train --teacher runs/engine/new-0/pipeline --train_data_dir faces/train \
        --output runs/distill --seed 0 --minutes 40
    python benchmarks/distill.py score --engine runs/engine --train_data_dir faces/train --held_out faces/test \
        --output runs/distill --weights squeezenet.pth --result benchmarks/results/distill.json

`--minutes` are minutes of processor time of the process. Both go on where they were stopped. Scored are the students
that are trained by then, with the teachers and full-size networks of `engine.py` that have the same seed; by SqueezeNet
features and by those of a classifier of ours (`classifier`), which no loss has seen.
"""

import argparse
import json
import time
from pathlib import Path

import engine
import numpy as np
import pictures
import report
import scoring

FLAGS = {
    "random_flip": True,
    "train_batch_size": 64,
    "checkpointing_steps": 200,
    "save_images_steps": 0,
    "mixed_precision": "bf16",
}
TEACHER = ("20 + 285 170 80 20, from colours", "20 + 200 60, from colours")
FULL = ("full size, SDE-DPM-Solver++ 20", "full size, SDE-DPM-Solver++ 20, from colours")
SHOWN = 16  # samples in a picture
EPOCHS = 4  # of the classifier


def teacher_with_plans(folder: Path, target: Path) -> Path:
    """The teacher, exported with the plans that the trainer writes today."""
    import pyrdiff
    from pyrdiff import hub
    from pyrdiff.methods import pddpm

    if not target.is_dir():
        pipeline = pyrdiff.load(folder)
        config, signal = pipeline.unet.config, pipeline.scheduler.alphas_cumprod.tolist()
        start = pddpm.start_strength(signal, (config.resolutions[0],) * 2)
        plans = pddpm.plans(len(signal), len(config.resolutions), start, config.noise_window)
        parts = {**pipeline.components, "plans": plans, "colors": pipeline.config.colors}
        hub.export(type(pipeline)(**parts), target)
    return target


def train(options) -> None:
    """Trains a student, or goes on with it; its pipeline is in OUTPUT/NAME-SEED/pipeline."""
    import torch

    from pyrdiff.data import ImageLevels, open_source
    from pyrdiff.methods.distill import METHOD, DistillSettings
    from pyrdiff.training import loop

    torch.set_num_threads(1)
    output = Path(options.output)
    folder = output / f"{options.name}-{options.seed}"
    if (folder / "pipeline").is_dir():
        print(f"{folder}: is trained", flush=True)
        return
    teacher = teacher_with_plans(Path(options.teacher), output / f"teacher-{options.seed}")
    settings = DistillSettings(
        model=str(teacher),
        train_data_dir=options.train_data_dir,
        output_dir=str(folder),
        cache_dir=str(output / "cache"),
        minutes=options.minutes,
        seed=options.seed,
        lpips_weights=options.lpips_weights,
        **{**FLAGS, **json.loads(options.flags)},
    )
    # The images are decoded before the clock of the run starts: the time is for the network.
    ImageLevels.build(open_source(options.train_data_dir), settings.sizes, channels=3, cache_dir=settings.cache_dir)
    loop.train(METHOD, settings, clock=time.process_time)


def label_of(name: str) -> int:
    """Of an image of UTKFace, whose names begin with age, gender and race: one of 30, with age in three parts."""
    age, gender, race = (int(part) for part in Path(name).name.split("_")[:3])
    return 10 * ((age > 12) + (age > 45)) + 5 * gender + min(race, 4)


def classify(options) -> None:
    """Trains the classifier whose features are the second scores."""
    import torch

    from pyrdiff.data import ImageLevels, open_source
    from pyrdiff.metrics import train_classifier

    images = ImageLevels.build(open_source(options.train_data_dir), [(options.size,) * 2], channels=3)
    pixels = torch.from_numpy(images.arrays[-1].copy()).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label_of(name) for name in images.names])
    found = train_classifier(torch.cat((pixels, pixels.flip(-1))), torch.cat((labels, labels)), epochs=EPOCHS)
    found.save(options.classifier)
    print(found.record)


def arms(options, seed: int) -> list[tuple[str, Path, str, dict]]:
    """(what it is, folder, name of the plan, plan) of what is trained with this seed."""
    import pyrdiff

    output, found = Path(options.output), []
    teacher, full = output / f"teacher-{seed}", Path(options.engine) / f"full-{seed}" / "pipeline"
    if teacher.is_dir():
        plans = engine.plans("new", pyrdiff.load(teacher))
        found += [("teacher", teacher, name, plans[name]) for name in TEACHER]
    if full.is_dir():
        plans = engine.plans("full", pyrdiff.load(full))
        found += [("full size only", full, name, plans[name]) for name in FULL]
    for folder in sorted(output.glob(f"*-{seed}/pipeline")):
        named = pyrdiff.load(folder).config.plans
        found += [(folder.parent.name.rpartition("-")[0], folder, name, plan) for name, plan in named.items()]
    return found


def score(options) -> dict:
    """Scores every plan of every arm; writes the result after each."""
    import torch

    import pyrdiff

    torch.set_num_threads(1)
    output, size = Path(options.output), (options.size,) * 2
    networks = {options.features: options.weights, "classifier": options.classifier}
    scorers = {
        name: scoring.Scorer(options.train_data_dir, None, size, 3, name, file, torch.device("cpu"), 0, 3000, 0, 200)
        for name, file in networks.items()
        if name != "classifier" or file
    }
    held_out = scoring.load_images(options.held_out, size, 3)
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    held_out = held_out[order[: options.count].numpy()]
    result = {
        "bench": "distill",
        "title": options.title,
        "flags": FLAGS,
        "precision": "bfloat16" if options.bf16 else "float32",
        "networks": {name: scorer.description for name, scorer in scorers.items()},
        "real": {name: scorer(held_out) for name, scorer in scorers.items()},
        "rows": [],
    }
    for seed in options.seeds:
        for arm, folder, name, plan in arms(options, seed):
            pipeline = pyrdiff.load(folder)
            pipeline.set_progress_bar_config(disable=True)
            path = output / "samples" / f"{arm}-{seed} {name}.npy".replace(" ", "_").replace("/", "-")
            images = engine.sample(pipeline, plan, options.count, path, options.bf16)
            pictures.write_grid(images[:SHOWN], path.with_suffix(".png"), 8)
            row = {"arm": arm, "seed": seed, "plan": name, "arguments": plan, **training_of(folder.parent)}
            row |= {"nfe_eq": pipeline.plan(plan=plan).nfe_eq, "model": scoring.model_hash(str(folder))}
            row |= {"scores": {name: scorer(images) for name, scorer in scorers.items()}}
            result["rows"].append(row)
            shown = " · ".join(f"{key} {value['frechet']:.0f}" for key, value in row["scores"].items())
            print(f"{arm} {seed}, {name} ({row['nfe_eq']:.2f} NFE-eq): {shown}", flush=True)
            result.update(report.surroundings(1, gpu=False))
            report.write(result, options.result)
    return result


def training_of(folder: Path) -> dict:
    """Steps and minutes of processor time, from the log of a training."""
    path = folder / "log.jsonl"
    if not path.exists():
        return {}
    last = [line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line][-1]
    return {"steps": last["step"], "minutes": last["seconds"] / 60}


def with_interval(score: dict) -> str:
    """A distance; with the interval, where one was drawn."""
    interval = "" if "frechet_interval" not in score else " [{:.0f}, {:.0f}]".format(*score["frechet_interval"])
    return f"{score['frechet']:.0f}{interval}"


def table(result: dict) -> str:
    """Every plan of every arm, the seeds side by side."""
    first = next(iter(result["networks"]))
    described = result["networks"][first]
    lines = [
        f"{result['title']} {result['real'][first]['images']} samples a plan against "
        f"{described['compared_with']['frechet']} training images, sampled in {result['precision']}; distances are not "
        f"FID. {report.caption(result)}",
        "",
        "| model | plan | NFE-eq | Fréchet [95 %], by seed | Fréchet, features of our classifier | KID | "
        "precision, recall | power an octave |",
        "|---" * 8 + "|",
    ]

    def line(model: str, plan: str, cost: str, scores: list[dict]) -> str:
        seen = [score[first] for score in scores]
        distance = " · ".join(with_interval(one) for one in seen)
        own = " · ".join(f"{score['classifier']['frechet']:.3g}" for score in scores if "classifier" in score) or "-"
        kid = " · ".join(f"{one['kid']:.3g}" for one in seen)
        both = " · ".join("{:.2f} {:.2f}".format(*one["precision_recall"]) for one in seen)
        power = " ".join(f"{value:.2f}" for value in np.mean([one["octaves"] for one in seen], 0))
        return f"| {model} | {plan} | {cost} | {distance} | {own} | {kid} | {both} | {power} |"

    groups = {}
    for row in result["rows"]:
        groups.setdefault((row["arm"], row["plan"]), []).append(row)
    for (arm, plan), rows in groups.items():
        steps = "/".join(str(row["steps"]) for row in rows if "steps" in row)
        scores = [row["scores"] for row in rows]
        lines.append(line(f"{arm} ({steps} steps)" if steps else arm, plan, f"{rows[0]['nfe_eq']:.2f}", scores))
    lines.append(line("held-out images", "-", "-", [result["real"]]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training, classifier, scored = (commands.add_parser(name) for name in ("train", "classifier", "score"))
    for command in (training, classifier, scored):
        command.add_argument("--train_data_dir", required=True)
    for command in (training, scored):
        command.add_argument("--output", required=True, help="folder of the trainings and samples")
    training.add_argument("--teacher", required=True, help="exported pipeline")
    training.add_argument("--name", default="student", help="of the arm")
    training.add_argument("--flags", default="{}", help="further flags of the distillation, as JSON")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--minutes", type=float, default=40.0, help="of processor time")
    training.add_argument("--lpips_weights", help="file of the network of LPIPS")
    for command in (classifier, scored):
        command.add_argument("--classifier", help="its file", required=command is classifier)
        command.add_argument("--size", type=int, default=64, help="of the images")
    scored.add_argument("--engine", required=True, help="folder of the trainings of engine.py")
    scored.add_argument("--held_out", required=True, help="images that were not trained on: what real ones score")
    scored.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    scored.add_argument("--count", type=int, default=500, help="samples a plan")
    scored.add_argument("--features", default="squeezenet")
    scored.add_argument("--weights", help="of the feature network")
    scored.add_argument("--bf16", action="store_true", help="sample in bfloat16")
    scored.add_argument("--title", default="Faces 16/32/64, `mini`;")
    scored.add_argument("--result", required=True, help="JSON to write")
    options = parser.parse_args()
    if options.command == "score":
        print(table(score(options)))
    else:
        {"train": train, "classifier": classify}[options.command](options)


if __name__ == "__main__":
    main()
