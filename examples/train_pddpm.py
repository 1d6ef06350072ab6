"""
Train Pyramidal DDPM on a folder of images:

    accelerate launch examples/train_pddpm.py --train_data_dir my_images --resolution 16 32 64 --minutes 60

Every part is in its own room: the flags, network, schedule and loss in `pyrdiff/methods/pddpm.py`, the loop in
`pyrdiff/training/loop.py`. The same command run again resumes.
"""

from pyrdiff.cli import parse, run
from pyrdiff.methods.pddpm import METHOD


def main(args: list[str]) -> dict:
    settings = parse(METHOD.settings, METHOD.summary, args)
    from pyrdiff.training.loop import train

    return {"pipeline": str(train(METHOD, settings))}


if __name__ == "__main__":
    run(main)
