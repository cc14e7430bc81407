import random
import threading
import time

import pytest
import torch

from magi.offload.ring_buffer import Feed, Load
from tests.support.lazy_engine import LazyBus

UNIT = 256


def load(number: int, sizes: tuple[int, ...]) -> Load:
    return Load(tuple(torch.full((size,), number, dtype=torch.uint8) for size in sizes))


def drawn(seed: int, count: int) -> list[tuple[int, ...]]:
    """Sizes of the parts of so many loads."""
    dice = random.Random(seed)
    return [tuple(dice.randrange(1, 2 * UNIT) for _ in range(dice.randrange(1, 4))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_loads_of_any_size_arrive_whole_and_stay_while_they_are_used(slots, seed):
    bus = LazyBus(seed)
    feed = Feed(bus, (6 + seed % 5) * UNIT, slots)
    found, sizes = [], drawn(seed, 30)
    for part in (sizes[:12], sizes[12:]):
        made = [load(number, parts) for number, parts in enumerate(part)]
        arriving = feed.send(lambda session, made=made: iter(made))
        for number, parts in enumerate(part):
            data = next(arriving)[: sum(parts)]
            for _ in range(3):
                bus.compute(lambda data=data, number=number: found.append(bool((data == number).all())))
            arriving.release()
        with pytest.raises(StopIteration):
            next(arriving)
        arriving.close()
    bus.drain()
    assert found == [True] * 90


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_more_loads_than_slots_however_small_they_are(slots):
    bus = LazyBus()
    arriving = Feed(bus, 100 * UNIT, slots).send(lambda session: (load(n, (10,)) for n in range(8)))
    for turn in range(8):
        next(arriving)
        coming, end = min(8, turn + slots), time.monotonic() + 5
        while len(bus.uploads) < coming:
            assert time.monotonic() < end, "they do not come"
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(bus.uploads) == coming
        arriving.release()
    arriving.close()


@pytest.mark.parametrize("left_at", [0, 1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_what_is_on_its_way_may_be_given_up(left_at, seed):
    bus, found = LazyBus(seed), []
    feed = Feed(bus, 4 * UNIT, 3)
    for number in range(6):
        arriving = feed.send(lambda session, number=number: (load(number, (UNIT, 3)) for _ in range(4)))
        for _ in range(left_at):
            data = next(arriving)
            bus.compute(lambda data=data, number=number: found.append(bool((data[: UNIT + 3] == number).all())))
            if number % 2:
                arriving.release()
            else:
                break
        arriving.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("magi-")]
    bus.drain()
    assert all(found)
    assert len(found) == 3 * left_at + 3 * min(left_at, 1)


def test_memory_that_was_anothers_is_not_written_to_before_that_is_done():
    bus, order = LazyBus(), []
    bus.compute(lambda: order.append("the other's work"))
    feed = Feed(bus, UNIT, 1)
    arriving = feed.send(lambda session: iter([load(1, (UNIT,))]))
    data = next(arriving)
    bus.compute(lambda: order.append(int(data[0])))
    bus.drain()
    assert order == ["the other's work", 1]
    arriving.close()
