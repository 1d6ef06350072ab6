r"""
Train super-resolution in one network call on a folder of photographs:

    accelerate launch examples/train_sr_one_call.py --train_data_dir my_photos --resolution 512 --patch_size 96 \
        --scale_factor 4 --minutes 60

The low-resolution images are made on the fly. The flags, network and loss are in `pyrdiff/methods/sr_one_call.py`, the
loop in `pyrdiff/training/loop.py`. The same command run again resumes.
"""

from pyrdiff.cli import parse, run
from pyrdiff.methods.sr_one_call import METHOD


def main(args: list[str]) -> dict:
    settings = parse(METHOD.settings, METHOD.summary, args)
    from pyrdiff.training.loop import train

    return {"pipeline": str(train(METHOD, settings))}


if __name__ == "__main__":
    run(main)
