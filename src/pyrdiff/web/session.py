"""One model and what a page has it do: generate level by level, enlarge, show a trajectory, compare plans."""

import inspect
import math
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import pyrdiff
from pyrdiff.data import BadImageError, open_picture
from pyrdiff.data.files import READ

STEP_ARGUMENTS = ("num_inference_steps", "refine_steps", "num_passes")  # of calls, as diffusers and pyrdiff name them
MAX_IMAGES = 16
MAX_FILE_MB = 64
STATES = 8  # of a trajectory that are shown
SECONDS_BETWEEN = 0.1  # reports of progress

_header_lock = threading.Lock()


class Cancelled(Exception):
    """The run was cancelled."""


class Busy(ValueError):
    """The model is at work."""


@dataclass
class Progress:
    """
    How far a run is.

    Attributes:
        task: What is running, where there is more than one thing.
        calls: Network calls that were begun.
        step, steps: Steps done, and in all, where the pipeline says so.
        window, windows: Network calls of this step, and of the one before it.
        seconds: Since the pipeline was called.
    """

    task: str
    calls: int
    step: int
    steps: int | None
    window: int
    windows: int
    seconds: float

    @property
    def fraction(self) -> float | None:
        """Share of the run that is done, or None where it cannot be told."""
        if not self.steps:
            return None
        inside = max(self.window - 1, 0) / self.windows if self.windows else 0.0
        return min((self.step + min(inside, 1.0)) / self.steps, 1.0)


@dataclass
class Level:
    """A finished level: its images, its size (height, width), its cost, and the seconds since the start."""

    images: list[Image.Image]
    size: tuple[int, int]
    calls: int
    nfe_eq: float
    seconds: float


@dataclass
class Result:
    """
    What a call gave.

    Attributes:
        name: Which of several calls.
        images: Its images.
        calls, nfe_eq, seconds: Network calls, the same in calls at the largest size, and what it took.
        levels: Of a pyramid, else empty.
        columns: Of a trajectory, (title, images) from structure to image, else empty.
        before: The picture that was enlarged, enlarged by bicubic interpolation.
        consistency: Mean difference, in [0, 1], between the picture and the result made smaller again.
        notes: What was done to the picture before.
    """

    name: str
    images: list[Image.Image]
    calls: int
    nfe_eq: float
    seconds: float
    levels: list[Level] = field(default_factory=list)
    columns: list[tuple[str, list[Image.Image]]] = field(default_factory=list)
    before: Image.Image | None = None
    consistency: float | None = None
    notes: list[str] = field(default_factory=list)


