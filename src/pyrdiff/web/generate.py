"""The tab that generates images, level by level where the model has levels."""

from collections.abc import Iterator

import gradio as gr
from PIL import Image

from . import controls, examples, markup
from .controls import QUIET, PlanField, SeedField, SteeringField
from .events import Level, Result
from .files import save_run
from .history import History, Record
from .model import Model
from .models import Models
from .session import Session
from .snippets import generating

TITLE = "Generate"
SMALL = 256  # pixels of a side below which images are shown by whole pixels
EMPTY = "Press Generate, or Enter in a field. Images appear level by level."


class GenerateTab:
    """
    The tab.

    Args:
        models: To generate with.
        picker: Names the model.
    """

    def __init__(self, models: Models, picker: gr.Dropdown):
        self.models, self.picker = models, picker
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                self.steering = SteeringField.draw(models.session())
                self.count = controls.count_field(4)
                self.seed = SeedField.draw()
                self.plan = PlanField.draw(models, picker)
                run, cancel = controls.buttons("Generate")
            with gr.Column(scale=3, elem_classes="pyr-results"):
                self._draw_results()
                controls.code_panel(models, self._inputs()[:-1], self._code)
        self.history, self.shown = History.draw(), gr.State(None)
        fields = [*self.steering.inputs, self.count, self.seed.number, *self.plan.inputs]
        results = [self.status, self.gallery, self.levels, self.folded, self.again, self.all, self.shown]
        outputs = [*results, self.seed.number, self.history.kept, self.history.row]
        inputs = [*self._inputs(), self.history.kept]
        enter = [field.submit for field in (self.seed.number, *self.plan.steps.values())]
        started = controls.wire(
            models, TITLE, [run.click, *enter], cancel, self._handle, inputs, outputs, self.status
        )  # fmt: skip
        locked = self.again.click(lambda seed: (seed, True), self.shown, [self.seed.number, self.seed.lock], **QUIET)
        locked.then(**started)
        self.history.row.select(self._reuse, [picker, self.history.kept], [*fields, self.seed.lock, *results], **QUIET)

    def _draw_results(self) -> None:
        self.status = gr.HTML(markup.status(EMPTY, muted=True))
        self.gallery = gr.Gallery(
            format="png", object_fit="contain", interactive=False, buttons=["download", "fullscreen"],
            elem_classes="pyr-sharp pyr-gallery", **self._first_sight(self.models.session()),
        )  # fmt: skip
        with gr.Row():
            self.again = gr.Button("Again with this seed", size="md", interactive=False, min_width=120)
            self.all = gr.DownloadButton("Download all (ZIP)", size="md", interactive=False, min_width=120)
        with gr.Accordion("Levels", open=False, visible=False) as self.folded:
            self.levels = gr.HTML()

    @staticmethod
    def fits(model: Model) -> bool:
        return model.generates

    def _inputs(self) -> list:
        fields = [*self.steering.inputs, self.count, self.seed.number, *self.plan.inputs]
        return [self.picker, *fields, self.seed.lock]

    @staticmethod
    def _first_sight(model: Model) -> dict:
        """What the gallery shows before the first run: the samples on the model's card."""
        picture = examples.card_picture(model)
        return {
            "value": [(picture, "From the model's card")] if picture else [],
            "label": "Samples on the model's card" if picture else "Images",
            "selected_index": 0 if picture else None,
            "height": 460,
        }

    def for_model(self, model: Model, kept: dict) -> dict:
        """What changes for another model; `kept` is the visit's history."""
        return {
            self.status: markup.status(EMPTY, muted=True),
            self.gallery: gr.Gallery(**self._first_sight(model)),
            self.folded: gr.Accordion(visible=False),
            self.again: gr.Button(interactive=False),
            self.all: gr.DownloadButton(interactive=False),
            **self.steering.for_model(model),
            **self.plan.for_model(model),
            **self.history.for_model(kept, model),
        }

    @property
    def changing(self) -> list:
        """The components that `for_model` updates."""
        changing = [self.status, self.gallery, self.folded, self.again, self.all, *self.steering.inputs]
        return [*changing, *self.plan.inputs, self.history.row]

    # Runs.

    def _handle(self, owner: str, session: Session, classes, guidance, count, seed, plan, *rest) -> Iterator[dict]:
        *numbers, locked, kept = rest
        seed = seed if locked else controls.fresh()
        request = controls.asked(
            seed, plan, tuple(numbers), count=count, classes=tuple(classes or ()), guidance=guidance
        )
        running = session.generate(count, seed, plan, request.steps, owner, request.classes, guidance)
        yield {self.seed.number: seed, self.folded: gr.Accordion(visible=False), self.levels: ""}
        levels: list[Level] = []
        for event in running:
            if isinstance(event, Level):
                levels.append(event)
                yield self._level(levels)
            elif isinstance(event, Result):
                values = [classes, guidance, count, seed, plan, *numbers]
                yield self._finished(owner, session, event, request, values, kept)
            else:
                yield {self.status: controls.underway(event)}

    def _level(self, levels: list[Level]) -> dict:
        height, width = levels[-1].size
        shown = _gallery([(image, "") for image in levels[-1].images], f"Level {len(levels)}: {width}×{height}")
        folded = gr.Accordion(label=_sizes(levels), visible=True)
        return {self.gallery: shown, self.levels: markup.level_rows(levels), self.folded: folded}

    def _finished(self, owner, session, result, request, values, kept) -> dict:
        flags = [request.flags_of(session.name, index) for index in range(len(result.images))]
        way = request.plan or "-".join(str(number) for number in request.steps.values())
        names = [f"{session.title}_{way}_seed{each['seed']}" for each in flags]
        saved = save_run(owner, result.images, names, flags, f"{session.title}_{way}_seed{request.seed}")
        captions = [" ".join([*each.get("classes", []), f"seed {each['seed']}"]) for each in flags]
        pictures = list(zip(saved.images, captions, strict=True))
        shown = {
            "pictures": pictures,
            "sharp": max(result.images[0].size) < SMALL,
            "archive": saved.archive,
            "status": markup.done(result),
            "levels": markup.level_rows(result.levels) if result.levels else "",
            "sizes": _sizes(result.levels) if result.levels else "",
        }
        many = f"{len(pictures)} images" if len(pictures) > 1 else "1 image"
        record = Record(values, shown, pictures[0][0], f"{request.seed} · {way or 'steps'} · {many}")
        return {**self._show(record), **self.history.add(kept, session, record), self.shown: request.seed}

    def _show(self, record: Record) -> dict:
        """The updates that bring a record's results into view."""
        shown = record.shown
        return {
            self.status: shown["status"],
            self.gallery: _gallery(shown["pictures"], "Click one to enlarge it", shown["sharp"]),
            self.levels: shown["levels"],
            self.folded: gr.Accordion(label=shown["sizes"], visible=bool(shown["levels"])),
            self.again: gr.Button(interactive=True),
            self.all: gr.DownloadButton(value=shown["archive"], interactive=True),
        }

    def _reuse(self, model: str, kept: dict, event: gr.SelectData) -> dict:
        record = kept[self.models.session(model).name][int(event.index)]
        classes, guidance, count, seed, plan, *numbers = record.values
        updates = {self.steering.classes: classes, self.steering.guidance: guidance}
        updates |= {self.count: count, self.seed.number: seed, self.seed.lock: True, self.plan.plan: plan}
        updates |= dict(zip(self.plan.steps.values(), numbers, strict=True))
        return {**updates, **self._show(record), self.shown: seed}

    def _code(self, session: Session, values: list) -> tuple[str, str]:
        classes, guidance, count, seed, plan, *numbers = values
        more = {"count": count, "classes": tuple(classes or ()), "guidance": guidance}
        return generating(session, controls.asked(seed, plan, tuple(numbers), **more))


def _sizes(levels: list[Level]) -> str:
    return "Levels: " + " → ".join("{1}×{0}".format(*level.size) for level in levels)


def _gallery(pictures: list[tuple[str | Image.Image, str]], label: str, sharp: bool = True) -> gr.Gallery:
    """Images as large as they fit: one by itself, two or four beside each other, or rows of four."""
    count = len(pictures)
    kind = "pyr-gallery" + (" pyr-sharp" if sharp else "") + (" pyr-few" if count <= 4 else "")
    return gr.Gallery(
        pictures, label=label, columns=2 if count <= 4 else 4, height=460 if count == 1 else "auto", elem_classes=kind,
        selected_index=0 if count == 1 else None,
    )  # fmt: skip
