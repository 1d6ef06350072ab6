"""
Time and score ways of sampling side by side, on the same weights, in one run:

    python benchmarks/bench.py --model runs/pddpm/pipeline --reference my_images \
        --features squeezenet --weights squeezenet.pth --output benchmarks/results/mine.json

Loops of stock diffusers on the same network stand beside ours. Timing needs an idle machine, scoring does not: with
`--phase score`, then `--phase time`, both go into the same file. With `--cache` an interrupted scoring goes on.
"""

import contextlib
import hashlib
import json
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import memory
import report
import scoring
from bench_arms import arms, chosen_arms
from bench_tables import LATENCY_BATCH, plot, table  # noqa: F401, what report.py prints
from flags import parser_of
from samplers import Calls, Sampler, top_level

from pyrdiff.data import replacing
from pyrdiff.machine import in_turn, seconds_of

CLIP = "the clean estimate is clipped to [-1, 1] at every step, saved plans as they are saved"
PHASES = ("score", "memory", "time")
SIMILAR = 2.0  # mean difference, of 255, up to which a cached image is taken for the same one


class Bench:
    """A loaded model and the arms to run on it."""

    def __init__(self, options):
        import torch

        import pyrdiff

        torch.set_num_threads(options.threads)
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base = pyrdiff.load(options.model)
        self.base.unet.to(self.device).eval()
        if self.device.type == "cuda":
            self.base.unet.to(memory_format=torch.channels_last)
        self.top = top_level(self.base).network_size
        self.arms, self.samplers = {}, {}
        for name, arm in chosen_arms(self.base, options.arms, options.only, options.skip).items():
            sampler = Sampler(arm, self.base, self.base.unet)
            try:
                sampler.expected_calls()
            except ValueError as error:
                if name not in arms(self.base):
                    raise ValueError(f"--arms {name!r}: {error}") from error
                print(f"left out: {name}: {error}", file=sys.stderr)  # ours are made for 1000 training steps
                continue
            self.arms[name], self.samplers[name] = arm, sampler
        if not self.arms:
            raise ValueError(f"--only {options.only} --skip {options.skip}: expected an arm that this model can run")
        self.batches = (LATENCY_BATCH, options.batch_size)
        self.counters = {self.base.unet: Calls(self.base.unet)}
        self.counted: dict[str, tuple[int, list]] = {}
        self.model_hash = scoring.model_hash(options.model)

    def autocast(self, bf16: bool):
        import torch

        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def run(self, name: str, count: int, generator):
        """Images of an arm, float [count, C, H, W] on the device; counts what goes through the network."""
        import torch

        sampler = self.samplers[name]
        counter = self.counters[sampler.network]
        counter.images = {}
        with torch.no_grad(), self.autocast(self.options.bf16):
            images = sampler(count, generator)
        if count >= self.counted.get(name, (0, []))[0]:
            calls = [["{}x{}".format(*size), images / count] for size, images in counter.images.items()]
            self.counted[name] = (count, calls)
        return images

    def call_seconds(self, size: tuple[int, int], batch: int, bf16: bool, repeats: int = 3) -> float:
        """Seconds of one network call, the median of some after an untimed one."""
        import torch

        images = torch.zeros(batch, self.base.unet.config.in_channels, *size, device=self.device)
        timestep = torch.tensor(500, device=self.device)
        with torch.no_grad(), self.autocast(bf16):
            found = [seconds_of(lambda: self.base.unet(images, timestep), self.device) for _ in range(repeats + 1)]
        return statistics.median(found[1:])

    def describe(self) -> dict:
        """What every part of a result must agree on."""
        return {
            "bench": "bench",
            "model": {
                "sha256": self.model_hash,
                "parameters": sum(p.numel() for p in self.base.unet.parameters()),
                "resolutions": list(self.base.unet.config.resolutions),
            },
            "seed": self.options.seed,
            "precision": "bfloat16 autocast" if self.options.bf16 else "float32",
            "clip": CLIP,
        }

    def arm_rows(self) -> dict[str, dict]:
        rows = {}
        for name, arm in self.arms.items():
            sampler = self.samplers[name]
            rows[name] = dict(method=arm["method"], views=arm["views"], key=sampler.key, settings=sampler.settings)
            if name in self.counted or sampler.loop != "parallel":
                planned = [["{}x{}".format(*size), count] for size, count in sampler.expected_calls()]
                calls = self.counted.get(name, (0, planned))[1]
                area = sum(n * int(side) * int(other) for size, n in calls for side, other in [size.split("x")])
                rows[name] |= {"calls": calls, "nfe_eq": area / (self.top[0] * self.top[1])}
        return rows

    # Time

    def time(self) -> dict:
        """Seconds of every arm, in turn, again and again."""
        import torch

        options = self.options
        load = os.getloadavg()[0]
        precisions = {
            name: self.call_seconds(self.top, LATENCY_BATCH, bf16, 1)  # where bfloat16 is emulated it takes very long
            for name, bf16 in (("float32", False), ("bfloat16 autocast", True))
        }
        known: dict[tuple, float] = {}

        def predicted(name: str, batch: int) -> float:
            total = 0.0
            for size, count in self.samplers[name].expected_calls():
                if (size, batch) not in known:
                    known[size, batch] = self.call_seconds(size, batch, options.bf16)
                total += count * known[size, batch]
            return total

        if options.compile:
            network = torch.compile(self.base.unet, mode="reduce-overhead", dynamic=False)
            torch._dynamo.config.recompile_limit = 64  # one for each size and batch
            self.counters[network] = Calls(network)
            for name in [name for name, arm in self.arms.items() if arm["loop"] != "parallel"]:
                twin = f"{name}, compiled"
                arm = {**self.arms[name], "method": f"{self.arms[name]['method']}, compiled"}
                self.arms[twin], self.samplers[twin] = arm, Sampler(arm, self.base, network)

        def run(name: str, batch: int, turn: int) -> None:
            self.run(name, batch, torch.Generator(self.device).manual_seed(options.seed + turn + 1))

        def said(turn: int, work: tuple[str, int], seconds: float) -> None:
            print(f"run {turn + 1}: {work[0]}, batch {work[1]}: {seconds:.3f} s", flush=True)

        works = {(name, batch): partial(run, name, batch) for name in self.arms for batch in self.batches}
        slow = [work for work in works if predicted(*work) > options.slow_seconds]
        fewer = {(name, batch): int(batch == LATENCY_BATCH) for name, batch in slow}
        found = in_turn(works, options.runs, self.device, fewer, said)
        calls = {f"{size[0]}x{size[1]}, batch {batch}": value for (size, batch), value in sorted(known.items())}
        return {
            "timed": {
                "runs": options.runs,
                "batch_size": options.batch_size,
                "slow_seconds": options.slow_seconds,
                "load_before": round(load, 2),
                "seconds_a_top_call_by_precision": precisions,
                "seconds_a_call": calls,
                **report.surroundings(options.threads),
            },
            "arms": {
                name: {
                    "seconds": {
                        kind: {"values": values, "median": statistics.median(values), "min": min(values)}
                        for kind, batch in zip(("latency", "throughput"), self.batches, strict=True)
                        if (values := [round(seconds, 5) for seconds in found[name, batch]])
                    }
                }
                for name in self.arms
            },
        }

    # Memory

    def memory(self) -> dict:
        """Peak memory of every arm at the throughput batch, above the loaded model; slow arms have none."""
        options, rows = self.options, {}
        batch = options.batch_size
        for name, sampler in self.samplers.items():
            per_call = {size: self.call_seconds(size, batch, options.bf16, 1) for size, _ in sampler.expected_calls()}
            if sum(count * per_call[size] for size, count in sampler.expected_calls()) > options.slow_seconds:
                continue
            if self.device.type == "cuda":
                rows[name] = {"memory": self.peak_memory(name)}
            else:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    rows[name] = {"memory": pool.submit(_peak_memory, options, name).result()}
            print(f"memory of {name}: {rows[name]['memory'] / 2**20:.0f} MiB", flush=True)
        what = "allocated on the GPU" if self.device.type == "cuda" else "resident, in a process of its own"
        return {"memory": {"batch_size": batch, "what": f"peak {what}, above the loaded model"}, "arms": rows}

    def peak_memory(self, name: str) -> int:
        import torch

        generator = torch.Generator(self.device).manual_seed(self.options.seed)
        work = partial(self.run, name, self.options.batch_size, generator)
        return memory.of(work, self.device).above

    # Quality

    def generated(self, name: str, count: int):
        """
        Images of an arm, uint8 [count, H, W, C]; image k has the same noise seed in every arm. Those in the cache are
        believed if the first comes out again.
        """
        import numpy as np

        options = self.options

        def make(first: int, number: int):
            generators = scoring.generators(options.seed, range(first, first + number))
            return scoring.to_uint8(self.run(name, number, generators).float().cpu())

        kept, path = None, None
        if options.cache:
            settings = [self.model_hash, options.seed, options.bf16, self.samplers[name].key]
            key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
            path = Path(options.cache) / f"{re.sub(r'[^A-Za-z0-9.]+', '_', name)}-{key}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = np.load(path) if path.exists() else None
        if kept is not None and abs(make(0, 1)[0].astype(float) - kept[0]).mean() > SIMILAR:
            print(f"{path.name} is not what this code makes; made anew", flush=True)
            kept = None
        began = time.perf_counter()
        while kept is None or len(kept) < count:
            first = 0 if kept is None else len(kept)
            more = make(first, min(options.batch_size, count - first))
            kept = more if kept is None else np.concatenate([kept, more])
            if path:
                with replacing(path) as beside, open(beside, "wb") as file:
                    np.save(file, kept)
        print(f"{len(kept[:count])} images of {name}: {time.perf_counter() - began:.1f} s", flush=True)
        return kept[:count]

    def score(self) -> dict:
        """Quality of every arm, and of as many real images, against the other images of the reference."""
        options, config = self.options, self.base.unet.config
        size = top_level(self.base).size
        scorer = scoring.Scorer.of(options, size, config.in_channels, self.device, held=options.score_images)
        rows = {name: {"score": scorer(self.generated(name, options.score_images))} for name in self.arms}
        return {
            "scored": {"images": options.score_images, **scorer.description},
            "scored_on": report.surroundings(options.threads),
            "real": {"score": scorer(scorer.held)},
            "arms": rows,
        }


