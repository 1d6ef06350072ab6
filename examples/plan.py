"""
What the plans of a model cost on this machine, and which one fits a budget:

    python examples/plan.py --model runs/pddpm/pipeline --batch_size 16 --budget_ms 200

Every level is timed once with each scheduler that a plan runs it with (kept in --costs, if given); the times of plans
are added up from that. With --bench, a JSON of benchmarks/bench.py, plans are chosen by measured quality, also for a
--target; within a budget it is the cheapest of those that cannot be told from the best.
"""

import argparse
import sys


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported folder, or a repository on the Hub")
    parser.add_argument("--batch_size", type=int, default=16, help="images sampled together")
    parser.add_argument("--budget_ms", type=float, help="milliseconds an image may take")
    parser.add_argument("--target", type=float, help="Frechet distance that is good enough (needs --bench)")
    parser.add_argument("--bench", help="JSON of benchmarks/bench.py on this model")
    parser.add_argument("--costs", help="JSON to read the step costs from, or to keep them in")
    parser.add_argument("--device", default=None, help="by default the GPU if there is one")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    from pathlib import Path

    import torch

    import pyrdiff
    from pyrdiff.plan import StepCosts, bench_plans, choose, measure_costs

    pipeline = pyrdiff.load(options.model)
    pipeline.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    plans, quality, intervals = dict(pipeline.config.plans or {}), None, None
    if options.bench:
        plans, quality, intervals = bench_plans(options.bench)
    if options.costs and Path(options.costs).exists():
        costs = StepCosts.load(options.costs)
        costs.check(pipeline, options.batch_size)
    else:
        costs = measure_costs(pipeline, options.batch_size, plans)
        if options.costs:
            costs.save(options.costs)

    print(f"{costs.batch_size} images at a time on {costs.device}, {costs.dtype}:")
    for name, plan in plans.items():
        laid_out = pipeline.plan(plan=plan)
        calls = "/".join(str(len(level.timesteps)) for level in laid_out.levels)
        each = 1000 * costs.predict(pipeline, plan) / costs.batch_size
        distance = ""
        if quality is not None:
            distance = "  distance {:.4g} [{:.4g}, {:.4g}]".format(quality[name], *intervals[name])
        print(f"  {name:<40} {calls:<14} {laid_out.nfe_eq:>8.2f} NFE-eq {each:>10.1f} ms an image{distance}")
    if options.budget_ms is not None or options.target is not None:
        chosen = choose(pipeline, costs, plans, options.budget_ms, quality, options.target, intervals)
        print(f"chosen: {chosen} {plans[chosen]}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
