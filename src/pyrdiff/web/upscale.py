"""The tab that enlarges pictures."""

from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from PIL import Image

from . import controls, markup, words
from .controls import QUIET, PictureField, PlanField, SeedField
from .events import Result
from .files import save_run
from .history import History, Record
from .loupe import Loupe
from .model import Model
from .models import Models
from .pictures import view
from .session import Session
from .snippets import enlarging

TITLE = "Upscale"
SLIDER_SIDE = 1024  # the most pixels of a side in the before/after view; the download has them all
EMPTY = "Choose a picture, yours or an example, and press Enlarge."


class UpscaleTab:
    """
    The tab.

    Args:
        models: To enlarge with.
        picker: Names the model.
    """

    def __init__(self, models: Models, picker: gr.Dropdown):
        self.models, self.picker = models, picker
        self.files = gr.State(None)
        with gr.Row(equal_height=False):
            shelf = controls.draw_shelf(models.session(), render=False)
            with gr.Column(scale=1, min_width=280):
                self.picture = PictureField.draw(models, picker, shelf)
                self.seed = SeedField.draw()
                self.plan = PlanField.draw(models, picker, enlarging=True)
                run, cancel = controls.buttons("Enlarge")
            with gr.Column(scale=3, elem_classes="pyr-results"):
                self._draw_results()
                controls.code_panel(models, self._inputs()[:-1], self._code)
        self.history = History.draw()
        self.results = [self.status, self.slider, self.download, self.files, *self.loupe.outputs]
        outputs = [*self.results, self.seed.number, self.history.kept, self.history.row]
        enter = [field.submit for field in (self.seed.number, *self.plan.steps.values())]
        inputs = [*self._inputs(), self.history.kept]
        controls.wire(models, TITLE, [run.click, *enter], cancel, self._handle, inputs, outputs, self.status)
        self._wire_outlook()
        fields = [self.picture.factor, self.picture.tile, self.seed.number, self.seed.lock, *self.plan.inputs]
        self.history.row.select(self._reuse, [picker, self.history.kept], [*fields, *self.results], **QUIET)

    def _draw_results(self) -> None:
        self.status = gr.HTML(markup.status(EMPTY, muted=True))
        self.picture.shelf.render()
        self.slider = gr.ImageSlider(
            label="Before (bicubic) and after", format="png", interactive=False, max_height=560, visible=False,
            buttons=["fullscreen"], elem_classes="pyr-slider",
        )  # fmt: skip
        self.download = gr.DownloadButton("Download PNG", visible=False, size="md")
        self.loupe = Loupe.draw(self.files)

    @staticmethod
    def fits(model: Model) -> bool:
        return model.enlarger is not None

    def _inputs(self) -> list:
        picture = [self.picture.file, self.picture.factor, self.picture.tile]
        return [self.picker, *picture, self.seed.number, *self.plan.inputs, self.seed.lock]

    def for_model(self, model: Model, kept: dict) -> dict:
        """What changes for another model; `kept` is the visit's history."""
        if not self.fits(model):
            return {}
        return {
            self.status: markup.status(EMPTY, muted=True),
            self.slider: gr.ImageSlider(visible=False),
            self.download: gr.DownloadButton(visible=False),
            self.loupe.fold: gr.Accordion(visible=False),
            **self.picture.for_model(model),
            **self.plan.for_model(model),
            **self.history.for_model(kept, model),
        }

    @property
    def changing(self) -> list:
        """The components that `for_model` updates."""
        changing = [self.status, self.slider, self.download, self.loupe.fold, *self.picture.fields, *self.plan.inputs]
        return [*changing, self.history.row]

    def _wire_outlook(self) -> None:
        """The picture is looked at as soon as it is there, and what enlarging it will come to is said."""

        def look(model: str, path: str | None, factor, tile, plan, *numbers) -> dict:
            preview, line = gr.HTML(visible=False), markup.status("")
            session = self.models.session(model)
            try:
                if path:
                    image, _ = session.read(path)
                    preview = gr.HTML(markup.row([view(image, 128)], "pyr-preview"), visible=True)
                    steps = controls.asked(0, plan, numbers).steps
                    found = session.outlook(path, controls.number_in(factor), tile, plan, steps)
                    line = markup.status(words.outlook(found))
            except ValueError as error:
                line = markup.status(str(error), error=True)
            return {self.picture.preview: preview, self.status: line}

        fields = [self.picture.file, self.picture.factor, self.picture.tile, *self.plan.inputs]
        outputs = [self.picture.preview, self.status]
        changes = [self.picture.file.change, self.picture.factor.input, self.picture.tile.input, self.plan.plan.input]
        gr.on(changes, look, [self.picker, *fields], outputs, **QUIET)

    # Runs.

    def _handle(self, owner: str, session: Session, file, factor, tile, seed, plan, *rest) -> Iterator[dict]:
        *numbers, locked, kept = rest
        seed = seed if locked else controls.fresh()
        factor = controls.number_in(factor)
        request = controls.asked(seed, plan, tuple(numbers), picture=file and Path(file).name)
        running = session.enlarge(file, factor, tile, seed, plan, request.steps, owner=owner)
        yield {self.seed.number: seed}
        for event in running:
            if isinstance(event, Result):
                values = [factor, tile, seed, plan, *numbers]
                yield self._finished(owner, session, event, request, values, kept)
            else:
                yield {self.status: controls.underway(event)}

    def _finished(self, owner, session, result, request, values, kept) -> dict:
        image, (factor, tile, *_) = result.images[0], values
        size = f"{image.width}×{image.height}"
        flags = {"model": session.name, "scale_factor": factor, "tile": tile, "seed": request.seed, **request.ways()}
        name = f"{Path(request.picture).stem[:36]}_{size}"
        pictures, names = [image, result.before], [name.replace("×", "x"), "bicubic"]
        saved = save_run(owner, pictures, names, [flags, {}], name)
        way = request.plan or " + ".join(map(str, request.steps.values()))
        shown = {"after": saved.images[0], "before": saved.images[1], "status": markup.done(result, f"{size} pixels")}
        record = Record(values, shown, saved.images[0], f"{request.picture} ×{factor:g} · {way} · seed {request.seed}")
        return {**self._show(record), **self.history.add(kept, session, record)}

    def _show(self, record: Record) -> dict:
        """The updates that bring a record's results into view."""
        paths = record.shown["before"], record.shown["after"]
        with Image.open(paths[0]) as before, Image.open(paths[1]) as after:
            views = tuple(view(picture, SLIDER_SIDE) for picture in (before, after))
            label = f"Before (bicubic) and after, {after.width}×{after.height}"
            loupe = self.loupe.show(before, after)
        return {
            self.status: record.shown["status"],
            self.slider: gr.ImageSlider(views, label=label, visible=True),
            self.download: gr.DownloadButton(value=paths[1], visible=True),
            self.files: paths,
            **loupe,
        }

    def _reuse(self, model: str, kept: dict, event: gr.SelectData) -> dict:
        record = kept[self.models.session(model).name][int(event.index)]
        factor, tile, seed, plan, *numbers = record.values
        updates = {self.picture.factor: factor, self.picture.tile: tile, self.plan.plan: plan}
        updates |= {self.seed.number: seed, self.seed.lock: True}
        updates |= dict(zip(self.plan.steps.values(), numbers, strict=True))
        return {**updates, **self._show(record)}

    def _code(self, session: Session, values: list) -> tuple[str, str]:
        file, factor, tile, seed, plan, *numbers = values
        if session.enlarger is None:
            return "", ""
        more = {"picture": file and Path(file).name, "scale_factor": controls.number_in(factor) or 4, "tile": tile}
        return enlarging(session, controls.asked(seed, plan, tuple(numbers), **more))
