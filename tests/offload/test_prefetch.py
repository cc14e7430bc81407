import gc
import threading
import time
import weakref

import pytest

from magi.offload.prefetch import Ahead, ClosedError, Session


@pytest.fixture
def session():
    made = Session()
    yield made
    made.close()
    assert not threads()


def threads():
    return [t for t in threading.enumerate() if t.name == "test-ahead"]


def test_items_are_made_ahead_in_order(session):
    made = []

    def work():
        for n in range(5):
            made.append(n)
            yield n

    items = Ahead(work(), session, "test-ahead")
    end = time.monotonic() + 5
    while len(made) < 5:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert list(items) == [0, 1, 2, 3, 4]
    assert list(items) == [], "and it stays so"


def test_an_error_comes_out_after_what_came_before_it(session):
    def work():
        yield 1
        raise OSError("the disk")

    items = Ahead(work(), session, "test-ahead")
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk"):
        next(items)
    assert list(items) == []


def test_work_that_waits_is_woken_by_closing(session):
    def work():
        yield session.wait(lambda: None, poll=100)

    items = Ahead(work(), session, "test-ahead")
    time.sleep(0.01)
    began = time.monotonic()
    session.close()
    assert time.monotonic() - began < 1
    assert not threads()
    with pytest.raises(ClosedError):
        next(items)


def test_one_who_waits_for_an_item_is_woken_by_closing(session):
    """From another thread, as when a new iteration begins."""
    items = Ahead(iter(lambda: session.wait(lambda: None), 0), session, "test-ahead")
    threading.Timer(0.05, session.close).start()
    with pytest.raises(ClosedError):
        next(items)


def test_changes_are_noticed_at_once(session):
    ready = []

    def work():
        yield session.wait(lambda: ready or None, poll=100)

    items = Ahead(work(), session, "test-ahead")
    time.sleep(0.01)
    with session.changing():
        ready.append(1)
    assert next(items) == [1]


def test_closing_may_come_from_the_work_itself(session):
    """The garbage collector runs in any thread, also while another part of the work needs the lock."""

    def other():
        while True:
            yield session.wait(lambda: None, poll=0.001)

    def work():
        with session.changing():
            session.close()
        yield 1

    items = Ahead(other(), session, "test-ahead")
    Ahead(work(), session, "test-ahead")
    with pytest.raises(ClosedError):
        next(items)


def test_nothing_is_held_by_an_error_that_was_handled(session):
    class Large:
        pass

    large = Large()
    alive = weakref.ref(large)

    def work():
        raise OSError
        yield

    def use(large):
        items = Ahead(work(), session, "test-ahead")
        next(items)

    gc.disable()
    try:
        with pytest.raises(OSError):  # noqa: PT011
            use(large)
        del large
        session.close()
        assert alive() is None
    finally:
        gc.enable()
