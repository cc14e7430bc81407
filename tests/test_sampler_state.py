"""A run stopped anywhere goes on bit for bit from a copy of its state."""

import pytest
import torch

from magi.generate import make_sampler
from magi.sampler_state import SamplerState

CASES = {
    "base": (False, 0, {}),
    "base, part of a chunk given": (False, 9, {}),
    "base, clean chunks see their neighbours": (False, 13, {"clean_chunk_kvrange": 2}),
    "base, everything seen": (False, 0, {"noise2clean_kvrange": (), "window_size": 2}),
    "distill": (True, 0, {}),
    "distill, part of a chunk given": (True, 9, {}),
    "distill, whole chunks given": (True, 12, {"window_size": 1}),
    "distill, an image": (True, 1, {"num_steps": 12}),
}


@pytest.fixture(scope="module", params=CASES)
def run(request, tiny_config, tiny_model, tiny_caption, tiny_tokens, randn):
    """(state=None, progress=None) -> a new sampler of one and the same run on a model of its own."""
    distill, given, runtime = CASES[request.param]
    config = tiny_config(distill, num_frames=72, **{"num_steps": 4, **runtime})
    model = tiny_model(config)

    def make(state=None, progress=None):
        return make_sampler(
            model,
            caption=[tiny_caption(1), tiny_caption(2)],
            special_tokens=tiny_tokens,
            seed=3,
            prefix=randn(1, 16, given, 4, 4) if given else None,
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


def test_a_copy_does_not_move_with_its_original(run):
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
