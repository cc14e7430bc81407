import gc
import threading
import time
import weakref

import pytest

from magi.offload.prefetch import ClosedError, IterationThreads, Prefetcher


@pytest.fixture
def threads():
    made = IterationThreads()
    yield made
    made.close()
    assert not running()


def running():
    return [t for t in threading.enumerate() if t.name == "test-prefetch"]


def test_items_are_prefetched_in_order(threads):
    made = []

    def work():
        for n in range(5):
            made.append(n)
            yield n

    items = Prefetcher(work(), threads, "test-prefetch")
    end = time.monotonic() + 5
    while len(made) < 5:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert list(items) == [0, 1, 2, 3, 4]
    assert list(items) == [], "an exhausted prefetcher stays exhausted"


def test_an_error_is_raised_after_the_items_before_it(threads):
    def work():
        yield 1
        raise OSError("the disk")

    items = Prefetcher(work(), threads, "test-prefetch")
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk"):
        next(items)
    assert list(items) == []


def test_close_wakes_a_waiting_thread(threads):
    def work():
        yield threads.wait_for(lambda: None, poll=100)

    items = Prefetcher(work(), threads, "test-prefetch")
    time.sleep(0.01)
    began = time.monotonic()
    threads.close()
    assert time.monotonic() - began < 1
    assert not running()
    with pytest.raises(ClosedError):
        next(items)


def test_close_wakes_the_consumer(threads):
    """Closes from another thread, as when a new iteration starts."""
    items = Prefetcher(iter(lambda: threads.wait_for(lambda: None), 0), threads, "test-prefetch")
    threading.Timer(0.05, threads.close).start()
    with pytest.raises(ClosedError):
        next(items)


def test_a_notification_wakes_waiting_threads_at_once(threads):
    ready = []

    def work():
        yield threads.wait_for(lambda: ready or None, poll=100)

    items = Prefetcher(work(), threads, "test-prefetch")
    time.sleep(0.01)
    with threads.lock_and_notify():
        ready.append(1)
    assert next(items) == [1]


def test_a_background_thread_may_close_its_iteration(threads):
    """The garbage collector may close an iteration in any thread, also while another thread waits for the lock."""

    def other():
        while True:
            yield threads.wait_for(lambda: None, poll=0.001)

    def work():
        with threads.lock_and_notify():
            threads.close()
        yield 1

    items = Prefetcher(other(), threads, "test-prefetch")
    Prefetcher(work(), threads, "test-prefetch")
    with pytest.raises(ClosedError):
        next(items)


def test_a_handled_error_keeps_no_reference_to_the_frame(threads):
    class Large:
        pass

    large = Large()
    reference = weakref.ref(large)

    def work():
        raise OSError
        yield

    def use(large):
        items = Prefetcher(work(), threads, "test-prefetch")
        next(items)

    gc.disable()
    try:
        with pytest.raises(OSError):  # noqa: PT011
            use(large)
        del large
        threads.close()
        assert reference() is None
    finally:
        gc.enable()
