"""Nodes of the model authors' own pack, and what ComfyUI offers for them where a workflow has them and that pack is missing."""

from typing import Any

import comfy_api.latest as api

# Old id -> new id, the old widgets in their order, {new input: old one}, and whether the old output 0 becomes the new one.
# Files and paths of theirs have no place here: the loaders know where files are.
_NODES: dict[str, tuple[str, list[str], dict[str, str], bool]] = {
    "MagiPromptLoader": ("PrimitiveStringMultiline", ["prompt"], {"value": "prompt"}, True),
    "MagiTextEncoder": ("Magi1TextEncode", ["prompt", "t5_pretrained_path", "t5_device"], {"prompt": "prompt"}, True),
    "MagiImageLoader": ("LoadImage", ["image_path"], {"image": "image_path"}, False),
    "MagiVideoLoader": ("LoadVideo", ["video_path"], {"file": "video_path"}, False),
    "MagiProcess": (
        "Magi1Sampler",
        [
            *("task_mode", "config_path", "image_path", "magi_seed"),
            *("video_size_h", "video_size_w", "num_frames", "num_steps", "fps"),
        ],
        {"text": "text_embeddings", "seed": "magi_seed", "steps": "num_steps"},
        True,
    ),
    # Its input was frames, and is what the sampler makes now: so the decoder takes its place. ComfyUI's Save Video follows.
    "MagiSaveVideo": ("Magi1VAEDecode", ["output_path", "fps"], {"samples": "video"}, False),
}


async def register_replacements() -> None:
    """Registers them; does nothing in a ComfyUI that knows no replacements."""
    replace: Any = getattr(api.io, "NodeReplace", None)
    if replace is None or not hasattr(api, "ComfyAPI"):
        return
    registry = api.ComfyAPI().node_replacement
    for old, (new, widgets, inputs, has_output) in _NODES.items():
        mapping: list[dict[str, Any]] = [{"new_id": mine, "old_id": theirs} for mine, theirs in inputs.items()]
        outputs = [{"new_idx": 0, "old_idx": 0}] if has_output else None
        await registry.register(
            replace(
                new_node_id=new,
                old_node_id=old,
                old_widget_ids=widgets,
                input_mapping=mapping,
                output_mapping=outputs,
            )
        )
