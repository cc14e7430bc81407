import threading
import time

import pytest
import torch

from magi.errors import MagiError
from magi.offload.kv_cache import KVCache
from magi.planning.placement import MemoryOptions
from magi.sampling import sampler
from magi.sampling.prepare import generate_latents
from tests.support.lazy_engine import LazyCopyEngine, Pins, cache_with

LAYERS, SHAPE = 3, (2, 4, 6, 8)
ITEM = 2 * 4 * 6 * 8 * 2  # bytes of a chunk's K/V in one layer


def cache(slots: int, **options) -> KVCache:
    return KVCache(LAYERS, slots, *SHAPE[1:], dtype=torch.bfloat16, device="cpu", **options)


@pytest.fixture(params=["device", "host", "moved"])
def make(request):
    """Returns (slots) -> a cache on the device, on the host, or on the device until `make.move` moves it."""

    def made(slots):
        if request.param == "device":
            return cache(slots)
        return cache(slots, on_host=request.param == "host", copy_engine=LazyCopyEngine(eager=True), pin=Pins())

    made.move = KVCache.move_to_host if request.param == "moved" else lambda kv_cache: None
    return made


@pytest.fixture
def kv(randn):
    """Returns (layer, chunk) -> K/V, (2, G, S, d), the same for the same arguments."""
    return lambda layer, chunk: randn(*SHAPE, seed=f"{layer}/{chunk}").bfloat16()


def fill(kv_cache, kv, chunks):
    for chunk in chunks:
        for layer in range(LAYERS):
            value = kv(layer, chunk)
            kv_cache.store(layer, chunk, value)
            value.zero_()


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("magi-")]


@pytest.mark.parametrize("wanted", [(5,), (5, 6, 7), (7, 5), ()])
def test_the_last_chunks_are_cached_and_older_ones_overwritten(wanted, make, kv):
    kv_cache = make(3)
    fill(kv_cache, kv, range(8))
    make.move(kv_cache)
    found = 0
    for layer, layer_kv in enumerate(kv_cache.stream(wanted)):
        assert set(layer_kv) == set(wanted)
        assert all(torch.equal(layer_kv[chunk], kv(layer, chunk)) for chunk in wanted)
        found += 1
    assert found == LAYERS
    for chunk in (0, 4, 8):
        with pytest.raises(LookupError, match=f"chunk {chunk} is not in the cache of layer 0"):
            kv_cache.stream((*wanted, chunk))
    assert not threads()


def test_a_chunk_must_be_cached_in_every_layer(make, kv):
    kv_cache = make(1)
    for layer in (0, 2):
        kv_cache.store(layer, 0, kv(layer, 0))
    with pytest.raises(LookupError, match="chunk 0 is not in the cache of layer 1"):
        kv_cache.stream((0,))


def test_chunks_can_be_stored_while_others_are_streamed(make, kv):
    """Stores layer by layer, as a forward call does, for a video much longer than the ring."""
    kv_cache = make(2)
    fill(kv_cache, kv, range(2))
    for chunk in range(2, 12):
        if chunk == 7:
            make.move(kv_cache)
        for layer, layer_kv in enumerate(kv_cache.stream((chunk - 2, chunk - 1))):
            assert all(torch.equal(layer_kv[c], kv(layer, c)) for c in (chunk - 2, chunk - 1))
            kv_cache.store(layer, chunk, kv(layer, chunk))


def test_a_cache_without_slots(make, kv):
    kv_cache = make(0)
    kv_cache.store(0, 0, kv(0, 0))
    make.move(kv_cache)
    assert kv_cache.nbytes == kv_cache.device_bytes == 0
    assert list(kv_cache.stream(())) == [{}] * LAYERS
    with pytest.raises(LookupError):
        kv_cache.stream((0,))


@pytest.mark.parametrize("chunks", [6, 60])
def test_size_does_not_depend_on_the_length_of_the_video(chunks, kv):
    ring = LAYERS * 3 * ITEM
    device = cache(3)
    pins = Pins()
    host = cache(3, on_host=True, copy_engine=LazyCopyEngine(eager=True), pin=pins)
    for chunk in range(chunks):
        for kv_cache in (device, host):
            fill(kv_cache, kv, (chunk,))
            for _ in kv_cache.stream(range(max(0, chunk - 1), chunk + 1)):
                pass
    assert device.nbytes == device.device_bytes == host.nbytes == ring
    assert host.device_bytes == 2 * 2 * ITEM
    assert sum(pins.pinned.values()) == ring


def test_only_requested_chunks_are_uploaded(kv):
    copy_engine = LazyCopyEngine(eager=True)
    kv_cache = cache(4, on_host=True, copy_engine=copy_engine, pin=Pins())
    fill(kv_cache, kv, range(4))
    for layer_kv in kv_cache.stream(()):
        assert layer_kv == {}
        assert not threads()
    assert copy_engine.uploads == []
    assert kv_cache.device_bytes == 0
    list(kv_cache.stream((1, 3)))
    assert [upload.nbytes for upload in copy_engine.uploads] == [ITEM] * 2 * LAYERS, "both chunks, once per layer"
    assert kv_cache.device_bytes == 2 * 2 * ITEM
    list(kv_cache.stream((1,)))
    assert len(copy_engine.uploads) == 3 * LAYERS
    assert kv_cache.device_bytes == 2 * 2 * ITEM, "the ring buffer is not reallocated"
    list(kv_cache.stream((0, 1, 2, 3)))
    assert kv_cache.device_bytes == 2 * 4 * ITEM


