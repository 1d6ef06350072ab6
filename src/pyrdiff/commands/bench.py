"""
Time and measure ways of calling one saved model, side by side in one run.

An arm is {name: arguments of the call}. Of a model that generates they are its named plans, the default call and, where
it can run them, solvers of stock diffusion at full size; of one that enlarges its plans and bicubic. All arms are timed
first, in turn, and scored after that. For a quicker run name some with --only, or lower --runs and --num_images. Plans
of more than 50 NFE-eq run only if they are named there.
"""

import inspect
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyrdiff.cli import parse
from pyrdiff.commands.sample import open_device
from pyrdiff.machine import device_name, versions

UNIT = (0, 1)  # the range of images here
CLIP = {"thresholding": True, "sample_max_value": 1.0}  # DPM-Solver's way of clipping the clean estimate to [-1, 1]
FULL_SIZE = {  # stock diffusion, schedulers as their classes have them
    "DPM-Solver++ 20 at full size": (20, ["DPMSolverMultistepScheduler", CLIP]),
    "DDIM 50 at full size": (50, ["DDIMScheduler", {"clip_sample": True, "clip_sample_range": 1.0}]),
}
BICUBIC = "bicubic"
PASSES = (1, 2, 4)
SLOW = 50  # NFE-eq; slower plans have to be asked for
LEAST = 4  # images, for the third nearest other one that precision and recall look at
OURS = ("batch_size", "image", "scale_factor", "num_samples", "generator", "output_type", "return_dict")  # no arm's


@dataclass(kw_only=True)
class BenchSettings:
    """Flags of `pyrdiff bench`."""

    model: str
    """Folder of a saved pipeline, or a repository on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    reference: str
    """Folder, .npy or .npz of real images, best held out; fitted to the model's size."""
    array_key: str | None = None
    """Array of an .npz reference."""
    resolution: tuple[int, ...] | None = None
    """Side, or height and width, to fit the reference to; by default the size of what the model generates."""
    output: str
    """JSON to write, which `pyrdiff push` can put into the model card."""
    arms: str | None = None
    """JSON file with further arms, {name: {argument of the call: value}}."""
    only: tuple[str, ...] = ()
    """Names of the arms to run; by default all."""
    num_images: int = 256
    """Images an arm that are scored: generated ones, or the first of the reference to be enlarged."""
    batch_size: int = 16
    """Images a call."""
    runs: int = 5
    """Timed runs of every arm, after one to warm up; the median counts."""
    features: Literal["squeezenet", "alexnet", "inception", "dinov2", "classifier"] = "inception"
    """Feature network of the distances; inception gives FID."""
    weights: str | None = None
    """File of the feature network; by default downloaded."""
    lpips_network: Literal["alex", "squeeze", "vgg"] = "alex"
    lpips_weights: str | None = None
    """File of LPIPS's trunk; by default downloaded, and LPIPS is left out where that fails."""
    scale_factor: int | None = None
    """How much smaller the inputs of a model that enlarges are made; by default what its call has."""
    resamples: int = 100
    """For the 95 % intervals; 0 for none."""
    seed: int = 0
    """Image k has the seed SEED + k, in all arms."""
    device: str | None = None
    """By default the GPU if there is one."""

    def __post_init__(self):
        for name in ("num_images", "batch_size", "runs"):
            least = LEAST if name == "num_images" else 1
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: got {getattr(self, name)}; accepted is {least} or more")
        if self.resolution is not None and (len(self.resolution) not in (1, 2) or min(self.resolution) < 1):
            raise ValueError(f"--resolution: got {self.resolution}; accepted are one or two sides of 1 or more")
        if self.scale_factor is not None and self.scale_factor < 2:
            raise ValueError(f"--scale_factor: got {self.scale_factor}; accepted is 2 or more")
        if self.resamples != 0 and self.resamples < 2:
            raise ValueError(f"--resamples: got {self.resamples}; accepted are 0 and 2 or more")
        if Path(self.output).is_dir() or any(parent.is_file() for parent in Path(self.output).parents):
            raise ValueError(f"--output: got {self.output!r}; accepted is a file to write")