def _peak_memory(options, name: str) -> int:
    """In a process of its own, where nothing ran before."""
    options.only, options.skip = [name], None
    return Bench(options).peak_memory(name)


def measure(options) -> dict:
    """Runs the phases asked for and joins them with what `--output` has of others."""
    bench = Bench(options)
    path = Path(options.output)
    result = {**bench.describe(), "arms": {}}
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        check_same(earlier, json.loads(json.dumps(bench.describe())), path)
        result = earlier
    for phase in PHASES if options.phase == "all" else [options.phase]:
        result = merge(result, getattr(bench, phase)(), bench.arm_rows(), path)
    order = [*arms(bench.base), *bench.arms, *result["arms"]]
    result["arms"] = dict(sorted(result["arms"].items(), key=lambda row: order.index(row[0])))
    return result


def check_same(earlier: dict, now: dict, path: Path) -> None:
    for key, value in now.items():
        if earlier.get(key) != value:
            raise ValueError(
                f"--output={path.name}: holds {key}={earlier.get(key)!r}; expected {value!r}, or a new file"
            )


def merge(result: dict, part: dict, described: dict, path: Path) -> dict:
    """
    A result with a new part. Scores are added to those made alike, others are refused; timings replace all earlier
    ones, since only those of one run may be compared. An arm whose settings changed loses what it had.
    """
    part = json.loads(json.dumps(part))
    described = json.loads(json.dumps(described))
    rows = part.pop("arms")
    if "scored" in part and "scored" in result:
        check_same(result, {"scored": part["scored"]}, path)
    merged = {name: dict(row) for name, row in result["arms"].items()}
    if "timed" in part:
        merged = {name: {key: row[key] for key in row if key != "seconds"} for name, row in merged.items()}
    for name, row in described.items():
        old = merged.pop(name, {})
        if old.get("key") != row["key"]:
            old = {}
        merged[name] = {**old, **row, **rows.get(name, {})}
    merged = {name: row for name, row in merged.items() if {"score", "seconds", "memory"} & set(row)}
    return {**result, **part, "arms": merged}


