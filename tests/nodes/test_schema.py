"""What the front end is told about each node, in every version of ComfyUI."""

import asyncio
import dataclasses
import importlib
import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.graph import NodeError
from tests.support.magi_graphs import filled, widgets

ENCODER = "Magi1TextEncoderLoader"

NAMES = {
    "Magi1ModelLoader": "MAGI-1 Model Loader",
    "Magi1MemoryOptions": "MAGI-1 Memory Options",
    "Magi1VAELoader": "MAGI-1 VAE Loader",
    "Magi1TextEncoderLoader": "MAGI-1 Text Encoder Loader",
    "Magi1TextEncode": "MAGI-1 Text Encode",
    "Magi1TextToVideo": "MAGI-1 Text to Video (size)",
    "Magi1ImageToVideo": "MAGI-1 Image to Video",
    "Magi1VideoToVideo": "MAGI-1 Video to Video",
    "Magi1Sampler": "MAGI-1 Sampler",
    "Magi1VAEDecode": "MAGI-1 VAE Decode",
    "Magi1DemoImage": "MAGI-1 Demo Image",
    "Magi1Remote": "MAGI-1 Remote (WaveSpeed)",
}
RELEASED = ["4.5B_distill", "4.5B_distill_quant", "4.5B_base", "24B_distill_quant", "24B_distill", "24B_base"]

# What a saved workflow relies on: a name here that changes breaks the workflows of everyone who uses the pack.
SOCKETS = {
    "Magi1ModelLoader": {"memory": "MAGI1_MEMORY"},
    "Magi1MemoryOptions": {},
    "Magi1VAELoader": {},
    "Magi1TextEncoderLoader": {},
    "Magi1TextEncode": {"encoder": "MAGI1_TEXT_ENCODER,CLIP"},
    "Magi1TextToVideo": {},
    "Magi1ImageToVideo": {"vae": "VAE", "image": "IMAGE"},
    "Magi1VideoToVideo": {"video": "VIDEO,IMAGE,LATENT", "vae": "VAE"},
    "Magi1Sampler": {"model": "MAGI1_MODEL", "text": "CONDITIONING", "start": "LATENT", "vae": "VAE"},
    "Magi1VAEDecode": {"samples": "LATENT", "vae": "VAE", "before": "VIDEO,IMAGE"},
    "Magi1DemoImage": {},
    "Magi1Remote": {"image": "IMAGE"},
}
WIDGETS = {
    "Magi1ModelLoader": ["model", "precision", "variant", "attention", "compile"],
    "Magi1MemoryOptions": ["budget_gb", "streaming", "pinned_memory", "cache"],
    "Magi1VAELoader": ["vae", "precision"],
    "Magi1TextEncoderLoader": ["encoder", "device", "precision"],
    "Magi1TextEncode": [
        *("prompt", "schedule", "high_quality", "motion", "look"),
        *("borders", "duration_tokens", "clean_prompt"),
    ],
    "Magi1TextToVideo": ["size", "shape", "width", "height"],
    "Magi1ImageToVideo": ["size", "width", "height", "fit"],
    "Magi1VideoToVideo": ["continue_seconds", "size", "width", "height", "fit", "fps"],
    "Magi1Sampler": [
        *("seconds", "seed", "steps", "window", "guidance"),
        *("previous_guidance", "negative_tokens", "resume"),
    ],
    "Magi1VAEDecode": ["tile_size", "tile_frames"],
    "Magi1DemoImage": ["picture"],
    "Magi1Remote": [
        *("prompt", "frames", "fps", "resolution", "aspect_ratio", "seed", "safety_checker"),
        *("api_version", "base_url", "resume_id"),
    ],
}
ADVANCED = {
    "Magi1ModelLoader": {"attention", "compile"},
    "Magi1VAELoader": {"precision"},
    "Magi1TextEncoderLoader": {"precision"},
    "Magi1TextEncode": {"borders", "duration_tokens", "clean_prompt"},
    "Magi1VideoToVideo": {"fps"},
    "Magi1Sampler": {"previous_guidance", "negative_tokens", "resume"},
    "Magi1VAEDecode": {"tile_size", "tile_frames"},
    "Magi1Remote": {"api_version", "base_url", "resume_id"},
}
OUTPUTS = {
    "Magi1ModelLoader": {"model": "MAGI1_MODEL"},
    "Magi1MemoryOptions": {"memory": "MAGI1_MEMORY"},
    "Magi1VAELoader": {"vae": "VAE"},
    "Magi1TextEncoderLoader": {"encoder": "MAGI1_TEXT_ENCODER"},
    "Magi1TextEncode": {"text": "CONDITIONING"},
    "Magi1TextToVideo": {"start": "LATENT"},
    "Magi1ImageToVideo": {"start": "LATENT"},
    "Magi1VideoToVideo": {"start": "LATENT"},
    "Magi1Sampler": {"samples": "LATENT", "frames": "INT", "info": "STRING"},
    "Magi1VAEDecode": {"frames": "IMAGE", "video": "VIDEO"},
    "Magi1DemoImage": {"image": "IMAGE"},
    "Magi1Remote": {"video": "VIDEO", "frames": "IMAGE", "task_id": "STRING", "url": "STRING"},
}
every_node = pytest.mark.parametrize("name", NAMES)


