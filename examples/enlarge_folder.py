"""
Enlarge every picture of a folder, in Python, with a model that was trained to enlarge or to generate:

    python examples/enlarge_folder.py runs/mine/pipeline photos larger --scale_factor 4

`pyrdiff upscale` does more: it keeps alpha, EXIF and colour profiles, and goes on where it was stopped.
"""

import argparse
from pathlib import Path

from PIL import Image

import pyrdiff
from pyrdiff.data import list_images
from pyrdiff.hub.enlarging import enlarging

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("pictures", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--scale_factor", type=int, default=2)
options = parser.parse_args()

enlarge = enlarging(pyrdiff.load(options.model))
options.output.mkdir(parents=True, exist_ok=True)
for path in list_images(options.pictures):
    picture = Image.open(path).convert("RGB" if enlarge.unet.config.image_channels == 3 else "L")
    result = enlarge(picture, scale_factor=options.scale_factor)
    result.images[0].save(options.output / f"{path.stem}.png")
    print(f"{path.name}: made smaller again, it differs from the input by {result.consistency.item():.4f}")
