"""
Open a page in the browser that drives a model: generate level by level, enlarge pictures, compare plans. The models
that come with pyrdiff can be chosen there, too.

Example: pyrdiff demo runs/mine/pipeline --open_browser

It runs on this machine alone: it listens on the loopback address unless --host says otherwise, and the page loads
nothing from elsewhere.
"""

import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass

from pyrdiff.cli import announce, expect, parse
from pyrdiff.commands.paths import check_paths


@dataclass(kw_only=True)
class DemoSettings:
    """Flags of `pyrdiff demo`."""

    model: str = "noto-emoji"
    """Exported folder, a repository on the Hub, or the name of the model that comes with pyrdiff."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it can use the page."""
    port: int = 7860
    """Port to listen on; 0 for a free one."""
    device: str | None = None
    """By default the GPU if there is one."""
    max_megapixels: float = 16
    """The largest picture, in millions of pixels, both as it comes and enlarged."""
    open_browser: bool = False
    """Open the page in the browser."""

    def __post_init__(self):
        expect(self, "port", 0 <= self.port < 65536, "a number from 0 to 65535")
        expect(self, "max_megapixels", 0 < self.max_megapixels <= 100, "a number above 0, up to 100")


def main(args: list[str]) -> dict:
    settings = parse(DemoSettings, __doc__, args, prog="pyrdiff demo")
    check_paths(settings, models=["model"])
    port = _free(settings.host, settings.port)
    announce(f"loading {settings.model}, for a page on {settings.host}, port {port}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="pyrdiff-demo-", ignore_cleanup_errors=True) as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and results, gone when the command ends
            return _serve(settings, port)
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(settings: DemoSettings, port: int) -> dict:
    """Loads the model and serves its page until a signal ends it."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f"pyrdiff demo needs gradio: pip install 'pyrdiff[demo]' ({error})") from error
    print(f"loading {settings.model}", flush=True)
    from pyrdiff.web import page, server
    from pyrdiff.web.models import Models

    models = Models.beside_bundled(settings.model, settings.revision, settings.device, settings.max_megapixels)
    session = models.session()
    print(f"{session.name}: {session.description()}")
    if not _is_loopback(settings.host):
        print(f"warning: --host {settings.host}: whoever reaches this address can use the page", file=sys.stderr)
    blocks = page.build(models)
    _, url, _ = blocks.launch(
        server_name=settings.host,
        server_port=port,
        inbrowser=settings.open_browser,
        prevent_thread_lock=True,
        **server.options(settings.host),
    )
    print(f"open {url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close()
    return {"url": url}


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0; raises `ValueError` where nothing can listen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise ValueError(f"cannot listen on host={host!r}, port={port}: {error.strerror or error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
