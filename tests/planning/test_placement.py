"""What lies where, for the released models and cards of any size; nothing of it is ever allocated."""

import math
from contextlib import suppress
from itertools import pairwise, product

import pytest

from magi.config import MagiConfig
from magi.errors import MagiError
from magi.planning.cost import Machine
from magi.planning.footprint import kv_bytes, weight_sizes, working_bytes
from magi.planning.placement import TOKEN_BLOCKS, MemoryOptions, Placement, place, smallest, spread
from magi.sampling.schedule import smaller_windows
from magi.transformer.float8 import Kernels
from magi.transformer.inputs import CPU_TOKEN_BLOCK, TOKEN_BLOCK
from magi.transformer.random_weights import RandomTensors

GB = 10**9
HOST = 64 * GB
SLOW = Machine(tflops=1000, host_bandwidth=1e9, file_bandwidth=0.2e9)  # so slow that it shows what is fetched
OPTIONS = [{}, {"streaming": False}, {"streaming": True}, {"cache": "host"}, {"cache": "device"}, {"token_block": 512}]


def run_of(name: str, height: int = 720, width: int = 1280, **runtime) -> tuple:
    """Config and weights of a released model, on a card that does all products without copies."""
    runtime = {"num_frames": 240, "window_size": 4} | runtime
    config = MagiConfig.preset(name).with_runtime(video_size_h=height, video_size_w=width, **runtime)
    tensors = RandomTensors(config.model, config.engine.fp8_quant).tensors
    return config, weight_sizes(tensors, config.model, kernels=Kernels())


@pytest.fixture(scope="module")
def large() -> tuple:
    """4.5B base at 720p."""
    return run_of("4.5B_base")


def placed(
    run: tuple, gigabytes: float, windows=(), machine=SLOW, free_host: int | None = HOST, **options
) -> Placement:
    free = round(gigabytes * GB)
    return place(
        *run, free, MemoryOptions(**options), free_host=free_host, allow_smaller_window=bool(windows), machine=machine
    )


def found(run: tuple, sizes, **options) -> list[Placement]:
    """Placements for those of so many gigabytes that are enough."""
    made = []
    for gigabytes in sizes:
        try:
            made.append(placed(run, gigabytes, **options))
        except MagiError:
            assert not made, "with less memory it went"
    assert made
    return made


def fetched(p: Placement) -> list[int]:
    return [layer for layer in range(p.layers) if layer not in p.on_device]


# -- what is chosen --------------------------------------------------------------------------------------------------


def test_from_nothing_on_the_device_to_everything(large):
    all_there = placed(large, 24)
    assert (all_there.streaming, all_there.cache, all_there.token_block) == (False, "device", TOKEN_BLOCK)
    assert (all_there.slowdown, all_there.host_bytes, all_there.on_host) == (1, 0, ())
    assert all_there.weight_bytes == pytest.approx(all_there.total_weight_bytes, rel=1e-4)
    some = placed(large, 10)
    assert 0 < len(some.on_device) < some.layers
    tight = placed(large, 3.8)
    assert (tight.on_device, tight.cache) == ((), "host")
    assert 1 < some.slowdown < tight.slowdown


@pytest.mark.parametrize("machine", [Machine(), SLOW, Machine(tflops=400)])
@pytest.mark.parametrize("free_host", [None, 12 * GB, HOST])
def test_more_memory_never_slows_down(machine, free_host, large):
    tenths = [n / 10 for n in range(30, 240, 12)]
    for few, many in pairwise(found(large, tenths, machine=machine, free_host=free_host)):
        assert many.slowdown <= few.slowdown + 1e-9


@pytest.mark.parametrize("cache", ["device", "host"])
def test_more_memory_keeps_more_layers(cache, large):
    made = found(large, range(4, 24), cache=cache, token_block=TOKEN_BLOCK)
    counts = [len(p.on_device) for p in made]
    assert counts == sorted(counts)
    assert counts[0] < 4
    assert counts[-1] == 34


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_chosen_leaves_a_tenth_and_uses_the_rest(options, large):
    for gigabytes, p in zip(range(23, 1, -1), reversed(found(large, range(2, 24), **options)), strict=False):
        assert p.device_bytes == p.weight_bytes + p.working_bytes <= 0.9 * gigabytes * GB
        assert p.needed_bytes == p.weight_bytes + p.spare_bytes <= gigabytes * GB
        assert p.needed_bytes >= p.device_bytes / 0.9
        if p.streaming and options.get("streaming") is None:
            more = p.needed_bytes + large[1].packed[1] / 0.9
            assert more > gigabytes * GB, "another layer has room"


