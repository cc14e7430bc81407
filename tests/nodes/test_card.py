"""A graphics card of limited size, as far as a CPU can play one: what goes where, and what ComfyUI is told and asked."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.support.graph import NodeError
from tests.support.magi_graphs import filled, loaded, node, random_model, text_to_video


@pytest.fixture
def card(comfy, monkeypatch):
    """card(bytes): so much device memory could be had."""
    host = comfy.module("nodes.comfyui.host")
    return lambda nbytes: monkeypatch.setattr(host, "usable_memory", lambda: nbytes)


@pytest.fixture
def deep(comfy) -> str:
    """A model of eight layers: enough to be streamed."""
    return random_model(comfy, "deep", num_layers=8)


def test_what_other_models_hold_can_be_had(comfy, monkeypatch):
    host, card = comfy.module("nodes.comfyui.host"), torch.device("meta")
    gone = None  # a model of another pack that was dropped while its weights are still in use
    models = [SimpleNamespace(load_device=torch.device(d), loaded_size=lambda: 3 << 30) for d in ("meta", "cpu")]
    monkeypatch.setattr(host, "device", lambda: card)
    monkeypatch.setattr(comfy.management, "get_free_memory", lambda *a, **k: 5 << 30)
    monkeypatch.setattr(comfy.management, "loaded_models", lambda *a, **k: [*models, gone])
    reserved = comfy.management.extra_reserved_memory()
    assert host.usable_memory() == (8 << 30) - reserved


def transformer(comfy):
    (found,) = [m for m in comfy.management.loaded_models() if type(m.model).__name__ == "MagiTransformer"]
    return found


def test_a_model_streams_where_it_does_not_fit_and_stays_where_it_does(comfy, reads, card, deep):
    graph = text_to_video(comfy, resume=False)
    graph["model"]["inputs"]["model"] = deep
    card(64 << 30)
    made = comfy.run(graph)
    size, needed = transformer(comfy).model_size(), made["model"][0].transformer.placement.device_bytes
    card(int(needed * 0.8))
    graph["sampler"]["inputs"]["seed"] = 2
    comfy.run(graph)
    assert transformer(comfy).model_size() < size, "ComfyUI is told what streaming takes"
    assert reads.count("transformer") == 1, "layers are dropped, none is read again"
    graph["sampler"]["inputs"]["seed"] = 1
    assert torch.equal(comfy.run(graph)["sampler"][0]["samples"], made["sampler"][0]["samples"])
    assert reads.count("transformer") == 1
    card(64 << 30)
    graph["sampler"]["inputs"]["seed"] = 3
    comfy.run(graph)
    assert transformer(comfy).model_size() == size
    assert reads.count("transformer") == 2


def test_streaming_by_choice(comfy, card, deep):
    graph = text_to_video(comfy, resume=False)
    graph["model"]["inputs"] |= {"model": deep, "memory": ["memory", 0]}
    graph["memory"] = node("Magi1MemoryOptions", streaming="off", cache="host")
    comfy.run(filled(comfy, graph))
    whole = transformer(comfy).model_size()
    assert transformer(comfy).model.loaded.cache_device == "host"
    graph["memory"]["inputs"] |= {"streaming": "on", "cache": "device"}
    comfy.run(graph)
    assert transformer(comfy).model_size() < whole
    assert transformer(comfy).model.loaded.cache_device == "device"


def test_precision_and_attention_are_those_that_were_chosen(comfy, deep):
    graph = text_to_video(comfy)
    graph["model"]["inputs"] |= {"model": deep, "attention": "math"}
    sizes = []
    for precision in ("fp32", "bf16", "fp8 storage"):
        graph["model"]["inputs"]["precision"] = precision
        comfy.run(graph)
        sizes.append(transformer(comfy).model_size())
        assert transformer(comfy).model.loaded.attention == "math"
    wide, half, stored = sizes
    assert half < 0.6 * wide
    assert half < stored < 0.7 * wide, "of a float32 file, as here, the rest stays float32"


def test_comfyui_is_asked_for_what_a_run_takes_besides_its_weights(comfy, monkeypatch):
    load, asked = comfy.management.load_models_gpu, []

    def counted(models, memory_required=0, **options):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.management, "load_models_gpu", counted)
    graph = text_to_video(comfy)
    small = comfy.run(graph)["model"][0].transformer.placement.spare_bytes
    graph["start"]["inputs"] |= {"width": 128, "height": 96}
    large = comfy.run(graph)["model"][0].transformer.placement.spare_bytes
    assert [asked[0], asked[2]] == [small, large]
    assert large > small
    assert min(asked) > 0, "the VAE asks too"


def test_previews_do_not_cost_the_model_its_place(comfy, card):
    graph = text_to_video(comfy)
    graph["sampler"]["inputs"]["vae"] = ["vae", 0]
    del graph["decode"]
    card(64 << 30)
    needed = comfy.run(graph)["model"][0].transformer.placement.device_bytes
    assert loaded(comfy) == {"MagiTransformer", "MagiVideoVAE"}
    comfy.management.unload_all_models()
    comfy.events.clear()
    card(int(needed * 1.15))
    graph["sampler"]["inputs"]["seed"] = 2
    comfy.run(graph)
    assert loaded(comfy) == {"MagiTransformer"}
    assert [name for name, *_ in comfy.events.previews if name == "sampler"], "rough ones, then"


@pytest.mark.parametrize("usable", [8 << 30, 1 << 20], ids=["large", "small"])
def test_a_text_encoder_gets_room_on_the_card(comfy, monkeypatch, card, usable):
    host, asked = comfy.module("nodes.comfyui.host"), []

    def make_room(nbytes):
        asked.append(nbytes)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(host, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(host, "make_room", make_room)
    working = comfy.module("magi.text.t5_model").WORKING_BYTES
    card(usable)
    graph = {name: text_to_video(comfy)[name] for name in ("encoder", "text")}
    graph["encoder"]["inputs"]["device"] = "gpu"
    with pytest.raises(NodeError, match="seen enough"):
        comfy.run(graph)
    (file,) = (comfy.base / "user" / "magi1").glob("*/text_encoder/model.safetensors")
    weights = sum(t.nbytes for t in load_file(file).values())
    assert asked == [working + weights if usable > working else working], "on a small card it streams"


def test_a_card_that_is_too_small_is_told_before_anything_is_read(comfy, reads, card):
    card(1 << 20)
    with pytest.raises(NodeError, match="needs about") as caught:
        comfy.run(text_to_video(comfy))
    assert caught.value.kind == "MagiError"
    assert "64x48" in caught.value.message
    assert "Try" in caught.value.message
    assert reads == []
    assert loaded(comfy) == set()


def test_a_budget_stands_for_the_card(comfy, reads, card):
    card(64 << 30)
    graph = text_to_video(comfy)
    graph["memory"] = node("Magi1MemoryOptions", budget_gb=0.001)
    graph["model"]["inputs"]["memory"] = ["memory", 0]
    with pytest.raises(NodeError, match="the budget is"):
        comfy.run(filled(comfy, graph))
    assert reads == []


def test_a_model_that_comfyui_made_just_enough_room_for_is_not_streamed(comfy, card, monkeypatch, deep):
    """ComfyUI evicts no more than it is asked to; what is left must do for what was planned."""
    graph = filled(comfy, text_to_video(comfy))
    graph["model"]["inputs"]["model"] = deep
    card(64 << 30)
    model = comfy.run(graph)["model"][0]
    size, spare = model.patcher.model_size(), model.transformer.placement.spare_bytes
    assert not model.transformer.placement.streaming
    comfy.management.unload_all_models()
    model.patcher.partially_load(torch.device("cpu"), size)
    assert model.patcher.loaded_size() == size
    model.patcher.detach()
    model.patcher.partially_load(torch.device("cpu"), size * 0.9 - 1)
    assert model.patcher.loaded_size() < size
    assert spare > model.transformer.placement.working_bytes


def test_the_vae_runs_where_comfyui_runs_vaes(comfy, monkeypatch):
    """As with --cpu-vae, which leaves the card to the transformer."""
    vae, asked = comfy.module("nodes.comfyui.models"), []
    load, elsewhere = vae.load_vae, torch.device("cpu", 0)
    monkeypatch.setattr(comfy.management, "vae_device", lambda: elsewhere)
    monkeypatch.setattr(vae, "load_vae", lambda path, device, *rest: asked.append(device) or load(path, device, *rest))
    made = comfy.run(filled(comfy, text_to_video(comfy)))
    assert made["vae"][0].device == elsewhere
    assert set(asked) == {"meta", elsewhere}, "its header is read without weights"


def test_compiling_reaches_the_transformer(comfy, monkeypatch):
    models, asked = comfy.module("nodes.comfyui.models"), []
    load = models.load_transformer

    def eager(*args, **options):  # a compiler takes minutes, and need not be there
        asked.append(options.pop("compiled"))
        return load(*args, **options)

    monkeypatch.setattr(models, "load_transformer", eager)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    graph = text_to_video(comfy)
    comfy.run(graph)
    graph["model"]["inputs"]["compile"] = True
    comfy.run(graph)
    assert asked == [False, True]


def test_no_compiler_is_told_before_anything_is_read(comfy, reads, monkeypatch):
    def missing(function, **_):
        def call(*_):
            raise RuntimeError("Failed to find C compiler\nmany lines more")

        return call

    monkeypatch.setattr(torch, "compile", missing)
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["compile"] = True
    with pytest.raises(NodeError, match="needs a C\\+\\+ compiler") as caught:
        comfy.run(graph)
    assert caught.value.kind == "MagiError"
    assert "many lines more" not in caught.value.message
    assert reads == []
