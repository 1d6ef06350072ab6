"""One run at a time, in the order in which visitors came, and an end to each."""

import threading

import pytest
import torch
from test_session import events, other, picture, pixel_aware, pyramid  # noqa: F401

from pyrdiff.web.events import Busy, Cancelled, Waiting
from pyrdiff.web.line import LONGEST
from pyrdiff.web.session import Session


class Gate:
    """Lets `free` calls of a network through and holds the next one at its beginning until `open` is called."""

    def __init__(self, network: torch.nn.Module, free: int = 2):
        self.free, self.calls, self._reached, self._opened = free, 0, threading.Event(), threading.Event()
        network.register_forward_pre_hook(self._hold)

    def _hold(self, *_) -> None:
        self.calls += 1
        if self.calls == self.free + 1:
            self._reached.set()
            assert self._opened.wait(300)

    def wait(self) -> None:
        assert self._reached.wait(300)

    def open(self) -> None:
        self._opened.set()


@pytest.mark.parametrize("make", [pyramid, other, pixel_aware])
def test_cancel_stops_within_one_network_call(make):
    session = make()
    gate = Gate(session.pipeline.unet)
    name = next(iter(session.steps()))
    running = session.generate(1, 0, steps={name: 20}, owner="me")
    gate.wait()
    assert not session.cancel("somebody else")
    assert session.cancel("me")
    gate.open()
    with pytest.raises(Cancelled):
        list(running)
    assert gate.calls == 3, "the call that was under way, and none after it"
    assert not session.cancel("me")
    assert len(events(session.generate(1, 0, steps={name: 2}))[2]) == 1


def test_cancel_stops_within_one_tile(picture):  # noqa: F811
    session = pyramid()
    gate = Gate(session.enlarger.unet)
    running = session.enlarge(picture, 8, 8, steps={"refine_steps": 2})
    gate.wait()
    session.cancel()
    gate.open()
    with pytest.raises(Cancelled):
        list(running)
    assert gate.calls == 3
    assert all(parameter.requires_grad for parameter in session.enlarger.unet.parameters())
    assert events(session.enlarge(picture, 1, 8, steps={"refine_steps": 2}))[2]


def test_visitors_wait_in_the_order_in_which_they_came():
    session = pyramid()
    other_model = Session(pyramid().pipeline, line=session.line)  # another model on the same machine
    gate = Gate(session.pipeline.unet)
    first = session.generate(1, 0, "long", owner="one")
    gate.wait()
    second = session.generate(1, 0, "fast", owner="two")
    third = other_model.generate(1, 0, "fast", owner="three")
    assert next(second) == Waiting(1) and next(third) == Waiting(2)
    assert not session.cancel("four") and session.cancel("two")
    with pytest.raises(Cancelled):
        list(second)
    assert next(third) == Waiting(1)  # one the less before it
    calls = gate.calls
    gate.open()
    waited = events(third)
    assert len(waited[2]) == 1 and gate.calls > calls, "the third began once the first was done"
    assert len(events(first)[2]) == 1
    assert not session.line._runs


def test_a_line_has_an_end():
    session = pyramid()
    gate = Gate(session.pipeline.unet)
    running = [session.generate(1, 0, "fast", owner=str(number)) for number in range(LONGEST)]
    gate.wait()
    with pytest.raises(Busy, match="32 runs are waiting already"):
        session.generate(1, 0, "fast", owner="late")
    for number in range(LONGEST):
        session.cancel(str(number))
    gate.open()
    for each in running:
        with pytest.raises(Cancelled):
            list(each)
    assert gate.calls == 3 and len(events(session.generate(1, 0, "fast"))[2]) == 1


def test_when_nobody_listens_the_work_ends():
    session = pyramid()
    gate = Gate(session.pipeline.unet)
    running = session.generate(1, 0, steps={"num_inference_steps": 100})
    work = session.line._runs[0].events
    next(running)
    gate.wait()
    running.close()
    gate.open()
    while not isinstance(work.get(timeout=300), tuple):  # the last event
        pass
    assert gate.calls == 3
    assert events(session.generate(1, 0, "fast"))[2]


def test_an_error_in_the_network_is_passed_on():
    session = pyramid()
    session.pipeline.unet.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(session.generate(1, 0, "fast"))
    session.pipeline.unet._forward_pre_hooks.clear()
    assert events(session.generate(1, 0, "fast"))[2]
