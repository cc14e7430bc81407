"""Classifier-free guidance with a text and a previous-chunk scale (arXiv 2505.13211, section 2.4): pure functions.

Base models predict three velocities per step: with text and earlier chunks, with earlier chunks only, and with neither.
Distilled models predict the guided velocity directly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..config import MagiConfig, RuntimeConfig
from .schedule import Iteration, Schedule

PassName = Literal["text", "prev", "independent"]
_EPSILON = 1e-7  # a time equal to a boundary may be just below it in float32
_NEARLY_CLEAN_EPSILON = 1e-6


@dataclass(frozen=True)
class Weights:
    """Weight of each pass in the guided velocity of a chunk. The weights sum to one."""

    text: float
    prev: float
    independent: float


def guidance_weights(t: float, runtime: RuntimeConfig) -> Weights:
    """Returns the weights of the three passes for a chunk at time `t`, 0 (noise) .. 1 (clean)."""
    k = max((i for i, bound in enumerate(runtime.cfg_t_range) if bound < t + _EPSILON), default=0)
    prev, text = runtime.prev_chunk_scales[k], runtime.text_scales[k]
    return Weights(text=text, prev=prev - text, independent=1 - prev)


def combine(weights: Weights, velocities: Mapping[PassName, torch.Tensor]) -> torch.Tensor:
    """Combines the velocities of the passes, (1, 16, W, h, w) float32 each; those with weight 0 may be missing."""
    order: tuple[PassName, ...] = ("independent", "prev", "text")
    used = [(getattr(weights, name), name) for name in order if getattr(weights, name) != 0]
    return sum(weight * velocities[name] for weight, name in used)


def is_nearly_clean(t: float, threshold: float) -> bool:
    """Tells whether a distilled model mixes its oldest chunk, at time `t`, with its isolated prediction."""
    return t > threshold - _NEARLY_CLEAN_EPSILON


NEARLY_CLEAN_MIX = (0.7, 0.3)  # weights of the prediction in context and of the isolated one


def needed(wanted: list[bool], first_seen: list[int]) -> list[bool]:
    """Returns which chunks of a pass must be computed so that the `wanted` ones are exact.

    Args:
        wanted: per chunk of the pass, whether its velocity is used.
        first_seen: per chunk, the index within the pass of the first chunk whose K/V it sees (it sees all
            up to itself).
    """
    result = list(wanted)
    for i in reversed(range(len(result))):
        if result[i]:
            for j in range(max(0, first_seen[i]), i):
                result[j] = True
    return result


def members(it: Iteration, schedule: Schedule, wanted: Sequence[bool], store: bool) -> tuple[bool, list[int]]:
    """Returns what a pass over chunks that see one another must hold so that the `wanted` active ones are exact.

    Args:
        it: the iteration.
        schedule: schedule of the run.
        wanted: per active chunk, whether its velocity is used.
        store: whether the cache takes this pass's K/V of the chunk that has just become clean.

    Returns:
        Whether the pass holds that chunk, and the indices of the active chunks it holds.
    """
    first = [schedule.first_kv_chunk(c, g) for c, g in zip(it.chunks, it.grid, strict=True)]
    compute = needed(list(wanted), [f - it.chunks[0] for f in first])
    seen = it.refresh is not None and any(c and f <= it.refresh for c, f in zip(compute, first, strict=True))
    return it.refresh is not None and (store or seen), [i for i, c in enumerate(compute) if c]


def chunk_count(it: Iteration, schedule: Schedule, times: Sequence[float], config: MagiConfig) -> int:
    """Returns how many chunks all passes of an iteration hold together."""
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
