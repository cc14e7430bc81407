"""The sampler keeps its run: the very same one, queued after a cancel, a failure or a crash, resumes where it stopped."""

import gc
import logging
import os
import re
import weakref
from pathlib import Path

import pytest
import torch

from tests.support.graph import Interrupted, NodeError
from tests.support.magi_graphs import node, text_to_video

SECONDS = {"seconds": 3.0}


def kept(comfy) -> list[Path]:
    folder = comfy.base / "user" / "magi1" / "runs"
    return sorted(folder.iterdir()) if folder.exists() else []


def runs(comfy) -> list[Path]:
    """The unfinished ones."""
    return [run for run in kept(comfy) if not (run / "finished.json").exists()]


def forget(comfy) -> None:
    """Another graph runs, so ComfyUI forgets the results of the last one."""
    comfy.run({"image": node("Magi1DemoImage")})
    comfy.events.clear()


def texts(comfy) -> list[str]:
    return [text for name, text in comfy.events.texts if name == "sampler"]


@pytest.fixture
def steps(comfy, monkeypatch):
    """The iterations that were made, in order; `steps.stop` is called with each before it counts."""
    sampler = comfy.module("magi.sampling.sampler").Sampler

    class Steps(list):
        stop = staticmethod(lambda iteration: None)

    found, iterate = Steps(), sampler._iterate

    def counted(self, it):
        found.stop(it.index)
        found.append(it.index)
        return iterate(self, it)

    monkeypatch.setattr(sampler, "_iterate", counted)
    return found


def cancel_at(comfy, steps, iteration: int) -> None:
    steps.stop = lambda index: index == iteration and comfy.management.interrupt_current_processing()


def cancelled(comfy, steps, graph, iteration: int) -> None:
    cancel_at(comfy, steps, iteration)
    with pytest.raises(Interrupted):
        comfy.run(graph)
    steps.stop = lambda index: None
    steps.clear()
    comfy.events.clear()


@pytest.fixture
def whole(comfy, steps) -> torch.Tensor:
    made = comfy.run(text_to_video(comfy, **SECONDS, resume=False))["sampler"][0]["samples"]
    assert kept(comfy) == [], "off: nothing is kept"
    forget(comfy)
    steps.clear()
    return made


def test_a_cancelled_run_says_that_it_goes_on(comfy, steps):
    cancel_at(comfy, steps, 7)
    with pytest.raises(Interrupted):
        comfy.run(text_to_video(comfy, **SECONDS))
    assert re.fullmatch(r"Stopped at (5\d|6\d)%\. Queue the same run again, and it continues there\.", texts(comfy)[-1])
    with pytest.raises(Interrupted):
        comfy.run(text_to_video(comfy, **SECONDS, resume=False))
    assert "Nothing is kept: resume is off." in texts(comfy)[-1]
    assert len(runs(comfy)) == 1


@pytest.mark.parametrize(("iteration", "chunk"), [(3, 1), (7, 1), (8, 2), (11, 3)])
def test_a_cancelled_run_goes_on(comfy, steps, whole, iteration, chunk):
    graph = text_to_video(comfy, **SECONDS)
    cancelled(comfy, steps, graph, iteration)
    assert len(runs(comfy)) == 1
    made = comfy.run(graph)["sampler"][0]["samples"]
    assert torch.equal(made, whole)
    assert steps == list(range(iteration, 12)), "nothing is made twice"
    assert f"continuing at chunk {chunk} of 3" in texts(comfy)[1]
    assert runs(comfy) == []


def test_a_run_that_failed_goes_on(comfy, steps, whole):
    def fail(index):
        if index == 9:
            raise RuntimeError("the card fell out of its slot")

    graph = text_to_video(comfy, **SECONDS)
    steps.stop = fail
    with pytest.raises(NodeError, match="fell out"):
        comfy.run(graph)
    steps.stop = lambda index: None
    steps.clear()
    assert torch.equal(comfy.run(graph)["sampler"][0]["samples"], whole)
    assert steps == [9, 10, 11]


def test_memory_that_runs_out_is_made_do_with(comfy, steps, whole, caplog):
    def fail(index):
        if index == 9 and steps.count(8) == 1 and not caplog.records:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    steps.stop = fail
    caplog.set_level(logging.WARNING)
    assert torch.equal(comfy.run(text_to_video(comfy, **SECONDS))["sampler"][0]["samples"], whole)
    assert steps == list(range(12))
    assert "ran out of memory. From the last finished step on" in texts(comfy)[-1]


