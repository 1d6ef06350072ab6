"""A model, and what can be told about it before anything is drawn: what it does, its plans, their cost and quality."""

import inspect
import math
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from pyrdiff.hub import card
from pyrdiff.hub.repository import bundled
from pyrdiff.parts.json_files import read_json
from pyrdiff.parts.windows import Tiling

from .pace import Pace
from .run import networks, parameters

STEP_ARGUMENTS = ("num_inference_steps", "refine_steps", "num_passes")  # of calls, as diffusers and pyrdiff name them


@dataclass
class Cost:
    """
    A part of a call: its steps, its network calls in all, and the pixels of an image at each of them.

    Attributes:
        size: Of the images that it makes, (height, width).
        windows: In how many the network sees an image.
    """

    steps: int
    calls: int
    pixels: int
    size: tuple[int, int]
    windows: int = 1


class Model:
    """
    A pipeline that generates, with another one that enlarges by the same network; or one that enlarges.

    What it can do is read off the signatures and attributes of its pipeline.

    Args:
        pipeline: Any pipeline of diffusers that makes images from nothing or from an image.
        enlarger: Another one, with the same network, that enlarges images.
        name: What `pyrdiff.load` takes.
        folder: Where it was loaded from, with its card and its figures.

    Raises:
        ValueError: if the pipeline's call needs something else than an image.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        enlarger: DiffusionPipeline | None = None,
        name: str = "model",
        folder: Path | None = None,
    ):
        self.pipeline, self.name, self.folder, self.pace = pipeline, name, folder, Pace()
        needed = required(pipeline)
        if needed not in ([], ["image"]):
            raise ValueError(f"{type(pipeline).__name__} needs {needed}: expected a call without, or with an image")
        self.generates = not needed
        self.enlarger = enlarger if self.generates else pipeline
        self.has_trajectory = self.generates and "return_trajectory" in parameters(pipeline)
        self.compares = hasattr(pipeline, "plan") or bool({"num_inference_steps", "num_passes"} & {*self.steps()})
        self.quality = _measured(folder, getattr(pipeline.config, "plans", None) or {})

    @property
    def title(self) -> str:
        """The name as it is shown."""
        return title(self.name)

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

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the images that it generates, where that is known."""
        levels = levels_of(self.pipeline, {})
        if levels:
            return tuple(levels[-1].size)
        side = self._setting("sample_size")
        if not self.generates or side is None:
            return None
        return tuple(side) if isinstance(side, (list, tuple)) else (side, side)

    def _setting(self, name: str) -> object:
        """A value from the config of one of the networks."""
        values = (getattr(getattr(network, "config", None), name, None) for network in networks(self.pipeline))
        return next((value for value in values if value is not None), None)

    def description(self) -> str:
        """The model in one line."""
        count = sum(parameter.numel() for part in networks(self.pipeline) for parameter in part.parameters())
        facts = [type(self.pipeline).__name__, f"{count / 1e6:.1f} million parameters"]
        facts.append({1: "gray", 3: "colour"}.get(self.channels, f"{self.channels} channels"))
        sizes = [level.size for level in levels_of(self.pipeline, {})] or [self.size]
        if sizes != [None]:
            facts.append("{} pixels".format(" → ".join(f"{width}×{height}" for height, width in sizes)))
        if not self.generates:
            factors = self.scale_factors
            facts.append("enlarges" + ("" if factors is None else f" ×{', ×'.join(map(str, factors))}"))
        return f"{', '.join(facts)}; on {self.pipeline.device}"

    def card(self) -> str:
        """The text of the model's card, without its metadata; empty if it has none that can be read."""
        path = None if self.folder is None else self.folder / "README.md"
        if path is None or not path.is_file():
            return ""
        try:
            text = card.read(path)
        except (ValueError, OSError):
            return ""
        if text.startswith("---\n") and "\n---\n" in text[4:]:
            text = text[4:].partition("\n---\n")[2]
        lines = [line for line in text.splitlines() if not line.startswith(("![", "<!--"))]
        text = "\n".join(lines).strip()
        text = text.replace(f'pyrdiff.load("{card.PLACE}")', f'pyrdiff.load("{self.name}")')
        known = self.name not in bundled()  # to diffusers, too
        return text.replace(card.PLACE, self.name) if known else text

    # What calls cost.

    def plans(self, pipeline: DiffusionPipeline | None = None) -> dict[str, str]:
        """{name: network calls} of the pipeline's named plans."""
        pipeline = self.pipeline if pipeline is None else pipeline
        if "plan" not in parameters(pipeline):
            return {}
        calls = {}
        for name in getattr(pipeline.config, "plans", None) or {}:
            levels = levels_of(pipeline, {"plan": name})
            calls[name] = " + ".join(str(calls_of(level)) for level in levels) + " calls" if levels else ""
        return calls

    def steps(self, pipeline: DiffusionPipeline | None = None) -> dict[str, int | None]:
        """{argument: default} of those arguments of a call that say how many steps it takes."""
        known = parameters(self.pipeline if pipeline is None else pipeline)
        return {name: known[name].default for name in STEP_ARGUMENTS if name in known}

    def costs(self, arguments: dict) -> list[Cost]:
        """The parts of a call of the generating pipeline with these arguments; empty where it cannot be told."""
        levels = levels_of(self.pipeline, arguments)
        if levels:
            return [
                Cost(len(level.timesteps), calls_of(level), math.prod(_network_size(level)), tuple(level.size))
                for level in levels
            ]
        steps, size = self.steps(), self.size
        if len(steps) != 1 or size is None or not self.generates:
            return []
        (name, default), *_ = steps.items()
        number = arguments.get(name, default)
        return [Cost(number, number, math.prod(size), size)] if isinstance(number, int) and number > 0 else []

    def costs_to_enlarge(
        self, size: tuple[int, int], scale_factor: float, tile: int | None, arguments: dict
    ) -> list[Cost]:
        """
        The parts of a call that enlarges; empty where it cannot be told.

        Args:
            size: (height, width) of the picture.
            scale_factor: How many times larger it becomes.
            tile: Side of the network's windows.
            arguments: Of the call: its plan or its numbers of steps.
        """
        for name in ("cost", "plan"):
            known = _parameters(getattr(self.enlarger, name, None))
            if "image_size" not in known:
                continue
            given = {**arguments, "image_size": size, "scale_factor": scale_factor}
            found = getattr(self.enlarger, name)(**{key: value for key, value in given.items() if key in known})
            levels = found if isinstance(found, list) else [found]
            return [_windowed(len(level.timesteps), tuple(level.size), tile) for level in levels]
        return []

    def of_steps(self, costs: list[Cost], count: int = 1) -> list[float]:
        """What each step of a call costs beside the others: seconds at the pace so far, before there was any pixels."""
        each = [cost.calls / cost.steps * (self.pace.of_call(cost.pixels * count) or cost.pixels) for cost in costs]
        return [value for value, cost in zip(each, costs, strict=True) for _ in range(cost.steps)]

    def expected(self, costs: list[Cost], count: int = 1) -> float | None:
        """Seconds that a call will take for `count` images, at the pace so far; None before there was any."""
        return self.pace.of_calls((cost.calls, cost.pixels * count) for cost in costs)


