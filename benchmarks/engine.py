"""
Trainings of one network that differ in what they draw, for the same time of one processor core, each sampled by the
plans that suit it:

    python benchmarks/engine.py train --train_data_dir faces/train --output runs/engine --arm full --seed 0
    python benchmarks/engine.py score --reference faces/test --train_data_dir faces/train --output runs/engine \
        --weights squeezenet.pth --result benchmarks/results/engine.json

`--minutes` are minutes of processor time of the process, so that a busy machine does not bend them. Both go on where
they were stopped: a training at its last checkpoint, the scoring after its last batch of samples.
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
LEVELS = ("16", "32", "64")

# What each arm trains on, beside the flags that all share.
ARMS = {
    "full": {"resolution": LEVELS[-1:]},
    "paper": {"resolution": LEVELS, "noise_window": 1.0, "level_share": (1, 1, 1)},
    "new": {"resolution": LEVELS},
}
SHARED = {
    "preset": "mini",
    "random_flip": True,
    "train_batch_size": 64,
    "learning_rate": 6e-4,
    "checkpointing_steps": 200,
    "save_images_steps": 0,
    "mixed_precision": "no",
    "prediction_type": "epsilon",
}


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
    flags = {**SHARED, **ARMS[options.arm]}
    if options.arm == "full":  # as many pixels a step as the others
        flags["train_batch_size"] = max(1, SHARED["train_batch_size"] * int(LEVELS[0]) ** 2 // int(LEVELS[-1]) ** 2)
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
    time.monotonic = time.process_time  # the clock of the loop's budget, from here on
    loop.train(METHOD, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--train_data_dir", required=True)
    training.add_argument("--output", required=True)
    training.add_argument("--arm", required=True, choices=ARMS)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--minutes", type=float, default=30.0, help="of processor time")
    options = parser.parse_args()
    train(options)


if __name__ == "__main__":
    main()
