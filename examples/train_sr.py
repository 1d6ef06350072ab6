"""
Train super-resolution (SR4) on a folder of images:

    accelerate launch examples/train_sr.py --train_data_dir my_images --resolution 64 --scale_factor 4 --minutes 60

The low-resolution images are made on the fly. Every part is in its own room: the flags, network, schedule and loss in
`pyrdiff/methods/sr.py`, the loop in `pyrdiff/training/loop.py`. The same command run again resumes.
"""

from pyrdiff.cli import parse, run
from pyrdiff.methods.sr import METHOD


def main(args: list[str]) -> dict:
    settings = parse(METHOD.settings, METHOD.summary, args)
    from pyrdiff.training.loop import train

    return {"pipeline": str(train(METHOD, settings))}


if __name__ == "__main__":
    run(main)