def title(name: str) -> str:
    """A model's name without the folders that a path begins with: it is written into pictures that go elsewhere."""
    path = Path(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def required(pipeline: DiffusionPipeline) -> list[str]:
    """The arguments that a call needs."""
    return [name for name, known in parameters(pipeline).items() if known.default is inspect.Parameter.empty]


def levels_of(pipeline: DiffusionPipeline, arguments: dict) -> list:
    """The levels of a call with these arguments, each with size, timesteps and cost, where the pipeline tells."""
    takes = _parameters(getattr(pipeline, "plan", None))
    if not takes or any(argument.default is inspect.Parameter.empty for argument in takes.values()):
        return []
    plan = pipeline.plan(**{name: value for name, value in arguments.items() if name in takes})
    levels = getattr(plan, "levels", [])
    return list(levels) if all(hasattr(level, "size") and hasattr(level, "timesteps") for level in levels) else []


def _parameters(function: object) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters) if callable(function) else {}


def calls_of(level: object) -> int:
    """The network calls of a level, where guidance may call twice a step."""
    return getattr(level, "network_calls", len(level.timesteps))


def _network_size(level: object) -> tuple[int, int]:
    return getattr(level, "network_size", level.size)


def _windowed(steps: int, size: tuple[int, int], tile: int | None) -> Cost:
    """The cost of steps at a size (height, width), in windows."""
    if tile is None:
        return Cost(steps, steps, math.prod(size), size)
    overlap = Tiling.of(tile, 1).overlap
    along = [1 if length <= tile else math.ceil((length - overlap) / (tile - overlap)) for length in size]
    windows, pixels = math.prod(along), math.prod(min(length, tile) for length in size)
    return Cost(steps, steps * windows, pixels, size, windows)


# What was measured of it.


def _measured(folder: Path | None, plans: dict) -> dict[str, tuple[float, float]]:
    """
    {plan: (distance, the lower end of its 95 % interval)} as a search for plans or a bench found them; lower is better.
    Figures of one of the two only: they are not on one scale. Empty where there are none for two plans.
    """
    for find in (_of_search, _of_bench):
        try:
            found = {} if folder is None else find(folder, plans)
        except (ValueError, LookupError, TypeError, AttributeError):
            continue  # figures of others may hold anything; the page does without
        if len(found) > 1:
            return found
    return {}


def _of_search(folder: Path, plans: dict) -> dict[str, tuple[float, float]]:
    rows = read_json(folder / "tuning.json")["plans"]
    own = {name: row for name, row in rows.items() if name in plans and plans[name] == row["plan"]}
    return {name: _figures(row["distance"], row["interval"]) for name, row in own.items()}


def _of_bench(folder: Path, plans: dict) -> dict[str, tuple[float, float]]:
    found = {}
    for arm in card.read_bench(folder / "bench.json")["arms"].values():
        name = arm["arguments"].get("plan")
        for metric, row in arm["metrics"].items():
            if isinstance(name, str) and name in plans and metric.startswith(("FID", "FD-")):
                found[name] = _figures(row["value"], row["interval"])
    return found


def _figures(value: object, interval: object) -> tuple[float, float]:
    value, low = float(value), float(value if interval is None else interval[0])
    if not math.isfinite(value) or not math.isfinite(low):
        raise ValueError("expected numbers")
    return value, min(low, value)
