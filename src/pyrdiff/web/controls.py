"""What the tabs have in common: seeds, plans, pictures, buttons, and how a run is wired to them."""

import secrets
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gradio as gr

from . import examples, markup, words
from .events import Cancelled, Progress, Waiting
from .model import STEP_ARGUMENTS, Model
from .models import Models
from .pictures import MAX_FILE_MB
from .requests import MAX_IMAGES
from .run import parameters
from .session import Session
from .snippets import Request
from .steering import MOST_GUIDANCE, class_names, is_guided

QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
TILES = (64, 128, 256, 512)
SEEDS = 1_000_000  # seeds that are drawn lie below: they are easy to say and to type
OWN_STEPS = "steps as set here"


@dataclass
class SeedField:
    """A seed; unless it is locked, every run draws another one."""

    number: gr.Number
    lock: gr.Checkbox

    @classmethod
    def draw(cls) -> "SeedField":
        with gr.Row(elem_classes="pyr-seed", equal_height=True):
            number = gr.Number(0, label="Seed", precision=0, min_width=90, scale=3)
            with gr.Column(scale=2, min_width=90, elem_classes="pyr-dice"):
                dice = gr.Button("⚄ New", size="sm", min_width=80)
                lock = gr.Checkbox(False, label="Lock", min_width=80, container=False)
        number.input(lambda: True, None, lock, **QUIET)  # a seed that was typed is meant
        dice.click(lambda: (fresh(), True), None, [number, lock], **QUIET)
        return cls(number, lock)


def fresh() -> int:
    """A seed by chance."""
    return secrets.randbelow(SEEDS)


def plan_field(model: Model, enlarging: bool = False) -> dict:
    """Settings of the choice of a plan, for a model."""
    named = words.plan_choices(model, enlarging)
    choices = [*named, (OWN_STEPS, "")]
    return {"choices": choices, "value": choices[0][1], "visible": bool(named)}


def steps_fields(model: Model, enlarging: bool = False, visible: bool | None = None) -> dict[str, dict]:
    """Settings of the numbers of steps, for a model: those that its call takes, where no plan is chosen."""
    defaults = model.steps(model.enlarger if enlarging else model.pipeline)
    shown = not plan_field(model, enlarging)["visible"] if visible is None else visible
    return {
        name: {
            "value": defaults.get(name) if isinstance(defaults.get(name), int) else None,
            "visible": shown and name in defaults,
        }
        for name in STEP_ARGUMENTS
    }


@dataclass
class PlanField:
    """A choice of plans, and the numbers of steps, which show where no plan is chosen."""

    plan: gr.Dropdown
    steps: dict[str, gr.Number]
    enlarging: bool

    @classmethod
    def draw(cls, models: Models, picker: gr.Dropdown, enlarging: bool = False) -> "PlanField":
        model = models.session()
        info = None if enlarging else "seconds for one image, on this machine as it was just now"
        # Own values are taken: right after another model was chosen, a field may still hold the plan of the one before.
        plan = gr.Dropdown(label="Plan", info=info, allow_custom_value=True, **plan_field(model, enlarging))
        fields = steps_fields(model, enlarging).items()
        steps = {name: gr.Number(label=name, precision=0, **settings) for name, settings in fields}

        def show(model: str, plan: str) -> list[gr.Number]:
            fields = steps_fields(models.session(model), enlarging, visible=not plan)
            return [gr.Number(visible=settings["visible"]) for settings in fields.values()]

        plan.change(show, [picker, plan], list(steps.values()), **QUIET)
        return cls(plan, steps, enlarging)

    def for_model(self, model: Model) -> dict:
        """What changes for another model."""
        fields = steps_fields(model, self.enlarging)
        updates = {self.steps[name]: gr.Number(**settings) for name, settings in fields.items()}
        return {self.plan: gr.Dropdown(**plan_field(model, self.enlarging)), **updates}

    @property
    def inputs(self) -> list:
        return [self.plan, *self.steps.values()]


def asked(seed: int | None, plan: str | None, numbers: tuple, **more: object) -> Request:
    """What the fields say; an empty seed counts as 0, for the code to copy."""
    steps = {name: number for name, number in zip(STEP_ARGUMENTS, numbers, strict=True) if number is not None}
    return Request(seed=seed or 0, plan=plan or None, steps=steps, **more)


@dataclass
class SteeringField:
    """What to draw, and how strongly; each shows for models that can be told."""

    classes: gr.Dropdown
    guidance: gr.Slider

    @classmethod
    def draw(cls, model: Model) -> "SteeringField":
        about = "the images take turns; none for any"
        classes = gr.Dropdown(multiselect=True, label="Classes", info=about, **classes_field(model))
        about = "1 is none; more is more typical"
        guidance = gr.Slider(1, MOST_GUIDANCE, step=0.25, label="Guidance", info=about, **guidance_field(model))
        return cls(classes, guidance)

    def for_model(self, model: Model) -> dict:
        """What changes for another model."""
        classes, guidance = classes_field(model), guidance_field(model)
        return {self.classes: gr.Dropdown(**classes), self.guidance: gr.Slider(**guidance)}

    @property
    def inputs(self) -> list:
        return [self.classes, self.guidance]


def classes_field(model: Model) -> dict:
    names = class_names(model.pipeline)
    return {"choices": names, "value": [], "visible": bool(names)}


def guidance_field(model: Model) -> dict:
    return {"value": 1, "visible": is_guided(model.pipeline)}


def count_field(value: int) -> gr.Slider:
    return gr.Slider(1, MAX_IMAGES, value=value, step=1, label="Images")


