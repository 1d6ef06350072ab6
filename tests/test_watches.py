"""The watch of an absent device: each way to wait for a GPU is seen, and what does not wait is not."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from watches import DEVICE, AbsentDevice, DeviceGenerator

CPU = torch.device("cpu")

WAITS = {
    "reads a number": [
        lambda there, here: there.sum().item(),
        lambda there, here: bool(there.sum() > 0),
        lambda there, here: float(there[0, 0]),
        lambda there, here: torch.zeros(3)[int(there.amax())],
        lambda there, here: 1 if there.isfinite().all() else 0,
    ],
    "copies to the CPU": [
        lambda there, here: there.cpu(),
        lambda there, here: there.to("cpu", non_blocking=True),
        lambda there, here: there.tolist(),
        lambda there, here: there.cpu().numpy(),
        lambda there, here: here.copy_(there),
    ],
    "copies to the device": [
        lambda there, here: here.to(DEVICE),
        lambda there, here: here.to(there),
        lambda there, here: here.sum().to(DEVICE),
        lambda there, here: there.copy_(here),
        lambda there, here: torch.zeros(200, 200).to(DEVICE, non_blocking=True),
        lambda there, here: randn_tensor((2, 3), DeviceGenerator(), DEVICE),
    ],
    "makes a tensor of numbers": [
        lambda there, here: torch.tensor([1, 2], device=DEVICE),
        lambda there, here: torch.as_tensor(2.0, device=DEVICE),
        lambda there, here: there.new_tensor([1.0]),
        lambda there, here: there[[0, 1]],
    ],
    "copies an index to the device": [lambda there, here: there[torch.tensor([0, 1])]],
    "compares all values": [lambda there, here: torch.equal(there, there)],
}
REFUSED = [
    lambda there, here: there + here,
    lambda there, here: torch.where(there > 0, there, here),
    lambda there, here: there @ here.T,
    lambda there, here: torch.cat((there, here)),
    lambda there, here: there.add_(here),
    lambda there, here: there[there > 0],
    lambda there, here: there.nonzero(),
    lambda there, here: torch.randn(3, device=DEVICE, generator=DeviceGenerator()),
    lambda there, here: there.numpy(),
]
FREE = [
    lambda there, here: there * 2 + 1,
    lambda there, here: there * here.sum(),  # a number, which goes into the kernel
    lambda there, here: here.sum().item(),
    lambda there, here: torch.full((3,), 2.0, device=DEVICE),
    lambda there, here: torch.tensor([1, 2]).to(DEVICE, non_blocking=True),
    lambda there, here: torch.randn(3, device=DEVICE, generator=DeviceGenerator(DEVICE)),
    lambda there, here: torch.rand(3, device=DEVICE, generator=DeviceGenerator(DEVICE)),
    lambda there, here: torch.randint(9, (3,), device=DEVICE, generator=DeviceGenerator(DEVICE)),
    lambda there, here: randn_tensor((2, 3), None, DEVICE),
    lambda there, here: there[torch.zeros(2, dtype=torch.long, device=DEVICE)],
    lambda there, here: torch.where(there > 0, there, 0.0),
    lambda there, here: torch.tensor([1.0, 2.0]).tolist(),
]


def run(work) -> list[str]:
    with AbsentDevice() as device:
        work(torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 3))
    return [wait.what for wait in device.waits]


@pytest.mark.parametrize(("what", "work"), [(what, work) for what, works in WAITS.items() for work in works])
def test_a_wait_is_seen(what, work):
    assert run(work) == [what]


@pytest.mark.parametrize("work", REFUSED)
def test_what_a_gpu_refuses_is_refused(work):
    with pytest.raises((RuntimeError, TypeError)):
        run(work)


@pytest.mark.parametrize("work", FREE)
def test_what_does_not_wait_is_not_noted(work):
    assert run(work) == []


def test_gradients_are_watched_too():
    class Read(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * 2

        @staticmethod
        def backward(ctx, gradient):
            gradient.sum().item()
            return gradient

    with AbsentDevice() as device:
        weight = torch.zeros(3, device=DEVICE, requires_grad=True)
        Read.apply(weight).sum().backward()
    assert [wait.what for wait in device.waits] == ["reads a number"] and weight.grad.is_meta


def test_the_generator_is_torch_s_again_afterwards():
    before = torch.Generator
    with AbsentDevice():
        assert torch.Generator is DeviceGenerator and torch.Generator(DEVICE).device == DEVICE
        assert torch.Generator().device == CPU
    assert torch.Generator is before
