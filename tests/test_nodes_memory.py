"""Models and ComfyUI's memory manager: what is read when, what stays, and who may take it away."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from tests.graph import InvalidGraph, NodeError
from tests.magi_graphs import filled, image_to_video, node, picture, random_model, text_to_video


@pytest.fixture
def reads(comfy, monkeypatch) -> list[str]:
    """What is read from disk, in order: "transformer", "vae"."""
    found: list[str] = []
    for module, function, name in (("magi.model", "load_transformer", "transformer"), ("magi.vae", "load_vae", "vae")):
        load = getattr(comfy.module(module), function)

        def counted(path, *args, load=load, name=name, **options):
            # On the meta device only the header is read.
            if "meta" not in args and options.get("device") != "meta":
                found.append(name)
            return load(path, *args, **options)

        monkeypatch.setattr(comfy.module(module), function, counted)
    return found


def loaded(comfy) -> set[str]:
    """The kinds of models that ComfyUI takes to be loaded; each must really be."""
    models = comfy.management.loaded_models()
    for model in models:
        assert model is not None, "a model that is gone is still listed"
        assert model.loaded_size() == model.model_size() > 0
        assert model.current_loaded_device() == model.load_device
    names = [type(model.model).__name__ for model in models]
    assert len(set(names)) == len(names), "listed twice"
    return set(names)


BOTH = {"MagiTransformer", "MagiVideoVAE"}


def test_loaders_read_no_weights(comfy, reads):
    graph = text_to_video(comfy)
    comfy.run({name: graph[name] for name in ("model", "encoder", "vae", "start")})
    assert reads == []
    assert loaded(comfy) == set()


def test_only_the_sampler_runs_again_for_another_seed(comfy, reads):
    graph = text_to_video(comfy)
    comfy.run(graph)
    assert sorted(reads) == ["transformer", "vae"]
    for seed in (2, 3):
        graph["sampler"]["inputs"]["seed"] = seed
        comfy.run(graph)
        assert comfy.executed == ["sampler", "decode"]
    assert sorted(reads) == ["transformer", "vae"]
    assert loaded(comfy) == BOTH


def test_another_prompt_size_or_length_reads_nothing_again(comfy, reads):
    graph = text_to_video(comfy)
    comfy.run(graph)
    graph["text"]["inputs"]["prompt"] = "a dog"
    comfy.run(graph)
    graph["start"]["inputs"]["width"] = 96
    graph["sampler"]["inputs"] |= {"seconds": 2.0, "window": 2}
    comfy.run(graph)
    assert sorted(reads) == ["transformer", "vae"]


def test_two_samplers_share_a_model(comfy, reads):
    graph = text_to_video(comfy)
    graph["other"] = node("Magi1Sampler", **(graph["sampler"]["inputs"] | {"seed": 9}))
    made = comfy.run(graph)
    assert reads.count("transformer") == 1
    assert not torch.equal(made["other"][0]["samples"], made["sampler"][0]["samples"])


def test_everything_can_be_unloaded(comfy, reads):
    """What ComfyUI's "Unload Models" button does."""
    graph = text_to_video(comfy)
    before = comfy.run(graph)["decode"][0]
    models = comfy.management.loaded_models()
    weights = [weakref.ref(model.model.content) for model in models]
    assert len(weights) == 2
    comfy.management.unload_all_models()
    gc.collect()
    assert [ref() for ref in weights] == [None, None]
    assert loaded(comfy) == set()
    assert [(model.loaded_size(), model.current_loaded_device()) for model in models] == [(0, torch.device("cpu"))] * 2
    graph["sampler"]["inputs"]["seed"] = 2
    comfy.run(graph)
    graph["sampler"]["inputs"]["seed"] = 1
    assert torch.equal(comfy.run(graph)["decode"][0], before)
    assert sorted(reads) == ["transformer", "transformer", "vae", "vae"]


def native_patcher(comfy):
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(torch.nn.Linear(100, 100), comfy.management.get_torch_device(), torch.device("cpu"))


def test_another_model_that_needs_room_evicts_ours(comfy, reads, monkeypatch):
    graph = text_to_video(comfy)
    before = comfy.run(graph)["decode"][0]
    monkeypatch.setattr(comfy.management, "get_free_memory", lambda *a, **k: (0, 0) if k.get("torch_free_too") else 0)
    other = native_patcher(comfy)
    comfy.management.free_memory(1e9, comfy.management.get_torch_device())  # as its loader does on a graphics card
    comfy.management.load_models_gpu([other])
    assert loaded(comfy) == {"Linear"}
    monkeypatch.undo()
    graph["sampler"]["inputs"]["seed"] = 2
    comfy.run(graph)
    graph["sampler"]["inputs"]["seed"] = 1
    assert torch.equal(comfy.run(graph)["decode"][0], before)
    assert loaded(comfy) >= BOTH


def test_nothing_goes_while_there_is_room(comfy):
    comfy.run(text_to_video(comfy))
    comfy.management.free_memory(1 << 20, comfy.management.get_torch_device())
    assert loaded(comfy) == BOTH


def test_models_go_with_the_workflow(comfy):
    """A queued workflow of something else drops what ComfyUI kept of ours."""
    graph = text_to_video(comfy)
    comfy.run(graph)
    weights = [weakref.ref(model.model.content) for model in comfy.management.loaded_models()]
    comfy.run({"image": node("Magi1DemoImage")})
    gc.collect()
    assert [ref() for ref in weights] == [None, None]
    assert loaded(comfy) == set()