class Run:
    """One piece of work in a thread of its own: what it reports, and whether it is to stop."""

    def __init__(self, owner: str):
        self.owner, self.cancelled, self.events = owner, threading.Event(), queue.SimpleQueue()
        self.task, self.areas, self.began = "", [], 0.0

    def call(self, pipeline, arguments: dict, on_step: Callable | None = None):
        """
        The output of `pipeline(**arguments)`. Its network calls are counted and progress is reported. Once the run is
        cancelled the next network call does not take place: `Cancelled` is raised instead.
        """
        self.areas, self.began = [], time.perf_counter()
        step, before_step, windows, reported = 0, 0, 0, 0.0

        def report() -> None:
            nonlocal reported
            now = time.perf_counter()
            if now - reported >= SECONDS_BETWEEN:
                reported, calls = now, len(self.areas)
                steps = getattr(pipeline, "num_timesteps", None)
                seconds = now - self.began
                self.events.put(Progress(self.task, calls, step, steps, calls - before_step, windows, seconds))

        def before_network(module, given, named) -> None:
            self.check()
            values = (*given, *named.values())
            sample = next((each for each in values if isinstance(each, torch.Tensor) and each.ndim == 4), None)
            if sample is not None:  # no image, no step: the encoder of a prompt
                self.areas.append(len(sample) * math.prod(sample.shape[-2:]))
                report()

        def after_step(_, index, timestep, tensors) -> dict:
            nonlocal step, before_step, windows
            self.check()
            step, windows, before_step = step + 1, len(self.areas) - before_step, len(self.areas)
            if on_step is not None:
                on_step(step, tensors)
            report()
            return {}

        if "callback_on_step_end" in parameters(pipeline):
            arguments = {**arguments, "callback_on_step_end": after_step}
        networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        hooks = [part.register_forward_pre_hook(before_network, with_kwargs=True) for part in networks]
        try:
            self.check()
            output = pipeline(**arguments)
            self.check()
            return output
        finally:
            for hook in hooks:
                hook.remove()

    def check(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled

    @property
    def seconds(self) -> float:
        """Since the pipeline was called."""
        return time.perf_counter() - self.began

    def result(self, name: str, output, **more) -> Result:
        """What a call gave and took; 1 NFE-eq is one network call for all images at the largest size that occurred."""
        nfe_eq = sum(self.areas) / max(self.areas, default=1)
        return Result(name, list(_images(output)), len(self.areas), nfe_eq, self.seconds, **more)


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

    def __init__(self, pipeline, enlarger=None, name: str = "model", max_megapixels: float = 16):
        self.pipeline, self.name, self.max_pixels = pipeline, name, int(max_megapixels * 1e6)
        needed = _required(pipeline)
        if needed not in ([], ["image"]):
            raise ValueError(f"{type(pipeline).__name__} needs {needed}: expected a call without, or with an image")
        self.generates = not needed
        self.enlarger = enlarger if self.generates else pipeline
        self.has_trajectory = self.generates and "return_trajectory" in parameters(pipeline)
        self.compares = hasattr(pipeline, "plan") or bool({"num_inference_steps", "num_passes"} & {*self.steps()})
        for each in (self.pipeline, self.enlarger):
            if hasattr(each, "set_progress_bar_config"):
                each.set_progress_bar_config(disable=True)
        self._lock, self._run = threading.Lock(), None

    @classmethod
    def open(cls, model: str, revision: str | None = None, device: str | None = None, max_megapixels: float = 16):
        """The session of a saved model; `ValueError` if it cannot be loaded. `device`: by default the GPU if any."""
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={str(device)!r}: expected one of this machine, such as cpu ({error})") from error
        pipeline, enlarger = pyrdiff.load(model, revision=revision).to(device), None
        if "image" not in _required(pipeline):
            try:
                enlarger = pyrdiff.load(model, revision=revision, pipeline_class="GuidedSRPipeline").to(device)
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

    def _setting(self, name: str):
        """A value from the config of one of the networks."""
        for part in self.pipeline.components.values():
            value = getattr(getattr(part, "config", None), name, None)
            if isinstance(part, torch.nn.Module) and value is not None:
                return value
        return None

    def description(self) -> str:
        """The model in one line."""
        networks = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        count = sum(parameter.numel() for part in networks for parameter in part.parameters())
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

    def plans(self, pipeline=None) -> dict[str, str]:
        """{name: what it costs} of the pipeline's named plans."""
        pipeline = self.pipeline if pipeline is None else pipeline
        if "plan" not in parameters(pipeline):
            return {}
        found = {}
        for name in getattr(pipeline.config, "plans", None) or {}:
            levels = self._levels(pipeline, {"plan": name})
            found[name] = " + ".join(str(len(level.timesteps)) for level in levels) + " calls" if levels else ""
        return found

    def steps(self, pipeline=None) -> dict[str, int | None]:
        """{argument: default} of those arguments of a call that say how many steps it takes."""
        known = parameters(self.pipeline if pipeline is None else pipeline)
        return {name: known[name].default for name in STEP_ARGUMENTS if name in known}

    @staticmethod
    def _levels(pipeline, arguments: dict) -> list:
        """The levels of a call with these arguments, each with size, timesteps and cost, where the pipeline tells."""
        if not hasattr(pipeline, "plan"):
            return []
        takes = inspect.signature(pipeline.plan).parameters
        if any(each.default is inspect.Parameter.empty for each in takes.values()):
            return []
        plan = pipeline.plan(**{name: value for name, value in arguments.items() if name in takes})
        levels = getattr(plan, "levels", [])
        return list(levels) if all(hasattr(each, "size") and hasattr(each, "timesteps") for each in levels) else []

    # What it does.

    def generate(
        self, count: int = 1, seed: int = 0, plan: str | None = None, steps: dict | None = None, owner: str = ""
    ) -> Iterator[Progress | Level | Result]:
        """
        Images, `count` from 1 to 16, by a named plan or by steps {argument: number}. Where the pipeline returns levels,
        each comes as a `Level` once it is finished, and all of them again in the `Result`.
        """
        pipeline = self.pipeline
        arguments = self._arguments(pipeline, count, seed, plan, steps)

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
            columns += [*zip(titles, states, strict=True), ("image", _images(output))]
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

    def _arguments(self, pipeline, count, seed, plan, steps) -> dict:
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
            generators = [torch.Generator().manual_seed((seed + index) % 2**63) for index in range(count)]
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
        """
        A picture in the model's mode, upright and opaque, and what was done to it. Its size is read from the header
        before anything is decoded.

        Raises:
            ValueError: for no picture, or one that is broken, too large, animated or of more than 8 bits a channel.
        """
        if not path:
            raise ValueError("No picture yet: drop one first.")
        name = Path(path).name
        try:
            megabytes = Path(path).stat().st_size / 1e6
            if megabytes > MAX_FILE_MB:
                raise ValueError(f"{name} cannot be used: {megabytes:.0f} MB; expected at most {MAX_FILE_MB}.")
            width, height = _header_size(path)
            if width * height > self.max_pixels:
                raise ValueError(
                    f"{name} cannot be used: {width}×{height} are {width * height / 1e6:.0f} megapixels; expected at "
                    f"most {self.max_pixels / 1e6:g}."
                )
            picture = open_picture(path, self.max_pixels)
        except BadImageError as error:
            raise ValueError(f"{name} cannot be used: {error.reason}.") from error
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror or error}.") from error
        image, notes = picture.color, list(picture.notes)
        if picture.alpha is not None:
            white = Image.new(image.mode, image.size, "white")
            image = Image.composite(image, white, picture.alpha)
            notes.append("transparency laid on white")
        if picture.exif:
            try:
                image.info["exif"] = picture.exif
                turned = ImageOps.exif_transpose(image)
                if turned.size != image.size or turned.tobytes() != image.tobytes():
                    notes.append("turned upright, as its orientation tag says")
                image = turned
            except Exception:  # damaged EXIF shows as all sorts; the pixels are good
                pass
            image.info.clear()
        mode = {1: "L", 3: "RGB"}.get(self.channels, "RGB")
        if image.mode != mode:
            notes.append("made gray, for this model" if mode == "L" else "gray taken as colour, for this model")
            image = image.convert(mode)
        return image, notes

    def _picture_arguments(self, path, scale_factor, tile) -> tuple[dict, list[str]]:
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
    def _enlarged(run: Run, name: str, output, image: Image.Image, notes: list[str]) -> Result:
        consistency = getattr(output, "consistency", None)
        result = run.result(name, output, notes=notes)
        result.before = image.resize(result.images[0].size, Image.Resampling.BICUBIC)
        result.consistency = None if consistency is None else float(consistency[0])
        return result


