"""Prompts to text embeddings: by our own T5 or a native CLIP, kept on disk; one prompt for all, or one per second."""

from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io

from ..magi.errors import MagiError
from ..magi.sampling.captions import Caption
from ..magi.text.encode import encode_prompts
from ..magi.text.t5_model import WORKING_BYTES
from .comfyui import host, menus, schema
from .comfyui.clip import encode_with_clip
from .comfyui.families import KEY, Family, family_of_width
from .comfyui.graph import graph_of
from .comfyui.models import Encoder
from .comfyui.preflight import check_loaders
from .comfyui.progress import NodeProgress

_ONE, _LINES = "one prompt", "one line a second"
_MOST_LINES = 600  # the most seconds that MAGI-1 Sampler takes
_MOTION = {"any": (), "static": ("static",), "dynamic": ("dynamic",)}
_LOOK = {"any": (), "3D model": ("3d_model",), "2D anime": ("2d_anime",)}


class Magi1TextEncode(io.ComfyNode):
    """Encodes what to show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1TextEncode",
            display_name="MAGI-1 Text Encode",
            aliases=["prompt", "magi prompt", "prompt schedule", "prompt travel"],
            description="Encodes a prompt, or a prompt for every second. Encodings are kept on disk: the same prompt never needs T5 twice.",
            inputs=[
                io.MultiType.Input(
                    "encoder",
                    types=[schema.TextEncoder, io.Clip],
                    tooltip="From the MAGI-1 Text Encoder Loader, or a t5xxl file from ComfyUI's Load CLIP with type mochi or ltxv.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="A cat looks around, then at the camera",
                    tooltip="What to show. A sentence or two about subject, movement and camera work best.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=[_ONE, _LINES],
                    default=_ONE,
                    tooltip="one line a second: each line is the prompt of one chunk of 24 frames; the last holds to the end.",
                ),
                io.Boolean.Input(
                    "high_quality", default=True, tooltip="Asks for quality, as the published examples do."
                ),
                io.Combo.Input(
                    "motion", options=list(_MOTION), default="any", tooltip="Asks for a still or a lively picture."
                ),
                io.Combo.Input(
                    "look", options=list(_LOOK), default="any", tooltip="Asks for the look of 3D or of drawn animation."
                ),
                schema.advanced(io.Boolean.Input("borders", default=False, tooltip="Asks for a picture with borders.")),
                schema.advanced(
                    io.Boolean.Input(
                        "duration_tokens",
                        default=True,
                        tooltip="Tells each chunk how many are to come, as in training.",
                    )
                ),
                schema.advanced(
                    io.Boolean.Input(
                        "clean_prompt",
                        default=True,
                        tooltip="Cleans the text as the captions in training were cleaned.",
                    )
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="text")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls,
        encoder: Any,
        prompt: str,
        schedule: str,
        high_quality: bool,
        motion: str,
        look: str,
        borders: bool = False,
        duration_tokens: bool = True,
        clean_prompt: bool = True,
    ) -> io.NodeOutput:
        """Returns a CONDITIONING with an entry per prompt, each (1, tokens, 4096)."""
        check_loaders(graph_of(cls.hidden.dynprompt), cls.hidden.unique_id)
        texts = [line for line in prompt.splitlines() if line.strip()] if schedule == _LINES else []
        texts = texts or [prompt]
        if len(texts) > _MOST_LINES:
            raise MagiError(
                f"The prompt has {len(texts):,} lines, each for a second, and a video has {_MOST_LINES} seconds at most. "
                f"Give fewer lines, or choose the schedule {_ONE!r}."
            )
        progress = NodeProgress(cls.hidden.unique_id, load=0.5, encode=0.5)
        notices: list[str] = []
        encode = _encode if isinstance(encoder, Encoder) else encode_with_clip
        embeds = encode(encoder, texts, clean_prompt, progress, notices.append)
        progress.move("encode", 1)
        shown = progress.show_now("\n".join([f"{len(embeds)} prompt{'s' * (len(embeds) > 1)} encoded", *notices]))
        styles = (*(["hq"] * high_quality), *_MOTION[motion], *_LOOK[look], *(["borderness"] * borders))
        family = encoder.family if isinstance(encoder, Encoder) else None
        # What the sampler needs besides the text: the tokens to put in front of it, and whose text it is.
        options = {"styles": styles, "durations": duration_tokens, "family": family, "prompts": len(embeds)}
        return io.NodeOutput([[e[None], {KEY: {**options, "second": i}}] for i, e in enumerate(embeds)], ui=shown)


def _encode(
    encoder: Encoder, texts: list[str], clean: bool, progress: NodeProgress, on_notice: Callable[[str], None]
) -> list[torch.Tensor]:
    loading = True

    def on_progress(done: int, total: int) -> None:
        nonlocal loading  # the count starts again at 0 when T5 is loaded and encoding begins
        progress.move("load" if loading else "encode", done / total)
        progress.show_text(f"{'loading' if loading else 'running'} the text encoder: {done / total:.0%}")
        loading = loading and done < total

    return encode_prompts(
        texts,
        encoder.path,
        tokenizer=encoder.tokenizer,
        cache=menus.text_cache(),
        clean=clean,
        device=encoder.device,
        dtype=encoder.dtype,
        progress=on_progress,
        make_room=_make_room,
        on_notice=on_notice,
    )


def _make_room(nbytes: int) -> None:
    """Has ComfyUI evict models for T5: for all of its weights, or where they cannot fit, for streaming them."""
    usable = host.usable_memory()
    host.make_room(nbytes if usable is None or nbytes <= usable else WORKING_BYTES)


def captions_of(text: list[Any]) -> tuple[list[Caption], tuple[str, ...], bool]:
    """Returns the captions in a CONDITIONING, one per second, its style tokens, and whether it has duration tokens.

    Conditionings of native nodes are taken too: padding outside their attention mask is cut off, the tokens are the
    defaults.

    Raises:
        MagiError: it was combined of several, which would be taken for prompts of one second each; or what it holds can
            be no encoded text.
    """
    entries = [options.get(KEY, {}) for _, options in text] or [{}]
    if text and [e.get("second", 0) for e in entries] != list(range(max(1, entries[0].get("prompts", 1)))):
        raise MagiError(
            f"The text is {len(text)} conditionings combined into one, which MAGI-1 does not know. Put it all into one prompt; or for "
            "another prompt every second, choose the schedule 'one line a second' in MAGI-1 Text Encode."
        )
    captions = []
    for embeds, options in text:
        mask = options.get("attention_mask")
        if embeds.ndim != 3 or not len(embeds) or (mask is not None and mask.shape[-1:] != embeds.shape[1:2]):
            raise MagiError(
                f"The text has the shape {tuple(embeds.shape)}{'' if mask is None else f', its mask {tuple(mask.shape)}'}; "
                "it must be (1, tokens, channels). Use MAGI-1 Text Encode, or a text encoder of T5 v1.1 XXL."
            )
        tokens = embeds[0] if mask is None else embeds[0][mask.reshape(-1, embeds.shape[1])[0].to(embeds.device).bool()]
        captions.append(Caption(tokens.float().cpu()))
    ours = entries[0] or {"styles": ("hq",), "durations": True}
    return captions, tuple(ours.get("styles", ())), bool(ours.get("durations", True))


def family_of(text: list[Any]) -> Family | None:
    """Returns the family of a CONDITIONING's text encoder; None where nothing tells."""
    known: Family | None = text[0][1].get(KEY, {}).get("family") if text else None
    widths = (embeds.shape[-1] for embeds, _ in text if embeds.shape[1])
    return known or family_of_width(next(widths, 0))
