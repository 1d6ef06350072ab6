"""
What a GPU does with trainings, samples and large images, arm by arm; `gpu.sh` runs the parts one after the other:

    python benchmarks/gpu.py training --output runs/gpu/training.json
    python benchmarks/gpu.py sampling --output runs/gpu/sampling.json
    python benchmarks/gpu.py memory --output runs/gpu/memory.json

The JSON is written after each arm; arms that are in it are not run again, unless they failed. --tiny makes all sizes
those of a
rehearsal, which the CPU can run.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import memory
import report
from flags import parser_of

# Training: what is set, and the flags of the run. The first is what PyTorch does by itself, the third what we set.
TRAININGS = {
    "float32": ({"tf32": False, "benchmark": False}, {"mixed_precision": "no"}),
    "TF32": ({"tf32": True, "benchmark": False}, {"mixed_precision": "no"}),
    "TF32, cudnn.benchmark": ({"tf32": True, "benchmark": True}, {"mixed_precision": "no"}),
    "bf16": ({"tf32": True, "benchmark": True}, {"mixed_precision": "bf16"}),
    "bf16, without cudnn.benchmark": ({"tf32": True, "benchmark": False}, {"mixed_precision": "bf16"}),
    "bf16, not channels_last": ({"tf32": True, "benchmark": True}, {"mixed_precision": "bf16", "channels_last": False}),
    "bf16, compiled": ({"tf32": True, "benchmark": True}, {"mixed_precision": "bf16", "compile": True}),
    "fp16": ({"tf32": True, "benchmark": True}, {"mixed_precision": "fp16"}),
}
# Sampling: the network's type, where generators are, and whether it is compiled.
SAMPLINGS = {
    "float32": ("float32", "device", False),
    "float32, generators of the CPU": ("float32", "cpu", False),
    "bfloat16": ("bfloat16", "device", False),
    "float16": ("float16", "device", False),
    "bfloat16, compiled": ("bfloat16", "device", True),
}
TILES = (512, 1024, None)  # windows of the large image; None is the image as a whole


class Arms:
    """The arms of a part: each is run once, and kept in the JSON as soon as it is done."""

    def __init__(self, options):
        self.options, self.path = options, Path(options.output)
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.rows = {name: row for name, row in found.get("arms", {}).items() if "error" not in row}

    def run(self, name: str, work: Callable[[], dict]) -> None:
        if name in self.rows:
            return
        try:
            self.rows[name] = work()
        except Exception as error:  # an arm that fails must not cost the others
            self.rows[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        result = {"bench": "gpu", "part": self.options.part, "arms": self.rows}
        report.write({**result, **report.surroundings(self.options.threads)}, self.path)
        print(f"{name}: {self.rows[name]}", flush=True)


def set_cuda(tf32: bool, benchmark: bool) -> None:
    """As an arm has it; `prepare` has set what trainings use."""
    import torch

    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.benchmark = benchmark


def training(options, arms: Arms) -> None:
    """Seconds of a training step of Pyramidal DDPM, the mean over its levels."""
    import numpy as np
    from accelerate.state import AcceleratorState, GradientState

    from pyrdiff import plugins
    from pyrdiff.machine import seconds_of
    from pyrdiff.training.loop import prepare

    sizes, count = (("8", "16"), 16) if options.tiny else (("16", "32", "64"), 2048)
    flags = dict(preset="tiny" if options.tiny else "small", resolution=sizes, save_images_steps=0)
    flags |= dict(train_batch_size=4 if options.tiny else 256, level_share=(1,) * len(sizes))
    round_of = len(sizes)

    def measure(cuda: dict, more: dict) -> dict:
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the first number format for good
        GradientState._reset_state()
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder) / "images.npy"
            shape = (count, int(sizes[-1]), int(sizes[-1]), 3)
            np.save(images, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
            method = plugins.find("pddpm")
            settings = method.settings(
                train_data_dir=str(images), output_dir=folder + "/run", **flags, **{"compile": False, **more}
            )
            run = prepare(method, settings)
            set_cuda(**cuda)

            def rounds() -> None:
                for _ in range(round_of):
                    run.checked(run.optimise())

            device = run.accelerator.device
            first = seconds_of(rounds, device)
            seconds = [seconds_of(rounds, device) / round_of for _ in range(options.rounds)]
            run.close()
        return {"seconds": statistics.median(seconds), "fastest": min(seconds), "first_round": first}

    for name, (cuda, more) in TRAININGS.items():
        if not (options.tiny and (more.get("compile") or more["mixed_precision"] == "fp16")):  # no rehearsal on a CPU
            arms.run(name, lambda cuda=cuda, more=more: measure(cuda, more))


def sampling(options, arms: Arms) -> None:
    """Latency of one image and throughput of many, of the bundled model's plan "fast"."""
    import torch

    import pyrdiff
    from pyrdiff.machine import in_turn, open_device, seeded

    device = open_device(options.device)
    batches = (1, 2) if options.tiny else (1, 64, 256)

    def measure(dtype: str, place: str, compiled: bool, batch: int) -> dict:
        pipeline = pyrdiff.load("noto-emoji", dtype=getattr(torch, dtype)).to(device)
        pipeline.set_progress_bar_config(disable=True)
        if compiled:
            pipeline.unet = torch.compile(pipeline.unet, dynamic=False)
        where = device if place == "device" else "cpu"

        def call(turn: int) -> None:
            pipeline(batch, plan="fast", generator=seeded(range(batch), where), output_type="pt")

        (seconds,) = in_turn({"": call}, options.rounds, device).values()
        return {"seconds": statistics.median(seconds), "images_a_second": batch / statistics.median(seconds)}

    for name, arm in SAMPLINGS.items():
        for batch in batches:
            if not (options.tiny and arm[2]):
                arms.run(f"{name}, {batch} at a time", lambda arm=arm, batch=batch: measure(*arm, batch))


