"""Graphs of the pack's nodes, with what is left out filled in as the front end fills it in."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from magi.model_files.repeating import REPEATING_CONFIG
from magi.remote.fake_server import FakeServer
from magi.sampling.special_tokens import FILE_NAME as SPECIAL_TOKENS
from magi.transformer.random_weights import RandomTensors

from .comfy_host import Comfy
from .graph import Graph, InvalidGraph, NodeError

EMBEDDED = "embedded demo model"
PHOTO = "embedded photo model"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
WIDTH, HEIGHT = 64, 48


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def widgets(comfy: Comfy, class_type: str) -> dict[str, dict]:
    """{input: options} of what a user sets in the node itself."""
    inputs = comfy.info(class_type)["input"]
    both = inputs["required"] | inputs.get("optional", {})
    return {name: options for name, (kind, options) in both.items() if kind in WIDGETS}


def filled(comfy: Comfy, graph: Graph) -> Graph:
    """The graph with the default of every widget that it leaves out."""
    for part in graph.values():
        if part["class_type"] in comfy.nodes:
            for name, options in widgets(comfy, part["class_type"]).items():
                default = options.get("default", options["options"][0] if "options" in options else None)
                part["inputs"].setdefault(name, default)
    return graph


def text_to_video(comfy: Comfy, **sampler) -> Graph:
    """A prompt's video, 64 x 48, one second, in half the model's own steps."""
    graph = {
        "model": node("Magi1ModelLoader", model=PHOTO),
        "encoder": node("Magi1TextEncoderLoader", encoder=PHOTO),
        "vae": node("Magi1VAELoader", vae=PHOTO),
        "text": node("Magi1TextEncode", encoder=["encoder", 0], prompt="a cat"),
        "start": node("Magi1TextToVideo", width=WIDTH, height=HEIGHT),
        "sampler": node("Magi1Sampler", model=["model", 0], text=["text", 0], start=["start", 0]),
        "decode": node("Magi1VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
    }
    graph["sampler"]["inputs"] |= {"seconds": 1.0, "seed": 1, "steps": 8} | sampler
    return filled(comfy, graph)


def image_to_video(comfy: Comfy, image: torch.Tensor, start: dict | None = None, **sampler) -> Graph:
    """A picture's video; `start` changes Magi1ImageToVideo's inputs."""
    graph = text_to_video(comfy, **sampler)
    graph["image"] = node(comfy.constant("IMAGE", image))
    inputs = {"vae": ["vae", 0], "image": ["image", 0], "width": WIDTH, "height": HEIGHT} | (start or {})
    graph["start"] = node("Magi1ImageToVideo", **inputs)
    return filled(comfy, graph)


def video_to_video(comfy: Comfy, kind: str, video: object, start: dict | None = None, **sampler) -> Graph:
    """The continuation of a VIDEO, IMAGE batch or LATENT; `start` changes Magi1VideoToVideo's inputs."""
    graph = text_to_video(comfy, **sampler)
    graph["clip"] = node(comfy.constant(kind, video))
    inputs = {"video": ["clip", 0], "vae": ["vae", 0], "width": WIDTH, "height": HEIGHT} | (start or {})
    graph["start"] = node("Magi1VideoToVideo", **inputs)
    return filled(comfy, graph)


def picture(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """An IMAGE that the photo model's VAE keeps: smooth, and different everywhere."""
    rows, columns = torch.linspace(0.2, 0.8, height)[:, None, None], torch.linspace(0.1, 0.9, width)[None, :, None]
    return (
        (rows * torch.tensor([1.0, 0.5, 0.0]) + columns * torch.tensor([0.0, 0.5, 1.0])).clamp(0, 1)[None].contiguous()
    )


def clip(frames: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """An IMAGE batch that grows brighter."""
    return picture(height, width) * torch.linspace(0.5, 1, frames)[:, None, None, None]


def random_model(comfy: Comfy, name: str, distilled: bool = True, **shape: int) -> str:
    """Writes a model of random numbers with its special tokens: the photo model's shape but for `shape`; its menu name."""
    folder = comfy.base / "models" / "magi1" / name
    folder.mkdir(parents=True)
    config = replace(REPEATING_CONFIG, model=replace(REPEATING_CONFIG.model, **shape)).as_variant(distilled)
    random = RandomTensors(config.model, dtype=torch.float32, seed=1)
    save_file({key: random.tensor(key) for key in random.tensors}, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    rows = {"caption_token": 1, "logo_token": 1, "other_tokens": 100}
    tokens = np.random.default_rng(1)
    width = config.model.caption_channels
    np.savez(
        folder.parent / SPECIAL_TOKENS, **{k: tokens.standard_normal((n, width), np.float32) for k, n in rows.items()}
    )
    return f"{name}/{name}.safetensors"


def error_between(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()


def refused(comfy: Comfy, graph: Graph) -> str:
    """The message with which a graph is refused, by validation or the node; nothing was loaded for it."""
    with pytest.raises((InvalidGraph, NodeError)) as caught:
        comfy.run(graph)
    if isinstance(caught.value, NodeError):
        assert caught.value.kind == "MagiError", str(caught.value)
    assert comfy.management.loaded_models() == []
    return str(caught.value)


def loaded(comfy: Comfy) -> set[str]:
    """The kinds of models that ComfyUI takes to be loaded; each must really be."""
    models = comfy.management.loaded_models()
    for model in models:
        assert model is not None, "a model that is gone is still listed"
        assert model.loaded_size() == model.model_size() > 0
        assert model.current_loaded_device() == model.load_device
    names = [type(model.model).__name__ for model in models]
    assert len(set(names)) == len(names), "listed twice"
    return set(names)


def remote(comfy: Comfy, server: FakeServer, **inputs: Any) -> Graph:
    """The remote node alone, with a server in the place of the service."""
    given = {"prompt": "A cat", "resolution": "480p", "aspect_ratio": "16:9", "base_url": server.url} | inputs
    return filled(comfy, {"remote": node("Magi1Remote", **given)})


def messages(comfy: Comfy) -> list[str]:
    """What was written under it."""
    return [text for name, text in comfy.events.texts if name == "remote"]
