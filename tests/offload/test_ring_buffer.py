import random
import threading
import time

import pytest
import torch

from magi.offload.ring_buffer import RingBuffer, Upload
from tests.support.lazy_engine import LazyCopyEngine

UNIT = 256


def upload(number: int, sizes: tuple[int, ...]) -> Upload:
    return Upload(tuple(torch.full((size,), number, dtype=torch.uint8) for size in sizes))


def random_sizes(seed: int, count: int) -> list[tuple[int, ...]]:
    """Returns random sizes of the parts of `count` uploads."""
    dice = random.Random(seed)
    return [tuple(dice.randrange(1, 2 * UNIT) for _ in range(dice.randrange(1, 4))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_slot_of_any_size_is_intact_until_it_is_released(slots, seed):
    copy_engine = LazyCopyEngine(seed)
    ring = RingBuffer(copy_engine, (6 + seed % 5) * UNIT, slots)
    found, sizes = [], random_sizes(seed, 30)
    for part in (sizes[:12], sizes[12:]):
        made = [upload(number, parts) for number, parts in enumerate(part)]
        uploads = ring.start_uploads(lambda threads, made=made: iter(made))
        for number, parts in enumerate(part):
            data = next(uploads)[: sum(parts)]
            for _ in range(3):
                copy_engine.compute(lambda data=data, number=number: found.append(bool((data == number).all())))
            uploads.release()
        with pytest.raises(StopIteration):
            next(uploads)
        uploads.close()
    copy_engine.synchronize()
    assert found == [True] * 90


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_more_uploads_than_slots_however_small_they_are(slots):
    copy_engine = LazyCopyEngine()
    uploads = RingBuffer(copy_engine, 100 * UNIT, slots).start_uploads(
        lambda threads: (upload(n, (10,)) for n in range(8))
    )
    for turn in range(8):
        next(uploads)
        coming, end = min(8, turn + slots), time.monotonic() + 5
        while len(copy_engine.uploads) < coming:
            assert time.monotonic() < end, "no upload within 5 s"
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(copy_engine.uploads) == coming
        uploads.release()
    uploads.close()


@pytest.mark.parametrize("left_at", [0, 1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_uploads_may_be_closed_early(left_at, seed):
    copy_engine, found = LazyCopyEngine(seed), []
    ring = RingBuffer(copy_engine, 4 * UNIT, 3)
    for number in range(6):
        uploads = ring.start_uploads(lambda threads, number=number: (upload(number, (UNIT, 3)) for _ in range(4)))
        for _ in range(left_at):
            data = next(uploads)
            copy_engine.compute(lambda data=data, number=number: found.append(bool((data[: UNIT + 3] == number).all())))
            if number % 2:
                uploads.release()
            else:
                break
        uploads.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("magi-")]
    copy_engine.synchronize()
    assert all(found)
    assert len(found) == 3 * left_at + 3 * min(left_at, 1)


def test_an_upload_that_blocks_does_not_block_the_compute_work():
    """A copy from pageable memory blocks the thread that submits it."""
    resume = threading.Event()

    class Pageable(LazyCopyEngine):
        def upload(self, *arguments):
            assert not self.uploads or resume.wait(5), "the first slot was not returned within 5 s"
            return super().upload(*arguments)

    uploads = RingBuffer(Pageable(), 3 * UNIT, 3).start_uploads(lambda threads: (upload(n, (UNIT,)) for n in range(4)))
    next(uploads)
    uploads.release()
    resume.set()
    assert sum(1 for _ in uploads) == 3
    uploads.close()


def test_uploads_wait_for_work_submitted_before_the_allocation():
    copy_engine, order = LazyCopyEngine(), []
    copy_engine.compute(lambda: order.append("earlier work"))
    ring = RingBuffer(copy_engine, UNIT, 1)
    uploads = ring.start_uploads(lambda threads: iter([upload(1, (UNIT,))]))
    data = next(uploads)
    copy_engine.compute(lambda: order.append(int(data[0])))
    copy_engine.synchronize()
    assert order == ["earlier work", 1]
    uploads.close()
