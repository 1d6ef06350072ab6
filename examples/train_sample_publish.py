"""
From a folder of images to a repository on the Hub, in Python:

    python examples/train_sample_publish.py my_images runs/mine --minutes 60 --repository user/name

Without --repository nothing is published. The sub-folder `pipeline` of the run holds the model.
"""

import argparse

import pyrdiff
from pyrdiff.plugins import find
from pyrdiff.training.loop import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images")
parser.add_argument("output")
parser.add_argument("--minutes", type=float, default=60)
parser.add_argument("--resolution", nargs="+", default=["16", "32", "64"])
parser.add_argument("--preset", default="mini")
parser.add_argument("--repository")
options = parser.parse_args()

method = find("pddpm")
settings = method.settings(
    train_data_dir=options.images,
    output_dir=options.output,
    resolution=tuple(options.resolution),
    minutes=options.minutes,
    preset=options.preset,
    learning_rate=6e-4,
)
model = train(method, settings)  # the same call again goes on where it was stopped

pipeline = pyrdiff.load(model)
for number, image in enumerate(pipeline(4, plan="fast").images):
    image.save(f"{options.output}/sample-{number}.png")
if options.repository:
    pyrdiff.hub.push(model, options.repository, license="apache-2.0")  # the licence of your images decides
