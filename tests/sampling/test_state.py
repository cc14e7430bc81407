"""A run that stopped anywhere resumes bit for bit from a copy of its state."""

import pytest
import torch

from magi.errors import MagiError
from magi.runs.autosave import Autosave
from magi.runs.store import RunStore
from magi.sampling.prepare import make_sampler
from magi.sampling.schedule import Schedule
from magi.sampling.state import SamplerState, check_state
from magi.transformer.model import Transformer

CASES = {
    "base": (False, 0, {}),
    "base, prefix ends within a chunk": (False, 9, {}),
    "base, clean chunks see their neighbours": (False, 13, {"clean_chunk_kvrange": 2}),
    "base, everything seen": (False, 0, {"noise2clean_kvrange": (), "window_size": 2}),
    "distill": (True, 0, {}),
    "distill, prefix ends within a chunk": (True, 9, {}),
    "distill, prefix of whole chunks": (True, 12, {"window_size": 1}),
    "distill, an image": (True, 1, {"num_steps": 12}),
}


@pytest.fixture(scope="module", params=CASES)
def run(request, tiny_config, tiny_model, tiny_caption, tiny_tokens, randn):
    """(state=None, progress=None) -> a new sampler of one and the same run on a model of its own."""
    distill, prefix_frames, runtime = CASES[request.param]
    config = tiny_config(distill, num_frames=72, **{"num_steps": 4, **runtime})
    model = tiny_model(config)

    def make(state=None, progress=None):
        return make_sampler(
            model,
            caption=[tiny_caption(1), tiny_caption(2)],
            special_tokens=tiny_tokens,
            seed=3,
            prefix=randn(1, 16, prefix_frames, 4, 4) if prefix_frames else None,
            state=state,
            progress=progress,
        )

    return make


def test_stopping_after_every_iteration(run):
    states, velocities, chunks, came_after = [], [], {}, {}

    def progress(event):
        states.append(whole.state.copy())
        velocities.append(event.velocity)

    whole = run(progress=progress)
    for chunk in whole:
        chunks[chunk.index] = chunk.latents
        came_after[chunk.index] = whole.state.iteration
    assert len(states) == whole.total
    for done, state in enumerate(states):
        assert state.iteration == done
        again = []
        rest = run(state, progress=lambda event, again=again: again.append(event.velocity))
        got = {c.index: c.latents for c in rest}
        assert list(got) == [i for i in chunks if came_after[i] > done]
        assert all(torch.equal(got[i], chunks[i]) for i in got)
        assert len(again) == whole.total - done
        assert all(torch.equal(a, b) for a, b in zip(again, velocities[done:], strict=True))


def test_a_state_survives_being_written_to_disk(run, tmp_path):
    sampler, chunks = run(), {}
    saved = None
    for chunk in sampler:
        chunks[chunk.index] = chunk.latents
        if saved is None:
            saved = tmp_path / "state.pt"
            torch.save(vars(sampler.state), saved)
            held = (*sampler.state.window.values(), *sampler.state.clean.values())
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in held), "no tensor drags a larger one along"
    state = SamplerState(**torch.load(saved, weights_only=True))
    first, *others = chunks
    rest = {c.index: c.latents for c in run(state)}
    assert list(rest) == others
    assert all(torch.equal(rest[i], chunks[i]) for i in rest)
    assert first not in rest


def test_a_copy_does_not_change_with_its_original(run):
    sampler = run()
    copies = [sampler.state.copy()]
    for _ in sampler:
        copies.append(sampler.state.copy())
    again = run(copies[0])
    next(iter(again))
    assert copies[0].iteration == 0
    assert copies[0].window == {}
    assert [c.iteration for c in copies] == sorted({c.iteration for c in copies})


def test_a_finished_run_has_nothing_more_to_give(run):
    sampler = run()
    assert list(sampler)
    assert list(sampler) == []
    assert list(run(sampler.state.copy())) == []


def test_no_more_chunks_are_run_again_than_will_be_seen(
    tiny_config, tiny_model, tiny_caption, tiny_tokens, monkeypatch
):
    model = tiny_model(tiny_config(num_frames=168, num_steps=8))
    options = {"caption": tiny_caption(), "special_tokens": tiny_tokens}
    states = []
    run = make_sampler(model, **options, progress=lambda event: states.append(run.state.copy()))
    assert len(list(run)) == 7
    forward, calls = Transformer.forward, []
    monkeypatch.setattr(Transformer, "forward", lambda *args: calls.append(None) or forward(*args))
    for begun in (True, False):  # a stage shows the chunk before it to the model in its first step
        state = next(s for s in states if sorted(s.clean) == [0, 1, 2, 3] and s.iteration % 2 == begun)
        make_sampler(model, **options, state=state).fill_cache()
        assert len(calls) == begun
        calls.clear()


