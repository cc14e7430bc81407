"""Classifier-free guidance with a text and a previous-chunk scale (paper section 2.4): pure functions.

Base models predict three velocities a step: with text and earlier chunks, with earlier chunks only, and with neither.
Distilled models predict the guided velocity at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..config import MagiConfig, RuntimeConfig
from .schedule import Iteration, Schedule

PassName = Literal["text", "prev", "independent"]
_EPSILON = 1e-7  # a grid time that should equal a boundary may fall just below it in float32
_NEARLY_CLEAN_EPSILON = 1e-6


@dataclass(frozen=True)
class Weights:
    """Share of each pass in a chunk's guided velocity. They sum to one."""

    text: float
    prev: float
    independent: float


def guidance_weights(t: float, runtime: RuntimeConfig) -> Weights:
    """The shares of the three passes for a chunk at time `t`."""
    k = max((i for i, bound in enumerate(runtime.cfg_t_range) if bound < t + _EPSILON), default=0)
    prev, text = runtime.prev_chunk_scales[k], runtime.text_scales[k]
    return Weights(text=text, prev=prev - text, independent=1 - prev)


def combine(weights: Weights, velocities: Mapping[PassName, torch.Tensor]) -> torch.Tensor:
    """The guided velocity, float32. Passes without a share need not be there."""
    order: tuple[PassName, ...] = ("independent", "prev", "text")
    shares = [(getattr(weights, name), name) for name in order if getattr(weights, name) != 0]
    return sum(share * velocities[name] for share, name in shares)


def is_nearly_clean(t: float, threshold: float) -> bool:
    """Whether a distilled model's oldest chunk at time `t` is to be mixed with its own isolated prediction."""
    return t > threshold - _NEARLY_CLEAN_EPSILON


NEARLY_CLEAN_MIX = (0.7, 0.3)  # in context, isolated


def needed(wanted: list[bool], first_seen: list[int]) -> list[bool]:
    """Which chunks of a pass must be computed so that the `wanted` ones come out right.

    Args:
        wanted: per chunk of the pass, whether its velocity is used.
        first_seen: per chunk, the index within the pass of the first chunk whose keys it sees (it sees all up to itself).
    """
    result = list(wanted)
    for i in reversed(range(len(result))):
        if result[i]:
            for j in range(max(0, first_seen[i]), i):
                result[j] = True
    return result


def members(it: Iteration, schedule: Schedule, wanted: Sequence[bool], store: bool) -> tuple[bool, list[int]]:
    """What a pass over chunks that see one another must hold so that the `wanted` active ones come out right.

    Args:
        it: the iteration.
        schedule: of the run.
        wanted: per active chunk, whether its velocity is used.
        store: the pass's keys of the chunk that has just become clean are kept.

    Returns:
        Whether that chunk belongs to it, and which of the active chunks.
    """
    first = [schedule.first_kv_chunk(c, g) for c, g in zip(it.chunks, it.grid, strict=True)]
    compute = needed(list(wanted), [f - it.chunks[0] for f in first])
    seen = it.refresh is not None and any(c and f <= it.refresh for c, f in zip(compute, first, strict=True))
    return it.refresh is not None and (store or seen), [i for i, c in enumerate(compute) if c]


def chunk_count(it: Iteration, schedule: Schedule, times: Sequence[float], config: MagiConfig) -> int:
    """How many chunks all passes of an iteration hold together."""
    if config.engine.distill:
        refresh, active = members(it, schedule, [True] * len(it.chunks), store=True)
        alone = is_nearly_clean(times[it.grid[0]], config.engine.distill_nearly_clean_chunk_threshold)
        return refresh + len(active) + alone
    weights = [guidance_weights(times[g], config.runtime) for g in it.grid]
    count = sum(w.independent != 0 for w in weights)
    for name in ("text", "prev"):
        refresh, active = members(it, schedule, [getattr(w, name) != 0 for w in weights], store=name == "prev")
        count += refresh + len(active)
    return count
