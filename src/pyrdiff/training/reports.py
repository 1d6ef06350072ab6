"""What a person sees of a run: what is printed and logged, previews, and the training's facts on the model card."""

import copy
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

import pyrdiff
from pyrdiff import hub

from .notes import notes_on_length

if TYPE_CHECKING:
    from .loop import Run
    from .outcomes import Launched, Outcome


def versions() -> dict[str, str]:
    """Versions of what training depends on, by package."""
    return {"pyrdiff": pyrdiff.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__}


def opening(run: "Run") -> None:
    """Prints where the resolved settings are and what is trained on, and starts the trackers."""
    settings, images, accelerator = asdict(run.settings), run.images, run.accelerator
    print(
        f"settings, log and checkpoints: {run.folder.path}\n"
        f"{len(images)} images ({len(images.bad)} skipped, {images.composited} with transparency laid on "
        f"{tuple(run.settings.background)}, {images.enlarged} enlarged), "
        f"{parameters(run) / 1e6:.1f}M parameters, batches {run.batches.batch_sizes} in each of "
        f"{accelerator.num_processes} processes on {accelerator.device}, mixed precision {accelerator.mixed_precision}",
        flush=True,
    )
    for note in notes_on_length(run.total_steps, run.settings) if run.settings.minutes is None else ():
        print(f"note: {note}", flush=True)
    if run.settings.report_to:
        config = {key: v if isinstance(v, (int, float, str, bool)) else str(v) for key, v in settings.items()}
        try:
            accelerator.init_trackers(run.method.name, config=config)
        except Exception as error:  # code of the tracker's package: whatever it raises is its own
            raise ValueError(
                f"report_to={run.settings.report_to!r}: could not start ({type(error).__name__}: {error}); expected a "
                "tracker that you are logged in to, or none"
            ) from error


def log_step(run: "Run", step: "Launched", loss: float) -> None:
    """A line of log.jsonl, and the tracker's numbers."""
    values = {
        "step": step.number,
        "resolution": "{}x{}".format(*run.settings.sizes[step.level]),
        "loss": loss,
        "learning_rate": step.rate,
        "seconds": round(run.watch.seconds, 3),
        "step_seconds": round(run.budget.step_seconds, 4),
        "total_steps": run.total_steps,
    }
    run.folder.log(values)
    track(run, {key: value for key, value in values.items() if isinstance(value, (int, float))})


def preview(run: "Run") -> None:
    """The method's picture of how far the averaged weights have come, in `samples`, and its numbers."""
    path = run.folder.picture(run.step)
    with run.learner.averaged_weights(), run.accelerator.autocast():
        values = run.method.preview(run.settings, run.pipeline, run.images, path)
    if values:
        run.folder.log({"step": run.step, "validation": values})
        print(f"step {run.step}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}", flush=True)
        track(run, {f"validation_{name}": value for name, value in values.items()})


def failure(run: "Run", step: "Launched", outcome: "Outcome") -> dict[str, Any]:
    """A step that was not finite, with what all processes trained on in it: any of them may have met the bad image."""
    whole, indices = copy.copy(run.batches), []
    for whole.process_index in range(run.accelerator.num_processes):
        for micro in range(run.settings.gradient_accumulation_steps):
            indices += whole.draw(step.number - 1, micro).indices.tolist()
    return {
        "step": step.number,
        "seed": run.settings.seed,
        "loss": repr(outcome.loss),
        "gradient_norm": repr(outcome.gradient_norm),
        "resolution": list(run.settings.sizes[step.level]),
        "images": [run.images.names[index] for index in indices],
    }


def track(run: "Run", values: dict[str, float]) -> None:
    if run.settings.report_to:
        run.accelerator.log(values, step=run.step)


def closing(run: "Run", target: Path) -> None:
    print(f"saved {target} after {run.step} steps, {run.watch.seconds / 60:.1f} minutes", flush=True)


def next_command(run: "Run", target: Path) -> str:
    """What to type once the pipeline, or the adapter, is in its folder."""
    model = shlex.quote(str(target))
    if run.settings.lora_rank is not None:
        model = f"{shlex.quote(run.settings.init_from)} --adapter {model}"
    if hub.needs_image(type(run.pipeline)):
        return f"pyrdiff upscale {model} -i my_pictures -o larger"
    plan = " --plan fast" if "fast" in (run.pipeline.config.get("plans") or {}) else ""
    return f"pyrdiff sample {model}{plan} -o samples"


def card_facts(run: "Run") -> dict[str, object]:
    """What a reader of the model card wants to know of the training; no places on this machine."""
    settings, accelerator = run.settings, run.accelerator
    cpu = f"cpu, {torch.get_num_threads()} threads"
    start = {}
    if settings.init_from is not None:
        start[settings.start_name] = f"{start_title(settings.init_from)} (SHA-256 {run.identity['start'][:12]})"
    return {
        "method": run.method.name,
        **start,
        "data set": settings.dataset_name or Path(settings.train_data_dir).name,
        "images": len(run.images),
        "resolutions": ", ".join("{}x{}".format(*size) for size in settings.sizes),
        "parameters": parameters(run),
        "steps": run.step,
        "images a step": ", ".join(str(accelerator.num_processes * size) for size in run.batches.batch_sizes),
        "minutes": round(run.saved_seconds / 60, 1),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else cpu,
        "processes": accelerator.num_processes,
        "precision": "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        "seed": settings.seed,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def start_title(place: str) -> str:
    """What a model that a run begins with is called: a repository as it is, a folder by its own name."""
    if not Path(place).exists():
        return place
    parts = [part for part in Path(place).resolve().parts if part != "pipeline"]
    return parts[-1]


def parameters(run: "Run") -> int:
    """How many numbers the network learns."""
    return sum(parameter.numel() for parameter in run.learner.parameters)
