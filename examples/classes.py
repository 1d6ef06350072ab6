"""
A model with classes: each sub-folder of the images is one.

    python examples/classes.py my_images runs/classes --minutes 60

Writes a picture with a row for each class, drawn with guidance.
"""

import argparse

from diffusers.utils import make_image_grid

import pyrdiff
from pyrdiff.plugins import find
from pyrdiff.training.loop import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images")
parser.add_argument("output")
parser.add_argument("--minutes", type=float, default=60)
parser.add_argument("--resolution", nargs="+", default=["16", "32", "64"])
parser.add_argument("--preset", default="mini")
options = parser.parse_args()

method = find("pddpm")
settings = method.settings(
    train_data_dir=options.images,
    output_dir=options.output,
    resolution=tuple(options.resolution),
    minutes=options.minutes,
    preset=options.preset,
    learning_rate=6e-4,
    class_labels=True,
)
pipeline = pyrdiff.load(train(method, settings))
names = pipeline.unet.config.class_names
images = pipeline(classes=[name for name in names for _ in range(8)], guidance_scale=2.0, plan="fast").images
make_image_grid(images, len(names), 8).save(f"{options.output}/classes.png")
