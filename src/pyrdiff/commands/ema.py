"""
Average a training's weights over another length, afterwards.

Example: pyrdiff ema runs/mine --length 0.05 0.1 0.2 --output runs/mine-averages

A length is a share of the training: the weights of the last steps are averaged over about that much of it. The training
must have kept what averages are made of (pyrdiff train ... --keep_averages). Each length is written as a model of its
own, into a folder of its name below --output. With --reference, samples of each are compared with these images.
"""

import copy
import inspect
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pyrdiff.cli import announce, expect, parse
from pyrdiff.commands.paths import check_paths
from pyrdiff.machine import open_device
from pyrdiff.training.settings import LONGEST_AVERAGE, SHORTEST_AVERAGE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from pyrdiff.plan.tune import Judge, Judged

AS_TRAINED = "as trained"


@dataclass(kw_only=True)
class EmaSettings:
    """Flags of `pyrdiff ema`."""

    model: str
    """Folder of a finished training, or the pipeline in it."""
    length: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Lengths of the averages, from 0.01 to 0.28."""
    output: str
    """Folder for the models."""
    at: float = 1.0
    """Share of the training at which the averages end."""
    guide_at: float | None = None
    """Also put an average that ends at this share of the training into each model, as its guide: images are then guided
    without classes (autoguidance). 0.1 to 0.3 is usual."""
    guide_length: float = 0.1
    """Of that average."""
    reference: str | None = None
    """Images that were not trained on (folder, .npz or .npy array), to compare samples of each length with."""
    array_key: str | None = None
    """Array of an .npz reference."""
    plan: str = "balanced"
    """How to sample for that: a plan that the model carries."""
    num_images: int = 256
    """Samples of each length for that."""
    features: Literal["squeezenet", "alexnet", "inception", "dinov2", "classifier"] = "inception"
    """Feature network of the distances."""
    weights: str | None = None
    """Its file; by default downloaded."""
    batch_size: int = 32
    """Samples at a time."""
    seed: int = 0
    """Sample k has the same noise for every length."""
    device: str | None = None
    """For the samples; by default the GPU if there is one."""

    def __post_init__(self):
        accepted = f"numbers from {SHORTEST_AVERAGE} to {LONGEST_AVERAGE}"
        good = len(self.length) > 0 and all(SHORTEST_AVERAGE <= length <= LONGEST_AVERAGE for length in self.length)
        expect(self, "length", good and len(set(self.length)) == len(self.length), f"different {accepted}")
        good = SHORTEST_AVERAGE <= self.guide_length <= LONGEST_AVERAGE
        expect(self, "guide_length", good, f"one of the {accepted}")
        expect(self, "at", 0 < self.at <= 1, "a number in (0, 1]")
        expect(self, "guide_at", self.guide_at is None or 0 < self.guide_at < self.at, "a share before --at")
        for name in ("num_images", "batch_size"):
            expect(self, name, getattr(self, name) >= 1, "1 or more")
        expect(self, "output", not Path(self.output).exists() or Path(self.output).is_dir(), "a folder")


def training_of(model: str) -> Path:
    """The folder of the training that a user names by it or by the pipeline in it."""
    folder = Path(model)
    for run in (folder, folder.absolute().parent):
        if (run / "averages").is_dir() and (run / "pipeline" / "model_index.json").is_file():
            return run
    raise ValueError(
        f"--model={model!r}: expected the folder of a finished training with --keep_averages, which has `averages` and "
        "`pipeline` in it"
    )


def judge_of(settings: EmaSettings, pipeline: "DiffusionPipeline") -> "Judge | None":
    """What compares samples of the pipeline with the reference; None without one."""
    from pyrdiff import metrics
    from pyrdiff.data import open_source
    from pyrdiff.pipelines import PyramidalPipeline
    from pyrdiff.plan import held_out_images
    from pyrdiff.plan.tune import Judge

    if settings.reference is None:
        return None
    if not isinstance(pipeline, PyramidalPipeline):
        raise ValueError(f"--reference: not for a {type(pipeline).__name__}; expected a PyramidalPipeline")
    pipeline.plan(plan=settings.plan)
    held_out = held_out_images(pipeline, open_source(Path(settings.reference), array_key=settings.array_key))
    network = metrics.open_features(settings.features, weights=settings.weights, device=pipeline.device)
    pipeline.set_progress_bar_config(disable=True)
    return Judge(pipeline, held_out.to(pipeline.device), network, settings.batch_size, settings.seed)


def export(pipeline: "DiffusionPipeline", run: Path, target: Path, rows: dict[str, object]) -> None:
    """Writes the pipeline of a training with other weights, and the card that says so."""
    from pyrdiff import hub
    from pyrdiff.parts.files import replacing

    hub.export(pipeline, target)
    card = run / "pipeline" / "README.md"
    if card.is_file():
        text = hub.card.of_other_weights(hub.card.read(card), rows)
        with replacing(target / "README.md") as beside:
            beside.write_text(text, encoding="utf-8")


def table(judged: "dict[str, Judged]") -> str:
    """A line each, the nearest first named."""
    nearest = min(judged, key=lambda name: judged[name].distance)
    rows = [f"{'length':<12}distance [95 %], {judged[nearest].samples} samples"]
    for name, found in judged.items():
        low, high = found.interval
        rows.append(f"{name:<12}{found.distance:.4g} [{low:.4g}, {high:.4g}]{' nearest' * (name == nearest)}")
    return "\n".join(rows)


def main(args: list[str]) -> dict:
    settings = parse(EmaSettings, __doc__, args, prog="pyrdiff ema")
    check_paths(settings, images=["reference"], files=["weights"])
    run = training_of(settings.model)
    lengths = ", ".join(f"{length:g}" for length in settings.length)
    announce(f"the weights of {run} averaged over {lengths} of its training, a model each, in {settings.output}")
    import pyrdiff
    from pyrdiff.training.snapshots import average, last_step

    last = last_step(run)
    step = max(1, math.floor(settings.at * last))
    pipeline = pyrdiff.load(run / "pipeline").to(open_device(settings.device))
    parameters = dict(pipeline.unet.named_parameters())
    takes_guide = "guide" in inspect.signature(type(pipeline).__init__).parameters
    expect(settings, "guide_at", settings.guide_at is None or takes_guide, f"none with a {type(pipeline).__name__}")
    judge, judged, rows = judge_of(settings, pipeline), {}, {}
    if settings.guide_at is not None:
        guide_step = max(1, math.floor(settings.guide_at * last))
        early = average(run, settings.guide_length, parameters, guide_step)
        guide = copy.deepcopy(pipeline.unet)
        guide.load_state_dict({**guide.state_dict(), **early})
        pipeline.register_modules(guide=guide)
        rows["guide"] = f"average of length {settings.guide_length:g} up to step {guide_step}"
    if judge is not None:
        judged[AS_TRAINED] = judge(settings.plan, 0, settings.num_images)
    folders = {}
    for length in settings.length:
        averaged = average(run, length, parameters, step)
        pipeline.unet.load_state_dict({**pipeline.unet.state_dict(), **averaged})
        target = Path(settings.output) / f"{length:g}"
        export(pipeline, run, target, {"weights": f"average of length {length:g} up to step {step}", **rows})
        folders[f"{length:g}"] = str(target)
        print(f"saved {target}", flush=True)
        if judge is not None:
            judged[f"{length:g}"] = judge(settings.plan, 0, settings.num_images)
    if judged:
        print(table(judged))
    return {"step": step, "folders": folders, "judged": {name: asdict(found) for name, found in judged.items()}}
