"""
Large images in windows: memory, what the windows leave to be seen, and what a step with guidance costs:

    python benchmarks/large_image.py --model runs/photos/pipeline --image photo.png --factor 4 --tile 256 \
        --output benchmarks/results/large_image.json

The middle --side x --side pixels of the photograph are enlarged in windows. A part that fits as a whole is enlarged in
windows and without, from the same noise.
"""

import statistics
import time
from pathlib import Path

import report
from flags import parser_of


def resident() -> float:
    """GiB of memory that the process holds."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 2**20


def steps(image, places) -> tuple[float, float]:
    """Mean absolute difference between neighbouring rows and columns of [1, C, H, W]: at the places, and elsewhere."""
    import torch

    at, elsewhere = [], []
    for axis in (-1, -2):
        difference = image.diff(dim=axis).abs().mean(tuple(k for k in range(4) if k != 4 + axis))
        chosen = torch.zeros(len(difference), dtype=torch.bool)
        chosen[[place - 1 for place in places]] = True
        at.append(difference[chosen])
        elsewhere.append(difference[~chosen])
    return torch.cat(at).mean().item(), torch.cat(elsewhere).mean().item()


def measure(options) -> dict:
    import numpy as np
    import torch
    from diffusers import DPMSolverMultistepScheduler
    from PIL import Image

    import pyrdiff
    from pyrdiff.metrics import psnr
    from pyrdiff.parts.levels import padded_grid
    from pyrdiff.parts.windows import Tiling, WindowedNetwork

    torch.set_num_threads(options.threads)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    pipeline = pyrdiff.load(options.model, pipeline_class="GuidedSRPipeline").to(device)
    config = pipeline.scheduler.config
    process = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    pipeline.register_modules(
        scheduler=DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", **{key: config[key] for key in process if key in config}
        )
    )
    photo = Image.open(options.image).convert("RGB" if pipeline.unet.config.image_channels == 3 else "L")
    arguments = dict(
        scale_factor=options.factor, refine_steps=options.refine_steps, refine_strength=options.refine_strength,
        guidance=options.guidance,
    )  # fmt: skip

    def middle(side: int):
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        return photo.crop((left, top, left + side, top + side))

    def run(image, **more):
        generator = torch.Generator().manual_seed(options.seed)
        began = time.perf_counter()
        output = pipeline(image, generator=generator, output_type="pt", **arguments, **more)
        return output.images.cpu(), output.consistency.item(), time.perf_counter() - began

    # First of all, so that no memory is left over from other work.
    before = torch.cuda.memory_allocated() / 2**30 if cuda else resident()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    image, off, seconds = run(middle(options.side), tile=options.tile)
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(fields["VmHWM"].split()[0]) / 2**20

    # What a step with guidance costs, in network calls of the same size.
    multiple = pipeline._size_multiple
    network = WindowedNetwork(pipeline._predict, multiple, None)
    sample = torch.randn(8, pipeline.unet.config.image_channels, 64, 64, device=device)
    grid = padded_grid(64, 64, multiple).to(device)
    noise_time, costs = torch.tensor(100, device=device), {"forward": [], "gradient": []}
    pipeline.unet.requires_grad_(False)
    for turn in range(options.turns + 1):
        for kind in costs:
            began = time.perf_counter()
            with torch.no_grad():
                if kind == "forward":
                    network.predict(sample, noise_time, grid)
                else:
                    prediction = network.differentiate(sample, noise_time, grid)
                    prediction.pull(prediction.output)
            if cuda:
                torch.cuda.synchronize()
            if turn:
                costs[kind].append(time.perf_counter() - began)

    small, _, _ = run(middle(options.small_side), tile=options.tile)
    whole, _, _ = run(middle(options.small_side))
    agreement = psnr(small, whole, data_range=(0, 1)).value

    network = WindowedNetwork(pipeline._predict, multiple, Tiling.checked(options.tile, None, multiple))
    # Where windows begin and end, and in the middle of what neighbours share, where they have as much weight each.
    sides = [side for window in network.windows(image) for side in (window.rows, window.columns)]
    edges = sorted({(side.start, side.stop) for side in sides})
    seams = {start for start, _ in edges[1:]} | {stop for _, stop in edges[:-1]}
    seams |= {(stop + start) // 2 for (_, stop), (start, _) in zip(edges, edges[1:], strict=False)}
    ratios = {place: steps(image, [place]) for place in sorted(seams)}
    border, interior = steps(image, sorted(seams))
    plain = middle(options.side).resize(image.shape[:-3:-1], Image.Resampling.BICUBIC)
    plain = (
        torch.from_numpy(np.array(plain, dtype=np.float32)).reshape(*image.shape[-2:], -1).permute(2, 0, 1)[None] / 255
    )
    plain_border, plain_interior = steps(plain, sorted(seams))
    if options.images:
        folder = Path(options.images)
        folder.mkdir(parents=True, exist_ok=True)
        for name, shown in (("large", image), ("windows", small), ("whole", whole)):
            pixels = (shown[0] * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(np.squeeze(pixels)).save(folder / f"{name}.png")
    return {
        "bench": "large_image",
        "sizes": {"input": options.side, "output": image.shape[-1], "fits": whole.shape[-1]},
        "tile": options.tile,
        "arguments": arguments,
        "seed": options.seed,
        "memory_gib": {"before": before, "peak": peak, "above": peak - before},
        "seconds": seconds,
        "consistency_255": 255 * off,
        "border_step": border,
        "interior_step": interior,
        "plain_ratio": plain_border / plain_interior,
        "worst_seam": max(at / elsewhere for at, elsewhere in ratios.values()),
        "windows": len(network._windows()),
        "agreement_db": agreement,
        "guided_step": {kind: statistics.median(values) for kind, values in costs.items()},
        **report.surroundings(options.threads),
    }


def table(result: dict) -> str:
    sizes, memory, step = result["sizes"], result["memory_gib"], result["guided_step"]
    settings = ", ".join(f"{key} {value}" for key, value in result["arguments"].items())
    seams = result["border_step"] / result["interior_step"]
    rows = {
        f"peak memory above the weights, {sizes['output']}x{sizes['output']}": f"{memory['above']:.2f} GiB",
        "time": f"{result['seconds']:.0f} s",
        f"windows of {result['tile']}": str(result["windows"]),
        "consistency": f"{result['consistency_255']:.3f} /255",
        "step at windows' borders and mid-overlaps / elsewhere": f"{seams:.3f}",
        "the same places in the bicubic enlargement": f"{result['plain_ratio']:.3f}",
        f"windows against the whole, {sizes['fits']}x{sizes['fits']}": f"{result['agreement_db']:.1f} dB",
        "step with gradient / network call": f"{step['gradient'] / step['forward']:.2f}",
    }
    lines = [f"{settings}, seed {result['seed']}. {report.caption(result)}", "", "| | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items()])


def main() -> None:
    parser = parser_of(__doc__, "model", "seed")
    parser.add_argument("--image", required=True, help="photograph, its sides at least --side")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--small_side", type=int, default=96, help="what is enlarged as a whole, too")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--guidance", default="projection")
    parser.add_argument("--refine_steps", type=int, default=4)
    parser.add_argument("--refine_strength", type=float, default=0.2)
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--images", help="folder for the images")
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