@pytest.mark.parametrize("gigabytes", [3.7, 4.5, 7, 9, 12])
def test_nothing_that_could_be_asked_for_is_faster(gigabytes, large):
    best = placed(large, gigabytes)
    others = []
    for cache, token_block, streaming in product(("device", "host"), TOKEN_BLOCKS, (True, None)):
        with suppress(MagiError):
            others.append(placed(large, gigabytes, cache=cache, token_block=token_block, streaming=streaming).slowdown)
    assert len(others) > 1
    assert best.slowdown == min(others)


def test_small_token_blocks_are_for_where_nothing_else_helps(large):
    least = smallest(*large).needed_bytes
    tight, roomy = (placed(large, factor * least / GB, machine=Machine()) for factor in (1, 1.2))
    assert tight.token_block < roomy.token_block == TOKEN_BLOCK


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("24B_distill_quant", 8), ("4.5B_base", 4), ("4.5B_distill", 4), ("4.5B_distill_quant", 4)]
)
def test_released_models_at_720p_on_small_cards(name, gigabytes):
    short, long = (
        place(*run_of(name, num_frames=24 * seconds), gigabytes * GB, free_host=HOST) for seconds in (5, 600)
    )
    assert short == long, "the length costs nothing"
    assert short.window == 4
    assert short.needed_bytes <= gigabytes * GB
    assert short.slowdown <= 1.05
    assert 0 < short.host_bytes <= HOST
    assert tuple(fetched(short)) == short.on_host


# -- what is fixed ---------------------------------------------------------------------------------------------------


def test_what_is_fixed_stays_fixed(large):
    for gigabytes in (9, 16, 80):
        streamed = placed(large, gigabytes, streaming=True)
        assert streamed.on_device == ()
        assert streamed.weight_bytes < placed(large, 80).weight_bytes / 4
    for cache, token_block in product(("device", "host"), (4096, 300)):
        p = placed(large, 80, cache=cache, token_block=token_block)
        assert (p.streaming, p.cache, p.token_block) == (False, cache, token_block)
    resident = placed(large, 14.5, streaming=False)
    assert (resident.streaming, resident.cache) == (False, "host"), "the keys give way"


def test_where_fetched_layers_wait_can_be_fixed(large):
    for free_host in (None, GB, HOST):
        pinned = placed(large, 8, pinned=True, free_host=free_host)
        assert pinned.on_host == tuple(fetched(pinned))
        assert placed(large, 8, pinned=False, free_host=free_host).on_host == ()
    assert placed(large, 80, pinned=True).on_host == (), "nothing is fetched"


def test_a_budget_is_taken_at_its_word(large):
    assert placed(large, 80, budget=10 * GB) == placed(large, 10)
    assert placed(large, 4, budget=40 * GB) == placed(large, 40)


def test_the_hosts_own_memory_holds_everything(large):
    everything = place(*large, None)
    assert (everything.streaming, everything.cache, everything.token_block) == (False, "device", CPU_TOKEN_BLOCK)
    assert place(*large, None, MemoryOptions(budget=1), free_host=HOST, allow_smaller_window=True) == everything
    asked = place(*large, None, MemoryOptions(streaming=True, cache="host", token_block=100))
    assert (asked.on_device, asked.on_host, asked.cache, asked.token_block) == ((), (), "host", 100)


