"""
A super-resolution model on pairs of files, such as Set5, in windows: PSNR and SSIM of luma with the border left out, as
the literature has them, LPIPS, and seconds, beside bicubic.

    python benchmarks/photos_sr.py --model runs/sr/pipeline --low LR --high HR --tile 128 --output result.json
"""

import argparse
import os
import time
from pathlib import Path

import report
import scoring

EXTRAS = {"": {}, ", hard consistency": {"hard_consistency": True}, ", mean of 4": {"num_samples": 4}}


def measure(options) -> dict:
    import torch

    import pyrdiff
    from pyrdiff.data import list_images
    from pyrdiff.metrics import consistency, lpips, psnr, ssim

    torch.set_num_threads(options.threads)
    pipeline = pyrdiff.load(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    factor = max(pipeline.unet.config.scale_factors)
    offered = pipeline.config.plans or {}
    if not set(options.plans) <= set(offered):
        raise SystemExit(f"--plans: got {options.plans}; this model has {sorted(offered)}")
    plans = {name: offered[name] for name in options.plans}
    arms = {"bicubic": None, **{f"{name}{extra}": (plan, extra) for name, plan in plans.items() for extra in EXTRAS}}
    rows = []
    for name, arm in arms.items():
        found = []
        for low_path, high_path in zip(list_images(options.low), list_images(options.high), strict=True):
            low, high = (floats(path) for path in (low_path, high_path))
            began = time.perf_counter()
            if arm is None:
                made = pipeline.upsample(low, tuple(high.shape[-2:])).clamp(0, 1)
            else:
                generator = torch.Generator().manual_seed(options.seed)
                plan, extra = arm
                output = pipeline(
                    low, plan=plan, tile=options.tile, generator=generator, output_type="pt", **EXTRAS[extra]
                )
                made = (output.images if output.mean is None else output.mean).cpu()
            seconds = time.perf_counter() - began
            made = (made * 255).round() / 255
            known = dict(data_range=(0, 1))
            luma = dict(**known, channels="y", crop_border=factor)
            score = lpips(made, high, **known, network=options.lpips, weights=options.lpips_weights)
            found.append(
                {
                    "image": high_path.stem,
                    "size": list(high.shape[-2:]),
                    "psnr_y": psnr(made, high, **luma).value,
                    "ssim_y": ssim(made, high, **luma).value,
                    "lpips": score.value,
                    "consistency": consistency(made, low, **known).value,
                    "seconds": seconds,
                }
            )
            if options.grids:
                save(made, Path(options.grids) / f"{high_path.stem}-{name}.png".replace(" ", "_"))
        keys = ("psnr_y", "ssim_y", "lpips", "consistency", "seconds")
        mean = {key: sum(each[key] for each in found) / len(found) for key in keys}
        calls = None if arm is None else pipeline.num_timesteps
        rows.append({"name": name, "calls": calls, "plan": arm and arm[0], "each": found, **mean})
        print(f"{name}: {mean['psnr_y']:.2f} dB, LPIPS {mean['lpips']:.4f}, {mean['seconds']:.1f} s", flush=True)
    return {
        "bench": "photos_sr",
        "title": options.title,
        "factor": factor,
        "tile": options.tile,
        "lpips": options.lpips,
        "seed": options.seed,
        "model": scoring.model_hash(options.model),
        **report.surroundings(options.threads),
        "rows": rows,
    }


def floats(path: Path):
    """float32 [1, 3, H, W] in [0, 1]."""
    import numpy as np
    import torch

    from pyrdiff.data import decode_image

    return torch.from_numpy(np.array(decode_image(path, 3))).permute(2, 0, 1)[None].float() / 255


def save(images, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def table(result: dict) -> str:
    factor, each = result["factor"], result["rows"][0]["each"]
    lines = [
        f"{result['title']} x{factor}, {len(each)} images, windows of {result['tile']} pixels; PSNR and SSIM of luma "
        f"without {factor} pixels at the border, LPIPS {result['lpips']} of the whole, consistency the mean squared "
        f"error at the input's size, x 1e-5. Seed {result['seed']}. {report.caption(result)}",
        "",
        "| arm | calls | PSNR-Y | SSIM-Y | LPIPS | consistency | s an image |",
        "|---" * 7 + "|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['name']} | {row['calls'] or '-'} | {row['psnr_y']:.2f} | {row['ssim_y']:.3f} | {row['lpips']:.3f} "
            f"| {row['consistency']:.1f} | {row['seconds']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported pipeline of examples/train_sr.py")
    parser.add_argument("--low", required=True, help="folder of inputs")
    parser.add_argument("--high", required=True, help="folder of originals, with the same names")
    parser.add_argument("--tile", type=int, help="side of the windows")
    parser.add_argument("--plans", nargs="+", default=["default"], help="of the model, by name")
    parser.add_argument("--lpips", default="squeeze", choices=("alex", "squeeze", "vgg"))
    parser.add_argument("--lpips_weights", help="of LPIPS' network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--grids", help="folder for the outputs")
    parser.add_argument("--title", default="Images,", help="what the table says first")
    parser.add_argument("--output", required=True, help="JSON to write")
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
