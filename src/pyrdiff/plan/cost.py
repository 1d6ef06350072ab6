"""What a plan costs on this machine: steps are timed once at every level, and the times of plans added up from them."""

import copy
import hashlib
import inspect
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from diffusers import DiffusionPipeline

from pyrdiff.data import replacing
from pyrdiff.machine import device_name, in_turn, seeded
from pyrdiff.parts.json_files import read_json
from pyrdiff.parts.plans import NOISE_PROCESS
from pyrdiff.parts.steps import LevelSteps

from .clipping import clipping


class Stage(Protocol):
    """What is asked of a level that `pipeline.lay_out(plan)` gives."""

    size: tuple[int, int]
    network_size: tuple[int, int]
    steps: LevelSteps
    calls: int  # of the network: two a step with guidance


class Step(NamedTuple):
    """A step that is timed: the name of its scheduler, and the size "HxW" of the network's sample."""

    scheduler: str
    size: str


@dataclass
class StepCosts:
    """
    Seconds that one step takes by scheduler and size, for one batch size and one network on one machine.

    A scheduler is named by its class and the settings that are not the class's defaults, as in
    "DPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++')"; the noise process is left out.

    Attributes:
        seconds: {scheduler: {"HxW" of the network's sample: seconds of one step, network and scheduler}}.
        overhead: {scheduler: {"HxW": seconds that a level takes beside its steps}}.
        batch_size: Images that were sampled together.
        device: Name of the GPU, or of the processor.
        threads: CPU threads that torch used.
        dtype: Number format of the network, or "bfloat16 autocast".
        model: Class, size and hash of the config of the network; its weights do not matter.
    """

    seconds: dict[str, dict[str, float]]
    overhead: dict[str, dict[str, float]]
    batch_size: int
    device: str
    threads: int
    dtype: str
    model: str

    def predict(self, pipeline: DiffusionPipeline, plan: str | dict) -> float:
        """
        Seconds of `pipeline(batch_size, plan=plan)`.

        Args:
            pipeline: The one that was timed.
            plan: One of its plans by name, or a dict; {} is a call with all arguments at their defaults.

        Raises:
            ValueError: for a plan with a scheduler or a size that was not timed.
        """
        total = 0.0
        for stage in pipeline.lay_out(plan):
            name, size = _step(stage)
            if size not in self.seconds.get(name, {}):
                timed = ", ".join(f"{name} at {', '.join(sizes)}" for name, sizes in self.seconds.items())
                raise ValueError(f"plan has a level of {size} with {name}: expected what was timed: {timed}")
            total += self.overhead[name][size] + stage.calls * self.seconds[name][size]
        return total

    def check(self, pipeline: DiffusionPipeline, batch_size: int) -> None:
        """
        Refuses costs that were not measured on this pipeline, on this machine and with this batch size.

        Raises:
            ValueError: if they were not; the message names what differs.
        """
        expected = _circumstances(pipeline, batch_size)
        wrong = [name for name, value in expected.items() if getattr(self, name) != value]
        if wrong:
            measured = ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            wanted = ", ".join(f"{name}={expected[name]!r}" for name in wrong)
            raise ValueError(f"costs were measured with {measured}: expected {wanted}")

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, whole or not at all."""
        with replacing(path) as beside:
            beside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "StepCosts":
        """Reads what `save` wrote. Raises `ValueError` for another file."""
        try:
            return cls(**read_json(path))
        except (TypeError, ValueError) as error:
            raise ValueError(f"path={str(path)!r}: expected step costs that were saved by StepCosts.save") from error


def measure_costs(
    pipeline: DiffusionPipeline,
    batch_size: int = 16,
    plans: dict[str, dict] | None = None,
    steps: int = 10,
    rounds: int = 3,
    progress: bool = False,
) -> StepCosts:
    """
    Times every scheduler at every level where a plan uses it, with the network: runs of few and of more steps, one
    after the other and again, after a warm-up. The difference is what steps cost, the rest is what a level costs.

    Args:
        pipeline: A pipeline with plans, such as `PyramidalPipeline`, on the device that is meant.
        batch_size: Images sampled together. A call of one image costs more than a share of a call of many.
        plans: {name: plan} whose cost will be asked for; by default those of the pipeline, and its own schedulers at
            all its levels.
        steps: Steps of the longer run, 3 or more; the shorter one has 2.
        rounds: Timed runs of each; the median counts.
        progress: Show a progress bar, on a terminal.

    Raises:
        ValueError: unless batch_size and rounds are 1 or more and steps 3 or more, or for an empty or wrong plan.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("steps", steps, 3), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: expected {least} or more")
    if plans is None:
        own = {"num_inference_steps": 2, "refine_steps": 2, "refine_strength": 1.0}  # whatever the training steps
        plans = {"": own, **(pipeline.config.plans or {})}
    if not plans:
        raise ValueError(f"plans={plans}: expected {{name: plan}}")
    timed, calls = {}, {}
    for plan in plans.values():
        for stage in pipeline.lay_out(plan):
            timed.setdefault(_step(stage), (stage.steps.scheduler, stage.size))
    runner = copy.copy(pipeline)
    runner.refine_scheduler = None
    runner.set_progress_bar_config(disable=True)
    runner._check_noise = lambda *_: None  # each size is timed by itself, at noise that its network need not know

    def run(step: Step, count: int, turn: int) -> None:
        runner.scheduler, size = timed[step]
        generators = seeded(range(batch_size), pipeline.device)  # as `pyrdiff sample` draws
        runner(batch_size, [size], count, generator=generators, output_type="latent")
        calls[step, count] = runner.num_timesteps

    # All the short runs, then all the long ones: either kind finds the caches as a run at another size left them.
    works = {(step, count): partial(run, step, count) for count in (2, steps) for step in timed}
    runs = in_turn(works, rounds, pipeline.device, progress="timing" if progress else None)
    seconds: dict[str, dict[str, float]] = {step.scheduler: {} for step in timed}
    overhead: dict[str, dict[str, float]] = {step.scheduler: {} for step in timed}
    for step in timed:
        short, long = (statistics.median(runs[step, count]) for count in (2, steps))
        a_call = max(0.0, long - short) / (calls[step, steps] - calls[step, 2])
        seconds[step.scheduler][step.size] = a_call
        overhead[step.scheduler][step.size] = max(0.0, short - calls[step, 2] * a_call)
    return StepCosts(seconds, overhead, **_circumstances(pipeline, batch_size))