def main(args: list[str]) -> dict:
    options = parse(BenchSettings, __doc__, args, prog="pyrdiff bench")
    import torch

    import pyrdiff
    from pyrdiff.data import open_source, replacing
    from pyrdiff.hub import card, needs_image

    # 1. What could be wrong, before any work.
    further = read_arms(options.arms)
    source = open_source(Path(options.reference), array_key=options.array_key)
    if len(source) < LEAST:
        raise ValueError(f"--reference: got {len(source)} images; accepted are {LEAST} or more")
    device = open_device(options.device)
    pipeline = pyrdiff.load(options.model, revision=options.revision).to(device)
    pipeline.set_progress_bar_config(disable=True)
    task = (Enlarging if needs_image(type(pipeline)) else Generating)(pipeline, source, options, device)
    arms = choose_arms(task, further, options)

    # 2. Timing, then scoring.
    task.prepare()
    load = os.getloadavg()[0]
    timed = time_arms(task, arms, options)
    rows = {}
    for name, arm in arms.items():
        print(f"scoring {name}", file=sys.stderr)
        rows[name] = {
            "arguments": arm.arguments or {},
            "yardstick": arm.yardstick,
            "network_calls": timed[name]["network_calls"],
            "nfe_eq": arm.nfe_eq,
            "ms_per_image": timed[name]["ms_per_image"],
            "latency_ms": timed[name]["latency_ms"],
            "metrics": task.score(name, arm),
        }

    # 3. One JSON, without paths of this machine.
    named = ("num_images", "batch_size", "runs", "features", "lpips_network", "resamples", "only", "array_key")
    result = {
        "kind": "pyrdiff bench",
        "pipeline": type(pipeline).__name__,
        "task": task.name,
        "model": {"name": _name(options.model), "revision": options.revision},
        "reference": {"name": _name(options.reference), "images": task.reference_images},
        "conventions": {
            **task.conventions,
            "images": "8 bits a channel, as PIL images have them",
            "interval": "95 %, bootstrap over an arm's images, for the figure at this count",
            "time": f"whole calls up to PIL images, arms in turn after a warm-up, median of {options.runs}; "
            f"ms_per_image at batch {options.batch_size}, latency_ms at batch 1",
            "nfe_eq": "network calls an image, weighted by area; 1 is a call at the size of the result",
        },
        "settings": {name: getattr(options, name) for name in (*named, "resolution", "scale_factor")},
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": round(load, 2),
        "seed": options.seed,
        "arms": rows,
    }
    result = json.loads(json.dumps(result, allow_nan=False))
    with replacing(options.output) as beside:
        beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(card.table(result))
    return result


# Arms


@dataclass
class Arm:
    """
    Attributes:
        arguments: Of the call, beside those that all arms get; None for Pillow's bicubic.
        yardstick: Whether it is there to compare with.
        nfe_eq: What the pipeline's `plan` says of the call; None where it says nothing.
    """

    arguments: dict | None
    yardstick: bool = False
    nfe_eq: float | None = None


def read_arms(path: str | None) -> dict[str, dict]:
    """The arms of a JSON file. Raises `ValueError` for another file."""
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--arms: {path!r} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(arguments, dict) for arguments in found.values()):
        raise ValueError(f"--arms: {path!r}: expected {{name: {{argument of the call: value}}}}")
    return found


def choose_arms(task, further: dict[str, dict], options: BenchSettings) -> dict[str, Arm]:
    """
    The pipeline's own arms and those of the file, as far as they were asked for. An own arm that this model cannot run
    is left out with a line on stderr; all else that is wrong raises `ValueError`.
    """
    arms = task.arms()
    for name, arguments in further.items():
        unknown = sorted(set(arguments) - (set(task.takes) - set(OURS)))
        if unknown:
            accepted = sorted(set(task.takes) - set(OURS))
            raise ValueError(f"--arms: {name!r} has {unknown}; expected arguments of the call: {accepted}")
        arms[name] = Arm(arguments)
    unknown = [name for name in options.only if name not in arms]
    if unknown:
        raise ValueError(f"--only: got {unknown}; accepted are {list(arms)}")
    chosen = {}
    for name, arm in arms.items():
        if options.only and name not in options.only:
            continue
        try:
            size, arm.nfe_eq = task.planned(arm)
        except ValueError as error:
            if name in further or options.only:
                raise ValueError(f"arm {name!r}: {error}") from error
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        if arm.nfe_eq is not None and arm.nfe_eq > SLOW and name not in (*further, *options.only):
            print(f"left out: {name}: {arm.nfe_eq:.0f} NFE-eq; --only with its name runs it", file=sys.stderr)
            continue
        if size is not None and tuple(size) != task.size:
            raise ValueError(
                f"arm {name!r}: its images have size {tuple(size)}, the reference {task.size}; accepted is one size, "
                "or --resolution to fit the reference"
            )
        chosen[name] = arm
    if not chosen:
        raise ValueError("arms: none that this model can run; accepted are some in --arms")
    return chosen


