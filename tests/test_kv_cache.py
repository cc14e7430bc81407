import pytest
import torch

from magi.errors import MagiError
from magi.generate import generate_latents
from magi.kv_cache import KVCache


def cache(slots: int) -> KVCache:
    return KVCache(2, slots, 4, 6, 8, dtype=torch.bfloat16, device="cpu")


def test_the_last_chunks_are_kept_and_older_ones_forgotten(randn):
    made, out = cache(3), torch.empty(2, 4, 6, 8)
    kv = {(layer, c): randn(2, 4, 6, 8, seed=f"{layer}/{c}").bfloat16() for layer in range(2) for c in range(8)}
    for (layer, chunk), value in kv.items():
        made.store(layer, chunk, value)
    for layer in range(2):
        for chunk in (5, 6, 7):
            made.load(layer, chunk, out)
            assert torch.equal(out, kv[layer, chunk].float())
        for chunk in (0, 4, 8):
            with pytest.raises(LookupError, match=f"chunk {chunk} is not in the cache of layer {layer}"):
                made.load(layer, chunk, out)


def test_what_is_stored_is_a_copy(randn):
    made, out = cache(1), torch.empty(2, 4, 6, 8)
    value = randn(2, 4, 6, 8)
    made.store(0, 0, value)
    kept = value.bfloat16().float()
    value.zero_()
    made.load(0, 0, out)
    assert torch.equal(out, kept)
    with pytest.raises(LookupError):
        made.load(1, 0, out)


def test_a_cache_of_no_chunks(randn):
    made = cache(0)
    made.store(0, 0, randn(2, 4, 6, 8))
    assert made.nbytes == 0
    with pytest.raises(LookupError):
        made.load(0, 0, torch.empty(2, 4, 6, 8))


def test_size():
    assert cache(3).nbytes == 2 * 3 * 2 * 4 * 6 * 8 * 2


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_models_cache_is_kept_where_it_is_asked_for(place, tiny_config, tiny_model, randn):
    config = tiny_config(shape={"num_layers": 3})
    model = tiny_model(config, cache_device=place)
    model.device = torch.device("meta")  # stands for a device: what is copied there is gone
    made = model.new_cache(2, 4, 4)
    value, out = randn(2, 4, 24, 8), torch.zeros(2, 4, 24, 8)
    made.store(0, 7, value)
    if place == "device":
        with pytest.raises(NotImplementedError):
            made.load(0, 7, out)
    else:
        made.load(0, 7, out)
        assert torch.equal(out, value)


def test_there_is_no_third_place(tiny_config, tiny_model):
    with pytest.raises(MagiError, match=r"cannot be kept on 'disk'\. Choose one of device, host"):
        tiny_model(tiny_config(), cache_device="disk")


@pytest.mark.gpu
@pytest.mark.parametrize("distill", [False, True])
def test_a_cache_on_the_host_changes_no_bit(distill, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    config = tiny_config(distill, num_frames=72, window_size=2)

    def run(place):
        model = tiny_model(config, device="cuda", dtype=torch.bfloat16, cache_device=place)
        chunks = generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

    assert torch.equal(run("host"), run("device"))
