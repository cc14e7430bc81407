import gc
import sys
import threading
import time
import warnings
from itertools import pairwise

import pytest
import torch

from magi.errors import MagiError
from magi.offload.copy_engine import PlainBus
from magi.offload.packing import block_layouts, packed_bytes
from magi.offload.streamed_blocks import StreamedBlocks, arena_bytes
from magi.sampling.prepare import generate_latents
from magi.transformer.block import layer_forward
from magi.transformer.float8 import FLOAT8, Fp8Weight, StoredFp8
from magi.transformer.model import Transformer
from magi.transformer.weights import WeightReader, tensors_in
from tests.conftest import MemorySource
from tests.support.lazy_engine import LazyBus

CPU = torch.device("cpu")
LAYERS = 6
WEIGHTS = [{}, {"dtype": torch.float32}, {"fp8": True}, {"store_fp8": True}]
PLACES = {  # on the device, on the host
    "resident": (range(LAYERS), ()),
    "host": ((), range(LAYERS)),
    "file": ((), ()),
    "mixed": ((1, 4), (0, 3)),
    "mixed otherwise": ((0, 5), (1, 2, 3)),
}


class Pins:
    """Stands in for page-locking; the CPU's torch cannot. Refuses from the piece numbered `refuse_at` on."""

    def __init__(self, refuse_at: int = sys.maxsize):
        self.refuse_at = refuse_at
        self.asked = 0
        self.locked: dict[int, int] = {}  # address -> bytes

    def __call__(self, data):
        self.asked += 1
        if self.asked > self.refuse_at:
            raise RuntimeError("no more")
        address = data.data_ptr()
        self.locked[address] = data.nbytes
        return lambda: self.locked.pop(address)


class CountedTensors(MemorySource):
    """Counts how often each layer's tensors are read, and can be slow or fail."""

    def __init__(self, weights):
        super().__init__(weights)
        self.reads: dict[int, int] = {}
        self.delay = 0.0
        self.damaged: int | None = None

    def tensor(self, name):
        layer = int(name.split(".")[2]) if "layers" in name else -1
        self.reads[layer] = self.reads.get(layer, 0) + 1
        if layer == self.damaged:
            raise MagiError(f"layer {layer} is damaged")
        time.sleep(self.delay)
        return super().tensor(name)


@pytest.fixture(scope="module")
def shape(tiny_config):
    return tiny_config(shape={"num_layers": LAYERS}).model


@pytest.fixture(scope="module")
def stored(shape, random_weights):
    """fp8 -> a checkpoint's tensors, bfloat16 where they are not float8 or scales."""

    def low(name, t):
        return t.bfloat16() if t.dtype == torch.float32 and not name.endswith(("_scale", "bands")) else t

    return {fp8: {name: low(name, t) for name, t in random_weights(shape, fp8).items()} for fp8 in (False, True)}


@pytest.fixture
def reader(shape, stored):
    """(dtype, fp8, store_fp8, device) -> a reader of six layers."""

    def make(dtype=torch.bfloat16, fp8=False, store_fp8=False, device=CPU):
        return WeightReader(CountedTensors(stored[fp8]), shape, device, dtype, store_fp8)

    return make


@pytest.fixture(autouse=True)
def _no_thread_survives():
    yield
    assert not threads()


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("magi-")]


def raw(block):
    return [t.reshape(-1).view(torch.uint8).clone() for t in tensors_in(block)]


def blocks_of(reader):
    return [reader.block(layer) for layer in range(reader.config.num_layers)]


def same(found, wanted) -> bool:
    return len(found) == len(wanted) and all(
        len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(found, wanted, strict=True)
    )


def iterate(blocks, bus):
    """Every layer's bytes, as work that is given to the device sees them."""
    found = []
    for block in blocks:
        for _ in range(3):  # early and late
            bus.compute(lambda block=block: found.append(raw(block)))
    bus.drain()
    assert len(found) == 3 * len(blocks)
    assert same(found[::3], found[1::3])
    assert same(found[::3], found[2::3])
    return found[::3]


def wanted(read):
    return [raw(block) for block in blocks_of(read)]


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.001)