def _step(stage: Stage) -> Step:
    """
    What is timed. The scheduler's name is its class and the settings that were changed; the noise process is the same
    in all schedulers of a pipeline.
    """
    scheduler = stage.steps.scheduler
    known = inspect.signature(type(scheduler).__init__).parameters
    changed = [
        f"{name}={value!r}"
        for name, value in sorted(scheduler.config.items())
        if name in known and name not in NOISE_PROCESS and value != known[name].default
    ]
    return Step(f"{type(scheduler).__name__}({', '.join(changed)})", "{}x{}".format(*stage.network_size))


def _circumstances(pipeline: DiffusionPipeline, batch_size: int) -> dict:
    """What step costs depend on, as `StepCosts` names it."""
    device, unet = pipeline.device, pipeline.unet
    autocast = torch.is_autocast_enabled(device.type)
    dtype = f"{torch.get_autocast_dtype(device.type)} autocast" if autocast else str(unet.dtype)
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:8]
    parameters = sum(tensor.numel() for tensor in unet.parameters())
    return {
        "batch_size": batch_size,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": dtype.replace("torch.", ""),
        "model": f"{type(unet).__name__}, {parameters} parameters, config {digest}",
    }


def choose(
    pipeline: DiffusionPipeline,
    costs: StepCosts,
    plans: dict[str, dict] | None = None,
    budget_ms: float | None = None,
    quality: dict[str, float] | None = None,
    target: float | None = None,
    intervals: dict[str, tuple[float, float]] | None = None,
) -> str:
    """
    Picks a plan: the best within a budget, or the cheapest that reaches a target.

    Args:
        pipeline: What will be called as `pipeline(plan=plans[name])`.
        costs: From `measure_costs`, for the batch size that is meant.
        plans: {name: plan}; by default the pipeline's own.
        budget_ms: Milliseconds an image may take.
        quality: {name: distance}, lower is better, as a bench measured it; see `bench_plans`. Without it the most
            expensive plan within the budget is taken.
        target: Distance that is good enough; the cheapest such plan is taken.
        intervals: {name: (low, high)} about the distances, of the same bench. Within a budget the cheapest plan is then
            taken whose interval holds the best plan's distance: no measurement tells it from the best. Plans without
            an interval are compared by their distance.

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
        raise ValueError("plans={}: expected {name: plan}, or a pipeline with plans of its own")
    each_ms = {name: 1000 * costs.predict(pipeline, plan) / costs.batch_size for name, plan in plans.items()}
    if quality is not None:
        each_ms = {name: value for name, value in each_ms.items() if name in quality}
        if not each_ms:
            raise ValueError(f"quality={quality}: expected distances of some of {sorted(plans)}")
    if budget_ms is not None:
        fitting = {name: value for name, value in each_ms.items() if value <= budget_ms}
        if not fitting:
            name, value = min(each_ms.items(), key=lambda item: item[1])
            raise ValueError(f"budget_ms={budget_ms}: expected at least {value:.1f}, what the plan {name!r} takes")
        if quality is None:
            return max(fitting, key=fitting.get)
        best = min(quality[name] for name in fitting)
        lows = {name: (intervals or {}).get(name, (quality[name],))[0] for name in fitting}
        good = [name for name in fitting if min(lows[name], quality[name]) <= best]
        return min(good, key=lambda name: (fitting[name], quality[name]))
    good = [name for name in each_ms if quality[name] <= target]
    if not good:
        name = min(each_ms, key=quality.get)
        raise ValueError(f"target={target}: expected at least {quality[name]:.4g}, what the plan {name!r} reaches")
    return min(good, key=each_ms.get)


class Benched(NamedTuple):
    """Plans of a bench by name, the Fréchet distance of each, and its 95 % interval where there is one."""

    plans: dict[str, dict]
    quality: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def bench_plans(path: str | os.PathLike) -> Benched:
    """
    The plans of a stored bench, and the distance that each reached.

    Args:
        path: A JSON of `pyrdiff bench` or of `benchmarks/bench.py`.

    Returns:
        Its pyramids, for `choose`. Of `pyrdiff bench` those are all arms, and a plan may be a name.

    Raises:
        ValueError: for another file, or one without scored pyramids.
    """
    benched = Benched({}, {}, {})
    try:
        for name, arm in read_json(path)["arms"].items():
            scored = _of_command(arm) if "metrics" in arm else _of_benchmark(arm)
            if scored is None:
                continue
            benched.plans[name], benched.quality[name] = scored.plan, scored.distance
            if scored.interval:
                benched.intervals[name] = tuple(scored.interval)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        expected = "expected a result of benchmarks/bench.py or of `pyrdiff bench`"
        raise ValueError(f"path={str(path)!r}: {expected} ({error})") from error
    if not benched.plans:
        raise ValueError(f"path={str(path)!r}: expected a result with scored pyramids")
    return benched


class _Scored(NamedTuple):
    """An arm of a bench."""

    plan: dict | str
    distance: float
    interval: Sequence[float] | None


def _of_command(arm: dict) -> _Scored | None:
    """An arm of `pyrdiff bench`."""
    for metric, row in arm["metrics"].items():
        if metric.startswith(("FID", "FD-")):
            return _Scored(arm["arguments"].get("plan", arm["arguments"]), row["value"], row["interval"])
    return None


def _of_benchmark(arm: dict) -> _Scored | None:
    """An arm of `benchmarks/bench.py`."""
    settings = arm["settings"]
    if "score" not in arm or settings["loop"] not in ("pyramid", "saved"):
        return None
    plan = settings["arguments"].get("plan") or _plan_of(settings)
    return _Scored(plan, arm["score"]["frechet"], arm["score"]["frechet_interval"])


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
        plan[name] = [kind, {"timestep_spacing": spacing, **clipping(kind), **changed}]
    return plan