def test_on_the_host_few_tokens_are_taken_at_a_time(large):
    """So few that a cancel takes effect between two, whatever is free."""
    made = [place(*large, None, free_host=round(n * GB)) for n in (0.1, 8, 40)]
    assert {(p.streaming, p.cache, p.token_block) for p in made} == {(False, "device", CPU_TOKEN_BLOCK)}
    asked = place(*large, None, MemoryOptions(token_block=1000), free_host=1)
    assert asked.token_block == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cache": "disk"}, "'disk'.*auto, device, host"), ({"token_block": 0}, "block of 0.*at least 1")],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(MagiError, match=message):
        MemoryOptions(**options)


# -- too little ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [(), (2, 1)])
@pytest.mark.parametrize("options", OPTIONS)
def test_too_little_memory_is_told_with_what_would_do(windows, options, large):
    with pytest.raises(MagiError, match=r"1280x720 with a window of 4.* needs about .*free are 1\.5 GB") as error:
        placed(large, 1.5, windows, **options)
    assert ("4 or 2 or 1 needs" in str(error.value)) == bool(windows)
    needed = float(str(error.value).split("about ")[1].split()[0])
    assert placed(large, needed + 0.06, windows, **options).needed_bytes <= (needed + 0.06) * GB
    with pytest.raises(MagiError):
        placed(large, needed - 0.06, windows, **options)


@pytest.mark.parametrize(
    ("gigabytes", "options", "remedy", "change"),
    [
        (12, {"streaming": False}, "streaming weights", {"streaming": None}),
        (6, {"streaming": True, "cache": "device"}, "the K/V cache on the host", {"cache": "auto"}),
        (3.7, {"token_block": 4096}, "a smaller token block", {"token_block": 256}),
        (3, {}, "a window of 1", {"window_size": 1}),
        (80, {"budget": GB}, "a larger budget", {"budget": 20 * GB}),
        (3, {}, "a smaller size", {"video_size_h": 256, "video_size_w": 256}),
    ],
)
def test_remedies_help(gigabytes, options, remedy, change, large):
    with pytest.raises(MagiError, match=f"Try .*{remedy}"):
        placed(large, gigabytes, **options)
    config, sizes = large
    runtime = {name: value for name, value in change.items() if hasattr(config.runtime, name)}
    changed = options | {name: value for name, value in change.items() if name not in runtime}
    assert placed((config.with_runtime(**runtime), sizes), gigabytes, **changed)


@pytest.mark.parametrize(
    ("gigabytes", "options", "remedies"),
    [
        (1.5, {}, {"K/V", "streaming", "block", "budget"}),
        (12, {"streaming": False}, {"K/V", "block", "budget"}),
        (6, {"streaming": True, "cache": "device"}, {"streaming", "block", "budget", "a window of 1"}),
        (80, {"budget": GB}, {"K/V", "streaming", "block"}),
        (3, {"token_block": 64}, {"K/V", "streaming", "block", "budget"}),
    ],
)
def test_what_would_not_help_is_not_proposed(gigabytes, options, remedies, large):
    with pytest.raises(MagiError) as error:
        placed(large, gigabytes, **options)
    tried = str(error.value).split("Try ")[1]
    assert not [remedy for remedy in remedies if remedy in tried]


def test_a_smaller_window_is_the_last_resort(large):
    config, sizes = large
    windows = smaller_windows(config.runtime.num_steps, config.runtime.window_size)
    assert windows == [2, 1]
    seen = []
    for gigabytes in (2, 3, 3.2, 3.4, 3.6, 5):
        alone = {}
        for window in (4, 2, 1):
            with suppress(MagiError):
                alone[window] = placed((config.with_runtime(window_size=window), sizes), gigabytes)
        seen.append(max(alone, default=0))
        if alone:
            assert placed(large, gigabytes, windows) == alone[seen[-1]]
            assert alone[seen[-1]].window == seen[-1]
        else:
            with pytest.raises(MagiError):
                placed(large, gigabytes, windows)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2, 4}


# -- beside a VAE ----------------------------------------------------------------------------------------------------


