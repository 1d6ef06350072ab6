"""
Time and score ways of sampling side by side, on the same weights, in one run:

    python benchmarks/bench.py --model runs/pddpm/pipeline --reference my_images \
        --features squeezenet --weights squeezenet.pth --output benchmarks/results/mine.json

Loops of stock diffusers on the same network stand beside ours. Timing needs an idle machine, scoring does not: with
`--phase score`, then `--phase time`, both go into the same file. With `--cache` an interrupted scoring goes on.
"""

import argparse
import contextlib
import copy
import hashlib
import inspect
import json
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import report
import scoring

CLIP = "the clean estimate is clipped to [-1, 1] at every step, saved plans as they are saved"
PHASES = ("score", "memory", "time")
LATENCY_BATCH = 1
SIMILAR = 2.0  # mean difference, of 255, up to which a cached image is taken for the same one


def arms(pipeline) -> dict[str, dict]:
    """
    What is compared: name -> {"method": the plot's curve; "loop": who runs it: "stock" (diffusers), "parallel",
    "pyramid" (ours) or "saved" (ours as saved); "scheduler", "refine_scheduler": class and changed settings;
    "arguments" of the call; "views": the tables that show it}.
    """
    sizes = [list(size) if isinstance(size, (list, tuple)) else size for size in pipeline.unet.config.resolutions]
    ddpm, ddim = {"_class_name": "DDPMScheduler"}, {"_class_name": "DDIMScheduler"}
    solver, unipc = {"_class_name": "DPMSolverMultistepScheduler"}, {"_class_name": "UniPCMultistepScheduler"}
    log_snr, leading = {**solver, "use_lu_lambdas": True}, {**solver, "timestep_spacing": "leading"}
    sde = {**solver, "algorithm_type": "sde-dpmsolver++"}
    found = {}

    def full(method: str, scheduler: dict, steps: int, views=("main",), **arguments) -> None:
        loop = "parallel" if "window" in arguments else "stock"
        name = f"{method} {steps}" + (f", window {arguments['window']}" if "window" in arguments else "")
        arguments = dict(num_inference_steps=steps, **arguments)
        found[name] = dict(method=method, loop=loop, scheduler=scheduler, arguments=arguments, views=list(views))

    def pyramid(method: str, scheduler: dict, refine: dict | None, low: int, *higher: int, **more) -> None:
        name, views, curve = more.pop("name", None), more.pop("views", ["main"]), more.pop("curve", method)
        levels = more.get("resolutions", sizes)
        higher = [*higher, *higher[-1:] * len(levels)][: len(levels) - 1]
        arguments = dict(num_inference_steps=low, refine_steps=higher, **more)
        found[name or f"pyramid {'/'.join(map(str, [low, *higher]))}, {method}"] = dict(
            method=f"pyramid, {curve}",
            loop="pyramid",
            scheduler=scheduler,
            refine_scheduler=refine,
            arguments=arguments,
            views=views,
        )

    full("DDPM", ddpm, 1000, views=["main", "speed"])
    full("DDPM", ddpm, 100, views=["main", "speed"])
    for steps in (50, 20):
        full("DDIM", ddim, steps)
    for steps in (20, 10):
        full("DPM-Solver++", solver, steps, views=["main", "speed"] if steps == 20 else ["main"])
        full("DPM-Solver++ leading", leading, steps)
        full("DPM-Solver++ log-SNR", log_snr, steps)
        full("UniPC", unipc, steps)
    full("DDIMParallel", {"_class_name": "DDIMParallelScheduler"}, 50, window=16, tolerance=0.1)

    pyramid("DDPM", ddpm, None, 1000, 30, views=["main", "speed"])
    pyramid("DDPM", ddpm, None, 100, 10, views=["main", "speed"])
    pyramid("DDPM", ddpm, None, 100, 8)
    for low, high in ((100, 8), (50, 5)):
        pyramid("DDPM + DPM-Solver++", ddpm, solver, low, high)
    pyramid("DPM-Solver++", solver, None, 20, 5)
    for low, *higher in ((30, 4, 4), (20, 4, 4), (20, 4, 2), (20, 3, 2), (20, 2, 1)):
        pyramid("SDE-DPM-Solver++", sde, None, low, *higher)
    for strength in (0.1, 0.2, 0.3, 0.4, 0.5):
        more = dict(refine_strength=strength, curve="DDPM by strength", views=["strength"])
        pyramid("DDPM", ddpm, None, 100, round(100 * strength), name=f"strength {strength}", **more)
    for levels in (
        sizes,
        sizes[:: max(1, len(sizes) - 1)],
        sizes[1:],
        sizes[-1:],
    ):  # all; no middle; no lowest; the top
        if levels:
            shown = "/".join("x".join(map(str, size)) if isinstance(size, list) else str(size) for size in levels)
            more = dict(resolutions=levels, curve="DDPM by levels", views=["levels"], name=f"levels {shown}")
            pyramid("DDPM", ddpm, None, 100, 10, **more)
    for name, plan in (getattr(pipeline.config, "plans", None) or {}).items():
        arguments = dict(plan=plan)
        found[f"saved plan {name}"] = dict(
            method="pyramid, saved plans", loop="saved", arguments=arguments, views=["main", "speed"]
        )
    return found


