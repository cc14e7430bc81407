"""Out of memory: the run continues from the last finished iteration with less memory."""

import warnings
import weakref
from functools import partial

import pytest
import torch

from magi.errors import MagiError
from magi.model_files import load
from magi.model_files.load import load_transformer
from magi.offload.kv_cache import KVCache
from magi.offload.streamed_blocks import RingBuffer, StreamedBlocks
from magi.planning.placement import MemoryOptions
from magi.sampling import sampler
from magi.sampling.prepare import make_sampler
from magi.transformer import block
from magi.transformer.model import Transformer
from tests.conftest import MemorySource
from tests.support.lazy_engine import LazyCopyEngine, cache_with

LAYERS = 4
KV_BYTES = 2 * 4 * 24 * 8 * 4  # of a chunk in a layer
SAID = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "MPS": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, max allowed: 18.13 GB)."),
    "CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    "Windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "Python": MemoryError,
}
PLACES = {"forward": (Transformer, "forward"), "attend": (block, "attend"), "new_cache": (KVCache, "for_run")}
BOTH = pytest.mark.parametrize("distill", [False, True], ids=["base", "distill"])


@pytest.fixture
def copy_engine(monkeypatch):
    """A copy engine, used by models made from now on, so that layers and K/V can leave the device."""
    copy_engine, pin = LazyCopyEngine(eager=True), lambda data: lambda: None
    monkeypatch.setattr(load, "StreamedBlocks", partial(StreamedBlocks, copy_engine=copy_engine, pin=pin))
    monkeypatch.setattr(sampler, "KVCache", cache_with(copy_engine=copy_engine, pin=pin))
    return copy_engine


@pytest.fixture
def config(tiny_config):
    """(distill=False, **runtime) -> four layers, four chunks of 24 tokens, 14 iterations."""
    return lambda distill=False, **runtime: tiny_config(distill, shape={"num_layers": LAYERS}, **runtime)


@pytest.fixture
def built(tiny_model):
    """(config, **tiny_model's) -> a model with everything on the device."""
    memory = MemoryOptions(streaming=False, cache="device", token_block=4096)
    return lambda config, **options: tiny_model(config, memory=memory, **options)


@pytest.fixture
def start(built, tiny_caption, tiny_tokens):
    """(config, model=None, **make_sampler's) -> a run; what it reports is in its `reports`, and its events in
    `events`."""

    def make(config, model=None, **options):
        reports, events = [], []
        defaults = {"caption": tiny_caption(), "special_tokens": tiny_tokens, "seed": 3}
        defaults |= {"report": reports.append, "progress": events.append}
        sampler = make_sampler(model or built(config), config, **defaults | options)
        sampler.reports, sampler.events = reports, events
        return sampler

    return make


@pytest.fixture
def fail(monkeypatch):
    """(place, at=calls to fail, counted from 0, or a function of their number) -> the calls so far, one entry each."""

    def patch(place, at, error=SAID["CUDA"]):
        owner, name = PLACES[place]
        real, calls = getattr(owner, name), []
        fails = at if callable(at) else at.__contains__

        def counted(*args, **options):
            calls.append(place)
            if fails(len(calls) - 1):
                raise error()
            return real(*args, **options)

        monkeypatch.setattr(owner, name, counted)
        return calls

    return patch


def latents(sampler) -> list[torch.Tensor]:
    found = list(sampler)
    assert [chunk.index for chunk in found] == list(range(len(found)))
    return [chunk.latents for chunk in found]


# -- it continues ----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("place", "call"), [("forward", 0), ("forward", 5), ("attend", 100), ("new_cache", 0)])
def test_no_finished_iteration_is_made_twice(place, call, distill, config, start, fail):
    wanted = latents(start(config(distill)))
    calls = fail("forward", ())
    fail(place, [call])
    run = start(config(distill))
    assert all(map(torch.equal, latents(run), wanted))
    assert [event.iteration for event in run.events] == list(range(1, run.total + 1))
    assert len(calls) == run.total + (place == "attend")
    assert run.reports == ["cpu ran out of memory. From the last finished step on 2048 tokens are taken at a time."]


@pytest.mark.parametrize("kind", SAID)
def test_however_it_is_said(kind, config, start, fail):
    fail("forward", [3], SAID[kind])
    run = start(config(num_frames=24))
    assert latents(run)
    assert len(run.reports) == 1


