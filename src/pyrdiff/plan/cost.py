"""What a plan costs on this machine: steps are timed once at every level, and the times of plans added up from them."""

import inspect
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch


@dataclass
class StepCosts:
    """
    Seconds that one step takes at each size, for one batch size on one machine.

    Attributes:
        batch_size: Images that were sampled together.
        seconds: {"HxW" of the network's sample: seconds of one step}.
        overhead: {"HxW": seconds that a level takes beside its steps}.
        device: Where the network was.
        threads: CPU threads that torch used.
        dtype: Number format of the network, or "bfloat16 autocast".
    """

    batch_size: int
    seconds: dict[str, float]
    overhead: dict[str, float]
    device: str
    threads: int
    dtype: str

    def predict(self, plan) -> float:
        """
        Seconds of one call of the pipeline under a plan (what `pipeline.plan(...)` returns), for `batch_size` images.

        Raises:
            ValueError: for a plan with a size that was not timed.
        """
        total = 0.0
        for level in plan.levels:
            name = "{}x{}".format(*level.network_size)
            if name not in self.seconds:
                raise ValueError(f"plan has a level of {name}: expected one of the timed sizes {list(self.seconds)}")
            total += self.overhead[name] + len(level.timesteps) * self.seconds[name]
        return total

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, beside and then renamed."""
        beside = Path(f"{path}.{os.getpid()}")
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "StepCosts":
        """Reads what `save` wrote. Raises `ValueError` for another file."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"path={str(path)!r}: expected step costs that were saved by StepCosts.save") from error


