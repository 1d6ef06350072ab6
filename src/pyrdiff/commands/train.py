"""
Train a model on a folder of images. The same command run again resumes.

Example: pyrdiff train pddpm --train_data_dir my_images --minutes 60 -o runs/mine
"""

from dataclasses import fields

from pyrdiff.cli import announce, parse
from pyrdiff.commands.paths import check_paths
from pyrdiff.plugins import Method, find, methods, plugins


def main(args: list[str]) -> dict | None:
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: pyrdiff train METHOD [flags]\n{__doc__}")
        for name, method in methods().items():
            print(f"  {name.replace('_', '-'):<13} {method.summary}")
        for plugin in plugins():
            if plugin.error is not None:
                print(f"  {plugin.name:<14}failed to load (pyrdiff plugins says why)")
        print("\npyrdiff train METHOD --help lists the flags.")
        return None
    if args[0].startswith("-"):
        raise ValueError(f"pyrdiff train {args[0]}: expected a method first, one of {sorted(methods())}")
    method = find(args[0])
    settings = parse(method.settings, describe(args[0], method), args[1:], prog=f"pyrdiff train {args[0]}")
    check_paths(settings, images=["train_data_dir"])
    length = f"{settings.max_train_steps:,} steps" if settings.minutes is None else f"{settings.minutes:g} minutes"
    images, sizes = settings.train_data_dir or settings.dataset_name, ", ".join(map(str, settings.resolution))
    announce(
        f"{args[0]} on {images} at {sizes}, {length}, in {settings.output_dir} "
        "(Ctrl-C saves a checkpoint; the same command goes on)"
    )
    from pyrdiff.training import loop

    folder = loop.train(method, settings)
    return {folder.name: str(folder)}


def describe(name: str, method: Method) -> str:
    """The text of a method's `--help`."""
    of = f"{name} runs/mine/pipeline" if "model" in {field.name for field in fields(method.settings)} else name
    return f"{method.summary}\n\nExample: pyrdiff train {of} --train_data_dir my_images --minutes 60 -o runs/{name}"
