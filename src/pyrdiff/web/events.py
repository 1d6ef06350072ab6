"""What a session tells of a run: how far it is, each finished level, results, and why it ended."""

from dataclasses import dataclass, field

from PIL import Image

TELLING = 0.04  # share of a run after which its speed says how long the rest takes


class Cancelled(Exception):
    """The run was cancelled."""


class Busy(ValueError):
    """Too many runs are waiting."""


@dataclass
class Waiting:
    """The run has not begun: so many are before it."""

    ahead: int


@dataclass
class Progress:
    """
    How far a run is.

    Attributes:
        task: What is running, where there is more than one thing.
        calls: Network calls that were begun.
        step, steps: Steps done, and in all, where the pipeline says so.
        window, windows: Network calls of this step, and of the one before it.
        seconds: Since the pipeline was called.
        costs: What each step costs beside the others, where they differ and it is known.
    """

    task: str
    calls: int
    step: int
    steps: int | None
    window: int
    windows: int
    seconds: float
    costs: list[float] | None = None

    @property
    def fraction(self) -> float | None:
        """Share of the run that is done, or None where it cannot be told."""
        if not self.steps:
            return None
        inside = min(max(self.window - 1, 0) / self.windows, 1.0) if self.windows else 0.0
        if self.costs is None or len(self.costs) != self.steps:
            return min((self.step + inside) / self.steps, 1.0)
        following = self.costs[self.step] if self.step < self.steps else 0.0
        return min((sum(self.costs[: self.step]) + inside * following) / sum(self.costs), 1.0)

    @property
    def seconds_left(self) -> float | None:
        """What remains at the speed so far, or None as long as too little is done to tell."""
        fraction = self.fraction
        if fraction is None or fraction < TELLING:
            return None
        return self.seconds * (1 - fraction) / fraction


@dataclass
class Level:
    """A finished level: its images, its size (height, width), its cost, and the seconds that it took."""

    images: list[Image.Image]
    size: tuple[int, int]
    calls: int
    nfe_eq: float
    seconds: float


@dataclass
class Result:
    """
    What a call gave.

    Attributes:
        name: Which of several calls.
        seed: Of the first image; the next one has the next number.
        images: Its images.
        calls, nfe_eq, seconds: Network calls, the same in calls at the largest size, and what it took.
        levels: Of a pyramid, else empty.
        columns: Of a trajectory, (title, images) from structure to image, else empty.
        before: The picture that was enlarged, enlarged by bicubic interpolation.
        consistency: Mean difference, in [0, 1], between the picture and the result made smaller again.
        notes: What was done to the picture before.
    """

    name: str
    images: list[Image.Image]
    calls: int
    nfe_eq: float
    seconds: float
    levels: list[Level] = field(default_factory=list)
    seed: int = 0
    columns: list[tuple[str, list[Image.Image]]] = field(default_factory=list)
    before: Image.Image | None = None
    consistency: float | None = None
    notes: list[str] = field(default_factory=list)
