"""One layer of the transformer over the chunks of a pass, a block of tokens at a time (paper section 2.2).

Only keys are computed for a whole chunk before anything else: every later step, from the queries to the MLP, needs nothing of
other tokens but those, and so runs token block by token block, writing over the hidden states. What a layer takes besides keys
and hidden states is thus a block's, not a chunk's.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange

from ..config import ModelConfig
from .attention import attend
from .inputs import ChunkInput, EncodedCaption
from .layers import Norm, gated_residual, layer_norm, linear, mlp, output_projection
from .rope import rotate
from .weights import BlockWeights

_INTERLEAVE = 8  # self and cross attention are interleaved in this many feature blocks before the projection


@dataclass
class Stream:
    """A chunk on its way through the layers."""

    input: ChunkInput
    hidden: torch.Tensor  # (S, D), written over by every layer
    condition: torch.Tensor  # (1, cond)
    angles: tuple[torch.Tensor, torch.Tensor]  # cosine and sine, (S, n) float32


@dataclass(frozen=True)
class LayerSettings:
    """What all layers have in common. `rows` is `layer_rows`, or a compiled form of it."""

    shape: ModelConfig
    dtype: torch.dtype
    attention: str
    token_block: int
    rows: Callable[..., list[torch.Tensor]]


# Streams whose self-attention is one computation: the same hidden states, position and keys. In the first layer the text and
# the previous pass of guidance share it; after that a group holds one stream.
Group = Sequence[Stream]
_Share = tuple[int, int, int]  # chunk, first chunk seen, identity of the latents


def shared_groups(passes: Sequence[Sequence[Stream]]) -> list[list[Group]]:
    """The passes with what they share in the first layer taken together: lists of groups that see each other's keys, oldest first.

    There hidden states depend on a chunk's latents alone, and so do its keys, whatever the pass.
    """
    merged: list[dict[_Share, list[Stream]]] = []
    for streams in passes:
        found = {_share_of(s): s for s in streams}
        home = next((m for m in merged if m.keys() & found.keys() and _agree(m, found)), None)
        if home is None:
            merged.append({key: [s] for key, s in found.items()})
        else:
            for key, s in found.items():
                home.setdefault(key, []).append(s)
    return [[groups[key] for key in sorted(groups)] for groups in merged]


def _share_of(s: Stream) -> _Share:
    return s.input.chunk, s.input.first_key, id(s.input.latents)


def _agree(merged: Mapping[_Share, object], found: Mapping[_Share, object]) -> bool:
    """Whether together they see what each sees alone: a chunk's keys can be in the buffer only once.

    None may stand in both with other latents or another range, nor be held by the one and taken from the cache by the other.
    """
    both = merged.keys() | found.keys()
    return len({chunk for chunk, _, _ in both}) == len(both) and (
        _cached(both) == _cached(merged.keys()) | _cached(found.keys())
    )


def _cached(keys: Collection[_Share]) -> set[int]:
    """Chunks that are seen but not held."""
    return {seen for chunk, first, _ in keys for seen in range(first, chunk)} - {chunk for chunk, _, _ in keys}


def separate_groups(passes: Sequence[Sequence[Stream]]) -> list[list[Group]]:
    """The passes, each stream on its own."""
    return [[[s] for s in streams] for streams in passes]


def parts(groups: Sequence[Group], token_block: int) -> int:
    """How often `run_layer` calls `alive` for these groups."""
    return sum(1 + len(group) * -(-len(group[0].hidden) // token_block) for group in groups)


def run_layer(
    settings: LayerSettings,
    weights: BlockWeights,
    groups: Sequence[Group],
    cached: Mapping[int, torch.Tensor],
    scratch: torch.Tensor,
    text_keys: dict[int, torch.Tensor],
    store: Callable[[int, torch.Tensor], None],
    alive: Callable[[], None],
) -> None:
    """Takes streams through a layer, oldest chunk first.

    Args:
        settings: of all layers.
        weights: of this one.
        groups: streams that see each other's keys, in ascending order of their chunks.
        cached: keys and values of earlier chunks that are seen, (2, G, S, d) each.
        scratch: room for keys and values of all that is seen, (2, G, chunks * S, d).
        text_keys: of captions by identity; those that are missing are added.
        store: takes a clean chunk's keys and values, which it must copy.
        alive: called after each part of the work.
    """
    inputs = [s.input for group in groups for s in group]
    tokens = len(groups[0][0].hidden)
    base = min(item.first_key for item in inputs)

    def place(first: int, last: int) -> torch.Tensor:  # keys of chunks first .. last, in the scratch buffer
        return scratch[:, :, (first - base) * tokens : (last + 1 - base) * tokens]

    own = {item.chunk for item in inputs}
    for chunk in sorted({c for item in inputs for c in range(item.first_key, item.chunk)} - own):
        place(chunk, chunk).copy_(cached[chunk])
    for group in groups:
        item = group[0].input
        here = place(item.chunk, item.chunk)
        _write_keys(settings, weights, group[0], here)
        if any(s.input.store for s in group):
            store(item.chunk, here)
        alive()
        for s in group:
            if id(s.input.caption) not in text_keys:
                text_keys[id(s.input.caption)] = _text_keys(settings, weights, s.input.caption)
        _run_group(settings, weights, group, place(item.first_key, item.chunk), text_keys, alive)


def _run_group(
    settings: LayerSettings,
    weights: BlockWeights,
    group: Group,
    keys: torch.Tensor,
    text_keys: Mapping[int, torch.Tensor],
    alive: Callable[[], None],
) -> None:
    gates = [torch.tanh(linear(F.silu(s.condition), weights.gates)).chunk(2, dim=-1) for s in group]
    texts = [text_keys[id(s.input.caption)] for s in group]
    for rows in token_blocks(len(group[0].hidden), settings.token_block):
        cos, sin = (angle[rows] for angle in group[0].angles)
        after = settings.rows(settings, weights, [s.hidden[rows] for s in group], cos, sin, keys, texts, gates)
        for s, hidden in zip(group, after, strict=True):
            s.hidden[rows] = hidden
            alive()


def layer_rows(
    settings: LayerSettings,
    weights: BlockWeights,
    hidden: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    texts: Sequence[torch.Tensor],
    gates: Sequence[Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """All of a layer but the keys, for a block of tokens of streams that share their self-attention: what `torch.compile` is given.

    Args:
        settings: of all layers.
        weights: of this one.
        hidden: hidden states of each stream, (rows, D).
        cos: (rows, n) float32, of the tokens' places.
        sin: likewise.
        keys: keys and values that are seen, (2, G, tokens, d).
        texts: keys and values of each stream's caption, (2, G, tokens, d).
        gates: of attention and MLP for each stream, (1, D).

    Returns:
        The hidden states after the layer.
    """
    eps, gated = settings.shape.layernorm_epsilon, settings.shape.gated_linear_unit
    own, cross = _queries(settings, weights, hidden[0], cos, sin)
    own = attend(own, keys[0], keys[1], settings.attention)
    result = []
    for x, text, (attn_gate, mlp_gate) in zip(hidden, texts, gates, strict=True):
        # Results without a name: one would keep them in memory while the next are made.
        x = gated_residual(
            x,
            output_projection(_interleaved(own, attend(cross, text[0], text[1], settings.attention)), weights.proj),
            attn_gate,
            weights.attn_post_norm,
            eps,
        )
        result.append(
            gated_residual(
                x,
                mlp(layer_norm(x, weights.mlp_norm, eps), weights.fc1, weights.fc2, gated),
                mlp_gate,
                weights.mlp_post_norm,
                eps,
            )
        )
    return result


def _queries(
    settings: LayerSettings, weights: BlockWeights, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of self and cross attention, (heads, rows, d) each."""
    shape = settings.shape
    normed = layer_norm(hidden, weights.qkv_norm, shape.layernorm_epsilon)
    own = _rotated(settings, linear(normed, weights.q), weights.q_norm, cos, sin)
    cross = rearrange(linear(normed, weights.q_x), "s (n d) -> n s d", d=shape.kv_channels)
    return own, layer_norm(cross, weights.q_norm_x, shape.layernorm_epsilon)


