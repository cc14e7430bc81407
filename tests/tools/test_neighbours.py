"""Heads that begin by looking at the neighbours do."""

import torch

from tools.train_embedded.forward import TrainingTransformer
from tools.train_embedded.neighbours import look_at_neighbours
from tools.train_embedded.train import MODEL

SIDE, FRAMES = 4, 6


def test_the_first_heads_look_at_a_neighbour():
    torch.manual_seed(0)
    transformer = TrainingTransformer(MODEL)
    look_at_neighbours(transformer, SIDE)
    angles = transformer._angles(torch.zeros(1, 1).long(), FRAMES, SIDE, SIDE).flatten(0, 2)
    x = torch.randn(1, FRAMES * SIDE**2, MODEL.hidden_size)
    for number, ways in enumerate([((0, 1), (0, -1)), ((1, 0), (-1, 0))] * 3):
        attention = transformer.videodit_blocks["layers"][number].self_attention
        normed = attention.linear_qkv["layer_norm"](x)
        q, k = (
            attention._rotated(
                norm(attention._heads(attention.linear_qkv[name](normed))), (angles.cos(), angles.sin()), 1
            )
            for name, norm in (("q", attention.q_layernorm), ("k", attention.k_layernorm))
        )
        seen = (q @ k.mT / MODEL.kv_channels**0.5).softmax(-1)[0].unflatten(1, (FRAMES, SIDE, SIDE))
        seen = seen.unflatten(-1, (FRAMES, SIDE, SIDE)).sum(4).mean(1)  # (heads, row, column, row, column)
        for head, (rows, columns) in enumerate(ways):
            places = seen[head, 1 + (rows < 0), 1 + (columns < 0)]
            assert places.argmax() == SIDE * (1 + (rows < 0) + rows) + 1 + (columns < 0) + columns
            assert places.max() > 0.18
