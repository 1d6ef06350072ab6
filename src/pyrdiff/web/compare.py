"""The tab that compares plans from the same seeds."""

from collections.abc import Iterator

import gradio as gr

from . import controls, markup, words
from .controls import PictureField, SeedField
from .events import Progress, Result, Waiting
from .files import save_run
from .model import Model
from .models import Models
from .session import Session
from .snippets import Request

TITLE = "Compare plans"
EMPTY = "Every plan starts from the same seed. One call before the first warms up."


class CompareTab:
    """
    The tab.

    Args:
        models: Whose plans are compared.
        picker: Names the model.
    """

    def __init__(self, models: Models, picker: gr.Dropdown):
        self.models = models
        model = models.session()
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                with gr.Group(visible=not model.generates) as self.of_pictures:
                    self.picture = PictureField.draw(models, picker, controls.draw_shelf(model))
                with gr.Group(visible=model.generates) as self.of_images:
                    self.count = controls.count_field(4)
                self.seed = SeedField.draw()
                self.chosen = gr.CheckboxGroup(label="Plans", **plans_field(model))
                self.values = gr.Textbox(**numbers_field(model))
                run, cancel = controls.buttons("Compare")
            with gr.Column(scale=3, elem_classes="pyr-results"):
                self.status = gr.HTML(markup.status(EMPTY, muted=True))
                self.verdict = gr.HTML("")
                self.gallery = gr.Gallery(
                    label="Plans from top to bottom, seeds from left to right", format="png", object_fit="contain",
                    interactive=False, buttons=["download", "fullscreen"], visible=False,
                    elem_classes="pyr-sharp pyr-gallery",
                )  # fmt: skip
                self.all = gr.DownloadButton("Download all (ZIP)", size="md", visible=False)
        picture = [self.picture.file, self.picture.factor, self.picture.tile]
        inputs = [picker, self.chosen, self.values, self.count, self.seed.number, *picture, self.seed.lock]
        outputs = [self.status, self.verdict, self.gallery, self.all, self.seed.number]
        enter = [self.seed.number.submit, self.values.submit]
        controls.wire(models, TITLE, [run.click, *enter], cancel, self._handle, inputs, outputs, self.status)

    @staticmethod
    def fits(model: Model) -> bool:
        return model.compares

    def for_model(self, model: Model, kept: dict) -> dict:
        """What changes for another model."""
        return {
            self.status: markup.status(EMPTY, muted=True),
            self.verdict: "",
            self.gallery: gr.Gallery(visible=False),
            self.all: gr.DownloadButton(visible=False),
            self.of_pictures: gr.Group(visible=not model.generates),
            self.of_images: gr.Group(visible=model.generates),
            self.chosen: gr.CheckboxGroup(**plans_field(model)),
            self.values: gr.Textbox(**numbers_field(model)),
            **(self.picture.for_model(model) if model.enlarger is not None else {}),
        }

    @property
    def changing(self) -> list:
        """The components that `for_model` updates."""
        changing = [self.status, self.verdict, self.gallery, self.all, self.of_pictures, self.of_images]
        return [*changing, self.chosen, self.values, *self.picture.fields]

    def _handle(
        self, owner: str, session: Session, chosen, values, count, seed, file, factor, tile, locked
    ) -> Iterator[dict]:
        seed = seed if locked else controls.fresh()
        argument, factor = steps_argument(session), controls.number_in(factor)
        count = count if session.generates else 1
        running = session.compare(chosen, argument, values, count, seed, file, factor, tile, owner=owner)
        yield {self.seed.number: seed, self.verdict: "", self.all: gr.DownloadButton(visible=False)}
        results: list[Result] = []
        for event in running:
            if isinstance(event, (Waiting, Progress)):
                yield {self.status: controls.underway(event)}
            else:
                results.append(event)
                yield {self.gallery: self._gallery(results)}
        yield self._finished(owner, session, results)

    def _finished(self, owner: str, session: Session, results: list[Result]) -> dict:
        images = [image for result in results for image in result.images]
        flags = [
            asked_by(result).flags_of(session.name, index) for result in results for index in range(len(result.images))
        ]
        names = [
            f"{result.name}_seed{result.seed + index}" for result in results for index in range(len(result.images))
        ]
        saved = save_run(owner, images, names, flags, f"{session.title}_plans_seed{results[0].seed}")
        return {
            self.status: markup.status("; ".join([f"{len(results)} compared", *results[0].notes])),
            self.verdict: markup.verdict(words.verdict(results, session), results),
            self.all: gr.DownloadButton(value=saved.archive, visible=True),
        }

    @staticmethod
    def _gallery(results: list[Result]) -> gr.Gallery:
        """A row of images for each result."""
        pictures = [
            (image, f"{result.name} · seed {result.seed + index}")
            for result in results
            for index, image in enumerate(result.images)
        ]
        columns = min(len(results[0].images), 8) if len(results[0].images) > 1 else min(len(results), 4)
        return gr.Gallery(pictures, columns=columns, visible=True, selected_index=None)


def asked_by(result: Result) -> Request:
    """What one of the results was asked for, by its name: a plan's, or "argument = number"."""
    argument, _, number = result.name.partition(" = ")
    if number:
        return Request(result.seed, steps={argument: int(number)})
    return Request(result.seed, plan=result.name)


def steps_argument(model: Model) -> str | None:
    """The argument of whose numbers of steps plans are made here."""
    return next((name for name in model.steps() if name != "refine_steps"), None)


def plans_field(model: Model) -> dict:
    """Settings of the choice of plans, for a model: the two quickest are chosen."""
    choices = words.plan_choices(model)
    return {"choices": choices, "value": [name for _, name in choices[:2]], "visible": bool(choices)}


def numbers_field(model: Model) -> dict:
    """Settings of the field for numbers of steps, for a model."""
    argument, plans = steps_argument(model), model.plans()
    return {
        "value": "" if plans else "1, 2, 4",
        "label": f"And {argument}" if plans else argument or "",
        "info": "numbers of steps, such as 5, 10, 20",
        "visible": argument is not None,
    }
