"""The numbers of a step: gathered from all processes, and read without waiting for a GPU longer than needed."""

from typing import NamedTuple

import torch
from accelerate import Accelerator


class Outcome(NamedTuple):
    """What a step came to, over all processes. `stop` is 0 or the reason to stop that some process has."""

    loss: float
    gradient_norm: float
    stop: int


class Launched(NamedTuple):
    """
    A step that a GPU may still be working on: its number, from 1, its level, its learning rate, the values of its
    `Outcome` on their way to the CPU, and the event of their arrival, which is None where they are there.
    """

    number: int
    level: int
    rate: float
    values: torch.Tensor
    arrived: torch.cuda.Event | None

    def outcome(self) -> Outcome:
        """Waits for the numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, stop = self.values.tolist()
        return Outcome(loss, norm, int(stop))


def launched(
    accelerator: Accelerator, number: int, level: int, rate: float, loss: torch.Tensor, norm: torch.Tensor, stop: int
) -> Launched:
    """Gathers the loss and the reasons to stop (the gradient norm is the same in all processes) and sends them off."""
    stop = torch.full_like(loss, stop)
    if accelerator.num_processes > 1:
        loss = accelerator.reduce(loss, "mean")
        stop = accelerator.gather(stop[None]).max()
    values, arrived = torch.stack((loss.float(), norm.float(), stop.float())), None
    if values.is_cuda:
        # Copied as soon as the step is done: who reads it waits for this step only, not for what is queued after it.
        values, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
    return Launched(number, level, rate, values, arrived)
