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
    sizes = FRAMES, SIDE, SIDE
    where = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in sizes), indexing="ij"), -1).flatten(0, 2)
    for number in range(MODEL.num_layers):
        attention = transformer.videodit_blocks["layers"][number].self_attention
        normed = attention.linear_qkv["layer_norm"](x)
        q, k = (
            attention._rotated(
                norm(attention._heads(attention.linear_qkv[name](normed))), (angles.cos(), angles.sin()), 1
            )
            for name, norm in (("q", attention.q_layernorm), ("k", attention.k_layernorm))
        )
        seen = (q @ k.mT / MODEL.kv_channels**0.5).softmax(-1)[0]  # (heads, S, S)
        ways = where[None, :] - where[:, None]  # (S, S, 3), from each token to each
        for head, way in enumerate(torch.tensor(neighbours._WAYS[number % 2], dtype=torch.float32)):
            neighbour = (ways == way).all(-1)  # (S, S)
            there = neighbour.any(1)
            assert (seen[head] * neighbour)[there].sum(1).mean() > 0.6
            if way[0]:  # at the first or last frame
                assert (seen[head].diagonal())[~there].mean() > 0.6
