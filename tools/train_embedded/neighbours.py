"""Heads that begin by looking at the neighbours, as a convolution would.

All that the transformer knows of places are differences between them, in the angles of queries and keys. That tokens agree where an
object is, each as seen from itself, was what training took longest for. Three heads of every layer therefore begin with a steady
part in their queries and keys that makes them look one token to the right, to the left, and one frame back, or down, up, and one
frame ahead: so what a token knows gets to the next one, with the way it came. Seven tenths of what they see is that neighbour;
where there is none, at a chunk's end, a head sees its own token instead, which is how that can tell that it is the last.
docs/embedded-model.md has what all this was worth.
"""

import torch

from magi.transformer.rope import rope_angles

from .forward import TrainingTransformer

_STEADY = 12.0  # its size, where what changes has size 1
_SHARPER = 1.7  # factor of queries and keys: the steady part is a part of a vector of given length
# (frames, rows, columns) to what the first heads look at: in every second layer, in the others
_WAYS = (((0, 0, 1), (0, 0, -1), (-1, 0, 0)), ((0, 1, 0), (0, -1, 0), (1, 0, 0)))


@torch.no_grad()
def look_at_neighbours(transformer: TrainingTransformer, side: int) -> None:
    """Changes fresh weights so that the first heads of every layer look at neighbours.

    Args:
        transformer: with fresh weights.
        side: tokens along height and width.
    """
    config, bands = transformer.config, transformer.rope.bands
    step = float(rope_angles(torch.ones(1), 0, 1, side, side).view(side, side, 3)[0, :2, 2].diff())
    angles = 3 * len(bands)
    # The norms of queries and keys take the mean away, which would turn them: it is kept at zero.
    signs = _STEADY * (1 - 2 * (torch.arange(angles) % 2))
    key = torch.zeros(config.kv_channels)
    key[:angles] = signs
    for number, block in enumerate(transformer.videodit_blocks["layers"]):
        attention = block.self_attention
        project = attention.linear_qkv
        steady = torch.randint(0, 2, (config.hidden_size,)).float() * 2 - 1
        project["layer_norm"].bias.copy_(steady)
        for head, (frames, rows, columns) in enumerate(_WAYS[number % 2]):
            turn = torch.cat([bands * frames, bands * step * rows, bands * step * columns])
            query = torch.zeros(config.kv_channels)
            query[:angles], query[angles : 2 * angles] = signs * turn.cos(), signs * turn.sin()
            query[2 * angles :] = -query.sum() / (config.kv_channels - 2 * angles)
            for name, vector in (("q", query), ("k", key)):
                weight = project[name].weight[head * config.kv_channels : (head + 1) * config.kv_channels]
                # Of the normed input's steady part this makes the vector, of the rest what it did before.
                weight += torch.outer(vector - weight @ steady, steady) / config.hidden_size
        for norm in (attention.q_layernorm, attention.k_layernorm):
            norm.weight += _SHARPER - 1
