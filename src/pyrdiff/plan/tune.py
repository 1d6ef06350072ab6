"""Plans of a model's own: a short search over calls, times, strength and solver, judged by images held out."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pyrdiff.data import ImageLevels, ImageSource, replacing
from pyrdiff.metrics import bootstrap_interval
from pyrdiff.metrics.distribution import KernelReference
from pyrdiff.parts.json_files import read_json
from pyrdiff.parts.labels import spread_classes
from pyrdiff.plan.clipping import CLIP
from pyrdiff.plan.cost import choose, measure_costs

SDE = ["DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **CLIP}]
ODE = ["DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **CLIP}]
# Times of a refined level by number of calls, as shares of the noise that it may start from.
TIMES = {
    2: (0.57, 0.17),
    3: (0.71, 0.34, 0.09),
    4: (0.81, 0.49, 0.23, 0.06),
    5: (0.81, 0.57, 0.37, 0.20, 0.07),
    8: (0.86, 0.74, 0.63, 0.51, 0.40, 0.29, 0.17, 0.06),
}
HIGHER = {calls: tuple(min(0.98, 1.16 * share) for share in shares) for calls, shares in TIMES.items()}
STRONGEST = 0.35  # of the noise process: no refined level starts from more
CALLS = ((2, 2), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4), (5, 4), (5, 5), (8, 5), (8, 8))  # middle levels, top
GROUPS = 4  # of candidates of about one cost; the best of each reach the last round
ROUNDS = ((0.3, 0.5), (0.3, 0.5))  # share of the time, and of the candidates that go on; the last round takes the rest
NAMES = ("fast", "balanced", "best")  # of what a search finds
FIGURES = "tuning.json"  # of a search, in a model's folder
LEAST = 32  # samples a round, and images held out
MOST = 4096  # samples a round: more would tell no more plans apart


@dataclass(frozen=True)
class Judged:
    """
    A plan and what it reached.

    Attributes:
        plan: For `pipeline(plan=...)`.
        nfe_eq: Network calls by area, in calls at the top size.
        samples: How many were compared.
        distance: The kernel distance ("KID" with the network of FID), whose mean does not depend on their number.
        interval: 95 % of what as many other samples would give.
    """

    plan: dict
    nfe_eq: float
    samples: int
    distance: float
    interval: tuple[float, float]


@dataclass
class Tuning:
    """
    What a search found.

    Attributes:
        plans: "fast", "balanced" and "best", each as judged in the last round, by samples that chose none of them.
        yardstick: 20 calls of SDE-DPM-Solver++ at full size; None where the network is not trained for that.
        finalists: All of the last round, cheapest first.
        rounds: [candidates, samples of each] of every round.
        seconds: Spent.
        seed, held_out: Of the samples; number of images compared with.
        conventions: Of the features.
    """

    plans: dict[str, Judged]
    yardstick: Judged | None
    finalists: list[Judged]
    rounds: list[tuple[int, int]]
    seconds: float
    seed: int
    held_out: int
    conventions: dict

    def save(self, folder: str | Path) -> None:
        """
        Writes the plans into an exported folder, and their figures beside, as tuning.json. A "fast", "balanced" or
        "best" plan that was there before is gone then, also if the search found none to be called so.

        Raises:
            ValueError: if the folder is not that of a saved pipeline.
        """
        path = Path(folder) / "model_index.json"
        try:
            index = read_json(path)
            if not isinstance(index, dict):
                raise ValueError(f"{path}: expected a JSON object, found {type(index).__name__}")
        except ValueError as error:
            raise ValueError(f"folder={str(folder)!r}: expected a saved pipeline ({error})") from error
        others = {name: plan for name, plan in (index.get("plans") or {}).items() if name not in NAMES}
        index["plans"] = {**others, **{name: found.plan for name, found in self.plans.items()}}
        for place, values in (
            (path.with_name(FIGURES), {"kind": "pyrdiff tuning", **asdict(self)}),
            (path, index),
        ):
            with replacing(place) as beside:
                beside.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        rows = [f"{'plan':<10}{'NFE-eq':>8}  distance [95 %], {self.finalists[0].samples} samples"]
        named = [*self.plans.items(), *([("full size", self.yardstick)] if self.yardstick else [])]
        for name, found in named:
            low, high = found.interval
            rows.append(f"{name:<10}{found.nfe_eq:>8.2f}  {found.distance:.4g} [{low:.4g}, {high:.4g}]")
        return "\n".join(rows)


def candidates(pipeline) -> list[dict]:
    """
    The plans among which `tune` looks, cheapest first: some around what was measured to be good, and those of the
    pipeline that are no longer than these.

    Args:
        pipeline: A `PyramidalPipeline`.
    """
    found = _likely(pipeline)
    costs = {id(plan): pipeline.plan(plan=plan).nfe_eq for plan in found}
    for plan in (pipeline.config.plans or {}).values():
        cost = pipeline.plan(plan=plan).nfe_eq
        if cost <= max(costs.values()) and plan not in found:
            found.append(plan)
            costs[id(plan)] = cost
    return sorted(found, key=lambda plan: costs[id(plan)])


def _likely(pipeline) -> list[dict]:
    """Calls, times, starts and solvers around what was measured to be good."""
    config = pipeline.unet.config
    count = len(config.get("resolutions") or [None])
    steps = pipeline.scheduler.config.num_train_timesteps
    strongest = min(STRONGEST, config.get("noise_window", 1.0)) * steps

    def placed(shares) -> list[int]:
        return sorted({round(share * strongest) for share in shares} - {0}, reverse=True)

    def low(calls: int, start: float) -> list[int]:
        alone = {"resolutions": (config.get("resolutions") or [config.sample_size])[:1], "num_inference_steps": calls}
        plan = pipeline.plan(plan={**alone, "start_strength": start, "scheduler": SDE})
        return [int(time) for time in plan.levels[0].timesteps]

    start = _start(pipeline)
    if count == 1:
        return [
            {"num_inference_steps": calls, "start_strength": one, "scheduler": SDE}
            for calls in (8, 12, 16, 20, 30, 40)
            for one in sorted({start, 1.0})
        ]
    variants = ((TIMES, 20, start, SDE), (HIGHER, 20, start, SDE), (TIMES, 30, 1.0, SDE), (TIMES, 20, start, ODE))
    found = []
    for middle, top in CALLS if count > 2 else sorted({(top, top) for _, top in CALLS}):
        for times, calls, begin, solver in variants:
            higher = [*([placed(times[middle])] * (count - 2)), placed(times[top])]
            plan = {"spacing": [low(calls, begin), *higher], "start_strength": begin, "scheduler": SDE}
            found.append(plan if solver is SDE else {**plan, "refine_scheduler": solver})
    return found


def _start(pipeline) -> float:
    """The share of the noise process that plans of the pipeline start from in the colours of the data, if they do."""
    plans = (pipeline.config.plans or {}).values()
    start = min((plan.get("start_strength", 1.0) for plan in plans), default=1.0)
    return start if pipeline.config.colors else 1.0


def tune(
    pipeline,
    held_out: torch.Tensor,
    features,
    minutes: float = 5.0,
    batch_size: int = 32,
    seed: int = 0,
    plans: list[dict] | None = None,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> Tuning:
    """
    Searches for a model's own plans by successive halving: all candidates on few samples, the better half of each group
    of about one cost on others, the best of each group on many more. In a round all are given the same noise.

    "best" has the least distance, "balanced" is the cheapest that cannot be told from it. "fast" is the cheapest whose
    distance is within the interval of 20 stochastic steps at full size; where the network cannot run those, within
    half as much again as the best's, or as low as balanced's. None costs more than balanced.

    Args:
        pipeline: A `PyramidalPipeline`, on its device.
        held_out: Images of the kind that were not trained on, [N, C, H, W] in [0, 1], of the top size.
        features: The network of the distances, from `pyrdiff.metrics.open_features`.
        minutes: To spend, about. What they will be spent on is said before.
        batch_size: Samples at a time.
        seed: Of the samples.
        plans: Candidates; by default those of `candidates`.
        clock: f() -> seconds.
        say: f(line), for the progress.

    Raises:
        ValueError: for too few images or minutes, before the search.
    """
    began, judge = clock(), Judge(pipeline, held_out, features, batch_size, seed)
    plans = candidates(pipeline) if plans is None else plans
    yardstick, why = _yardstick(pipeline)
    if yardstick is None:
        say(f"no yardstick at full size: {why}")
    judge.features_of(plans[0], 0, batch_size)  # warms up
    timed = clock()
    judge.features_of(plans[0], 0, batch_size)
    a_call = (clock() - timed) / (batch_size * pipeline.plan(plan=plans[0]).nfe_eq)

    plans = _thinned(pipeline, plans, 60 * minutes * ROUNDS[0][0] / (a_call * LEAST), minutes)
    costs = {index: pipeline.plan(plan=plan).nfe_eq for index, plan in enumerate(plans)}
    left, rounds, at = list(costs), [], 0
    groups = _groups(sorted(costs, key=costs.get))
    for share, kept in ROUNDS:
        each = a_call * sum(costs[index] for index in left)
        count = max(LEAST, _affordable(60 * minutes * share, each, batch_size))
        say(f"{len(left)} plans, {count} samples each: about {count * each:.0f} s")
        reached = {index: judge(plans[index], at, count, resamples=0).distance for index in left}
        groups = [sorted(group, key=reached.get)[: math.ceil(kept * len(group))] for group in groups]
        left = [index for group in groups for index in group]
        rounds.append((len(reached), count))
        at += count
    left = [group[0] for group in groups]
    full = [] if yardstick is None else [yardstick]
    total = sum(costs[index] for index in left) + sum(pipeline.plan(plan=plan).nfe_eq for plan in full)
    count = max(LEAST, _affordable(60 * minutes - (clock() - began), a_call * total, batch_size))
    say(f"{len(left) + len(full)} plans, {count} samples each: about {a_call * count * total:.0f} s")
    finalists = [judge(plans[index], at, count) for index in sorted(left, key=costs.get)]
    yardstick = judge(full[0], at, count) if full else None
    rounds.append((len(finalists), count))
    named = choose_three(finalists, yardstick)
    return Tuning(named, yardstick, finalists, rounds, clock() - began, seed, len(held_out), dict(features.conventions))


def held_out_images(pipeline, source: ImageSource, background: tuple[int, int, int] = (255, 255, 255)) -> torch.Tensor:
    """
    The images of a source at the top size of a pipeline.

    Args:
        pipeline: A `PyramidalPipeline`.
        source: From `pyrdiff.data.open_source`.
        background: Colour (0 to 255) that transparent images are laid on.

    Returns:
        [N, C, H, W] in [0, 1].

    Raises:
        ValueError: for too few images to tune with.
    """
    if len(source) < LEAST:
        raise ValueError(f"held_out: got {len(source)} images; expected {LEAST} or more that were not trained on")
    top, channels = pipeline.unet.config.resolutions[-1], pipeline.unet.config.image_channels
    size = tuple(top) if isinstance(top, (list, tuple)) else (top, top)
    pixels = ImageLevels.build(source, [size], channels=channels, background=background).arrays[-1]
    return torch.from_numpy(pixels[:]).permute(0, 3, 1, 2).float() / 255


def choose_three(finalists: list[Judged], yardstick: Judged | None) -> dict[str, Judged]:
    """
    The plans that get names; see `tune`. No plan is called fast that is worse than the full-size solver can be, or that
    costs more than the balanced one: where none is left, "fast" is left out.
    """
    best = min(finalists, key=lambda found: found.distance)
    balanced = cheapest([found for found in finalists if found.interval[0] <= best.distance])
    limit = max(1.5 * best.distance, balanced.distance) if yardstick is None else yardstick.interval[1]
    fast = cheapest([found for found in finalists if found.distance <= limit])
    named = {"balanced": balanced, "best": best}
    return named if fast is None or fast.nfe_eq > balanced.nfe_eq else {"fast": fast, **named}


def cheapest(plans: list[Judged]) -> Judged | None:
    return min(plans, key=lambda found: found.nfe_eq, default=None)


def auto_plan(pipeline, budget_ms: float, batch_size: int = 1, folder: str | Path | None = None) -> str:
    """
    The name of the pipeline's plan that fits a time an image: for `pipeline(plan=auto_plan(pipeline, 200))`.

    With the figures of a search it is the cheapest that cannot be told from the best in the budget, else the longest.
    The pipeline's steps are timed for it, once at every level.

    Args:
        pipeline: On its device.
        budget_ms: Milliseconds an image may take.
        batch_size: Images sampled together.
        folder: Where the pipeline was loaded from, with the tuning.json of `Tuning.save` in it, if there was a search.

    Raises:
        ValueError: if no plan fits, naming the time of the quickest; for a file that is not of a search.
    """
    quality, intervals = None, None
    path = None if folder is None else Path(folder) / FIGURES
    if path is not None and path.is_file():
        try:
            figures = read_json(path)["plans"]
            own = {name: row for name, row in figures.items() if pipeline.config.plans.get(name) == row["plan"]}
            quality = {name: row["distance"] for name, row in own.items()} or None
            intervals = {name: tuple(row["interval"]) for name, row in own.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"folder={str(folder)!r}: {FIGURES} is not of a search for plans ({error})") from error
    costs = measure_costs(pipeline, batch_size, dict(pipeline.config.plans or {}))
    return choose(pipeline, costs, budget_ms=budget_ms, quality=quality, intervals=intervals)


class Judge:
    """
    Distances of plans' samples from images held out: f(plan, number of the first sample, samples) -> `Judged`.

    Args:
        pipeline: A `PyramidalPipeline`, on its device.
        held_out: [N, C, H, W] in [0, 1], of the top size.
        features: The network of the distances, from `pyrdiff.metrics.open_features`.
        batch_size: Samples at a time.
        seed: Of the samples; sample k has the same noise in all plans.

    Raises:
        ValueError: for too few images, or of another size.
    """

    def __init__(self, pipeline, held_out: torch.Tensor, features, batch_size: int, seed: int):
        if len(held_out) < LEAST:
            raise ValueError(f"held_out: got {len(held_out)} images; expected {LEAST} or more that were not trained on")
        top = tuple(pipeline.plan(plan={"num_inference_steps": 2, "scheduler": SDE}).levels[-1].size)
        if tuple(held_out.shape[-2:]) != top:
            raise ValueError(f"held_out has size {tuple(held_out.shape[-2:])}: expected {top}, that of the samples")
        self.pipeline, self.features, self.batch_size, self.seed = pipeline, features, batch_size, seed
        parts = held_out.split(64)
        self.real = KernelReference(torch.cat([features(part, data_range=(0, 1)).double() for part in parts]))

    def features_of(self, plan: dict, start: int, count: int) -> torch.Tensor:
        """Features [count, D] of the samples `start` to `start + count`."""
        found = []
        for first in range(start, start + count, self.batch_size):
            numbers = range(first, min(first + self.batch_size, start + count))
            generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + number) for number in numbers]
            told = spread_classes(self.pipeline.unet.config, self.pipeline.config.colors, numbers)
            images = self.pipeline(len(numbers), plan=plan, generator=generators, output_type="pt", classes=told).images
            images = (images.float() * 255).round() / 255  # as they are saved
            found.append(self.features(images, data_range=(0, 1)).double())
        return torch.cat(found)

    def __call__(self, plan: dict, start: int, count: int, resamples: int = 200) -> Judged:
        mine = self.features_of(plan, start, count)
        distance, interval = self.real.distance(mine), (float("nan"),) * 2
        if resamples:
            interval = bootstrap_interval(self.real.distance, mine, resamples=resamples)
        return Judged(plan, self.pipeline.plan(plan=plan).nfe_eq, count, distance, interval)


def _yardstick(pipeline) -> tuple[dict | None, str]:
    """20 stochastic steps at full size, or why the network cannot run them."""
    top = (pipeline.unet.config.get("resolutions") or [pipeline.unet.config.sample_size])[-1:]
    plan = {"resolutions": top, "num_inference_steps": 20, "scheduler": SDE}
    try:
        pipeline.plan(plan=plan)
    except ValueError as error:
        return None, str(error)
    return plan, ""


def _thinned(pipeline, plans: list[dict], calls: float, minutes: float) -> list[dict]:
    """Every second, third ... of the plans, so that together they cost no more than so many calls by area."""
    for stride in range(1, len(plans) // GROUPS + 1):
        kept = plans[::stride]
        total = sum(pipeline.plan(plan=plan).nfe_eq for plan in kept)
        if total <= calls:
            return kept
    raise ValueError(f"minutes={minutes}: expected at least {math.ceil(minutes * total / calls)} for {GROUPS} plans")


def _groups(ordered: list[int]) -> list[list[int]]:
    """Cut into `GROUPS` of about the same length, in order."""
    bounds = [round(index * len(ordered) / GROUPS) for index in range(GROUPS + 1)]
    return [ordered[low:high] for low, high in zip(bounds, bounds[1:], strict=False) if high > low]


def _affordable(seconds: float, each: float, batch_size: int) -> int:
    """Samples in whole batches that a time is enough for, `each` seconds a sample of all plans."""
    return min(MOST, int(max(0.0, seconds) / each) // batch_size * batch_size)