def main(arguments: list[str] | None = None) -> None:
    flags = ("model", "array_key", "features", "weights", "resamples", "only", "batch_size", "runs", "seed")
    parser = parser_of(__doc__, *flags, reference_images=10_000)
    parser.add_argument("--reference", help="images to score against: a folder, .npy or .npz")
    parser.add_argument("--phase", default="all", choices=[*PHASES, "all"])
    parser.add_argument("--skip", nargs="*", help="no arms whose name has one of these in it")
    parser.add_argument("--arms", help="JSON file of further arms: {name: {method, scheduler, arguments, ...}}")
    parser.add_argument(
        "--slow_seconds", type=float, default=120, help="runs predicted to take longer: once at batch 1, else not"
    )
    parser.add_argument("--score_images", type=int, default=256, help="images of each arm to score")
    parser.add_argument("--cache", help="folder that keeps the scored images, so that an interrupted run goes on")
    parser.add_argument("--compile", action="store_true", help="time every arm with a compiled network, too")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    options = parser.parse_args(arguments)
    least = dict(batch_size=1, runs=1, score_images=4, reference_images=4, resamples=2, threads=1)
    for name, value in least.items():
        if getattr(options, name) < value:
            raise ValueError(f"--{name}={getattr(options, name)}: expected {value} or more")
    if options.phase in ("score", "all") and not options.reference:
        raise ValueError("--reference=None: expected images to score against, or --phase time")
    result = measure(options)
    report.save(result, options.output)
    plot(result, Path(options.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
