"""Prompts to text embeddings: cleaned, looked up on disk, and encoded by T5 only where that is needed."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from warnings import warn

import torch

from ..errors import MagiError
from ..system.printable import printable
from ..system.progress import OnProgress
from .clean import clean_caption
from .embedding_cache import EmbeddingCache, embedding_key
from .encoder import MAX_TOKENS, TextEncoder, cut_notice, encoder_fingerprint
from .t5_checkpoint import find_t5_files, t5_is_missing
from .t5_tokenizer import find_tokenizer, load_tokenizer

MOST_CHARACTERS = 8_000  # of a prompt: ten for each token that T5 takes, where English has four or five
_NAMED = 8  # words in a notice
_SHOWN = 80  # characters of a prompt or a word in a notice


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
        max_tokens: longer texts are cut off, with a notice; far longer ones before anything else, at `MOST_CHARACTERS`.
        channels: width of the embedding of a blank text, where no other text tells it.
        progress: counts the tensors placed while T5 loads, then again from 0 the encoder blocks done over all texts.
        stream: with `make_room`, where T5's weights wait, as `TextEncoder.load` takes them.
        make_room: see `stream`; called only if T5 is loaded.
        on_notice: called with a sentence where a text is blank, cut off or has words that T5 does not know (the last two
            are not found out without a tokenizer, as where all is cached); None issues a warning.

    Returns:
        (tokens, d_model) each, float32 on the CPU. A text that is blank (after cleaning) gives (0, channels): it runs as
        unconditional.

    Raises:
        MagiError: as `TextEncoder.load` and `TextEncoder.encode`.
    """
    notify = on_notice or (lambda notice: warn(notice, stacklevel=3))
    prepared = [prepare(text, clean, notify) for text in _listed(texts)]
    wanted = list(dict.fromkeys(text for text in prepared if text))
    if not wanted:
        return [torch.zeros(0, channels) for _ in prepared]

    for notice in _tokenizer_notices(wanted, encoder, tokenizer, max_tokens):
        notify(notice)
    keys = _keys(wanted, encoder, tokenizer, dtype, cache, max_tokens)
    embeds = _cached(keys, cache)
    missing = [text for text in wanted if text not in embeds]
    if missing:
        with TextEncoder.load(encoder, tokenizer, device, dtype, progress, stream=stream, make_room=make_room) as t5:
            for index, text in enumerate(missing):
                part = _part(progress, index, len(missing))
                embeds[text] = t5.encode(text, max_tokens=max_tokens, progress=part, on_notice=_said_before)
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
    wanted = [text for text in (prepare(text, clean, _said_before) for text in _listed(texts)) if text]
    if wanted and t5_is_missing(encoder):
        keys = _keys(wanted, encoder, tokenizer, dtype, cache, max_tokens)
        if len(_cached(keys, cache)) < len(keys):
            find_t5_files(encoder)  # raises, and says where it should be


def prepare(prompt: str, clean: bool, on_notice: Callable[[str], None]) -> str:
    """Returns what of a prompt is encoded: its beginning, cleaned or without the spaces around it. It may be empty.

    Args:
        prompt: any text. What UTF-8 cannot spell (a lone surrogate) becomes a question mark.
        clean: apply the caption cleaning.
        on_notice: called with a sentence where a prompt is far longer than a text encoder takes, and its end is not
            even looked at (or a pasted book would take minutes), and where nothing is left.
    """
    if len(prompt) > MOST_CHARACTERS:
        on_notice(
            f"The prompt has {len(prompt):,} characters; all after the first {MOST_CHARACTERS:,} is left out: "
            f"the text encoder takes {MAX_TOKENS} tokens, about 3,500 characters of English."
        )
    text = prompt[:MOST_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
    text = clean_caption(text) if clean else text.strip()
    if not text:
        on_notice(f"Nothing of the prompt '{printable(prompt, _SHOWN)}' is left to encode: it runs as unconditional.")
    return text


def _said_before(_: str) -> None:
    """Takes a notice that was given already."""


def _tokenizer_notices(
    texts: Sequence[str], encoder: str | Path, tokenizer: str | Path | None, max_tokens: int
) -> Iterator[str]:
    """Yields what a user should know of how texts become tokens."""
    try:
        found = load_tokenizer(find_tokenizer(encoder, tokenizer))
    except MagiError:
        return  # where it is needed, that is said
    unknown = list(dict.fromkeys(word for text in texts for word in found.unknown_words(text)))
    if unknown:
        yield f"The text encoder does not know {_some(unknown)}: to it any unknown word is the same."
    for tokens in (len(found.encode(text)) for text in texts):
        if tokens > max_tokens:
            yield cut_notice(tokens, max_tokens)


def _some(words: Sequence[str]) -> str:
    """Returns the first words of a list, quoted."""
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return ", ".join(f'"{printable(word, _SHOWN)}"' for word in words[:_NAMED]) + more


def _listed(texts: Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


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
