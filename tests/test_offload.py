import gc
import warnings
from dataclasses import replace

import pytest
import torch

from magi import offload
from magi.generate import generate_latents
from magi.load import build_transformer
from magi.model import Transformer
from magi.offload import HostBlocks, PinnedBlocks, block_source
from magi.quant import StoredFp8
from magi.synthetic import RandomTensors
from magi.weights import MappedBlocks, WeightReader, tensors_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Pins:
    """Stands in for page-locking; the CPU's torch cannot. Refuses from the block numbered `refuse_at` on."""

    def __init__(self, refuse_at: int | None = None):
        self.refuse_at = refuse_at
        self.made = 0
        self.locked: dict[int, int] = {}  # address -> bytes

    def __call__(self, data):
        if self.made == self.refuse_at:
            raise RuntimeError("no more")
        self.made += 1
        address = data.data_ptr()
        self.locked[address] = data.nbytes
        return lambda: self.locked.pop(address)


class CountedTensors(RandomTensors):
    """Counts how often tensors are read."""

    reads = 0

    def tensor(self, name):
        self.reads += 1
        return super().tensor(name)


@pytest.fixture
def reader(tiny_config):
    """(device, dtype, fp8, store_fp8) -> a reader of four layers."""

    def make(device=CPU, dtype=torch.bfloat16, fp8=False, store_fp8=False):
        shape = tiny_config(shape={"num_layers": 4}).model
        return WeightReader(CountedTensors(shape, fp8), shape, device, dtype, store_fp8)

    return make


@pytest.fixture
def on_any_device(monkeypatch):
    """Blocks are read on the CPU, whatever device they are for."""
    read = WeightReader.block
    monkeypatch.setattr(WeightReader, "block", lambda reader, layer: read(replace(reader, device=CPU), layer))


def same(a, b) -> bool:
    pairs = zip(tensors_in(a), tensors_in(b), strict=True)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in ((x.reshape(-1), y.reshape(-1)) for x, y in pairs)
    )


@pytest.mark.parametrize("kind", [HostBlocks, lambda *a: PinnedBlocks(*a, pin=Pins())])
@pytest.mark.parametrize("weights", [{}, {"dtype": torch.float32}, {"fp8": True}, {"store_fp8": True}])
def test_blocks_come_back_as_they_were(kind, weights, reader):
    read = reader(**weights)
    kept = kind(MappedBlocks(read), CPU)
    assert len(kept) == 4
    for _ in range(2):
        assert [type(block) for block in kept] == [type(read.block(0))] * 4
        assert all(same(block, read.block(i)) for i, block in enumerate(kept))
    assert all(t.data_ptr() % 64 == 0 for block in kept for t in tensors_in(block)), "matrix kernels like it"


def test_a_block_is_read_once_and_its_memory_locked_once(reader):
    read, pins, seen = reader(), Pins(), []
    kept = PinnedBlocks(MappedBlocks(read), CPU, lambda *done: seen.append(done), pins)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert pins.made == 4
    assert sum(pins.locked.values()) == kept.nbytes
    reads = read.source.reads
    for block in (*kept, *kept):
        inside = [
            start <= t.data_ptr() and t.data_ptr() + t.nbytes <= start + size
            for t in tensors_in(block)
            for start, size in pins.locked.items()
        ]
        assert sum(inside) == len(list(tensors_in(block))), "every tensor lies in locked memory"
    assert read.source.reads == reads


def test_locked_memory_is_let_go(reader):
    pins = Pins()
    kept = PinnedBlocks(MappedBlocks(reader()), CPU, pin=pins)
    assert len(pins.locked) == 4
    del kept
    gc.collect()
    assert not pins.locked