def test_one_layer_is_uploaded_ahead_and_no_more(kv):
    copy_engine = LazyCopyEngine(eager=True)
    kv_cache = cache(1, on_host=True, copy_engine=copy_engine, pin=Pins())
    fill(kv_cache, kv, (0,))
    for layer, _ in enumerate(kv_cache.stream((0,))):
        coming = min(layer + 2, LAYERS)
        end = time.monotonic() + 5
        while len(copy_engine.uploads) < coming:
            assert time.monotonic() < end, "no upload within 5 s"
        time.sleep(0.01)
        assert len(copy_engine.uploads) == coming


@pytest.mark.parametrize("seed", range(20))
def test_no_slot_is_overwritten_while_it_is_in_use(seed, kv):
    copy_engine = LazyCopyEngine(seed)
    kv_cache = cache(3, on_host=True, copy_engine=copy_engine, pin=Pins())
    fill(kv_cache, kv, range(3))
    found = []
    for wanted in ((0, 1), (2,), (0, 1, 2), (1,)):
        for layer, layer_kv in enumerate(kv_cache.stream(wanted)):
            for chunk in wanted:
                copy_engine.compute(lambda k=layer_kv[chunk], at=(layer, chunk): found.append(torch.equal(k, kv(*at))))
        if wanted == (2,):
            copy_engine.synchronize()  # the next call replaces the ring buffer, which submitted work may still read
    copy_engine.synchronize()
    assert found == [True] * (2 + 1 + 3 + 1) * LAYERS


def test_a_stream_may_be_closed_early(make, kv):
    kv_cache = make(2)
    fill(kv_cache, kv, range(2))
    make.move(kv_cache)
    for _ in range(3):
        layers = kv_cache.stream((0, 1))
        assert torch.equal(next(layers)[1], kv(0, 1))
        layers.close()
        assert not threads()
    kv_cache.stream((0,)).close()
    fill(kv_cache, kv, (2,))
    for layer, layer_kv in enumerate(kv_cache.stream((1, 2))):
        assert torch.equal(layer_kv[1], kv(layer, 1))
        assert torch.equal(layer_kv[2], kv(layer, 2))


def test_a_cache_falls_back_to_pageable_memory(kv):
    kv_cache = cache(2, on_host=True, copy_engine=LazyCopyEngine(eager=True), pin=Pins(refuse_at=0))
    fill(kv_cache, kv, (0,))
    assert all(torch.equal(layer_kv[0], kv(layer, 0)) for layer, layer_kv in enumerate(kv_cache.stream((0,))))


def test_pinned_memory_is_unpinned_with_the_cache():
    pins = Pins()
    kv_cache = cache(2, on_host=True, copy_engine=LazyCopyEngine(), pin=pins)
    assert len(pins.pinned) == 1
    del kv_cache
    assert not pins.pinned


@pytest.mark.parametrize("place", ["device", "host", "moved"])
@pytest.mark.parametrize("made_in", [True, False])
def test_inference_mode_may_be_switched(made_in, place, kv):
    with torch.inference_mode(made_in):
        kv_cache = cache(1, on_host=place == "host", copy_engine=LazyCopyEngine(eager=True), pin=Pins())
        if place == "moved":
            kv_cache.move_to_host()
    for used_in in (True, False):
        with torch.inference_mode(used_in):
            fill(kv_cache, kv, (0,))
            assert all(torch.equal(layer_kv[0], kv(layer, 0)) for layer, layer_kv in enumerate(kv_cache.stream((0,))))


def test_on_a_cpu_moving_to_the_host_changes_nothing(kv):
    kv_cache = cache(1, on_host=True)
    fill(kv_cache, kv, (0,))
    kv_cache.move_to_host()
    assert kv_cache.device_bytes == kv_cache.nbytes
    before = next(kv_cache.stream((0,)))[0]
    assert torch.equal(before, kv(0, 0))
    assert before.data_ptr() == next(kv_cache.stream((0,)))[0].data_ptr(), "nothing is copied"


@pytest.mark.parametrize("distill", [False, True])
def test_a_cache_on_the_host_gives_the_same_bits(
    distill, tiny_config, tiny_model, tiny_caption, tiny_tokens, monkeypatch
):
    config = tiny_config(distill, num_frames=96, window_size=2)
    copy_engine = LazyCopyEngine(eager=True)

    def run(**options):
        model = tiny_model(config)
        monkeypatch.setattr(sampler, "KVCache", cache_with(**options))
        chunks = generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

    wanted = run()
    assert torch.equal(run(on_host=True, copy_engine=copy_engine, pin=Pins()), wanted)
    assert copy_engine.uploads
    assert not threads()


def test_other_places_for_the_cache_are_refused():
    with pytest.raises(MagiError, match=r"cannot be kept on 'disk'\. Choose one of auto, device, host"):
        MemoryOptions(cache="disk")


@pytest.mark.gpu
@pytest.mark.parametrize("distill", [False, True])
def test_a_cache_on_the_host_gives_the_same_bits_on_the_gpu(
    distill, tiny_config, tiny_model, tiny_caption, tiny_tokens
):
    config = tiny_config(distill, num_frames=72, window_size=2)

    def run(place):
        model = tiny_model(config, device="cuda", dtype=torch.bfloat16, memory=MemoryOptions(cache=place))
        chunks = generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

    assert torch.equal(run("host"), run("device"))
