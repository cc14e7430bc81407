"""What of a run is saved beside its latents: the files that shape it, and its inputs."""

from collections.abc import Mapping, Sequence

import torch

from ..checkpoint.reader import Checkpoint
from ..config import LATENT_CHANNELS
from ..errors import MagiError
from ..model_files.locate import ModelFiles
from ..runs.identity import UNKNOWN
from ..sampling.special_tokens import SpecialTokens
from ..system.whole_files import tensor_digest
from ..text.embedding_cache import EmbeddingCache
from ..text.encoder import encoder_fingerprint

_CAPTION, _PREFIX = "caption.", "prefix"  # names of tensors in a store's inputs


def file_settings(
    files: ModelFiles, special: SpecialTokens | None, text_dtype: torch.dtype | None, cache: EmbeddingCache | None
) -> dict[str, str | None]:
    """Returns fingerprints of a model's files, JSON values by name.

    Args:
        files: of the model.
        special: its special tokens.
        text_dtype: dtype that the text encoder computes in.
        cache: of embeddings; it may know the text encoder where its files are gone.

    Raises:
        MagiError: the transformer or the VAE cannot be read any more.
    """
    fingerprints: dict[str, str | None] = {}
    for name, path in (("model", files.transformer), ("vae", files.vae)):
        if path is not None:
            with Checkpoint(path) as checkpoint:
                fingerprints[name] = checkpoint.fingerprint()
    encoder = None
    if files.text_encoder is not None:
        try:
            encoder = encoder_fingerprint(files.text_encoder, files.tokenizer, text_dtype, cache)
        except MagiError:  # the files are missing, which is no harm where the captions are saved
            encoder = UNKNOWN
    tokens = None if special is None else tensor_digest(special.caption, special.logo, special.other)
    return {**fingerprints, "text_encoder": encoder, "special_tokens": tokens}


def pack_inputs(embeds: Sequence[torch.Tensor], prefix: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Returns a run's inputs by name, for `RunStore.keep_inputs`.

    Args:
        embeds: of the prompts, each (tokens, channels).
        prefix: scaled latents that the video starts from, (1, 16, Tp, h, w); None without any.
    """
    inputs = {f"{_CAPTION}{i}": e.clone() for i, e in enumerate(embeds)}
    return inputs if prefix is None else {**inputs, _PREFIX: prefix}


def prefix_in(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Returns the prefix of `pack_inputs`. Raises MagiError where it is none."""
    prefix = inputs.get(_PREFIX)
    if prefix is not None and (prefix.ndim != 5 or prefix.shape[:2] != (1, LATENT_CHANNELS)):
        raise _foreign(f"a prefix of shape {tuple(prefix.shape)}")
    return prefix


def embeds_in(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns the embeddings of `pack_inputs`. Raises MagiError where they are none."""
    names = [f"{_CAPTION}{i}" for i in range(sum(name != _PREFIX for name in inputs))]
    if not names or any(name not in inputs for name in names):
        raise _foreign(f"{len(inputs)} tensors of other names")
    return [inputs[name] for name in names]


def _foreign(what: str) -> MagiError:
    return MagiError(
        f"The saved run's inputs are not those of a run: they hold {what}. Start over, or remove its folder."
    )
