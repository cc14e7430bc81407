import gc
import threading
import time
import warnings
from itertools import pairwise

import pytest
import torch

from magi.errors import MagiError
from magi.offload.copy_engine import InOrderCopies
from magi.offload.packing import block_layouts, packed_bytes
from magi.offload.streamed_blocks import StreamedBlocks, ring_bytes
from magi.sampling.prepare import generate_latents
from magi.transformer.block import layer_forward
from magi.transformer.float8 import FLOAT8, Fp8Weight, StoredFp8
from magi.transformer.model import Transformer
from magi.transformer.weights import WeightReader, tensors_in
from tests.conftest import MemorySource
from tests.support.lazy_engine import LazyCopyEngine, Pins

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
    """Returns fp8 -> a checkpoint's tensors, bfloat16 where they are not float8 or scales."""

    def low(name, t):
        return t.bfloat16() if t.dtype == torch.float32 and not name.endswith(("_scale", "bands")) else t

    return {fp8: {name: low(name, t) for name, t in random_weights(shape, fp8).items()} for fp8 in (False, True)}


@pytest.fixture
def reader(shape, stored):
    """Returns (dtype, fp8, store_fp8, device) -> a reader of six layers."""

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


def iterate(blocks, copy_engine):
    """Returns every layer's bytes as compute work sees them, however late it is executed."""
    found = []
    for block in blocks:
        for _ in range(3):  # the engine executes some at once and some later
            copy_engine.compute(lambda block=block: found.append(raw(block)))
    copy_engine.synchronize()
    assert len(found) == 3 * len(blocks)
    assert same(found[::3], found[1::3])
    assert same(found[::3], found[2::3])
    return found[::3]


def wanted(read):
    return [raw(block) for block in blocks_of(read)]


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.001)


# -- the same bits from every place ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("place", PLACES)
def test_layers_are_yielded_in_order_from_every_place(place, weights, slots, reader):
    read = reader(**weights)
    reference = wanted(read)
    for seed in range(3):
        copy_engine, pins = LazyCopyEngine(seed), Pins()
        blocks = StreamedBlocks(read, *PLACES[place], slots, copy_engine=copy_engine, pin=pins)
        assert len(blocks) == LAYERS
        streamed = LAYERS - len(blocks.on_device)
        for n in range(1, 3):
            assert same(iterate(blocks, copy_engine), reference)
            assert len(copy_engine.uploads) == n * streamed, "one copy per layer and iteration"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_layers_are_uploaded_to_the_ring_buffer_and_never_copied_back(weights, reader):
    copy_engine = LazyCopyEngine()
    blocks = StreamedBlocks(reader(**weights), (2,), (1, 3), 2, copy_engine=copy_engine, pin=Pins())
    sizes = [packed_bytes(block) for block in blocks_of(reader(**weights))]
    del sizes[2]
    ring = ring_bytes(sizes, 2)
    for _ in range(3):
        iterate(blocks, copy_engine)
    rings = {upload.storage for upload in copy_engine.uploads}
    assert len(rings) == 1
    assert rings.isdisjoint({upload.source_storage for upload in copy_engine.uploads})
    assert all(upload.start + upload.nbytes <= ring for upload in copy_engine.uploads)
    assert [upload.nbytes for upload in copy_engine.uploads] == 3 * sizes
    assert blocks.nbytes == ring + packed_bytes(reader(**weights).block(2))


