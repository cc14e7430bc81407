"""The embedded model's text side: a tokenizer of the world's words, a small T5 encoder, and the tokens put before captions.

They are trained together with the transformer. Inference reads them with the classes of `magi.text`, which run each text on
its own; here a batch of texts is padded and masked, which gives the same (tests/tools/test_train.py).
"""

import json
from collections.abc import Sequence

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from .captions import vocabulary, words

WIDTH = 64
PREFIX = 7  # special tokens before a caption, at most
LONGEST = 33  # tokens of a caption itself, at most
CAPTION_TOKENS = PREFIX + LONGEST
SPECIAL_ROWS = 100  # as many as the published file has
PAD, END, UNKNOWN = 0, 1, 2
_FIRST_WORD = 3

T5 = {
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
}


def ids() -> dict[str, int]:
    """Returns the id of every word."""
    return {word: _FIRST_WORD + i for i, word in enumerate(vocabulary())}


def tokenizer_json() -> str:
    """Returns the content of tokenizer.json: whole words in lower case, all others one unknown word."""
    specials = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": number,
                    "content": content,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for content, number in specials.items()
            ],
            "normalizer": {"type": "Lowercase"},
            # As `words` splits: runs of letters, and every other character on its own.
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "WhitespaceSplit"},
                    {"type": "Split", "pattern": {"Regex": "[a-z]+|[^a-z]"}, "behavior": "Isolated", "invert": False},
                ],
            },
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": specials | ids(), "unk_token": "<unk>"},
        },
        indent=1,
    )


def tokenize(texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, the end token last."""
    known = ids()
    return [[*(known.get(word, UNKNOWN) for word in words(text)), END] for text in texts]


class TextEncoder(nn.Module):
    """The T5 encoder and the special tokens, with weights from torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        config = T5Config(
            **T5, vocab_size=_FIRST_WORD + len(ids()), dropout_rate=0.0, is_encoder_decoder=False, use_cache=False
        )
        self.t5 = T5EncoderModel(config)
        self.special = nn.Parameter(torch.randn(SPECIAL_ROWS, WIDTH))  # `other_tokens` of the file

    def forward(self, tokens: torch.Tensor, prefix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes captions.

        Args:
            tokens: ids, (N, L), padded with PAD.
            prefix: rows of the special tokens to put before each, (N, P), padded at its end with -1.

        Returns:
            Captions (N, P + L, WIDTH), the tokens of each at its start, and their lengths (N,).
        """
        held, before = tokens != PAD, prefix >= 0
        embeds = self.t5(input_ids=tokens, attention_mask=held.long()).last_hidden_state
        every = torch.cat([self.special[prefix.clamp_min(0)], embeds], dim=1)  # (N, P + L, WIDTH)
        there = torch.cat([before, held], dim=1)
        order = (~there).to(torch.uint8).argsort(dim=1, stable=True)  # those that are there first
        return every.gather(1, order[..., None].expand_as(every)), there.sum(1)
