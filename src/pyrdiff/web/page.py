"""The page of `pyrdiff demo`: a tab for each thing that the model can do, over a `Session`."""

import base64
import hashlib
import html
import io
import ipaddress
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
from diffusers import DiffusionPipeline
from PIL import Image

from .events import Cancelled, Level, Progress, Result
from .pictures import MAX_FILE_MB
from .run import parameters
from .session import MAX_IMAGES, Session
from .steering import MOST_GUIDANCE, class_names, is_guided

SIDE = 128  # pixels of the screen that a small image is shown at
SLIDER_SIDE = 1024  # the most pixels of a side in the before/after view; the download has them all
TILES = (64, 128, 256, 512)
SANS = ["system-ui", "sans-serif"]
THEME = gr.themes.Default(
    primary_hue="blue", neutral_hue="slate", font=SANS, font_mono=["ui-monospace", "monospace"], radius_size="sm"
)
CSS = """
.gradio-container {width: 100% !important; max-width: 1240px !important; margin: 0 auto !important}
.intro h1 {font-size: 1.6rem; font-weight: 600; margin: .6rem 0 .2rem}
.intro p, .muted {color: var(--body-text-color-subdued)}
.status progress {display: block; width: 100%; height: .4rem; appearance: none; border: 0}
.status progress, .status progress::-webkit-progress-bar {border-radius: .2rem; background: var(--neutral-200)}
.status progress::-webkit-progress-value {border-radius: .2rem; background: var(--primary-500)}
.status progress::-moz-progress-bar {border-radius: .2rem; background: var(--primary-500)}
.dark .status progress, .dark .status progress::-webkit-progress-bar {background: var(--neutral-700)}
.status progress + div {padding-top: .5rem}
.status.error {border-left: 3px solid #dc2626; padding: .5rem .8rem; background: #dc262614}
.pyr-rows {display: flex; flex-direction: column; gap: 1rem}
.pyr-row {display: flex; gap: 1rem; align-items: flex-start}
.pyr-row > .cost {flex: none; min-width: 8.5rem; font-variant-numeric: tabular-nums; line-height: 1.45}
@media (max-width: 640px) {.pyr-row {flex-direction: column; gap: .4rem}}
.pyr-images {display: flex; flex-wrap: wrap; gap: .5rem}
.pyr-images img {height: 128px; width: auto; border-radius: 3px; background: #8882}
.sharp {image-rendering: pixelated}
.pyr-strip {display: grid; gap: .4rem; align-items: end}
.pyr-strip span {color: var(--body-text-color-subdued); font-size: .85rem; white-space: nowrap}
.pyr-strip img {width: 100%; height: auto; border-radius: 3px}
"""


def build(session: Session) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(
        title=f"{session.name} – pyrdiff", fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        name, text = html.escape(session.name), html.escape(session.description())
        gr.HTML(f"<div class='intro'><h1>{name}</h1><p>{text}</p></div>")
        _tabs(session)

        def left(request: gr.Request) -> None:
            session.cancel(request.session_hash)

        page.unload(left)
    return page


def _tabs(session: Session) -> None:
    """A tab for each thing that the model can do."""
    tabs = {
        "Generate": (session.generates, _generate),
        "Upscale": (session.enlarger is not None, _upscale),
        "Trajectory": (session.has_trajectory, _trajectory),
        "Compare plans": (session.compares, _compare),
    }
    with gr.Tabs():
        for title, draw in ((title, draw) for title, (possible, draw) in tabs.items() if possible):
            with gr.Tab(title):
                draw(session)


def options(host: str = "127.0.0.1") -> dict:
    """
    Arguments of `launch` for a page that asks nothing of other servers and offers no way in but its own.

    Args:
        host: The address that it listens on. Requests that name another host are refused.
    """
    from starlette.middleware import Middleware

    return {
        "theme": THEME,
        "css": CSS,
        "max_file_size": MAX_FILE_MB * 1_000_000,
        "app_kwargs": {"middleware": [Middleware(_OwnOrigin), Middleware(_OwnNames, host=host)]},
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "mcp_server": False,
        "pwa": False,
        "share": False,
        "enable_monitoring": False,
        "quiet": True,
    }


class _OwnOrigin:
    """Tells the browser to load from nowhere but this server."""

    POLICY = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'"
    )

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