@pytest.mark.parametrize("copy_engine", [InOrderCopies(CPU), LazyCopyEngine(overlaps=False, eager=True)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_device_without_streams_needs_no_thread_for_copies(weights, copy_engine, reader):
    read = reader(**weights)
    blocks = StreamedBlocks(read, *PLACES["mixed"], 2, copy_engine=copy_engine, pin=Pins())
    found = []
    for block in blocks:
        found.append(raw(block))
        assert set(threads()) <= {"magi-read"}
    assert same(found, wanted(read))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_run_gives_the_same_bits_from_every_place(place, weights, reader, tiny_config, tiny_caption, tiny_tokens):
    config = tiny_config(True, shape={"num_layers": LAYERS}, num_steps=4, num_frames=24)
    read = reader(**weights)

    def run(blocks):
        model = Transformer(config, read.outer(), blocks, CPU, read.dtype)
        return next(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)).latents

    streamed = StreamedBlocks(read, *PLACES[place], 2, copy_engine=LazyCopyEngine(eager=True), pin=Pins())
    assert torch.equal(run(streamed), run(StreamedBlocks(read, range(LAYERS), (), 1)))


# -- prefetching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("place", ["host", "file"])
def test_the_next_layers_are_uploaded_while_one_is_in_use(place, slots, reader):
    copy_engine = LazyCopyEngine()
    blocks = StreamedBlocks(reader(), *PLACES[place], slots, copy_engine=copy_engine, pin=Pins())
    for turn, _ in enumerate(blocks):
        coming = min(LAYERS, turn + slots)
        until(lambda coming=coming: len(copy_engine.uploads) >= coming)
        time.sleep(0.01)
        assert len(copy_engine.uploads) == coming, "no more than there are slots"


def test_uploads_start_while_a_resident_layer_is_in_use(reader):
    copy_engine = LazyCopyEngine()
    for n, _ in enumerate(StreamedBlocks(reader(), (0, 1), (2, 3, 4, 5), 2, copy_engine=copy_engine, pin=Pins())):
        if n == 0:
            until(lambda: len(copy_engine.uploads) == 2)


@pytest.mark.parametrize("slots", [2, 3])
def test_layers_of_different_sizes_fit_into_the_ring_buffer(slots, reader):
    copy_engine = LazyCopyEngine()
    blocks = StreamedBlocks(reader(fp8=True), (), range(LAYERS), slots, copy_engine=copy_engine, pin=Pins())
    for turn, _ in enumerate(blocks):
        if turn == 2:
            until(lambda: len(copy_engine.uploads) == 2 + slots)  # layers 2 to 4 have one size
        time.sleep(0.01)
        in_use = sorted((u.start, u.start + u.nbytes) for u in copy_engine.uploads[turn:])
        assert all(a[1] <= b[0] for a, b in pairwise(in_use)), "slots do not overlap"
        assert in_use[-1][1] <= blocks.nbytes
        assert len(in_use) <= slots


def test_the_file_is_read_ahead_of_the_copies(reader):
    """Both host buffers are filled while layers from the host are in use."""
    read, copy_engine = reader(), LazyCopyEngine()
    blocks = StreamedBlocks(read, (), (0, 1, 2, 3), 2, copy_engine=copy_engine, pin=Pins())
    read.source.reads.clear()
    iteration = iter(blocks)
    next(iteration)
    until(lambda: set(read.source.reads) == {4, 5})
    assert len(copy_engine.uploads) <= 2
    iteration.close()


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
def test_size_of_the_ring_buffer(sizes, slots, nbytes):
    assert ring_bytes(sizes, slots) == nbytes


# -- early exits and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["host", "file", "mixed"])
@pytest.mark.parametrize("layers", range(1, LAYERS))
def test_an_iteration_may_be_closed_early(layers, place, reader):
    read = reader()
    reference = wanted(read)
    for seed in range(3):
        copy_engine = LazyCopyEngine(seed)
        blocks = StreamedBlocks(read, *PLACES[place], 2, copy_engine=copy_engine, pin=Pins())
        found = []
        for _ in range(3):
            iteration = iter(blocks)
            for _ in range(layers):
                block = next(iteration)
                copy_engine.compute(lambda block=block, found=found: found.append(raw(block)))
            iteration.close()
            assert not threads()
        assert same(iterate(blocks, copy_engine), reference)
        assert same(found, 3 * reference[:layers]), "also in compute work submitted before the close"


def test_a_new_iteration_works_while_an_error_of_the_last_one_is_handled(reader):
    read, copy_engine = reader(), LazyCopyEngine()
    blocks = StreamedBlocks(read, *PLACES["mixed"], 2, copy_engine=copy_engine, pin=Pins())

    def forward():
        for layer, block in enumerate(blocks):
            copy_engine.compute(lambda block=block: raw(block))
            if layer == 3:
                raise KeyboardInterrupt

    try:
        forward()
    except KeyboardInterrupt:
        assert same(iterate(blocks, copy_engine), wanted(read))
        assert not threads()


def test_a_new_iteration_closes_the_old_one(reader):
    read, copy_engine = reader(), LazyCopyEngine()
    blocks = StreamedBlocks(read, *PLACES["mixed"], 2, copy_engine=copy_engine, pin=Pins())
    old = iter(blocks)
    next(old)
    assert same(iterate(blocks, copy_engine), wanted(read))
    with pytest.raises(RuntimeError, match="another one has begun"):
        list(old)


def test_an_error_of_the_file_is_raised(reader):
    read, copy_engine = reader(), LazyCopyEngine()
    blocks = StreamedBlocks(read, *PLACES["file"], 2, copy_engine=copy_engine, pin=Pins())
    read.source.damaged, got = 3, 0
    for _ in range(2):
        with pytest.raises(MagiError, match="layer 3 is damaged"):
            got += sum(1 for _ in blocks)
        assert not threads()
    read.source.damaged = None
    assert same(iterate(blocks, copy_engine), wanted(read))


@pytest.mark.parametrize("place", ["host", "file"])
def test_an_error_of_an_upload_is_raised(place, reader):
    read, copy_engine, seen = reader(), LazyCopyEngine(), []
    blocks = StreamedBlocks(read, *PLACES[place], 2, copy_engine=copy_engine, pin=Pins())
    copy_engine.fail_at = 2
    with pytest.raises(RuntimeError, match="the copy engine is broken"):
        seen.extend(1 for _ in blocks)
    assert not threads()
    copy_engine.fail_at = None
    assert same(iterate(blocks, copy_engine), wanted(read))


def test_close_does_not_wait_for_a_large_layer(reader):
    read = reader()
    blocks = StreamedBlocks(read, (), (0,), 2, copy_engine=LazyCopyEngine(), pin=Pins())
    read.source.delay = 0.1  # seconds per tensor; a layer has 29
    iteration = iter(blocks)
    next(iteration)
    until(lambda: 1 in read.source.reads)
    began = time.monotonic()
    iteration.close()
    assert time.monotonic() - began < 1
    assert not threads()


def test_copying_a_large_tensor_can_be_interrupted(reader, monkeypatch):
    monkeypatch.setattr("magi.offload.packing._PIECE_ELEMENTS", 100)
    read = reader()
    layout, block, asked = block_layouts(read)[0], read.block(0), []
    data = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.pack_into(data, block, lambda: asked.append(1))
    assert same([raw(layout.unpack(data))], [raw(block)])
    assert len(asked) == sum(-(-t.numel() // 100) for t in tensors_in(block))


def test_garbage_collection_ends_the_threads(reader):
    iteration = iter(StreamedBlocks(reader(), *PLACES["mixed"], 2, copy_engine=LazyCopyEngine(), pin=Pins()))
    next(iteration)
    del iteration
    gc.collect()
    assert not threads()


# -- host memory -----------------------------------------------------------------------------------------------------


def test_layers_on_the_host_are_read_and_pinned_once(reader):
    read, pins, seen, copy_engine = reader(), Pins(), [], LazyCopyEngine()
    blocks = StreamedBlocks(
        read, (0,), (1, 2, 3, 4, 5), 2, lambda *done: seen.append(done), copy_engine=copy_engine, pin=pins
    )
    assert seen == [(n, 6) for n in range(1, 7)]
    assert len(pins.pinned) == pins.asked == 5
    assert sum(pins.pinned.values()) == blocks.host_bytes
    reads = dict(read.source.reads)
    for _ in range(2):
        iterate(blocks, copy_engine)
    assert read.source.reads == reads
    del blocks
    gc.collect()
    assert not pins.pinned


def test_layers_from_the_file_use_two_host_buffers(reader):
    read, pins, copy_engine = reader(), Pins(), LazyCopyEngine()
    blocks = StreamedBlocks(read, (), (), 2, copy_engine=copy_engine, pin=pins)
    assert blocks.host_bytes == sum(pins.pinned.values()) == 2 * packed_bytes(read.block(0))
    read.source.reads.clear()
    iterate(blocks, copy_engine)
    iterate(blocks, copy_engine)
    assert len(set(read.source.reads.values())) == 1
    assert set(read.source.reads) == set(range(LAYERS))
    del blocks
    gc.collect()
    assert not pins.pinned


@pytest.mark.parametrize("place", ["host", "file", "mixed"])
def test_between_two_runs_nothing_need_be_pinned(place, reader):
    read, pins, copy_engine = reader(), Pins(), LazyCopyEngine()
    blocks = StreamedBlocks(read, *PLACES[place], 2, copy_engine=copy_engine, pin=pins)
    locked = dict(pins.pinned)
    assert blocks.pinned_bytes == sum(locked.values()) == blocks.host_bytes
    blocks.unpin()
    assert (pins.pinned, blocks.pinned_bytes) == ({}, 0)
    assert same(iterate(blocks, copy_engine), wanted(read)), "slower, and the same"
    reads, asked = sum(read.source.reads.values()), pins.asked
    for _ in range(2):
        blocks.pin()
    assert pins.pinned == locked
    assert pins.asked == 2 * asked, "what is pinned is not pinned again"
    assert sum(read.source.reads.values()) == reads, "nothing is read for it"
    pins.refuse_at = pins.asked
    blocks.unpin()
    with pytest.warns(UserWarning, match="stays pageable"):
        blocks.pin()  # refused, which is no error
    assert pins.pinned == {}
    assert same(iterate(blocks, copy_engine), wanted(read))


def test_cancelling_while_layers_are_read_unpins_all_memory(reader):
    pins = Pins()

    def cancel(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:  # a kept traceback must not keep memory pinned
        StreamedBlocks(reader(), (0, 1), (2, 3, 4, 5), 2, cancel, copy_engine=LazyCopyEngine(), pin=pins)
    assert pins.asked == 2
    assert not pins.pinned
    del held


@pytest.mark.parametrize("weights", WEIGHTS)
def test_layers_that_cannot_be_pinned_are_copied_from_elsewhere(weights, reader):
    read, copy_engine, pins = reader(**weights), LazyCopyEngine(), Pins(refuse_at=2)
    instead = "ordinary memory" if "store_fp8" in weights else "the file"
    with pytest.warns(UserWarning, match=rf"\(no more\)\. They are copied from {instead} .* is slower") as caught:
        blocks = StreamedBlocks(read, (), range(LAYERS), 2, copy_engine=copy_engine, pin=pins)
    assert len(caught) == 1
    assert len(pins.pinned) == 2
    read.source.reads.clear()
    assert same(iterate(blocks, copy_engine), wanted(reader(**weights)))
    assert set(read.source.reads) == ({5} if "store_fp8" in weights else {2, 3, 4, 5})


@pytest.mark.parametrize("weights", WEIGHTS)
def test_file_buffers_fall_back_to_pageable_memory(weights, reader):
    read, copy_engine = reader(**weights), LazyCopyEngine()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if "store_fp8" not in weights else "ignore")
        blocks = StreamedBlocks(read, (), (), 2, copy_engine=copy_engine, pin=Pins(refuse_at=0))
    assert same(iterate(blocks, copy_engine), wanted(read))


def test_a_device_without_pinned_memory_reads_the_file_without_a_warning(reader):
    read, copy_engine = reader(), LazyCopyEngine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = StreamedBlocks(read, (), range(LAYERS), 2, copy_engine=copy_engine)
    assert blocks.host_bytes == 2 * packed_bytes(read.block(0))
    assert same(iterate(blocks, copy_engine), wanted(read))


def test_errors_of_the_progress_callback_are_no_pinning_errors(reader):
    def fail(done, total):
        raise RuntimeError("of the callback")

    with pytest.raises(RuntimeError, match="of the callback"):
        StreamedBlocks(reader(), (), (0, 1), 2, fail, copy_engine=LazyCopyEngine(), pin=Pins())


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
def test_layers_are_quantised_once_however_often_they_are_used(device, reader, monkeypatch):
    made = []
    quantise = StoredFp8.quantise.__func__
    read = reader(store_fp8=True)
    monkeypatch.setattr(
        StoredFp8, "quantise", classmethod(lambda cls, w, to: made.append(w.device.type) or quantise(cls, w, to))
    )
    copy_engine = None if device == "cpu" else LazyCopyEngine(eager=True)
    blocks = StreamedBlocks(read, (1,), (), 2, copy_engine=copy_engine, pin=Pins())
    for _ in range(2):
        assert [isinstance(block.fc1, StoredFp8) for block in blocks] == [False, *[True] * 4, False]
    blocks.keep_on_device(())
    assert [isinstance(block.fc1, StoredFp8) for block in blocks] == [False, *[True] * 4, False]
    assert made.count("cpu") == 4 * 7, "seven matrices of the four layers in the middle"


@pytest.mark.parametrize("weights", [{"fp8": True}, {"store_fp8": True}])
def test_a_device_without_float8_gets_bytes(weights, reader, monkeypatch):
    reference = wanted(reader(**weights))
    monkeypatch.setattr("magi.offload.packing.supports_float8", lambda kind: False)
    copy_engine, pins = LazyCopyEngine(eager=True), Pins()
    for place in PLACES.values():
        blocks = StreamedBlocks(reader(**weights), *place, 2, copy_engine=copy_engine, pin=pins)
        found = []
        for layer, block in enumerate(blocks):
            found.append(raw(block))
            assert FLOAT8 not in {t.dtype for t in tensors_in(block)}
            if 0 < layer < LAYERS - 1:
                assert isinstance(block.fc1, Fp8Weight | StoredFp8)
                assert block.fc1.weight.dtype == torch.uint8
        if "fp8" in weights:
            assert same(found, reference)


# -- freeing device memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kept", [(), (0,), (0, 3, 5), range(LAYERS)])
def test_layers_can_be_freed_on_the_device(kept, weights, reader):
    read, copy_engine = reader(**weights), LazyCopyEngine()
    reference = wanted(read)
    blocks = StreamedBlocks(read, range(LAYERS), (), 2, copy_engine=copy_engine, pin=Pins())
    before = blocks.nbytes
    assert before == sum(packed_bytes(block) for block in blocks_of(read))
    assert same(iterate(blocks, copy_engine), reference)
    blocks.keep_on_device(kept)
    assert blocks.on_device == set(kept)
    sizes = [packed_bytes(block) for block in blocks_of(read)]
    gone = [size for layer, size in enumerate(sizes) if layer not in kept]
    assert blocks.nbytes == before - sum(gone) + ring_bytes(gone, 2)
    read.source.reads.clear()
    assert same(iterate(blocks, copy_engine), reference)
    assert len(copy_engine.uploads) == len(gone)
    stored = {1, 2, 3, 4} if "store_fp8" in weights else set()
    assert set(read.source.reads) == set(range(LAYERS)) - set(kept) - stored


def test_layers_can_be_freed_during_an_iteration(reader):
    read, copy_engine = reader(), LazyCopyEngine()
    blocks = StreamedBlocks(read, (0, 1, 2), (3, 4, 5), 2, copy_engine=copy_engine, pin=Pins())
    old = iter(blocks)
    for _ in range(4):
        next(old)
    blocks.keep_on_device((2,))
    assert not threads()
    assert same(iterate(blocks, copy_engine), wanted(read))
    with pytest.raises(RuntimeError, match="another one has begun"):
        next(old)


def test_a_failed_allocation_of_the_ring_buffer_is_retried(reader, monkeypatch):
    read, copy_engine = reader(), LazyCopyEngine()
    blocks = StreamedBlocks(read, range(LAYERS), (), 2, copy_engine=copy_engine, pin=Pins())

    def full(*args):
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("magi.offload.streamed_blocks.RingBuffer", full)
        with pytest.raises(MemoryError):
            blocks.keep_on_device((0,))
        with pytest.raises(MemoryError):
            next(iter(blocks))
    assert same(iterate(blocks, copy_engine), wanted(read))


# -- CPU, inference mode, alignment, GPU, torch.compile --------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
def test_on_a_cpu_layers_are_read_at_every_use(weights, reader):
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
def test_inference_mode_may_be_switched(made_in, reader):
    read, copy_engine = reader(), LazyCopyEngine(eager=True)
    reference = wanted(read)
    with torch.inference_mode(made_in):
        blocks = StreamedBlocks(read, *PLACES["mixed"], 2, copy_engine=copy_engine, pin=Pins())
    for used_in in (True, False):
        with torch.inference_mode(used_in):
            found = []
            for block in blocks:
                found.append(raw(block))
            assert same(found, reference)
            blocks.keep_on_device((1,))


def test_zero_slots_are_refused(reader):
    with pytest.raises(ValueError, match="slots is 0"):
        StreamedBlocks(reader(), (), (), 0, copy_engine=LazyCopyEngine())


def test_tensors_are_aligned(reader):
    for block in StreamedBlocks(
        reader(fp8=True), *PLACES["mixed"], 2, copy_engine=LazyCopyEngine(eager=True), pin=Pins()
    ):
        first = next(tensors_in(block)).data_ptr()
        assert all((t.data_ptr() - first) % 256 == 0 for t in tensors_in(block)), "matrix kernels prefer it"


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("place", PLACES)
def test_streamed_layers_equal_resident_ones_on_the_gpu(place, weights, reader):
    read = reader(**weights, device=torch.device("cuda"))
    reference = wanted(read)
    blocks = StreamedBlocks(read, *PLACES[place], 2)
    busy = torch.randn(4096, 4096, device="cuda")
    for turn in range(3):
        found = []
        for block in blocks:
            busy = (busy @ busy).clamp_(-1, 1)  # keeps the device behind the host
            found.append(raw(block))
        assert same(found, reference)
        if turn == 1:
            blocks.keep_on_device((1,))


def test_compiled_layers_agree_with_eager_ones(reader, tiny_config, tiny_caption, tiny_tokens, monkeypatch):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not work with this Python")
    compiled = []

    def traced(function, **options):  # traces only, which needs no C++ compiler
        compiled.append(function)
        return compile_(function, backend="eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    config = tiny_config(True, shape={"num_layers": LAYERS}, num_steps=4, num_frames=24)
    read = reader(dtype=torch.float32)

    def run(compiled):
        blocks = StreamedBlocks(read, *PLACES["mixed"], 2, copy_engine=LazyCopyEngine(eager=True), pin=Pins())
        model = Transformer(config, read.outer(), blocks, CPU, read.dtype, compiled=compiled)
        return next(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)).latents

    torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=1e-5)
    assert compiled == [layer_forward]
