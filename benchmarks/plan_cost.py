"""
The predicted time of plans against the measured one, on an idle machine:

    python benchmarks/plan_cost.py --model runs/pddpm/pipeline --output benchmarks/results/plan_cost.json

`pyrdiff.plan.measure_costs` times a step of every scheduler at every level once; then the plans are run in turn, again
and again.
"""

import statistics
import time
from functools import partial

import report
import torch
from flags import parser_of
from samplers import SDE

import pyrdiff
from pyrdiff.machine import in_turn
from pyrdiff.plan import CLIP, measure_costs

SDE = [SDE[0], {**SDE[1], **CLIP}]
PLANS = {
    "100/8/8, DDPM": {"num_inference_steps": 100, "refine_steps": 8},
    "50/5/5, DDPM": {"num_inference_steps": 50, "refine_steps": 5},
    "250/4/2, DDPM": {"num_inference_steps": 250, "refine_steps": [4, 2]},
    "20/4/2, SDE-DPM-Solver++": {"num_inference_steps": 20, "refine_steps": [4, 2], "scheduler": SDE},
    "30/2/1, SDE-DPM-Solver++": {"num_inference_steps": 30, "refine_steps": [2, 1], "scheduler": SDE},
}


def measure(options) -> dict:
    torch.set_num_threads(options.threads)
    pipeline = pyrdiff.load(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    top = {"num_inference_steps": 10, "resolutions": [pipeline.plan().levels[-1].size], "scheduler": SDE}
    plans = {**PLANS, "10 at the top, SDE-DPM-Solver++": top}
    began = time.perf_counter()
    costs = measure_costs(pipeline, options.batch_size, plans)
    spent = time.perf_counter() - began

    def run(plan: dict, turn: int) -> None:
        generator = torch.Generator(pipeline.device).manual_seed(turn + 1)
        pipeline(options.batch_size, plan=plan, generator=generator, output_type="latent")

    seconds = in_turn({name: partial(run, plan) for name, plan in plans.items()}, options.runs, pipeline.device)
    rows = []
    for name, plan in plans.items():
        laid_out, measured = pipeline.plan(plan=plan), statistics.median(seconds[name])
        predicted = costs.predict(pipeline, plan)
        rows.append(
            {
                "name": name,
                "nfe_eq": laid_out.nfe_eq,
                "predicted": predicted,
                "measured": measured,
                "runs": seconds[name],
                "error": predicted / measured - 1,
            }
        )
    return {
        "bench": "plan_cost",
        "batch_size": options.batch_size,
        "model": {"parameters": sum(p.numel() for p in pipeline.unet.parameters())},
        "costs": {
            f"{size} with {name}": value for name, sizes in costs.seconds.items() for size, value in sizes.items()
        },
        "measuring": spent,
        **report.surroundings(options.threads),
        "rows": rows,
    }


def table(result: dict) -> str:
    steps = ", ".join(f"{1000 * value:.1f} ms at {name}" for name, value in result["costs"].items())
    lines = [
        f"{result['model']['parameters'] / 1e6:.1f}M parameters, batch {result['batch_size']}; a step: {steps}, "
        f"measured in {result['measuring']:.0f} s. {report.caption(result)}",
        "",
        "| plan | NFE-eq | predicted, s | measured, s, median (min) of n | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        measured = f"{row['measured']:.2f} ({min(row['runs']):.2f}) of {len(row['runs'])}"
        lines.append(
            f"| {row['name']} | {row['nfe_eq']:.2f} | {row['predicted']:.2f} | {measured} | {1 + row['error']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = parser_of(__doc__, "model", "batch_size", "runs").parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
