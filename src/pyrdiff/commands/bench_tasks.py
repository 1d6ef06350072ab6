"""What `pyrdiff bench` does with a model that generates, and with one that enlarges: calls and scores of its arms."""

import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from pyrdiff import metrics
from pyrdiff.commands.bench import BenchSettings, digits
from pyrdiff.commands.sample import classes_for
from pyrdiff.data import ImageSource, image_tensor, read_image, sizes_of
from pyrdiff.machine import seeded
from pyrdiff.metrics import Score
from pyrdiff.plan import clipping

UNIT = (0, 1)  # the range of images here
FULL_SIZE = {  # stock diffusion, schedulers as their classes have them
    "DPM-Solver++ 20 at full size": (20, "DPMSolverMultistepScheduler"),
    "DDIM 50 at full size": (50, "DDIMScheduler"),
}
BICUBIC = "bicubic"
PASSES = (1, 2, 4)


@dataclass
class Arm:
    """
    A way of calling the pipeline.

    Attributes:
        arguments: Of the call, beside those that all arms get; None for Pillow's bicubic.
        yardstick: True if it is there to compare with.
        nfe_eq: What the pipeline's `plan` says of the call; None where it says nothing.
    """

    arguments: dict | None
    yardstick: bool = False
    nfe_eq: float | None = None


class Task(ABC):
    """
    What arms have in common: how a pipeline is called, and what its images are compared with.

    Args:
        pipeline: On the device that is meant.
        source: The reference images.
        options: The flags. Without a resolution, the size of what the model generates is set as that.
        device: Of the metrics.

    Raises:
        ValueError: for a pipeline that cannot be called like this, and for a reference that does not fit it.
    """

    name: str
    needs: str  # argument of the call, beside `generator`
    reference_images: int  # that the scores look at
    scored_images: int  # of an arm
    bar: tqdm | None = None  # which goes on with each image

    def __init__(self, pipeline: DiffusionPipeline, source: ImageSource, options: BenchSettings, device: torch.device):
        self.pipeline, self.source, self.options, self.device = pipeline, source, options, device
        self.takes = inspect.signature(pipeline.__call__).parameters
        self.conventions: dict = {}
        if not {self.needs, "generator"} <= set(self.takes):
            expected = f"{self.needs} and generator among them"
            raise ValueError(
                f"--model: a call of {type(pipeline).__name__} takes {list(self.takes)}; expected {expected}"
            )
        self.size = self._size_of_reference()

    @property
    def own_size(self) -> tuple[int, int] | None:
        """(height, width) of what the model generates, if it has one."""
        return None

    def _size_of_reference(self) -> tuple[int, int]:
        """(height, width) that the reference has, or is fitted to."""
        options, sizes = self.options, set(sizes_of(self.source, progress="reading the reference"))
        if options.resolution is None and self.own_size is not None and sizes != {self.own_size}:
            print("the reference is fitted to the model's {}x{}".format(*self.own_size), file=sys.stderr)
            options.resolution = self.own_size
        if options.resolution is not None:
            return options.resolution[0], options.resolution[-1]
        if len(sizes) > 1:
            raise ValueError(f"--reference: has sizes {sorted(sizes)[:4]}; expected one, or --resolution")
        return sizes.pop()

    @abstractmethod
    def arms(self) -> dict[str, Arm]:
        """The arms that the pipeline has of its own."""

    @abstractmethod
    def prepare(self) -> None:
        """What all scores need, before anything is timed."""

    @abstractmethod
    def inputs(self, indices: Sequence[int]) -> dict:
        """Arguments of the call that makes these images."""

    @abstractmethod
    def score(self, name: str, arm: Arm) -> dict[str, dict]:
        """{metric: value, interval, higher_is_better} of an arm's images."""

    def given(self) -> dict:
        """Arguments that `plan` gets of all arms."""
        return {}

    def planned(self, arm: Arm) -> tuple[tuple[int, int] | None, float | None]:
        """Size of an arm's images and its NFE-eq, as far as the pipeline's `plan` says them; raises if it refuses."""
        plan, arguments = getattr(self.pipeline, "plan", None), {**self.given(), **(arm.arguments or {})}
        if plan is None or arm.arguments is None:
            return self.own_size, None
        takes = inspect.signature(plan).parameters
        plan = plan(**{name: value for name, value in arguments.items() if name in takes})
        levels = getattr(plan, "levels", plan)
        return levels[-1].size, sum(level.nfe_eq for level in levels)

    def images(self, name: str, arm: Arm, inputs: dict) -> list[Image.Image]:
        """The images of one call; `inputs` as `inputs()` gives them."""
        size = self.size[::-1]
        if arm.arguments is None:
            return [image.resize(size, Image.Resampling.BICUBIC) for image in inputs["image"]]
        try:
            images = self.pipeline(**{**inputs, **arm.arguments}).images
        except ValueError as error:
            raise ValueError(f"arm {name!r}: {error}") from error
        count = len(inputs["generator"])
        if len(images) != count or any(image.size != size for image in images):
            sizes = sorted({image.size for image in images})
            raise ValueError(
                f"arm {name!r}: gave {len(images)} images, width and height {sizes}; expected {count}, {size}"
            )
        return images

    def read(self, index: int, channels: int) -> Image.Image:
        """Image `index` of the reference, at `size`."""
        return read_image(self.source, index, channels, self.size if self.options.resolution else None)

    def batches(self, count: int) -> Iterator[range]:
        """The indices of `count` images, `--batch_size` at a time."""
        for start in range(0, count, self.options.batch_size):
            indices = range(start, min(start + self.options.batch_size, count))
            yield indices
            if self.bar is not None:
                self.bar.update(len(indices))

    def generators(self, indices: Sequence[int]) -> list[torch.Generator]:
        """Of each image, seeded with `--seed` and its index."""
        return seeded([self.options.seed + index for index in indices], self.pipeline.device)

    def rows(self, scores: Sequence[Score]) -> dict[str, dict]:
        """Scores for the JSON; their conventions are noted, but for those that all scores share."""
        rows = {}
        for result, interval, higher_is_better in scores:
            value = result.value if math.isfinite(result.value) else str(result.value)  # JSON has no infinity
            interval = None if interval is None else [digits(bound, 6) for bound in interval]
            rows[result.name] = {"value": value, "interval": interval, "higher_is_better": higher_is_better}
            own = {name: value for name, value in result.conventions.items() if name not in self.shared}
            self.conventions.setdefault("metrics", {})[result.name] = own
        return rows

    shared: tuple[str, ...] = ()  # names of conventions that are not noted for each metric

    @property
    def resize(self) -> str | None:
        """How the reference came to its size."""
        return "reference fitted: cut to the aspect, bicubic, antialiased" if self.options.resolution else None


