from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from magi.config import RuntimeConfig
from magi.offload.kv_cache import KVCache
from magi.sampling.captions import caption_per_chunk, null_caption
from magi.sampling.guidance import Weights, combine, guidance_weights, is_nearly_clean, needed
from magi.sampling.prepare import generate_latents
from magi.sampling.schedule import Schedule, step_size_signal, time_grid
from magi.transformer.inputs import ChunkInput, Pass

# Another pair of scales in every range, so that taking the wrong one shows.
DISTINCT = RuntimeConfig(prev_chunk_scales=(1.1, 1.2, 1.3, 1.4, 1.5), text_scales=(8, 7, 6, 5, 4))


def exact_time(step: int, steps: int) -> Fraction:
    u = Fraction(step, steps)
    return u**2 / (3 - 2 * u**2)


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [64, 32, 16, 8, 4])
@pytest.mark.parametrize("runtime", [RuntimeConfig(), DISTINCT])
def test_scales_by_the_range_a_grid_time_lies_in(steps, runtime):
    bounds = [Fraction(str(bound)) for bound in runtime.cfg_t_range]
    grid = time_grid(steps)
    for step in range(steps):
        k = max(i for i, bound in enumerate(bounds) if bound <= exact_time(step, steps))
        p, q = runtime.prev_chunk_scales[k], runtime.text_scales[k]
        assert guidance_weights(float(grid[step]), runtime) == Weights(text=q, prev=p - q, independent=1 - p)


