import threading
import time

import pytest
import torch

from magi.errors import MagiError
from magi.offload.kv_cache import KVCache
from magi.planning.placement import MemoryOptions
from magi.sampling import sampler
from magi.sampling.prepare import generate_latents
from tests.support.lazy_engine import LazyBus, cache_with

LAYERS, SHAPE = 3, (2, 4, 6, 8)
ITEM = 2 * 4 * 6 * 8 * 2  # bytes of a layer and chunk


class Pins:
    """Stands in for page-locking."""

    def __init__(self, refuse: bool = False):
        self.refuse = refuse
        self.locked: dict[int, int] = {}

    def __call__(self, data):
        if self.refuse:
            raise RuntimeError("no more")
        self.locked[data.data_ptr()] = data.nbytes
        return lambda: self.locked.pop(data.data_ptr())


def cache(slots: int, **options) -> KVCache:
    return KVCache(LAYERS, slots, *SHAPE[1:], dtype=torch.bfloat16, device="cpu", **options)


@pytest.fixture(params=["device", "host", "moved"])
def make(request):
    """slots -> a cache on the device, on the host, or on its way there."""

    def made(slots):
        if request.param == "device":
            return cache(slots)
        return cache(slots, on_host=request.param == "host", bus=LazyBus(eager=True), pin=Pins())

    made.move = KVCache.move_to_host if request.param == "moved" else lambda kept: None
    return made


@pytest.fixture
def kv(randn):
    """(layer, chunk) -> keys and values, always the same."""
    return lambda layer, chunk: randn(*SHAPE, seed=f"{layer}/{chunk}").bfloat16()


def fill(kept, kv, chunks):
    for chunk in chunks:
        for layer in range(LAYERS):
            value = kv(layer, chunk)
            kept.store(layer, chunk, value)
            value.zero_()


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("magi-")]


@pytest.mark.parametrize("wanted", [(5,), (5, 6, 7), (7, 5), ()])
def test_the_last_chunks_are_kept_and_older_ones_forgotten(wanted, make, kv):
    kept = make(3)
    fill(kept, kv, range(8))
    make.move(kept)
    found = 0
    for layer, keys in enumerate(kept.stream(wanted)):
        assert set(keys) == set(wanted)
        assert all(torch.equal(keys[chunk], kv(layer, chunk)) for chunk in wanted)
        found += 1
    assert found == LAYERS
    for chunk in (0, 4, 8):
        with pytest.raises(LookupError, match=f"chunk {chunk} is not in the cache of layer 0"):
            kept.stream((*wanted, chunk))
    assert not threads()


def test_a_chunk_that_is_not_in_every_layer(make, kv):
    kept = make(1)
    for layer in (0, 2):
        kept.store(layer, 0, kv(layer, 0))
    with pytest.raises(LookupError, match="chunk 0 is not in the cache of layer 1"):
        kept.stream((0,))


def test_chunks_are_stored_while_others_are_in_use(make, kv):
    """As a forward call does it, layer by layer, for a video much longer than the ring."""
    kept = make(2)
    fill(kept, kv, range(2))
    for chunk in range(2, 12):
        if chunk == 7:
            make.move(kept)
        for layer, keys in enumerate(kept.stream((chunk - 2, chunk - 1))):
            assert all(torch.equal(keys[c], kv(layer, c)) for c in (chunk - 2, chunk - 1))
            kept.store(layer, chunk, kv(layer, chunk))


def test_a_cache_of_no_chunks(make, kv):
    kept = make(0)
    kept.store(0, 0, kv(0, 0))
    make.move(kept)
    assert kept.nbytes == kept.device_bytes == 0
    assert list(kept.stream(())) == [{}] * LAYERS
    with pytest.raises(LookupError):
        kept.stream((0,))


@pytest.mark.parametrize("chunks", [6, 60])
def test_size_does_not_depend_on_the_video(chunks, kv):
    ring = LAYERS * 3 * ITEM
    device = cache(3)
    pins = Pins()
    host = cache(3, on_host=True, bus=LazyBus(eager=True), pin=pins)
    for chunk in range(chunks):
        for kept in (device, host):
            fill(kept, kv, (chunk,))
            for _ in kept.stream(range(max(0, chunk - 1), chunk + 1)):
                pass
    assert device.nbytes == device.device_bytes == host.nbytes == ring
    assert host.device_bytes == 2 * 2 * ITEM
    assert sum(pins.locked.values()) == ring


def test_what_waits_on_the_host_costs_nothing_unless_it_is_wanted(kv):
    bus = LazyBus(eager=True)
    kept = cache(4, on_host=True, bus=bus, pin=Pins())
    fill(kept, kv, range(4))
    for keys in kept.stream(()):
        assert keys == {}
        assert not threads()
    assert bus.uploads == []
    assert kept.device_bytes == 0
    list(kept.stream((1, 3)))
    assert [upload.nbytes for upload in bus.uploads] == [ITEM] * 2 * LAYERS, "those two, once a layer"
    assert kept.device_bytes == 2 * 2 * ITEM
    list(kept.stream((1,)))
    assert len(bus.uploads) == 3 * LAYERS
    assert kept.device_bytes == 2 * 2 * ITEM, "its room is kept"
    list(kept.stream((0, 1, 2, 3)))
    assert kept.device_bytes == 2 * 4 * ITEM