def chosen_arms(pipeline, extra: str | None, only: list[str] | None, skip: list[str] | None) -> dict[str, dict]:
    """All arms and those of a JSON file, less those that were not asked for. Raises `ValueError` if none are left."""
    found = arms(pipeline)
    for name, arm in (json.loads(Path(extra).read_text(encoding="utf-8")) if extra else {}).items():
        known = {"method", "loop", "scheduler", "refine_scheduler", "arguments", "views"}
        if not isinstance(arm, dict) or not {"method", "scheduler"} <= set(arm) <= known:
            raise ValueError(f"--arms {name!r}: {arm}: expected method, scheduler and some of {sorted(known)}")
        found[name] = {"loop": "pyramid", "arguments": {}, "views": ["main"], **arm}
    left = {
        name: arm
        for name, arm in found.items()
        if (not only or any(part in name for part in only)) and not any(part in name for part in skip or ())
    }
    if not left:
        raise ValueError(f"--only {only} --skip {skip}: expected parts of some of these names: {sorted(found)}")
    return left


def top_level(pipeline):
    """The highest level of a pipeline, in a plan that fits however few training steps."""
    return pipeline.plan(num_inference_steps=2, refine_steps=2, refine_strength=1.0).levels[-1]


def build_scheduler(settings: dict, base):
    """A scheduler of diffusers as its class has it, over the noise process of `base`, clipping the clean estimate."""
    import diffusers

    from pyrdiff import PyramidalPipeline

    settings = dict(settings)
    scheduler_class = getattr(diffusers, settings.pop("_class_name"))
    known = inspect.signature(scheduler_class.__init__).parameters
    for name in settings:
        if name not in known:
            raise ValueError(f"{scheduler_class.__name__}: {name}={settings[name]!r}: expected one of {sorted(known)}")
    if "clip_sample" in known:
        clip = dict(clip_sample=True, clip_sample_range=1.0)
    elif "thresholding" in known:  # between 1 and 1: the same as clipping
        clip = dict(thresholding=True, sample_max_value=1.0)
    else:
        raise ValueError(f"{scheduler_class.__name__}: expected a scheduler that can clip the clean estimate")
    process = {key: base.config[key] for key in PyramidalPipeline.NOISE_PROCESS if key in base.config and key in known}
    return scheduler_class(**{**process, **clip, **settings})


