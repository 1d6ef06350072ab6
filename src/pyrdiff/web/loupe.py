"""A place of an enlarged picture, before and after, side by side and much larger."""

from dataclasses import dataclass

import gradio as gr
import numpy as np
from PIL import Image

from .pictures import view

SIDE = 48  # pixels of the enlarged picture that are seen, at most
SHOWN = 384  # pixels that they are shown at
MAP = 512  # pixels of a side of the picture to click on


@dataclass
class Loupe:
    """A picture to click on, and the place that was clicked, before and after."""

    fold: gr.Accordion
    map: gr.Image
    before: gr.Image
    after: gr.Image

    @classmethod
    def draw(cls, files: gr.State) -> "Loupe":
        """`files` holds the paths of the pictures before and after."""
        with gr.Accordion("Loupe: click a place", open=True, visible=False) as fold, gr.Row():
            plain = {"interactive": False, "format": "png", "buttons": [], "height": 300, "min_width": 130}
            plan = gr.Image(label="Where", **plain)
            before = gr.Image(label="Bicubic", elem_classes="pyr-sharp", **plain)
            after = gr.Image(label="Enlarged", elem_classes="pyr-sharp", **plain)
        loupe = cls(fold, plan, before, after)

        def look(files: tuple[str, str] | None, event: gr.SelectData):
            if not files:
                return gr.skip(), gr.skip()
            with Image.open(files[0]) as one, Image.open(files[1]) as two:
                scale = two.width / view(two, MAP).width
                column, row = (int(number * scale) for number in event.index)
                return tuple(crops(one, two, (column, row)))

        plan.select(look, files, [before, after], queue=False, show_progress="hidden", api_visibility="private")
        return loupe

    def show(self, before: Image.Image, after: Image.Image) -> dict:
        """The updates that show where the two differ most."""
        one, two = crops(before, after, most_different(before, after))
        return {self.fold: gr.Accordion(visible=True), self.map: view(after, MAP), self.before: one, self.after: two}

    @property
    def outputs(self) -> list:
        return [self.fold, self.map, self.before, self.after]


def crops(before: Image.Image, after: Image.Image, place: tuple[int, int]) -> list[Image.Image]:
    """The surroundings of a place (column, row) in two pictures of one size, shown by whole pixels."""
    side = max(min(SIDE, min(after.size) // 3), 1)
    left, top = (min(max(at - side // 2, 0), length - side) for at, length in zip(place, after.size, strict=True))
    box = (left, top, left + side, top + side)
    times = max(SHOWN // side, 1)
    return [image.crop(box).resize((side * times,) * 2, Image.Resampling.NEAREST) for image in (before, after)]


def most_different(before: Image.Image, after: Image.Image) -> tuple[int, int]:
    """The place (column, row) around which two pictures of one size differ most."""
    one, two = (np.asarray(image.convert("L").reduce(8), dtype=np.float32) for image in (before, after))
    row, column = np.unravel_index(np.abs(one - two).argmax(), one.shape)
    return int(column) * 8 + 4, int(row) * 8 + 4
