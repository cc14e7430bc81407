"""SIGTERM ends ComfyUI only when the sampler has saved its run."""

import asyncio
import importlib
import os
import signal
import threading

import pytest
import torch

from tests.support.graph import Interrupted
from tests.support.magi_graphs import text_to_video

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")


@pytest.fixture
def ended():
    """What the process did before at a SIGTERM: here it only notes that its end has come."""
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(threading.current_thread()))
    yield calls
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def served(comfy, monkeypatch):
    """served(work): runs it as ComfyUI does, in a thread beside the event loop of the main thread."""
    server = importlib.import_module("server").PromptServer.instance

    async def main(work):
        monkeypatch.setattr(server, "loop", asyncio.get_running_loop(), raising=False)
        return await asyncio.to_thread(work)

    return lambda work: asyncio.run(main(work))


def test_a_run_is_saved_before_the_process_ends(comfy, served, ended, monkeypatch):
    graph = text_to_video(comfy, seconds=3.0)
    whole = text_to_video(comfy, seconds=3.0, resume=False)
    sampler = comfy.module("magi.sampling.sampler").Sampler
    iterate, made, sent = sampler._iterate, [], []

    def stepping(self, it):
        if it.index == 7 and not sent:
            sent.append(ended.copy())
            os.kill(os.getpid(), signal.SIGTERM)
            while signal.getsignal(signal.SIGTERM).__name__ == "_cancel":  # until the main thread has seen it
                pass
        made.append(it.index)
        return iterate(self, it)

    def work():
        with pytest.raises(Interrupted):
            comfy.run(graph)
        return len(ended), comfy.events.texts[-1]

    monkeypatch.setattr(sampler, "_iterate", stepping)
    calls, (node, text) = served(work)
    assert sent == [[]], "not ended before that"
    assert calls == 1
    assert ended == [threading.main_thread()], "and by then the run was saved"
    assert (node, "continues there" in text) == ("sampler", True)
    made.clear()
    again = served(lambda: comfy.run(graph))["sampler"][0]["samples"]
    assert made[0] == 7
    assert torch.equal(again, served(lambda: comfy.run(whole))["sampler"][0]["samples"])
    assert len(ended) == 1


def test_without_a_sampler_at_work_a_sigterm_is_none_of_ours(comfy, served, ended):
    before = signal.getsignal(signal.SIGTERM)
    served(lambda: comfy.run(text_to_video(comfy)))
    assert signal.getsignal(signal.SIGTERM) is before


def test_where_no_loop_runs_in_the_main_thread_nothing_changes(comfy, ended, monkeypatch):
    monkeypatch.setattr(importlib.import_module("server").PromptServer.instance, "loop", None, raising=False)
    made = []
    thread = threading.Thread(target=lambda: made.append(comfy.run(text_to_video(comfy))))
    thread.start()
    thread.join()
    assert len(made) == 1


def test_a_loop_that_does_not_answer_holds_nothing_up(comfy, ended, served, monkeypatch):
    module = comfy.module("nodes.comfyui.termination")
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    before, late = signal.getsignal(signal.SIGTERM), []

    async def busy():
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(importlib.import_module("server").PromptServer.instance, "loop", loop, raising=False)
        work = loop.run_in_executor(None, lambda: late.append(module._in_main_thread(lambda: late.append("installed"))))
        while len(late) < 1:  # the loop is stuck, with its thread in here
            pass
        await work

    asyncio.run(busy())
    assert late == [False], "given up, and not done later either"
    assert signal.getsignal(signal.SIGTERM) is before
