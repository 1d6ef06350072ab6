"""
Make a trained model draw, or enlarge, in one or two network calls. The same command run again resumes.

Example: pyrdiff distill runs/mine/pipeline --train_data_dir my_images --minutes 40 -o runs/quick
"""

from pyrdiff.cli import announce, parse
from pyrdiff.commands.paths import check_paths
from pyrdiff.methods.distill import METHOD, DistillSettings


def main(args: list[str]) -> dict | None:
    if not {"-h", "--help"} & set(args):
        announce("reading the model that is to be distilled, whose settings are those of its student")
    settings = parse(DistillSettings, __doc__, args, prog="pyrdiff distill")
    check_paths(settings, images=["train_data_dir"])
    from pyrdiff.training import loop

    return {"pipeline": str(loop.train(METHOD, settings))}
