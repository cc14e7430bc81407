"""Heads that begin by looking at the neighbours do."""

import torch

from tools.train_embedded import neighbours
from tools.train_embedded.forward import TrainingTransformer
from tools.train_embedded.train import MODEL

SIDE, FRAMES = 4, 6


def test_the_first_heads_look_at_a_neighbour():
    torch.manual_seed(0)
    transformer = TrainingTransformer(MODEL)
    neighbours.look_at_neighbours(transformer, SIDE)
    angles = transformer._angles(torch.zeros(1, 1).long(), FRAMES, SIDE, SIDE).flatten(0, 2)
    x = torch.randn(1, FRAMES * SIDE**2, MODEL.hidden_size)
    for number, ways in enumerate(neighbours._WAYS * 3):
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
        index = torch.arange(float(SIDE))
        inner = seen[:, 1:3, 1:3].mean((1, 2))  # (heads, row, column), of the tokens in the middle
        rows_, columns_ = (inner.sum(-1) * index).sum(-1), (inner.sum(-2) * index).sum(-1)
        along, across = (columns_, rows_) if ways[0][1] else (rows_, columns_)
        assert along[0] - along[1] > 1, "one head looks ahead, the other back"
        assert abs(across[0] - across[1]) < 0.7
