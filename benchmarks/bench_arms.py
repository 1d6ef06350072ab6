"""What `bench.py` compares: loops of stock diffusers, pyramids, and the plans that a model carries."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline


def arms(pipeline: DiffusionPipeline) -> dict[str, dict]:
    """
    What is compared: name -> {"method": the plot's curve; "loop": who runs it: "stock" (diffusers), "parallel",
    "pyramid" (ours) or "saved" (ours as saved); "scheduler", "refine_scheduler": class and changed settings;
    "arguments" of the call; "views": the tables that show it}.
    """
    sizes = [list(size) if isinstance(size, (list, tuple)) else size for size in pipeline.unet.config.resolutions]
    ddpm, ddim = {"_class_name": "DDPMScheduler"}, {"_class_name": "DDIMScheduler"}
    solver, unipc = {"_class_name": "DPMSolverMultistepScheduler"}, {"_class_name": "UniPCMultistepScheduler"}
    log_snr, leading = {**solver, "use_lu_lambdas": True}, {**solver, "timestep_spacing": "leading"}
    sde = {**solver, "algorithm_type": "sde-dpmsolver++"}
    found = {}

    def full(method: str, scheduler: dict, steps: int, views=("main",), **arguments) -> None:
        loop = "parallel" if "window" in arguments else "stock"
        name = f"{method} {steps}" + (f", window {arguments['window']}" if "window" in arguments else "")
        arguments = dict(num_inference_steps=steps, **arguments)
        found[name] = dict(method=method, loop=loop, scheduler=scheduler, arguments=arguments, views=list(views))

    def pyramid(method: str, scheduler: dict, refine: dict | None, low: int, *higher: int, **more) -> None:
        name, views, curve = more.pop("name", None), more.pop("views", ["main"]), more.pop("curve", method)
        levels = more.get("resolutions", sizes)
        higher = [*higher, *higher[-1:] * len(levels)][: len(levels) - 1]
        arguments = dict(num_inference_steps=low, refine_steps=higher, **more)
        found[name or f"pyramid {'/'.join(map(str, [low, *higher]))}, {method}"] = dict(
            method=f"pyramid, {curve}",
            loop="pyramid",
            scheduler=scheduler,
            refine_scheduler=refine,
            arguments=arguments,
            views=views,
        )

    full("DDPM", ddpm, 1000, views=["main", "speed"])
    full("DDPM", ddpm, 100, views=["main", "speed"])
    for steps in (50, 20):
        full("DDIM", ddim, steps)
    for steps in (20, 10):
        full("DPM-Solver++", solver, steps, views=["main", "speed"] if steps == 20 else ["main"])
        full("DPM-Solver++ leading", leading, steps)
        full("DPM-Solver++ log-SNR", log_snr, steps)
        full("UniPC", unipc, steps)
    full("DDIMParallel", {"_class_name": "DDIMParallelScheduler"}, 50, window=16, tolerance=0.1)

    pyramid("DDPM", ddpm, None, 1000, 30, views=["main", "speed"])
    pyramid("DDPM", ddpm, None, 100, 10, views=["main", "speed"])
    pyramid("DDPM", ddpm, None, 100, 8)
    for low, high in ((100, 8), (50, 5)):
        pyramid("DDPM + DPM-Solver++", ddpm, solver, low, high)
    pyramid("DPM-Solver++", solver, None, 20, 5)
    for low, *higher in ((30, 4, 4), (20, 4, 4), (20, 4, 2), (20, 3, 2), (20, 2, 1)):
        pyramid("SDE-DPM-Solver++", sde, None, low, *higher)
    for strength in (0.1, 0.2, 0.3, 0.4, 0.5):
        more = dict(refine_strength=strength, curve="DDPM by strength", views=["strength"])
        pyramid("DDPM", ddpm, None, 100, round(100 * strength), name=f"strength {strength}", **more)
    for levels in (
        sizes,
        sizes[:: max(1, len(sizes) - 1)],
        sizes[1:],
        sizes[-1:],
    ):  # all; no middle; no lowest; the top
        if levels:
            shown = "/".join("x".join(map(str, size)) if isinstance(size, list) else str(size) for size in levels)
            more = dict(resolutions=levels, curve="DDPM by levels", views=["levels"], name=f"levels {shown}")
            pyramid("DDPM", ddpm, None, 100, 10, **more)
    for name, plan in (getattr(pipeline.config, "plans", None) or {}).items():
        arguments = dict(plan=plan)
        found[f"saved plan {name}"] = dict(
            method="pyramid, saved plans", loop="saved", arguments=arguments, views=["main", "speed"]
        )
    return found


def chosen_arms(
    pipeline: DiffusionPipeline, extra: str | None, only: Sequence[str] | None, skip: Sequence[str] | None
) -> dict[str, dict]:
    """All arms and those of a JSON file, less those that were not asked for. Raises `ValueError` if none are left."""
    found = arms(pipeline)
    for name, arm in (json.loads(Path(extra).read_text(encoding="utf-8")) if extra else {}).items():
        known = {"method", "loop", "scheduler", "refine_scheduler", "arguments", "views"}
        if not isinstance(arm, dict) or not {"method", "scheduler"} <= set(arm) <= known:
            raise ValueError(f"--arms {name!r}: {arm}: expected method, scheduler and some of {sorted(known)}")
        found[name] = {"loop": "pyramid", "arguments": {}, "views": ["main"], **arm}
    left = {
        name: arm
        for name, arm in found.items()
        if (not only or any(part in name for part in only)) and not any(part in name for part in skip or ())
    }
    if not left:
        raise ValueError(f"--only {only} --skip {skip}: expected parts of some of these names: {sorted(found)}")
    return left