def test_another_models_turn_between_iterations_counts(large):
    config, _ = large
    alone = place(*large, 24 * GB)
    assert place(*large, 24 * GB, other_model_bytes=GB) == alone, "it has the room of what works in between"
    ring = alone.layers * kv_bytes(config)
    beside = place(*large, 24 * GB, other_model_bytes=5 * GB)
    assert beside.working_bytes == 5 * GB + ring
    kept = place(*large, 24 * GB, MemoryOptions(cache="host"), other_model_bytes=5 * GB)
    assert kept.working_bytes == 5 * GB, "the keys are elsewhere"
    with pytest.raises(MagiError, match=r"about 6\.\d GB"):
        place(*large, 5 * GB, other_model_bytes=5 * GB)


# -- on the host -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["device", "host"])
@pytest.mark.parametrize("gigabytes", [2, 5, 7, 12, 14])
def test_host_memory_is_used_up_to_what_the_rest_needs(gigabytes, cache, large):
    config, sizes = large
    p = placed(large, 8 if cache == "device" else 5, free_host=gigabytes * GB, cache=cache)
    keys = p.layers * kv_bytes(config) * (cache == "host")
    weights = sum(sizes.packed[layer] for layer in p.on_host)
    assert p.host_bytes == weights + keys
    assert p.on_host == () or p.host_bytes <= 0.75 * gigabytes * GB
    left = [layer for layer in fetched(p) if layer not in p.on_host]
    assert not left or p.host_bytes + max(sizes.packed) > 0.75 * gigabytes * GB, "another layer has room"
    even = spread(len(fetched(p)), len(p.on_host))
    assert p.on_host == tuple(fetched(p)[i] for i in even), "those from the file are not in a row"


def test_more_host_memory_never_slows_down(large):
    made = [placed(large, 8, free_host=n and n * GB) for n in (None, 0, 2, 4, 8, 16, 32)]
    assert made[0] == made[1], "what is not known is left alone"
    assert made[0].on_host == ()
    assert made[-1].on_host == tuple(fetched(made[-1]))
    assert all(b.slowdown <= a.slowdown for a, b in pairwise(made))
    assert made[-1].slowdown < made[0].slowdown


def test_float8_storage_is_made_once_and_waits(large):
    config, _ = large
    sizes = weight_sizes(RandomTensors(config.model).tensors, config.model, precision="fp8", kernels=Kernels())
    for free, free_host in ((5 * GB, None), (5 * GB, GB), (None, None)):
        p = place(config, sizes, free, MemoryOptions(streaming=True), free_host=free_host)
        assert p.on_host == tuple(range(34))
    kept = place(config, sizes, 80 * GB)
    assert kept.working_bytes == working_bytes(config, numerics=sizes.numerics)
    assert kept.working_bytes > working_bytes(config), "what is dequantized is counted"


# -- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 34, 48])
def test_layers_that_stay_are_spread_evenly(layers):
    assert spread(layers, 0) == ()
    for count in range(1, layers + 1):
        staying = spread(layers, count)
        assert len(set(staying)) == count
        assert set(staying) <= set(range(layers))
        for kept in (staying, staying[1::2]):  # and if every other one has to leave
            gaps = [b - a for a, b in pairwise(kept)]
            assert not gaps or max(gaps) - min(gaps) <= 1


# -- for people ------------------------------------------------------------------------------------------------------


def test_described_for_people(large):
    def total(p):
        return f"about {p.device_bytes / 1e9:.1f} GB in all"

    resident = placed(large, 80)
    start = f"all weights on the device ({resident.weight_bytes / 1e9:.1f} GB), K/V cache on the device, 4096 tokens at a time"
    assert resident.describe() == f"{start}, {total(resident)}"
    tight = placed(large, 4, token_block=512)
    layers = f"{34 - len(tight.on_device)} of 34 layers stream from memory"
    assert tight.describe().startswith(f"{layers}, K/V cache on the host, 512 tokens at a time, ")
    slower = f"{round(100 * (tight.slowdown - 1))}% slower than with everything on the device"
    assert tight.describe().endswith(f"{total(tight)}, {slower}")
    assert "stream from memory and file" in placed(large, 5, free_host=8 * GB).describe()
    assert "stream from the file" in placed(large, 5, free_host=None).describe()
    assert math.isclose(placed(large, 8, machine=Machine()).slowdown, 1, abs_tol=0.005)
    assert "slower" not in placed(large, 8, machine=Machine()).describe(), "too little to be worth a word"
