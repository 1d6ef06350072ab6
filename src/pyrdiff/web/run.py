"""One piece of work: calls of a pipeline that are counted, reported and can be cancelled."""

import inspect
import math
import queue
import threading
import time
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from .events import Cancelled, Progress, Result
from .pace import Pace

SECONDS_BETWEEN = 0.1  # reports of progress


class Run:
    """
    One piece of work in a thread of its own: what it reports, and whether it is to stop.

    Args:
        owner: Who started it, and may cancel it.
        pace: Is told how long the network calls took.
    """

    def __init__(self, owner: str, pace: Pace | None = None):
        self.owner, self.cancelled, self.events = owner, threading.Event(), queue.SimpleQueue()
        self.turn, self.ahead = threading.Event(), 0  # it may begin; runs before it in the line
        self.pace = Pace() if pace is None else pace
        self.task = ""  # what is running, where there is more than one thing
        self.areas: list[int] = []  # images times pixels of each network call of the last `call`
        self.began = 0.0

    def cancel(self) -> None:
        """The run stops before its next network call, or does not begin."""
        self.cancelled.set()
        self.turn.set()

    def call(
        self,
        pipeline: DiffusionPipeline,
        arguments: dict,
        on_step: Callable | None = None,
        costs: list[float] | None = None,
    ) -> BaseOutput | tuple:
        """
        The output of `pipeline(**arguments)`. Its network calls are counted and progress is reported. Once the run is
        cancelled the next network call does not take place: `Cancelled` is raised instead.

        Args:
            pipeline: Any of diffusers.
            arguments: Of its call.
            on_step: Called as f(steps done, tensors) after each step, where the pipeline has callbacks.
            costs: What each step costs beside the others, for the progress.
        """
        self.areas, self.began = [], time.perf_counter()
        watch = _Watch(self, pipeline, on_step, costs)
        if "callback_on_step_end" in parameters(pipeline):
            arguments = {**arguments, "callback_on_step_end": watch.after_step}
        hooks = [
            network.register_forward_pre_hook(watch.before_network, with_kwargs=True) for network in networks(pipeline)
        ]
        try:
            self.check()
            output = pipeline(**arguments)
            watch.call_ends()
            self.check()
            return output
        finally:
            for hook in hooks:
                hook.remove()

    def check(self) -> None:
        """Raises `Cancelled` if the run is to stop."""
        if self.cancelled.is_set():
            raise Cancelled

    @property
    def seconds(self) -> float:
        """Since the pipeline was called."""
        return time.perf_counter() - self.began

    def result(self, name: str, output: BaseOutput | tuple, **more: object) -> Result:
        """What a call gave and took; 1 NFE-eq is one network call for all images at the largest size that occurred."""
        nfe_eq = sum(self.areas) / max(self.areas, default=1)
        return Result(name, list(images_of(output)), len(self.areas), nfe_eq, self.seconds, **more)


class _Watch:
    """Counts the network calls and the steps of one call of a pipeline."""

    def __init__(self, run: Run, pipeline: DiffusionPipeline, on_step: Callable | None, costs: list[float] | None):
        self.run, self.pipeline, self.on_step, self.costs = run, pipeline, on_step, costs
        self.step = 0
        self.before_step = 0  # network calls until this step
        self.windows = 0  # network calls of the step before
        self.reported = 0.0
        self.call_began: float | None = None

    def before_network(self, module: torch.nn.Module, given: tuple, named: dict) -> None:
        self.run.check()
        values = (*given, *named.values())
        sample = next((value for value in values if isinstance(value, torch.Tensor) and value.ndim == 4), None)
        if sample is not None:  # no image, no step: the encoder of a prompt
            self.call_ends()
            self.run.areas.append(len(sample) * math.prod(sample.shape[-2:]))
            self.call_began = time.perf_counter()
            self.report()

    def call_ends(self) -> None:
        """A network call, with what follows it up to the next one, is over. The first one of a run warms up."""
        if self.call_began is not None and len(self.run.areas) > 1:
            self.run.pace.observe(self.run.areas[-1], time.perf_counter() - self.call_began)

    def after_step(self, pipeline: DiffusionPipeline, index: int, timestep: float, tensors: dict) -> dict:
        self.run.check()
        calls = len(self.run.areas)
        self.step, self.windows, self.before_step = self.step + 1, calls - self.before_step, calls
        if self.on_step is not None:
            self.on_step(self.step, tensors)
        self.report()
        return {}

    def report(self) -> None:
        """How far it is, unless that was said a moment ago."""
        now, run = time.perf_counter(), self.run
        if now - self.reported < SECONDS_BETWEEN:
            return
        self.reported, calls = now, len(run.areas)
        steps = getattr(self.pipeline, "num_timesteps", None)
        window, seconds = calls - self.before_step, now - run.began
        run.events.put(Progress(run.task, calls, self.step, steps, window, self.windows, seconds, self.costs))


def parameters(pipeline: DiffusionPipeline | None) -> dict[str, inspect.Parameter]:
    """The named parameters of a pipeline's call."""
    if pipeline is None:
        return {}
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = inspect.signature(pipeline.__call__).parameters
    return {name: parameter for name, parameter in known.items() if parameter.kind not in loose}


def networks(pipeline: DiffusionPipeline) -> list[torch.nn.Module]:
    """The components that are networks."""
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def images_of(output: BaseOutput | tuple) -> list[Image.Image]:
    """The images of a call's output."""
    return output.images if hasattr(output, "images") else output[0]