class Sampler:
    """One arm on one network: `sampler(count, generator)` gives float [count, C, H, W] in [-1, 1], not clipped."""

    def __init__(self, arm: dict, base, network):
        import pyrdiff

        self.loop, self.arguments, self.network = arm["loop"], dict(arm["arguments"]), network
        self.shape = (base.unet.config.in_channels, *top_level(base).network_size)
        if self.loop == "saved":
            self.pipeline = copy.copy(base)
            self.pipeline.unet = network
            schedulers = [base.scheduler, base.refine_scheduler]
        else:
            named = [arm["scheduler"], arm.get("refine_scheduler")]
            schedulers = [part and build_scheduler(part, base.scheduler) for part in named]
            self.pipeline = pyrdiff.PyramidalPipeline(network, *schedulers, base.config.detail_spectra)
        self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler = schedulers[0]
        configs = [part and {k: v for k, v in part.config.items() if k[0] != "_"} for part in schedulers]
        self.settings = {
            "loop": self.loop,
            "schedulers": [part and type(part).__name__ for part in schedulers],
            "spacings": [part and part.get("timestep_spacing") for part in configs],
            "changed": [arm.get("scheduler"), arm.get("refine_scheduler")],
            "arguments": self.arguments,
        }
        # Of everything the images depend on, beside weights, seed and precision.
        whole = json.dumps([self.settings, configs], default=str, sort_keys=True)
        self.key = hashlib.sha256(whole.encode()).hexdigest()[:16]

    def __call__(self, count: int, generator):
        if self.loop == "stock":
            return stock_images(self.network, self.scheduler, (count, *self.shape), generator, **self.arguments)
        if self.loop == "parallel":
            return parallel_images(self.network, self.scheduler, (count, *self.shape), generator, **self.arguments)
        return self.pipeline(count, generator=generator, output_type="latent", **self.arguments).images

    def expected_calls(self) -> list[tuple[tuple[int, int], int]]:
        """Network calls by size, before a run; of the parallel loop a guess. Raises `ValueError` for too many steps."""
        if self.loop in ("stock", "parallel"):
            calls, most = self.arguments["num_inference_steps"], self.scheduler.config.num_train_timesteps
            if calls > most:
                raise ValueError(f"num_inference_steps={calls}: expected at most {most}, the training steps")
            return [(self.shape[1:], calls * (3 if self.loop == "parallel" else 1))]
        known = inspect.signature(self.pipeline.plan).parameters
        plan = self.pipeline.plan(**{key: value for key, value in self.arguments.items() if key in known})
        return [(level.network_size, len(level.timesteps)) for level in plan.levels]


def stock_images(network, scheduler, shape, generator, num_inference_steps: int):
    """The loop of diffusers' `DDPMPipeline`, with any scheduler."""
    from diffusers.utils.torch_utils import randn_tensor

    scheduler.set_timesteps(num_inference_steps)  # on the CPU, as there
    images = randn_tensor(shape, generator=generator, device=network.device) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for timestep in scheduler.timesteps:
        prediction = network(scheduler.scale_model_input(images, timestep), timestep, return_dict=False)[0].float()
        images = scheduler.step(prediction, timestep, images, **extra, return_dict=False)[0]
    return images


def parallel_images(network, scheduler, shape, generator, num_inference_steps: int, window: int, tolerance: float):
    """
    DDIM's trajectory by Picard iteration over a sliding window of `window` steps (Shih et al. 2023, *Parallel Sampling
    of Diffusion Models*, algorithm 1): fewer calls one after the other, more images through the network. A point is
    taken as found once a sweep moves no image of the batch by more than `tolerance` of that step's noise.
    """
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    scheduler.set_timesteps(num_inference_steps, device=network.device)
    times = scheduler.timesteps
    variances = torch.stack([scheduler._get_variance(int(t)) for t in times.cpu()]).float()
    variances = variances.clamp(min=variances[variances > 0].min()).to(network.device)  # the last step's is 0
    path = randn_tensor(shape, generator=generator, device=network.device).repeat(len(times) + 1, 1, 1, 1, 1)
    begin = 0
    while begin < len(times):
        end = min(begin + window, len(times))
        block = path[begin:end]
        repeated = times[begin:end].repeat_interleave(shape[0])
        prediction = network(block.flatten(0, 1), repeated, return_dict=False)[0].float()
        stepped = scheduler.batch_step_no_noise(prediction, repeated, block.flatten(0, 1)).reshape(block.shape)
        found = path[begin] + (stepped - block).cumsum(0)
        moved = (found - path[begin + 1 : end + 1]).square().mean((2, 3, 4)).amax(1)
        wrong = (moved > tolerance**2 * variances[begin:end]).tolist()
        path[begin + 1 : end + 1] = found
        path[end + 1 :] = path[end]
        begin += max(1, wrong.index(True) if True in wrong else end - begin)  # the first is exact in any case
    return path[-1]


