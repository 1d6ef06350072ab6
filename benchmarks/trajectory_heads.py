"""
Parameters, multiply-adds, time and memory of heads that predict the noises of all steps at once (paper X, eq. 14), on
features of the paper's two networks:

    python benchmarks/trajectory_heads.py --output benchmarks/results/trajectory_heads.json

"literal" is the paper's head and "tied" the scheduler's closed form; the package has both. "lowrank" and "grouped" are
cheaper than the paper's, but predict nothing that "tied" does not give for free; they are defined here. Each head runs
in a process of its own, one image, all T steps.
"""

import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import report
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps
from flags import parser_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyrdiff import ParallelTrajectoryUNet2DModel, PixelAwareScheduler, ScaleAutoencoder
from pyrdiff.models.unet_parallel_trajectory import TIME_CHANNELS, TIME_SCALE
from pyrdiff.parts.step_layers import StepConv

PRESETS = {"paper-cifar10": (32, 30.3, 41.2), "paper-celeba": (128, 61.3, 84.2)}  # side; the paper's millions


class LowRankHead(nn.Module):
    """Z^j = sum_k c_jk(i) B_k: 8 basis maps B_k of the features, coefficients of the embeddings of j/T and i/T."""

    RANK, WIDTH = 8, 128

    def __init__(self, features: int, channels: int, settings: dict):
        super().__init__()
        self.channels, self.num_train_timesteps = channels, settings["num_train_timesteps"]
        self.norm = nn.GroupNorm(settings["norm_num_groups"], features)
        self.basis = nn.Conv2d(features, self.RANK * channels, 3, padding=1)
        self.time_proj = Timesteps(TIME_CHANNELS, True, 0)
        self.of_step = nn.Linear(TIME_CHANNELS, self.WIDTH)
        self.of_time = nn.Linear(settings["time_embedding_dim"], self.WIDTH)
        self.coefficients = nn.Linear(self.WIDTH, self.RANK)

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        """The basis maps [B, rank, c, h, w] of features [B, f, h, w]."""
        return self.basis(F.silu(self.norm(features))).unflatten(1, (self.RANK, self.channels))

    def forward(self, basis: torch.Tensor, embedding: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[S, B, c, h, w] for the steps `rows + 1`."""
        step = self.time_proj((rows + 1) * (TIME_SCALE / self.num_train_timesteps)).to(embedding.dtype)
        hidden = self.of_step(step)[:, None] + self.of_time(F.silu(embedding))
        return torch.einsum("sbk,bkchw->sbchw", self.coefficients(F.silu(hidden)), basis)


class GroupedHead(nn.Module):
    """Z^j by one wide convolution of the features and one small residual convolution for each step."""

    def __init__(self, features: int, channels: int, settings: dict):
        super().__init__()
        steps = settings["num_train_timesteps"]
        self.channels = channels
        self.norm = nn.GroupNorm(settings["norm_num_groups"], features)
        self.wide = StepConv(steps, features, channels, 3)
        self.own = StepConv(steps, channels, channels, 3)

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        """What all steps share, [B, f, h, w]."""
        return F.silu(self.norm(features))

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[S, B, c, h, w] for the steps `rows + 1`."""
        hidden = self.wide(hidden, rows, shared=True)
        hidden = hidden + self.own(F.silu(hidden), rows)
        return hidden.unflatten(1, (len(rows), self.channels)).transpose(0, 1)


HEADS = {"tied": None, "lowrank": LowRankHead, "grouped": GroupedHead, "literal": None}


def build(preset: str, head: str) -> ParallelTrajectoryUNet2DModel:
    """The preset's network, of which a head other than "tied" is in `noise_head`."""
    if head == "tied":
        return ParallelTrajectoryUNet2DModel.from_preset(preset, head="tied", target="clean").eval()
    network = ParallelTrajectoryUNet2DModel.from_preset(preset)
    if HEADS[head] is not None:
        features, config = network.config.decoder_channels[-1], network.config
        network.noise_head = HEADS[head](features, config.image_channels, dict(config))
    return network.eval()


def cost(preset: str, head: str) -> dict[str, int]:
    """Parameters of the head, and its multiply-adds for one image and all steps, counted on tensors without data."""
    if head == "tied":
        return {"parameters": 0, "macs": 0}
    side = PRESETS[preset][0]
    with torch.device("meta"), torch.no_grad():
        network, config = build(preset, head), ParallelTrajectoryUNet2DModel.from_preset(preset).config
        features = torch.empty(1, config.decoder_channels[-1], side, side)
        embedding = torch.empty(1, config.time_embedding_dim)
        structure = torch.empty(1, config.image_channels * config.patch_size**2, side, side)
        # The fused attention of the CPU is not counted.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            fused = network.noise_fusion(features, embedding, structure)
            prepared = network.noise_head.prepare(fused)
            network.noise_head(prepared, embedding, torch.arange(config.num_train_timesteps))
    parameters = [*network.noise_fusion.parameters(), *network.noise_head.parameters()]
    return {"parameters": sum(tensor.numel() for tensor in parameters), "macs": counter.get_total_flops() // 2}


def run(preset: str, head: str, runs: int, threads: int) -> dict:
    """One head: what it costs, and what it does."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    side, network = PRESETS[preset][0], build(preset, head)
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
            noises = work()
            seconds.append(time.perf_counter() - began)
    assert noises.shape == (steps, 1, 3, side, side)
    return {
        "preset": preset,
        "head": head,
        "steps": steps,
        "side": side,
        **cost(preset, head),
        "bytes": noises.nbytes,
        "total_parameters": sum(p.numel() for p in network.parameters()),
        "seconds": statistics.median(seconds),
        "peak_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


def measure(options) -> dict:
    rows, context = [], get_context("spawn")
    for preset in options.presets:
        for head in HEADS:
            with ProcessPoolExecutor(1, context) as pool:
                rows.append(pool.submit(run, preset, head, options.runs, options.threads).result())
            print(f"{preset}, {head}: {rows[-1]['seconds']:.3g} s", flush=True)
    sizes = {}
    for preset, (_, autoencoder, unet) in PRESETS.items():
        with torch.device("meta"):
            networks = [kind.from_preset(preset) for kind in (ScaleAutoencoder, ParallelTrajectoryUNet2DModel)]
        counts = [sum(p.numel() for p in network.parameters()) for network in networks]
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
        "| network | head | parameters | GMAC | s | GMAC / s | output, MB | peak, MB |",
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
    parser = parser_of(__doc__, runs=3)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