# -- the same numbers from everywhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("place", PLACES)
def test_every_layer_comes_in_its_turn_from_wherever_it_lies(place, weights, slots, reader):
    read = reader(**weights)
    reference = wanted(read)
    for seed in range(3):
        bus, pins = LazyBus(seed), Pins()
        blocks = StreamedBlocks(read, *PLACES[place], slots, bus=bus, pin=pins)
        assert len(blocks) == LAYERS
        streamed = LAYERS - len(blocks.on_device)
        for n in range(1, 3):
            assert same(iterate(blocks, bus), reference)
            assert len(bus.uploads) == n * streamed, "each layer once, and in one copy"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_layers_pass_through_the_arena_and_nothing_comes_back(weights, reader):
    bus = LazyBus()
    blocks = StreamedBlocks(reader(**weights), (2,), (1, 3), 2, bus=bus, pin=Pins())
    sizes = [packed_bytes(block) for block in blocks_of(reader(**weights))]
    del sizes[2]
    arena = arena_bytes(sizes, 2)
    for _ in range(3):
        iterate(blocks, bus)
    arenas = {upload.storage for upload in bus.uploads}
    assert len(arenas) == 1
    assert arenas.isdisjoint({upload.source_storage for upload in bus.uploads})
    assert all(upload.start + upload.nbytes <= arena for upload in bus.uploads)
    assert [upload.nbytes for upload in bus.uploads] == 3 * sizes
    assert blocks.nbytes == arena + packed_bytes(reader(**weights).block(2))


