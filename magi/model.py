"""The MAGI-1 transformer (paper section 2.2), run layer by layer over all passes and chunks of an iteration at once.

Each layer's weights are asked for once per iteration and applied to every chunk of every pass before the next layer's: what
streams weights from the host thus moves them once, whatever the number of passes. Within a pass chunks are taken oldest
first, and a chunk's keys are written before a later chunk looks at them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from einops import rearrange

from .attention import attend, check_attention
from .checkpoint import Checkpoint
from .config import MagiConfig, ModelConfig
from .device import fits, pick_device
from .errors import MagiError
from .kv_cache import KVCache
from .layers import Norm, gated_residual, layer_norm, linear, mlp, output_projection, timestep_embedding
from .memory import CacheDevice, weight_sizes
from .offload import block_source
from .passes import ChunkInput, EncodedCaption, Pass
from .quant import require_float8
from .recognise import resolve_config
from .rope import rope_angles, rotate
from .weights import (
    BlockSource,
    BlockWeights,
    OuterWeights,
    Precision,
    TensorSource,
    WeightReader,
    check_tensors,
    compute_dtype,
    has_fp8,
)

_TIME_FREQUENCIES = 256
_INTERLEAVE = 8  # self and cross attention are interleaved in this many feature blocks before the projection


@dataclass
class _Stream:
    """A chunk on its way through the layers."""

    input: ChunkInput
    hidden: torch.Tensor  # (S, D)
    condition: torch.Tensor  # (1, cond)
    cos: torch.Tensor
    sin: torch.Tensor


class Transformer:
    """A MAGI-1 transformer of any size, on any device."""

    def __init__(
        self,
        config: MagiConfig,
        outer: OuterWeights,
        blocks: BlockSource,
        device: torch.device,
        dtype: torch.dtype,
        attention: str = "auto",
        cache_device: CacheDevice = "device",
    ):
        """Ties weights together; `load_transformer` is the usual way to one."""
        self.config = config
        self.outer = outer
        self.blocks = blocks
        self.device = device
        self.dtype = dtype
        self.attention = attention
        self.cache_device = cache_device

    @property
    def shape(self) -> ModelConfig:
        """Sizes of the transformer."""
        return self.config.model

    def new_cache(self, slots: int, height: int, width: int) -> KVCache:
        """An empty cache for `slots` chunks of latents of this height and width."""
        c = self.shape
        tokens = self.config.runtime.chunk_width * (height // c.patch_size) * (width // c.patch_size)
        where = self.device if self.cache_device == "device" else "cpu"
        return KVCache(c.num_layers, slots, c.num_query_groups, tokens, c.kv_channels, dtype=self.dtype, device=where)

    def encode_caption(self, embeds: torch.Tensor) -> EncodedCaption:
        """Projects text embeddings (tokens, caption_channels), real tokens only."""
        states = F.silu(linear(embeds.to(self.device, torch.float32), self.outer.caption))
        return EncodedCaption(states.to(self.dtype))

    def forward(
        self,
        passes: Sequence[Pass],
        cache: KVCache,
        step_size: float | None = None,
        heartbeat: Callable[[float], None] | None = None,
    ) -> list[list[torch.Tensor | None]]:
        """Velocities of every chunk of every pass.

        Args:
            passes: what to run. Chunks before a pass's own that it sees must be in the cache.
            cache: clean keys and values, read and (where a chunk says so) written.
            step_size: the second time signal of distilled models.
            heartbeat: called many times on the way with the fraction done; what it raises ends the call.

        Returns:
            Per pass and chunk: (1, 16, W, h, w) float32, None where it was not wanted.
        """
        streams = [[self._embed(c, p.conditional, step_size) for c in p.chunks] for p in passes]
        scratch = self._key_scratch(streams)
        parts, done = 2 * sum(map(len, streams)) * len(self.blocks), 0

        def alive() -> None:
            nonlocal done
            done += 1
            if heartbeat:
                heartbeat(done / parts)

        for layer, weights in enumerate(self.blocks):
            text_keys: dict[int, torch.Tensor] = {}  # chunks mostly share their caption
            for pass_streams in streams:
                self._run_layer(layer, weights, pass_streams, cache, scratch, text_keys, alive)
        return [[self._velocity(s) if s.input.wanted else None for s in pass_streams] for pass_streams in streams]

    # -- one layer ---------------------------------------------------------------------------------------------------

    def _run_layer(
        self,
        layer: int,
        weights: BlockWeights,
        streams: list[_Stream],
        cache: KVCache,
        scratch: torch.Tensor,
        text_keys: dict[int, torch.Tensor],
        alive: Callable[[], None],
    ) -> None:
        eps = self.shape.layernorm_epsilon
        tokens = streams[0].hidden.shape[0]
        own = {s.input.chunk for s in streams}
        base = min(s.input.first_key for s in streams)

        def place(first: int, last: int) -> torch.Tensor:  # keys of chunks first .. last, in the scratch buffer
            return scratch[:, :, (first - base) * tokens : (last + 1 - base) * tokens]

        seen = {chunk for s in streams for chunk in range(s.input.first_key, s.input.chunk)}
        for chunk in sorted(seen - own):
            cache.load(layer, chunk, place(chunk, chunk))
        for s in streams:
            item = s.input
            caption = id(item.caption)
            if caption not in text_keys:
                text_keys[caption] = self._text_keys(weights, item.caption)
            normed = layer_norm(s.hidden, weights.qkv_norm, eps)
            self._keys(weights, normed, s, out=place(item.chunk, item.chunk))
            if item.store:
                cache.store(layer, item.chunk, place(item.chunk, item.chunk))
            gates = torch.tanh(linear(F.silu(s.condition), weights.gates))
            attn_gate, mlp_gate = gates.chunk(2, dim=-1)
            # Results without a name: one would keep them in memory while the next are made.
            keys, text = place(item.first_key, item.chunk), text_keys[caption]
            s.hidden = gated_residual(
                s.hidden,
                output_projection(self._attention(weights, normed, s, keys, text), weights.proj),
                attn_gate,
                weights.attn_post_norm,
                eps,
            )
            alive()
            normed = layer_norm(s.hidden, weights.mlp_norm, eps)
            s.hidden = gated_residual(
                s.hidden,
                mlp(normed, weights.fc1, weights.fc2, self.shape.gated_linear_unit),
                mlp_gate,
                weights.mlp_post_norm,
                eps,
            )
            alive()

    def _keys(self, weights: BlockWeights, normed: torch.Tensor, s: _Stream, out: torch.Tensor) -> None:
        """Writes a chunk's keys and values into `out`, (2, G, S, d)."""
        out[0] = self._rotated(linear(normed, weights.k), weights.k_norm, s)
        out[1] = rearrange(linear(normed, weights.v), "s (g d) -> g s d", d=self.shape.kv_channels)

    def _rotated(self, x: torch.Tensor, norm: Norm, s: _Stream) -> torch.Tensor:
        """Per-head norm and rotation in float32: (S, n * d) -> (n, S, d) in the compute dtype."""
        x = rearrange(x, "s (n d) -> s n d", d=self.shape.kv_channels)
        x = layer_norm(x, norm, self.shape.layernorm_epsilon)
        return rotate(x, s.cos, s.sin).to(self.dtype).transpose(0, 1)

    def _text_keys(self, weights: BlockWeights, caption: EncodedCaption) -> torch.Tensor:
        """Keys and values of a caption, (2, G, tokens, d)."""
        kv = rearrange(
            linear(caption.states, weights.kv_x), "s (g two d) -> two g s d", two=2, d=self.shape.kv_channels
        )
        return torch.stack([layer_norm(kv[0], weights.k_norm_x, self.shape.layernorm_epsilon), kv[1]])

    def _attention(
        self, weights: BlockWeights, normed: torch.Tensor, s: _Stream, keys: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        """Self and cross attention side by side, interleaved for the projection: (S, 2 * D)."""
        own = self._rotated(linear(normed, weights.q), weights.q_norm, s)
        own = attend(own, keys[0], keys[1], self.attention)
        cross = rearrange(linear(normed, weights.q_x), "s (n d) -> n s d", d=self.shape.kv_channels)
        cross = layer_norm(cross, weights.q_norm_x, self.shape.layernorm_epsilon)
        cross = attend(cross, text[0], text[1], self.attention)
        return rearrange(torch.stack([own, cross]), "two s (b f) -> s (b two f)", b=_INTERLEAVE)

    # -- before and after the layers ---------------------------------------------------------------------------------

    def _embed(self, item: ChunkInput, conditional: bool, step_size: float | None) -> _Stream:
        c = self.shape
        x = item.latents.to(self.device, torch.float32) * c.x_rescale_factor
        if c.half_channel_vae:
            x = torch.cat([x, x], dim=1)
        patches = rearrange(
            x, "1 c (t r) (h p) (w q) -> (t h w) (c r p q)", r=c.t_patch_size, p=c.patch_size, q=c.patch_size
        )
        _, _, frames, height, width = x.shape
        angles = rope_angles(
            self.outer.rope_bands, item.chunk * frames, frames, height // c.patch_size, width // c.patch_size
        )
        return _Stream(
            item,
            linear(patches, self.outer.patch).to(self.dtype),
            self._condition(item.timestep, conditional, step_size),
            angles.cos(),
            angles.sin(),
        )

    def _condition(self, timestep: float, conditional: bool, step_size: float | None) -> torch.Tensor:
        """(1, cond): the time (and step size), plus a constant that only tells conditional from unconditional passes."""
        condition = self._time(timestep)
        if step_size is not None:
            condition = condition + self._time(step_size)
        null = self.outer.null_caption[-2 if conditional else -1][None]
        return (condition + linear(null, self.outer.caption_condition)).to(self.dtype)

    def _time(self, t: float) -> torch.Tensor:
        embedding = timestep_embedding(t, _TIME_FREQUENCIES, self.device).to(self.dtype).float()
        return linear(F.silu(linear(embedding, self.outer.time_in)), self.outer.time_out)

    def _key_scratch(self, streams: list[list[_Stream]]) -> torch.Tensor:
        """Room for the keys and values of all chunks that the widest pass sees: (2, G, chunks * S, d)."""
        c = self.shape
        widest = max(p[-1].input.chunk + 1 - min(s.input.first_key for s in p) for p in streams)
        tokens = streams[0][0].hidden.shape[0]
        shape = (2, c.num_query_groups, widest * tokens, c.kv_channels)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _velocity(self, s: _Stream) -> torch.Tensor:
        c = self.shape
        _, _, _, height, width = s.input.latents.shape
        out = linear(layer_norm(s.hidden, self.outer.final_norm, c.layernorm_epsilon), self.outer.final)
        video = rearrange(
            out,
            "(t h w) (r p q c) -> 1 c (t r) (h p) (w q)",
            h=height // c.patch_size,
            w=width // c.patch_size,
            r=c.t_patch_size,
            p=c.patch_size,
            q=c.patch_size,
        )
        return video[:, : s.input.latents.shape[1]] / c.x_rescale_factor


def load_transformer(
    path: str | Path,
    config: MagiConfig | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    offload: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    precision: Precision = "auto",
    attention: str = "auto",
    pinned: bool | None = None,
    cache_device: CacheDevice = "device",
) -> Transformer:
    """A transformer from an official folder or a single file.

    Args:
        path: safetensors file, or a folder with one, or with shards and their index.
        config: official config; None tells it from the file.
        device: where it computes; None takes the best there is.
        dtype: compute dtype of what is not float32 or float8 by policy; None: bfloat16, but float32 for a float32 file.
        offload: fetch each layer from the host when its turn comes; None: only if they do not fit.
        progress: called with (layers placed, layers) while they are; what it raises ends the loading.
        precision: "bf16" or "fp32" in place of `dtype`; "fp8" keeps the large matrices of bf16 and float32 files in float8,
            half the memory, and multiplies in the compute dtype. Official float8 layers stay what they are.
        attention: one of `attention.attention_choices`.
        pinned: layers that are fetched wait in page-locked host memory; see `offload.block_source`.
        cache_device: where the keys and values of finished chunks are kept, "device" or "host".

    Raises:
        MagiError: the file is unreadable or something else, its tensors do not fit the config, base and distilled are
            mixed up, or what is asked for cannot be had.
    """
    checkpoint = Checkpoint(path)
    config = resolve_config(checkpoint, config)
    check_tensors(checkpoint, config.model, repr(str(checkpoint.path)))
    return build_transformer(
        checkpoint,
        config,
        device,
        dtype,
        offload,
        progress,
        precision=precision,
        attention=attention,
        pinned=pinned,
        cache_device=cache_device,
    )


def build_transformer(
    source: TensorSource,
    config: MagiConfig,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    offload: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    precision: Precision = "auto",
    attention: str = "auto",
    pinned: bool | None = None,
    cache_device: CacheDevice = "device",
) -> Transformer:
    """A transformer from named tensors that are known to fit `config`; arguments as for `load_transformer`."""
    where = pick_device(device)
    low = compute_dtype(source.tensors, precision, dtype)
    store_fp8 = precision == "fp8" and not has_fp8(source.tensors)
    if store_fp8 or has_fp8(source.tensors):
        require_float8()
    if cache_device not in get_args(CacheDevice):
        raise MagiError(
            f"The cache cannot be kept on {cache_device!r}. Choose one of {', '.join(get_args(CacheDevice))}."
        )
    c = config.model
    check_attention(attention, where, low, *config.model.heads)
    sizes = weight_sizes(source.tensors, c, where, precision, dtype)
    reader = WeightReader(source, c, where, low, store_fp8)
    offload = not fits(sizes.total, where) if offload is None else offload
    blocks = block_source(reader, offload, pinned, sum(sizes.blocks), progress)
    return Transformer(config, reader.outer(), blocks, where, low, attention, cache_device)
