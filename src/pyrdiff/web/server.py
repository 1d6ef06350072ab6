"""How the page is served: nothing from elsewhere, to nobody who comes under another name."""

import ipaddress
import socket
from urllib.parse import urlsplit

from . import look
from .pictures import MAX_FILE_MB


def options(host: str = "127.0.0.1") -> dict:
    """
    Arguments of `launch` for a page that asks nothing of other servers and offers no way in but its own.

    Args:
        host: The address that it listens on. Requests that name another host are refused.
    """
    from starlette.middleware import Middleware

    return {
        "theme": look.THEME,
        "css": look.CSS,
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