class Calls:
    """Counts the images that go through a network, by size."""

    def __init__(self, network):
        self.images: dict[tuple[int, int], int] = {}
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, network, arguments, named) -> None:
        sample = arguments[0] if arguments else named["sample"]
        size = tuple(sample.shape[-2:])
        self.images[size] = self.images.get(size, 0) + sample.shape[0]


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

    def seconds(self, work) -> float:
        import torch

        if self.device.type != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1000

    def call_seconds(self, size: tuple[int, int], batch: int, bf16: bool, repeats: int = 3) -> float:
        """Seconds of one network call, the median of some after an untimed one."""
        import torch

        images = torch.zeros(batch, self.base.unet.config.in_channels, *size, device=self.device)
        timestep = torch.tensor(500, device=self.device)
        with torch.no_grad(), self.autocast(bf16):
            found = [self.seconds(lambda: self.base.unet(images, timestep)) for _ in range(repeats + 1)]
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
        wanted = {}
        for name in self.arms:
            for batch in (LATENCY_BATCH, options.batch_size):
                slow = predicted(name, batch) > options.slow_seconds
                wanted[name, batch] = options.runs if not slow else int(batch == LATENCY_BATCH)
        found: dict[tuple, list[float]] = {key: [] for key in wanted}
        for turn in range(-1, options.runs):  # the first is the warm-up
            for (name, batch), runs in wanted.items():
                if turn >= runs or (turn < 0 and runs < options.runs):
                    continue
                generator = torch.Generator(self.device).manual_seed(options.seed + turn + 1)
                seconds = self.seconds(lambda n=name, b=batch, g=generator: self.run(n, b, g))
                if turn >= 0:
                    found[name, batch].append(round(seconds, 5))
                    print(f"run {turn + 1}: {name}, batch {batch}: {seconds:.3f} s", flush=True)
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
                        for kind, batch in (("latency", LATENCY_BATCH), ("throughput", options.batch_size))
                        if (values := found[name, batch])
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
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(name, self.options.batch_size, generator)
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: reading the weights had its own
        before = _status("VmRSS")
        self.run(name, self.options.batch_size, generator)
        return _status("VmHWM") - before

    # Quality

    def generated(self, name: str, count: int):
        """
        Images of an arm, uint8 [count, H, W, C]; image k has the same noise seed in every arm. Those in the cache are
        believed if the first comes out again.
        """
        import numpy as np
        import torch

        options = self.options

        def make(first: int, number: int):
            seeds = [options.seed * 1_000_000 + first + index for index in range(number)]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
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
                beside = path.with_name(f".{path.name}.{os.getpid()}")
                with open(beside, "wb") as file:
                    np.save(file, kept)
                beside.replace(path)
        print(f"{len(kept[:count])} images of {name}: {time.perf_counter() - began:.1f} s", flush=True)
        return kept[:count]

    def score(self) -> dict:
        """Quality of every arm, and of as many real images, against the other images of the reference."""
        options, config = self.options, self.base.unet.config
        scorer = scoring.Scorer(
            options.reference,
            options.array_key,
            top_level(self.base).size,
            config.in_channels,
            options.features,
            options.weights,
            self.device,
            options.score_images,
            options.reference_images,
            options.seed,
            options.resamples,
        )
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