class Task:
    """
    What arms have in common: how a pipeline is called, and what its images are compared with.

    Args:
        pipeline: On the device that is meant.
        source: Of the reference images.
        options: The flags.
        device: Of the metrics.
    """

    name: str
    own_size: tuple[int, int] | None = None  # (height, width) of what the model generates

    def __init__(self, pipeline, source, options: BenchSettings, device):
        self.pipeline, self.source, self.options, self.device = pipeline, source, options, device
        self.takes = inspect.signature(pipeline.__call__).parameters
        self.conventions: dict = {}
        wanted = ("image" if self.name == "enlarge" else "batch_size", "generator")
        if not set(wanted) <= set(self.takes):
            raise ValueError(
                f"--model: a call of {type(pipeline).__name__} takes {list(self.takes)}; expected {wanted}"
            )
        self.size = self._one_size()

    def _one_size(self) -> tuple[int, int]:
        """(height, width) of the reference. Every image is decoded, so a bad one stops everything before any work."""
        from pyrdiff.data import decode_image

        images = (decode_image(self.source.read(k), 3, name=self.source.names[k]) for k in range(len(self.source)))
        found = {(image.height, image.width) for image in images}
        if self.options.resolution is None and self.own_size is not None and found != {self.own_size}:
            print("the reference is fitted to the model's {}x{}".format(*self.own_size), file=sys.stderr)
            self.options.resolution = self.own_size
        if self.options.resolution is not None:
            return self.options.resolution[0], self.options.resolution[-1]
        if len(found) > 1:
            raise ValueError(f"--reference: got sizes {sorted(found)[:4]}; accepted is one, or --resolution")
        return found.pop()

    def read(self, index: int, channels: int):
        """Image `index` of the reference, at `size`, as a PIL image of mode L or RGB."""
        from pyrdiff.data import decode_image, fit_image

        image = decode_image(self.source.read(index), channels, name=self.source.names[index])
        return image if self.options.resolution is None else fit_image(image, *self.size)

    def batches(self, count: int) -> Iterator[range]:
        for start in range(0, count, self.options.batch_size):
            yield range(start, min(start + self.options.batch_size, count))

    def generators(self, indices) -> list:
        import torch

        return [torch.Generator().manual_seed(self.options.seed + index) for index in indices]

    def planned(self, arm: Arm) -> tuple[tuple[int, int] | None, float | None]:
        """Size of an arm's images and its NFE-eq, as far as the pipeline's `plan` says them; raises if it refuses."""
        plan, given = getattr(self.pipeline, "plan", None), {**self.given(), **(arm.arguments or {})}
        if plan is None or arm.arguments is None:
            return None, None
        takes = inspect.signature(plan).parameters
        plan = plan(**{name: value for name, value in given.items() if name in takes})
        levels = getattr(plan, "levels", plan)
        return levels[-1].size, sum(level.nfe_eq for level in levels)

    def images(self, name: str, arm: Arm, inputs: dict) -> list:
        """PIL images of one call; `inputs` as `inputs()` gives them."""
        from PIL import Image

        if arm.arguments is None:
            return [image.resize(self.size[::-1], Image.Resampling.BICUBIC) for image in inputs["image"]]
        try:
            images = self.pipeline(**inputs, **arm.arguments).images
        except ValueError as error:
            raise ValueError(f"arm {name!r}: {error}") from error
        count, size = len(inputs["generator"]), self.size[::-1]
        if len(images) != count or any(image.size != size for image in images):
            got = sorted({image.size for image in images})
            raise ValueError(
                f"arm {name!r}: got {len(images)} images, width and height {got}; expected {count}, {size}"
            )
        return images


