"""
Parameters, multiply-adds, time and memory of the heads that predict the noises of all steps at once (paper X, eq. 14),
on features of the paper's two networks, beside what `head_cost` says in closed form:

    python benchmarks/trajectory_heads.py --output benchmarks/results/trajectory_heads.json

Each head runs in a process of its own, one image, all T steps; "tied" is the scheduler's closed form.
"""

import argparse
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import report

HEADS = ("tied", "lowrank", "grouped", "literal")
PRESETS = {"paper-cifar10": (32, 30.3, 41.2), "paper-celeba": (128, 61.3, 84.2)}  # side; the paper's millions


def run(preset: str, head: str, runs: int, threads: int) -> dict:
    """One head: what it is said to cost, and what it does."""
    import torch

    from pyrdiff import ParallelTrajectoryUNet2DModel, PixelAwareScheduler

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    side, target = PRESETS[preset][0], "clean" if head == "tied" else "noise"
    network = ParallelTrajectoryUNet2DModel.from_preset(preset, head=head, target=target).eval()
    steps = network.config.num_train_timesteps
    features = torch.randn(1, network.config.decoder_channels[-1], side, side)
    embedding, times = torch.randn(1, network.config.time_embedding_dim), torch.tensor([float(steps)])
    scheduler, clean = PixelAwareScheduler(num_train_timesteps=steps), torch.rand(1, 3, side, side).clamp(min=4e-3)
    every, noise = list(range(1, steps + 1)), torch.randn(1, 3, side, side)

    def work():
        if head == "tied":
            return scheduler.tied_noise(noise, clean, steps, every)
        return network._noises(features, embedding, times, every)

    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    with torch.no_grad():
        for _ in range(runs):
            began = time.perf_counter()
            found = work()
            seconds.append(time.perf_counter() - began)
    assert found.shape == (steps, 1, 3, side, side)
    return {
        "preset": preset,
        "head": head,
        "steps": steps,
        "side": side,
        **network.head_cost(side, side),
        "total_parameters": sum(p.numel() for p in network.parameters()),
        "seconds": statistics.median(seconds),
        "peak_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


def measure(options) -> dict:
    import torch

    from pyrdiff import ParallelTrajectoryUNet2DModel, ScaleAutoencoder

    rows, context = [], get_context("spawn")
    for preset in options.presets:
        for head in HEADS:
            with ProcessPoolExecutor(1, context) as pool:
                rows.append(pool.submit(run, preset, head, options.runs, options.threads).result())
            print(f"{preset}, {head}: {rows[-1]['seconds']:.3g} s", flush=True)
    sizes = {}
    for preset, (_, autoencoder, unet) in PRESETS.items():
        with torch.device("meta"):
            found = [kind.from_preset(preset) for kind in (ScaleAutoencoder, ParallelTrajectoryUNet2DModel)]
        counts = [sum(p.numel() for p in part.parameters()) for part in found]
        sizes[preset] = {"ours": counts, "paper": [autoencoder * 1e6, unet * 1e6]}
    return {
        "bench": "trajectory_heads",
        "runs": options.runs,
        "parameters": sizes,
        **report.surroundings(options.threads, gpu=False),
        "rows": rows,
    }


def table(result: dict) -> str:
    lines = [
        f"One image, all T steps, 512 channels of features, float32, median of {result['runs']} runs; peak: what the "
        f"process grew by. {report.caption(result)}",
        "",
        "| network | head | parameters | GMAC, closed form | s | GMAC / s | output, MB | peak, MB |",
        "|---" * 8 + "|",
    ]
    for row in result["rows"]:
        gmac = row["macs"] / 1e9
        lines.append(
            f"| {row['preset']}, {row['side']}x{row['side']}, T={row['steps']} | {row['head']} | "
            f"{row['parameters'] / 1e6:.2f}M | {gmac:.3g} | {row['seconds']:.3g} | {gmac / row['seconds']:.3g} | "
            f"{row['bytes'] / 1e6:.3g} | {row['peak_bytes'] / 1e6:.0f} |"
        )
    lines += ["", "| network | autoencoder: ours, paper's | UNet: ours, paper's |", "|---|---|---|"]
    for preset, size in result["parameters"].items():
        cells = [
            f"{ours / 1e6:.2f}M, {paper / 1e6:.1f}M ({100 * (ours / paper - 1):+.1f} %)"
            for ours, paper in zip(size["ours"], size["paper"], strict=True)
        ]
        lines.append(f"| {preset} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", required=True, help="JSON to write")
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