def parameters(pipeline) -> dict[str, inspect.Parameter]:
    """The named parameters of a pipeline's call."""
    if pipeline is None:
        return {}
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(pipeline.__call__).parameters
    return {name: each for name, each in found.items() if each.kind not in loose}


def _required(pipeline) -> list[str]:
    return [name for name, each in parameters(pipeline).items() if each.default is inspect.Parameter.empty]


def _images(output) -> list[Image.Image]:
    return output.images if hasattr(output, "images") else output[0]


def _level_images(pipeline, latents: torch.Tensor, size: tuple[int, int]) -> list[Image.Image]:
    """Latents [B, C, H, W] in [-1, 1] at the end of a level, as the pipeline makes images of them."""
    if tuple(latents.shape[-2:]) != tuple(size):
        latents = F.interpolate(latents, size, mode="bicubic", align_corners=False, antialias=True)
    images = (latents / 2 + 0.5).clamp(0, 1)
    return pipeline.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).numpy())


def _header_size(path: str) -> tuple[int, int]:
    """(width, height) from the header of an image file, whatever they are; nothing is decoded."""
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path, formats=READ) as image:
                return image.size
        except OSError as error:
            if error.errno is not None:
                raise
            raise BadImageError(path, f"not an image; expected one of {', '.join(READ)}") from error
        except Exception as error:
            raise BadImageError(path, f"damaged ({error})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = before
