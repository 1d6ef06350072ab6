"""
Say what a model's plans cost on this machine, and which one fits a budget.

Example: pyrdiff plan runs/mine/pipeline --budget_ms 200

Every level is timed once with each scheduler that a plan runs it with (kept in --costs, if given); the times of plans
are added up from that. With --bench, a result of pyrdiff bench, plans are chosen by measured quality: for
a target the cheapest that reaches it, within a budget the cheapest of those that cannot be told from the best.
"""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from pyrdiff.cli import announce, expect, parse
from pyrdiff.commands.paths import check_paths
from pyrdiff.machine import open_device


@dataclass(kw_only=True)
class PlanSettings:
    """Flags of `pyrdiff plan`."""

    model: str
    """Exported folder, or a repository on the Hub; none of its code is run."""
    batch_size: int = 16
    """Images sampled together."""
    budget_ms: float | None = None
    """Milliseconds an image may take."""
    target: float | None = None
    """Frechet distance that is good enough (needs --bench)."""
    bench: str | None = None
    """Result of pyrdiff bench on this model."""
    costs: str | None = None
    """JSON to read the step costs from, or to keep them in."""
    device: str | None = None
    """By default the GPU if there is one."""

    def __post_init__(self):
        expect(self, "batch_size", self.batch_size >= 1, "1 or more")
        expect(self, "target", self.target is None or self.budget_ms is None, "either it or --budget_ms")
        expect(self, "target", self.target is None or self.bench is not None, "none without --bench")


def main(args: list[str]) -> dict:
    settings = parse(PlanSettings, __doc__, args, prog="pyrdiff plan")
    check_paths(settings, models=["model"], files=["bench"], written=["costs"])
    known = settings.costs is not None and Path(settings.costs).exists()
    how = f"from {settings.costs}" if known else f"timed here, {settings.batch_size} images together"
    announce(f"what the plans of {settings.model} cost, {how}")
    import pyrdiff
    from pyrdiff.plan import StepCosts, bench_plans, choose, measure_costs

    device = open_device(settings.device)
    pipeline = pyrdiff.load(settings.model)
    if not hasattr(pipeline, "plan"):
        raise ValueError(f"--model: a {type(pipeline).__name__} lays out no plans; expected a model that does")
    pipeline.to(device)
    plans, quality, intervals = dict(pipeline.config.plans or {}), None, None
    if settings.bench:
        plans, quality, intervals = bench_plans(settings.bench)
    if known:
        costs = StepCosts.load(settings.costs)
        costs.check(pipeline, settings.batch_size)
    else:
        costs = measure_costs(pipeline, settings.batch_size, plans, progress=True)
        if settings.costs:
            costs.save(settings.costs)

    print(f"{costs.batch_size} images at a time on {costs.device}, {costs.dtype}:")
    rows = {}
    for name, plan in plans.items():
        laid_out = pipeline.plan(plan=plan)
        calls = [len(level.timesteps) for level in laid_out.levels]
        milliseconds = 1000 * costs.predict(pipeline, plan) / costs.batch_size
        rows[name] = {"plan": plan, "calls": calls, "nfe_eq": laid_out.nfe_eq, "ms_per_image": milliseconds}
        distance = ""
        if quality is not None:
            rows[name] |= {"distance": quality[name], "interval": intervals.get(name)}
            distance = f"  distance {quality[name]:.4g}"
            if name in intervals:
                distance += " [{:.4g}, {:.4g}]".format(*intervals[name])
        calls = "/".join(map(str, calls))
        print(f"  {name:<40} {calls:<14} {laid_out.nfe_eq:>8.2f} NFE-eq {milliseconds:>10.1f} ms an image{distance}")
    chosen = None
    if settings.budget_ms is not None or settings.target is not None:
        chosen = choose(pipeline, costs, plans, settings.budget_ms, quality, settings.target, intervals)
        print(f"chosen: {chosen} {plans[chosen]}")
        if not settings.bench:  # whose arms may have other names than the model's plans
            print(f"next: pyrdiff sample {shlex.quote(settings.model)} --plan {chosen}")
    where = {"batch_size": costs.batch_size, "device": costs.device, "dtype": costs.dtype, "model": costs.model}
    return {"settings": asdict(settings), **where, "plans": rows, "chosen": chosen}