def large(options, arms: Arms) -> None:
    """Peak memory and seconds of SR4 to 4K, untrained, by its windows; `reserved` minus `bytes` are holes in memory."""
    import torch

    from pyrdiff import CosineResidualScheduler, ResidualSRPipeline, ResidualSRUNet2DModel
    from pyrdiff.machine import open_device, seconds_of

    device = open_device(options.device)
    height, width = (16, 24) if options.tiny else (540, 960)
    unet = ResidualSRUNet2DModel.from_preset("mini" if options.tiny else "small", scale_factors=(4,))
    pipeline = ResidualSRPipeline(unet.to(device), CosineResidualScheduler(100))
    pipeline.set_progress_bar_config(disable=True)
    low = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")

    def measure(tile: int | None, dtype: str) -> dict:
        pipeline.unet.to(getattr(torch, dtype))

        def call() -> None:
            pipeline(low, num_inference_steps=4, tile=tile, output_type="pt")

        used = memory.of(call, device)
        row = {"bytes": used.above, "seconds": seconds_of(call, device)}
        if device.type == "cuda":
            row["reserved"] = torch.cuda.max_memory_reserved()
            torch.cuda.empty_cache()
        return row

    for dtype in ("float32", "bfloat16"):
        for tile in (32, None) if options.tiny else TILES:
            shown = f"{dtype}, {'whole' if tile is None else f'windows of {tile}'}, {allocator or 'plain memory'}"
            arms.run(shown, lambda tile=tile, dtype=dtype: measure(tile, dtype))


PARTS = {"training": training, "sampling": sampling, "memory": large}


def table(result: dict) -> str:
    columns = list(dict.fromkeys(name for row in result["arms"].values() for name in row))
    lines = [
        f"{result['part']}. {report.caption(result)}",
        "",
        f"| arm | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in result["arms"].items():
        cells = [f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", help="by default the GPU if there is one")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each arm, after one to warm up")
    parser.add_argument("--tiny", action="store_true", help="sizes of a rehearsal")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    arms = Arms(options)
    PARTS[options.part](options, arms)
    print(report.table_of(arms.path))
    if any("error" in row for row in arms.rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
