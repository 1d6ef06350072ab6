"""The models that a page offers: the one it was started with, and those that come with pyrdiff."""

import threading
from collections.abc import Callable

from pyrdiff.hub.repository import bundled

from .line import Line
from .session import Session


class Models:
    """
    Sessions by name. Each is opened when it is first asked for and stays; all share one line.

    Args:
        opening: {name: what opens its session}; the first one is the page's own.
    """

    def __init__(self, opening: dict[str, Callable[[], Session]]):
        self._opening, self._open, self._lock = dict(opening), {}, threading.Lock()

    @classmethod
    def of(cls, *sessions: Session) -> "Models":
        """Of sessions that are open; they wait in the line of the first."""
        for session in sessions:
            session.line = sessions[0].line
        return cls({session.name: lambda session=session: session for session in sessions})

    @classmethod
    def beside_bundled(
        cls, model: str, revision: str | None = None, device: str | None = None, max_megapixels: float = 16
    ) -> "Models":
        """
        A model, opened and warmed up at once, and the bundled ones.

        Raises:
            ValueError: if the model cannot be loaded.
        """
        line, own = Line(), str(model).rstrip("/")

        def opened(name: str, revision: str | None = None) -> Session:
            session = Session.open(name, revision, device, max_megapixels, line)
            session.warm_up()
            return session

        names = [name for name in bundled() if name != own]
        models = cls({own: lambda: opened(own, revision), **{name: lambda name=name: opened(name) for name in names}})
        models.session()
        return models

    @property
    def names(self) -> list[str]:
        """All of them, the page's own first."""
        return list(self._opening)

    def session(self, name: str | None = None) -> Session:
        """
        The session of a model, by default of the page's own.

        Raises:
            ValueError: if there is none of this name, or it cannot be loaded.
        """
        name = name or self.names[0]
        if name not in self._opening:
            raise ValueError(f"Model: got {name!r}; expected one of {', '.join(self.names)}.")
        with self._lock:
            if name not in self._open:
                self._open[name] = self._opening[name]()
            return self._open[name]