def test_while_prefix_chunks_fill_the_cache(config, start, fail, randn):
    settings, prefix = config(num_frames=24), randn(1, 16, 24, 4, 4)
    calls = fail("forward", ())
    wanted = latents(start(settings, prefix=prefix))
    undisturbed = len(calls)
    fail("forward", [1])
    run = start(settings, prefix=prefix)
    assert all(map(torch.equal, latents(run), wanted))
    assert run.total + 1 < undisturbed
    assert len(calls) == 2 * undisturbed + 1, "the one that was taken in is shown to the model once more"


@BOTH
def test_layers_and_kv_leave_the_device_during_a_run(distill, copy_engine, config, start, fail):
    wanted = latents(start(config(distill)))
    assert not copy_engine.uploads
    fail("forward", [2, 3, 5, 7, 9, 14])  # the last as the first finished chunk is in the cache
    run = start(config(distill))
    assert all(map(torch.equal, latents(run), wanted))
    assert [text.partition("step on ")[2] for text in run.reports] == [
        "2048 tokens are taken at a time.",
        "1024 tokens are taken at a time.",
        "2 of 4 layers stay on the device.",
        "1 of 4 layers stay on the device.",
        "0 of 4 layers stay on the device.",
        "the K/V of finished chunks are kept on the host.",
    ]
    assert {upload.nbytes == KV_BYTES for upload in copy_engine.uploads} == {True, False}, "layers and K/V"


@BOTH
def test_fewer_tokens_at_a_time_decide_no_more_than_last_bits(distill, tiny_config, built, start, fail, monkeypatch):
    settings = tiny_config(distill, num_steps=4, num_frames=48, video_size_h=64, video_size_w=64)  # 96 tokens
    wanted = latents(start(settings))
    made = built(settings)
    made.token_block, made.cache_device = 128, "host"
    made.blocks.keep_on_device(())
    attend, tokens = block.attend, []
    monkeypatch.setattr(block, "attend", lambda q, *args: tokens.append(q.shape[1]) or attend(q, *args))
    fail("attend", [31])
    got = latents(start(settings, made))
    assert (set(tokens[:31]), set(tokens[31:])) == ({96}, {64, 32})
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_by_default_it_is_a_warning_at_the_loop(config, start, fail):
    fail("forward", [3])
    with pytest.warns(UserWarning, match=r"cpu ran out of memory\. From .* 2048 tokens are taken") as caught:
        list(start(config(num_frames=24), report=None))
    assert [warning.filename for warning in caught] == [__file__]


def test_what_had_been_made_is_gone_before_the_next_try(config, start, monkeypatch):
    attend, shrink, made, asked = block.attend, Transformer.shrink, [], []

    def failing(q, *args):
        made.append(weakref.ref(q))
        if len(made) == 150:
            raise SAID["CUDA"]()
        return attend(q, *args)

    def looked_at(model):
        asked.append(sum(tensor() is not None for tensor in made))
        return shrink(model)

    monkeypatch.setattr(block, "attend", failing)
    monkeypatch.setattr(Transformer, "shrink", looked_at)
    assert latents(start(config()))
    assert asked == [0]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"), ValueError("no"), KeyboardInterrupt(), MagiError("x")],
)
def test_other_errors_come_out_as_they_are(error, config, start, fail):
    calls = fail("forward", [3], lambda: error)
    run = start(config())
    with pytest.raises(type(error)) as caught:
        list(run)
    assert caught.value is error
    assert len(calls) == 4
    assert run.reports == []
    assert run.state.iteration == 3


# -- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_a_bus", [True, False])
def test_what_costs_least_comes_first_and_an_error_last(on_a_bus, request, config, built, start, fail):
    if on_a_bus:
        request.getfixturevalue("copy_engine")
    calls = fail("forward", lambda call: True)
    made = built(config())
    run = start(config(), made, width=48)
    with pytest.raises(MagiError, match=r"cpu ran out of memory at 48x32.*window of 1\. Try a smaller size"):
        list(run)
    done = [text.partition("step on ")[2] for text in run.reports]
    block_size, layers = "{} tokens are taken at a time.".format, "{} of 4 layers stay on the device.".format
    assert done[:10] == [
        *map(block_size, (2048, 1024)),
        *map(layers, (2, 1, 0)),
        "the K/V of finished chunks are kept on the host.",
        *map(block_size, (512, 256, 128, 64)),
    ]
    assert [text.partition(" chunks")[0] for text in done[10:]] == ["2 instead of 4", "1 instead of 2"]
    assert len(calls) == 13
    assert (made.token_block, made.cache_device, set(made.blocks.on_device)) == (64, "host", set())


