"""Flags that several benches have, with one meaning and one default."""

import argparse
import os

FLAGS = {
    "model": dict(required=True, help="exported pipeline, a folder"),
    "reference": dict(required=True, help="images that the models have not seen: a folder, .npy or .npz"),
    "array_key": dict(help="array of an .npz reference"),
    "reference_images": dict(type=int, default=2000, help="real images to compare with, at most"),
    "features": dict(default="squeezenet", help="feature network of the scores, see pyrdiff.metrics"),
    "weights": dict(help="file of its weights"),
    "resamples": dict(type=int, default=100, help="of the bootstrap intervals"),
    "lpips": dict(default="squeeze", choices=("alex", "squeeze", "vgg"), help="network of LPIPS"),
    "lpips_weights": dict(help="file of its weights"),
    "images": dict(type=int, default=64, help="images of every arm"),
    "batch_size": dict(type=int, default=16, help="images at a time"),
    "runs": dict(type=int, default=5, help="timed runs of each arm, after one to warm up"),
    "only": dict(nargs="*", help="only arms whose name has one of these in it"),
    "grids": dict(help="folder for images to look at"),
    "title": dict(default="Images,", help="what the table says first"),
    "seed": dict(type=int, default=0),
    "threads": dict(type=int, default=os.cpu_count()),
    "output": dict(required=True, help="JSON to write"),
}
SCORED = ("reference", "array_key", "reference_images", "features", "weights", "resamples")
LPIPS = ("lpips", "lpips_weights")


def parser_of(doc: str, *names: str, **defaults: object) -> argparse.ArgumentParser:
    """
    A parser with flags of `FLAGS`; `threads` and `output` are always there.

    Args:
        doc: The bench's docstring.
        names: The flags.
        defaults: Further flags, with defaults of their own.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in dict.fromkeys((*names, *defaults, "threads", "output")):
        flag = {**FLAGS[name], **({"default": defaults[name]} if name in defaults else {})}
        parser.add_argument(f"--{name}", **flag)
    return parser
