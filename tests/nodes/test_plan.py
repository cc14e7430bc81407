"""What the sampler plans its memory for is the run that it makes."""

import pytest
import torch

from magi.errors import MagiError
from magi.sampling.schedule import Schedule, check_steps
from tests.support.magi_graphs import HEIGHT, WIDTH, loaded, refused, text_to_video


@pytest.mark.parametrize("given", [0, 1, 3, 6, 8, 14])
@pytest.mark.parametrize("window", [0, 1])
def test_memory_is_planned_for_the_run_that_is_made(given, window, comfy, monkeypatch):
    models, sampler = comfy.module("nodes.comfyui.models"), comfy.module("nodes.sampler")
    place, prepare = models.place, sampler.prepare
    planned, prepared = [], []

    def placing(run, sizes, free, options, given, **others):
        planned.append(Schedule.of_run(run.runtime, given))
        return place(run, sizes, free, options, given, **others)

    def preparing(*args, **options):
        prepared.append(prepare(*args, **options))
        return prepared[-1]

    monkeypatch.setattr(models, "place", placing)
    monkeypatch.setattr(sampler, "prepare", preparing)
    graph = text_to_video(comfy, window=window, steps=4)
    if given:
        samples = torch.ones(1, 16, given, HEIGHT // 8, WIDTH // 8)
        graph["start"] = {"class_type": comfy.constant("LATENT", {"samples": samples}), "inputs": {}}
    comfy.run(graph)
    assert set(map(vars_of, planned)) == set(map(vars_of, (run.schedule for run in prepared)))


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
