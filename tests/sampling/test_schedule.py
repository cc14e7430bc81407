import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from magi.config import RuntimeConfig
from magi.errors import MagiError
from magi.offload.kv_cache import KVCache
from magi.sampling.schedule import Schedule, check_steps, step_size_signal, time_grid
from tests.support.paths import GOLDEN

CASES = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"]
# Chunks in all, whole prefix chunks, window, steps: one chunk, windows wider than the video, a prefix of all but one
# chunk ...
RUNS = [
    (chunks, prefix, window, steps)
    for chunks, window, steps in itertools.product((1, 2, 3, 5, 9), (1, 2, 3, 4, 6), (12, 24))
    for prefix in {0, 1, chunks // 2, chunks - 1}
    if prefix < chunks
]


def schedule(chunks=6, prefix=0, window=4, steps=8, ranges=(5, 4, 3, 2), clean=1) -> Schedule:
    return Schedule(chunks, prefix, steps, window, ranges, clean)


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_time_grid_is_the_recorded_one_bit_for_bit(case):
    recorded = load_file(GOLDEN / f"{case['name']}.safetensors")["schedule"]
    mode = case["config"]["engine_config"]["shortcut_mode"]
    assert torch.equal(time_grid(case["config"]["runtime_config"]["num_steps"], mode), recorded)


@pytest.mark.parametrize("steps", [4, 8, 16, 32, 64, 100])
def test_time_grid_formula(steps):
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(time_grid(steps).double(), u**2 / (3 - 2 * u**2), rtol=0, atol=4e-7)


@pytest.mark.parametrize(("mode", "lengths"), [("8,16,16", (2, 1, 1)), ("16,16,8", (1, 1, 2))])
def test_twelve_steps_are_uneven_in_the_order_of_the_mode(mode, lengths):
    u = torch.tensor([sum((lengths * 4)[:i]) / 16 for i in range(13)], dtype=torch.float64)
    grid = time_grid(12, mode)
    torch.testing.assert_close(grid.double(), u**2 / (3 - 2 * u**2), rtol=0, atol=4e-7)
    assert [step_size_signal(12, i, mode) for i in range(12)] == [8 / n for n in lengths * 4]


@pytest.mark.parametrize("steps", [8, 16, 32, 64])
def test_step_size_signal_of_even_steps(steps):
    assert {step_size_signal(steps, i) for i in range(steps)} == {steps / 2}


# -- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "prefix", "window", "steps"), RUNS)
def test_every_stage_by_the_definition(chunks, prefix, window, steps):
    per_stage = steps // window
    wanted = []
    for stage in range(prefix, chunks + window - 1):
        active = list(range(max(prefix, stage - window + 1), min(chunks, stage + 1)))
        segments = list(range(max(0, stage - chunks + 1), min(window, stage - prefix + 1)))
        by_age = list(zip(active, reversed(segments), strict=True))  # the oldest at the highest segment
        wanted += [(j, [(c, q * per_stage + j) for c, q in by_age]) for j in range(per_stage)]
    made = schedule(chunks, prefix, window, steps)
    got = [(it.step, list(zip(it.chunks, it.grid, strict=True))) for it in made]
    assert got == wanted
    assert len(made) == len(wanted)
    assert [it.index for it in made] == list(range(len(wanted)))


@pytest.mark.parametrize(("chunks", "prefix", "window", "steps"), RUNS)
def test_every_chunk_takes_all_its_steps_and_leaves_in_order(chunks, prefix, window, steps):
    made = list(schedule(chunks, prefix, window, steps))
    for chunk in range(prefix, chunks):
        taken = [it.grid[it.chunks.index(chunk)] for it in made if chunk in it.chunks]
        assert taken == list(range(steps))
    finished = [(it.index, it.finishes) for it in made if it.finishes is not None]
    assert [chunk for _, chunk in finished] == list(range(prefix, chunks))
    assert finished[-1][0] == len(made) - 1
    # What has become clean is shown in the very next iteration, except after the last one.
    refreshed = [(it.index - 1, it.refresh) for it in made if it.refresh is not None]
    assert refreshed == finished[:-1]
    assert all(len(it.chunks) <= window for it in made)


def test_indices_outside_the_run():
    made = schedule()
    for index in (-1, len(made)):
        with pytest.raises(IndexError):
            made[index]


def test_settings_make_the_schedule():
    runtime = RuntimeConfig(num_steps=16, window_size=2, noise2clean_kvrange=(3, 1), clean_chunk_kvrange=2)
    assert Schedule.of(runtime, 7, 2) == Schedule(7, 2, 16, 2, (3, 1), 2)


# -- K/V -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [(5, 4, 3, 2), (1,), (7, 1), (2, 3, 9)])
@pytest.mark.parametrize("steps", [12, 24, 48])
def test_kv_range_shrinks_from_part_to_part(ranges, steps):
    made = schedule(steps=steps, window=1, ranges=ranges)
    for step in range(steps):
        reach = ranges[step // (steps // len(ranges))]
        for chunk in range(12):
            seen = [c for c in range(chunk + 1) if c > chunk - reach]
            assert made.first_kv_chunk(chunk, step) == seen[0]


def test_default_kv_ranges_at_their_borders():
    made = schedule(steps=64)
    assert [20 - made.first_kv_chunk(20, step) for step in (0, 15, 16, 31, 32, 47, 48, 63)] == [4, 4, 3, 3, 2, 2, 1, 1]


def test_without_kv_ranges_everything_is_seen():
    assert schedule(ranges=()).first_kv_chunk(1000, 3) == 0


def test_clean_chunks_see_as_far_as_their_own_range():
    assert [schedule(clean=1).first_clean_kv_chunk(c) for c in (0, 1, 9)] == [0, 1, 9]
    assert [schedule(clean=3).first_clean_kv_chunk(c) for c in (0, 1, 9)] == [0, 0, 7]


def test_without_kv_ranges_generated_chunks_see_everything_also_when_clean():
    made = schedule(ranges=(), clean=1, prefix=3)
    assert [made.first_clean_kv_chunk(c) for c in (0, 2, 3, 9)] == [0, 2, 0, 0]


@pytest.mark.parametrize(("ranges", "seen"), [((5, 4, 3, 2), 2), ((), 8)])
def test_an_unset_clean_range_is_the_cleanest_of_the_others(ranges, seen):
    runtime = RuntimeConfig(clean_chunk_kvrange=-1, noise2clean_kvrange=ranges)
    assert Schedule.of(runtime, chunks=30, prefix_chunks=20).first_clean_kv_chunk(15) == 16 - seen


def play(made: Schedule, slots: int) -> None:
    """Stores and loads what a run of this schedule would; raises LookupError where K/V are no longer in the ring."""
    cache = KVCache(1, slots, 1, 1, 1, dtype=torch.float32, device="cpu")

    def load(first: int, end: int) -> None:
        for chunk in range(first, end):
            found = next(cache.stream((chunk,)))[chunk]
            assert torch.all(found == chunk)

    def clean(chunk: int) -> None:
        load(made.first_clean_kv_chunk(chunk), chunk)
        cache.store(0, chunk, torch.full((2, 1, 1, 1), float(chunk)))

    for chunk in range(made.prefix_chunks):
        clean(chunk)
    for it in made:
        shown = (
            it.chunks[0] if it.refresh is None else it.refresh
        )  # the K/V of this and later chunks are computed again
        if it.refresh is not None:
            clean(it.refresh)
        for chunk, step in zip(it.chunks, it.grid, strict=True):
            load(made.first_kv_chunk(chunk, step), shown)


@pytest.mark.parametrize("clean", [1, 2, 5])
@pytest.mark.parametrize("ranges", [(5, 4, 3, 2), (2, 3, 9), (1,), (8, 1), ()])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_ring_holds_all_that_is_seen_and_no_more(window, ranges, clean):
    for chunks, prefix in ((1, 0), (3, 0), (3, 2), (12, 0), (12, 1), (14, 11)):
        made = schedule(chunks, prefix, window, 24, ranges, clean)
        slots = made.cached_chunks
        play(made, slots)
        if chunks == 12 and slots and ranges:
            with pytest.raises(LookupError):
                play(made, slots - 1)


@pytest.mark.parametrize("clean", [1, 3])
@pytest.mark.parametrize("window", [1, 4])
def test_the_ring_does_not_grow_with_the_video(window, clean):
    sizes = {schedule(chunks, window=window, clean=clean).cached_chunks for chunks in (8, 60, 10_000)}
    assert len(sizes) == 1
    assert sizes.pop() <= 4


def test_replay_reaches_back_as_far_as_clean_kv_depend_on_one_another():
    assert schedule(60).replayed_chunks == schedule(60).cached_chunks
    assert schedule(60, clean=2).replayed_chunks == 60


# -- bad step counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "window", "ranges", "hint"),
    [
        (10, 4, (5, 4, 3, 2), "8 or 12"),
        (65, 4, (5, 4, 3, 2), "64 or 68"),
        (3, 4, (5, 4, 3, 2), "Use 4 steps"),
        (13, 3, (5, 4, 3, 2), "12 or 24"),
        (7, 2, (), "6 or 8"),
        (8, 1, (3, 2, 1), "6 or 9"),
    ],
)
def test_uneven_steps_name_the_nearest_counts(steps, window, ranges, hint):
    with pytest.raises(MagiError, match=hint) as caught:
        schedule(steps=steps, window=window, ranges=ranges)
    assert str(steps) in str(caught.value)


@pytest.mark.parametrize("steps", [0, -8])
def test_no_steps(steps):
    with pytest.raises(MagiError, match=f"steps is {steps}"):
        check_steps(steps, 4, (5, 4, 3, 2))


def test_no_window():
    with pytest.raises(MagiError, match="window is 0"):
        check_steps(8, 0, (5, 4, 3, 2))


@pytest.mark.parametrize(("steps", "window"), [(64, 4), (12, 4), (12, 2), (8, 1), (4, 4), (64, 64)])
def test_usual_step_counts_pass(steps, window):
    check_steps(steps, window, (5, 4, 3, 2))
