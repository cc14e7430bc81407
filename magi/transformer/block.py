"""One transformer layer over the chunks of a pass, one block of tokens at a time (arXiv 2505.13211, section 2.2).

Only the K/V are computed for a whole chunk before anything else. Every later step, from the queries to the MLP, needs
nothing but the K/V of other tokens, so it runs one token block after the other and overwrites the hidden states. Beside
the K/V and the hidden states, the activations of a layer are thus as large as a token block, not as a chunk.

Shapes: S tokens per chunk, T tokens per block, D hidden size, H query heads, G K/V groups, d head size, n angles.
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

_INTERLEAVE = 8  # the projection takes self and cross attention interleaved in this many feature blocks


@dataclass
class ChunkState:
    """A chunk on its way through the layers."""

    input: ChunkInput
    hidden: torch.Tensor  # (S, D), overwritten by every layer
    condition: torch.Tensor  # (1, cond)
    angles: tuple[torch.Tensor, torch.Tensor]  # cosine and sine, (S, n) float32 each


@dataclass(frozen=True)
class LayerSettings:
    """Settings that all layers share.

    Attributes:
        shape: sizes of the model.
        dtype: compute dtype.
        attention: one of `attention.attention_choices`.
        token_block: tokens per call of `forward`.
        forward: `layer_forward`, or its compiled form.
        check: called between the parts of a token block; what it raises ends the call. None where one takes no time.
    """

    shape: ModelConfig
    dtype: torch.dtype
    attention: str
    token_block: int
    forward: Callable[..., list[torch.Tensor]]
    check: Callable[[], None] | None = None


# Chunks whose self-attention is one computation: the same hidden states, position and K/V. In the first layer the text
# pass and the previous-chunk pass of guidance share it; in later layers a group holds one chunk.
Group = Sequence[ChunkState]
_ShareKey = tuple[int, int, int]  # chunk, first chunk seen, identity of the latents


def shared_groups(passes: Sequence[Sequence[ChunkState]]) -> list[list[Group]]:
    """Merges the passes whose self-attention in the first layer is the same.

    The hidden states there depend on a chunk's latents alone, and so do its K/V, whatever the pass.

    Returns:
        Lists of groups that see each other's K/V, oldest chunk first.
    """
    merged: list[dict[_ShareKey, list[ChunkState]]] = []
    for states in passes:
        found = {_share_key(s): s for s in states}
        home = next((m for m in merged if m.keys() & found.keys() and _compatible(m, found)), None)
        if home is None:
            merged.append({key: [s] for key, s in found.items()})
        else:
            for key, s in found.items():
                home.setdefault(key, []).append(s)
    return [[groups[key] for key in sorted(groups)] for groups in merged]


def _share_key(s: ChunkState) -> _ShareKey:
    return s.input.chunk, s.input.first_kv_chunk, id(s.input.latents)


def _compatible(merged: Mapping[_ShareKey, object], found: Mapping[_ShareKey, object]) -> bool:
    """Tells whether two sets of chunks see together what each sees alone: the buffer has room for one K/V per chunk.

    No chunk may be in both with other latents or another range, or be computed in one and cached in the other.
    """
    both = merged.keys() | found.keys()
    return len({chunk for chunk, _, _ in both}) == len(both) and (
        _cached_chunks(both) == _cached_chunks(merged.keys()) | _cached_chunks(found.keys())
    )


def _cached_chunks(keys: Collection[_ShareKey]) -> set[int]:
    """Returns the chunks that are seen but not computed, whose K/V come from the cache."""
    return {seen for chunk, first, _ in keys for seen in range(first, chunk)} - {chunk for chunk, _, _ in keys}


def separate_groups(passes: Sequence[Sequence[ChunkState]]) -> list[list[Group]]:
    """Returns the passes with every chunk in a group of its own."""
    return [[[s] for s in states] for states in passes]


def progress_calls(groups: Sequence[Group], token_block: int) -> int:
    """Returns how often `run_layer` calls `on_progress` for these groups."""
    return sum(1 + len(group) * -(-len(group[0].hidden) // token_block) for group in groups)


def run_layer(
    settings: LayerSettings,
    weights: BlockWeights,
    groups: Sequence[Group],
    cached: Mapping[int, torch.Tensor],
    scratch: torch.Tensor,
    caption_kv: dict[int, torch.Tensor],
    store: Callable[[int, torch.Tensor], None],
    on_progress: Callable[[], None],
) -> None:
    """Runs one layer over chunks, oldest first, and overwrites their hidden states.

    Args:
        settings: shared by all layers.
        weights: of this layer.
        groups: chunks that see each other's K/V, in ascending order.
        cached: K/V of the earlier chunks that are seen, (2, G, S, d) each.
        scratch: buffer for the K/V of all chunks that are seen, (2, G, chunks * S, d).
        caption_kv: K/V per caption, by identity; missing ones are added.
        store: receives the K/V of a clean chunk, (2, G, S, d), which it must copy.
        on_progress: called after each part of the work; what it raises ends the call.
    """
    inputs = [s.input for group in groups for s in group]
    tokens = len(groups[0][0].hidden)
    base = min(item.first_kv_chunk for item in inputs)

    def kv_slice(first: int, last: int) -> torch.Tensor:
        return scratch[:, :, (first - base) * tokens : (last + 1 - base) * tokens]  # (2, G, (last + 1 - first) * S, d)

    computed = {item.chunk for item in inputs}
    for chunk in sorted({c for item in inputs for c in range(item.first_kv_chunk, item.chunk)} - computed):
        kv_slice(chunk, chunk).copy_(cached[chunk])
    for group in groups:
        item = group[0].input
        chunk_kv = kv_slice(item.chunk, item.chunk)  # (2, G, S, d)
        _write_kv(settings, weights, group[0], chunk_kv)
        if any(s.input.store for s in group):
            store(item.chunk, chunk_kv)
        on_progress()
        for s in group:
            if id(s.input.caption) not in caption_kv:
                caption_kv[id(s.input.caption)] = _caption_kv(settings, weights, s.input.caption)
        _run_group(settings, weights, group, kv_slice(item.first_kv_chunk, item.chunk), caption_kv, on_progress)


def _run_group(
    settings: LayerSettings,
    weights: BlockWeights,
    group: Group,
    kv: torch.Tensor,
    caption_kv: Mapping[int, torch.Tensor],
    on_progress: Callable[[], None],
) -> None:
    gates = [
        torch.tanh(linear(F.silu(s.condition), weights.gates)).chunk(2, dim=-1) for s in group
    ]  # (1, D) twice each
    text_kv = [caption_kv[id(s.input.caption)] for s in group]
    for block in token_blocks(len(group[0].hidden), settings.token_block):
        cos, sin = (angle[block] for angle in group[0].angles)  # (T, n)
        hidden = [s.hidden[block] for s in group]  # (T, D) each
        results = settings.forward(settings, weights, hidden, cos, sin, kv, text_kv, gates)
        for s, result in zip(group, results, strict=True):
            s.hidden[block] = result
            on_progress()


def layer_forward(
    settings: LayerSettings,
    weights: BlockWeights,
    hidden: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    text_kv: Sequence[torch.Tensor],
    gates: Sequence[Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """Runs all of a layer but its K/V on a token block of chunks that share their self-attention.

    This is the function that `torch.compile` compiles.

    Args:
        settings: shared by all layers.
        weights: of this layer.
        hidden: hidden states per chunk, (T, D).
        cos: of the tokens' rotary angles, (T, n) float32.
        sin: likewise.
        kv: K/V of the chunks that are seen, (2, G, tokens, d).
        text_kv: K/V of the caption per chunk, (2, G, tokens, d).
        gates: of attention and MLP per chunk, (1, D) each.

    Returns:
        The hidden states after the layer per chunk, (T, D).
    """
    eps, gated = settings.shape.layernorm_epsilon, settings.shape.gated_linear_unit
    # One name for the queries and their result, so that the queries are freed before the MLP.
    self_attn, cross_q = _queries(settings, weights, hidden[0], cos, sin)  # (H, T, d) each
    self_attn = _attend(settings, self_attn, kv)  # (T, D)
    result = []
    for x, text, (attn_gate, mlp_gate) in zip(hidden, text_kv, gates, strict=True):
        # Nested calls: a name would keep a result in memory while the next one is computed.
        x = gated_residual(
            x,
            output_projection(
                _interleaved(self_attn, attend(cross_q, text[0], text[1], settings.attention)),  # (T, 2 * D)
                weights.proj,
            ),  # (T, D)
            attn_gate,
            weights.attn_post_norm,
            eps,
        )  # (T, D)
        if settings.check:
            settings.check()
        result.append(
            gated_residual(
                x,
                mlp(layer_norm(x, weights.mlp_norm, eps), weights.fc1, weights.fc2, gated),
                mlp_gate,
                weights.mlp_post_norm,
                eps,
            )  # (T, D)
        )
    return result


def _attend(settings: LayerSettings, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Computes self-attention, (H, T, d) and (2, G, tokens, d) -> (T, H * d); group by group where it takes long."""
    if not settings.check:
        return attend(q, kv[0], kv[1], settings.attention)
    groups = kv.shape[1]
    parts = []
    for queries, k, v in zip(q.chunk(groups), kv[0].split(1), kv[1].split(1), strict=True):
        parts.append(attend(queries, k, v, settings.attention))  # (T, H / G * d)
        settings.check()
    return torch.cat(parts, dim=1)


