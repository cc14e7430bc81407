"""What the sampler plans its memory for is the run that it makes."""

import pytest
import torch

from magi.errors import MagiError
from magi.sampling.schedule import Schedule, check_steps
from tests.support.magi_graphs import HEIGHT, WIDTH, loaded, refused, text_to_video


@pytest.mark.parametrize("given", [0, 1, 3, 6, 8, 14])
@pytest.mark.parametrize("window", [0, 1])
def test_memory_is_planned_for_the_run_that_is_made(given, window, comfy, monkeypatch):
    planner, pipeline = comfy.module("magi.planning.planner"), comfy.module("magi.pipeline.pipeline")
    place, start = planner.place, pipeline.start_sampler
    planned, started = [], []

    def placing(run, sizes, free, options, given, **others):
        planned.append(Schedule.of_run(run.runtime, given))
        return place(run, sizes, free, options, given, **others)

    def starting(model, run, *args, **options):
        started.append(run.schedule)
        return start(model, run, *args, **options)

    monkeypatch.setattr(planner, "place", placing)
    monkeypatch.setattr(pipeline, "start_sampler", starting)
    graph = text_to_video(comfy, window=window, steps=4)
    if given:
        samples = torch.ones(1, 16, given, HEIGHT // 8, WIDTH // 8)
        graph["start"] = {"class_type": comfy.constant("LATENT", {"samples": samples}), "inputs": {}}
    comfy.run(graph)
    assert len(set(map(vars_of, planned))) == len(started) == 1
    assert set(map(vars_of, planned)) == set(map(vars_of, started))


def sentence(steps: int, window: int) -> str | None:
    """What is wrong with so many steps in such a window."""
    try:
        check_steps(steps, window, (5, 4, 3, 2))
    except MagiError as error:
        return str(error)
    return None


@pytest.mark.parametrize("window", range(17))
def test_steps_that_do_not_fit_the_window_are_refused_before_any_node_runs(window, comfy):
    check = comfy.nodes["Magi1Sampler"].validate_inputs
    for steps in range(257):
        assert check(steps=steps, window=window) == (sentence(steps, window or 4) or True if steps else True)
    assert check() is check(window=window) is True, "what comes from another node is not known yet"


def test_no_text_is_encoded_for_steps_that_do_not_fit(comfy, reads):
    message = refused(comfy, text_to_video(comfy, steps=8, window=3))
    assert sentence(8, 3) in message
    assert reads == []


@pytest.mark.parametrize("window", [3, 5])
def test_the_models_own_steps_are_checked_before_the_model_is_loaded(window, comfy, reads):
    graph = text_to_video(comfy, steps=0, window=window)
    assert f"steps cannot be split evenly over the window of {window} chunks" in refused(comfy, graph)
    assert "transformer" not in reads
    assert loaded(comfy) == set()


def vars_of(schedule: object) -> tuple:
    return tuple(vars(schedule).items())


@pytest.mark.parametrize("most", [(2048, 2), (1024, 1), (1024, 0), (256, 0)])
def test_memory_that_ran_out_once_does_not_run_out_in_the_next_run(most, comfy, monkeypatch):
    transformer = comfy.module("magi.transformer.model").Transformer
    forward, short = transformer.forward, []

    def fails(self, *args, **options):
        if self.token_block > most[0] or len(self.blocks.on_device) > most[1]:
            short.append((self.token_block, len(self.blocks.on_device)))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, **options)

    monkeypatch.setattr(transformer, "forward", fails)
    monkeypatch.setattr(comfy.module("nodes.comfyui.models"), "host_room", lambda device: 10**11)
    monkeypatch.setattr(comfy.module("nodes.comfyui.host"), "usable_memory", lambda: 64 << 30)
    comfy.run(text_to_video(comfy, steps=4))
    assert short
    short.clear()
    placement = comfy.run(text_to_video(comfy, steps=4, seed=2))["model"][0].transformer.placement
    assert short == []
    assert placement.token_block <= most[0]
    assert len(placement.on_device) <= most[1], "that is what is announced, too"
    comfy.management.unload_all_models()
    comfy.run(text_to_video(comfy, steps=4, seed=3))
    assert short == [], "nor after the model was evicted"
