"""The MAGI-1 transformer (arXiv 2505.13211, section 2.2), run layer by layer over all passes and chunks.

Each layer's weights are read once per iteration and applied to every chunk of every pass before the next layer's.
Streaming weights from the host thus moves them once, whatever the number of passes. Within a pass chunks run oldest
first, and the K/V of a chunk are written before a later chunk reads them.

Shapes: S tokens of a chunk, T tokens of a block, D hidden size, G K/V groups, d head size, n rotary angles.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange

from ..config import MagiConfig, ModelConfig
from .block import (
    ChunkState,
    Group,
    LayerSettings,
    layer_forward,
    progress_calls,
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
_EFFICIENT_BLOCK = 1024  # tokens; smaller blocks cost more time than streaming a layer
_SMALLEST_BLOCK = 64  # tokens
_CHECK_SECONDS = 0.2  # between two calls of a progress callback within a token block
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
        pin: Callable[[torch.Tensor], Callable[[], None]] | None = None,
    ):
        """Builds a transformer from loaded weights; `load_transformer` is the usual way to make one.

        Args:
            config: settings of the model and its runs.
            outer: weights outside the layers, on the device.
            blocks: source of the layers' weights.
            device: device to compute on.
            dtype: compute dtype.
            attention: one of `attention.attention_choices`.
            cache_device: where new caches keep their K/V, "device" or "host".
            token_block: tokens per layer call; it changes the last bits of the result.
            compiled: compile the layers with `torch.compile`.
            pin: page-locks host memory of new caches and returns what undoes it; None leaves that to the cache.
        """
        self.config = config
        self.outer = outer
        self.blocks = blocks
        self.device = device
        self.dtype = dtype
        self.attention = attention
        self.cache_device = cache_device
        self.token_block = token_block
        self.pin = pin
        self._layer_forward = torch.compile(layer_forward, dynamic=True) if compiled else layer_forward

    def shrink(self) -> str | None:
        """Lowers the use of device memory after it ran out, by the change that costs the least time.

        Returns:
            The change, as a clause for the user; None once nothing is left to change.
        """
        if self.token_block > _EFFICIENT_BLOCK:
            return self._halve_token_block()
        staying = sorted(self.blocks.on_device)
        self.blocks.keep_on_device(staying[1::2])
        if (left := len(self.blocks.on_device)) < len(staying):  # a CPU has nowhere to move some of them
            return f"{left} of {len(self.blocks)} layers stay on the device"
        if self.cache_device == "device":
            self.cache_device = "host"
            return "the K/V of finished chunks are kept on the host"
        return self._halve_token_block() if self.token_block > _SMALLEST_BLOCK else None

    def _halve_token_block(self) -> str:
        self.token_block = max(_SMALLEST_BLOCK, self.token_block // 2)
        return f"{self.token_block} tokens are taken at a time"

    @property
    def shape(self) -> ModelConfig:
        """Returns the sizes of the transformer."""
        return self.config.model

    @property
    def nbytes(self) -> int:
        """Returns the bytes of weights on the device."""
        return self.blocks.nbytes + sum(t.nbytes for t in tensors_in(self.outer))

    def encode_caption(self, embeds: torch.Tensor) -> EncodedCaption:
        """Projects text embeddings (tokens, caption_channels), without padding, to (tokens, D) in the compute dtype."""
        states = F.silu(linear(embeds.to(self.device, torch.float32), self.outer.caption))  # (tokens, D)
        return EncodedCaption(states.to(self.dtype))

    def forward(
        self,
        passes: Sequence[Pass],
        cache: Cache,
        step_size: float | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[list[torch.Tensor | None]]:
        """Computes the velocities of every chunk of every pass.

        Args:
            passes: chunks to run. Earlier chunks that a pass sees but does not hold must be in the cache.
            cache: K/V of clean chunks, read, and written for inputs with `store`.
            step_size: second time signal of distilled models.
            on_progress: called many times per call with the fraction done, 0 .. 1; what it raises ends the call.

        Returns:
            Per pass and chunk: (1, 16, W, h, w) float32, or None where it is not wanted.
        """
        angles: dict[int, _Angles] = {}  # per chunk, as several passes hold the same chunks
        states = [[self._embed(c, p.conditional, step_size, angles) for c in p.chunks] for p in passes]
        first, later = shared_groups(states), separate_groups(states)
        scratch = self._kv_scratch([*first, *later])  # (2, G, chunks * S, d)
        settings = LayerSettings(self.shape, self.dtype, self.attention, self.token_block, self._layer_forward)
        # A token block takes a CPU seconds, and nothing in it may hold up a cancel; compiled code cannot ask.
        asks = self.device.type == "cpu" and on_progress is not None and self._layer_forward is layer_forward
        with closing(iter(self.blocks)) as blocks, closing(cache.stream(_cached_chunks(states))) as cached_kv:
            for layer, (weights, cached) in enumerate(zip(blocks, cached_kv, strict=True)):
                passes_here = later if layer else first
                layer_progress = _LayerProgress(
                    on_progress, layer, self.shape.num_layers, passes_here, self.token_block
                )
                if asks:
                    settings = replace(settings, check=layer_progress.check)
                caption_kv: dict[int, torch.Tensor] = {}  # by identity, as most chunks share their caption
                for groups in passes_here:
                    store = partial(cache.store, layer)
                    run_layer(settings, weights, groups, cached, scratch, caption_kv, store, layer_progress)
        return [[self._velocity(s) if s.input.wanted else None for s in pass_states] for pass_states in states]

    # -- before and after the layers ---------------------------------------------------------------------------------

    def _embed(
        self, item: ChunkInput, conditional: bool, step_size: float | None, angles: dict[int, _Angles]
    ) -> ChunkState:
        c = self.shape
        x = item.latents.to(self.device, torch.float32) * c.x_rescale_factor  # (1, 16, W, h, w)
        if c.half_channel_vae:
            x = torch.cat([x, x], dim=1)  # (1, 32, W, h, w)
        patches = rearrange(
            x, "1 c (t r) (h p) (w q) -> (t h w) (c r p q)", r=c.t_patch_size, p=c.patch_size, q=c.patch_size
        )  # (S, channels * patch)
        hidden = torch.empty(len(patches), c.hidden_size, dtype=self.dtype, device=self.device)  # (S, D)
        for block in token_blocks(len(patches), self.token_block):
            hidden[block] = linear(patches[block], self.outer.patch)
        if item.chunk not in angles:
            _, _, frames, height, width = x.shape
            found = rope_angles(
                self.outer.rope_bands, item.chunk * frames, frames, height // c.patch_size, width // c.patch_size
            )  # (S, n)
            angles[item.chunk] = found.cos(), found.sin()
        return ChunkState(item, hidden, self._condition(item.timestep, conditional, step_size), angles[item.chunk])

    def _condition(self, timestep: float, conditional: bool, step_size: float | None) -> torch.Tensor:
        """Embeds the time, the step size and a constant that tells conditional from unconditional passes: (1, cond)."""
        condition = self._time(timestep)  # (1, cond) float32
        if step_size is not None:
            condition = condition + self._time(step_size)
        null = self.outer.null_caption[-2 if conditional else -1][None]  # (1, caption_channels)
        return (condition + linear(null, self.outer.caption_condition)).to(self.dtype)

    def _time(self, t: float) -> torch.Tensor:
        # Rounded to the compute dtype first, as in the public implementation.
        embedding = timestep_embedding(t, _TIME_FREQUENCIES, self.device).to(self.dtype).float()  # (1, 256)
        return linear(F.silu(linear(embedding, self.outer.time_in)), self.outer.time_out)

    def _kv_scratch(self, passes: Sequence[Sequence[Group]]) -> torch.Tensor:
        """Allocates room for the K/V of all chunks that the pass with the longest range sees: (2, G, chunks * S, d)."""
        c = self.shape
        inputs = [[s.input for group in groups for s in group] for groups in passes]
        longest = max(items[-1].chunk + 1 - min(item.first_kv_chunk for item in items) for items in inputs)
        shape = (2, c.num_query_groups, longest * len(passes[0][0][0].hidden), c.kv_channels)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _velocity(self, s: ChunkState) -> torch.Tensor:
        c = self.shape
        _, _, _, height, width = s.input.latents.shape
        out = torch.empty(len(s.hidden), self.outer.final.weight.shape[0], device=self.device)  # (S, patch * channels)
        for block in token_blocks(len(s.hidden), self.token_block):
            out[block] = linear(
                layer_norm(s.hidden[block], self.outer.final_norm, c.layernorm_epsilon), self.outer.final
            )
        video = rearrange(
            out,
            "(t h w) (r p q c) -> 1 c (t r) (h p) (w q)",
            h=height // c.patch_size,
            w=width // c.patch_size,
            r=c.t_patch_size,
            p=c.patch_size,
            q=c.patch_size,
        )  # (1, channels, W, h, w)
        return video[:, : s.input.latents.shape[1]] / c.x_rescale_factor


def _cached_chunks(states: list[list[ChunkState]]) -> list[int]:
    """Returns the chunks whose K/V come from the cache: a pass sees them but does not hold them."""
    seen: set[int] = set()
    for pass_states in states:
        inputs = [s.input for s in pass_states]
        own = {item.chunk for item in inputs}
        seen |= {chunk for item in inputs for chunk in range(item.first_kv_chunk, item.chunk)} - own
    return sorted(seen)


class _LayerProgress:
    """Turns the progress calls of one layer into the fraction of the forward call that is done."""

    def __init__(
        self,
        on_progress: Callable[[float], None] | None,
        layer: int,
        layers: int,
        passes: Sequence[Sequence[Group]],
        token_block: int,
    ) -> None:
        self._on_progress, self._layer, self._layers = on_progress, layer, layers
        self._calls, self._done = sum(progress_calls(groups, token_block) for groups in passes), 0
        self._called = time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        self._call()

    def check(self) -> None:
        """Calls the callback between two parts, if its last call is a moment ago."""
        if time.monotonic() - self._called >= _CHECK_SECONDS:
            self._call()

    def _call(self) -> None:
        if self._on_progress:
            self._on_progress((self._layer + self._done / self._calls) / self._layers)
        self._called = time.monotonic()
