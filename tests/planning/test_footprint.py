"""Memory by calculation, held against what a forward iteration really allocates."""

import pytest
import torch

from magi.checkpoint.mapped_file import DTYPES
from magi.config import MagiConfig
from magi.model_files.load import load_transformer
from magi.offload.kv_cache import KVCache
from magi.offload.streamed_blocks import StreamedBlocks
from magi.planning.footprint import kv_bytes, weight_sizes, working_bytes
from magi.planning.placement import MemoryOptions, place, smallest
from magi.planning.temporaries import Numerics, PeakBytes
from magi.sampling import sampler
from magi.sampling.prepare import make_sampler
from magi.sampling.sampler import Sampler
from magi.sampling.schedule import Schedule
from magi.sampling.state import Noise, SamplerState
from magi.transformer.float8 import Kernels, kernels_on_meta
from magi.transformer.random_weights import RandomTensors
from magi.transformer.weights import WeightReader, tensors_in
from tests.conftest import MemorySource
from tests.support.lazy_engine import LazyCopyEngine, cache_with

FP32 = Numerics(torch.float32)


class Sizes(RandomTensors):
    """Tensors without numbers."""

    def tensor(self, name):
        info = self.tensors[name]
        return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")


class Enough(Exception):
    pass


def peak_of(model, config: MagiConfig, iterations: int = 1) -> int:
    """Bytes beside the weights in iterations with a full window, of which the first also takes in a finished chunk."""
    runtime, device = config.runtime, model.device
    first = 5  # the oldest active chunk: as many clean ones before it as any looks back
    stage = first + runtime.window_size - 1
    schedule = Schedule.of(runtime, stage + 4, 0)
    begun = schedule.steps_per_stage * stage
    shape = (1, 16, runtime.chunk_width, runtime.video_size_h // 8, runtime.video_size_w // 8)

    def stop(event):
        if event.iteration == begun + iterations:
            raise Enough

    with torch.inference_mode(), PeakBytes() as counted:
        latents = {c: torch.zeros(shape, device=device) for c in range(first + runtime.window_size)}
        state = SamplerState(
            begun,
            {c: latents.pop(c) for c in range(first, first + runtime.window_size)},
            {c: latents[c] for c in range(first - max(1, schedule.replayed_chunks), first)},
        )
        del latents
        texts = [torch.zeros(config.model.caption_max_length, config.model.caption_channels, device=device)]
        captions = [text.clone() for text in texts * schedule.chunks]
        sampler = Sampler(model, config, schedule, Noise(shape, 0), captions, captions[0][:50], None, state, stop)
        with pytest.raises(Enough):
            for _ in sampler:
                pass
    return counted.peak - sum(c.nbytes for c in captions)


def calculated_and_counted(name, window, height, width, token_block=4096, precision="auto", kernels=None) -> float:
    """Returns the ratio of both, on a device with these kernels; None: the best there is."""
    settings = {"window_size": window, "video_size_h": height, "video_size_w": width, "num_frames": 240}
    config = MagiConfig.preset(name).with_runtime(**settings).with_layers(3 if name.endswith("quant") else 1)
    source = Sizes(config.model, config.engine.fp8_quant)
    options = MemoryOptions(token_block=token_block)
    with kernels_on_meta(kernels or Kernels()):
        numerics = weight_sizes(source.tensors, config.model, "meta", precision).numerics
        peak = peak_of(load_transformer(source, config, "meta", precision=precision, memory=options), config)
    return working_bytes(config, token_block=token_block, numerics=numerics) / peak


@pytest.mark.parametrize(
    ("name", "window", "height", "width", "token_block"),
    [
        ("4.5B_base", 4, 480, 832, 4096),
        ("4.5B_base", 1, 256, 448, 512),
        ("4.5B_distill", 2, 720, 720, 4096),
        ("4.5B_distill_quant", 4, 256, 256, 4096),
        ("24B_base", 4, 720, 1280, 4096),
        ("24B_distill", 1, 720, 1280, 4096),
        ("24B_distill_quant", 4, 720, 1280, 4096),
        ("24B_distill_quant", 1, 256, 448, 512),
    ],
)
def test_the_working_memory_is_what_an_iteration_takes(name, window, height, width, token_block):
    assert 0.95 < calculated_and_counted(name, window, height, width, token_block) < 1.05


@pytest.mark.parametrize(
    ("name", "token_block", "precision"),
    [
        ("4.5B_base", 4096, "auto"),
        ("24B_distill", 4096, "auto"),
        ("24B_distill_quant", 4096, "auto"),
        ("4.5B_distill_quant", 512, "auto"),
        ("24B_base", 4096, "fp8"),
    ],
)
def test_devices_that_upcast_matrices_take_more(name, token_block, precision):
    size = (1, 256, 448) if token_block < 4096 else (4, 480, 832)
    assert 0.95 < calculated_and_counted(name, *size, token_block, precision, Kernels(False, False)) < 1.05


def test_a_device_without_float8_units_but_with_fp32_accumulation():
    assert 0.95 < calculated_and_counted("24B_distill_quant", 1, 480, 832, kernels=Kernels(float8=False)) < 1.05


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_the_working_memory_in_float32_with_real_numbers(gated, precision, tiny_config, tiny_model):
    shape = {"num_layers": 3, "hidden_size": 128, "kv_channels": 16, "ffn_hidden_size": 384, "gated_linear_unit": gated}
    config = tiny_config(True, shape=shape, video_size_h=128, video_size_w=192, num_frames=240)
    model = tiny_model(config, precision=precision)
    planned = working_bytes(config, numerics=FP32, token_block=model.token_block)
    assert 0.8 < planned / peak_of(model, config) < 1.25


def test_on_the_host_two_layers_of_the_cache_are_left(tiny_config, tiny_model):
    for window, given in ((4, 0), (1, 0), (2, 18)):
        config = tiny_config(shape={"num_layers": 5}, window_size=window, num_frames=240, num_steps=8)
        schedule = Schedule.of_run(config.runtime, given)
        kept = KVCache.for_run(tiny_model(config), schedule.cached_chunks, 4, 4).nbytes
        on, off = (
            working_bytes(config, prefix_frames=given, cache_on_device=on_device, numerics=FP32)
            for on_device in (True, False)
        )
        assert on - off == 3 * kv_bytes(config, given, 4)
        assert 5 * kv_bytes(config, given, 4) == kept > 0


@pytest.mark.parametrize("window", [1, 4])
def test_the_working_memory_with_keys_on_their_way_from_the_host(window, tiny_config, tiny_model, monkeypatch):
    monkeypatch.setattr(sampler, "KVCache", cache_with(copy_engine=LazyCopyEngine(eager=True)))
    shape = {"num_layers": 4, "hidden_size": 256, "num_query_groups": 8, "kv_channels": 32, "caption_max_length": 20}
    sizes = {"window_size": window, "video_size_h": 96, "video_size_w": 96, "num_frames": 240, "num_steps": 8}
    config = tiny_config(True, shape=shape, **sizes)
    options = MemoryOptions(cache="host", token_block=32)
    # Into the next stage, as room for keys that was needed once is kept.
    counted = peak_of(tiny_model(config, memory=options), config, 8 // window + 1)
    counted -= 4 * kv_bytes(config, itemsize=4)  # the ring, which is on the host
    calculated = working_bytes(config, cache_on_device=False, token_block=32, numerics=FP32)
    assert 0.94 < calculated / counted < 1.06
    assert kv_bytes(config, itemsize=4) > 0.06 * counted, "a layer's keys more or less would be seen"


def test_given_chunks_are_counted():
    config = MagiConfig.preset("4.5B_distill").with_runtime(num_frames=24, window_size=1)
    alone, after_many = (working_bytes(config, prefix_frames=n) for n in (0, 48))
    assert after_many > alone, "a lone chunk has nothing to look back at"


@pytest.mark.parametrize("given", [0, 1, 3, 6, 8, 14, 20])
@pytest.mark.parametrize("distill", [False, True], ids=["base", "distill"])
def test_a_whole_run_after_given_latents_takes_what_was_planned(
    distill, given, tiny_config, tiny_model, tiny_caption, tiny_tokens, randn
):
    shape = {"num_layers": 3, "hidden_size": 128, "kv_channels": 16, "ffn_hidden_size": 384}
    config = tiny_config(distill, shape=shape, video_size_h=128, video_size_w=192, num_frames=24, num_steps=4)
    prefix = randn(1, 16, given, 16, 24) if given else None
    model = tiny_model(config)
    with torch.inference_mode(), PeakBytes() as counted:
        for _ in make_sampler(model, caption=tiny_caption(), special_tokens=tiny_tokens, prefix=prefix):
            pass
    planned = working_bytes(config, prefix_frames=given, numerics=FP32, token_block=model.token_block)
    assert 0.75 < planned / counted.peak < 1.3


def test_a_picture_that_fills_a_part_of_a_chunk_takes_the_room_of_one():
    config = MagiConfig.preset("24B_base").with_runtime(num_frames=24)
    alone, two = (working_bytes(config.with_runtime(num_frames=n)) for n in (24, 48))
    assert working_bytes(config, prefix_frames=3) == two > 2 * alone


@pytest.mark.parametrize("window", [1, 4])
def test_a_longer_video_takes_no_more(window):
    config = MagiConfig.preset("24B_base").with_runtime(window_size=window)
    minute, hour = (working_bytes(config.with_runtime(num_frames=24 * n)) for n in (60, 3600))
    assert minute == hour


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "fp8"), [("auto", False), ("auto", True), ("fp8", False), ("fp8", True), ("bf16", False)]
)
def test_weights_take_what_their_headers_say(precision, fp8, tiny_config, tiny_model, random_weights):
    config = tiny_config(True, shape={"num_layers": 4})
    model = tiny_model(config, fp8=fp8, precision=precision, dtype=None)
    source = RandomTensors(config.model, fp8, torch.float32)
    sizes = weight_sizes(source.tensors, config.model, "cpu", precision)
    assert sizes.outer == sum(t.nbytes for t in tensors_in(model.outer))
    assert sizes.blocks == tuple(sum(t.nbytes for t in tensors_in(block)) for block in model.blocks)
    assert sizes.total == sizes.outer + sum(sizes.blocks)
    assert (sizes.numerics.fp8, sizes.itemsize) == (fp8, model.dtype.itemsize)


