import weakref
from collections import Counter

import pytest
import torch

from magi.errors import MagiError
from magi.sampling.captions import Caption
from magi.sampling.prepare import generate_latents, make_sampler
from magi.sampling.schedule import time_grid
from magi.sampling.state import Noise


@pytest.fixture
def run(tiny_model, tiny_caption, tiny_tokens):
    """(config, **generate_latents') -> chunks by index."""

    def make(config, model=None, **options):
        options = {"caption": tiny_caption(), "special_tokens": tiny_tokens} | options
        return {c.index: c.latents for c in generate_latents(model or tiny_model(config), config, **options)}

    return make


BOTH = pytest.mark.parametrize("distill", [False, True], ids=["base", "distill"])


# -- what comes out --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("prefix_frames", range(14))
def test_a_prefix_of_any_length(prefix_frames, distill, run, tiny_config, randn):
    prefix = randn(1, 16, prefix_frames, 4, 4) if prefix_frames else None
    config = tiny_config(distill, num_steps=4, num_frames=30)
    chunks = run(config, prefix=prefix)
    # 30 frames are 7 latents, rounded up so that the last chunk is whole.
    chunk_count = -(-(7 + prefix_frames) // 6)
    whole = prefix_frames // 6
    assert list(chunks) == list(range(chunk_count - whole))
    wanted = [6] * (chunk_count - whole)
    if prefix_frames != 1:  # an image begins the video it is made into
        wanted[0] -= prefix_frames % 6
    assert [x.shape[2] for x in chunks.values()] == wanted
    assert all(x.shape == (1, 16, n, 4, 4) for x, n in zip(chunks.values(), wanted, strict=True))
    assert all(bool(x.isfinite().all()) for x in chunks.values())


@BOTH
def test_a_prefix_is_looked_at(distill, run, tiny_config, randn):
    config = tiny_config(distill, num_frames=24)
    one, other = (run(config, prefix=randn(1, 16, 7, 4, 4, seed=seed)) for seed in range(2))
    assert all(not torch.allclose(one[i], other[i], atol=1e-3) for i in one)


@pytest.mark.parametrize("frames", [4, 23, 24, 47, 48])
def test_frames_are_counted_in_whole_latents_and_chunks(frames, run, tiny_config):
    assert len(run(tiny_config(True, num_steps=4), num_frames=frames)) == -(-(frames // 4) // 6)


def test_the_sizes_may_be_unequal(run, tiny_config):
    chunks = run(tiny_config(), num_frames=24, height=48, width=80)
    assert chunks[0].shape == (1, 16, 6, 6, 10)


@BOTH
def test_a_chunk_is_the_receivers_to_change(distill, run, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    config = tiny_config(distill, num_frames=72)
    wanted = run(config)
    with torch.inference_mode():
        for chunk in generate_latents(tiny_model(config), caption=tiny_caption(), special_tokens=tiny_tokens):
            assert torch.equal(chunk.latents, wanted[chunk.index])
            chunk.latents.zero_()


# -- noise -----------------------------------------------------------------------------------------------------------


@BOTH
def test_a_videos_start_does_not_depend_on_its_length(distill, run, tiny_config):
    config = tiny_config(distill)
    short, long = (run(config, num_frames=n, duration_tokens=False, seed=5) for n in (72, 120))
    assert all(torch.equal(short[i], long[i]) for i in short)


def test_the_seed_decides(run, tiny_config):
    config = tiny_config(num_frames=48)
    one, again, other = (run(config, seed=seed) for seed in (5, 5, 6))
    for i in one:
        assert torch.equal(one[i], again[i])
        assert not torch.allclose(one[i], other[i], atol=1e-2)
    assert not torch.allclose(one[0], one[1], atol=1e-2), "chunks have noise of their own"


def test_every_chunk_has_noise_of_its_own():
    noise = torch.cat([Noise((1, 16, 6, 4, 4), seed=7).chunk(i) for i in range(40)])
    assert noise.mean().abs() < 0.01
    assert (noise.std() - 1).abs() < 0.01
    similarity = torch.corrcoef(noise.flatten(1)) - torch.eye(40)
    assert similarity.abs().max() < 0.15


@pytest.mark.parametrize("seed", [-1, 0, 2**64, 2**80])
def test_any_integer_is_a_seed(seed, run, tiny_config):
    assert run(tiny_config(True, num_steps=4), num_frames=24, seed=seed)[0].std() > 0.1


def test_supplied_noise_replaces_the_seeds(run, tiny_config, randn):
    config = tiny_config(num_frames=48)
    noise = randn(1, 16, 12, 4, 4)
    first = []
    one = run(config, noise=noise, seed=1, progress=lambda event: first.append(event.latents))
    assert torch.equal(first[0], noise[:, :, :6])
    assert torch.equal(one[1], run(config, noise=noise, seed=2)[1])


# -- captions --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("at", [1, 2])
def test_a_new_caption_begins_with_its_chunk(at, window, distill, run, tiny_config, tiny_caption):
    # A chunk sees earlier ones, never later ones. The text pass's K/V of chunks that share the window carry a caption
    # on; those of finished chunks come from passes without text, but the chunks themselves look different by then.
    config = tiny_config(distill, window_size=window)
    first, second = tiny_caption(1), tiny_caption(2, tokens=7)
    plain = run(config, caption=first)
    mixed = run(config, caption=[*[first] * at, second])
    for i in range(at):
        assert torch.equal(mixed[i], plain[i])
    for i in range(at, 4):
        assert not torch.allclose(mixed[i], plain[i], atol=1e-3)


def test_the_last_caption_holds_to_the_end(run, tiny_config, tiny_caption):
    first, second = tiny_caption(1), tiny_caption(2)
    short = run(tiny_config(), caption=[first, second])
    long = run(tiny_config(), caption=[first, second, second, second])
    assert all(torch.equal(short[i], long[i]) for i in short)


def test_captions_count_from_the_first_generated_chunk(run, tiny_config, tiny_caption, randn):
    config = tiny_config(num_frames=48)
    prefix = randn(1, 16, 12, 4, 4)
    seen = run(config, caption=[tiny_caption(1), tiny_caption(2)], prefix=prefix)
    other = run(config, caption=[tiny_caption(1), tiny_caption(3)], prefix=prefix)
    assert torch.equal(seen[0], other[0])
    assert not torch.allclose(seen[1], other[1], atol=1e-3)


@BOTH
def test_an_empty_caption_is_the_null_caption(distill, run, tiny_config, tiny_model):
    config = tiny_config(distill, num_frames=48)
    model = tiny_model(config)
    null = model.outer.null_caption[:50]
    empty = run(config, caption=Caption(torch.zeros(0, 12)))  # no style or duration token either
    plain = run(config, caption=Caption(null), style_tokens=(), duration_tokens=False)
    assert all(torch.equal(empty[i], plain[i]) for i in empty)
    # and it needs no token file
    bare = run(config, caption=Caption(torch.zeros(0, 12)), special_tokens=None)
    assert all(torch.equal(empty[i], bare[i]) for i in empty)


@BOTH
@pytest.mark.parametrize("change", [{"duration_tokens": False}, {"style_tokens": ()}, {"style_tokens": ("static",)}])
def test_tokens_change_the_picture(change, distill, run, tiny_config):
    config = tiny_config(distill, num_frames=24)
    assert not torch.allclose(run(config)[0], run(config, **change)[0], atol=1e-3)


def test_negative_tokens_change_the_picture(run, tiny_config):
    config = tiny_config(num_frames=24)
    assert not torch.allclose(run(config)[0], run(config, negative_tokens=True)[0], atol=1e-3)


# -- progress and cancelling -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("prefix_frames", [0, 8])
def test_progress_tells_every_iteration(prefix_frames, distill, run, tiny_config, randn):
    config = tiny_config(distill, num_frames=72)
    events = []
    prefix = randn(1, 16, prefix_frames, 4, 4) if prefix_frames else None
    chunks = run(config, prefix=prefix, progress=events.append)
    assert [e.iteration for e in events] == list(range(1, len(events) + 1))
    assert {e.total for e in events} == {len(events)}
    grid = [float(t) for t in time_grid(8)]
    times = {}
    for e in events:
        assert e.latents.shape == e.velocity.shape == (1, 16, 6 * len(e.timesteps), 4, 4)
        for i, t in enumerate(e.timesteps):
            times.setdefault(e.first_chunk + i, []).append(t)
    assert times == dict.fromkeys(chunks, grid[:-1])


@BOTH
def test_the_preview_at_the_last_step_is_the_chunk(distill, run, tiny_config, randn):
    config = tiny_config(distill, num_frames=72)
    previews = {}

    def progress(event):
        first = (event.latents + (1 - event.timesteps[0]) * event.velocity)[:, :, :6]
        previews[event.first_chunk] = first

    chunks = run(config, progress=progress, prefix=randn(1, 16, 1, 4, 4))
    for i in chunks:
        torch.testing.assert_close(previews[i], chunks[i])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_progress_raises_ends_the_run_at_once(error, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    seen = []

    def progress(event):
        seen.append(event.iteration)
        if len(seen) == 10:
            raise error

    config = tiny_config()
    sampler = make_sampler(tiny_model(config), caption=tiny_caption(), special_tokens=tiny_tokens, progress=progress)
    chunks = []
    with pytest.raises(error):
        chunks += sampler
    assert seen == list(range(1, 11)), "and not one more"
    assert sampler.state.iteration == 9, "the iteration that was cut off is not counted"
    # The same sampler continues from there.
    rest = {c.index: c.latents for c in sampler}
    assert sorted({*(c.index for c in chunks), *rest}) == [0, 1, 2, 3]
    whole = {
        c.index: c.latents
        for c in generate_latents(tiny_model(config), caption=tiny_caption(), special_tokens=tiny_tokens)
    }
    assert all(torch.equal(rest[i], whole[i]) for i in rest)


def test_heartbeat_fractions_rise_to_one_and_may_cancel(run, tiny_config):
    config = tiny_config(num_frames=24, num_steps=4)
    fractions = []
    run(config, heartbeat=fractions.append)
    starts = [i for i in range(len(fractions)) if i == 0 or fractions[i] < fractions[i - 1]]
    assert len(starts) == 4
    assert fractions.count(1.0) == 4
    assert min(fractions) > 0

    def cancel(done):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(config, heartbeat=cancel)


def test_nothing_is_computed_before_the_first_chunk_is_asked_for(tiny_config, tiny_model, tiny_caption, tiny_tokens):
    model = tiny_model(tiny_config())
    model.blocks = None  # would fail at the first forward
    generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)


# -- the engine ------------------------------------------------------------------------------------------------------


class AskedBlocks:
    """Blocks that count how often each one is asked for."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.asked = Counter()
        self.rounds = 0

    def __len__(self):
        return len(self.blocks)

    def __iter__(self):
        self.rounds += 1
        for i, block in enumerate(self.blocks):
            self.asked[i] += 1
            yield block


@BOTH
def test_each_layer_is_asked_for_once_an_iteration(distill, run, tiny_config, tiny_model):
    config = tiny_config(distill, num_frames=120)
    model = tiny_model(config)
    model.blocks = AskedBlocks(model.blocks)
    events = []
    run(config, model, progress=events.append)
    assert any(len(e.timesteps) == 4 for e in events)
    assert model.blocks.rounds == len(events)
    assert model.blocks.asked == dict.fromkeys(range(2), len(events))


@BOTH
def test_memory_does_not_grow_with_the_video(distill, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    config = tiny_config(distill, num_steps=4)
    peaks = []
    for chunks in (8, 60):
        most = 0

        def measure(event):
            nonlocal most
            most = max(most, sampler.nbytes)  # noqa: B023 (used while it is the same)

        sampler = make_sampler(
            tiny_model(config),
            caption=tiny_caption(),
            special_tokens=tiny_tokens,
            num_frames=24 * chunks,
            progress=measure,
        )
        for _ in sampler:
            most = max(most, sampler.nbytes)
        peaks.append(most)
    assert peaks[0] == peaks[1]
    latents, kv = 16 * 6 * 4 * 4 * 4, 2 * 2 * 4 * 24 * 8 * 4  # bytes of a chunk: its latents, its K/V in both layers
    cached = 1  # default K/V ranges: the last segment's chunk sees one before it
    kept = 4  # as many as a run with the smallest window would look back on
    assert peaks[0] <= cached * kv + (4 + kept) * latents


def test_captions_of_finished_chunks_are_forgotten(tiny_config, tiny_model, tiny_caption, tiny_tokens, monkeypatch):
    config = tiny_config(True, num_steps=4, num_frames=24 * 20)
    model = tiny_model(config)
    made, encode = [], model.encode_caption

    def encoded(embeds):
        caption = encode(embeds)
        made.append(weakref.ref(caption))
        return caption

    monkeypatch.setattr(model, "encode_caption", encoded)
    alive = []
    chunks = generate_latents(
        model,
        caption=[tiny_caption(i) for i in range(20)],
        special_tokens=tiny_tokens,
        progress=lambda event: alive.append(sum(caption() is not None for caption in made)),
    )
    assert len(list(chunks)) == 20
    assert len(made) == 21, "each once, and the null caption"
    assert max(alive) <= 6


# -- numbers that are none -------------------------------------------------------------------------------------------

NONE = [float("nan"), float("inf")]


@BOTH
@pytest.mark.parametrize("bad", NONE)
def test_damaged_weights_are_told_from_a_result(bad, distill, run, tiny_config, tiny_model):
    config = tiny_config(distill)
    model = tiny_model(config)
    weights = list(model.blocks)[1]
    weights.fc2.weight[3, 5] = bad
    with pytest.raises(MagiError, match=r"Step 1 of 8 of chunk 1 .*NaN or infinity.*layer 1, fc2\.weight.*damaged"):
        run(config, model)


def test_weights_outside_the_layers_are_named_too(run, tiny_config, tiny_model):
    config = tiny_config()
    model = tiny_model(config)
    model.outer.final.weight[0, 0] = float("nan")
    with pytest.raises(MagiError, match=r"hold such numbers \(final\.weight\)"):
        run(config, model)


@BOTH
def test_a_fault_in_the_middle_leaves_the_state_before_it(distill, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    """Sound weights, numbers that leave their range: nothing of the faulty step is kept or shown."""
    config = tiny_config(distill)
    model, seen = tiny_model(config), []
    sampler = make_sampler(
        model, config, caption=tiny_caption(), special_tokens=tiny_tokens, progress=lambda e: seen.append(e.iteration)
    )
    chunks = iter(sampler)
    first = next(chunks)
    assert first.latents.isfinite().all()
    done = sampler.state.iteration
    forward = model.forward

    def overflow(*args):
        return [[None if v is None else v / 0 for v in velocities] for velocities in forward(*args)]

    model.forward = overflow
    with pytest.raises(MagiError, match=r"Step 7 of 8 of chunk 2 .*may not be what they are taken for"):
        next(chunks)
    assert sampler.state.iteration == done == seen[-1]
    assert all(x.isfinite().all() for x in (*sampler.state.window.values(), *sampler.state.clean.values()))


@pytest.mark.parametrize("bad", NONE)
def test_inputs_that_are_none_are_refused_before_any_step(bad, run, tiny_config, randn, tiny_caption):
    config, shape = tiny_config(), (1, 16, 6, 4, 4)
    prefix, embeds = randn(*shape), tiny_caption().embeds.clone()
    prefix[0, 3, 1, 2, 2] = embeds[1, 1] = bad
    with pytest.raises(MagiError, match="in the prefix"):
        run(config, prefix=prefix)
    with pytest.raises(MagiError, match="in the noise"):
        run(config, num_frames=24, noise=prefix)
    with pytest.raises(MagiError, match="in the prompt's embeddings"):
        Caption(embeds)
