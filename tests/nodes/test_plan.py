"""What the sampler plans its memory for is the run that it makes."""

import pytest
import torch

from magi.sampling.schedule import Schedule
from tests.support.magi_graphs import HEIGHT, WIDTH, text_to_video


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


def vars_of(schedule: object) -> tuple:
    return tuple(vars(schedule).items())