class Generating(Task):
    """Calls that need no image: sets of images, compared with the whole reference in the features of a network."""

    name, needs = "generate", "batch_size"
    shared = ("count", "count_real", "features", "resize", "scale_factor")

    def __init__(self, pipeline: DiffusionPipeline, source: ImageSource, options: BenchSettings, device: torch.device):
        super().__init__(pipeline, source, options, device)
        if options.scale_factor is not None:
            raise ValueError(f"--scale_factor: not for a {type(pipeline).__name__}, which generates")
        self.reference_images, self.scored_images = len(source), options.num_images
        self.network = metrics.open_features(
            options.features, options.weights, device=device, batch_size=options.batch_size
        )

    @property
    def top(self) -> int | tuple[int, int] | None:
        """The largest size that the network was trained at."""
        config = self.pipeline.unet.config
        return (config.get("resolutions") or [config.get("sample_size")])[-1]

    @property
    def own_size(self) -> tuple[int, int] | None:
        return (self.top, self.top) if isinstance(self.top, int) else self.top and tuple(self.top)

    def arms(self) -> dict[str, Arm]:
        """Plans, numbers of passes, and solvers of stock diffusion at full size."""
        arms = {}
        if "plan" in self.takes:
            arms |= {name: Arm({"plan": name}) for name in self.pipeline.config.get("plans") or {}}
        if "num_passes" in self.takes:  # the default call is one of them
            arms |= {f"{n} pass{'es' * (n > 1)}": Arm({"num_passes": n}) for n in PASSES}
        else:
            arms.setdefault("default", Arm({}))
        if {"plan", "resolutions"} <= set(self.takes) and hasattr(self.pipeline, "plan"):
            for name, (steps, scheduler) in FULL_SIZE.items():
                plan = {"resolutions": [self.top], "num_inference_steps": steps}
                plan["scheduler"] = [scheduler, clipping(scheduler)]
                arms[name] = Arm({"plan": plan}, yardstick=True)
        return arms

    def inputs(self, indices: Sequence[int]) -> dict:
        told = classes_for(self.pipeline, indices)
        return {"batch_size": len(indices), "generator": self.generators(indices), **told}

    def features(self, images: Callable[[range], list[Image.Image]], count: int) -> torch.Tensor:
        """Features [count, D] of images that f(indices) gives."""
        channels = self.network.channels
        batches = (image_tensor(images(indices), channels) for indices in self.batches(count))
        return torch.cat([self.network(batch, data_range=UNIT) for batch in batches])

    def prepare(self) -> None:
        """Features of the reference."""
        channels, options = self.network.channels, self.options
        with tqdm(total=len(self.source), desc="features of the reference", unit="image", disable=None) as self.bar:
            real = self.features(lambda indices: [self.read(index, channels) for index in indices], len(self.source))
        self.comparison = metrics.SetComparison(real, self.network, options.resamples)
        self.conventions = {
            "count": options.num_images,
            "count_real": len(real),
            "features": self.network.conventions,
            "resize": self.resize,
            "scale_factor": None,
        }

    def score(self, name: str, arm: Arm) -> dict[str, dict]:
        fake = self.features(lambda indices: self.images(name, arm, self.inputs(indices)), self.options.num_images)
        return self.rows(self.comparison.scores(fake))


