"""
Plans fitted to the spectra of a model's images (`fitting.py`), and some made by hand, as arms for the bench:

    python benchmarks/fitted_arms.py --model runs/pddpm/pipeline --train my_images --output arms.json
    python benchmarks/bench.py --arms arms.json ...
"""

import json
from pathlib import Path

from fitting import fit
from flags import parser_of
from spectra import Spectra

import pyrdiff
from pyrdiff.data import ImageLevels, open_source

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
    parser = parser_of(__doc__, "model", "array_key")
    parser.add_argument("--train", required=True, help="images that the model was trained on, for their spectra")
    options = parser.parse_args()
    pipeline, arms = pyrdiff.load(options.model), {}
    levels = pipeline.plan(num_inference_steps=2, refine_steps=2, refine_strength=1.0).levels
    source = open_source(options.train, array_key=options.array_key)
    images = ImageLevels.build(source, [level.size for level in levels], channels=pipeline.unet.config.image_channels)
    spectra = Spectra.of(images)
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