class Generating(Task):
    """Calls that need no image: sets of images, compared with the whole reference in the features of a network."""

    name = "generate"

    def __init__(self, pipeline, source, options: BenchSettings, device):
        from pyrdiff import metrics

        config = pipeline.unet.config
        self.top = (config.get("resolutions") or [config.get("sample_size")])[-1]
        if self.top is not None:
            self.own_size = tuple(self.top) if isinstance(self.top, (list, tuple)) else (self.top, self.top)
        super().__init__(pipeline, source, options, device)
        if options.scale_factor is not None:
            raise ValueError(f"--scale_factor: not for a {type(pipeline).__name__}, which generates")
        self.reference_images = len(source)
        self.network = metrics.open_features(
            options.features, options.weights, device=device, batch_size=options.batch_size
        )

    def arms(self) -> dict[str, Arm]:
        found = {}
        if "plan" in self.takes:
            found |= {name: Arm({"plan": name}) for name in self.pipeline.config.get("plans") or {}}
        if "num_passes" in self.takes:  # the default call is one of them
            found |= {f"{n} pass{'es' * (n > 1)}": Arm({"num_passes": n}) for n in PASSES}
        else:
            found.setdefault("default", Arm({}))
        if {"plan", "resolutions"} <= set(self.takes) and hasattr(self.pipeline, "plan"):
            for name, (steps, scheduler) in FULL_SIZE.items():
                plan = {"resolutions": [self.top], "num_inference_steps": steps, "scheduler": scheduler}
                found[name] = Arm({"plan": plan}, yardstick=True)
        return found

    def given(self) -> dict:
        return {}

    def planned(self, arm: Arm) -> tuple[tuple[int, int] | None, float | None]:
        size, nfe_eq = super().planned(arm)
        return size or self.own_size, nfe_eq

    def inputs(self, indices) -> dict:
        return {"batch_size": len(indices), "generator": self.generators(indices)}

    def prepare(self) -> None:
        """Features of the reference."""
        import torch

        from pyrdiff import metrics

        print(f"features of {len(self.source)} reference images", file=sys.stderr)
        channels, options = self.network.channels, self.options
        self.real = torch.cat(
            [
                self.network(_tensor([self.read(k, channels) for k in part], channels), data_range=UNIT)
                for part in self.batches(len(self.source))
            ]
        )
        self.statistics = metrics.FeatureStatistics(self.real.shape[1]).update(self.real)
        self.kernel = metrics.KernelReference(self.real)
        self.conventions = {
            "count": options.num_images,
            "count_real": len(self.real),
            "features": self.network.conventions,
            "resize": _resize(options),
            "scale_factor": None,
        }

    def score(self, name: str, arm: Arm) -> dict[str, dict]:
        import torch

        from pyrdiff import metrics

        fake = []
        for part in self.batches(self.options.num_images):
            images = _tensor(self.images(name, arm, self.inputs(part)), self.network.channels)
            fake.append(self.network(images, data_range=UNIT))
        real, fake, resamples = self.real, torch.cat(fake), self.options.resamples
        distance = metrics.frechet_distance(real, fake, features=self.network)
        kid = metrics.kid(real, fake, features=self.network)
        precision, recall = metrics.precision_recall(real, fake, features=self.network)
        for result in (distance, kid, precision, recall):
            own = {key: value for key, value in result.conventions.items() if key not in self.conventions}
            self.conventions.setdefault("metrics", {})[result.name] = own
        return {
            distance.name: _row(distance, _interval(*frechet_of(self.statistics, fake), resamples), False),
            kid.name: _row(kid, _interval(self.kernel.distance, fake, resamples), False),
            precision.name: _row(precision, _interval(_mean, precision.per_image, resamples), True),
            recall.name: _row(recall, None, True),  # its values are those of real images
        }