def test_float8_storage_halves_the_released_models():
    config = MagiConfig.preset("24B_base").model
    tensors = RandomTensors(config).tensors
    whole, stored = (weight_sizes(tensors, config, "cpu", precision) for precision in ("auto", "fp8"))
    assert whole.total == pytest.approx(47.9e9, rel=0.01)
    assert stored.total == pytest.approx(26.5e9, rel=0.01)


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize("precision", ["auto", "fp8"])
@pytest.mark.parametrize("fp8", [False, True])
def test_layers_take_what_was_planned(share, precision, fp8, tiny_config, random_weights):
    """On a device beside the host, wherever they lie."""
    config = tiny_config(True, shape={"num_layers": 6})
    source = MemorySource(random_weights(config.model, fp8))
    sizes = weight_sizes(source.tensors, config.model, "cpu", precision)
    least, most = smallest(config, sizes).needed_bytes, place(config, sizes, 10**9).needed_bytes
    placed = place(config, sizes, round(least + share * (most - least)), free_host=10**9)
    assert 0 <= len(placed.on_device) <= 6
    assert placed.streaming == (share < 1)
    store_fp8 = precision == "fp8" and not fp8
    reader = WeightReader(source, config.model, torch.device("cpu"), torch.float32, store_fp8)
    blocks = StreamedBlocks(
        reader,
        placed.on_device,
        placed.on_host,
        placed.slots,
        copy_engine=LazyCopyEngine(eager=True),
        pin=lambda data: lambda: None,
    )
    for _ in range(2):
        assert blocks.nbytes + sum(t.nbytes for t in tensors_in(reader.outer())) == placed.weight_bytes
        assert blocks.host_bytes == placed.host_bytes - 6 * kv_bytes(config, itemsize=4) * (placed.cache == "host")
        assert len(list(blocks)) == 6
