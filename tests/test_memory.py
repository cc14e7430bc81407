"""Memory by calculation, held against what a forward iteration really allocates."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from magi import layers, memory, quant
from magi.config import MagiConfig
from magi.load import build_transformer
from magi.mapped_file import DTYPES
from magi.memory import weight_sizes, working_bytes
from magi.placement import MemoryOptions
from magi.sampler import Sampler
from magi.sampler_state import Noise, SamplerState
from magi.schedule import Schedule
from magi.synthetic import RandomTensors
from magi.weights import tensors_in

GB = 10**9


class Sizes(RandomTensors):
    """Tensors without numbers."""

    def tensor(self, name):
        info = self.tensors[name]
        return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made under it take at once."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._note((args, kwargs), counted=False)  # made before, like weights: their views are nothing new
        result = function(*args, **(kwargs or {}))
        self._note(result, counted=True)
        return result

    def _note(self, tensors, counted):
        for storage in {t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}:
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes() * counted
                self._now += storage.nbytes() * counted
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key):
        self._now -= self._sizes.pop(key)


class OneIteration(Exception):
    pass


def peak_of_an_iteration(model, config: MagiConfig) -> int:
    """Bytes beside the weights in an iteration with a full window that also takes in a finished chunk."""
    runtime, device = config.runtime, model.device
    first = 5  # the oldest active chunk: as many clean ones before it as any looks back
    stage = first + runtime.window_size - 1
    schedule = Schedule.of(runtime, stage + 4, 0)
    shape = (1, 16, runtime.chunk_width, runtime.video_size_h // 8, runtime.video_size_w // 8)

    def stop(event):
        raise OneIteration

    with torch.inference_mode(), PeakBytes() as counted:
        latents = {c: torch.zeros(shape, device=device) for c in range(first + runtime.window_size)}
        state = SamplerState(
            schedule.steps_per_stage * stage,
            {c: latents.pop(c) for c in range(first, first + runtime.window_size)},
            {c: latents[c] for c in range(first - max(1, schedule.replayed_chunks), first)},
        )
        del latents
        texts = [torch.zeros(config.model.caption_max_length, config.model.caption_channels, device=device)]
        captions = [text.clone() for text in texts * schedule.chunks]
        sampler = Sampler(model, config, schedule, Noise(shape, 0), captions, captions[0][:50], None, state, stop)
        with pytest.raises(OneIteration):
            next(iter(sampler))
    return counted.peak - sum(c.nbytes for c in captions)


@pytest.fixture
def on_hopper(monkeypatch):
    """What has no numbers behaves like a device that multiplies float8 and keeps the sums of 16-bit products in float32."""
    product = lambda x, weight: torch.empty(x.shape[0], weight.shape[0], device=x.device)  # noqa: E731
    for module in (quant, layers):
        monkeypatch.setattr(module, "multiply_exact", product)
    monkeypatch.setattr(quant, "_multiply_float8", product)
    monkeypatch.setattr(memory, "keeps_sums", lambda device: True)
    for module in (quant, memory):
        monkeypatch.setattr(module, "multiplies_float8", lambda device: True)


def calculated_and_counted(name, window, height, width, token_block=4096, cache="device") -> float:
    settings = {"window_size": window, "video_size_h": height, "video_size_w": width, "num_frames": 240}
    config = MagiConfig.preset(name).with_runtime(**settings).with_layers(3 if name.endswith("quant") else 1)
    source = Sizes(config.model, config.engine.fp8_quant)
    sizes = weight_sizes(source.tensors, config.model, "meta")
    options = MemoryOptions(token_block=token_block, cache=cache)
    peak = peak_of_an_iteration(build_transformer(source, config, "meta", memory=options), config)
    working = working_bytes(config, token_block=token_block, cache_on_device=cache == "device", widened=sizes.widened)
    return (working + sizes.converted) / peak


@pytest.mark.parametrize(
    ("name", "window", "height", "width"),
    [
        ("4.5B_base", 4, 720, 1280),
        ("4.5B_distill", 2, 720, 720),
        ("4.5B_distill_quant", 4, 720, 1280),
        ("4.5B_distill_quant", 4, 256, 256),
        ("24B_base", 4, 480, 832),
        ("24B_distill", 1, 720, 1280),
        ("24B_distill_quant", 4, 720, 1280),
    ],
)
def test_the_working_memory_is_what_an_iteration_takes(name, window, height, width, on_hopper):
    assert 0.95 < calculated_and_counted(name, window, height, width) < 1.15


@pytest.mark.parametrize("name", ["4.5B_base", "24B_distill", "4.5B_distill_quant", "24B_distill_quant"])
def test_devices_that_widen_their_matrices_take_more(name):
    assert 0.9 < calculated_and_counted(name, 4, 480, 832) < 1.25


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_the_working_memory_in_float32_with_real_numbers(gated, precision, tiny_config, tiny_model):
    shape = {"num_layers": 3, "hidden_size": 128, "kv_channels": 16, "ffn_hidden_size": 384, "gated_linear_unit": gated}
    config = tiny_config(True, shape=shape, video_size_h=128, video_size_w=192, num_frames=240)
    model = tiny_model(config, precision=precision)
    assert 0.8 < working_bytes(config, itemsize=4) / peak_of_an_iteration(model, config) < 1.25


def test_without_the_cache_it_is_less_by_the_cache(tiny_config, tiny_model):
    for window, given in ((4, 0), (1, 0), (2, 3)):
        config = tiny_config(window_size=window, num_frames=240, num_steps=8)
        schedule = Schedule.of(config.runtime, 10 + given, given)
        kept = tiny_model(config).new_cache(schedule.cached_chunks, 4, 4).nbytes
        on, off = (
            working_bytes(config, given_chunks=given, cache_on_device=on_device, itemsize=4)
            for on_device in (True, False)
        )
        assert on - off == kept > 0


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
    assert (sizes.fp8, sizes.itemsize) == (fp8, model.dtype.itemsize)


def test_float8_storage_halves_the_released_models():
    config = MagiConfig.preset("24B_base").model
    tensors = RandomTensors(config).tensors
    whole, stored = (weight_sizes(tensors, config, "cpu", precision) for precision in ("auto", "fp8"))
    assert whole.total == pytest.approx(47.9e9, rel=0.01)
    assert stored.total == pytest.approx(26.5e9, rel=0.01)
    assert stored.converted >= 2 * 32768 * 6144, "its largest matrix is made dense"
