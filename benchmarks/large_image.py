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

import memory
import report
import torch
from diffusers import DiffusionPipeline
from flags import parser_of
from pictures import write_rows
from PIL import Image
from samplers import SDE, scheduler_like

import pyrdiff
from pyrdiff.data import image_tensor
from pyrdiff.machine import in_turn
from pyrdiff.metrics import psnr
from pyrdiff.parts.levels import padded_grid
from pyrdiff.parts.windows import Tiling, WindowedNetwork


def steps(image: torch.Tensor, places: list[int]) -> tuple[float, float]:
    """Mean absolute difference between neighbouring rows and columns of [1, C, H, W]: at the places, and elsewhere."""
    at, elsewhere = [], []
    for axis in (-1, -2):
        difference = image.diff(dim=axis).abs().mean(tuple(k for k in range(4) if k != 4 + axis))
        chosen = torch.zeros(len(difference), dtype=torch.bool)
        chosen[[place - 1 for place in places]] = True
        at.append(difference[chosen])
        elsewhere.append(difference[~chosen])
    return torch.cat(at).mean().item(), torch.cat(elsewhere).mean().item()


def guided_step(pipeline: DiffusionPipeline, turns: int) -> dict[str, float]:
    """Seconds of a step with guidance: its network call, and call and gradient."""
    device, multiple = pipeline.unet.device, pipeline._size_multiple
    network = WindowedNetwork(pipeline._predict, multiple, None)
    sample = torch.randn(8, pipeline.unet.config.image_channels, 64, 64, device=device)
    grid, noise_time = padded_grid(64, 64, multiple).to(device), torch.tensor(100, device=device)
    pipeline.unet.requires_grad_(False)

    def gradient(turn: int) -> None:
        prediction = network.differentiate(sample, noise_time, grid)
        prediction.pull(prediction.output)

    works = {"forward": lambda turn: network.predict(sample, noise_time, grid), "gradient": gradient}
    with torch.no_grad():
        seconds = in_turn(works, turns, device)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def seams(windows: list) -> list[int]:
    """Where windows begin and end, and in the middle of what neighbours share, where they have as much weight each."""
    edges = sorted({(side.start, side.stop) for window in windows for side in (window.rows, window.columns)})
    places = {start for start, _ in edges[1:]} | {stop for _, stop in edges[:-1]}
    places |= {(stop + start) // 2 for (_, stop), (start, _) in zip(edges, edges[1:], strict=False)}
    return sorted(places)


def measure(options) -> dict:
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = pyrdiff.load(options.model, pipeline_class="GuidedSRPipeline").to(device)
    pipeline.register_modules(scheduler=scheduler_like(pipeline.scheduler, *SDE))
    channels = pipeline.unet.config.image_channels
    photo = Image.open(options.image).convert("RGB" if channels == 3 else "L")
    arguments = dict(
        scale_factor=options.factor, refine_steps=options.refine_steps, refine_strength=options.refine_strength,
        guidance=options.guidance,
    )  # fmt: skip

    def middle(side: int) -> Image.Image:
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        return photo.crop((left, top, left + side, top + side))

    def run(side: int, **more):
        generator = torch.Generator().manual_seed(options.seed)
        return pipeline(middle(side), generator=generator, output_type="pt", **arguments, **more)

    # First of all, so that no memory is left over from other work.
    outputs = []
    began = time.perf_counter()
    used = memory.of(lambda: outputs.append(run(options.side, tile=options.tile)), device)
    seconds = time.perf_counter() - began
    image, off = outputs[0].images.cpu(), outputs[0].consistency.item()
    step = guided_step(pipeline, options.turns)
    small, whole = (run(options.small_side, **more).images.cpu() for more in ({"tile": options.tile}, {}))

    multiple = pipeline._size_multiple
    network = WindowedNetwork(pipeline._predict, multiple, Tiling.checked(options.tile, None, multiple))
    windows = network.windows(image)
    places = seams(windows)
    ratios = [at / elsewhere for at, elsewhere in (steps(image, [place]) for place in places)]
    border, interior = steps(image, places)
    plain = middle(options.side).resize(image.shape[:-3:-1], Image.Resampling.BICUBIC)
    plain_border, plain_interior = steps(image_tensor([plain], channels), places)
    if options.images:
        for name, shown in (("large", image), ("windows", small), ("whole", whole)):
            write_rows([shown], Path(options.images) / f"{name}.png")
    return {
        "bench": "large_image",
        "sizes": {"input": options.side, "output": image.shape[-1], "fits": whole.shape[-1]},
        "tile": options.tile,
        "arguments": arguments,
        "seed": options.seed,
        "memory_gib": {"before": used.before / 2**30, "peak": used.peak / 2**30, "above": used.above / 2**30},
        "seconds": seconds,
        "consistency_255": 255 * off,
        "border_step": border,
        "interior_step": interior,
        "plain_ratio": plain_border / plain_interior,
        "worst_seam": max(ratios),
        "windows": len(windows),
        "agreement_db": psnr(small, whole, data_range=(0, 1)).value,
        "guided_step": step,
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
