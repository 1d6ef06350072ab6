"""The runs of a visit, to look at again and to reuse."""

from dataclasses import dataclass

import gradio as gr

from .model import Model

KEPT = 24  # runs of a model


@dataclass
class Record:
    """
    A run that was done.

    Attributes:
        values: Of the form's fields, in their order.
        shown: What the outputs showed, by the name that the tab has for them.
        picture: Path of a picture for the overview.
        caption: Below it.
    """

    values: list
    shown: dict
    picture: str
    caption: str


@dataclass
class History:
    """A row of pictures, the latest first; `kept` holds {model: its records}."""

    kept: gr.State
    row: gr.Gallery

    @classmethod
    def draw(cls) -> "History":
        kept = gr.State({})
        row = gr.Gallery(
            label="This visit: click one to have it and its settings back", columns=8, height=170, allow_preview=False,
            object_fit="contain", buttons=[], interactive=False, visible=False, fit_columns=False,
            elem_classes="pyr-sharp pyr-history",
        )  # fmt: skip
        return cls(kept, row)

    def add(self, kept: dict, model: Model, record: Record) -> dict:
        """The updates after a run."""
        records = [record, *kept.get(model.name, [])][:KEPT]
        kept = {**kept, model.name: records}
        return {self.kept: kept, self.row: self._row(records)}

    def for_model(self, kept: dict, model: Model) -> dict:
        """What changes for another model: its own runs are shown."""
        return {self.row: self._row(kept.get(model.name, []))}

    @staticmethod
    def _row(records: list[Record]) -> gr.Gallery:
        pictures = [(record.picture, record.caption) for record in records]
        return gr.Gallery(pictures, visible=bool(records), selected_index=None)
