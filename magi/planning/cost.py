"""Forecast of an iteration: its floating-point operations, and its seconds with layers uploaded beside the computing."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import MagiConfig, ModelConfig
from ..sampling.schedule import Schedule
from ..transformer.inputs import ChunkInput, Pass
from .footprint import chunk_tokens

_CAPTION_TOKENS = 100
_BLOCK_COST = 96  # tokens that could be computed in the time a token block takes to start


@dataclass(frozen=True)
class Machine:
    """The speeds that a forecast assumes, all above 0: a mid-range card by default. Only their ratios count.

    Attributes:
        tflops: 10^12 operations per second that are reached in practice.
        host_bandwidth: bytes per second from host memory to the device.
        file_bandwidth: bytes per second from a file, through host memory, to the device.
    """

    tflops: float = 40.0
    host_bandwidth: float = 12e9
    file_bandwidth: float = 2.5e9


def forward_flops(config: ModelConfig, passes: Sequence[Pass]) -> float:
    """Returns the operations of one `Transformer.forward` over these passes."""
    return sum(
        chunk_flops(
            config,
            tokens := input_tokens(config, item),
            tokens * (item.chunk + 1 - item.first_kv_chunk),
            len(item.caption.states),
        )
        for p in passes
        for item in p.chunks
    )


def input_tokens(config: ModelConfig, item: ChunkInput) -> int:
    """Returns the tokens of a chunk."""
    _, _, frames, height, width = item.latents.shape
    return frames // config.t_patch_size * (height // config.patch_size) * (width // config.patch_size)


def chunk_flops(config: ModelConfig, tokens: int, kv_tokens: int, caption_tokens: int) -> float:
    """Returns the operations of a chunk of `tokens` that attends to `kv_tokens` of video and `caption_tokens` of text."""
    d = config.hidden_size
    kv = config.num_query_groups * config.kv_channels
    # q and q_x, k and v, the projection of both attentions, the MLP
    weights = 2 * d * d + 2 * kv * d + 2 * d * d + config.fc1_size * d + d * config.ffn_hidden_size
    attention = 2 * d * (kv_tokens + caption_tokens)  # scores and weighted values
    return 2.0 * config.num_layers * tokens * (weights + attention)


def iteration_flops(config: MagiConfig, prefix_frames: int = 0) -> float:
    """Returns the operations of an iteration with a full window and all passes that a base model may need."""
    schedule, tokens = Schedule.of_run(config.runtime, prefix_frames), chunk_tokens(config)
    it = schedule[len(schedule) // 2]  # the window is as full as it ever is
    seen = [c + 1 - schedule.first_kv_chunk(c, g) for c, g in zip(it.chunks, it.grid, strict=True)]
    alone = [1] if config.engine.distill else [1] * len(seen)
    chunks_seen = seen + alone if config.engine.distill else 2 * seen + alone
    return sum(chunk_flops(config.model, tokens, n * tokens, _CAPTION_TOKENS) for n in chunks_seen)


def iteration_seconds(
    compute: float, copies: Sequence[float], slots: int, kv_copy: float = 0.0, token_block: int | None = None
) -> float:
    """Returns the seconds of an iteration whose layers are uploaded while earlier ones compute.

    Args:
        compute: seconds of a layer forward.
        copies: seconds of each layer's upload; 0 for those that stay on the device.
        slots: uploaded layers that may be on the device at a time, the one in use included.
        kv_copy: seconds to upload a layer's K/V.
        token_block: tokens per layer forward; None: all.
    """
    compute *= 1 + _BLOCK_COST / token_block if token_block else 1
    uploaded = done = 0.0
    ends: list[float] = []  # when each uploaded layer has been used
    for copy in copies:
        uploaded += kv_copy
        if copy:
            uploaded = max(uploaded, ends[-slots] if len(ends) >= slots else 0.0) + copy
        done = max(done, uploaded) + compute
        if copy:
            ends.append(done)
    return done