def test_a_layer_is_brought_ahead_and_no_more(kv):
    bus = LazyBus(eager=True)
    kept = cache(1, on_host=True, bus=bus, pin=Pins())
    fill(kept, kv, (0,))
    for layer, _ in enumerate(kept.stream((0,))):
        coming = min(layer + 2, LAYERS)
        end = time.monotonic() + 5
        while len(bus.uploads) < coming:
            assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)
        assert len(bus.uploads) == coming


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_overwritten_that_is_in_use(seed, kv):
    bus = LazyBus(seed)
    kept = cache(3, on_host=True, bus=bus, pin=Pins())
    fill(kept, kv, range(3))
    found = []
    for wanted in ((0, 1), (2,), (0, 1, 2), (1,)):
        for layer, keys in enumerate(kept.stream(wanted)):
            for chunk in wanted:
                bus.compute(lambda k=keys[chunk], at=(layer, chunk): found.append(torch.equal(k, kv(*at))))
        if wanted == (2,):
            bus.drain()  # the ring of device memory grows: work that was given holds on to the old one
    bus.drain()
    assert found == [True] * (2 + 1 + 3 + 1) * LAYERS


def test_it_may_be_left_early(make, kv):
    kept = make(2)
    fill(kept, kv, range(2))
    make.move(kept)
    for _ in range(3):
        keys = kept.stream((0, 1))
        assert torch.equal(next(keys)[1], kv(0, 1))
        keys.close()
        assert not threads()
    kept.stream((0,)).close()
    fill(kept, kv, (2,))
    for layer, keys in enumerate(kept.stream((1, 2))):
        assert torch.equal(keys[1], kv(layer, 1))
        assert torch.equal(keys[2], kv(layer, 2))


def test_memory_that_cannot_be_locked_is_ordinary(kv):
    kept = cache(2, on_host=True, bus=LazyBus(eager=True), pin=Pins(refuse=True))
    fill(kept, kv, (0,))
    assert all(torch.equal(keys[0], kv(layer, 0)) for layer, keys in enumerate(kept.stream((0,))))


def test_locked_memory_is_let_go():
    pins = Pins()
    kept = cache(2, on_host=True, bus=LazyBus(), pin=pins)
    assert len(pins.locked) == 1
    del kept
    assert not pins.locked


@pytest.mark.parametrize("place", ["device", "host", "moved"])
@pytest.mark.parametrize("made_in", [True, False])
def test_inference_mode_may_come_and_go(made_in, place, kv):
    with torch.inference_mode(made_in):
        kept = cache(1, on_host=place == "host", bus=LazyBus(eager=True), pin=Pins())
        if place == "moved":
            kept.move_to_host()
    for used_in in (True, False):
        with torch.inference_mode(used_in):
            fill(kept, kv, (0,))
            assert all(torch.equal(keys[0], kv(layer, 0)) for layer, keys in enumerate(kept.stream((0,))))


def test_on_a_cpu_the_host_is_the_device(kv):
    kept = cache(1, on_host=True)
    fill(kept, kv, (0,))
    kept.move_to_host()
    assert kept.device_bytes == kept.nbytes
    before = next(kept.stream((0,)))[0]
    assert torch.equal(before, kv(0, 0))
    assert before.data_ptr() == next(kept.stream((0,)))[0].data_ptr(), "nothing is copied"


@pytest.mark.parametrize("distill", [False, True])
def test_a_cache_on_the_host_changes_no_bit(distill, tiny_config, tiny_model, tiny_caption, tiny_tokens, monkeypatch):
    config = tiny_config(distill, num_frames=96, window_size=2)
    bus = LazyBus(eager=True)

    def run(**options):
        model = tiny_model(config)
        monkeypatch.setattr(sampler, "KVCache", cache_with(**options))
        chunks = generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

    wanted = run()
    assert torch.equal(run(on_host=True, bus=bus, pin=Pins()), wanted)
    assert bus.uploads
    assert not threads()


def test_there_is_no_third_place():
    with pytest.raises(MagiError, match=r"cannot be kept on 'disk'\. Choose one of auto, device, host"):
        MemoryOptions(cache="disk")


@pytest.mark.gpu
@pytest.mark.parametrize("distill", [False, True])
def test_a_cache_on_the_host_changes_no_bit_on_the_gpu(distill, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    config = tiny_config(distill, num_frames=72, window_size=2)

    def run(place):
        model = tiny_model(config, device="cuda", dtype=torch.bfloat16, memory=MemoryOptions(cache=place))
        chunks = generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

    assert torch.equal(run("host"), run("device"))