def measure_costs(
    pipeline, batch_size: int = 16, resolutions: Sequence | None = None, steps: int = 10, rounds: int = 3
) -> StepCosts:
    """
    Times the pipeline's own scheduler and network at every level: runs of few and of more steps, level after level and
    again, after a warm-up. The difference is what steps cost, the rest is what a level costs.

    Args:
        pipeline: A pipeline with `plan` and `resolutions`, such as `PyramidalPipeline`, on the device that is meant.
        batch_size: Images sampled together. A call of one image costs more than a share of a call of many.
        resolutions: The levels; by default those of the pipeline.
        steps: Steps of the longer run, 3 or more; the shorter one has 2.
        rounds: Timed runs of each; the median counts.

    Raises:
        ValueError: unless batch_size and rounds are 1 or more and steps 3 or more.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("steps", steps, 3), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: expected {least} or more")
    device, autocast = pipeline.device, torch.is_autocast_enabled(pipeline.device.type)

    def timed(size, calls) -> tuple[int, float]:
        generator = torch.Generator(device).manual_seed(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        pipeline(batch_size, [size], calls, generator=generator, output_type="latent")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return pipeline.num_timesteps, time.perf_counter() - began

    levels = pipeline.plan(resolutions, num_inference_steps=steps, refine_steps=2).levels
    found: dict[tuple, list[tuple[int, float]]] = {(level.size, n): [] for level in levels for n in (2, steps)}
    shown = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        for turn in range(rounds + 1):
            for size, calls in found:
                taken = timed(size, calls)
                if turn:
                    found[size, calls].append(taken)
    finally:
        pipeline.set_progress_bar_config(**shown)
    seconds, overhead = {}, {}
    for level in levels:
        name = "{}x{}".format(*level.network_size)
        (few, short), (many, long) = (
            (found[level.size, n][0][0], statistics.median(value for _, value in found[level.size, n]))
            for n in (2, steps)
        )
        seconds[name] = max(0.0, long - short) / (many - few)
        overhead[name] = max(0.0, short - few * seconds[name])
    dtype = f"{torch.get_autocast_dtype(device.type)} autocast" if autocast else str(pipeline.unet.dtype)
    return StepCosts(
        batch_size,
        seconds,
        overhead,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch.get_num_threads(),
        dtype.replace("torch.", ""),
    )


def choose(
    pipeline,
    costs: StepCosts,
    plans: dict[str, dict] | None = None,
    budget_ms: float | None = None,
    quality: dict[str, float] | None = None,
    target: float | None = None,
) -> str:
    """
    Picks a plan: the best within a budget, or the cheapest that reaches a target.

    Args:
        pipeline: What will be called as `pipeline(plan=plans[name])`.
        costs: From `measure_costs`, for the batch size that is meant.
        plans: {name: plan}; by default the pipeline's own.
        budget_ms: Milliseconds an image may take.
        quality: {name: distance}, lower is better, as a bench measured it; see `bench_plans`. Without it the plan
            with the highest cost in the budget is taken for the best.
        target: Distance that is good enough; the cheapest such plan is taken.

    Returns:
        The plan's name.

    Raises:
        ValueError: unless one of budget_ms and target is given (target with quality), or if no plan fits; the message
            says how near the nearest comes.
    """
    plans = dict(pipeline.config.plans or {}) if plans is None else plans
    if (budget_ms is None) == (target is None) or (target is not None and not quality):
        raise ValueError(f"budget_ms={budget_ms}, target={target}: expected one of them, and quality with target")
    if not plans:
        raise ValueError("plans: got none, and the pipeline has none of its own; expected {name: plan}")
    each_ms = {name: 1000 * costs.predict(pipeline.plan(plan=plan)) / costs.batch_size for name, plan in plans.items()}
    if quality is not None:
        each_ms = {name: value for name, value in each_ms.items() if name in quality}
        if not each_ms:
            raise ValueError(f"quality: got {sorted(quality)}; expected distances of some of {sorted(plans)}")
    if budget_ms is not None:
        fitting = {name: value for name, value in each_ms.items() if value <= budget_ms}
        if not fitting:
            name, value = min(each_ms.items(), key=lambda item: item[1])
            raise ValueError(f"budget_ms={budget_ms}: expected at least {value:.1f}, what the plan {name!r} takes")
        if quality is None:
            return max(fitting, key=fitting.get)
        return min(fitting, key=lambda name: (quality[name], fitting[name]))
    good = [name for name in each_ms if quality[name] <= target]
    if not good:
        name = min(each_ms, key=quality.get)
        raise ValueError(f"target={target}: expected at least {quality[name]:.4g}, what the plan {name!r} reaches")
    return min(good, key=each_ms.get)


def bench_plans(path: str | os.PathLike) -> tuple[dict[str, dict], dict[str, float]]:
    """
    The plans of a stored bench, a JSON of `benchmarks/bench.py`, and the distance that each reached.

    Returns:
        ({name: plan}, {name: Frechet distance}) of its pyramids, for `choose`.

    Raises:
        ValueError: for another file, or one without scored pyramids.
    """
    plans, quality = {}, {}
    try:
        arms = json.loads(Path(path).read_text(encoding="utf-8"))["arms"]
        for name, arm in arms.items():
            settings = arm["settings"]
            if "score" not in arm or settings["loop"] not in ("pyramid", "saved"):
                continue
            quality[name] = arm["score"]["frechet"]
            plans[name] = settings["arguments"].get("plan") or _plan_of(settings)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r}: expected a result of benchmarks/bench.py ({error})") from error
    if not plans:
        raise ValueError(f"path={str(path)!r}: expected a result with scored pyramids")
    return plans, quality


def _plan_of(settings: dict) -> dict:
    """The plan that a bench's arm ran."""
    plan = dict(settings["arguments"])
    for name, changed, spacing in zip(
        ("scheduler", "refine_scheduler"), settings["changed"], settings["spacings"], strict=True
    ):
        if changed is None:
            continue
        changed = dict(changed)
        kind = changed.pop("_class_name")
        takes_clip = "clip_sample" in inspect.signature(getattr(diffusers, kind).__init__).parameters
        clip = {} if takes_clip else {"thresholding": True, "sample_max_value": 1.0}
        plan[name] = [kind, {"timestep_spacing": spacing, **clip, **changed}]
    return plan
