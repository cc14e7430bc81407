from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from magi.offload.copy_engine import InOrderCopies, StreamCopies, open_copy_engine


class Streams:
    """Stands in for torch.xpu: records the calls in order, each with its stream."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.current = "compute"
        outer = self

        class Event:
            def record(self, stream):
                self.stream_name = stream.name
                outer.calls.append(("record", stream.name))

            def query(self):
                return self.stream_name == "compute"

        class Stream:
            def __init__(self, device=None, name="copy"):
                self.name = name

            def wait_event(self, event):
                outer.calls.append(("wait", self.name, event.stream_name))

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


class FakeTensor:
    """Stands in for a tensor on the device or the host."""

    def __init__(self, streams, pinned=False):
        self.streams, self.pinned = streams, pinned

    def is_pinned(self):
        return self.pinned

    def copy_(self, source, non_blocking):
        self.streams.calls.append(("copy", self.streams.current, non_blocking))

    def record_stream(self, stream):
        self.streams.calls.append(("record_stream", stream.name))


@pytest.fixture
def streams(monkeypatch):
    backend = Streams()
    monkeypatch.setattr(torch, "xpu", backend)
    return backend


@pytest.mark.parametrize("pinned", [True, False])
def test_uploads_run_on_the_copy_stream(pinned, streams):
    copy_engine = open_copy_engine(torch.device("xpu"))
    assert isinstance(copy_engine, StreamCopies)
    assert copy_engine.overlaps
    assert copy_engine.device == torch.device("xpu:3"), "the current device differs between threads"
    free = copy_engine.record_event()
    copied = copy_engine.upload(FakeTensor(streams, pinned), FakeTensor(streams), free)
    copy_engine.wait_event(copied)
    assert streams.calls == [
        ("record", "compute"),
        ("wait", "copy", "compute"),
        ("copy", "copy", pinned),
        ("record_stream", "copy"),
        ("record", "copy"),
        ("wait", "compute", "copy"),
    ]
    assert copy_engine.query(free)
    assert not copy_engine.query(copied)


def test_none_is_a_completed_event(streams):
    copy_engine = open_copy_engine(torch.device("xpu:3"))
    copy_engine.wait_event(None)
    assert copy_engine.query(None)
    assert streams.calls == []
    copy_engine.upload(FakeTensor(streams), FakeTensor(streams))
    assert [call[0] for call in streams.calls] == ["copy", "record_stream", "record"]


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_devices_without_streams_copy_in_order(device):
    copy_engine = open_copy_engine(torch.device(device))
    assert isinstance(copy_engine, InOrderCopies)
    assert not copy_engine.overlaps
    assert copy_engine.device == torch.device(device)


def test_an_in_order_upload_has_completed_on_return():
    copy_engine = open_copy_engine(torch.device("cpu"))
    target = torch.zeros(4, dtype=torch.uint8)
    copied = copy_engine.upload(torch.arange(4, dtype=torch.uint8), target, copy_engine.record_event())
    assert target.tolist() == [0, 1, 2, 3]
    assert copy_engine.query(copied)
    copy_engine.wait_event(copied)


def _cuda(pinned):
    size = 1 << 26
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, pin_memory=pinned)
    return SimpleNamespace(
        source=source,
        target=torch.zeros(size, dtype=torch.uint8, device="cuda"),
        copy_engine=open_copy_engine(torch.device("cuda")),
    )


def _work(times=60):
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(times):
        x = (x @ x).clamp_(-1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_compute_waits_for_the_event_of_an_upload(pinned):
    case = _cuda(pinned)
    for _ in range(5):
        case.target.zero_()
        case.copy_engine.wait_event(case.copy_engine.upload(case.source, case.target, case.copy_engine.record_event()))
        assert torch.equal(case.target.clone().cpu(), case.source)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_an_upload_waits_for_the_last_use_of_its_target(pinned):
    case = _cuda(pinned)
    case.target.fill_(7)
    torch.cuda.synchronize()
    _work()
    before = case.target.clone()
    copied = case.copy_engine.upload(case.source, case.target, case.copy_engine.record_event())
    case.copy_engine.wait_event(copied)
    after = case.target.clone()
    torch.cuda.synchronize()
    assert torch.all(before == 7)
    assert torch.equal(after.cpu(), case.source)


@pytest.mark.gpu
def test_uploads_overlap_with_compute_and_do_not_block_the_host():
    case = _cuda(pinned=True)
    free = case.copy_engine.record_event()
    torch.cuda.synchronize()
    _work(400)
    busy = case.copy_engine.record_event()
    copied = case.copy_engine.upload(case.source, case.target, free)
    while not case.copy_engine.query(copied):
        pass
    assert not case.copy_engine.query(busy)
