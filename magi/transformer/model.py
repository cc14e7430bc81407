"""The MAGI-1 transformer (paper section 2.2), run layer by layer over all passes and chunks of an iteration at once.

Each layer's weights are asked for once per iteration and applied to every chunk of every pass before the next layer's: what
streams weights from the host thus moves them once, whatever the number of passes. Within a pass chunks are taken oldest
first, and a chunk's keys are written before a later chunk looks at them.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange

from ..config import MagiConfig, ModelConfig
from .block import (
    Group,
    LayerSettings,
    Stream,
    layer_rows,
    parts,
    run_layer,
    separate_groups,
    shared_groups,
    token_blocks,
)
from .inputs import TOKEN_BLOCK, Cache, CacheDevice, ChunkInput, EncodedCaption, Pass
from .layers import layer_norm, linear, timestep_embedding
from .rope import rope_angles
from .weights import BlockSource, OuterWeights, tensors_in

_TIME_FREQUENCIES = 256
_EFFICIENT_BLOCK = 1024  # tokens; fewer cost more time than fetching a layer
_SMALLEST_BLOCK = 64
_Angles = tuple[torch.Tensor, torch.Tensor]


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
        token_block: int = TOKEN_BLOCK,
        compiled: bool = False,
    ):
        """Ties weights together; `load_transformer` is the usual way to one.

        Args:
            config: of the model and its runs.
            outer: weights outside the layers, on the device.
            blocks: of the layers.
            device: to compute on.
            dtype: to compute in.
            attention: one of `attention.attention_choices`.
            cache_device: where new caches keep their keys, "device" or "host".
            token_block: tokens that are taken through a layer at a time; it decides the last bits of what comes out.
            compiled: have torch.compile make the layers' kernels.
        """
        self.config = config
        self.outer = outer
        self.blocks = blocks
        self.device = device
        self.dtype = dtype
        self.attention = attention
        self.cache_device = cache_device
        self.token_block = token_block
        self._rows = torch.compile(layer_rows, dynamic=True) if compiled else layer_rows

    def shrink(self) -> str | None:
        """Takes less of the device from now on, as it ran out of memory: what costs least time first.

        Returns:
            What is done differently, for the user; None if nothing is left to do.
        """
        if self.token_block > _EFFICIENT_BLOCK:
            return self._halve_token_block()
        staying = sorted(self.blocks.on_device)
        self.blocks.keep_on_device(staying[1::2])
        if (left := len(self.blocks.on_device)) < len(staying):  # on a CPU some cannot leave
            return f"{left} of {len(self.blocks)} layers stay on the device"
        if self.cache_device == "device":
            self.cache_device = "host"
            return "the keys of finished chunks are kept on the host"
        return self._halve_token_block() if self.token_block > _SMALLEST_BLOCK else None

    def _halve_token_block(self) -> str:
        self.token_block = max(_SMALLEST_BLOCK, self.token_block // 2)
        return f"{self.token_block} tokens are taken at a time"

    @property
    def shape(self) -> ModelConfig:
        """Sizes of the transformer."""
        return self.config.model

    @property
    def nbytes(self) -> int:
        """Bytes of weights on the device."""
        return self.blocks.nbytes + sum(t.nbytes for t in tensors_in(self.outer))

    def encode_caption(self, embeds: torch.Tensor) -> EncodedCaption:
        """Projects text embeddings (tokens, caption_channels), real tokens only."""
        states = F.silu(linear(embeds.to(self.device, torch.float32), self.outer.caption))
        return EncodedCaption(states.to(self.dtype))

    def forward(
        self,
        passes: Sequence[Pass],
        cache: Cache,
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
        angles: dict[int, _Angles] = {}  # of a chunk's place; several passes hold the same chunks
        streams = [[self._embed(c, p.conditional, step_size, angles) for c in p.chunks] for p in passes]
        first, later = shared_groups(streams), separate_groups(streams)
        scratch = self._key_scratch([*first, *later])
        settings = LayerSettings(self.shape, self.dtype, self.attention, self.token_block, self._rows)
        with closing(iter(self.blocks)) as blocks, closing(cache.stream(_earlier(streams))) as keys:
            for layer, (weights, cached) in enumerate(zip(blocks, keys, strict=True)):
                passes_here = later if layer else first
                alive = _Beats(heartbeat, layer, self.shape.num_layers, passes_here, self.token_block)
                text_keys: dict[int, torch.Tensor] = {}  # chunks mostly share their caption
                for groups in passes_here:
                    store = partial(cache.store, layer)
                    run_layer(settings, weights, groups, cached, scratch, text_keys, store, alive)
        return [[self._velocity(s) if s.input.wanted else None for s in pass_streams] for pass_streams in streams]

    # -- before and after the layers ---------------------------------------------------------------------------------

    def _embed(
        self, item: ChunkInput, conditional: bool, step_size: float | None, angles: dict[int, _Angles]
    ) -> Stream:
        c = self.shape
        x = item.latents.to(self.device, torch.float32) * c.x_rescale_factor
        if c.half_channel_vae:
            x = torch.cat([x, x], dim=1)
        patches = rearrange(
            x, "1 c (t r) (h p) (w q) -> (t h w) (c r p q)", r=c.t_patch_size, p=c.patch_size, q=c.patch_size
        )
        hidden = torch.empty(len(patches), c.hidden_size, dtype=self.dtype, device=self.device)
        for rows in token_blocks(len(patches), self.token_block):
            hidden[rows] = linear(patches[rows], self.outer.patch)
        if item.chunk not in angles:
            _, _, frames, height, width = x.shape
            found = rope_angles(
                self.outer.rope_bands, item.chunk * frames, frames, height // c.patch_size, width // c.patch_size
            )
            angles[item.chunk] = found.cos(), found.sin()
        return Stream(item, hidden, self._condition(item.timestep, conditional, step_size), angles[item.chunk])

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

    def _key_scratch(self, passes: Sequence[Sequence[Group]]) -> torch.Tensor:
        """Room for the keys and values of all chunks that the widest of these sees: (2, G, chunks * S, d)."""
        c = self.shape
        inputs = [[s.input for group in groups for s in group] for groups in passes]
        widest = max(items[-1].chunk + 1 - min(item.first_key for item in items) for items in inputs)
        shape = (2, c.num_query_groups, widest * len(passes[0][0][0].hidden), c.kv_channels)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _velocity(self, s: Stream) -> torch.Tensor:
        c = self.shape
        _, _, _, height, width = s.input.latents.shape
        out = torch.empty(len(s.hidden), self.outer.final.weight.shape[0], device=self.device)
        for rows in token_blocks(len(s.hidden), self.token_block):
            out[rows] = linear(layer_norm(s.hidden[rows], self.outer.final_norm, c.layernorm_epsilon), self.outer.final)
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


def _earlier(streams: list[list[Stream]]) -> list[int]:
    """Chunks whose keys come from the cache: seen by a pass that does not hold them itself."""
    seen: set[int] = set()
    for pass_streams in streams:
        inputs = [s.input for s in pass_streams]
        own = {item.chunk for item in inputs}
        seen |= {chunk for item in inputs for chunk in range(item.first_key, item.chunk)} - own
    return sorted(seen)


class _Beats:
    """Tells how far a forward call is, part by part of a layer."""

    def __init__(
        self,
        heartbeat: Callable[[float], None] | None,
        layer: int,
        layers: int,
        passes: Sequence[Sequence[Group]],
        token_block: int,
    ) -> None:
        self._heartbeat, self._layer, self._layers = heartbeat, layer, layers
        self._parts, self._done = sum(parts(groups, token_block) for groups in passes), 0

    def __call__(self) -> None:
        self._done += 1
        if self._heartbeat:
            self._heartbeat((self._layer + self._done / self._parts) / self._layers)