def buttons(label: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row(elem_classes="pyr-go"):
        return gr.Button(label, variant="primary", min_width=80), gr.Button("Cancel", min_width=80)


@dataclass
class PictureField:
    """A picture from the visitor's disk or from the examples, how much it is enlarged, and in which windows."""

    file: gr.File
    preview: gr.HTML
    shelf: gr.Gallery
    factor: gr.Dropdown
    tile: gr.Dropdown

    @classmethod
    def draw(cls, models: Models, picker: gr.Dropdown, shelf: gr.Gallery) -> "PictureField":
        """`shelf` holds the examples; see `draw_shelf`."""
        model = models.session()
        file = gr.File(label=f"Picture, up to {MAX_FILE_MB} MB", height=150)
        preview = gr.HTML(visible=False)
        factor = gr.Dropdown(label="Scale factor", allow_custom_value=True, **factor_field(model))
        info = "pixels of the result that the network sees at once"
        tile = gr.Dropdown(list(TILES), value=256, label="Tile size", info=info, **tile_field(model))

        def take(name: str, event: gr.SelectData) -> str:
            return examples.pictures(models.session(name))[int(event.index)]

        shelf.select(take, picker, file, **QUIET)
        return cls(file, preview, shelf, factor, tile)

    @property
    def fields(self) -> list:
        return [self.file, self.preview, self.shelf, self.factor, self.tile]

    def for_model(self, model: Model) -> dict:
        """What changes for another model."""
        return {
            self.file: gr.File(value=None),
            self.preview: gr.HTML(visible=False),
            self.shelf: gr.Gallery(**shelf_field(model)),
            self.factor: gr.Dropdown(**factor_field(model)),
            self.tile: gr.Dropdown(**tile_field(model)),
        }


def draw_shelf(model: Model, render: bool = True) -> gr.Gallery:
    """Pictures to begin with, to click on; one that is not rendered has its place later."""
    return gr.Gallery(
        label="Click one to begin with", columns=6, height=150, allow_preview=False, object_fit="contain", buttons=[],
        interactive=False, fit_columns=False, elem_classes="pyr-sharp pyr-shelf", render=render, **shelf_field(model),
    )  # fmt: skip


def shelf_field(model: Model) -> dict:
    return {"value": examples.pictures(model) if model.enlarger is not None else []}


def factor_field(model: Model) -> dict:
    factors = model.scale_factors or [2, 3, 4, 8]
    value = max(factors) if model.scale_factors else 4
    return {"choices": factors, "value": value, "visible": "scale_factor" in parameters(model.enlarger)}


def tile_field(model: Model) -> dict:
    return {"visible": "tile" in parameters(model.enlarger)}


def number_in(value: object) -> object:
    """What a field that takes one's own values holds: a whole number, another number, or what is none as it is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value or None
    return int(number) if number.is_integer() else number


def wire(
    models: Models,
    tab: str,
    starts: list,
    cancel: gr.Button,
    handle: Callable[..., Iterator[dict]],
    inputs: list,
    outputs: list,
    status: gr.HTML,
) -> dict:
    """
    Makes events start runs: the click of a button, and Enter in fields.

    Args:
        models: Whose runs are cancelled.
        tab: In which it is: each has runs of its own.
        starts: Events.
        cancel: The button that ends the run.
        handle: Called as f(owner, session, *values of the inputs after the first, which names the model).
        inputs, outputs: Of the run; what it yields are {output: value}.
        status: The output for lines about it.

    Returns:
        The arguments of a further event that starts a run.
    """

    def guarded(request: gr.Request, model: str, *values):
        yield from told(lambda: handle(owner_in(tab, request), models.session(model), *values), status)

    def stop(request: gr.Request) -> None:
        models.session().cancel(owner_in(tab, request))

    cancel.click(stop, **QUIET)
    run = {"fn": guarded, "inputs": inputs, "outputs": outputs, "show_progress": "hidden", "concurrency_limit": None}
    run |= {"api_visibility": "private", "trigger_mode": "once"}
    gr.on(starts, **run)
    return run


def owner_in(tab: str, request: gr.Request) -> str:
    """Who has a run in a tab."""
    return f"{tab} {request.session_hash}"


def told(start: Callable[[], Iterator[dict]], status: gr.HTML) -> Iterator[dict]:
    """The updates, and what went wrong as a line in the page."""
    try:
        yield from start()
    except Cancelled:
        yield {status: markup.status("Cancelled.")}
    except ValueError as error:
        yield {status: markup.status(str(error), error=True)}
    except Exception as error:
        traceback.print_exc()
        yield {status: markup.status(f"This went wrong: {type(error).__name__}: {error}", error=True)}


def underway(event: object) -> str | None:
    """The line about a run that has not ended; None for anything else."""
    if isinstance(event, Waiting):
        return markup.status(words.waiting(event), bar="<progress></progress>")
    return markup.progress(event) if isinstance(event, Progress) else None


def code_panel(models: Models, inputs: list, write: Callable[[Session, list], tuple[str, str]]) -> None:
    """What the fields ask for as Python and as a command, to copy; it follows the fields."""
    with gr.Accordion("Copy as Python or as a command", open=False):
        python = gr.Code(language="python", label="Python", interactive=False, wrap_lines=True)
        command = gr.Code(language="shell", label="Command", interactive=False, wrap_lines=True, lines=2)

    def update(model: str, *values) -> tuple[str, str]:
        return write(models.session(model), list(values))

    gr.on([field.change for field in inputs], update, inputs, [python, command], **QUIET)
    python.value, command.value = write(models.session(), [field.value for field in inputs[1:]])
