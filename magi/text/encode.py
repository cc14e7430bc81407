"""Prompts to text embeddings: cleaned, looked up on disk, and encoded by T5 only where that is needed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from warnings import warn

import torch

from ..errors import MagiError
from .clean import clean_caption
from .embedding_cache import EmbeddingCache, embedding_key
from .encoder import MAX_TOKENS, TextEncoder, encoder_fingerprint
from .t5_model import Progress


def encode_prompts(
    texts: Sequence[str],
    encoder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    cache: EmbeddingCache | None = None,
    clean: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    max_tokens: int = MAX_TOKENS,
    channels: int = 4096,
    progress: Progress | None = None,
    stream: bool | None = None,
    make_room: Callable[[int], None] | None = None,
) -> list[torch.Tensor]:
    """The embedding of each text, in order; equal texts are encoded once, and T5 is freed before this returns.

    Where the cache holds all of them, T5 is neither loaded nor even needed on disk.

    Args:
        texts: the prompts, one a chunk or one for all.
        encoder: path of the T5 weights; with `tokenizer`, `device` and `dtype` as `TextEncoder.load` takes them.
        cache: where embeddings are looked up and kept; each as soon as it is done.
        clean: apply the caption cleaning. Without it texts go to T5 as they are.
        max_tokens: longer texts are cut off, with a warning.
        channels: width of the embedding of a blank text.
        progress: counts the tensors placed while T5 loads, then anew the encoder blocks done over all texts.
        stream: with `make_room`, where T5's weights wait, as `TextEncoder.load` takes them.
        make_room: see `stream`; called only if T5 is loaded.

    Returns:
        (tokens, d_model) each, float32 on the CPU. A text that is blank (after cleaning) gives (0, channels) and a
        warning: it runs as unconditional.

    Raises:
        MagiError: as `TextEncoder.load` and `TextEncoder.encode`.
    """
    if isinstance(texts, str):
        texts = [texts]
    prepared = [clean_caption(text) if clean else text.strip() for text in texts]
    for original, text in zip(texts, prepared, strict=True):
        if not text:
            warn(f"Nothing of the prompt {original!r} is left to encode: it runs as unconditional.", stacklevel=2)
    wanted = list(dict.fromkeys(text for text in prepared if text))
    if not wanted:
        return [torch.zeros(0, channels) for _ in prepared]

    fingerprint = _fingerprint(encoder, tokenizer, dtype, cache)
    keys = {text: embedding_key(text, fingerprint, max_tokens=max_tokens) for text in wanted}
    embeds: dict[str, torch.Tensor] = {}
    for text, key in keys.items():
        found = cache.get(key) if cache else None
        if found is not None:
            embeds[text] = found
    missing = [text for text in wanted if text not in embeds]
    if missing:
        with TextEncoder.load(encoder, tokenizer, device, dtype, progress, stream=stream, make_room=make_room) as t5:
            for index, text in enumerate(missing):
                embeds[text] = t5.encode(text, max_tokens=max_tokens, progress=_part(progress, index, len(missing)))
                if cache:
                    cache.put(keys[text], embeds[text])
    return [embeds[text] if text else torch.zeros(0, channels) for text in prepared]


def _fingerprint(
    encoder: str | Path, tokenizer: str | Path | None, dtype: torch.dtype | None, cache: EmbeddingCache | None
) -> str:
    """The encoder's fingerprint; from the cache's notes when its files are away (an unplugged drive, a cleaned-up disk)."""
    source = json.dumps([str(Path(encoder).expanduser().resolve()), str(tokenizer), str(dtype)])
    try:
        fingerprint = encoder_fingerprint(encoder, tokenizer, dtype)
    except MagiError:
        noted = cache.recall(source) if cache else None
        if noted is None:
            raise
        return noted
    if cache:
        cache.remember(source, fingerprint)
    return fingerprint


def _part(progress: Progress | None, index: int, count: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, count * total)
