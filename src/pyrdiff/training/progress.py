"""What a person sees while a run trains: a bar, when it will be done, and where it stands if there is no terminal."""

import time
from collections import deque
from typing import TYPE_CHECKING

from tqdm import tqdm

from pyrdiff.machine import duration

from .notes import notes_on_length

if TYPE_CHECKING:
    from .loop import Run
    from .outcomes import Launched

WEIGHT = 0.02  # of a step's loss in the mean that is shown: levels and noise levels differ by more than steps do
RECENT = 100  # steps that images a second are counted over


class Progress:
    """
    The bar of a run, with the loss and images a second; without a terminal, a line at each checkpoint. Once it is known
    when the run will end, a line says so. Used as a context; `run` is about to train.
    """

    def __init__(self, run: "Run"):
        self.run, self.shown = run, run.accelerator.is_main_process
        self.loss, self.losses, self.told = 0.0, 0, False
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        batches, settings = run.batches, run.settings
        self.images = [batches.num_processes * batches.accumulation * size for size in batches.batch_sizes]
        self.planned = settings.minutes is None or run.budget.step_seconds > 0  # a run that resumes has planned before
        self.bar = tqdm(
            total=run.total_steps if self.planned else None,
            initial=run.step,
            desc=run.method.name,
            unit="step",
            mininterval=1.0,
            disable=None if self.shown else True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def read(self, loss: float) -> None:
        """The loss of a step is known."""
        self.losses += 1
        self.loss += max(WEIGHT, 1 / self.losses) * (loss - self.loss)

    def trained(self, step: "Launched", seconds: float) -> None:
        """A step took so many seconds."""
        self.recent.append((self.images[step.level], seconds))
        self.bar.set_postfix_str(f"loss {self.loss:.4f}, {self.images_a_second:.3g} images/s", refresh=False)
        self.bar.update()
        if self.planned and not self.told and self.run.budget.step_seconds > 0:
            self.told = True
            self._tell_the_end()

    def plan(self) -> None:
        """The length of the run was fitted to its minutes."""
        self.planned, self.bar.total = True, self.run.total_steps

    def saved(self) -> None:
        """A checkpoint is there."""
        if self.shown and self.bar.disable:
            step, total = f"{self.run.step:,}", f" of {self.run.total_steps:,}" if self.planned else ""
            speed = f"{self.images_a_second:.3g} images/s"
            print(f"step {step}{total}: loss {self.loss:.4f}, {speed}, checkpoint saved", flush=True)

    @property
    def images_a_second(self) -> float:
        seconds = sum(seconds for _, seconds in self.recent)
        return sum(images for images, _ in self.recent) / seconds if seconds > 0 else 0.0

    def _tell_the_end(self) -> None:
        if not self.shown:
            return
        run = self.run
        left = (run.total_steps - run.step) * run.budget.step_seconds
        at = time.strftime("%H:%M", time.localtime(time.time() + left))
        line = f"{run.total_steps:,} steps, {run.budget.step_seconds:.2g} s each: done about {at}, in {duration(left)}"
        tqdm.write(line)
        for note in notes_on_length(run.total_steps, run.settings) if run.settings.minutes is not None else ():
            tqdm.write(f"note: {note}")
