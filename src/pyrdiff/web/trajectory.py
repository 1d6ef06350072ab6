"""The tab that shows how an image came about, of models that say it."""

from collections.abc import Iterator

import gradio as gr

from . import controls, markup
from .controls import SeedField, steps_fields
from .events import Result
from .files import save_run
from .model import Model
from .models import Models
from .session import Session

TITLE = "Trajectory"
EMPTY = "From the structure over the states to the image, left to right."


class TrajectoryTab:
    """
    The tab.

    Args:
        models: To draw with.
        picker: Names the model.
    """

    def __init__(self, models: Models, picker: gr.Dropdown):
        self.models = models
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                count = controls.count_field(2)
                self.seed = SeedField.draw()
                fields = steps_fields(models.session(), visible=True)
                self.steps = {name: gr.Number(label=name, precision=0, **settings) for name, settings in fields.items()}
                run, cancel = controls.buttons("Draw")
            with gr.Column(scale=3, elem_classes="pyr-results"):
                self.status = gr.HTML(markup.status(EMPTY, muted=True))
                self.shown = gr.HTML("")
                self.all = gr.DownloadButton("Download images (ZIP)", size="md", interactive=False)
        inputs = [picker, count, self.seed.number, *self.steps.values(), self.seed.lock]
        enter = [field.submit for field in (self.seed.number, *self.steps.values())]
        outputs = [self.status, self.shown, self.all, self.seed.number]
        controls.wire(models, TITLE, [run.click, *enter], cancel, self._handle, inputs, outputs, self.status)

    @staticmethod
    def fits(model: Model) -> bool:
        return model.has_trajectory

    def for_model(self, model: Model, kept: dict) -> dict:
        """What changes for another model."""
        fields = steps_fields(model, visible=True)
        steps = {self.steps[name]: gr.Number(**settings) for name, settings in fields.items()}
        return {self.status: markup.status(EMPTY, muted=True), self.shown: "", **steps}

    @property
    def changing(self) -> list:
        """The components that `for_model` updates."""
        return [self.status, self.shown, *self.steps.values()]

    def _handle(self, owner: str, session: Session, count, seed, *rest) -> Iterator[dict]:
        *numbers, locked = rest
        seed = seed if locked else controls.fresh()
        request = controls.asked(seed, None, tuple(numbers))
        running = session.trajectory(count, seed, request.steps, owner=owner)
        yield {self.seed.number: seed, self.shown: ""}
        for event in running:
            if not isinstance(event, Result):
                yield {self.status: controls.underway(event)}
                continue
            flags = [request.flags_of(session.name, index) for index in range(len(event.images))]
            names = [f"{session.title}_seed{each['seed']}" for each in flags]
            saved = save_run(owner, event.images, names, flags, f"{session.title}_seed{seed}")
            yield {
                self.status: markup.done(event),
                self.shown: markup.strip(event.columns),
                self.all: gr.DownloadButton(value=saved.archive, interactive=True),
            }