def _status(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


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


# What is shown


def _throughput(row: dict | None, result: dict) -> float | None:
    """Images a second."""
    timed = (row or {}).get("seconds", {}).get("throughput")
    return result["timed"]["batch_size"] / timed["median"] if timed else None


def _peers(result: dict) -> dict[str, tuple[float, bool]]:
    """Images a second of the loops to be compared with, and whether that was timed or scaled by network calls."""
    rows, found = result["arms"], {}
    stock = [row for row in rows.values() if row["settings"]["loop"] == "stock" and _throughput(row, result)]
    for name in ("DPM-Solver++ 20", "DDPM 1000"):
        speed = _throughput(rows.get(name), result)
        if speed is not None:
            found[name] = (speed, True)
        elif name == "DDPM 1000" and stock:
            longest = max(stock, key=lambda row: row["nfe_eq"])
            found[name] = (_throughput(longest, result) * longest["nfe_eq"] / 1000, False)
    return found


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    if abs(value) >= 1e6:
        return f"{value:.{digits}g}"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def _cells(row: dict, result: dict) -> dict[str, str]:
    """The cells of an arm, by column."""
    seconds, score = row.get("seconds", {}), row.get("score")
    speed, peers = _throughput(row, result), _peers(result) if "timed" in result else {}
    cells = {
        "calls": "/".join(_number(n) if n % 1 else f"{n:.0f}" for _, n in row.get("calls", [])) or "-",
        "NFE-eq": f"{row['nfe_eq']:.2f}" if "nfe_eq" in row else "-",
        "latency, s": "-",
        "images/s": _number(speed),
        "peak, MiB": f"{row['memory'] / 2**20:.0f}" if "memory" in row else "-",
    }
    if "latency" in seconds:
        latency = seconds["latency"]
        cells["latency, s"] = f"{latency['median']:.3f} ({latency['min']:.3f})"
        if len(latency["values"]) != result["timed"]["runs"]:
            cells["latency, s"] += f" of {len(latency['values'])}"
    for name in ("DPM-Solver++ 20", "DDPM 1000"):
        theirs, timed = peers.get(name, (None, True))
        ratio = speed / theirs if speed and theirs else None
        cells[f"vs {name}"] = "-" if ratio is None else f"{'' if timed else '~'}×{_number(ratio)}"
    if score:
        low, high = score["frechet_interval"]
        cells["Fréchet [95 %]"] = f"{_number(score['frechet'])} [{_number(low)}, {_number(high)}]"
        cells["KID"] = _number(score["kid"])
        cells["precision / recall"] = " / ".join(f"{value:.2f}" for value in score["precision_recall"])
        cells["power an octave"] = " ".join(f"{value:.2f}" for value in score["octaves"])
    return cells


COLUMNS = {
    "main": None,
    "speed": ["calls", "NFE-eq", "latency, s", "images/s", "vs DDPM 1000", "vs DPM-Solver++ 20", "Fréchet [95 %]"],
    "strength": ["calls", "NFE-eq", "images/s", "vs DDPM 1000", "Fréchet [95 %]", "KID", "power an octave"],
    "levels": ["calls", "NFE-eq", "images/s", "vs DDPM 1000", "Fréchet [95 %]", "KID", "power an octave"],
}


def table(result: dict, view: str = "main") -> str:
    """
    A table of a result: "main"; "speed" (paper P, table 1), "strength" (table 2) or "levels" (table 4); "all" rows.
    Raises `ValueError` for another view.
    """
    if view not in (*COLUMNS, "all"):
        raise ValueError(f"view={view!r}: expected one of {[*COLUMNS, 'all']}")
    rows = {name: row for name, row in result["arms"].items() if view == "all" or view in row["views"]}
    cells = {name: _cells(row, result) for name, row in rows.items()}
    if "real" in result:
        cells["real images"] = {
            key: value for key, value in _cells(result["real"], result).items() if key not in ("calls", "NFE-eq")
        }
    columns = COLUMNS.get(view) or list(dict.fromkeys(key for row in cells.values() for key in row))
    lines = [_caption(result), "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in cells.items():
        lines.append(f"| {name} | {' | '.join(row.get(column, '-') for column in columns)} |")
    return "\n".join(lines)


def _caption(result: dict) -> str:
    parts = [
        f"{result['model']['parameters'] / 1e6:.2g}M parameters at {result['model']['resolutions']}, "
        f"{result['precision']}, seed {result['seed']}; {result['clip']}."
    ]
    if "scored" in result:
        scored = result["scored"]
        parts.append(
            f"{scored['features']} features (not FID), {scored['images']} images an arm against "
            f"{scored['compared_with']['frechet']} real ones "
            f"({scored['compared_with']['others']} but for the distance); real images: as many others."
        )
    if "timed" in result:
        timed = result["timed"]
        versions = ", ".join(f"{name} {number}" for name, number in timed["versions"].items())
        parts.append(
            f"Latency at batch {LATENCY_BATCH}, median (min) of {timed['runs']}; images/s and ratios at batch "
            f"{timed['batch_size']}, ~ scaled by network calls. {timed['device']}, {timed['threads']} threads, load "
            f"{timed['load_before']} before and {timed['load'][0]} after; {versions}."
        )
    if "memory" in result:
        parts.append(f"Memory: {result['memory']['what']}, batch {result['memory']['batch_size']}.")
    return " ".join(parts)


def plot(result: dict, path: str | os.PathLike) -> bool:
    """Frechet distance against seconds an image, a curve a method, as a PNG; `False` if no arm has both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list] = {}
    for row in result["arms"].values():
        speed = _throughput(row, result)
        if speed and "score" in row:
            low, high = row["score"]["frechet_interval"]
            value = row["score"]["frechet"]
            curves.setdefault(row["method"], []).append((1 / speed, value, max(value - low, 0), max(high - value, 0)))
    if not curves:
        return False
    figure = Figure(figsize=(9, 5), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    for index, (method, points) in enumerate(curves.items()):
        seconds, values, below, above = zip(*sorted(points), strict=True)
        ours = method.startswith("pyramid")
        style = dict(marker="o" if ours else "s", linestyle="-" if ours else "--", color=f"C{index % 10}")
        axes.errorbar(seconds, values, (below, above), label=method, capsize=2, elinewidth=0.7, ms=5, **style)
    if "real" in result:
        axes.axhline(result["real"]["score"]["frechet"], color="gray", linewidth=1, label="real images")
    axes.set_xlabel(f"seconds an image, batch {result['timed']['batch_size']}")
    axes.set_ylabel(f"Fréchet distance, {result['scored']['features']}, {result['scored']['images']} images")
    axes.grid(which="both", alpha=0.2)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported pyramidal pipeline, a folder")
    parser.add_argument("--output", required=True, help="JSON to write, or to add to")
    parser.add_argument("--reference", help="images to score against: a folder, .npy or .npz")
    parser.add_argument("--array_key", help="array of an .npz reference")
    parser.add_argument("--features", default="squeezenet", help="feature network of the scores, see pyrdiff.metrics")
    parser.add_argument("--weights", help="file of its weights")
    parser.add_argument("--phase", default="all", choices=[*PHASES, "all"])
    parser.add_argument("--only", nargs="*", help="only arms whose name has one of these in it")
    parser.add_argument("--skip", nargs="*", help="no arms whose name has one of these in it")
    parser.add_argument("--arms", help="JSON file of further arms: {name: {method, scheduler, arguments, ...}}")
    parser.add_argument("--batch_size", type=int, default=16, help="of throughput, memory and scored images")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each arm")
    parser.add_argument(
        "--slow_seconds", type=float, default=120, help="runs predicted to take longer: once at batch 1, else not"
    )
    parser.add_argument("--score_images", type=int, default=256, help="images of each arm to score")
    parser.add_argument("--reference_images", type=int, default=10_000, help="real images to compare with, at most")
    parser.add_argument("--resamples", type=int, default=100, help="of the bootstrap interval")
    parser.add_argument("--cache", help="folder that keeps the scored images, so that an interrupted run goes on")
    parser.add_argument("--compile", action="store_true", help="time every arm with a compiled network, too")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
    parser.add_argument("--seed", type=int, default=0)
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