@pytest.mark.parametrize("bus", [PlainBus(CPU), LazyBus(overlaps=False, eager=True)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_device_without_streams_needs_no_thread_for_copies(weights, bus, reader):
    read = reader(**weights)
    blocks = StreamedBlocks(read, *PLACES["mixed"], 2, bus=bus, pin=Pins())
    found = []
    for block in blocks:
        found.append(raw(block))
        assert set(threads()) <= {"magi-read"}
    assert same(found, wanted(read))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_run_is_the_same_from_wherever_its_weights_come(
    place, weights, reader, tiny_config, tiny_caption, tiny_tokens
):
    config = tiny_config(True, shape={"num_layers": LAYERS}, num_steps=4, num_frames=24)
    read = reader(**weights)

    def run(blocks):
        model = Transformer(config, read.outer(), blocks, CPU, read.dtype)
        return next(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)).latents

    streamed = StreamedBlocks(read, *PLACES[place], 2, bus=LazyBus(eager=True), pin=Pins())
    assert torch.equal(run(streamed), run(StreamedBlocks(read, range(LAYERS), (), 1)))


# -- ahead, but not too far ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("place", ["host", "file"])
def test_the_next_layers_are_on_their_way_while_one_is_in_use(place, slots, reader):
    bus = LazyBus()
    blocks = StreamedBlocks(reader(), *PLACES[place], slots, bus=bus, pin=Pins())
    for turn, _ in enumerate(blocks):
        coming = min(LAYERS, turn + slots)
        until(lambda coming=coming: len(bus.uploads) >= coming)
        time.sleep(0.01)
        assert len(bus.uploads) == coming, "no more than the slots"


def test_bringing_begins_before_a_layer_that_is_there_already_is_done(reader):
    bus = LazyBus()
    for n, _ in enumerate(StreamedBlocks(reader(), (0, 1), (2, 3, 4, 5), 2, bus=bus, pin=Pins())):
        if n == 0:
            until(lambda: len(bus.uploads) == 2)


@pytest.mark.parametrize("slots", [2, 3])
def test_uneven_layers_take_no_more_than_the_arena(slots, reader):
    bus = LazyBus()
    blocks = StreamedBlocks(reader(fp8=True), (), range(LAYERS), slots, bus=bus, pin=Pins())
    for turn, _ in enumerate(blocks):
        if turn == 2:
            until(lambda: len(bus.uploads) == 2 + slots)  # even ones among themselves
        time.sleep(0.01)
        alive = sorted((u.start, u.start + u.nbytes) for u in bus.uploads[turn:])
        assert all(a[1] <= b[0] for a, b in pairwise(alive)), "they do not overlap"
        assert alive[-1][1] <= blocks.nbytes
        assert len(alive) <= slots


def test_the_file_is_read_ahead_of_the_copies(reader):
    """Two buffers' worth, while host layers are in use and none of the file's has its turn."""
    read, bus = reader(), LazyBus()
    blocks = StreamedBlocks(read, (), (0, 1, 2, 3), 2, bus=bus, pin=Pins())
    read.source.reads.clear()
    arriving = iter(blocks)
    next(arriving)
    until(lambda: set(read.source.reads) == {4, 5})
    assert len(bus.uploads) <= 2
    arriving.close()


@pytest.mark.parametrize(
    ("sizes", "slots", "nbytes"),
    [
        ([], 2, 0),
        ([5], 2, 5),
        ([4, 4, 4, 4], 2, 8),
        ([4, 4, 4, 4], 3, 12),
        ([8, 4, 4, 4, 8], 2, 8),
        ([8, 4, 4, 4, 8], 3, 12),
        ([9, 4, 4, 4, 9], 2, 9),
        ([9, 4], 2, 13),
        ([4, 9, 4, 9], 2, 18),
        ([4, 4], 3, 8),
        ([8, 4, 4, 4, 8], 1, 8),
    ],
)
def test_size_of_the_arena(sizes, slots, nbytes):
    assert arena_bytes(sizes, slots) == nbytes


# -- what is left early, and what fails ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["host", "file", "mixed"])
@pytest.mark.parametrize("layers", range(1, LAYERS))
def test_an_iteration_may_be_left_early(layers, place, reader):
    read = reader()
    reference = wanted(read)
    for seed in range(3):
        bus = LazyBus(seed)
        blocks = StreamedBlocks(read, *PLACES[place], 2, bus=bus, pin=Pins())
        found = []
        for _ in range(3):
            arriving = iter(blocks)
            for _ in range(layers):
                block = next(arriving)
                bus.compute(lambda block=block, found=found: found.append(raw(block)))
            arriving.close()
            assert not threads()
        assert same(iterate(blocks, bus), reference)
        assert same(found, 3 * reference[:layers]), "also what was given to the device before it was left"


def test_an_error_that_is_still_being_handled_does_not_keep_the_next_iteration_from_working(reader):
    read, bus = reader(), LazyBus()
    blocks = StreamedBlocks(read, *PLACES["mixed"], 2, bus=bus, pin=Pins())

    def forward():
        for layer, block in enumerate(blocks):
            bus.compute(lambda block=block: raw(block))
            if layer == 3:
                raise KeyboardInterrupt

    try:
        forward()
    except KeyboardInterrupt:
        assert same(iterate(blocks, bus), wanted(read))
        assert not threads()


def test_an_iteration_ends_when_another_begins(reader):
    read, bus = reader(), LazyBus()
    blocks = StreamedBlocks(read, *PLACES["mixed"], 2, bus=bus, pin=Pins())
    old = iter(blocks)
    next(old)
    assert same(iterate(blocks, bus), wanted(read))
    with pytest.raises(RuntimeError, match="another one has begun"):
        list(old)


def test_a_layer_that_cannot_be_read(reader):
    read, bus = reader(), LazyBus()
    blocks = StreamedBlocks(read, *PLACES["file"], 2, bus=bus, pin=Pins())
    read.source.damaged, got = 3, 0
    for _ in range(2):
        with pytest.raises(MagiError, match="layer 3 is damaged"):
            got += sum(1 for _ in blocks)
        assert not threads()
    read.source.damaged = None
    assert same(iterate(blocks, bus), wanted(read))


@pytest.mark.parametrize("place", ["host", "file"])
def test_a_copy_that_fails(place, reader):
    read, bus, seen = reader(), LazyBus(), []
    blocks = StreamedBlocks(read, *PLACES[place], 2, bus=bus, pin=Pins())
    bus.fail_at = 2
    with pytest.raises(RuntimeError, match="the bus is broken"):
        seen.extend(1 for _ in blocks)
    assert not threads()
    bus.fail_at = None
    assert same(iterate(blocks, bus), wanted(read))


def test_leaving_does_not_wait_for_a_large_layer(reader):
    read = reader()
    blocks = StreamedBlocks(read, (), (0,), 2, bus=LazyBus(), pin=Pins())
    read.source.delay = 0.1  # a tensor; layers have 29
    arriving = iter(blocks)
    next(arriving)
    until(lambda: 1 in read.source.reads)
    began = time.monotonic()
    arriving.close()
    assert time.monotonic() - began < 1
    assert not threads()


def test_a_large_tensor_is_not_copied_in_one_go(reader, monkeypatch):
    monkeypatch.setattr("magi.offload.packing._PIECE", 100)
    read = reader()
    layout, block, asked = block_layouts(read)[0], read.block(0), []
    data = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.fill(data, block, lambda: asked.append(1))
    assert same([raw(layout.block(data))], [raw(block)])
    assert len(asked) == sum(-(-t.numel() // 100) for t in tensors_in(block))


def test_blocks_that_are_dropped_leave_no_thread(reader):
    arriving = iter(StreamedBlocks(reader(), *PLACES["mixed"], 2, bus=LazyBus(), pin=Pins()))
    next(arriving)
    del arriving
    gc.collect()
    assert not threads()


# -- the host's memory -----------------------------------------------------------------------------------------------


def test_layers_on_the_host_are_read_once_and_their_memory_locked_once(reader):
    read, pins, seen, bus = reader(), Pins(), [], LazyBus()
    blocks = StreamedBlocks(read, (0,), (1, 2, 3, 4, 5), 2, lambda *done: seen.append(done), bus=bus, pin=pins)
    assert seen == [(n, 6) for n in range(1, 7)]
    assert len(pins.locked) == pins.asked == 5
    assert sum(pins.locked.values()) == blocks.host_bytes
    reads = dict(read.source.reads)
    for _ in range(2):
        iterate(blocks, bus)
    assert read.source.reads == reads
    del blocks
    gc.collect()
    assert not pins.locked


def test_layers_of_the_file_take_two_buffers_and_no_more(reader):
    read, pins, bus = reader(), Pins(), LazyBus()
    blocks = StreamedBlocks(read, (), (), 2, bus=bus, pin=pins)
    assert blocks.host_bytes == sum(pins.locked.values()) == 2 * packed_bytes(read.block(0))
    read.source.reads.clear()
    iterate(blocks, bus)
    iterate(blocks, bus)
    assert len(set(read.source.reads.values())) == 1
    assert set(read.source.reads) == set(range(LAYERS))
    del blocks
    gc.collect()
    assert not pins.locked


def test_cancelling_while_layers_are_read_frees_all(reader):
    pins = Pins()

    def cancel(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:  # as is all that its traceback leads to
        StreamedBlocks(reader(), (0, 1), (2, 3, 4, 5), 2, cancel, bus=LazyBus(), pin=pins)
    assert pins.asked == 2
    assert not pins.locked
    del held


@pytest.mark.parametrize("weights", WEIGHTS)
def test_memory_that_cannot_be_locked_is_done_without(weights, reader):
    read, bus, pins = reader(**weights), LazyBus(), Pins(refuse_at=2)
    instead = "ordinary memory" if "store_fp8" in weights else "the file"
    with pytest.warns(UserWarning, match=rf"\(no more\)\. They are taken from {instead} .* is slower") as caught:
        blocks = StreamedBlocks(read, (), range(LAYERS), 2, bus=bus, pin=pins)
    assert len(caught) == 1
    assert len(pins.locked) == 2
    read.source.reads.clear()
    assert same(iterate(blocks, bus), wanted(reader(**weights)))
    assert set(read.source.reads) == ({5} if "store_fp8" in weights else {2, 3, 4, 5})


@pytest.mark.parametrize("weights", WEIGHTS)
def test_buffers_that_cannot_be_locked_are_ordinary_memory(weights, reader):
    read, bus = reader(**weights), LazyBus()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if "store_fp8" not in weights else "ignore")
        blocks = StreamedBlocks(read, (), (), 2, bus=bus, pin=Pins(refuse_at=0))
    assert same(iterate(blocks, bus), wanted(read))


def test_a_device_that_locks_no_memory_takes_the_file_without_a_word(reader):
    read, bus = reader(), LazyBus()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = StreamedBlocks(read, (), range(LAYERS), 2, bus=bus)
    assert blocks.host_bytes == 2 * packed_bytes(read.block(0))
    assert same(iterate(blocks, bus), wanted(read))


def test_other_errors_while_memory_is_locked_are_not_taken_for_that(reader):
    def fail(done, total):
        raise RuntimeError("of somebody else")

    with pytest.raises(RuntimeError, match="of somebody else"):
        StreamedBlocks(reader(), (), (0, 1), 2, fail, bus=LazyBus(), pin=Pins())


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
def test_float8_storage_is_made_once_however_often_layers_are_fetched(device, reader, monkeypatch):
    made = []
    quantise = StoredFp8.quantise.__func__
    read = reader(store_fp8=True)
    monkeypatch.setattr(
        StoredFp8, "quantise", classmethod(lambda cls, w, to: made.append(w.device.type) or quantise(cls, w, to))
    )
    bus = None if device == "cpu" else LazyBus(eager=True)
    blocks = StreamedBlocks(read, (1,), (), 2, bus=bus, pin=Pins())
    for _ in range(2):
        assert [isinstance(block.fc1, StoredFp8) for block in blocks] == [False, *[True] * 4, False]
    blocks.keep_on_device(())
    assert [isinstance(block.fc1, StoredFp8) for block in blocks] == [False, *[True] * 4, False]
    assert made.count("cpu") == 4 * 7, "seven matrices of the four layers in the middle"


@pytest.mark.parametrize("weights", [{"fp8": True}, {"store_fp8": True}])
def test_a_device_without_float8_gets_bytes(weights, reader, monkeypatch):
    reference = wanted(reader(**weights))
    monkeypatch.setattr("magi.offload.packing.supports_float8", lambda kind: False)
    bus, pins = LazyBus(eager=True), Pins()
    for place in PLACES.values():
        blocks = StreamedBlocks(reader(**weights), *place, 2, bus=bus, pin=pins)
        found = []
        for layer, block in enumerate(blocks):
            found.append(raw(block))
            assert FLOAT8 not in {t.dtype for t in tensors_in(block)}
            if 0 < layer < LAYERS - 1:
                assert isinstance(block.fc1, Fp8Weight | StoredFp8)
                assert block.fc1.weight.dtype == torch.uint8
        if "fp8" in weights:
            assert same(found, reference)


# -- less room than was thought --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kept", [(), (0,), (0, 3, 5), range(LAYERS)])
def test_layers_may_leave_the_device(kept, weights, reader):
    read, bus = reader(**weights), LazyBus()
    reference = wanted(read)
    blocks = StreamedBlocks(read, range(LAYERS), (), 2, bus=bus, pin=Pins())
    before = blocks.nbytes
    assert before == sum(packed_bytes(block) for block in blocks_of(read))
    assert same(iterate(blocks, bus), reference)
    blocks.keep_on_device(kept)
    assert blocks.on_device == set(kept)
    sizes = [packed_bytes(block) for block in blocks_of(read)]
    gone = [size for layer, size in enumerate(sizes) if layer not in kept]
    assert blocks.nbytes == before - sum(gone) + arena_bytes(gone, 2)
    read.source.reads.clear()
    assert same(iterate(blocks, bus), reference)
    assert len(bus.uploads) == len(gone)
    stored = {1, 2, 3, 4} if "store_fp8" in weights else set()
    assert set(read.source.reads) == set(range(LAYERS)) - set(kept) - stored


def test_layers_may_leave_while_an_iteration_is_stuck(reader):
    read, bus = reader(), LazyBus()
    blocks = StreamedBlocks(read, (0, 1, 2), (3, 4, 5), 2, bus=bus, pin=Pins())
    stuck = iter(blocks)
    for _ in range(4):
        next(stuck)
    blocks.keep_on_device((2,))
    assert not threads()
    assert same(iterate(blocks, bus), wanted(read))
    with pytest.raises(RuntimeError, match="another one has begun"):
        next(stuck)


def test_room_that_is_not_there_when_layers_leave_is_asked_for_again(reader, monkeypatch):
    read, bus = reader(), LazyBus()
    blocks = StreamedBlocks(read, range(LAYERS), (), 2, bus=bus, pin=Pins())

    def full(*args):
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("magi.offload.streamed_blocks.Feed", full)
        with pytest.raises(MemoryError):
            blocks.keep_on_device((0,))
        with pytest.raises(MemoryError):
            next(iter(blocks))
    assert same(iterate(blocks, bus), wanted(read))


# -- on a CPU, and modes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
def test_on_a_cpu_layers_are_simply_read(weights, reader):
    read, seen = reader(**weights), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = StreamedBlocks(read, (0, 2), (1, 3), 2, lambda *done: seen.append(done))
    stored = {0, 1, 2, 3, 4} if "store_fp8" in weights else {0, 2}
    assert seen == [(n, len(stored)) for n in range(1, len(stored) + 1)]
    assert blocks.on_device == stored
    assert blocks.host_bytes == 0
    reference = wanted(reader(**weights))
    read.source.reads.clear()
    found = []
    for block in blocks:
        found.append(raw(block))
        assert not threads()
    assert same(found, reference)
    assert set(read.source.reads) == set(range(LAYERS)) - stored
    blocks.keep_on_device(())
    assert same([raw(block) for block in blocks], reference)


@pytest.mark.parametrize("made_in", [True, False])
def test_inference_mode_may_come_and_go(made_in, reader):
    read, bus = reader(), LazyBus(eager=True)
    reference = wanted(read)
    with torch.inference_mode(made_in):
        blocks = StreamedBlocks(read, *PLACES["mixed"], 2, bus=bus, pin=Pins())
    for used_in in (True, False):
        with torch.inference_mode(used_in):
            found = []
            for block in blocks:
                found.append(raw(block))
            assert same(found, reference)
            blocks.keep_on_device((1,))


def test_no_slots(reader):
    with pytest.raises(ValueError, match="slots is 0"):
        StreamedBlocks(reader(), (), (), 0, bus=LazyBus())


def test_alignment(reader):
    for block in StreamedBlocks(reader(fp8=True), *PLACES["mixed"], 2, bus=LazyBus(eager=True), pin=Pins()):
        first = next(tensors_in(block)).data_ptr()
        assert all((t.data_ptr() - first) % 256 == 0 for t in tensors_in(block)), "matrix kernels like it"


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("place", PLACES)
def test_streamed_is_resident_on_the_gpu(place, weights, reader):
    read = reader(**weights, device=torch.device("cuda"))
    reference = wanted(read)
    blocks = StreamedBlocks(read, *PLACES[place], 2)
    busy = torch.randn(4096, 4096, device="cuda")
    for turn in range(3):
        found = []
        for block in blocks:
            busy = (busy @ busy).clamp_(-1, 1)  # the device is behind the host
            found.append(raw(block))
        assert same(found, reference)
        if turn == 1:
            blocks.keep_on_device((1,))


def test_compiled_layers_are_the_same_from_wherever_they_come(
    reader, tiny_config, tiny_caption, tiny_tokens, monkeypatch
):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not work with this Python")
    compiled = []

    def traced(function, **options):  # by torch's own tracer, without a C++ compiler
        compiled.append(function)
        return compile_(function, backend="eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    config = tiny_config(True, shape={"num_layers": LAYERS}, num_steps=4, num_frames=24)
    read = reader(dtype=torch.float32)

    def run(compiled):
        blocks = StreamedBlocks(read, *PLACES["mixed"], 2, bus=LazyBus(eager=True), pin=Pins())
        model = Transformer(config, read.outer(), blocks, CPU, read.dtype, compiled=compiled)
        return next(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)).latents

    torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=1e-5)
    assert compiled == [layer_forward]
