"""How the remote node ends before its time: cancelled in any phase, or with a graph that fails elsewhere; and what runs beside it."""

import asyncio
import inspect
import itertools
import threading
import time

import pytest

from magi.remote.fake_server import Answer
from tests.support.graph import Interrupted
from tests.support.magi_graphs import messages, remote
from tests.support.remote_service import wait_for

SOON = 2.0


@pytest.fixture
def server(node_server):
    return node_server


@pytest.mark.parametrize("phase", ["submitting", "at work", "downloading", "taking the frames"])
def test_cancel_in_every_phase(comfy, server, quick, phase):
    graph = remote(comfy, server)
    if phase == "submitting":
        server.script["submit"].append(lambda usual: Answer(content=usual.content, wait=1.5))
    elif phase == "downloading":
        server.script["download"].append(lambda usual: Answer(content=usual.content, headers=usual.headers, pause=0.5))
    elif phase == "at work":
        server.statuses = ("processing",) * 1000
    asked: list[float] = []

    def seen(kind: str, at: str) -> None:
        if kind == "text" and phase in messages(comfy)[-1] and not asked:
            asked.append(time.monotonic())
            if phase == "taking the frames":  # at once: under load it may be over before another thread has its turn
                comfy.management.interrupt_current_processing()
            else:
                threading.Timer(0.2, comfy.management.interrupt_current_processing).start()

    comfy.events.seen = seen
    with pytest.raises(Interrupted) as caught:
        comfy.run(graph)
    assert time.monotonic() - asked[0] - 0.2 < SOON
    assert caught.value.node == "remote"
    assert messages(comfy)[-1].startswith("Cancelled.")
    if phase in ("submitting", "at work"):
        wait_for(lambda: server.count("delete") == 1)
    else:
        comfy.events.seen = None
        assert comfy.run(graph)["remote"][1].shape[0] == 96, "what is paid for is fetched"
        assert server.count("delete") == 0


async def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


async def run_beside(comfy, server, beside) -> object:
    """The node's coroutine beside another one, as in ComfyUI's loop."""
    cls = comfy.nodes["Magi1Remote"]
    inputs = remote(comfy, server)["remote"]["inputs"]
    hidden = [h for h in cls.GET_SCHEMA().hidden if h.name == "unique_id"]
    data = dict.fromkeys(hidden, "remote")
    clone = cls.PREPARE_CLASS_CLONE(
        {"hidden_inputs": data} if "v3_data" in inspect.signature(cls.PREPARE_CLASS_CLONE).parameters else data
    )
    task = asyncio.ensure_future(clone.execute(**inputs))
    await beside(task)
    return await task


def test_other_nodes_run_meanwhile(comfy, server, quick):
    server.statuses = ("processing",) * 10
    ticks = []

    async def beside(task) -> None:
        while not task.done():
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    asyncio.run(run_beside(comfy, server, beside))
    assert len(ticks) > 30
    assert max(b - a for a, b in itertools.pairwise(ticks)) < 0.5, "the loop was never held up"


def test_a_graph_that_ends_for_another_reason_leaves_the_task(comfy, server, quick):
    server.statuses = ("processing",) * 1000

    async def beside(task) -> None:
        await until(lambda: server.count("poll"))
        raise RuntimeError("another node has failed")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="another node"):
        asyncio.run(run_beside(comfy, server, beside))
    wait_for(lambda: not [t for t in threading.enumerate() if t.name in ("magi-node", "magi-interrupt")])
    assert time.monotonic() - began < 10
    assert server.count("delete") == 0
    server.tasks[next(iter(server.tasks))].statuses.clear()
    assert comfy.run(remote(comfy, server))["remote"][1].shape[0] == 96


def test_a_cancel_that_another_node_is_told_of_first(comfy, server, quick):
    """ComfyUI then ends the graph, and the cancel is forgotten: the task is to be given up all the same."""
    server.statuses = ("processing",) * 1000
    busy, told = threading.Event(), threading.Event()

    def seen(kind: str, at: str) -> None:
        if kind == "text" and server.count("poll"):
            busy.set()
            told.wait(5)  # so that the node itself cannot ask in between

    comfy.events.seen = seen

    async def beside(task) -> None:
        await until(lambda: busy.is_set())
        comfy.management.interrupt_current_processing()
        await asyncio.sleep(0.05)  # a sampler's step
        try:
            comfy.management.throw_exception_if_processing_interrupted()
        finally:
            told.set()

    with pytest.raises(comfy.management.InterruptProcessingException):
        asyncio.run(run_beside(comfy, server, beside))
    wait_for(lambda: server.count("delete") == 1)


def test_a_cancel_reaches_the_node_beside_it(comfy, server, quick):
    """ComfyUI forgets a cancel once somebody has been told of it."""
    server.statuses = ("processing",) * 1000
    comfy.events.seen = lambda kind, at: kind == "text" and comfy.management.interrupt_current_processing()
    with pytest.raises(Interrupted):
        comfy.run(remote(comfy, server))
    assert comfy.management.processing_interrupted()
