import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

from pyrdiff.parts.steps import lay_out_steps

CLIPPING = [
    DDPMScheduler(thresholding=True, sample_max_value=1.0),
    DDIMScheduler(thresholding=True, sample_max_value=1.0),
    DPMSolverMultistepScheduler(thresholding=True, sample_max_value=1.0),
    DPMSolverMultistepScheduler(thresholding=True, sample_max_value=1.0, algorithm_type="sde-dpmsolver++"),
    UniPCMultistepScheduler(thresholding=True, sample_max_value=1.0),
    DEISMultistepScheduler(thresholding=True, sample_max_value=1.0),
]


class Operations(TorchDispatchMode):
    """Keeps the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))


def run(scheduler, timesteps, size: int) -> tuple[torch.Tensor, set[str]]:
    """What the steps make of noise, for predictions that reach far beyond [-1, 1]; and the operations of it."""
    generator = torch.Generator().manual_seed(0)
    sample = 3 * torch.randn(2, 3, size, size, generator=generator)
    with Operations() as operations:
        for timestep in timesteps:
            output = torch.randn(sample.shape, generator=generator)
            options = (
                {}
                if isinstance(scheduler, (UniPCMultistepScheduler, DEISMultistepScheduler))
                else {"generator": generator}
            )
            sample = scheduler.step(output, timestep, sample, **options).prev_sample
    return sample, operations.names


@pytest.mark.parametrize("scheduler", CLIPPING, ids=lambda scheduler: type(scheduler).__name__)
def test_clipping_to_one_is_that_of_thresholding_to_the_last_bit_without_sorting(scheduler):
    steps = lay_out_steps(scheduler, 6, 1.0, "scheduler", "steps")
    stock = copy.deepcopy(scheduler)
    stock.set_timesteps(6)
    assert torch.equal(stock.timesteps, steps.timesteps)
    ours, operations = run(steps.scheduler, steps.timesteps, 256)
    theirs, stock_operations = run(stock, stock.timesteps, 256)
    assert torch.equal(ours, theirs)
    assert "sort" in stock_operations and not operations & {"sort", "quantile", "topk", "kthvalue"}


def test_thresholds_above_one_stay_what_they_are():
    scheduler = DPMSolverMultistepScheduler(thresholding=True, sample_max_value=2.0)
    steps = lay_out_steps(scheduler, 4, 1.0, "scheduler", "steps")
    stock = copy.deepcopy(scheduler)
    stock.set_timesteps(4)
    assert torch.equal(run(steps.scheduler, steps.timesteps, 8)[0], run(stock, stock.timesteps, 8)[0])


def test_images_may_be_larger_than_a_quantile_can_be_taken_of():
    steps = lay_out_steps(DPMSolverMultistepScheduler(thresholding=True, sample_max_value=1.0), 2, 1.0, "scheduler", "")
    sample = torch.zeros(1, 1, 4097, 4096)
    with pytest.raises(RuntimeError, match="too large"):
        sample.flatten().quantile(0.5)
    assert steps.step(sample, steps.timesteps[0], sample, None).shape == sample.shape