@pytest.mark.parametrize("cancel", [False, True])
def test_a_window_that_became_smaller_shows_how_far_it_is(cancel, comfy, steps, monkeypatch):
    """With a window of 1 there are twice as many iterations as had been announced."""
    monkeypatch.setattr(comfy.module("magi.transformer.model").Transformer, "shrink", lambda self: None)
    monkeypatch.setattr(comfy.module("nodes.comfyui.progress"), "_TEXT_SECONDS", 0)
    full = [5, 0]  # iterations before which memory runs out

    def fail(index):
        if full and steps and index == full[0]:
            del full[0]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if cancel and steps[-1:] == [18]:
            comfy.management.interrupt_current_processing()

    graph = text_to_video(comfy, **SECONDS)
    steps.stop = fail
    if cancel:
        with pytest.raises(Interrupted):
            comfy.run(graph)
        steps.stop = lambda index: None
        comfy.events.clear()
    comfy.run(graph)
    made = steps[5:]
    assert made == [*range(24)] if not cancel else made == [*range(20), *range(19, 24)]
    parts = [int(found) for text in texts(comfy) for found in re.findall(r"(\d+)%", text) if "loading" not in text]
    after = parts if cancel else parts[next(i for i, part in enumerate(parts) if parts[i + 1] < part) + 1 :]
    assert (min(after) >= 75) == cancel
    assert max(after) == after[-1] == 100
    assert len(set(after)) > (5 if cancel else 20)
    if not cancel:  # else some of it is spent on taking in what was finished
        assert after == sorted(after)


def test_a_run_whose_comfyui_was_killed_goes_on_from_its_last_chunk(comfy, steps, whole, monkeypatch):
    """Nothing is saved on the way out."""
    store = comfy.module("magi.runs.store").RunStore
    save = store.save
    monkeypatch.setattr(store, "save", lambda self, state, *rest: state.iteration > 10 or save(self, state, *rest))
    graph = text_to_video(comfy, **SECONDS)
    cancelled(comfy, steps, graph, 11)
    monkeypatch.setattr(store, "save", save)
    assert torch.equal(comfy.run(graph)["sampler"][0]["samples"], whole)
    assert steps == [10, 11]


def test_a_finished_run_is_taken_from_disk_when_comfyui_has_dropped_its_result(comfy, steps, reads, monkeypatch):
    graph = text_to_video(comfy, **SECONDS)
    made = comfy.run(graph)["sampler"]
    forget(comfy)
    comfy.management.unload_all_models()
    steps.clear()
    reads.clear()
    again = comfy.run(graph)["sampler"]
    assert torch.equal(again[0]["samples"], made[0]["samples"])
    assert again[1] == made[1]
    assert steps == []
    assert "transformer" not in reads
    assert "finished before" in texts(comfy)[-1]


def test_of_a_finished_run_only_its_latents_are_kept(comfy, steps):
    comfy.run(text_to_video(comfy, **SECONDS))
    (run,) = kept(comfy)
    assert runs(comfy) == []
    assert not (run / "inputs.safetensors").exists(), "captions may be large"


@pytest.mark.parametrize("change", ["version", "damage", "off"])
def test_a_finished_run_is_made_again_where_it_must(change, comfy, steps, monkeypatch):
    graph = text_to_video(comfy, **SECONDS)
    made = comfy.run(graph)["sampler"][0]["samples"]
    forget(comfy)
    steps.clear()
    if change == "version":
        monkeypatch.setattr(comfy.module("nodes.comfyui.runs"), "__version__", "99.0")
    elif change == "damage":
        (kept(comfy)[0] / "chunk-00001.safetensors").write_bytes(b"garbage")
    else:
        graph["sampler"]["inputs"]["resume"] = False
    assert torch.equal(comfy.run(graph)["sampler"][0]["samples"], made)
    assert steps == list(range(12))


def test_finished_runs_do_not_fill_the_disk(comfy, steps, monkeypatch):
    first = []
    for seed in range(7):
        comfy.run(text_to_video(comfy, seed=seed))
        first += list(set(kept(comfy)) - set(first))
        for age, run in enumerate(reversed(first)):
            if run.exists():
                os.utime(run, (10**9 - age, 10**9 - age))
    assert set(kept(comfy)) == set(first[-5:])
    monkeypatch.setattr(comfy.module("nodes.comfyui.runs"), "_MAX_FINISHED_BYTES", 0)
    cancelled(comfy, steps, text_to_video(comfy, seed=8), 1)
    assert len(kept(comfy)) == len(runs(comfy)) == 1, "large ones go first; this one is being made"