class Enlarging(Task):
    """Calls that need an image: images of the reference are made smaller, enlarged again and compared one by one."""

    name, needs = "enlarge", "image"

    def __init__(self, pipeline: DiffusionPipeline, source: ImageSource, options: BenchSettings, device: torch.device):
        super().__init__(pipeline, source, options, device)
        config = pipeline.unet.config
        self.channels = config.get("image_channels") or config["out_channels"]
        self.reference_images = self.scored_images = min(options.num_images, len(source))
        factor = options.scale_factor
        if factor is None and "scale_factor" in self.takes:
            factor = self.takes["scale_factor"].default or max(config.get("scale_factors") or [0])
        if not isinstance(factor, int) or factor < 2:
            raise ValueError("--scale_factor=None: expected 2 or more, since the call names none")
        if any(side % factor for side in self.size):
            raise ValueError(
                f"--scale_factor={factor}: does not divide the reference's {self.size}; expected one that does, or "
                "--resolution"
            )
        self.factor, self.low_size = factor, tuple(side // factor for side in self.size)
        self.measures = self._measures()

    def _measures(self) -> dict[str, Callable]:
        """The metrics that work at this size, with these weights; those that do not are noted in the conventions."""
        options, left_out = self.options, {}
        lpips = {"network": options.lpips_network, "weights": options.lpips_weights, "data_range": UNIT}
        measures = {
            "psnr": lambda images, target, low: metrics.psnr(images, target, data_range=UNIT),
            "ssim": lambda images, target, low: metrics.ssim(images, target, data_range=UNIT),
            "lpips": lambda images, target, low: metrics.lpips(images, target, **lpips),
            "consistency": lambda images, target, low: metrics.consistency(images, low, data_range=UNIT),
        }
        high, low = (torch.zeros(1, self.channels, *size, device=self.device) for size in (self.size, self.low_size))
        for name in list(measures):
            try:
                measures[name](high, high, low)
            except (ValueError, ImportError) as error:
                if name == "lpips" and options.lpips_weights is not None:
                    raise ValueError(f"--lpips_weights: {error}") from error
                left_out[name] = " ".join(str(error).split())
                print(f"left out: {name}: {left_out[name]}", file=sys.stderr)
                del measures[name]
        self.conventions = {
            "count": self.reference_images,
            "features": None,
            "resize": self.resize,
            "scale_factor": self.factor,
            "low_res": "Pillow's bicubic, antialiased, of the reference's 8 bits, rounded to 8 bits",
            "left_out": left_out,
        }
        return measures

    def arms(self) -> dict[str, Arm]:
        """Plans, and bicubic."""
        plans = (self.pipeline.config.get("plans") or {}) if "plan" in self.takes else {}
        arms = {name: Arm({"plan": name}) for name in plans} or {"default": Arm({})}
        return {**arms, BICUBIC: Arm(None, yardstick=True)}

    def given(self) -> dict:
        return {"image_size": self.low_size, **self._scale_factor()}

    def _scale_factor(self) -> dict:
        return {"scale_factor": self.factor} if "scale_factor" in self.takes else {}

    def prepare(self) -> None:
        """Nothing: images are read when they are needed."""

    def inputs(self, indices: Sequence[int]) -> dict:
        images = [self.read(index % self.reference_images, self.channels) for index in indices]
        images = [image.resize(self.low_size[::-1], Image.Resampling.BICUBIC) for image in images]
        return {"image": images, "generator": self.generators(indices), **self._scale_factor()}

    def score(self, name: str, arm: Arm) -> dict[str, dict]:
        results = {measure: [] for measure in self.measures}
        for indices in self.batches(self.reference_images):
            inputs = self.inputs(indices)
            truth = [self.read(index, self.channels) for index in indices]
            tensors = [
                image_tensor(images, self.channels).to(self.device)
                for images in (self.images(name, arm, inputs), truth, inputs["image"])
            ]
            for measure, function in self.measures.items():
                results[measure].append(function(*tensors))
        return self.rows(
            [
                metrics.score_of_mean(metrics.combine(parts), self.options.resamples, measure in ("psnr", "ssim"))
                for measure, parts in results.items()
            ]
        )