def _queries(
    settings: LayerSettings, weights: BlockWeights, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the queries of self and of cross attention from hidden states (T, D): (H, T, d) each."""
    shape = settings.shape
    normed = layer_norm(hidden, weights.qkv_norm, shape.layernorm_epsilon)  # (T, D)
    self_q = _norm_and_rotate(settings, linear(normed, weights.q), weights.q_norm, cos, sin)  # (H, T, d)
    cross_q = rearrange(linear(normed, weights.q_x), "t (h d) -> h t d", d=shape.kv_channels)  # (H, T, d)
    return self_q, layer_norm(cross_q, weights.q_norm_x, shape.layernorm_epsilon)


def _interleaved(self_attn: torch.Tensor, cross_attn: torch.Tensor) -> torch.Tensor:
    """Interleaves self and cross attention, (T, D) each, in the projection's feature order: (T, 2 * D)."""
    return rearrange(torch.stack([self_attn, cross_attn]), "two t (b f) -> t (b two f)", b=_INTERLEAVE)


def _write_kv(settings: LayerSettings, weights: BlockWeights, s: ChunkState, out: torch.Tensor) -> None:
    """Computes the K/V of a chunk into `out`, (2, G, S, d)."""
    shape = settings.shape
    for block in token_blocks(len(s.hidden), settings.token_block):
        normed = layer_norm(s.hidden[block], weights.qkv_norm, shape.layernorm_epsilon)  # (T, D)
        cos, sin = (angle[block] for angle in s.angles)  # (T, n)
        out[0, :, block] = _norm_and_rotate(settings, linear(normed, weights.k), weights.k_norm, cos, sin)  # (G, T, d)
        out[1, :, block] = rearrange(linear(normed, weights.v), "t (g d) -> g t d", d=shape.kv_channels)  # (G, T, d)
        if settings.check:
            settings.check()


def _norm_and_rotate(
    settings: LayerSettings, x: torch.Tensor, norm: Norm, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Normalizes and rotates each head in float32: (T, heads * d) -> (heads, T, d) in the compute dtype."""
    x = rearrange(x, "t (h d) -> t h d", d=settings.shape.kv_channels)  # (T, heads, d)
    x = layer_norm(x, norm, settings.shape.layernorm_epsilon)
    return rotate(x, cos, sin).to(settings.dtype).transpose(0, 1)  # (heads, T, d)


def _caption_kv(settings: LayerSettings, weights: BlockWeights, caption: EncodedCaption) -> torch.Tensor:
    """Computes the cross-attention K/V of a caption, (2, G, tokens, d)."""
    d = settings.shape.kv_channels
    kv = rearrange(linear(caption.states, weights.kv_x), "s (g two d) -> two g s d", two=2, d=d)  # (2, G, tokens, d)
    return torch.stack([layer_norm(kv[0], weights.k_norm_x, settings.shape.layernorm_epsilon), kv[1]])


def token_blocks(tokens: int, size: int) -> Iterator[slice]:
    """Yields slices of at most `size` tokens that cover 0 .. tokens."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))
