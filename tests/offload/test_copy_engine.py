from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from magi.offload.copy_engine import PlainBus, StreamBus, open_bus


class Streams:
    """Stands in for torch.xpu: tells what was asked of it, in order, and in which stream."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.current = "compute"
        outer = self

        class Event:
            def record(self, stream):
                self.place = stream.name
                outer.calls.append(("record", stream.name))

            def query(self):
                return self.place == "compute"

        class Stream:
            def __init__(self, device=None, name="copies"):
                self.name = name

            def wait_event(self, event):
                outer.calls.append(("wait", self.name, event.place))

        self.Event, self.Stream = Event, Stream

    def current_device(self):
        return 3

    def current_stream(self, device):
        assert device == torch.device("xpu:3")
        return self.Stream(name=self.current)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Memory:
    """Stands in for tensors of the device and the host."""

    def __init__(self, streams, pinned=False):
        self.streams, self.pinned = streams, pinned

    def is_pinned(self):
        return self.pinned

    def copy_(self, source, non_blocking):
        self.streams.calls.append(("copy", self.streams.current, non_blocking))

    def record_stream(self, stream):
        self.streams.calls.append(("used in", stream.name))


@pytest.fixture
def streams(monkeypatch):
    made = Streams()
    monkeypatch.setattr(torch, "xpu", made)
    return made


@pytest.mark.parametrize("pinned", [True, False])
def test_copies_have_a_stream_of_their_own(pinned, streams):
    bus = open_bus(torch.device("xpu"))
    assert isinstance(bus, StreamBus)
    assert bus.overlaps
    assert bus.device == torch.device("xpu:3"), "other threads have another current device"
    free = bus.mark()
    arrived = bus.upload(Memory(streams, pinned), Memory(streams), free)
    bus.require(arrived)
    assert streams.calls == [
        ("record", "compute"),
        ("wait", "copies", "compute"),
        ("copy", "copies", pinned),
        ("used in", "copies"),
        ("record", "copies"),
        ("wait", "compute", "copies"),
    ]
    assert bus.reached(free)
    assert not bus.reached(arrived)


def test_what_was_reached_long_ago_is_not_waited_for(streams):
    bus = open_bus(torch.device("xpu:3"))
    bus.require(None)
    assert bus.reached(None)
    assert streams.calls == []
    bus.upload(Memory(streams), Memory(streams))
    assert [call[0] for call in streams.calls] == ["copy", "used in", "record"]


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_other_devices_copy_in_order(device):
    bus = open_bus(torch.device(device))
    assert isinstance(bus, PlainBus)
    assert not bus.overlaps
    assert bus.device == torch.device(device)


def test_a_plain_copy_is_there_at_once():
    bus = open_bus(torch.device("cpu"))
    target = torch.zeros(4, dtype=torch.uint8)
    arrived = bus.upload(torch.arange(4, dtype=torch.uint8), target, bus.mark())
    assert target.tolist() == [0, 1, 2, 3]
    assert bus.reached(arrived)
    bus.require(arrived)


def _cuda(pinned):
    size = 1 << 26
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, pin_memory=pinned)
    return SimpleNamespace(
        source=source, target=torch.zeros(size, dtype=torch.uint8, device="cuda"), bus=open_bus(torch.device("cuda"))
    )


def _work(times=60):
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(times):
        x = (x @ x).clamp_(-1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_compute_waits_for_what_it_requires(pinned):
    case = _cuda(pinned)
    for _ in range(5):
        case.target.zero_()
        case.bus.require(case.bus.upload(case.source, case.target, case.bus.mark()))
        assert torch.equal(case.target.clone().cpu(), case.source)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_a_copy_waits_until_its_target_is_free(pinned):
    case = _cuda(pinned)
    case.target.fill_(7)
    torch.cuda.synchronize()
    _work()
    before = case.target.clone()
    arrived = case.bus.upload(case.source, case.target, case.bus.mark())
    case.bus.require(arrived)
    after = case.target.clone()
    torch.cuda.synchronize()
    assert torch.all(before == 7)
    assert torch.equal(after.cpu(), case.source)


@pytest.mark.gpu
def test_the_host_waits_for_nothing_and_copies_run_beside_the_computing():
    case = _cuda(pinned=True)
    free = case.bus.mark()
    torch.cuda.synchronize()
    _work(400)
    busy = case.bus.mark()
    arrived = case.bus.upload(case.source, case.target, free)
    while not case.bus.reached(arrived):
        pass
    assert not case.bus.reached(busy)
