"""
Train a model that generates in one network call (pixel-aware diffusion) on a folder of images:

    accelerate launch examples/train_pixel_aware.py --train_data_dir my_images --resolution 64 --minutes 60

An autoencoder of structures is trained first and its prior fitted, then the network; the same command run again resumes
where it was. The loss is in `pyrdiff/methods/pixel_aware.py`, with the autoencoder's and the flags in files beside
it, the loop in `pyrdiff/training/loop.py`.
"""

from pyrdiff.cli import parse, run
from pyrdiff.methods.pixel_aware import METHOD


def main(args: list[str]) -> dict:
    settings = parse(METHOD.settings, METHOD.summary, args)
    from pyrdiff.training.loop import train

    return {"pipeline": str(train(METHOD, settings))}


if __name__ == "__main__":
    run(main)
