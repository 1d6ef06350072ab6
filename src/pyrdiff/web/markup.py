"""What the page shows as HTML: the line about a run, and rows of small images."""

import base64
import html
import io

from PIL import Image

from . import words
from .events import Level, Progress, Result

SIDE = 128  # pixels of the screen that a small image is shown at


def status(text: str, error: bool = False, muted: bool = False, bar: str = "") -> str:
    """A line about a run; an error is read out at once."""
    kind, role = (" error", "alert") if error else (" muted" if muted else "", "status")
    return f"<div class='status{kind}' role='{role}'>{bar}<div>{html.escape(text)}</div></div>"


def progress(event: Progress) -> str:
    """How far a run is, as a bar and a line."""
    fraction = event.fraction
    bar = "<progress></progress>" if fraction is None else f"<progress value='{fraction:.4f}'></progress>"
    return status(words.progress(event), bar=bar)


def done(result: Result, *facts: str) -> str:
    return status(words.done(result, *facts), bar="<progress value='1'></progress>")


def level_rows(levels: list[Level]) -> str:
    """A row a level: its size and cost, and its images."""
    rows = []
    for level in levels:
        height, width = level.size
        lines = "<br>".join(words.cost(level))
        cost = f"<div class='cost'><strong>{width}×{height}</strong><br>{lines}</div>"
        rows.append(f"<div class='pyr-row'>{cost}{row(level.images)}</div>")
    return f"<div class='pyr-rows'>{''.join(rows)}</div>"


def row(images: list[Image.Image], kind: str = "") -> str:
    return f"<div class='pyr-images {kind}'>{''.join(map(tag, images))}</div>"


def strip(columns: list[tuple[str, list[Image.Image]]]) -> str:
    """Columns with titles, from (title, images)."""
    head = "".join(f"<span>{html.escape(title)}</span>" for title, _ in columns)
    rows = zip(*(images for _, images in columns), strict=True)
    body = "".join(tag(image) for each in rows for image in each)
    width = f"repeat({len(columns)}, minmax(3rem, 8rem))"
    return f"<div class='pyr-strip' style='grid-template-columns: {width}'>{head}{body}</div>"


def verdict(sentences: list[str], results: list[Result]) -> str:
    """Who won, and the figures in a table."""
    consistent = all(result.consistency is not None for result in results)
    head = ["", "calls", "NFE-eq", "seconds", *["consistency"] * consistent]
    rows = []
    for result in results:
        cells = [result.name, str(result.calls), f"{result.nfe_eq:.2f}", f"{result.seconds:.2f}"]
        rows.append([*cells, f"{result.consistency:.4f}"] if consistent else cells)
    table = _row("th", head) + "".join(_row("td", cells) for cells in rows)
    text = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    return f"<div class='pyr-verdict'>{text}<table>{table}</table></div>"


def _row(kind: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"


def tag(image: Image.Image) -> str:
    """The image itself, in the page; the browser enlarges a small one by whole pixels."""
    data = io.BytesIO()
    image.save(data, "PNG")
    kind = "sharp" if image.height < SIDE else ""
    text, content = f"{image.width}×{image.height} pixels", base64.b64encode(data.getvalue()).decode()
    return f"<img class='{kind}' alt='{text}' title='{text}' src='data:image/png;base64,{content}'>"
