"""
Write a model with adapters merged into it, as an ordinary folder.

Example: pyrdiff merge noto-emoji --adapter runs/food:0.7 -o runs/food_merged

The folder needs no peft, and is as quick as its base.
"""

import shlex
from dataclasses import dataclass

from pyrdiff.cli import announce, expect, parse
from pyrdiff.commands.paths import check_paths


@dataclass(kw_only=True)
class MergeSettings:
    """Flags of `pyrdiff merge`."""

    model: str
    """The base: exported folder, or a repository on the Hub; none of its code is run."""
    adapter: tuple[str, ...]
    """Adapters that were trained over it: folders or repositories, each perhaps with a weight, FOLDER:0.7."""
    output: str
    """Folder for the merged model: a new one, or an earlier export."""
    license: str | None = None
    """Licence identifier for its card, such as apache-2.0."""

    def __post_init__(self):
        expect(self, "adapter", len(self.adapter) > 0, "one adapter or more")


def main(args: list[str]) -> dict:
    settings = parse(MergeSettings, __doc__, args, prog="pyrdiff merge")
    check_paths(settings, models=["model"])
    announce(f"{settings.model} with {', '.join(settings.adapter)} merged into it, in {settings.output}")
    import pyrdiff
    from pyrdiff import hub

    weights = hub.parse_adapters(settings.adapter)
    pipeline = pyrdiff.load(settings.model, adapters=weights)
    hub.merge_adapters(pipeline)
    base = hub.public_name(settings.model)
    named = [f"{hub.public_name(place)}:{weight:g}" for place, weight in weights.items()]
    folder = hub.export(
        pipeline,
        settings.output,
        description=f"The model `{base}` with adapters merged into it, each by a weight: {', '.join(named)}.",
        license=settings.license,
        training={"base": base, "adapters": ", ".join(named)},
    )
    print(f"saved {folder}: {base} with {', '.join(named)}", flush=True)
    print(f"next: pyrdiff sample {shlex.quote(str(folder))} -o samples")
    return {"pipeline": str(folder), "base": base, "adapters": named}
