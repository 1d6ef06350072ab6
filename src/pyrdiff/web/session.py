"""One model at work: it generates level by level, enlarges, shows a trajectory and compares plans."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

import pyrdiff
from pyrdiff.hub.enlarging import enlarging
from pyrdiff.hub.repository import local_folder
from pyrdiff.machine import open_device

from .events import Level, Progress, Result, Waiting
from .line import Line
from .model import Cost, Model, calls_of, levels_of, required
from .pictures import read_picture
from .requests import call_arguments, numbers, picture_arguments, plan_arguments
from .run import Run, images_of, parameters
from .steering import steering_arguments

STATES = 8  # of a trajectory that are shown


@dataclass
class Outlook:
    """What enlarging will come to: sizes (width, height), windows of the last level, and seconds if they are known."""

    before: tuple[int, int]
    after: tuple[int, int]
    windows: int
    seconds: float | None
    notes: list[str]


class Session(Model):
    """
    A model in use. Its methods `generate`, `enlarge`, `trajectory` and `compare` check what they are given, start the
    work and yield `Progress`, a `Level` as soon as it is finished, and `Result`s. One run at a time: others wait in the
    line and are told how many are before them (`Waiting`). `cancel` stops what runs within one network call; the
    generator then raises `Cancelled`.

    Args:
        pipeline, enlarger, name, folder: See `Model`.
        max_megapixels: The most pixels, in millions, that a picture may have, and what is made of it.
        line: Of runs on this machine; sessions may share one.

    Raises:
        ValueError: if the pipeline's call needs something else than an image.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        enlarger: DiffusionPipeline | None = None,
        name: str = "model",
        max_megapixels: float = 16,
        folder: Path | None = None,
        line: Line | None = None,
    ):
        super().__init__(pipeline, enlarger, name, folder)
        self.max_pixels, self.line = int(max_megapixels * 1e6), Line() if line is None else line
        for used in (self.pipeline, self.enlarger):
            if hasattr(used, "set_progress_bar_config"):
                used.set_progress_bar_config(disable=True)

    @classmethod
    def open(
        cls,
        model: str,
        revision: str | None = None,
        device: str | None = None,
        max_megapixels: float = 16,
        line: Line | None = None,
    ) -> "Session":
        """The session of a saved model; `ValueError` if it cannot be loaded. `device`: by default the GPU if any."""
        device = open_device(device)
        pipeline, enlarger = pyrdiff.load(model, revision=revision).to(device), None
        if "image" not in required(pipeline):
            try:
                enlarger = enlarging(pipeline)
            except ValueError:
                pass  # its network cannot guide
        return cls(pipeline, enlarger, str(model).rstrip("/"), max_megapixels, local_folder(model), line)

    def warm_up(self) -> None:
        """
        A short call, so that the first one that a visitor waits for is not slower than others, and the pace is known. A
        model that cannot do it is left cold.
        """
        arguments = {name: min(default or 1, 2) for name, default in self.steps().items()}
        if not self.generates:
            factor = min(self.scale_factors or [2])
            picture = Image.new("RGB" if self.channels == 3 else "L", (16, 16), "gray")
            arguments |= picture_arguments(self.pipeline, picture, factor, None, self.max_pixels)
        try:
            list(self._start(lambda run: run.call(self.pipeline, arguments), ""))
        except ValueError:
            pass  # so few steps are not for this model

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
    ) -> Iterator[Waiting | Progress | Level | Result]:
        """
        Images, `count` from 1 to 16, by a named plan or by steps {argument: number}; for `classes` and `guidance` see
        `steering_arguments`. Where the pipeline returns levels, each comes as a `Level` once it is finished, and all of
        them again in the `Result`.
        """
        pipeline = self.pipeline
        if not self.generates:
            raise ValueError("This model enlarges pictures and generates none: see Upscale.")
        arguments = call_arguments(pipeline, count, seed, plan, steps)
        arguments |= steering_arguments(pipeline, count, classes, guidance)
        costs = self.of_steps(self.costs(arguments), arguments.get("batch_size", 1))

        def work(run: Run) -> None:
            plans = levels_of(pipeline, arguments) if "return_levels" in parameters(pipeline) else []
            ends, levels = list(accumulate(len(level.timesteps) for level in plans)), []

            def on_step(step: int, tensors: dict) -> None:
                if step in ends and "latents" in tensors:
                    level = plans[ends.index(step)]
                    images = _level_images(pipeline, tensors["latents"], level.size)
                    seconds = run.seconds - sum(level.seconds for level in levels)
                    levels.append(Level(images, level.size, calls_of(level), level.nfe_eq, seconds))
                    run.events.put(levels[-1])

            if "return_levels" in parameters(pipeline):
                output = run.call(pipeline, {**arguments, "return_levels": True}, on_step, costs)
            else:
                output = run.call(pipeline, arguments, costs=costs)
            for level, images in zip(levels, getattr(output, "levels", None) or [], strict=False):
                level.images = images
            result = run.result("", output, levels=levels, seed=seed)
            if levels:  # guided steps call the network for twice as many images at once: two calls
                result.calls = sum(level.calls for level in levels)
                result.nfe_eq = sum(level.nfe_eq for level in levels)
            run.events.put(result)

        return self._start(work, owner)

    def trajectory(
        self, count: int = 1, seed: int = 0, steps: dict | None = None, owner: str = ""
    ) -> Iterator[Waiting | Progress | Result]:
        """Images with the structure that they grew from, if there is one, and states on the way."""
        pipeline = self.pipeline
        arguments = {**call_arguments(pipeline, count, seed, None, steps), "return_trajectory": True}
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
            run.events.put(run.result("", output, columns=columns, seed=seed))

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
    ) -> Iterator[Waiting | Progress | Result]:
        """A picture enlarged, by the pipeline or by its enlarger; see `read` for what is refused."""
        arguments = call_arguments(self.enlarger, 1, seed, plan, steps)
        image, notes = self.read(path)
        arguments |= picture_arguments(self.enlarger, image, scale_factor, tile, self.max_pixels)
        costs = self.of_steps(self._costs_of_picture(image, arguments))

        def work(run: Run) -> None:
            output = run.call(self.enlarger, arguments, costs=costs)
            run.events.put(self._enlarged(run, "", output, image, notes, seed=seed))

        return self._start(work, owner)

    def outlook(
        self,
        path: str,
        scale_factor: float = 4,
        tile: int | None = 256,
        plan: str | None = None,
        steps: dict | None = None,
    ) -> Outlook:
        """What `enlarge` would come to; nothing is run. Raises what it would raise."""
        image, notes = self.read(path)
        arguments = plan_arguments(self.enlarger, plan, steps)
        arguments |= picture_arguments(self.enlarger, image, scale_factor, tile, self.max_pixels)
        costs = self._costs_of_picture(image, arguments)
        height, width = costs[-1].size if costs else image.size[::-1]
        windows = costs[-1].windows if costs else 1
        return Outlook(image.size, (width, height), windows, self.expected(costs), notes)

    def _costs_of_picture(self, image: Image.Image, arguments: dict) -> list[Cost]:
        tile, factor = arguments.get("tile"), arguments.get("scale_factor")
        return self.costs_to_enlarge(image.size[::-1], factor, tile, arguments)

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
    ) -> Iterator[Waiting | Progress | Result]:
        """
        A `Result` for each of two or more ways from the same seed: named plans, and numbers of steps such as "1, 2, 4"
        for an argument of `steps`. A call before the first one warms up and is not counted.
        """
        pipeline, given, notes, image = self.pipeline, {}, [], None
        ways = {name: (name, None) for name in plans}  # plan and steps
        for number in numbers("Numbers of steps", values) if argument else []:
            ways[f"{argument} = {number}"] = (None, {argument: number})
        if len(ways) < 2:
            raise ValueError(f"Got {len(ways)} to compare: choose two or more plans or numbers of steps.")
        first, *_ = (call_arguments(pipeline, count, seed, *way) for way in ways.values())
        if not self.generates:
            image, notes = self.read(path)
            given = picture_arguments(pipeline, image, scale_factor, tile, self.max_pixels)

        def work(run: Run) -> None:
            run.task = "warm-up"
            run.call(pipeline, {**first, **given})
            for index, (name, way) in enumerate(ways.items()):
                run.task = f"{name} ({index + 1} of {len(ways)})"
                output = run.call(pipeline, {**call_arguments(pipeline, count, seed, *way), **given})
                if given:
                    run.events.put(self._enlarged(run, name, output, image, notes, seed=seed))
                else:
                    run.events.put(run.result(name, output, seed=seed))

        return self._start(work, owner)

    def cancel(self, owner: str = "") -> bool:
        """Stops what this owner has running or waiting; False if there is nothing."""
        return self.line.cancel(owner)

    def _start(self, work: Callable[[Run], None], owner: str) -> Iterator:
        run = Run(owner, self.pace)
        self.line.join(run)

        def body() -> None:
            error = None
            try:
                run.turn.wait()
                run.check()
                work(run)
            except BaseException as raised:
                error = raised
            self.line.leave(run)
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
            run.cancel()  # nobody listens any more

    # What it is given, and what came of it.

    def read(self, path: str | None) -> tuple[Image.Image, list[str]]:
        """A picture in the model's mode, and what was done to it; see `read_picture`."""
        return read_picture(path, self.channels, self.max_pixels)

    @staticmethod
    def _enlarged(
        run: Run, name: str, output: BaseOutput | tuple, image: Image.Image, notes: list[str], seed: int
    ) -> Result:
        consistency = getattr(output, "consistency", None)
        result = run.result(name, output, notes=notes, seed=seed)
        result.before = image.resize(result.images[0].size, Image.Resampling.BICUBIC)
        result.consistency = None if consistency is None else float(consistency[0])
        return result


def _level_images(pipeline: DiffusionPipeline, latents: torch.Tensor, size: tuple[int, int]) -> list[Image.Image]:
    """Latents [B, C, H, W] in [-1, 1] at the end of a level, as the pipeline makes images of them."""
    if tuple(latents.shape[-2:]) != tuple(size):
        latents = F.interpolate(latents, size, mode="bicubic", align_corners=False, antialias=True)
    images = (latents / 2 + 0.5).clamp(0, 1)
    return pipeline.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).numpy())
