"""
Plans fitted to a model's own spectra (`pyrdiff.plan.fit`), and some made by hand, as arms for the bench:

    python benchmarks/fitted_arms.py --model runs/pddpm/pipeline --output arms.json
    python benchmarks/bench.py --arms arms.json ...
"""

import argparse
import json
from pathlib import Path

FITTED = (("dpmsolver++", (10, 4, 4)), ("dpmsolver++", (20, 5, 5)), ("sde-dpmsolver++", (20, 4, 2)))
SHORT = {"dpmsolver++": "DPM-Solver++", "sde-dpmsolver++": "SDE-DPM-Solver++"}
BY_HAND = (  # a long lowest level, which is cheap, and ever shorter refinements
    ("SDE-DPM-Solver++", (50, 4, 2)),
    ("SDE-DPM-Solver++", (40, 2, 1)),
    ("DDPM + SDE-DPM-Solver++", (100, 4, 2)),
    ("DDPM + SDE-DPM-Solver++", (50, 2, 1)),
)
CLASSES = {
    "DPM-Solver++": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"},
    "SDE-DPM-Solver++": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
    "DDPM": {"_class_name": "DDPMScheduler"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported pipeline of three levels, with spectra")
    parser.add_argument("--output", required=True, help="JSON to write")
    options = parser.parse_args()
    import pyrdiff
    from pyrdiff.plan import Spectra, fit

    pipeline = pyrdiff.load(options.model)
    if not pipeline.config.spectra:
        parser.error(f"--model {options.model}: has no spectra; expected a pipeline that the trainer exported")
    spectra, arms = Spectra.from_dict(pipeline.config.spectra), {}
    for solver, calls in FITTED:
        fitted = fit(spectra, pipeline.scheduler.alphas_cumprod, calls, solver)
        print(f"{solver} {calls}: power an octave {[round(value, 2) for value in fitted.octaves]}", flush=True)
        arms[f"fitted {'/'.join(map(str, calls))}, {SHORT[solver]}"] = {
            "method": "pyramid, fitted",
            "scheduler": CLASSES[SHORT[solver]],
            "arguments": {key: fitted.plan[key] for key in ("resolutions", "spacing")},
        }
    for method, (low, *higher) in BY_HAND:
        first, _, second = method.partition(" + ")
        arms[f"pyramid {'/'.join(map(str, (low, *higher)))}, {method}"] = {
            "method": f"pyramid, {method}",
            "scheduler": CLASSES[first],
            "refine_scheduler": CLASSES.get(second),
            "arguments": {"num_inference_steps": low, "refine_steps": higher},
        }
    Path(options.output).write_text(json.dumps(arms, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