def test_locked_memory_is_let_go_if_reading_is_cancelled(reader):
    pins = Pins()

    def cancel(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block_source(reader(CUDA), True, True, progress=cancel, pin=pins)
    gc.collect()
    assert pins.made == 2
    assert not pins.locked


@pytest.mark.parametrize(("store_fp8", "instead"), [(False, MappedBlocks), (True, HostBlocks)])
def test_memory_that_cannot_be_locked_is_done_without(store_fp8, instead, reader, on_any_device):
    pins = Pins(refuse_at=2)
    read = reader(CUDA, store_fp8=store_fp8)
    with pytest.warns(UserWarning, match=r"cannot be kept in page-locked host memory \(no more\).* is slower"):
        made = block_source(read, True, True, pin=pins)
    gc.collect()
    assert type(made) is instead
    assert not pins.locked


def test_other_errors_while_memory_is_locked_are_not_taken_for_that(reader):
    def fail(done, total):
        raise RuntimeError("of somebody else")

    with pytest.raises(RuntimeError, match="of somebody else"):
        block_source(reader(CUDA), True, True, progress=fail, pin=Pins())


@pytest.mark.parametrize(
    ("pinned", "device", "free", "locked"),
    [
        (None, "cuda", 1250, True),
        (None, "cuda", 1249, False),
        (None, "cuda", None, False),
        (None, "xpu", 10**6, False),
        (None, "cpu", 10**6, False),
        (True, "cuda", 0, True),
        (True, "cpu", 10**6, False),
        (False, "cuda", 10**6, False),
    ],
)
def test_memory_is_locked_where_there_is_enough_or_it_is_asked_for(pinned, device, free, locked, reader, monkeypatch):
    monkeypatch.setattr(offload, "free_host_memory", lambda: free)
    made = block_source(reader(torch.device(device)), True, pinned, nbytes=1000, pin=Pins())
    assert type(made) is (PinnedBlocks if locked else MappedBlocks)


def test_what_stays_on_the_device_is_read_once(reader):
    read, seen = reader(), []
    made = block_source(read, False, True, progress=lambda *done: seen.append(done), pin=Pins(refuse_at=0))
    reads = read.source.reads
    assert all(same(block, read.block(i)) for i, block in enumerate(made))
    assert read.source.reads == 2 * reads
    assert seen[-1] == (4, 4)


def test_float8_storage_is_made_once_however_often_blocks_are_fetched(reader, monkeypatch):
    made = []
    quantise = StoredFp8.quantise.__func__
    monkeypatch.setattr(StoredFp8, "quantise", classmethod(lambda *args: made.append(1) or quantise(*args)))
    blocks = block_source(reader(store_fp8=True), True)
    once = len(made)
    assert once == 2 * 7, "seven matrices of the two layers in the middle"
    assert [isinstance(block.fc1, StoredFp8) for block in (*blocks, *blocks)] == [False, True, True, False] * 2
    assert len(made) == once


@pytest.mark.parametrize("options", [{}, {"precision": "fp8"}, {"fp8": True}])
def test_a_run_is_the_same_from_wherever_its_weights_come(options, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    config = tiny_config(True, shape={"num_layers": 4}, num_steps=4, num_frames=24)

    def run(model):
        return next(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)).latents

    resident = tiny_model(config, offload=False, **options)
    wanted = run(resident)
    assert torch.equal(run(tiny_model(config, offload=True, **options)), wanted)
    pinned = PinnedBlocks(resident.blocks, CPU, pin=Pins())
    assert torch.equal(run(Transformer(config, resident.outer, pinned, CPU, resident.dtype)), wanted)


def test_a_model_on_the_cpu_streams_without_a_warning(tiny_config):
    config = tiny_config()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_transformer(RandomTensors(config.model), config, "cpu", offload=True, pinned=True)
    assert isinstance(model.blocks, MappedBlocks)


@pytest.mark.gpu
def test_page_locked_memory_on_the_gpu(tiny_config, tiny_caption, tiny_tokens):
    config = tiny_config(True, shape={"num_layers": 4}, num_steps=4, num_frames=24)
    source = RandomTensors(config.model)

    def run(**options):
        model = build_transformer(source, config, "cuda", **options)
        return model, next(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)).latents

    _, wanted = run(offload=False)
    for options in ({"pinned": True}, {"pinned": True, "cache_device": "host"}, {"pinned": False}):
        model, got = run(offload=True, **options)
        assert isinstance(model.blocks, PinnedBlocks) == options["pinned"]
        assert torch.equal(got, wanted)
