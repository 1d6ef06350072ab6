"""`pyrdiff bench --tune`: a search for a model's own plans, which go into its folder."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pyrdiff.commands.sample import write_json
from pyrdiff.machine import open_device

if TYPE_CHECKING:
    from pyrdiff.commands.bench import BenchSettings


def tune_saved(options: "BenchSettings") -> dict:
    """
    Searches for the plans of a saved pipeline and writes them into its folder.

    Args:
        options: The flags of `pyrdiff bench`.

    Raises:
        ValueError: for a model without plans or outside a folder, or for too few images or minutes.
    """
    import pyrdiff
    from pyrdiff import metrics
    from pyrdiff.data import open_source
    from pyrdiff.pipelines import PyramidalPipeline
    from pyrdiff.plan import held_out_images, tune

    folder = Path(options.model)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"--tune: {options.model!r} is no folder of a saved pipeline, into which plans could be written"
        )
    device = open_device(options.device)
    pipeline = pyrdiff.load(folder).to(device)
    if not isinstance(pipeline, PyramidalPipeline):
        raise ValueError(f"--tune: {options.model!r} is a {type(pipeline).__name__}; expected a PyramidalPipeline")
    pipeline.set_progress_bar_config(disable=True)
    held_out = held_out_images(pipeline, open_source(Path(options.reference), array_key=options.array_key))
    features = metrics.open_features(options.features, weights=options.weights, device=device)
    found = tune(
        pipeline,
        held_out.to(device),
        features,
        minutes=options.tune,
        batch_size=options.batch_size,
        seed=options.seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    found.save(folder)
    result = asdict(found)
    write_json(result, Path(options.output))
    print(found)
    return result
