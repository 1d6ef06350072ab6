"""
Finds the best few network calls of a model that `examples/train_sr.py` trained: for each number of calls, every pair of
a first time and a power that spaces the others, times every sampler, on images that the tables do not use.

    python benchmarks/few_steps.py --models SR4=runs/sr4/pipeline --reference train_images --output plans.json

The times of n calls are start * ((n - k) / n) ** power of the process, k from 0. The best has the lowest LPIPS: PSNR
would choose what is nearest to the mean of all answers.
"""

import itertools
import time

import report
import residual_sr
import torch
from samplers import SDE

STARTS = (0.85, 0.92, 0.96)
POWERS = (0.35, 0.5, 0.7, 1.0)
SAMPLERS = {
    "ancestral": {},
    "DDIM": {"eta": 0.0},
    "SDE-DPM-Solver++": {"scheduler": SDE},
}


def times_of(train_steps: int, calls: int, start: float, power: float) -> list[int]:
    """Descending times, the first at that share of the process and none before 0."""
    times = [round(start * train_steps * ((calls - k) / calls) ** power) - 1 for k in range(calls)]
    return [min(value, train_steps - 1 - k) for k, value in enumerate(times)]


def measure(options) -> dict:
    torch.set_num_threads(options.threads)
    (model, (pipeline, folder)), *others = residual_sr.open_models(options).items()
    if others:
        raise SystemExit("--models: expected one")
    config = pipeline.unet.config
    pairs = residual_sr.Pairs(options, config.sample_size, config.image_channels, max(config.scale_factors))
    train_steps, rows = pipeline.scheduler.config.num_train_timesteps, []
    for calls, start, power, name in itertools.product(options.calls, STARTS, POWERS, SAMPLERS):
        times = times_of(train_steps, calls, start, power)
        if times != sorted(set(times), reverse=True) or times[-1] < 0 or (calls == 1 and power != POWERS[0]):
            continue
        plan = {"num_inference_steps": calls, "spacing": times, **SAMPLERS[name]}
        began = time.perf_counter()
        images = residual_sr.enlarge(pipeline, pairs.low, options.batch_size, options.seed, plan=plan)
        seconds = (time.perf_counter() - began) / len(images)
        row = {"calls": calls, "start": start, "power": power, "sampler": name, "plan": plan}
        rows.append({**row, "seconds_an_image": seconds, **pairs.scores(images)})
        print(f"{calls} {name} {start} {power}: {rows[-1]['psnr']:.2f} {rows[-1]['lpips']:.4f}", flush=True)
    best = {}
    for calls in options.calls:
        chosen = min((row for row in rows if row["calls"] == calls), key=lambda row: row["lpips"])
        best[f"found {calls}: {chosen['sampler']}"] = chosen["plan"]
    return {
        "bench": "few_steps",
        "title": options.title,
        "images": options.images,
        "seed": options.seed,
        "lpips": options.lpips,
        "train_steps": train_steps,
        "plans": best,
        **report.surroundings(options.threads),
        "rows": rows,
    }


def table(result: dict) -> str:
    lines = [
        f"{result['title']} the best spacings of {result['train_steps']} training steps for few calls, by LPIPS "
        f"{result['lpips']} on {result['images']} images that no other table uses; of each sampler the best. Seed "
        f"{result['seed']}. {report.caption(result)}",
        "",
        "| calls | sampler | first time | power | PSNR | SSIM | LPIPS |",
        "|---" * 7 + "|",
    ]
    for calls in sorted({row["calls"] for row in result["rows"]}, reverse=True):
        for name in SAMPLERS:
            mine = [row for row in result["rows"] if row["calls"] == calls and row["sampler"] == name]
            if mine:
                row = min(mine, key=lambda row: row["lpips"])
                lines.append(
                    f"| {calls} | {name} | {row['start']:g} | {row['power']:g} | {row['psnr']:.2f} | {row['ssim']:.3f} "
                    f"| {row['lpips']:.3f} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = residual_sr.parser_for(__doc__)
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
