"""What an iteration costs: floating-point operations, and seconds with layers fetched from where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import MagiConfig, ModelConfig
from ..errors import MagiError
from ..sampling.schedule import Schedule
from ..transformer.inputs import ChunkInput, Pass
from .footprint import chunk_tokens

_CAPTION_TOKENS = 100
_BLOCK_COST = 96  # tokens: what starting a token block costs, in tokens' time


@dataclass(frozen=True)
class Machine:
    """What a forecast assumes: a middling card of its time. Only the ratios count.

    Attributes:
        tflops: 10^12 operations per second that are reached in practice.
        bus: bytes per second from host memory to the device.
        disk: bytes per second from a file, through memory, to the device.

    Raises:
        MagiError: one of them is no speed.
    """

    tflops: float = 40.0
    bus: float = 12e9
    disk: float = 2.5e9

    def __post_init__(self) -> None:
        for name, speed in vars(self).items():
            if not 0 < speed < float("inf"):
                raise MagiError(f"A speed of {speed:g} ({name}) forecasts nothing. Give one above 0.")


def forward_flops(config: ModelConfig, passes: Sequence[Pass]) -> float:
    """Operations of one `Transformer.forward` over these passes."""
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
    """Tokens of a chunk."""
    _, _, frames, height, width = item.latents.shape
    return frames // config.t_patch_size * (height // config.patch_size) * (width // config.patch_size)


def chunk_flops(config: ModelConfig, tokens: int, keys: int, text: int) -> float:
    """Operations of a chunk of so many tokens that looks at `keys` tokens of video and `text` of its caption."""
    d = config.hidden_size
    kv = config.num_query_groups * config.kv_channels
    # q and q_x, k and v, the projection of both attentions, the MLP
    weights = 2 * d * d + 2 * kv * d + 2 * d * d + config.fc1_size * d + d * config.ffn_hidden_size
    attention = 2 * d * (keys + text)  # scores and weighted values
    return 2.0 * config.num_layers * tokens * (weights + attention)


def iteration_flops(config: MagiConfig, given: int = 0) -> float:
    """Operations of a forward iteration with a full window; all passes that a base model may need are counted."""
    schedule, tokens = Schedule.of_run(config.runtime, given), chunk_tokens(config)
    it = schedule[len(schedule) // 2]  # the window is as full as it ever is
    seen = [c + 1 - schedule.first_kv_chunk(c, g) for c, g in zip(it.chunks, it.grid, strict=True)]
    alone = [1] if config.engine.distill else [1] * len(seen)
    keys = seen + alone if config.engine.distill else 2 * seen + alone
    return sum(chunk_flops(config.model, tokens, n * tokens, _CAPTION_TOKENS) for n in keys)


def iteration_seconds(
    compute: float, copies: Sequence[float], slots: int, keys: float = 0.0, token_block: int | None = None
) -> float:
    """Seconds of an iteration whose layers are fetched ahead of the work.

    Args:
        compute: seconds of a layer's work.
        copies: of each layer, seconds it takes to fetch; 0 for those that lie on the device.
        slots: fetched layers that may be on the device at a time, the one in use included.
        keys: seconds a layer to fetch finished chunks' keys.
        token_block: tokens taken through a layer at a time; None: all.
    """
    compute *= 1 + _BLOCK_COST / token_block if token_block else 1
    bus = done = 0.0
    ends: list[float] = []  # of the work with each fetched layer
    for copy in copies:
        bus += keys
        if copy:
            bus = max(bus, ends[-slots] if len(ends) >= slots else 0.0) + copy
        done = max(done, bus) + compute
        if copy:
            ends.append(done)
    return done
