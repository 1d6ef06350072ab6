"""
Distil a pyramid, or a super-resolution model, into one that draws, or enlarges, in one network call or two:

    accelerate launch examples/train_distill.py runs/mine/pipeline --train_data_dir my_images --minutes 40

Every part is in its own room: the flags in `pyrdiff/methods/distill.py`, the losses and plans in `distill_pyramid.py`
and `distill_residual_sr.py` beside it, the loop in `pyrdiff/training/loop.py`. The same command run again resumes.
"""

from pyrdiff.cli import parse, run
from pyrdiff.methods.distill import METHOD


def main(args: list[str]) -> dict:
    settings = parse(METHOD.settings, METHOD.summary, args)
    from pyrdiff.training.loop import train

    return {"pipeline": str(train(METHOD, settings))}


if __name__ == "__main__":
    run(main)
