"""One model and what a page has it do: generate level by level, enlarge, show a trajectory, compare plans."""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

import pyrdiff
from pyrdiff.hub.enlarging import enlarging
from pyrdiff.machine import open_device, seeded

from .events import Busy, Level, Progress, Result
from .pictures import read_picture
from .run import Run, images_of, networks, parameters
from .steering import steering_arguments

STEP_ARGUMENTS = ("num_inference_steps", "refine_steps", "num_passes")  # of calls, as diffusers and pyrdiff name them
MAX_IMAGES = 16
STATES = 8  # of a trajectory that are shown


class Session:
    """
    A model in use. Its methods `generate`, `enlarge`, `trajectory` and `compare` check what they are given, start the
    work and yield `Progress`, a `Level` as soon as it is finished, and `Result`s. One at a time: a second call raises
    `Busy`. `cancel` stops what runs within one network call; the generator then raises `Cancelled`.

    What the model can do is read off the signatures and attributes of its pipeline.

    Args:
        pipeline: Any pipeline of diffusers that makes images from nothing or from an image.
        enlarger: Another one, with the same network, that enlarges images.
        name: What the model is called.
        max_megapixels: The most pixels, in millions, that a picture may have, and what is made of it.

    Raises:
        ValueError: if the pipeline's call needs something else than an image.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        enlarger: DiffusionPipeline | None = None,
        name: str = "model",
        max_megapixels: float = 16,
    ):
        self.pipeline, self.name, self.max_pixels = pipeline, name, int(max_megapixels * 1e6)
        needed = _required(pipeline)
        if needed not in ([], ["image"]):
            raise ValueError(f"{type(pipeline).__name__} needs {needed}: expected a call without, or with an image")
        self.generates = not needed
        self.enlarger = enlarger if self.generates else pipeline
        self.has_trajectory = self.generates and "return_trajectory" in parameters(pipeline)
        self.compares = hasattr(pipeline, "plan") or bool({"num_inference_steps", "num_passes"} & {*self.steps()})
        for used in (self.pipeline, self.enlarger):
            if hasattr(used, "set_progress_bar_config"):
                used.set_progress_bar_config(disable=True)
        self._lock, self._run = threading.Lock(), None

    @classmethod
    def open(cls, model: str, revision: str | None = None, device: str | None = None, max_megapixels: float = 16):
        """The session of a saved model; `ValueError` if it cannot be loaded. `device`: by default the GPU if any."""
        device = open_device(device)
        pipeline, enlarger = pyrdiff.load(model, revision=revision).to(device), None
        if "image" not in _required(pipeline):
            try:
                enlarger = enlarging(pipeline)
            except ValueError:
                pass  # its network cannot guide
        return cls(pipeline, enlarger, str(model).rstrip("/"), max_megapixels)

    # What the model is.

    @property
    def channels(self) -> int:
        """Of its images."""
        for name in ("image_channels", "in_channels"):
            value = self._setting(name)
            if value is not None:
                return value
        return 3

    @property
    def scale_factors(self) -> list[int] | None:
        """Those that it was trained to enlarge by; `None` for any."""
        factors = self._setting("scale_factors")
        return None if factors is None else list(factors)

    def _setting(self, name: str) -> object:
        """A value from the config of one of the networks."""
        values = (getattr(getattr(network, "config", None), name, None) for network in networks(self.pipeline))
        return next((value for value in values if value is not None), None)

    def description(self) -> str:
        """The model in one line."""
        count = sum(parameter.numel() for part in networks(self.pipeline) for parameter in part.parameters())
        facts = [type(self.pipeline).__name__, f"{count / 1e6:.1f} million parameters"]
        facts.append({1: "gray", 3: "colour"}.get(self.channels, f"{self.channels} channels"))
        sizes, side = [level.size for level in self._levels(self.pipeline, {})], self._setting("sample_size")
        if not sizes and self.generates and side is not None:
            sizes = [tuple(side) if isinstance(side, (list, tuple)) else (side, side)]
        if sizes:
            facts.append("{} pixels".format(" → ".join(f"{width}×{height}" for height, width in sizes)))
        if not self.generates:
            factors = self.scale_factors
            facts.append("enlarges" + ("" if factors is None else f" ×{', ×'.join(map(str, factors))}"))
        return f"{', '.join(facts)}; on {self.pipeline.device}"

    def plans(self, pipeline: DiffusionPipeline | None = None) -> dict[str, str]:
        """{name: what it costs} of the pipeline's named plans."""
        pipeline = self.pipeline if pipeline is None else pipeline
        if "plan" not in parameters(pipeline):
            return {}
        costs = {}
        for name in getattr(pipeline.config, "plans", None) or {}:
            levels = self._levels(pipeline, {"plan": name})
            costs[name] = " + ".join(str(len(level.timesteps)) for level in levels) + " calls" if levels else ""
        return costs

    def steps(self, pipeline: DiffusionPipeline | None = None) -> dict[str, int | None]:
        """{argument: default} of those arguments of a call that say how many steps it takes."""
        known = parameters(self.pipeline if pipeline is None else pipeline)
        return {name: known[name].default for name in STEP_ARGUMENTS if name in known}

    @staticmethod
    def _levels(pipeline: DiffusionPipeline, arguments: dict) -> list:
        """The levels of a call with these arguments, each with size, timesteps and cost, where the pipeline tells."""
        if not hasattr(pipeline, "plan"):
            return []
        takes = inspect.signature(pipeline.plan).parameters
        if any(argument.default is inspect.Parameter.empty for argument in takes.values()):
            return []
        plan = pipeline.plan(**{name: value for name, value in arguments.items() if name in takes})
        levels = getattr(plan, "levels", [])
        return list(levels) if all(hasattr(level, "size") and hasattr(level, "timesteps") for level in levels) else []

    # What it does.

    def generate(
        self,
        count: int = 1,
        seed: int = 0,
        plan: str | None = None,
        steps: dict | None = None,
        owner: str = "",
        classes: Sequence[str] = (),
        guidance: float = 1.0,
    ) -> Iterator[Progress | Level | Result]:
        """
        Images, `count` from 1 to 16, by a named plan or by steps {argument: number}; for `classes` and `guidance` see
        `steering_arguments`. Where the pipeline returns levels, each comes as a `Level` once it is finished, and all of
        them again in the `Result`.
        """
        pipeline = self.pipeline
        arguments = self._arguments(pipeline, count, seed, plan, steps)
        arguments |= steering_arguments(pipeline, count, classes, guidance)

        def work(run: Run) -> None:
            plans = self._levels(pipeline, arguments) if "return_levels" in parameters(pipeline) else []
            ends, levels = list(accumulate(len(level.timesteps) for level in plans)), []

            def on_step(step: int, tensors: dict) -> None:
                if step in ends and "latents" in tensors:
                    level = plans[ends.index(step)]
                    images = _level_images(pipeline, tensors["latents"], level.size)
                    levels.append(Level(images, level.size, len(level.timesteps), level.nfe_eq, run.seconds))
                    run.events.put(levels[-1])

            if "return_levels" in parameters(pipeline):
                output = run.call(pipeline, {**arguments, "return_levels": True}, on_step)
            else:
                output = run.call(pipeline, arguments)
            for level, images in zip(levels, getattr(output, "levels", None) or [], strict=False):
                level.images = images
            run.events.put(run.result("", output, levels=levels))

        return self._start(work, owner)

    def trajectory(
        self, count: int = 1, seed: int = 0, steps: dict | None = None, owner: str = ""
    ) -> Iterator[Progress | Result]:
        """Images with the structure that they grew from, if there is one, and states on the way."""
        pipeline = self.pipeline
        arguments = {**self._arguments(pipeline, count, seed, None, steps), "return_trajectory": True}
        scheduler = getattr(pipeline, "scheduler", None)
        total = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
        if "trajectory_steps" in parameters(pipeline) and total:
            arguments["trajectory_steps"] = sorted({max(total * k // STATES, 1) for k in range(1, STATES + 1)})[::-1]

        def work(run: Run) -> None:
            output = run.call(pipeline, arguments)
            structure, states = getattr(output, "structure", None), list(output.trajectory or [])
            times = list(getattr(output, "trajectory_steps", None) or [])
            if len(states) > STATES:
                kept = [round(k * (len(states) - 1) / (STATES - 1)) for k in range(STATES)]
                states, times = [states[k] for k in kept], [times[k] for k in kept if k < len(times)]
            titles = [f"t = {times[k]}" if k < len(times) else f"state {k + 1}" for k in range(len(states))]
            columns = [("structure", structure)] if structure is not None else []
            columns += [*zip(titles, states, strict=True), ("image", images_of(output))]
            run.events.put(run.result("", output, columns=columns))

        return self._start(work, owner)

    def enlarge(
        self,
        path: str,
        scale_factor: float = 4,
        tile: int | None = 256,
        seed: int = 0,
        plan: str | None = None,
        steps: dict | None = None,
        owner: str = "",
    ) -> Iterator[Progress | Result]:
        """A picture enlarged, by the pipeline or by its enlarger; see `read` for what is refused."""
        arguments = self._arguments(self.enlarger, 1, seed, plan, steps)
        given, notes = self._picture_arguments(path, scale_factor, tile)

        def work(run: Run) -> None:
            output = run.call(self.enlarger, {**arguments, **given})
            run.events.put(self._enlarged(run, "", output, given["image"], notes))

        return self._start(work, owner)

    def compare(
        self,
        plans: list[str],
        argument: str | None = None,
        values: str = "",
        count: int = 1,
        seed: int = 0,
        path: str | None = None,
        scale_factor: float = 4,
        tile: int | None = 256,
        owner: str = "",
    ) -> Iterator[Progress | Result]:
        """
        A `Result` for each of two or more ways from the same seed: named plans, and numbers of steps such as "1, 2, 4"
        for an argument of `steps`. A call before the first one warms up and is not counted.
        """
        pipeline, given, notes = self.pipeline, {}, []
        ways = {name: (name, None) for name in plans}  # plan and steps
        for number in self._numbers(values) if argument else []:
            ways[f"{argument} = {number}"] = (None, {argument: number})
        if len(ways) < 2:
            raise ValueError(f"Got {len(ways)} to compare: choose two or more plans or numbers of steps.")
        first, *_ = (self._arguments(pipeline, count, seed, *way) for way in ways.values())
        if not self.generates:
            given, notes = self._picture_arguments(path, scale_factor, tile)

        def work(run: Run) -> None:
            run.task = "warm-up"
            run.call(pipeline, {**first, **given})
            for index, (name, way) in enumerate(ways.items()):
                run.task = f"{name} ({index + 1} of {len(ways)})"
                output = run.call(pipeline, {**self._arguments(pipeline, count, seed, *way), **given})
                if given:
                    run.events.put(self._enlarged(run, name, output, given["image"], notes))
                else:
                    run.events.put(run.result(name, output))

        return self._start(work, owner)

    def cancel(self, owner: str = "") -> bool:
        """Stops what this owner has running; False if there is nothing."""
        run = self._run
        if run is None or run.owner != owner:
            return False
        run.cancelled.set()
        return True

    def _start(self, work: Callable[[Run], None], owner: str) -> Iterator:
        if not self._lock.acquire(blocking=False):
            raise Busy("The model is at work: wait until it is done, or cancel it, then try again.")
        run = self._run = Run(owner)

        def body() -> None:
            error = None
            try:
                work(run)
            except BaseException as raised:
                error = raised
            self._run = None
            self._lock.release()
            run.events.put((error,))

        threading.Thread(target=body, daemon=True).start()
        return self._events(run)

    @staticmethod
    def _events(run: Run) -> Iterator:
        try:
            while not isinstance(event := run.events.get(), tuple):
                yield event
            if event[0] is not None:
                raise event[0]
        finally:
            run.cancelled.set()  # nobody listens any more

    # What it is given.

    def _arguments(
        self, pipeline: DiffusionPipeline, count: int, seed: int, plan: str | None, steps: dict | None
    ) -> dict:
        """The arguments of a call that it takes; raises for what is out of range."""
        if not (isinstance(count, int) and 1 <= count <= MAX_IMAGES):
            raise ValueError(f"Number of images: got {count}; expected a whole number from 1 to {MAX_IMAGES}.")
        if not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise ValueError(f"Seed: got {seed}; expected a whole number from 0 up, below 2^63.")
        takes, arguments = parameters(pipeline), {}
        count = count if "batch_size" in takes else 1
        if "batch_size" in takes:
            arguments["batch_size"] = count
        if "generator" in takes:
            generators = seeded([(seed + index) % 2**63 for index in range(count)], pipeline.device)
            arguments["generator"] = generators if count > 1 else generators[0]
        if plan:
            arguments["plan"] = plan
        for name, value in {} if plan else (steps or {}).items():
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: got {value}; expected a whole number from 1 up.")
            if value is not None:
                arguments[name] = value
        return arguments

    @staticmethod
    def _numbers(text: str) -> list[int]:
        parts = [part.strip() for part in (text or "").split(",") if part.strip()]
        if not all(part.isdecimal() and 0 < int(part) <= 10_000 for part in parts):
            raise ValueError(f"Numbers of steps: got {text!r}; expected whole numbers such as 1, 2, 4.")
        return list(dict.fromkeys(int(part) for part in parts))

    def read(self, path: str | None) -> tuple[Image.Image, list[str]]:
        """A picture in the model's mode, and what was done to it; see `read_picture`."""
        return read_picture(path, self.channels, self.max_pixels)

    def _picture_arguments(self, path: str | None, scale_factor: float, tile: int | None) -> tuple[dict, list[str]]:
        """The arguments of a call that are about the picture."""
        takes = parameters(self.enlarger)
        image, notes = self.read(path)
        arguments = {"image": image}
        if "scale_factor" in takes:
            if not (isinstance(scale_factor, (int, float)) and 1 <= scale_factor <= 64):
                raise ValueError(f"Scale factor: got {scale_factor}; expected a number from 1 to 64.")
            scale_factor = int(scale_factor) if float(scale_factor).is_integer() else scale_factor
            width, height = (round(side * scale_factor) for side in image.size)
            if width * height > self.max_pixels:
                raise ValueError(
                    f"Enlarged {scale_factor} times it would have {width}×{height} pixels, "
                    f"{width * height / 1e6:.0f} megapixels; expected at most {self.max_pixels / 1e6:g}."
                )
            arguments["scale_factor"] = scale_factor
        if "tile" in takes and tile is not None:
            arguments["tile"] = tile
        return arguments, notes

    @staticmethod
    def _enlarged(run: Run, name: str, output: BaseOutput | tuple, image: Image.Image, notes: list[str]) -> Result:
        consistency = getattr(output, "consistency", None)
        result = run.result(name, output, notes=notes)
        result.before = image.resize(result.images[0].size, Image.Resampling.BICUBIC)
        result.consistency = None if consistency is None else float(consistency[0])
        return result


def _required(pipeline: DiffusionPipeline) -> list[str]:
    """The arguments that a call needs."""
    return [name for name, known in parameters(pipeline).items() if known.default is inspect.Parameter.empty]


def _level_images(pipeline: DiffusionPipeline, latents: torch.Tensor, size: tuple[int, int]) -> list[Image.Image]:
    """Latents [B, C, H, W] in [-1, 1] at the end of a level, as the pipeline makes images of them."""
    if tuple(latents.shape[-2:]) != tuple(size):
        latents = F.interpolate(latents, size, mode="bicubic", align_corners=False, antialias=True)
    images = (latents / 2 + 0.5).clamp(0, 1)
    return pipeline.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).numpy())