def inputs_of(comfy, name: str) -> dict[str, tuple[str, dict]]:
    found = comfy.info(name)["input"]
    return found["required"] | found.get("optional", {})


def test_the_list_of_nodes(comfy):
    assert {name: comfy.info(name)["display_name"] for name in comfy.nodes} == NAMES


@every_node
def test_every_part_is_explained(comfy, name):
    info = comfy.info(name)
    assert info["category"] == "MAGI-1"
    assert len(info["description"]) > 30
    for id, (_, options) in inputs_of(comfy, name).items():
        assert len(options.get("tooltip", "")) > 15, f"{id} has no tooltip"


@every_node
def test_inputs_and_outputs_that_workflows_rely_on(comfy, name):
    found = inputs_of(comfy, name)
    own = widgets(comfy, name)
    assert {id: kind for id, (kind, _) in found.items() if id not in own} == SOCKETS[name]
    assert list(own) == WIDGETS[name], "saved workflows hold widget values by position"
    info = comfy.info(name)
    assert dict(zip(info["output_name"], info["output"], strict=True)) == OUTPUTS[name]


@every_node
def test_widgets_have_a_valid_default(comfy, name):
    for id, options in widgets(comfy, name).items():
        if "options" in options:
            assert len(set(options["options"])) == len(options["options"]), id
            assert options.get("default", options["options"][0]) in options["options"], id
            assert not [choice for choice in options["options"] if "\\" in choice], "the same on every system"
        else:
            assert "default" in options, id
            if not isinstance(options["default"], str | bool):
                assert options["min"] <= options["default"] <= options["max"], id


@every_node
def test_what_is_for_experts_is_marked(comfy, name):
    marked = {id for id, (_, options) in inputs_of(comfy, name).items() if options.get("advanced")}
    assert marked == ADVANCED.get(name, set())


def test_menus_offer_what_always_works_first(comfy):
    head = comfy.module("nodes.comfyui.menus").NOT_INSTALLED
    embedded = ["embedded demo model", "embedded demo model (base)", "embedded photo model"]
    assert widgets(comfy, "Magi1ModelLoader")["model"]["options"] == ["auto", *embedded, head, *RELEASED]
    for node, widget, official in (
        ("Magi1VAELoader", "vae", "ckpt/vae"),
        ("Magi1TextEncoderLoader", "encoder", "ckpt/t5/t5-v1_1-xxl"),
    ):
        assert widgets(comfy, node)[widget]["options"] == ["auto", embedded[0], embedded[2], head, official]


def test_menus_tell_what_is_installed(comfy, embedded_home):
    """Entries have the same names on every machine, as workflows hold them; their place tells."""
    head = comfy.module("nodes.comfyui.menus").NOT_INSTALLED
    source = next(embedded_home.glob("*/transformer/model.safetensors"))
    folder = comfy.base / "models/magi1/ckpt/magi/24B_base/inference_weight"
    folder.mkdir(parents=True)
    shutil.copy(source, folder / "model.safetensors")
    menu = widgets(comfy, "Magi1ModelLoader")["model"]["options"]
    assert menu[:2] == ["auto", "24B_base"]
    assert menu[menu.index(head) + 1 :] == [name for name in RELEASED if name != "24B_base"]
    for place, node, widget in (("vae", "Magi1VAELoader", "vae"), ("t5/t5-v1_1-xxl", ENCODER, "encoder")):
        (comfy.base / "models/magi1/ckpt" / place).mkdir(parents=True)
        menu = widgets(comfy, node)[widget]["options"]
        assert menu[:2] == ["auto", f"ckpt/{place}"]
        assert head not in menu


def test_the_head_of_a_part_of_a_menu_is_no_model(comfy):
    head = comfy.module("nodes.comfyui.menus").NOT_INSTALLED
    for node, widget in (("Magi1ModelLoader", "model"), ("Magi1VAELoader", "vae"), (ENCODER, "encoder")):
        with pytest.raises(NodeError, match="only heads those that are not installed"):
            comfy.run(filled(comfy, {"loader": {"class_type": node, "inputs": {widget: head}}}))