class Enlarging(Task):
    """Calls that need an image: images of the reference are made smaller, enlarged again and compared one by one."""

    name = "enlarge"

    def __init__(self, pipeline, source, options: BenchSettings, device):
        super().__init__(pipeline, source, options, device)
        config = pipeline.unet.config
        self.channels = config.get("image_channels") or config["out_channels"]
        self.reference_images = min(options.num_images, len(source))
        factor = options.scale_factor
        if factor is None and "scale_factor" in self.takes:
            factor = self.takes["scale_factor"].default
            factor = max(config.get("scale_factors") or [0]) if factor is None else factor
        if not isinstance(factor, int) or factor < 2:
            raise ValueError(f"--scale_factor: got {options.scale_factor}, and the call names none; expected 2 or more")
        if any(side % factor for side in self.size):
            raise ValueError(
                f"--scale_factor: {factor} does not divide the reference's {self.size}; accepted is one that does, or "
                "--resolution"
            )
        self.factor, self.low_size = factor, tuple(side // factor for side in self.size)
        self.measures = self._measures()

    def _measures(self) -> dict[str, Callable]:
        """The metrics that work at this size, with these weights; which do not is said, and in the conventions."""
        import torch

        from pyrdiff import metrics

        options = self.options
        lpips = {"network": options.lpips_network, "weights": options.lpips_weights, "data_range": UNIT}
        found = {
            "psnr": lambda images, target, low: metrics.psnr(images, target, data_range=UNIT),
            "ssim": lambda images, target, low: metrics.ssim(images, target, data_range=UNIT),
            "lpips": lambda images, target, low: metrics.lpips(images, target, **lpips),
            "consistency": lambda images, target, low: metrics.consistency(images, low, data_range=UNIT),
        }
        high, low = (torch.zeros(1, self.channels, *size, device=self.device) for size in (self.size, self.low_size))
        left_out = {}
        for name in list(found):
            try:
                found[name](high, high, low)
            except (ValueError, ImportError) as error:
                if name == "lpips" and options.lpips_weights is not None:
                    raise ValueError(f"--lpips_weights: {error}") from error
                left_out[name] = " ".join(str(error).split())
                print(f"left out: {name}: {left_out[name]}", file=sys.stderr)
                del found[name]
        self.conventions = {
            "count": self.reference_images,
            "features": None,
            "resize": _resize(options),
            "scale_factor": self.factor,
            "low_res": "Pillow's bicubic, antialiased, of the reference's 8 bits, rounded to 8 bits",
            "left_out": left_out,
        }
        return found

    def arms(self) -> dict[str, Arm]:
        plans = (self.pipeline.config.get("plans") or {}) if "plan" in self.takes else {}
        return {
            **({name: Arm({"plan": name}) for name in plans} or {"default": Arm({})}),
            BICUBIC: Arm(None, yardstick=True),
        }

    def given(self) -> dict:
        return {"image_size": self.low_size, **self._factor()}

    def _factor(self) -> dict:
        return {"scale_factor": self.factor} if "scale_factor" in self.takes else {}

    def low_res(self, index: int):
        from PIL import Image

        return self.read(index, self.channels).resize(self.low_size[::-1], Image.Resampling.BICUBIC)

    def inputs(self, indices) -> dict:
        images = [self.low_res(index % self.reference_images) for index in indices]
        return {"image": images, "generator": self.generators(indices), **self._factor()}

    def prepare(self) -> None:
        """Nothing: images are read when they are needed."""

    def score(self, name: str, arm: Arm) -> dict[str, dict]:
        from pyrdiff import metrics

        kept = {measure: [] for measure in self.measures}
        for part in self.batches(self.reference_images):
            inputs = self.inputs(part)
            sets = self.images(name, arm, inputs), [self.read(k, self.channels) for k in part], inputs["image"]
            tensors = [_tensor(images, self.channels).to(self.device) for images in sets]
            for measure, function in self.measures.items():
                kept[measure].append(function(*tensors))
        rows = {}
        for measure, parts in kept.items():
            result = metrics.combine(parts)
            interval = _interval(_mean, result.per_image, self.options.resamples)
            rows[result.name] = _row(result, interval, measure in ("psnr", "ssim"))
            self.conventions.setdefault("metrics", {})[result.name] = result.conventions
        return rows


# Time


def time_arms(task: Task, arms: dict[str, Arm], options: BenchSettings) -> dict[str, dict]:
    """Network calls, ms an image and latency of every arm: all arms in turn, again and again, after a warm-up."""
    import torch

    calls = [0]

    def count(*_) -> None:
        calls[0] += 1

    def seconds(name: str, arm: Arm, batch: int) -> float:
        inputs = task.inputs(range(batch))
        _synchronize(task.device)
        began = time.perf_counter()
        task.images(name, arm, inputs)
        _synchronize(task.device)
        return time.perf_counter() - began

    found = {(name, batch): [] for name in arms for batch in (1, options.batch_size)}
    counted = {}
    with torch.no_grad():
        for turn in range(-1, options.runs):
            print(f"timing: {f'run {turn + 1} of {options.runs}' if turn >= 0 else 'warm-up'}", file=sys.stderr)
            for (name, batch), values in found.items():
                if turn >= 0:
                    values.append(seconds(name, arms[name], batch))
                    continue
                calls[0] = 0
                hook = task.pipeline.unet.register_forward_pre_hook(count)
                try:
                    seconds(name, arms[name], batch)
                finally:
                    hook.remove()
                counted[name] = calls[0]
    return {
        name: {
            "network_calls": counted[name],
            "ms_per_image": _digits(1000 * statistics.median(found[name, options.batch_size]) / options.batch_size),
            "latency_ms": _digits(1000 * statistics.median(found[name, 1])),
        }
        for name in arms
    }


def _synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Scores


def frechet_of(reference, features) -> tuple[Callable, object]:
    """
    (statistic, sample) for a bootstrap of the Fréchet distance of `features` [M, D] to the `FeatureStatistics` of the
    reference. With fewer images than features, the products of covariances C1^½ C2 C1^½ have the same eigenvalues as
    the [M, M] products of the centred features times C1^½, which are found much sooner.
    """
    import torch

    from pyrdiff import metrics

    count, dimension = features.shape
    if count > dimension:
        return lambda part: reference.distance(metrics.FeatureStatistics(dimension).update(part)), features
    features, root = features.to(reference.mean), reference.root()
    trace = reference.covariance.trace()

    def distance(rows) -> float:
        mean = rows.mean(0)
        plain, rooted = (rows - mean).chunk(2, 1)
        values = torch.linalg.eigvalsh(rooted @ rooted.T)
        noise = len(values) * torch.finfo(values.dtype).eps * values[-1]
        cross = (values.where(values > noise, 0) / (count - 1)).sqrt().sum()
        apart = (reference.mean - mean[:dimension]).square().sum()
        return (apart + trace + plain.square().sum() / (count - 1) - 2 * cross).item()

    return distance, torch.cat([features, features @ root], 1)


def _interval(statistic: Callable, sample, resamples: int) -> list[float] | None:
    from pyrdiff.metrics import bootstrap_interval

    if resamples == 0 or len(sample) < 2 or not sample.isfinite().all():
        return None
    return [_digits(value, 6) for value in bootstrap_interval(statistic, sample, resamples=resamples)]


def _row(result, interval: list[float] | None, higher_is_better: bool) -> dict:
    value = result.value if math.isfinite(result.value) else str(result.value)  # JSON has no infinity
    return {"value": value, "interval": interval, "higher_is_better": higher_is_better}


def _mean(values):
    return values.mean()


def _tensor(images: list, channels: int):
    """PIL images as float [B, channels, H, W] in [0, 1]."""
    import numpy as np
    import torch

    arrays = [np.array(image.convert("L" if channels == 1 else "RGB")) for image in images]
    stacked = torch.from_numpy(np.stack(arrays))
    return (stacked[:, None] if channels == 1 else stacked.permute(0, 3, 1, 2)).float() / 255


def _resize(options: BenchSettings) -> str | None:
    if options.resolution is None:
        return None
    return "reference fitted: cut to the aspect, bicubic, antialiased"


def _name(place: str) -> str:
    """The last part of a path, of a training its folder's, or a repository's name."""
    if not Path(place).exists():
        return place
    path = Path(place).resolve()
    return path.parent.name if path.name == "pipeline" else path.name


def _digits(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
