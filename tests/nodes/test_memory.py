"""Models and ComfyUI's memory manager: what is read when, what stays, and who may take it away."""

import gc
import weakref

import pytest
import torch

from tests.support.graph import InvalidGraph, NodeError
from tests.support.magi_graphs import image_to_video, loaded, node, picture, text_to_video

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
    weights = [weakref.ref(model.model.loaded) for model in models]
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
    weights = [weakref.ref(model.model.loaded) for model in comfy.management.loaded_models()]
    comfy.run({"image": node("Magi1DemoImage")})
    gc.collect()
    assert [ref() for ref in weights] == [None, None]
    assert loaded(comfy) == set()


def test_an_error_leaves_nothing_behind(comfy, monkeypatch):
    graph = text_to_video(comfy)
    model = comfy.module("magi.transformer.model").Transformer
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
    vae = comfy.module("nodes.comfyui.models")
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
        assert (patcher.model.loaded is not None) == any(patcher is model for model in listed)
    monkeypatch.undo()
    assert comfy.run(graph)["decode"][0].shape[0] == 24


@pytest.mark.filterwarnings("ignore:The text encoder does not fit")
@pytest.mark.parametrize(
    ("module", "function", "error"),
    [
        (
            "magi.transformer.model",
            "Transformer.forward",
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        ),
        (
            "nodes.comfyui.models",
            "load_transformer",
            RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
        ),
        ("magi.text.t5_model", "place", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")),
        (
            "magi.vae.video_vae",
            "VideoVAE.decode_stream",
            RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
        ),
        ("magi.vae.video_vae", "VideoVAE.encode", MemoryError()),
    ],
    ids=["transformer", "loading", "text encoder", "decoding", "encoding"],
)
def test_out_of_memory_says_what_to_do(comfy, monkeypatch, module, function, error):
    def full(*args, **options):
        raise error

    *owner, name = function.split(".")
    target = comfy.module(module)
    monkeypatch.setattr(getattr(target, owner[0]) if owner else target, name, full)
    with pytest.raises(NodeError) as caught:
        comfy.run(image_to_video(comfy, picture()))
    assert caught.value.kind == "MagiError"
    assert "memory" in caught.value.message
    assert any(word in caught.value.message.lower() for word in ("try", "use", "choose"))


def test_other_failures_are_not_taken_for_a_shortage(comfy, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(comfy.module("magi.vae.video_vae").VideoVAE, "decode_stream", broken)
    with pytest.raises(NodeError, match="illegal memory access") as caught:
        comfy.run(text_to_video(comfy))
    assert caught.value.kind == "RuntimeError"


def test_a_clip_that_memory_cannot_hold_is_refused_before_it_is_decoded(comfy, monkeypatch):
    """Of latents from a file, for example; those that a sampler is to make are refused before it makes them."""
    graph = text_to_video(comfy)
    latents = comfy.run(graph)["sampler"][0]
    graph = {name: graph[name] for name in ("vae", "decode")}
    graph["decode"]["inputs"]["samples"] = ["latents", 0]
    graph["latents"] = node(comfy.constant("LATENT", latents))
    monkeypatch.setattr(comfy.module("nodes.comfyui.media"), "free_host_memory", lambda: 10_000)
    monkeypatch.setattr(comfy.module("nodes.comfyui.vae"), "decoded", lambda *_: pytest.fail("decoded for nothing"))
    with pytest.raises(NodeError, match=r"24 frames of 64x48 take 0\.0 GB.*0\.0 GB are free.*shorter") as caught:
        comfy.run(graph)
    assert caught.value.kind == "MagiError"