def test_an_error_leaves_nothing_behind(comfy, monkeypatch):
    graph = text_to_video(comfy)
    model = comfy.module("magi.model").Transformer
    forward = model.forward

    def broken(self, *args, **options):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(NodeError, match="device-side assert"):
        comfy.run(graph)
    loaded(comfy)
    monkeypatch.setattr(model, "forward", forward)
    assert comfy.run(graph)["decode"][0].shape[0] == 24
    assert loaded(comfy) == BOTH


def test_a_file_that_goes_bad_while_it_is_read(comfy, monkeypatch):
    graph = text_to_video(comfy)
    vae = comfy.module("magi.vae")
    load = vae.load_vae

    def broken(path, device=None, *args, **options):
        if device == "meta":
            return load(path, device, *args, **options)
        raise comfy.module("magi.errors").MagiError("The disk is gone.")

    monkeypatch.setattr(vae, "load_vae", broken)
    with pytest.raises((NodeError, InvalidGraph), match="The disk is gone"):
        comfy.run(graph)
    assert loaded(comfy) == {"MagiTransformer"}
    monkeypatch.setattr(vae, "load_vae", load)
    comfy.run(graph)
    assert loaded(comfy) == BOTH


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
def test_no_model_stays_unseen_when_another_cannot_be_read(comfy, monkeypatch, precision):
    """Several times, as ComfyUI loads the two in an order of its own."""
    graph = text_to_video(comfy)
    graph["sampler"]["inputs"]["vae"] = ["vae", 0]
    graph["vae"]["inputs"]["precision"] = precision
    made = comfy.run(graph)
    patchers = [made["model"][0].patcher, made["vae"][0].patcher]
    _, vae = patchers
    entries = comfy.management.current_loaded_models
    entries[:] = [entry for entry in entries if entry.model is not vae]
    vae.detach()
    graph["sampler"]["inputs"]["seed"] = 2

    def broken(room):
        raise RuntimeError("The disk is gone.")

    monkeypatch.setattr(vae.model, "read", broken)
    with pytest.raises(NodeError, match="The disk is gone"):
        comfy.run(graph)
    listed = comfy.management.loaded_models()
    for patcher in patchers:
        assert (patcher.model.content is not None) == any(patcher is model for model in listed)
    monkeypatch.undo()
    assert comfy.run(graph)["decode"][0].shape[0] == 24


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("magi.model", "Transformer.forward"),
        ("magi.text.text_encoder", "_place"),
        ("magi.vae", "VideoVAE.decode_stream"),
        ("magi.vae", "VideoVAE.encode"),
    ],
    ids=["transformer", "text encoder", "decoding", "encoding"],
)
def test_out_of_memory_says_what_to_do(comfy, monkeypatch, module, function):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    *owner, name = function.split(".")
    target = comfy.module(module)
    monkeypatch.setattr(getattr(target, owner[0]) if owner else target, name, full)
    with pytest.raises(NodeError) as caught:
        comfy.run(image_to_video(comfy, picture()))
    assert caught.value.kind == "MagiError"
    assert "memory" in caught.value.message
    assert any(word in caught.value.message.lower() for word in ("try", "use", "choose"))


# -- a graphics card of limited size, as far as a CPU can play one -----------------------------------------------------


@pytest.fixture
def card(comfy, monkeypatch):
    """card(bytes): so much device memory could be had."""
    host = comfy.module("nodes.host")
    return lambda nbytes: monkeypatch.setattr(host, "usable_memory", lambda: nbytes)


@pytest.fixture
def deep(comfy) -> str:
    """A model of eight layers: enough to be streamed."""
    return random_model(comfy, "deep", num_layers=8)


def test_what_other_models_hold_can_be_had(comfy, monkeypatch):
    host, card = comfy.module("nodes.host"), torch.device("meta")
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
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["model"] = deep
    card(64 << 30)
    made = comfy.run(graph)
    size, needed = transformer(comfy).model_size(), made["model"][0].transformer.placement.device_bytes
    card(int(needed * 0.8))
    graph["sampler"]["inputs"]["seed"] = 2
    comfy.run(graph)
    assert transformer(comfy).model_size() < size, "ComfyUI is told what streaming takes"
    assert reads.count("transformer") == 2
    graph["sampler"]["inputs"]["seed"] = 1
    assert torch.equal(comfy.run(graph)["sampler"][0]["samples"], made["sampler"][0]["samples"])
    assert reads.count("transformer") == 2
    card(64 << 30)
    graph["sampler"]["inputs"]["seed"] = 3
    comfy.run(graph)
    assert transformer(comfy).model_size() == size
    assert reads.count("transformer") == 3


def test_streaming_by_choice(comfy, card, deep):
    graph = text_to_video(comfy)
    graph["model"]["inputs"] |= {"model": deep, "memory": ["memory", 0]}
    graph["memory"] = node("Magi1MemoryOptions", streaming="off", cache="host")
    comfy.run(filled(comfy, graph))
    whole = transformer(comfy).model_size()
    assert transformer(comfy).model.content.cache_device == "host"
    graph["memory"]["inputs"] |= {"streaming": "on", "cache": "device"}
    comfy.run(graph)
    assert transformer(comfy).model_size() < whole
    assert transformer(comfy).model.content.cache_device == "device"


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
