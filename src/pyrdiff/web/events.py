"""What a session tells of a run: how far it is, each finished level, results, and why it ended."""

from dataclasses import dataclass, field

from PIL import Image


class Cancelled(Exception):
    """The run was cancelled."""


class Busy(ValueError):
    """The model is at work."""


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
    """

    task: str
    calls: int
    step: int
    steps: int | None
    window: int
    windows: int
    seconds: float

    @property
    def fraction(self) -> float | None:
        """Share of the run that is done, or None where it cannot be told."""
        if not self.steps:
            return None
        inside = max(self.window - 1, 0) / self.windows if self.windows else 0.0
        return min((self.step + min(inside, 1.0)) / self.steps, 1.0)


@dataclass
class Level:
    """A finished level: its images, its size (height, width), its cost, and the seconds since the start."""

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
    columns: list[tuple[str, list[Image.Image]]] = field(default_factory=list)
    before: Image.Image | None = None
    consistency: float | None = None
    notes: list[str] = field(default_factory=list)