@pytest.mark.parametrize("steps", [64, 32, 16, 8, 4])
def test_guidance_ends_where_the_last_quarter_of_the_steps_begins(steps):
    # u = 3/4 is t = 0.3 exactly, which float32 may miss by one bit on either side.
    grid = time_grid(steps)
    assert guidance_weights(float(grid[3 * steps // 4]), RuntimeConfig()) == Weights(0, 1, 0)
    assert guidance_weights(float(grid[3 * steps // 4 - 1]), RuntimeConfig()) == Weights(7.5, -6, -0.5)


def test_a_boundary_belongs_to_the_range_above_it():
    bounds = DISTINCT.cfg_t_range
    for k, bound in enumerate(bounds):
        assert guidance_weights(bound, DISTINCT).text == DISTINCT.text_scales[k]
        assert guidance_weights(bound - 5e-8, DISTINCT).text == DISTINCT.text_scales[k]
        assert guidance_weights(bound - 2e-7, DISTINCT).text == DISTINCT.text_scales[max(0, k - 1)]


def test_combine_is_the_formula(randn):
    text, prev, independent = (randn(1, 16, 6, 4, 4, seed=i) for i in range(3))
    p, q = 1.5, 7.5
    got = combine(Weights(q, p - q, 1 - p), {"text": text, "prev": prev, "independent": independent})
    torch.testing.assert_close(got, (1 - p) * independent + (p - q) * prev + q * text)


def test_combine_asks_only_for_passes_with_a_share(randn):
    prev = randn(1, 16, 6, 4, 4)
    assert torch.equal(combine(Weights(0, 1, 0), {"prev": prev}), prev)
    with pytest.raises(KeyError):
        combine(Weights(7.5, -6.5, 0), {"prev": prev})


@pytest.mark.parametrize(
    ("wanted", "first_seen", "expected"),
    [
        ("...", (0, 0, 0), "..."),
        ("..x", (0, 0, 0), "xxx"),
        (".x.", (-3, -2, 0), "xx."),
        ("x..", (-4, 0, 0), "x.."),
        ("...x", (0, 1, 1, 2), ".xxx"),  # 3 sees 2, which sees 1, which sees 0 not
        ("...x", (0, 1, 2, 2), "..xx"),
        ("x..x", (0, 1, 2, 3), "x..x"),
    ],
)
def test_needed_is_what_the_wanted_see_and_so_on(wanted, first_seen, expected):
    assert needed([c == "x" for c in wanted], list(first_seen)) == [c == "x" for c in expected]


@pytest.mark.parametrize(("steps", "mode"), [(16, "8,16,16"), (64, "8,16,16"), (12, "8,16,16"), (12, "16,16,8")])
def test_nearly_clean_is_the_last_segment(steps, mode):
    grid = time_grid(steps, mode)
    nearly = [is_nearly_clean(float(t), 0.3) for t in grid[:-1]]
    assert nearly == [i >= 3 * steps // 4 for i in range(steps)]


def test_nearly_clean_counts_the_threshold_itself_and_a_last_bit_below():
    assert is_nearly_clean(0.3, 0.3)
    assert is_nearly_clean(0.29999998, 0.3)  # the float32 below 0.3
    assert not is_nearly_clean(0.2999, 0.3)


# -- whole runs against the full formula, nothing left out -----------------------------------------------------------


class Counting:
    """Counts the chunk-passes a model computes."""

    def __init__(self, monkeypatch, model) -> None:
        self.chunks = 0
        forward = model.forward

        def counted(passes, *rest):
            self.chunks += sum(len(p.chunks) for p in passes)
            return forward(passes, *rest)

        monkeypatch.setattr(model, "forward", counted)


def in_full(model, config, caption, special, noise, prefix=None, negative=False) -> Iterator[torch.Tensor]:
    """Sampling by the definition (arXiv 2505.13211, sections 2.3 and 2.4): all passes and chunks, all K/V cached."""
    runtime, width = config.runtime, config.runtime.chunk_width
    chunks, prefix_frames = noise.shape[2] // width, 0 if prefix is None else prefix.shape[2]
    schedule = Schedule.of(runtime, chunks, prefix_frames // width)
    times = [float(t) for t in time_grid(runtime.num_steps, config.engine.shortcut_mode)]
    null = model.encode_caption(null_caption(model.outer.null_caption, special, negative))
    texts = caption_per_chunk(caption, chunks - schedule.prefix_chunks, config.model, special)
    texts = [null] * schedule.prefix_chunks + [model.encode_caption(text) for text in texts]
    cache = KVCache.for_run(model, chunks, *noise.shape[3:])
    distilled = config.engine.distill
    state = noise.clone()

    def at(chunk):
        return state[:, :, chunk * width : (chunk + 1) * width]

    def clean(chunk, store):
        first = schedule.first_clean_kv_chunk(chunk)
        return ChunkInput(chunk, at(chunk).clone(), runtime.clean_t, null, first, store=store)

    def forward(passes, step):
        signal = step_size_signal(runtime.num_steps, step, config.engine.shortcut_mode) if distilled else None
        return model.forward(passes, cache, signal)

    if prefix is not None:
        state[:, :, :prefix_frames] = prefix
    if schedule.prefix_chunks:
        forward([Pass(tuple(clean(c, True) for c in range(schedule.prefix_chunks)), distilled)], 0)
    for it in schedule:
        if prefix is not None:
            state[:, :, :prefix_frames] = prefix

        def context(captions, conditional, store, it=it):
            refresh = [] if it.refresh is None else [clean(it.refresh, store)]
            active = [
                ChunkInput(c, at(c).clone(), times[g], captions[c], schedule.first_kv_chunk(c, g))
                for c, g in zip(it.chunks, it.grid, strict=True)
            ]
            return Pass((*refresh, *active), conditional)

        skip = 0 if it.refresh is None else 1
        if distilled:
            passes = [context(texts, True, True)]
            if times[it.grid[0]] > config.engine.distill_nearly_clean_chunk_threshold - 1e-6:
                oldest = it.chunks[0]
                copy = ChunkInput(oldest, at(oldest).clone(), times[it.grid[0]], texts[oldest], first_kv_chunk=oldest)
                passes.append(Pass((copy,), True))
            (one, *mixed) = forward(passes, it.step)
            velocities = one[skip:]
            if mixed:
                velocities[0] = 0.7 * velocities[0] + 0.3 * mixed[0][0]
        else:
            alone = [
                Pass((ChunkInput(0, at(c).clone(), times[g], null, first_kv_chunk=0),), False)
                for c, g in zip(it.chunks, it.grid, strict=True)
            ]
            text, prev, *independent = forward(
                [context(texts, True, False), context([null] * chunks, False, True), *alone], it.step
            )
            velocities = []
            for g, a, b, (c,) in zip(it.grid, text[skip:], prev[skip:], independent, strict=True):
                k = max(i for i, bound in enumerate(runtime.cfg_t_range) if bound < times[g] + 1e-7)
                p, q = runtime.prev_chunk_scales[k], runtime.text_scales[k]
                velocities.append((1 - p) * c + (p - q) * b + q * a)
        for chunk, g, velocity in zip(it.chunks, it.grid, velocities, strict=True):
            at(chunk).add_(velocity * (times[g + 1] - times[g]))
        if it.finishes is not None:
            yield at(it.finishes).clone()


SETTINGS = {
    "default": {},
    "window 1": {"window_size": 1},
    "window 2": {"window_size": 2},
    "sees all": {"noise2clean_kvrange": ()},
    "clean chunks see their neighbours": {"clean_chunk_kvrange": 3},
    "each sees itself only": {"noise2clean_kvrange": (1,)},
    "text in the first and last range only": {"noise2clean_kvrange": (1,), "text_scales": (7.5, 1.5, 1.5, 5.0, 5.0)},
    "no text": {"text_scales": (0.0,) * 5},
    "text only": {"text_scales": (2.0,) * 5, "prev_chunk_scales": (2.0,) * 5},
    "prev in the middle only": {"text_scales": (2.0, 1.0, 1.0, 2.0, 2.0), "prev_chunk_scales": (2.0,) * 5},
    "prev in the middle, short-sighted": {
        "noise2clean_kvrange": (1,),
        "text_scales": (2.0, 2.0, 1.0, 2.0, 2.0),
        "prev_chunk_scales": (2.0,) * 5,
    },
}


@pytest.mark.parametrize(
    ("name", "prefix_frames"), [*((name, 0) for name in SETTINGS), ("default", 9), ("window 2", 13), ("sees all", 12)]
)
def test_skipping_is_exact(name, prefix_frames, tiny_config, tiny_model, tiny_caption, tiny_tokens, randn, monkeypatch):
    chunks = 5
    config = tiny_config(num_frames=24 * chunks - 4 * prefix_frames, **SETTINGS[name])
    model = tiny_model(config)
    noise = randn(1, 16, 6 * chunks, 4, 4)
    prefix = randn(1, 16, prefix_frames, 4, 4, seed="prefix") if prefix_frames else None
    count = Counting(monkeypatch, model)
    got = list(
        generate_latents(
            model, caption=tiny_caption(), special_tokens=tiny_tokens, noise=noise, prefix=prefix, negative_tokens=True
        )
    )
    computed, count.chunks = count.chunks, 0
    wanted = list(in_full(model, config, tiny_caption(), tiny_tokens, noise, prefix, negative=True))
    for chunk, full in zip(got, wanted, strict=True):
        own = full[:, :, -chunk.latents.shape[2] :]
        assert float((chunk.latents - own).norm() / own.norm()) < 2e-6
    assert computed < count.chunks


@pytest.mark.parametrize("prefix_frames", [0, 9])
@pytest.mark.parametrize(
    ("steps", "mode", "window"), [(8, "8,16,16", 4), (12, "8,16,16", 4), (12, "16,16,8", 2), (16, "8,16,16", 1)]
)
def test_distilled_runs_equal_the_definition(
    steps, mode, window, prefix_frames, tiny_config, tiny_model, tiny_caption, tiny_tokens, randn
):
    config = tiny_config(
        True, engine={"shortcut_mode": mode}, num_steps=steps, window_size=window, num_frames=120 - 4 * prefix_frames
    )
    model = tiny_model(config)
    noise = randn(1, 16, 30, 4, 4)
    prefix = randn(1, 16, prefix_frames, 4, 4, seed="prefix") if prefix_frames else None
    got = list(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens, noise=noise, prefix=prefix))
    for chunk, full in zip(got, in_full(model, config, tiny_caption(), tiny_tokens, noise, prefix), strict=True):
        own = full[:, :, -chunk.latents.shape[2] :]
        assert float((chunk.latents - own).norm() / own.norm()) < 2e-6
