"""From text embeddings to the caption of each chunk: special tokens prepended, cut to length."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import ModelConfig
from ..errors import MagiError
from ..system.finite import check_finite
from .special_tokens import SpecialTokens, check_styles

NULL_TOKENS = 50  # unmasked tokens of the null caption, prepended ones included


@dataclass(frozen=True)
class Caption:
    """A prompt's text-encoder output, (tokens, caption_channels), without padding. With 0 tokens it is unconditional.

    Raises:
        MagiError: `embeds` does not have two axes, or holds NaN or infinity.
    """

    embeds: torch.Tensor

    def __post_init__(self) -> None:
        if self.embeds.ndim != 2:
            raise MagiError(f"A caption is (tokens, channels); this one has the shape {tuple(self.embeds.shape)}.")
        check_finite(
            self.embeds,
            "the prompt's embeddings",
            "Encode it again: the text encoder's weights are damaged, or it runs in float16, in which T5 overflows.",
        )


def need_special_tokens(
    captions: Sequence[Caption], styles: Sequence[str], durations: bool, negative: bool = False
) -> bool:
    """Returns whether anything is to stand in front of a caption. An empty one stays empty: it runs as unconditional."""
    return negative or (bool(styles or durations) and any(len(caption.embeds) for caption in captions))


def null_caption(embedding: torch.Tensor, special: SpecialTokens | None, negative: bool) -> torch.Tensor:
    """Builds the caption of unconditional passes and clean chunks: (50, channels).

    Args:
        embedding: the model's learned null caption, (caption_max_length, channels).
        special: the special tokens, needed for negative tokens.
        negative: prepend the tokens of burnt-in captions, logos, transitions and borders.

    Raises:
        MagiError: negative tokens are requested without special tokens, or these have another width.
    """
    if not negative:
        return embedding[:NULL_TOKENS]
    tokens = _require(special, "negative tokens", embedding.shape[1]).negative()
    return torch.cat([tokens.to(embedding), embedding])[:NULL_TOKENS]


def caption_per_chunk(
    captions: Caption | Sequence[Caption],
    chunks: int,
    model: ModelConfig,
    special: SpecialTokens | None,
    styles: Sequence[str] = ("hq",),
    durations: bool = True,
) -> list[torch.Tensor]:
    """Builds the caption of each generated chunk, (tokens, channels); equal captions share one tensor.

    Args:
        captions: one for all chunks, or one per chunk; the last of a short list is used for all later chunks.
        chunks: number of generated chunks.
        model: gives the length and width of captions.
        special: the special tokens; may be None only without styles and durations.
        styles: names of style tokens to prepend.
        durations: prepend the token that tells a chunk how many follow it.

    Raises:
        MagiError: a caption has the wrong width, tokens are requested without special tokens, or there are more
            captions than chunks.
    """
    check_styles(styles)
    every = [captions] if isinstance(captions, Caption) else list(captions)
    if not every:
        raise MagiError("The list of captions is empty. Give at least one.")
    if len(every) > chunks:
        raise MagiError(
            f"There are {len(every)} captions for {chunks} generated chunks. Give at most one per chunk, or a longer video."
        )
    for caption in every:
        if len(caption.embeds) and caption.embeds.shape[1] != model.caption_channels:
            raise MagiError(
                f"The caption has {caption.embeds.shape[1]} channels, the model takes {model.caption_channels}. "
                "Encode the prompt with the text encoder that belongs to the model (T5 v1.1 XXL for the released ones)."
            )
        if len(caption.embeds) > model.caption_max_length:
            warnings.warn(
                f"The caption has {len(caption.embeds)} tokens; the model sees {model.caption_max_length}.",
                stacklevel=2,
            )
    if need_special_tokens(every, styles, durations):
        _require(special, "style and duration tokens", model.caption_channels)
    made: dict[tuple[int, int | None], torch.Tensor] = {}
    result = []
    for i in range(chunks):
        which, after = min(i, len(every) - 1), min(chunks - 1 - i, 7) if durations else None
        if (which, after) not in made:
            embeds = every[which].embeds
            # No tokens are as wide as any: so a blank prompt needs no text encoder to tell its width.
            embeds = embeds if len(embeds) else embeds.new_zeros(0, model.caption_channels)
            tokens = _with_tokens(embeds, special, styles, after)
            made[which, after] = tokens[: model.caption_max_length]
        result.append(made[which, after])
    return result


def _with_tokens(
    embeds: torch.Tensor, special: SpecialTokens | None, styles: Sequence[str], after: int | None
) -> torch.Tensor:
    if not len(embeds) or special is None or not (styles or after is not None):
        return embeds
    return torch.cat([special.prefix(styles, after).to(embeds), embeds])


def _require(special: SpecialTokens | None, what: str, width: int) -> SpecialTokens:
    if special is None:
        raise MagiError(
            f"The {what} need the special-token file. Give special_tokens.npz (`python -m magi download special_tokens` "
            "fetches it, 3 MB), or switch them off."
        )
    if special.width != width:
        raise MagiError(
            f"The special tokens are {special.width} wide, the model's captions {width}. Use the file of the model."
        )
    return special
