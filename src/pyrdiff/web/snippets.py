"""A run of the page as Python and as a command, to copy."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from pyrdiff.hub.enlarging import arguments_of

from .model import Model


@dataclass
class Request:
    """
    What a run was asked for.

    Attributes:
        seed: Of the first image.
        count: Number of images.
        plan: By name; without one, `steps` count.
        steps: {argument of the call: number}.
        picture: Name of the file that is enlarged.
        scale_factor, tile: Of enlarging.
        classes: What to draw; the images take turns.
        guidance: How strongly the classes, or another network, draw the images; 1 is not at all.
    """

    seed: int
    count: int = 1
    plan: str | None = None
    steps: dict[str, int] = field(default_factory=dict)
    picture: str | None = None
    scale_factor: float | None = None
    tile: int | None = None
    classes: tuple[str, ...] = ()
    guidance: float = 1.0

    def ways(self) -> dict[str, str | int]:
        """The arguments that say how the call is done, by their name in Python and as a flag alike."""
        if self.plan:
            return {"plan": self.plan}
        return {name: value for name, value in self.steps.items() if value is not None}

    def steering(self) -> dict[str, list[str] | float]:
        """The arguments that say what is drawn, of `pyrdiff sample` as of the call but for the turns of the classes."""
        steering = {"classes": list(self.classes)} if self.classes else {}
        return {**steering, "guidance_scale": self.guidance} if self.guidance != 1 else steering

    def flags_of(self, model: str, index: int = 0) -> dict[str, object]:
        """The flags of `pyrdiff sample` that draw one of the images."""
        ways = self.ways()
        if "refine_steps" in ways:
            ways["refine_steps"] = [ways["refine_steps"]]  # one for all levels
        flags = {"model": model, "seed": self.seed + index, "num_images": 1, **ways, **self.steering()}
        return {**flags, "classes": [self.classes[index % len(self.classes)]]} if self.classes else flags


def generating(model: Model, request: Request) -> tuple[str, str]:
    """(Python, command) that draw the same images."""
    takes = arguments_of(model.pipeline)
    arguments = {name: repr(value) for name, value in request.ways().items() if name in takes}
    steering = request.steering()
    if request.classes:
        steering["classes"] = [request.classes[index % len(request.classes)] for index in range(request.count)]
    arguments |= {name: repr(value) for name, value in steering.items()}
    several = "batch_size" in takes and request.count > 1
    if several:
        arguments = {"batch_size": str(request.count), **arguments}
    lines = ["import torch", "", "import pyrdiff", "", f"pipeline = pyrdiff.load({model.name!r}){_moved(model)}"]
    if several:
        lines += [f"seeds = range({request.seed}, {request.seed + request.count})"]
        arguments["generator"] = "[torch.Generator(pipeline.device).manual_seed(seed) for seed in seeds]"
    else:
        arguments["generator"] = f"torch.Generator(pipeline.device).manual_seed({request.seed})"
    lines += _call("output = pipeline", arguments)
    if several:
        lines += ["for seed, image in zip(seeds, output.images):", '    image.save(f"{seed:05d}.png")']
    else:
        lines += [f'output.images[0].save("{request.seed:05d}.png")']
    flags = {"num_images": request.count, "seed": request.seed, **request.ways(), **request.steering()}
    if request.classes:  # the command has them take turns from seed 0 on
        count = len(request.classes)
        flags["classes"] = [request.classes[(index - request.seed) % count] for index in range(count)]
    return "\n".join(lines), _command("sample", model, flags)


def enlarging(model: Model, request: Request) -> tuple[str, str]:
    """(Python, command) that enlarge the picture: Python with the same seed, the command with one of its own."""
    takes = arguments_of(model.enlarger)
    name = request.picture or "picture.png"
    target = f"{Path(name).stem}_x{request.scale_factor:g}.png"
    given = {"scale_factor": request.scale_factor, "tile": request.tile, **request.ways()}
    given = {key: value for key, value in given.items() if key in takes and value is not None}
    mode = "L" if model.channels == 1 else "RGB"
    other = f", pipeline_class={type(model.enlarger).__name__!r}" if model.generates else ""
    lines = ["import torch", "from PIL import Image", "", "import pyrdiff", ""]
    lines += [
        f"enlarge = pyrdiff.load({model.name!r}{other}){_moved(model)}",
        f"picture = Image.open({name!r}).convert({mode!r})",
    ]
    arguments = {key: repr(value) for key, value in given.items()}
    generator = f"torch.Generator(enlarge.device).manual_seed({request.seed})"
    lines += _call("output = enlarge", {"": "picture", **arguments, "generator": generator})
    lines += [f"output.images[0].save({target!r})"]
    flags = {"input": name, "output": target, "scale_factor": request.scale_factor, **given, "seed": request.seed}
    return "\n".join(lines), _command("upscale", model, flags)


def _moved(model: Model) -> str:
    """Where a model is on another device than that which it is loaded to: a seed is another image there."""
    device = str(model.pipeline.device)
    return "" if device == "cpu" else f".to({device!r})"


def _call(function: str, arguments: dict[str, str]) -> list[str]:
    inside = [f"    {name}={value}," if name else f"    {value}," for name, value in arguments.items()]
    return [f"{function}(", *inside, ")"]


def _command(name: str, model: Model, flags: dict[str, object]) -> str:
    words = ["pyrdiff", name, model.name]
    for flag, value in flags.items():
        words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