def test_layers_that_cannot_leave_are_not_asked_again_and_again(config, built, start, fail):
    """What is quantised while loading stays in a CPU's memory."""

    def tired(text):
        reports.append(text)
        assert len(reports) < 50

    reports = []
    fail("forward", lambda call: True)
    made = built(config(), precision="fp8")
    with pytest.raises(MagiError, match="smaller size"):
        list(start(config(), made, report=tired))
    assert made.token_block == 64
    assert "1 instead of 2 chunks" in reports[-1]


def test_there_may_be_no_room_for_layers_to_pass_through(copy_engine, config, start, fail, monkeypatch):
    wanted = latents(start(config()))
    asked = []

    def full(*args):
        asked.append(args)
        if len(asked) < 3:
            raise SAID["CUDA"]()
        return RingBuffer(*args)

    monkeypatch.setattr("magi.offload.streamed_blocks.RingBuffer", full)
    fail("forward", [4, 5, 6])
    run = start(config())
    assert all(map(torch.equal, latents(run), wanted))
    assert [event.iteration for event in run.events] == list(range(1, run.total + 1))
    assert run.reports[-1].endswith("0 of 4 layers stay on the device.")


def test_there_may_be_no_room_for_kv_on_the_host(copy_engine, config, built, start, fail, monkeypatch):
    def full(*args):
        raise SAID["Python"]()

    made = built(config())
    made.token_block = 1024
    made.blocks.keep_on_device(())
    wanted = latents(start(config()))
    monkeypatch.setattr(KVCache, "move_to_host", full)
    fail("forward", [4])
    run = start(config(), made)
    assert all(map(torch.equal, latents(run), wanted))
    assert run.reports == ["cpu ran out of memory. From the last finished step on 512 tokens are taken at a time."]


# -- while loading ---------------------------------------------------------------------------------------------------


class Full(MemorySource):
    """Has no room for more than so many layers at a try to place them."""

    def __init__(self, weights, room):
        super().__init__(weights)
        self.room, self.layers = room, set()
        self.read: list[weakref.ref] = []
        self.left: list[int] = []  # tensors of a failed try that are still there when the next begins

    def tensor(self, name):
        if "layers" in name:
            if not self.layers:
                self.left.append(sum(tensor() is not None for tensor in self.read))
            self.layers.add(int(name.split(".")[2]))
            if len(self.layers) > self.room:
                self.layers.clear()
                raise SAID["CUDA"]()
        tensor = self.weights[name].clone()
        if "layers" in name:
            self.read.append(weakref.ref(tensor))
        return tensor


@pytest.mark.parametrize(("room", "staying"), [(4, {0, 1, 2, 3}), (3, {1, 3}), (1, {3}), (0, set())])
def test_fewer_layers_stay_if_there_is_too_little_room_to_load_them(
    room, staying, copy_engine, config, random_weights, start
):
    settings = config(num_frames=24)
    weights, options = random_weights(settings.model), {"device": "cpu", "dtype": torch.float32}
    wanted = latents(start(settings, load_transformer(MemorySource(weights), settings, **options)))
    source = Full(weights, room)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = load_transformer(source, settings, offload=False, **options)
    assert made.blocks.on_device == staying
    said = "cpu ran out of memory while the model was loaded. Now {} of its layers stay there".format
    found = [str(warning.message).partition(",")[0] for warning in caught]
    assert found == [said(left) for left in (2, 1, 0) if left >= len(staying) and len(staying) < LAYERS]
    assert source.left
    assert not any(source.left)
    source.room = LAYERS
    assert all(map(torch.equal, latents(start(settings, made)), wanted))


@pytest.mark.filterwarnings("ignore:cpu ran out of memory")
def test_if_there_is_no_room_for_any_layer_that_is_the_end(copy_engine, config, random_weights, monkeypatch):
    error = SAID["MPS"]()

    def full(*args):
        raise error

    monkeypatch.setattr("magi.offload.streamed_blocks.RingBuffer", full)
    source = Full(random_weights(config().model), 1)
    with pytest.raises(MagiError, match=r"cpu ran out of memory while the model was loaded.*Close") as caught:
        load_transformer(source, config(), device="cpu", offload=False)
    assert caught.value.__cause__ is error


def test_other_errors_while_loading_come_out_at_once(copy_engine, config, random_weights, recwarn):
    def cancel(done, total):
        raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        load_transformer(MemorySource(random_weights(config().model)), config(), device="cpu", progress=cancel)
    assert not recwarn.list
