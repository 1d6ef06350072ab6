"""
A training with classes: guidance by them and by an early average of the same run, everywhere and within an interval of
the noise, beside the same calls without; and averages of several lengths.

    python benchmarks/guidance.py train --images train_by_class --output runs/guidance --seed 0
    python benchmarks/guidance.py score --output runs/guidance --reference fashion_mnist.npz \
        --weights squeezenet.pth --result benchmarks/results/guidance.json

`--minutes` are minutes of processor time of the process. Whether an image is of the class that was asked for is what a
classifier says that was trained on the same images; its accuracy on the reference's test images is the ceiling. Both
go on where they were stopped.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report
import scoring
from pictures import write_grid

BATCH = 50  # samples at a time
LENGTHS = (0.05, 0.1, 0.2)
EARLY = 0.25  # share of the training at which the guide's average ends
GUIDE = 0.1  # its length
CLIP = {"thresholding": True, "sample_max_value": 1.0}
EIGHT = (0.301, 0.259, 0.22, 0.178, 0.14, 0.102, 0.06, 0.021)  # of the noise process: times of a refined level


class Arm(NamedTuple):
    """
    A way of sampling. `weights` are those of training or an average's length; `calls` "once" is the plan balanced and
    "twice" one of twice the calls; `guide` says whether guidance is by the early average.
    """

    title: str
    weights: str = "as trained"
    calls: str = "once"
    labels: bool = True
    scale: float = 1.0
    interval: tuple[float, float] | None = None
    guide: bool = False


ARMS = (
    Arm("classes"),
    Arm("classes", calls="twice"),
    *(Arm("classes, guided by them", scale=scale) for scale in (1.25, 1.5, 2.0, 3.0)),
    *(Arm("classes, guided by them", scale=2.0, interval=(low, high)) for low, high in ((0.0, 0.3), (0.1, 0.4))),
    *(Arm("classes, guided by the early average", scale=scale, guide=True) for scale in (1.25, 1.5, 2.0)),
    Arm("no classes", labels=False),
    Arm("no classes", labels=False, calls="twice"),
    *(Arm("no classes, guided by the early average", labels=False, scale=s, guide=True) for s in (1.25, 1.5, 2.0, 3.0)),
    *(Arm("classes", weights=f"{length:g}") for length in LENGTHS),
)


def train(options) -> Path:
    """One training, for some minutes of processor time."""
    import torch

    from pyrdiff.methods.pddpm import METHOD, PyramidalSettings
    from pyrdiff.training import loop

    torch.set_num_threads(1)
    settings = PyramidalSettings(
        train_data_dir=options.images,
        class_labels=True,
        keep_averages=True,
        image_channels=1,
        background=(0, 0, 0),
        output_dir=str(folder_of(options.output, options.seed)),
        cache_dir=str(Path(options.output) / "cache"),
        resolution=("8", "16", "32"),
        preset="tiny",
        train_batch_size=128,
        learning_rate=1e-3,
        random_flip=True,
        mixed_precision="no",
        minutes=options.minutes,
        save_images_steps=0,
        checkpointing_steps=300,
        seed=options.seed,
    )
    return loop.train(METHOD, settings, clock=time.process_time)


def folder_of(output: str, seed: int) -> Path:
    return Path(output) / f"seed-{seed}"


def arguments_of(arm: Arm, pipeline) -> dict:
    """Of the call: its plan and its guidance."""
    balanced = pipeline.config.plans["balanced"]
    plan = balanced
    if arm.calls == "twice":
        steps = pipeline.scheduler.config.num_train_timesteps
        low, start = balanced["spacing"][0], balanced["start_strength"]
        times = [min(steps - 1, round(steps * start * (1 - k / (2 * len(low))))) for k in range(2 * len(low))]
        higher = [round(share * steps) for share in EIGHT]
        plan = {**balanced, "spacing": [times, *[higher] * (len(balanced["spacing"]) - 1)]}
    guidance = {} if arm.interval is None else {"guidance_interval": list(arm.interval)}
    return {"plan": {**plan, "guidance_scale": arm.scale, **guidance}}


def name_of(arm: Arm) -> str:
    within = "" if arm.interval is None else f", within {arm.interval[0]:g} to {arm.interval[1]:g}"
    scale = f", scale {arm.scale:g}{within}" if arm.scale != 1 else ""
    weights = "" if arm.weights == "as trained" else f", average of length {arm.weights}"
    return f"{arm.title}{scale}{weights}{', twice the calls' if arm.calls == 'twice' else ''}"


def sample(pipeline, arm: Arm, count: int, path: Path, bf16: bool = False) -> np.ndarray:
    """uint8 [count, H, W, C], image k of class k modulo their number; those of earlier calls are found at `path`."""
    import torch

    names = list(pipeline.unet.config.class_names)
    images = list(np.load(path)) if path.exists() else []
    for first in range(len(images), count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        told = [names[number % len(names)] for number in numbers] if arm.labels else None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            part = pipeline(
                len(numbers), **arguments_of(arm, pipeline), classes=told, generator=scoring.generators(7, numbers),
                output_type="latent",
            )  # fmt: skip
        images.extend(scoring.to_uint8(part.images.float()))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".writing.npy"), np.stack(images))
        path.with_suffix(".writing.npy").replace(path)
    return np.stack(images[:count])


def at_size(reference: str, key: str, size: tuple[int, int]):
    """Images [N, C, H, W] in [0, 1] and labels [N] of an .npz, by the number of the class."""
    import torch

    from pyrdiff.data import ImageLevels, open_source

    pixels = ImageLevels.build(open_source(reference, array_key=key), [size], channels=1).arrays[-1][:]
    with np.load(reference) as arrays:
        labels = torch.from_numpy(arrays[key.replace("x_", "y_")].reshape(-1).astype(np.int64))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, labels


def judge_of(options, size: tuple[int, int]):
    """The classifier, and its accuracy on test images."""
    import torch

    from pyrdiff.metrics import Classifier, train_classifier

    path = Path(options.output) / "classifier.safetensors"
    if not path.is_file():
        images, labels = at_size(options.reference, "x_train", size)
        train_classifier(images, labels, data_range=(0, 1), epochs=options.epochs).save(path)
    classifier = Classifier.load(path)
    images, labels = at_size(options.reference, "x_test", size)
    told = torch.cat([classifier.predict(part, data_range=(0, 1)) for part in images.split(500)])
    return classifier, float((told == labels).double().mean())


def right(classifier, images: np.ndarray, classes: list[str], order: list[str]) -> float:
    """Share of the samples that the classifier takes for the class that was asked for; `order` are its classes."""
    import torch

    wanted = torch.tensor([order.index(classes[k % len(classes)]) for k in range(len(images))])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    told = torch.cat([classifier.predict(part, data_range=(0, 1)) for part in pixels.split(500)])
    return float((told == wanted).double().mean())


def with_weights(pipeline, run: Path, arm: Arm, trained: dict):
    """The pipeline as an arm has it: its weights, and its guide or none."""
    import copy

    from pyrdiff.training.snapshots import average, last_step

    state = pipeline.unet.state_dict()
    weights = trained if arm.weights == "as trained" else average(run, float(arm.weights), trained)
    pipeline.unet.load_state_dict({**state, **weights})
    guide = None
    if arm.guide:
        guide = copy.deepcopy(pipeline.unet)
        early = average(run, GUIDE, trained, int(EARLY * last_step(run)))
        guide.load_state_dict({**guide.state_dict(), **early})
    pipeline.register_modules(guide=guide)
    return pipeline


def score(options) -> dict:
    """Scores every arm of every seed; writes the result after each."""
    import torch

    import pyrdiff

    torch.set_num_threads(options.threads)
    result = {
        "bench": "guidance",
        "minutes": options.minutes,
        "count": options.count,
        "bf16": options.bf16,
        "seeds": {},
    }
    scorer = classifier = None
    for seed in options.seeds:
        run = folder_of(options.output, seed)
        pipeline = pyrdiff.load(run / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        top, names = pipeline.unet.config.resolutions[-1], list(pipeline.unet.config.class_names)
        if scorer is None:
            classifier, accuracy = judge_of(options, (top, top))
            scorer = scoring.Scorer(
                options.reference, "x_test", (top, top), 1, options.features, options.weights, torch.device("cpu"),
                0, 3000, 0, 200,
            )  # fmt: skip
            result |= {"classifier": classifier.record, "test_accuracy": accuracy, "compared": scorer.description}
        trained = {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}
        rows = result["seeds"][str(seed)] = {"steps": last_line(run)["step"], "arms": {}}
        for arm in ARMS:
            pipeline = with_weights(pipeline, run, arm, trained)
            key = name_of(arm)
            path = run / "samples" / f"{key.replace(', ', '_').replace(' ', '-')}.npy"
            images = sample(pipeline, arm, options.count, path, options.bf16)
            told = right(classifier, images, names, options.order or names) if arm.labels else None
            cost = pipeline.plan(**arguments_of(arm, pipeline)).nfe_eq
            rows["arms"][key] = {"arm": arm._asdict(), "nfe_eq": cost, "right": told, **scorer(images)}
            if options.grids:
                of_class = [images[k :: len(names)][:8] for k in range(len(names))]
                write_grid(np.concatenate(of_class), Path(options.grids) / f"seed {seed} {key}.png", columns=8)
            print(seed, key, {name: rows["arms"][key][name] for name in ("nfe_eq", "right", "frechet")}, flush=True)
            result |= {"features": options.features, **report.surroundings(options.threads, gpu=False)}
            report.write(result, options.result)
    return result


def last_line(run: Path) -> dict:
    return json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def table(result: dict, view: str = "guidance") -> str:
    """The ways of sampling, or with the view "averages" the lengths of averages; figures of each seed."""
    seeds, lengths = result["seeds"], view == "averages"
    steps = "/".join(str(rows["steps"]) for rows in seeds.values())
    lines = [
        f"{result['minutes']:g} minutes of one core a training ({steps} steps), seeds {', '.join(seeds)}; "
        f"{result['count']} samples an arm against {result['compared']['compared_with']['frechet']} test images, "
        f"{result['features']} features (not FID){', sampled in bfloat16' * result['bf16']}. The classifier has "
        f"{result['test_accuracy']:.1%} of the real test images right. {report.caption(result)}",
        "",
        "| sampled by | NFE-eq | right class | Fréchet [95 %], by seed | precision | recall |",
        "|---|---|---|---|---|---|",
    ]
    for key in next(iter(seeds.values()))["arms"]:
        rows = [values["arms"][key] for values in seeds.values() if key in values["arms"]]
        if lengths and not (rows[0]["arm"]["weights"] != "as trained" or key == name_of(ARMS[0])):
            continue
        if not lengths and rows[0]["arm"]["weights"] != "as trained":
            continue

        def each(form, rows=rows) -> str:
            return " · ".join(form(row) for row in rows)

        told = each(lambda row: f"{row['right']:.1%}") if rows[0]["right"] is not None else "-"
        distance = each(lambda row: "{:.0f} [{:.0f}, {:.0f}]".format(row["frechet"], *row["frechet_interval"]))
        kept = [each(lambda row, k=k: f"{row['precision_recall'][k]:.2f}") for k in (0, 1)]
        lines.append(f"| {key} | {rows[0]['nfe_eq']:.1f} | {told} | {distance} | {kept[0]} | {kept[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "score"):
        command = commands.add_parser(name)
        command.add_argument("--output", required=True, help="folder of the trainings")
        command.add_argument("--minutes", type=float, default=20, help="of processor time, a training")
        if name == "train":
            command.add_argument("--images", required=True, help="folder with a sub-folder for each class")
            command.add_argument("--seed", type=int, default=0)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    command.add_argument("--reference", required=True, help=".npz with x_train, y_train, x_test and y_test")
    command.add_argument("--order", nargs="+", help="the classes by their numbers in the reference")
    command.add_argument("--features", default="squeezenet")
    command.add_argument("--weights", help="of the feature network")
    command.add_argument("--epochs", type=int, default=4, help="of the classifier")
    command.add_argument("--count", type=int, default=500, help="samples an arm")
    command.add_argument("--bf16", action="store_true", help="sample in bfloat16")
    command.add_argument("--grids", help="folder for pictures")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--result", required=True)
    options = parser.parse_args()
    if options.command == "train":
        train(options)
    else:
        score(options)
        print(report.table_of(Path(options.result)))
        print(report.table_of(Path(options.result), "averages"))


if __name__ == "__main__":
    main()