class _OwnNames:
    """
    Answers to the server's own names only. A page of someone else, whose name was made to lead to this machine (DNS
    rebinding), could otherwise use it through the user's browser.
    """

    def __init__(self, app, host: str):
        self.app, self.names = app, {host.strip("[]").lower(), "localhost"}
        address = _address(host)
        self.any_address = address is None or not address.is_loopback  # addresses cannot be made to lead elsewhere
        if address is None or address.is_unspecified:
            self.names |= {name.lower() for name in (socket.gethostname(), socket.getfqdn())}

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket") or self.knows(dict(scope["headers"]).get(b"host", b"").decode()):
            await self.app(scope, receive, send)
        else:
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("Host: expected a name of this server\n", 400)(scope, receive, send)

    def knows(self, host: str) -> bool:
        """True if a Host header, with or without a port, is one of the server's names."""
        try:
            name = "" if set(host) & set("@/?#") else urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        address = _address(name)
        return name in self.names or (address is not None and (self.any_address or address.is_loopback))


def _address(host: str) -> "ipaddress.IPv4Address | ipaddress.IPv6Address | None":
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


# The tabs.


def _generate(session: Session) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            classes, guidance = _steering(session)
            count, seed = _count_and_seed(4)
            plan, steps = _plan_and_steps(session, session.pipeline)
            run, cancel = _buttons("Generate")
        with gr.Column(scale=3):
            status, shown = _outputs("Images appear here, level by level where the model has levels.")

    def handle(owner, classes, guidance, count, seed, plan, *numbers):
        levels: list[Level] = []
        for event in session.generate(count, seed, plan, _named(steps, numbers), owner, classes, guidance):
            if isinstance(event, Progress):
                yield _progress(event), gr.skip() if levels else ""
            elif isinstance(event, Level):
                levels.append(event)
                yield gr.skip(), _level_rows(levels)
            else:
                shown = _level_rows(event.levels) if event.levels else _row(event.images)
                yield _done(event), shown

    _wire(session, run, cancel, handle, [classes, guidance, count, seed, plan, *steps.values()], [status, shown])


def _upscale(session: Session) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            file, preview, factor, tile = _picture(session)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            plan, steps = _plan_and_steps(session, session.enlarger)
            run, cancel = _buttons("Enlarge")
        with gr.Column(scale=3):
            status = gr.HTML(_status("The enlarged picture appears here, beside the bicubic one.", muted=True))
            slider = gr.ImageSlider(
                label="Before (bicubic) and after", format="png", interactive=False, max_height=640, visible=False
            )
            download = gr.DownloadButton("Download PNG", visible=False, size="md")

    def handle(owner, file, factor, tile, seed, plan, *numbers):
        for event in session.enlarge(file, factor, tile, seed, plan, _named(steps, numbers), owner=owner):
            if isinstance(event, Progress):
                yield _progress(event), gr.skip(), gr.skip()
                continue
            image = event.images[0]
            views = tuple(_view(picture) for picture in (event.before, image))
            path = _save(image, owner, file)
            label = f"Before (bicubic) and after, {image.width}×{image.height}"
            done = _done(event, f"{image.width}×{image.height} pixels")
            yield done, gr.ImageSlider(views, label=label, visible=True), gr.DownloadButton(value=path, visible=True)

    _wire(session, run, cancel, handle, [file, factor, tile, seed, plan, *steps.values()], [status, slider, download])
    _wire_preview(session, file, preview, status)


def _trajectory(session: Session) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            count, seed = _count_and_seed(2)
            steps = _steps(session.steps())
            run, cancel = _buttons("Draw")
        with gr.Column(scale=3):
            status, shown = _outputs("From the structure over the states to the image, left to right.")

    def handle(owner, count, seed, *numbers):
        for event in session.trajectory(count, seed, _named(steps, numbers), owner=owner):
            if isinstance(event, Progress):
                yield _progress(event), ""
            else:
                yield _done(event), _strip(event.columns)

    _wire(session, run, cancel, handle, [count, seed, *steps.values()], [status, shown])


