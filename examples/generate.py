"""
Sample a model that pyrdiff exported, with nothing but diffusers:

    python examples/generate.py --model runs/pddpm/pipeline --trust_remote_code --batch_size 8 --output_dir samples

Writes every image, and a picture of how they came about. Of a pyramidal model that is pyramid.png: each level of the
same samples, with its steps and seconds. Of a pixel-aware one it is trajectory.png: structure, the states that follow
from the network's predictions, and the samples.
"""

import argparse
import inspect
import sys
import time
from itertools import accumulate, pairwise
from pathlib import Path

AT_THE_TOP = {"DDPM 1000": 1000, "DDIM 50": 50, "DPM-Solver++ 20": 20}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported folder, or a repository on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    parser.add_argument("--output_dir", default="samples")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--plan", help="a plan that the model carries, such as fast; instead of the next three")
    parser.add_argument("--num_inference_steps", type=int, help="network calls at the lowest level (100)")
    parser.add_argument("--refine_steps", type=int, help="network calls at each higher level (8)")
    parser.add_argument("--refine_strength", type=float, help="noise that higher levels start from, (0, 1] (0.3)")
    parser.add_argument("--num_passes", type=int, help="network calls of a pixel-aware model (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="by default the GPU if there is one")
    return parser.parse_args()


def print_costs(pipeline) -> None:
    """The cost of some plans in NFE-eq (one network call at the top level), and how much cheaper that is."""
    print(f"{'plan':<12} {'calls a level':<16} {'NFE-eq':>8}  " + "  ".join(f"vs {name:<15}" for name in AT_THE_TOP))
    for name in (None, *(pipeline.config.plans or {})):
        plan = pipeline.plan(plan=name)
        calls = "/".join(str(len(level.timesteps)) for level in plan.levels)
        ratios = "  ".join(f"x{steps / plan.nfe_eq:<17.1f}" for steps in AT_THE_TOP.values())
        print(f"{name or 'default':<12} {calls:<16} {plan.nfe_eq:>8.2f}  {ratios}")


def draw_pyramid(levels, plan, seconds: list[float], path: Path) -> None:
    """A row a level: resolution, network calls and seconds beside the samples."""
    from matplotlib.figure import Figure

    columns = len(levels[0])
    figure = Figure(figsize=(1.7 + 1.1 * columns, 1.15 * len(levels)), layout="constrained")
    axes = figure.subplots(len(levels), columns, squeeze=False)
    for row, (images, level, taken) in enumerate(zip(levels, plan.levels, seconds, strict=True)):
        for column, image in enumerate(images):
            axes[row][column].imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes[row][column].set(xticks=[], yticks=[])
        label = "{}x{}".format(*level.size) + f"\n{len(level.timesteps)} steps\n{taken:.2f} s"
        axes[row][0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)


def main() -> None:
    options = arguments()
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    pipeline.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    generators = [torch.Generator().manual_seed(options.seed + index) for index in range(options.batch_size)]
    known = inspect.signature(pipeline.__call__).parameters
    quick = "return_trajectory" in known
    for name in ("plan", "num_inference_steps", "refine_steps", "refine_strength", "num_passes"):
        if getattr(options, name) is not None and name not in known:
            raise ValueError(f"--{name}: not for a {type(pipeline).__name__}")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    generate = generate_in_few_calls if quick else generate_from_coarse_to_fine
    images = generate(pipeline, options, generators, folder)
    for index, image in enumerate(images):
        image.save(folder / f"{options.seed + index:05d}.png")


def generate_in_few_calls(pipeline, options: argparse.Namespace, generators: list, folder: Path) -> list:
    """Samples of a `ParallelTrajectoryPipeline`, and trajectory.png."""
    from diffusers.utils import make_image_grid

    total = len(pipeline.scheduler)
    steps = sorted({max(total * k // 8, 1) for k in range(1, 9)}, reverse=True)
    passes = 1 if options.num_passes is None else options.num_passes
    began = time.perf_counter()
    output = pipeline(
        options.batch_size,
        num_passes=passes,
        generator=generators,
        return_trajectory=True,
        trajectory_steps=steps,
    )
    seconds = time.perf_counter() - began
    columns = [output.structure, *output.trajectory, output.images]
    rows = zip(*columns, strict=True)
    grid = make_image_grid([image for row in rows for image in row], options.batch_size, len(columns))
    grid.save(folder / "trajectory.png")
    print(f"{options.batch_size} images in {seconds:.2f} s, {passes} network calls: {folder / 'trajectory.png'}")
    return output.images


def generate_from_coarse_to_fine(pipeline, options: argparse.Namespace, generators: list, folder: Path) -> list:
    """Samples of a `PyramidalPipeline`, and pyramid.png."""
    import matplotlib.figure  # noqa: F401, said now if it is missing, and not after the work
    import torch

    print_costs(pipeline)
    names = ("plan", "num_inference_steps", "refine_steps", "refine_strength")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    plan, ticks = pipeline.plan(**chosen), []

    def tick(pipe, step, timestep, tensors):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ticks.append(time.perf_counter())

    began = time.perf_counter()
    output = pipeline(options.batch_size, generator=generators, return_levels=True, callback_on_step_end=tick, **chosen)

    calls = accumulate(len(level.timesteps) for level in plan.levels)
    ends = [began, *(ticks[count - 1] for count in calls)]
    seconds = [end - start for start, end in pairwise(ends)]
    draw_pyramid(output.levels, plan, seconds, folder / "pyramid.png")
    print(f"{options.batch_size} images in {sum(seconds):.2f} s: {folder / 'pyramid.png'}")
    return output.images


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
