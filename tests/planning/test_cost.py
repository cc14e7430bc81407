"""How long an iteration will take, in pipelines that can be worked out by hand, and by what a forecast goes."""

import random
from itertools import pairwise

import pytest

from magi.config import MagiConfig
from magi.planning.cost import chunk_flops, iteration_flops, iteration_seconds
from magi.planning.footprint import chunk_tokens

# compute, seconds of each layer's copy, slots, keys -> seconds in all
BY_HAND = {
    "all there": (3, [0, 0, 0, 0], 2, 0, 12),
    "the work hides the copies, all but the first": (3, [1, 1, 1, 1], 2, 0, 13),
    "the bus is never idle": (1, [3, 3, 3, 3], 3, 0, 13),
    "two slots are enough for even layers": (1, [3, 3, 3, 3], 2, 0, 13),
    "with one slot nothing is hidden": (1, [3, 3, 3, 3], 1, 0, 16),
    "a long copy has to wait for a slot": (3, [1, 1, 6], 2, 0, 13),
    "with another slot it begins earlier": (3, [1, 1, 6], 3, 0, 11),
    "the first layer is waited for": (2, [2, 0, 0], 2, 0, 8),
    "while one that is there works the next comes": (2, [0, 2, 2], 2, 0, 6),
    "layers that are there give the bus time": (2, [0, 4, 0, 4], 2, 0, 10),
    "a layer that stays takes no slot": (3, [1, 0, 1, 0, 6], 2, 0, 16),
    "keys come for every layer": (3, [0, 0, 0], 2, 1, 10),
    "keys that take longer than the work": (1, [0, 0, 0], 2, 3, 10),
    "keys and layers share the bus": (1, [2, 2], 2, 1, 7),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    compute, copies, slots, keys, seconds = BY_HAND[name]
    assert iteration_seconds(compute, copies, slots, keys) == pytest.approx(seconds)


def test_small_token_blocks_cost_time():
    whole = iteration_seconds(1, [0] * 10, 2)
    times = [iteration_seconds(1, [0] * 10, 2, token_block=size) for size in (4096, 1024, 256, 64)]
    assert whole < times[0] < 1.05 * whole
    assert all(few < more for few, more in pairwise(times))
    assert times[2] > 1.2 * whole
    assert iteration_seconds(1, [9] * 10, 2, token_block=256) == pytest.approx(91, rel=0.01), "but not the bus"


def test_nothing_is_gained_by_a_slower_bus_or_less_room():
    dice = random.Random(0)
    for _ in range(300):
        copies = [dice.choice((0, dice.random())) for _ in range(dice.randint(1, 12))]
        compute, keys, slots = dice.random(), dice.choice((0, 0.3 * dice.random())), dice.randint(1, 3)
        took = iteration_seconds(compute, copies, slots, keys)
        slower = [1.5 * copy for copy in copies]
        assert iteration_seconds(compute, slower, slots, 1.5 * keys) >= took - 1e-9
        assert iteration_seconds(compute, copies, slots + 1, keys) <= took + 1e-9
        assert iteration_seconds(compute, [0] * len(copies), slots) <= took + 1e-9
        least = max(compute * len(copies), sum(copies) + keys * len(copies))
        most = (compute + keys) * len(copies) + sum(copies)
        assert least - 1e-9 <= took <= most + 1e-9


# -- how much work it is ---------------------------------------------------------------------------------------------


def flops(name: str, **runtime) -> float:
    return iteration_flops(MagiConfig.preset(name).with_runtime(**{"num_frames": 960, "window_size": 4} | runtime))


def test_the_work_of_a_lone_chunk():
    """It sees itself alone, in every pass."""
    for name, passes in (("4.5B_distill", 2), ("4.5B_base", 3)):
        config = MagiConfig.preset(name).with_runtime(num_frames=24, window_size=1)
        tokens = chunk_tokens(config)
        one, none = (chunk_flops(config.model, tokens, tokens, text) for text in (800, 0))
        assert passes * none < iteration_flops(config) < passes * one


def test_the_work_grows_with_the_model_the_size_and_the_window_but_not_with_the_length():
    assert flops("4.5B_base") > 1.8 * flops("4.5B_distill")
    assert flops("24B_distill") > 4 * flops("4.5B_distill")
    small, large = (flops("4.5B_base", video_size_h=h, video_size_w=w) for h, w in ((360, 640), (720, 1280)))
    assert large > 5 * small, "attention grows with the square"
    assert 3 * flops("4.5B_base", window_size=1) < 1.2 * flops("4.5B_base")
    assert flops("4.5B_base", num_frames=240) == flops("4.5B_base", num_frames=14400)