def test_switched_off_it_begins_anew(comfy, steps, whole):
    cancelled(comfy, steps, text_to_video(comfy, **SECONDS), 9)
    made = comfy.run(text_to_video(comfy, **SECONDS, resume=False))["sampler"][0]["samples"]
    assert torch.equal(made, whole)
    assert steps == list(range(12))
    assert not any("continuing" in text for text in texts(comfy))


@pytest.mark.parametrize("change", [{"seed": 2}, {"steps": 16}, {"seconds": 4.0}, {"window": 2}, "text", "start"])
def test_another_run_is_another_run(comfy, steps, change):
    cancelled(comfy, steps, text_to_video(comfy, **SECONDS), 9)
    graph = text_to_video(comfy, **SECONDS)
    if change == "text":
        graph["text"]["inputs"]["motion"] = "dynamic"
    elif change == "start":
        graph["start"]["inputs"]["width"] = 80
    else:
        graph["sampler"]["inputs"] |= change
    comfy.run(graph)
    assert steps[0] == 0
    assert len(runs(comfy)) == 1, "the other one waits"


def test_the_newest_few_are_kept(comfy, steps):
    first = []
    for seed in range(7):
        cancelled(comfy, steps, text_to_video(comfy, seed=seed), 1)
        new = set(runs(comfy)) - set(first)
        first += list(new)
        for age, run in enumerate(reversed(first)):
            if run.exists():
                os.utime(run, (10**9 - age, 10**9 - age))
    assert set(runs(comfy)) == set(first[-5:])


def test_a_damaged_run_begins_anew_and_says_so(comfy, steps, whole, caplog):
    graph = text_to_video(comfy, **SECONDS)
    cancelled(comfy, steps, graph, 9)
    (runs(comfy)[0] / "state.safetensors").write_bytes(b"garbage")
    assert torch.equal(comfy.run(graph)["sampler"][0]["samples"], whole)
    assert steps == list(range(12))
    assert "damaged, so it starts over" in texts(comfy)[-1]
    assert runs(comfy) == []


def test_a_state_that_cannot_be_saved_is_shown_and_logged_and_no_more(comfy, steps, whole, caplog):
    (comfy.base / "user" / "magi1").mkdir(parents=True, exist_ok=True)
    (comfy.base / "user" / "magi1" / "runs").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        made = comfy.run(text_to_video(comfy, **SECONDS))["sampler"][0]["samples"]
    assert torch.equal(made, whole)
    assert "cannot be saved" in texts(comfy)[-1]
    assert caplog.text.count("cannot be saved") == 1


def test_an_old_graph_without_the_input_still_runs(comfy):
    graph = text_to_video(comfy)
    del graph["sampler"]["inputs"]["resume"]
    assert len(comfy.run(graph)["decode"][0]) == 24


def test_the_sampler_and_its_keys_go_when_it_is_done(comfy, monkeypatch):
    sampler, alive = comfy.module("magi.sampling.sampler").Sampler, []
    begin = sampler.__init__

    def noted(self, *args, **options):
        alive.append(weakref.ref(self))
        begin(self, *args, **options)

    monkeypatch.setattr(sampler, "__init__", noted)
    gc.disable()
    try:
        comfy.run(text_to_video(comfy))
        assert [made() for made in alive] == [None], "what it holds on the device is free at once"
    finally:
        gc.enable()


def test_a_run_that_another_comfyui_is_making(comfy, steps, whole):
    """Two of them share a user folder: each makes its video, and neither takes the other's files away."""
    graph = text_to_video(comfy, **SECONDS)
    cancelled(comfy, steps, graph, 7)
    (run,) = runs(comfy)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    other = comfy.module("magi.runs.store").RunStore(run)
    other.lock()
    made = comfy.run(graph)["sampler"]
    assert torch.equal(made[0]["samples"], whole)
    assert "Another ComfyUI is making this very run now, so this one is not kept on disk." in made[2]
    for seed in range(10, 17):  # so many that the oldest make room
        cancelled(comfy, steps, text_to_video(comfy, **SECONDS, seed=seed), 5)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    other.close()
    cancelled(comfy, steps, text_to_video(comfy, **SECONDS, seed=20), 5)
    assert not run.exists()
    assert [path for path in run.parent.iterdir() if path.name.endswith(".lock")] == []