# -- a window that became smaller on the way -------------------------------------------------------------------------

NARROWED = {  # distilled, prefix frames, settings
    "base": (False, 0, {}),
    "base, an image": (False, 1, {}),
    "base, prefix ends within a chunk": (False, 9, {}),
    "base, clean chunks see their neighbours": (False, 13, {"clean_chunk_kvrange": 2}),
    "base, everything seen": (False, 0, {"noise2clean_kvrange": ()}),
    "distill": (True, 0, {}),
    "distill, prefix of whole chunks": (True, 12, {}),
}


@pytest.fixture(params=NARROWED)
def narrow(request, tiny_config, tiny_model, tiny_caption, tiny_tokens, randn, monkeypatch):
    """(at=iterations done before memory runs out, window=4, finished=(), **make_sampler's) -> a run of six chunks.

    Only the window can become smaller. `finished` chunks become the prefix, without their captions.
    """
    distill, prefix_frames, runtime = NARROWED[request.param]
    prefix = randn(1, 16, prefix_frames, 4, 4) if prefix_frames else None
    captions = [tiny_caption(i) for i in range(6)]

    def make(at=(), window=4, finished=(), **options):
        count = 6 - len(finished)
        # As many as fill the last chunk; prefix frames that do not fill a chunk are part of it.
        latents = 6 * count - (0 if finished else prefix_frames % 6)
        config = tiny_config(distill, num_frames=4 * latents, num_steps=4, window_size=window, **runtime)
        model = tiny_model(config)
        while model.shrink():
            pass
        forward, pending = Transformer.forward, list(at)

        def failing(self, passes, *args):
            if pending and run.total_done == pending[0]:
                del pending[0]
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, passes, *args)

        monkeypatch.setattr(Transformer, "forward", failing)
        run = make_sampler(
            model,
            caption=captions[len(finished) :],
            special_tokens=tiny_tokens,
            seed=3,
            prefix=torch.cat([*([] if prefix is None else [prefix]), *finished], dim=2) if finished else prefix,
            report=lambda text: run.reports.append(text),
            **{"progress": lambda event: run.seen(event), **options},
        )
        run.reports, run.events, run.total_done = [], [], 0

        def seen(event):
            run.events.append(event)
            run.total_done += 1

        run.seen = seen
        return run

    make.prefix_frames = prefix_frames
    return make


def of(chunks) -> dict[int, torch.Tensor]:
    found = [(chunk.index, chunk.latents) for chunk in chunks]
    assert [index for index, _ in found] == list(range(found[0][0], found[0][0] + len(found)))
    return dict(found)


def as_prefix(chunks: dict[int, torch.Tensor], prefix_frames: int) -> list[torch.Tensor]:
    """Finished chunks as they follow the prefix; the first of them contains an image prefix."""
    first, *others = chunks.values()
    return [first[:, :, prefix_frames if prefix_frames == 1 else 0 :], *others]


@pytest.mark.parametrize("iterations", [0, 3, 5, 7])
def test_it_continues_as_a_run_with_the_finished_chunks_as_prefix(iterations, narrow):
    """With one step per stage, chunks are finished after the fourth iteration and each later one."""
    full_window = of(narrow())
    run = narrow(at=[iterations])
    made = of(run)
    done = max(0, iterations - 3)
    assert list(made) == list(range(6))
    assert all(torch.equal(made[i], full_window[i]) for i in range(done))
    assert "2 instead of 4 chunks are denoised at a time. The video will differ" in run.reports[0]
    assert f"unfinished chunks after number {done} restart" in run.reports[0]
    finished = as_prefix({i: made[i] for i in range(done)}, narrow.prefix_frames) if done else []
    fresh = narrow(window=2, finished=finished)
    rest = of(fresh)
    assert len(rest) == 6 - done
    assert all(torch.equal(made[done + i], rest[i]) for i in rest)
    after = run.events[iterations:]
    assert [e.iteration for e in after] == list(range(1, fresh.total + 1))
    assert {e.total for e in after} == {fresh.total} == {run.total}
    for one, other in zip(after, fresh.events, strict=True):
        assert (one.first_chunk, one.timesteps) == (other.first_chunk + done, other.timesteps)
        assert torch.equal(one.velocity, other.velocity)


