"""
A super-resolution model on pairs of files, such as Set5, in windows: PSNR and SSIM of luma with the border left out, as
the literature has them, LPIPS, and seconds, beside bicubic.

    python benchmarks/photos_sr.py --model runs/sr/pipeline --low LR --high HR --tile 128 --output result.json
"""

import statistics
import time
from pathlib import Path

import report
import scoring
import torch
from flags import LPIPS, parser_of
from pictures import write_rows

import pyrdiff
from pyrdiff import metrics
from pyrdiff.data import decode_image, image_tensor, list_images

EXTRAS = {"": {}, ", hard consistency": {"hard_consistency": True}, ", mean of 4": {"num_samples": 4}}
MEANS = ("psnr_y", "ssim_y", "lpips", "consistency", "seconds")


def measure(options) -> dict:
    torch.set_num_threads(options.threads)
    pipeline = pyrdiff.load(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    factor = max(pipeline.unet.config.scale_factors)
    offered = pipeline.config.plans or {}
    if not set(options.plans) <= set(offered):
        raise SystemExit(f"--plans={options.plans}: expected some of {sorted(offered)}")
    arms = {"bicubic": None}
    arms |= {f"{name}{extra}": (offered[name], extra) for name in options.plans for extra in EXTRAS}
    rows = []
    for name, arm in arms.items():
        scores = []
        for low_path, high_path in zip(list_images(options.low), list_images(options.high), strict=True):
            low, high = (image_tensor([decode_image(path, 3)]) for path in (low_path, high_path))
            began = time.perf_counter()
            made = enlarge(pipeline, low, tuple(high.shape[-2:]), arm, options)
            seconds = time.perf_counter() - began
            made = (made * 255).round() / 255
            scores.append({"image": high_path.stem, **scores_of(made, high, low, factor, options), "seconds": seconds})
            if options.grids:
                write_rows([made], Path(options.grids) / f"{high_path.stem}-{name}.png")
        means = {key: statistics.mean(score[key] for score in scores) for key in MEANS}
        calls = None if arm is None else pipeline.num_timesteps
        rows.append({"name": name, "calls": calls, "plan": arm and arm[0], "each": scores, **means})
        print(f"{name}: {means['psnr_y']:.2f} dB, LPIPS {means['lpips']:.4f}, {means['seconds']:.1f} s", flush=True)
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


def enlarge(pipeline, low: torch.Tensor, size: tuple[int, int], arm: tuple | None, options) -> torch.Tensor:
    """An output [1, 3, H, W] in [0, 1], or the mean of several; `None` is bicubic."""
    if arm is None:
        return pipeline.upsample(low, size).clamp(0, 1)
    plan, extra = arm
    generator = torch.Generator().manual_seed(options.seed)
    given = dict(plan=plan, tile=options.tile, generator=generator, output_type="pt")
    output = pipeline(low, **given, **EXTRAS[extra])
    return (output.images if output.mean is None else output.mean).cpu()


def scores_of(made: torch.Tensor, high: torch.Tensor, low: torch.Tensor, factor: int, options) -> dict:
    unit = dict(data_range=(0, 1))
    luma = dict(**unit, channels="y", crop_border=factor)
    return {
        "size": list(high.shape[-2:]),
        "psnr_y": metrics.psnr(made, high, **luma).value,
        "ssim_y": metrics.ssim(made, high, **luma).value,
        "lpips": metrics.lpips(made, high, **unit, network=options.lpips, weights=options.lpips_weights).value,
        "consistency": metrics.consistency(made, low, **unit).value,
    }


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
    parser = parser_of(__doc__, "model", *LPIPS, "seed", "grids", "title")
    parser.add_argument("--low", required=True, help="folder of inputs")
    parser.add_argument("--high", required=True, help="folder of originals, with the same names")
    parser.add_argument("--tile", type=int, help="side of the windows")
    parser.add_argument("--plans", nargs="+", default=["default"], help="of the model, by name")
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