def _interleaved(own: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Self and cross attention, (rows, D) each, as the projection takes them: (rows, 2 * D)."""
    return rearrange(torch.stack([own, cross]), "two s (b f) -> s (b two f)", b=_INTERLEAVE)


def _write_keys(settings: LayerSettings, weights: BlockWeights, s: Stream, out: torch.Tensor) -> None:
    """A chunk's keys and values into `out`, (2, G, S, d)."""
    shape = settings.shape
    for rows in token_blocks(len(s.hidden), settings.token_block):
        normed = layer_norm(s.hidden[rows], weights.qkv_norm, shape.layernorm_epsilon)
        cos, sin = (angle[rows] for angle in s.angles)
        out[0, :, rows] = _rotated(settings, linear(normed, weights.k), weights.k_norm, cos, sin)
        out[1, :, rows] = rearrange(linear(normed, weights.v), "s (g d) -> g s d", d=shape.kv_channels)


def _rotated(
    settings: LayerSettings, x: torch.Tensor, norm: Norm, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Per-head norm and rotation in float32: (rows, n * d) -> (n, rows, d) in the compute dtype."""
    x = rearrange(x, "s (n d) -> s n d", d=settings.shape.kv_channels)
    x = layer_norm(x, norm, settings.shape.layernorm_epsilon)
    return rotate(x, cos, sin).to(settings.dtype).transpose(0, 1)


def _text_keys(settings: LayerSettings, weights: BlockWeights, caption: EncodedCaption) -> torch.Tensor:
    """Keys and values of a caption, (2, G, tokens, d)."""
    d = settings.shape.kv_channels
    kv = rearrange(linear(caption.states, weights.kv_x), "s (g two d) -> two g s d", two=2, d=d)
    return torch.stack([layer_norm(kv[0], weights.k_norm_x, settings.shape.layernorm_epsilon), kv[1]])


def token_blocks(tokens: int, size: int) -> Iterator[slice]:
    """Rows 0 .. tokens, `size` at a time."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))
