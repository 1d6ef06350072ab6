"""The page of `pyrdiff demo`: a model to choose, and a tab for each thing that it can do."""

import html
from importlib import metadata

import gradio as gr

from . import compare, controls, files, generate, trajectory, upscale
from .compare import CompareTab
from .controls import QUIET
from .generate import GenerateTab
from .history import History
from .model import Model, title
from .models import Models
from .trajectory import TrajectoryTab
from .upscale import UpscaleTab

TABS = {generate.TITLE: GenerateTab, upscale.TITLE: UpscaleTab, trajectory.TITLE: TrajectoryTab}
TABS |= {compare.TITLE: CompareTab}
CARD = "About the model"


def build(models: Models) -> gr.Blocks:
    """The page, not yet served."""
    own = models.session()
    with gr.Blocks(
        title=f"{own.title} – pyrdiff", fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        with gr.Row(elem_classes="pyr-head"):
            head = gr.HTML(_head(own), elem_classes="intro")
            picker = gr.Dropdown(
                [(title(name), name) for name in models.names], value=own.name, label="Model",
                visible=len(models.names) > 1, scale=0, min_width=220,
            )  # fmt: skip
        with gr.Tabs() as row:
            tabs, drawn = {}, {}
            for name, kind in TABS.items():
                with gr.Tab(name, id=name, visible=kind.fits(own)) as tabs[name]:
                    drawn[name] = kind(models, picker)
            with gr.Tab(CARD, id=CARD):
                about = gr.Markdown(_about(own), elem_classes="pyr-card")
        _wire(models, picker, head, row, tabs, drawn, about)

        def left(request: gr.Request) -> None:
            for tab in TABS:
                owner = controls.owner_in(tab, request)
                models.session().cancel(owner)
                files.forget(owner)

        page.unload(left)
    return page


def _wire(models: Models, picker: gr.Dropdown, head: gr.HTML, row: gr.Tabs, tabs: dict, drawn: dict, about) -> None:
    """Another model changes what the tabs offer."""
    histories: dict[str, History] = {name: tab.history for name, tab in drawn.items() if hasattr(tab, "history")}

    def change(name: str, *kept: dict) -> dict:
        model = models.session(name)
        visits = dict(zip(histories, kept, strict=True))
        updates = {head: _head(model), about: _about(model), row: gr.Tabs(selected=_first(model))}
        for each, tab in drawn.items():
            updates[tabs[each]] = gr.Tab(visible=tab.fits(model), interactive=tab.fits(model))
            if tab.fits(model):
                updates |= tab.for_model(model, visits.get(each, {}))
        return updates

    outputs = [head, about, row, *tabs.values(), *(each for tab in drawn.values() for each in tab.changing)]
    inputs = [picker, *(history.kept for history in histories.values())]
    picker.input(change, inputs, outputs, **{**QUIET, "show_progress": "minimal"})


def _first(model: Model) -> str:
    return next((name for name, kind in TABS.items() if kind.fits(model)), CARD)


def _head(model: Model) -> str:
    return f"<h1>{html.escape(model.title)}</h1><p>{html.escape(model.description())}</p>"


def _about(model: Model) -> str:
    """The model's card, and where to read on."""
    links = []
    if model.folder is None and model.name.count("/") == 1:
        links.append(f"[{model.name} on the Hub](https://huggingface.co/{model.name})")
    links += [f"[{label}]({url})" for label, url in documentation()]
    text = model.card() or f"# {model.title}\n\nThis model has no card. {model.description()}."
    return "\n\n".join([*([" · ".join(links)] if links else []), text])


def documentation() -> list[tuple[str, str]]:
    """(label, address) of what the installed package names as its pages."""
    try:
        named = metadata.metadata("pyrdiff").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return []
    pairs = [tuple(part.strip() for part in each.partition(",")[::2]) for each in named]
    return [(label, url) for label, url in pairs if url.startswith("https://")]
