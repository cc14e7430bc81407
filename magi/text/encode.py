"""Prompts to text embeddings: cleaned, looked up on disk, and encoded by T5 only where that is needed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from warnings import warn

import torch

from ..errors import MagiError
from ..system.progress import OnProgress
from .clean import clean_caption
from .embedding_cache import EmbeddingCache, embedding_key
from .encoder import MAX_TOKENS, TextEncoder, encoder_fingerprint
from .t5_checkpoint import find_t5_files, t5_is_missing
from .t5_tokenizer import find_tokenizer, load_tokenizer

_NAMED = 8  # words in a notice


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
    progress: OnProgress | None = None,
    stream: bool | None = None,
    make_room: Callable[[int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> list[torch.Tensor]:
    """Returns the embedding of each text, in order; equal texts are encoded once, and T5 is freed before this returns.

    Where the cache holds all of them, T5 is neither loaded nor even needed on disk.

    Args:
        texts: the prompts, one per chunk or one for all.
        encoder: path of the T5 weights; with `tokenizer`, `device` and `dtype` as `TextEncoder.load` takes them.
        cache: where embeddings are looked up and kept; each as soon as it is done.
        clean: apply the caption cleaning. Without it texts go to T5 as they are.
        max_tokens: longer texts are cut off, with a notice when they are encoded.
        channels: width of the embedding of a blank text, where no other text tells it.
        progress: counts the tensors placed while T5 loads, then again from 0 the encoder blocks done over all texts.
        stream: with `make_room`, where T5's weights wait, as `TextEncoder.load` takes them.
        make_room: see `stream`; called only if T5 is loaded.
        on_notice: called with a sentence where a text is blank or cut off, and where T5 does not know words (which is
            not found out without a tokenizer, as where all is cached); None issues a warning.

    Returns:
        (tokens, d_model) each, float32 on the CPU. A text that is blank (after cleaning) gives (0, channels): it runs as
        unconditional.

    Raises:
        MagiError: as `TextEncoder.load` and `TextEncoder.encode`.
    """
    texts = _listed(texts)
    prepared = _prepared(texts, clean)
    notify = on_notice or (lambda notice: warn(notice, stacklevel=3))
    for original, text in zip(texts, prepared, strict=True):
        if not text:
            notify(blank_notice(original))
    wanted = list(dict.fromkeys(text for text in prepared if text))
    if not wanted:
        return [torch.zeros(0, channels) for _ in prepared]

    unknown = _unknown_words(wanted, encoder, tokenizer)
    if unknown:
        notify(f"The text encoder does not know {_some(unknown)}: to it any unknown word is the same.")
    keys = _keys(wanted, encoder, tokenizer, dtype, cache, max_tokens)
    embeds = _cached(keys, cache)
    missing = [text for text in wanted if text not in embeds]
    if missing:
        with TextEncoder.load(encoder, tokenizer, device, dtype, progress, stream=stream, make_room=make_room) as t5:
            for index, text in enumerate(missing):
                part = _part(progress, index, len(missing))
                embeds[text] = t5.encode(text, max_tokens=max_tokens, progress=part, on_notice=notify)
                if cache:
                    cache.put(keys[text], embeds[text])
    width = embeds[wanted[0]].shape[1]
    return [embeds[text] if text else torch.zeros(0, width) for text in prepared]


def check_encoder(
    texts: Sequence[str],
    encoder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    cache: EmbeddingCache | None = None,
    clean: bool = True,
    dtype: torch.dtype | None = None,
    max_tokens: int = MAX_TOKENS,
) -> None:
    """Raises MagiError where `encode_prompts` will need an encoder that is missing; reads no weights.

    Raises:
        MagiError: a text is not in the cache, and the weights are missing.
    """
    wanted = [text for text in _prepared(_listed(texts), clean) if text]
    if wanted and t5_is_missing(encoder):
        keys = _keys(wanted, encoder, tokenizer, dtype, cache, max_tokens)
        if len(_cached(keys, cache)) < len(keys):
            find_t5_files(encoder)  # raises, and says where it should be


def blank_notice(prompt: str) -> str:
    """Returns a line that says that nothing of a prompt is left to encode."""
    return f"Nothing of the prompt {prompt!r} is left to encode: it runs as unconditional."


def _unknown_words(texts: Sequence[str], encoder: str | Path, tokenizer: str | Path | None) -> list[str]:
    try:
        found = load_tokenizer(find_tokenizer(encoder, tokenizer))
    except MagiError:
        return []  # where it is needed, that is said
    return list(dict.fromkeys(word for text in texts for word in found.unknown_words(text)))


def _some(words: Sequence[str]) -> str:
    """Returns the first words of a list, quoted."""
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return ", ".join(f'"{word}"' for word in words[:_NAMED]) + more


def _listed(texts: Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def _prepared(texts: Sequence[str], clean: bool) -> list[str]:
    return [clean_caption(text) if clean else text.strip() for text in texts]


def _keys(
    texts: Sequence[str],
    encoder: str | Path,
    tokenizer: str | Path | None,
    dtype: torch.dtype | None,
    cache: EmbeddingCache | None,
    max_tokens: int,
) -> dict[str, str]:
    """Returns the cache key of each text, by text."""
    fingerprint = encoder_fingerprint(encoder, tokenizer, dtype, cache)
    return {text: embedding_key(text, fingerprint, max_tokens=max_tokens) for text in texts}


def _cached(keys: dict[str, str], cache: EmbeddingCache | None) -> dict[str, torch.Tensor]:
    """Returns the embeddings that the cache holds, by text."""
    found = {text: cache.get(key) for text, key in keys.items()} if cache else {}
    return {text: embeds for text, embeds in found.items() if embeds is not None}


def _part(progress: OnProgress | None, index: int, count: int) -> OnProgress | None:
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, count * total)