def test_it_may_become_smaller_twice(narrow):
    run = narrow(at=[5, 9])
    made = of(run)
    assert list(made) == list(range(6))
    assert [text.partition(" chunks")[0].rpartition("on ")[2] for text in run.reports] == [
        "2 instead of 4",
        "1 instead of 2",
    ]
    done = 2 + 1
    finished = as_prefix({i: made[i] for i in range(done)}, narrow.prefix_frames)
    rest = of(narrow(window=1, finished=finished))
    assert all(torch.equal(made[done + i], rest[i]) for i in rest)


@pytest.mark.parametrize("stop", [6, 7, 9, 12])
def test_its_saved_state_resumes_bit_for_bit(stop, narrow, tmp_path):
    """Memory runs out after the fifth iteration; the run is interrupted in one after that."""
    whole = narrow(at=[5])
    wanted = of(whole)

    def interrupt(event):
        run.seen(event)
        if len(run.events) == stop:
            raise KeyboardInterrupt

    def kept(store, **options):
        store.open({"a": "setting"})
        return store, narrow(**options)

    store, run = kept(RunStore(tmp_path), at=[5], progress=interrupt)
    autosave = Autosave(store, run._model)
    with pytest.raises(KeyboardInterrupt):
        list(autosave.chunks(run))
    store.close()
    store = RunStore(tmp_path)
    store.open({"a": "setting"})
    assert (store.saved.state.window_size, store.saved.state.iteration) == (2, stop - 6)
    rest = narrow(state=store.saved.state)
    autosave = Autosave(store, rest._model)
    made = of(autosave.chunks(rest))
    assert list(made) == list(wanted)
    assert all(torch.equal(made[i], wanted[i]) for i in wanted)
    assert len(rest.events) == len(whole.events) - stop + 1, "nothing is made twice"
    for one, other in zip(rest.events, whole.events[stop - 1 :], strict=True):
        assert torch.equal(one.velocity, other.velocity)


@pytest.mark.parametrize("narrows", [False, True], ids=["as it was", "narrowed"])
@pytest.mark.parametrize("distill", [False, True], ids=["base", "distill"])
def test_what_is_kept_does_not_grow_with_the_video(
    narrows, distill, tiny_config, tiny_model, tiny_caption, tiny_tokens, monkeypatch
):
    def most(chunks):
        config = tiny_config(distill, num_frames=24 * chunks, num_steps=4)
        model = tiny_model(config)
        while model.shrink():
            pass
        options = {"caption": tiny_caption(), "special_tokens": tiny_tokens, "report": lambda text: None}
        run = make_sampler(model, **options, duration_tokens=False)
        kept = Schedule.of(config.runtime, chunks, 0).kept_chunks
        assert kept == 4
        sizes = []
        if narrows:
            run._lower_memory(MemoryError())
        for chunk in run:
            assert len(run.state.clean) <= kept
            if chunk.index == 3:
                assert sorted(run.state.clean) == [0, 1, 2, 3], "all that a smaller window may need"
            sizes.append(run.nbytes)
        assert len(sizes) == chunks
        assert (run.state.window_size == 2) == narrows
        return max(sizes)

    assert most(6 if narrows else 8) == most(60), "the shorter ones fill the window"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 3}, r"window of 3 from chunk 2 on is none of this run's\. Give a state"),
        ({"window_size": 0}, "window of 0 from"),
        ({"window_size": -2}, "window of -2 from"),
        ({"window_size": 4}, "window of 4 from"),
        ({"window_size": 8}, "window of 8 from"),
        ({"done": 0}, "from chunk 0 on is none"),
        ({"done": -1}, "from chunk -1 on"),
        ({"done": 6}, "from chunk 6 on"),
        ({"done": 7}, "from chunk 7 on"),
        ({"done": 3}, r"chunks clean are \[0, 1, 2\], but the state has \[0, 1\]"),
        ({"window_size": None}, r"chunks clean are \[0\], but the state has \[0, 1\]"),
        ({"iteration": 3}, r"chunks in the window are \[2\], but the state has \[\]"),
        ({"iteration": 21}, "after 21 iterations, but the run has 20"),
        ({"iteration": -1}, "after -1 iterations"),
        (
            {"clean": {0: torch.zeros(1, 16, 6, 4, 4), 1: torch.zeros(1, 16, 6, 4, 5)}},
            "latents of chunk 1 in the state have the shape",
        ),
    ],
)
def test_states_that_no_narrowed_run_was_in(changes, message):
    schedule, shape = Schedule(6, 1, 8, 4), (1, 16, 6, 4, 4)
    state = SamplerState(clean={c: torch.zeros(shape) for c in (0, 1)}, window_size=2, done=2)
    check_state(state, schedule, shape)
    for name, value in changes.items():
        setattr(state, name, value)
    with pytest.raises(MagiError, match=message):
        check_state(state, schedule, shape)
