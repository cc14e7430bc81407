"""How many floating-point operations a forward call does: the matrix products and attention, a product and a sum as two."""

from collections.abc import Sequence

from .config import ModelConfig
from .passes import ChunkInput, Pass


def forward_flops(config: ModelConfig, passes: Sequence[Pass]) -> float:
    """Operations of one `Transformer.forward` over these passes."""
    return sum(
        chunk_flops(
            config,
            tokens := chunk_tokens(config, item),
            tokens * (item.chunk + 1 - item.first_key),
            len(item.caption.states),
        )
        for p in passes
        for item in p.chunks
    )


def chunk_tokens(config: ModelConfig, item: ChunkInput) -> int:
    """Tokens of a chunk."""
    _, _, frames, height, width = item.latents.shape
    return frames // config.t_patch_size * (height // config.patch_size) * (width // config.patch_size)


def chunk_flops(config: ModelConfig, tokens: int, keys: int, text: int) -> float:
    """Operations of a chunk of so many tokens that looks at `keys` tokens of video and `text` of its caption."""
    d = config.hidden_size
    kv = config.num_query_groups * config.kv_channels
    # q and q_x, k and v, the projection of both attentions, the MLP
    weights = 2 * d * d + 2 * kv * d + 2 * d * d + config.fc1_size * d + d * config.ffn_hidden_size
    attention = 2 * d * (keys + text)  # scores and weighted values
    return 2.0 * config.num_layers * tokens * (weights + attention)