@pytest.fixture
def newest(comfy, monkeypatch):
    """A ComfyUI that knows all that ours use; the stand-in is as old as the oldest, and learns it."""
    api = importlib.import_module("comfy_api.latest")
    if not comfy.real:
        names = ("search_aliases", "essentials_category", "price_badge", "has_intermediate_output")
        fields = [(name, Any, None) for name in names]
        monkeypatch.setattr(api.io, "Schema", dataclasses.make_dataclass("Schema", fields, bases=(api.io.Schema,)))
        monkeypatch.setattr(api.io, "PriceBadge", SimpleNamespace, raising=False)
    elif not hasattr(api.io, "NodeReplace"):
        pytest.skip("this ComfyUI is older")
    return {name: cls.define_schema() for name, cls in comfy.nodes.items()}


def test_a_search_finds_what_is_free_and_says_what_is_not(newest):
    assert all(schema.search_aliases for schema in newest.values())
    assert [name for name, schema in newest.items() if "magi1" in schema.search_aliases] == ["Magi1Sampler"]
    assert [name for name, schema in newest.items() if schema.price_badge] == ["Magi1Remote"]
    assert "paid" in newest["Magi1Remote"].price_badge.expr
    assert [n for n, schema in newest.items() if schema.essentials_category == "Video Generation"] == ["Magi1Sampler"]


def test_nodes_that_show_text_have_it_sent_again_from_the_cache(newest):
    silent = {"Magi1MemoryOptions", "Magi1TextToVideo", "Magi1DemoImage"}
    assert {name for name, schema in newest.items() if not schema.has_intermediate_output} == silent


# Of the model authors' pack: inputs that may be links, widgets in their order, and number of outputs.
AUTHORS = {
    "MagiPromptLoader": ([], ["prompt"], 1),
    "MagiTextEncoder": ([], ["prompt", "t5_pretrained_path", "t5_device"], 1),
    "MagiImageLoader": ([], ["image_path"], 1),
    "MagiVideoLoader": ([], ["video_path"], 1),
    "MagiProcess": (
        ["text_embeddings"],
        [
            *("task_mode", "config_path", "image_path", "magi_seed"),
            *("video_size_h", "video_size_w", "num_frames", "num_steps", "fps"),
        ],
        2,
    ),
    "MagiSaveVideo": (["video"], ["output_path", "fps"], 0),
}
CORE = {"PrimitiveStringMultiline": {"value"}, "LoadImage": {"image"}, "LoadVideo": {"file"}}


def test_nodes_of_the_authors_pack_are_replaced(comfy, monkeypatch):
    api, registered = importlib.import_module("comfy_api.latest"), []

    class Registry:
        async def register(self, replacement):
            registered.append(replacement)

    monkeypatch.setattr(api.io, "NodeReplace", lambda **given: SimpleNamespace(**given), raising=False)
    monkeypatch.setattr(api, "ComfyAPI", lambda: SimpleNamespace(node_replacement=Registry()), raising=False)
    extension = comfy.module("nodes.extension").Magi1Extension()
    asyncio.run(extension.on_load())
    assert {found.old_node_id for found in registered} == set(AUTHORS)
    for found in registered:
        links, own, outputs = AUTHORS[found.old_node_id]
        assert found.old_widget_ids == own, "their workflows hold values by position"
        inputs = CORE.get(found.new_node_id) or set(inputs_of(comfy, found.new_node_id))
        for pair in found.input_mapping:
            assert pair["old_id"] in (*links, *own)
            assert pair["new_id"] in inputs
        assert all(pair["old_idx"] < outputs for pair in found.output_mapping or [])


def test_a_comfyui_without_replacements_does_without(comfy, monkeypatch):
    api = importlib.import_module("comfy_api.latest")
    monkeypatch.delattr(api.io, "NodeReplace", raising=False)
    asyncio.run(comfy.module("nodes.extension").Magi1Extension().on_load())


def test_sizes_and_seed(comfy):
    for name in ("Magi1TextToVideo", "Magi1ImageToVideo", "Magi1VideoToVideo"):
        for side in ("width", "height"):
            options = widgets(comfy, name)[side]
            assert (options["default"], options["min"], options["step"]) == (0, 0, 16)
    seed = widgets(comfy, "Magi1Sampler")["seed"]
    assert seed["control_after_generate"]
    assert seed["max"] >= 2**32


@every_node
def test_ids_do_not_clash_with_the_authors_pack(name):
    """Those are MagiImageLoader, MagiTextEncoder and so on, and MagiHuman_... of another pack."""
    assert re.fullmatch(r"Magi1[A-Z]\w+", name)
