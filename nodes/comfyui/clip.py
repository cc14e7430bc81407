"""T5 through ComfyUI's own CLIP objects, for the t5xxl file that people have for other models."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from ...magi.errors import MagiError
from ...magi.text.embedding_cache import EmbeddingCache, embedding_key
from ...magi.text.encode import prepare
from ...magi.text.encoder import MAX_TOKENS, check_embedding, cut_notice
from . import host
from .progress import NodeProgress

_WIDTH = 4096
_OTHER_WEIGHTS = (
    "Choose another t5xxl file. Or it runs in float16, in which T5 overflows: start ComfyUI with --fp32-text-enc."
)
_SAMPLE = 64  # values of each tensor that identify the weights
# The kinds of CLIP whose embedding is T5's alone; flux's other encoder gives only what MAGI-1 does not use.
_KINDS = ({"t5xxl"}, {"t5xxl", "l"})


def encode_with_clip(
    clip: Any, texts: list[str], clean: bool, progress: NodeProgress, on_notice: Callable[[str], None]
) -> list[torch.Tensor]:
    """Returns the embedding of each text, float32 (tokens, 4096) on the CPU, from the cache on disk where it is there.

    `on_notice` is called with a sentence where a text is blank or cut off.

    Raises:
        MagiError: the CLIP is not T5 v1.1 XXL, or gives no usable values.
    """
    if set(clip.tokenize("a", disable_weights=True)) not in _KINDS:
        raise _wrong_clip()
    cache = EmbeddingCache(host.cache_folder() / "text")
    fingerprint = _fingerprint(clip, progress)
    found: dict[str, torch.Tensor] = {}
    for done, text in enumerate(texts, 1):
        prepared = prepare(text, clean, on_notice)
        if text not in found:
            found[text] = torch.zeros(0, _WIDTH)
            if prepared:
                tokens = _tokens(clip, prepared, on_notice)
                key = embedding_key(prepared, fingerprint, max_tokens=MAX_TOKENS)
                embeds = cache.get(key)
                if embeds is None:
                    progress.show_now("running the text encoder")
                    embeds = _encode(clip, tokens)
                    cache.put(key, embeds)
                found[text] = embeds
        progress.move("encode", done / len(texts))
    return [found[text] for text in texts]


def _tokens(clip: Any, text: str, on_notice: Callable[[str], None]) -> dict[str, Any]:
    # T5's positions are relative: without padding there is nothing to mask, and the result is the same.
    tokens = clip.tokenize(text, disable_weights=True, tokenizer_options={"t5xxl_min_length": 1})
    ((*text_tokens, end),) = tokens["t5xxl"]
    if len(text_tokens) >= MAX_TOKENS:
        on_notice(cut_notice(len(text_tokens) + 1, MAX_TOKENS))
    return {**tokens, "t5xxl": [[*text_tokens[: MAX_TOKENS - 1], end]]}


def _encode(clip: Any, tokens: dict[str, Any]) -> torch.Tensor:
    embeds = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)["cond"]
    if embeds.shape[-1] != _WIDTH:
        raise _wrong_clip()
    embeds = embeds[0, : len(tokens["t5xxl"][0])].float().cpu()
    check_embedding(embeds, "The text encoder of Load CLIP", _OTHER_WEIGHTS)
    return embeds


def _fingerprint(clip: Any, progress: NodeProgress) -> str:
    """Returns 64 hexadecimal digits that identify T5's weights, from a sample of each tensor."""
    digest = hashlib.sha256(b"native clip ")
    weights = clip.cond_stage_model.state_dict()
    for done, (name, tensor) in enumerate(sorted(weights.items()), 1):
        if ".t5xxl." in f".{name}" or name.startswith("t5xxl"):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:_SAMPLE].double().cpu().numpy().tobytes())
        progress.move("load", done / len(weights))
    return digest.hexdigest()


def _wrong_clip() -> MagiError:
    return MagiError(
        "This CLIP is not T5 v1.1 XXL, which MAGI-1 was trained with. In Load CLIP choose a t5xxl file (fp16, or an fp8 one) "
        "and the type mochi or ltxv."
    )