def _compare(session: Session) -> None:
    plans, steps = session.plans(), {name: value for name, value in session.steps().items() if name != "refine_steps"}
    argument = next(iter(steps), None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            if session.generates:
                count, seed = _count_and_seed(4)
                file, factor, tile = gr.State(None), gr.State(None), gr.State(None)
            else:
                file, preview, factor, tile = _picture(session)
                count, seed = gr.State(1), gr.Number(0, label="Seed", precision=0, minimum=0)
            choices = [(_plan_label(name, cost), name) for name, cost in plans.items()]
            chosen = gr.CheckboxGroup(choices, value=_cheapest(plans, 2), label="Plans", visible=bool(plans))
            values = gr.Textbox(
                "" if plans else "1, 2, 4",
                label=f"And {argument}" if plans else argument,
                info="numbers of steps, such as 5, 10, 20",
                visible=argument is not None,
            )
            run, cancel = _buttons("Compare")
        with gr.Column(scale=3):
            status, shown = _outputs("Every plan starts from the same seed. One call before the first warms up.")

    def handle(owner, chosen, values, count, seed, file, factor, tile):
        results: list[Result] = []
        for event in session.compare(chosen, argument, values, count, seed, file, factor, tile, owner=owner):
            if isinstance(event, Progress):
                yield _progress(event), gr.skip() if results else ""
            else:
                results.append(event)
                yield gr.skip(), _rows([(_cost(result, result.name), result.images) for result in results])
        notes = "; ".join(results[0].notes)
        yield _status(f"{len(results)} compared" + (f"; {notes}" if notes else "")), gr.skip()

    _wire(session, run, cancel, handle, [chosen, values, count, seed, file, factor, tile], [status, shown])
    if not session.generates:
        _wire_preview(session, file, preview, status)


# Controls.


def _steering(session: Session) -> tuple[gr.Dropdown, gr.Slider]:
    """What to draw, and how strongly; each shows for models that can be told."""
    names, guided = class_names(session.pipeline), is_guided(session.pipeline)
    info = "the images take turns; none for any"
    classes = gr.Dropdown(names, value=[], multiselect=True, label="Classes", info=info, visible=bool(names))
    info = "1 is none; more is more typical"
    return classes, gr.Slider(1, MOST_GUIDANCE, 1, step=0.25, label="Guidance", info=info, visible=guided)


def _count_and_seed(count: int) -> tuple:
    images = gr.Slider(1, MAX_IMAGES, value=count, step=1, label="Images")
    return images, gr.Number(0, label="Seed", precision=0, minimum=0)


def _plan_label(name: str, cost: str) -> str:
    return f"{name}: {cost}" if cost else name


def _cheapest(plans: dict[str, str], count: int) -> list[str]:
    """The plans with the fewest calls; without costs the first ones."""
    calls = {name: sum(int(word) for word in cost.split() if word.isdecimal()) for name, cost in plans.items()}
    return sorted(plans, key=calls.get)[:count]


def _plan_and_steps(session: Session, pipeline: DiffusionPipeline) -> tuple[gr.Dropdown, dict[str, gr.Number]]:
    """A choice of plans, and the numbers of steps, which show where no plan is chosen."""
    plans, own = session.plans(pipeline), "steps as set here"
    choices = [*((_plan_label(name, cost), name) for name, cost in plans.items()), (own, "")]
    first = (_cheapest(plans, 1) or [""])[0]
    plan = gr.Dropdown(choices, value=first, label="Plan", visible=bool(plans))
    with gr.Group(visible=not first) as group:
        steps = _steps(session.steps(pipeline))
    if plans:
        plan.change(lambda name: gr.Group(visible=not name), plan, group, show_progress="hidden", **QUIET)
    return plan, steps


def _steps(defaults: dict[str, int | None]) -> dict[str, gr.Number]:
    return {
        name: gr.Number(value if isinstance(value, int) else None, label=name, precision=0, minimum=1)
        for name, value in defaults.items()
    }


def _picture(session: Session) -> tuple:
    file = gr.File(label=f"Picture, up to {MAX_FILE_MB} MB", height=170)
    preview = gr.HTML(visible=False)
    factors, takes = session.scale_factors, parameters(session.enlarger)
    if factors:
        factor = gr.Dropdown(factors, value=max(factors), label="Scale factor", visible="scale_factor" in takes)
    else:
        factor = gr.Number(4, label="Scale factor", minimum=1, maximum=64, visible="scale_factor" in takes)
    info = "pixels of the result that the network sees at once"
    tile = gr.Dropdown(list(TILES), value=256, label="Tile size", info=info, visible="tile" in takes)
    return file, preview, factor, tile


def _buttons(label: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(label, variant="primary", min_width=80), gr.Button("Cancel", min_width=80)


def _outputs(text: str) -> tuple[gr.HTML, gr.HTML]:
    return gr.HTML(_status(text, muted=True)), gr.HTML("")


QUIET = {"queue": False, "api_visibility": "private"}


def _wire(session: Session, run: gr.Button, cancel: gr.Button, handle: Callable, inputs: list, outputs: list) -> None:
    def guarded(request: gr.Request, *values):
        yield from _told(handle(request.session_hash, *values), len(outputs))

    def stop(request: gr.Request):
        session.cancel(request.session_hash)

    run.click(guarded, inputs, outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")
    cancel.click(stop, show_progress="hidden", **QUIET)


def _told(events: Iterator[tuple], count: int) -> Iterator[tuple]:
    """The events, and what went wrong as a line in the page."""
    rest = [gr.skip()] * (count - 1)
    try:
        yield from events
    except Cancelled:
        yield _status("Cancelled."), *rest
    except ValueError as error:
        yield _status(str(error), error=True), *rest
    except Exception as error:
        traceback.print_exc()
        yield _status(f"This went wrong: {type(error).__name__}: {error}", error=True), *rest


def _wire_preview(session: Session, file: gr.File, preview: gr.HTML, status: gr.HTML) -> None:
    def look(path):
        if not path:
            return gr.HTML(visible=False), _status("")
        try:
            image, notes = session.read(path)
        except ValueError as error:
            return gr.HTML(visible=False), _status(str(error), error=True)
        text = "; ".join([f"{image.width}×{image.height} pixels", *notes])
        return gr.HTML(_row([_view(image, 256)]), visible=True), _status(text)

    file.change(look, file, [preview, status], show_progress="hidden", **QUIET)


def _named(steps: dict, numbers: tuple) -> dict:
    return dict(zip(steps, numbers, strict=True))


# What is shown.


def _status(text: str, error: bool = False, muted: bool = False, bar: str = "") -> str:
    kind, role = (" error", "alert") if error else (" muted" if muted else "", "status")
    return f"<div class='status{kind}' role='{role}'>{bar}<div>{html.escape(text)}</div></div>"


def _progress(progress: Progress) -> str:
    fraction = progress.fraction
    bar = "<progress></progress>" if fraction is None else f"<progress value='{fraction:.4f}'></progress>"
    parts = [progress.task] if progress.task else []
    if progress.steps:
        parts.append(f"step {min(progress.step + 1, progress.steps)} of {progress.steps}")
    if progress.window > 1:
        parts.append(f"tile {progress.window}" + (f" of {progress.windows}" if progress.windows > 1 else ""))
    parts += [_calls(progress.calls), f"{progress.seconds:.1f} s"]
    return _status(", ".join(parts), bar=bar)


def _done(result: Result, *facts: str) -> str:
    parts = [*facts, _calls(result.calls), f"{result.seconds:.2f} s"]
    if result.consistency is not None:
        parts.append(f"consistency {result.consistency:.4f} (mean difference to the input when made smaller again)")
    return _status("; ".join([*parts, *result.notes]), bar="<progress value='1'></progress>")


def _calls(count: int) -> str:
    return f"{count} network call{'' if count == 1 else 's'}"


def _cost(result: Result | Level, title: str) -> str:
    lines = [
        title,
        f"{result.calls} call{'' if result.calls == 1 else 's'}",
        f"{result.nfe_eq:.2f} NFE-eq",
        f"{result.seconds:.2f} s",
    ]
    if getattr(result, "consistency", None) is not None:
        lines.append(f"consistency {result.consistency:.4f}")
    return f"<strong>{html.escape(lines[0])}</strong><br>" + "<br>".join(html.escape(line) for line in lines[1:])


def _level_rows(levels: list[Level]) -> str:
    return _rows([(_cost(level, f"{level.size[1]}×{level.size[0]}"), level.images) for level in levels])


def _rows(rows: list[tuple[str, list[Image.Image]]]) -> str:
    parts = [f"<div class='pyr-row'><div class='cost'>{cost}</div>{_row(images)}</div>" for cost, images in rows]
    return f"<div class='pyr-rows'>{''.join(parts)}</div>"


def _row(images: list[Image.Image]) -> str:
    return f"<div class='pyr-images'>{''.join(_tag(image) for image in images)}</div>"


def _strip(columns: list[tuple[str, list[Image.Image]]]) -> str:
    head = "".join(f"<span>{html.escape(title)}</span>" for title, _ in columns)
    rows = zip(*(images for _, images in columns), strict=True)
    body = "".join(_tag(image) for row in rows for image in row)
    width = f"repeat({len(columns)}, minmax(3rem, 8rem))"
    return f"<div class='pyr-strip' style='grid-template-columns: {width}'>{head}{body}</div>"


def _tag(image: Image.Image) -> str:
    """The image itself, in the page; the browser enlarges it by whole pixels."""
    data = io.BytesIO()
    image.save(data, "PNG")
    kind = "sharp" if image.height < SIDE else ""
    text = f"{image.width}×{image.height} pixels"
    return f"<img class='{kind}' alt='{text}' title='{text}' src='data:image/png;base64,{_text(data)}'>"


def _text(data: io.BytesIO) -> str:
    return base64.b64encode(data.getvalue()).decode()


def _view(image: Image.Image, side: int = SLIDER_SIDE) -> Image.Image:
    """Small images enlarged by whole pixels, large ones made smaller, for the screen."""
    longest = max(image.size)
    if longest > side:
        size = tuple(max(round(length * side / longest), 1) for length in image.size)
        return image.resize(size, Image.Resampling.BOX)
    times = max(side // 2 // longest, 1)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _save(image: Image.Image, owner: str, name: str) -> str:
    """The path of a PNG of the image. `owner` is whatever the client says: no word of it becomes part of a path."""
    name_of_owner = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    folder = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()) / f"results-{name_of_owner}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(name).stem[:50]}_{image.width}x{image.height}.png"
    image.save(path)
    return str(path)
