"""
Fill a hole in a picture with a model of such pictures, which must have been trained with --noise_window 1.0:

    python examples/inpaint.py runs/mine/pipeline picture.png filled.png --box 16 16 48 48
"""

import argparse

import torch
from PIL import Image

import pyrdiff

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("picture")
parser.add_argument("output")
parser.add_argument("--box", nargs=4, type=int, default=[16, 16, 48, 48], help="left, top, right, bottom of the hole")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

inpaint = pyrdiff.load(options.model, pipeline_class="GuidedSRPipeline")
picture = Image.open(options.picture).convert("RGB" if inpaint.unet.config.image_channels == 3 else "L")
left, top, right, bottom = options.box
mask = torch.ones(picture.height, picture.width)
mask[top:bottom, left:right] = 0  # 1 where the picture is known
generator = torch.Generator().manual_seed(options.seed)
filled = inpaint(picture, scale_factor=1, refine_strength=1.0, mask=mask, generator=generator).images[0]
filled.save(options.output)
