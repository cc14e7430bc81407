"""ComfyUI since 0.16: its models give way on demand ("dynamic VRAM"), and page-locked memory has an account and limits."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from tests.support.magi_graphs import random_model, text_to_video

GB = 1 << 30
CARD = torch.device("cuda", 0)


class Driver:
    """A CUDA driver that page-locks whatever it is asked to, and knows what is locked."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address, nbytes, flags):
        assert address not in self.locked
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        del self.locked[address]
        return 0


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return made


@pytest.fixture
def card(comfy, monkeypatch):
    """A card of 24 GB and ComfyUI's memory manager on it, as far as a CPU can play them; `card.used` is what is taken."""
    if not hasattr(importlib.import_module("comfy.model_patcher").ModelPatcher, "is_dynamic"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    memory = importlib.import_module("comfy.memory_management")
    made = SimpleNamespace(used={}, memory=memory)
    if hasattr(comfy.management, "VRAMState"):  # it was started for a CPU
        monkeypatch.setattr(comfy.management, "vram_state", comfy.management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.module("nodes.comfyui.host"), "device", lambda: CARD)
    free = lambda dev=None, torch_free_too=False: (  # noqa: E731
        (24 * GB - sum(made.used.values()), 0) if torch_free_too else 24 * GB - sum(made.used.values())
    )
    monkeypatch.setattr(comfy.management, "get_free_memory", free)
    monkeypatch.setattr(comfy.management, "soft_empty_cache", lambda *a, **k: None)
    yield made
    comfy.management.current_loaded_models.clear()


@pytest.fixture
def ours(comfy, card):
    """ours(name, bytes): a patcher of a model of the pack's that takes so much."""
    memory = comfy.module("nodes.comfyui.memory")

    class Model(memory.LoadableModel):
        def __init__(self, name, size):
            super().__init__()
            self.name, self.size, self.rooms = name, size, []

        nbytes = property(lambda self: self.size)

        def fits(self, room):
            return True

        def read(self, room):
            self.rooms.append(room)
            card.used[self.name] = self.size
            return self.name

        def drop(self):
            super().drop()
            card.used.pop(self.name, None)

    return lambda name, size: memory.WholeModelPatcher(Model(name, size), CARD)


@pytest.fixture
def native(comfy, card):
    """native(name, bytes, pinned bytes): the patcher of a model of ComfyUI's own that gives way on demand."""
    base = importlib.import_module("comfy.model_patcher").ModelPatcher

    class Dynamic(base):
        def __init__(self, name, size, pinned=0):
            super().__init__(torch.nn.Module(), CARD, torch.device("cpu"), size)
            self.name, self.pinned, self.detached = name, pinned, 0
            self.model.dynamic_pins = {CARD: {"active": False, "current_prompt": False}}

        def is_dynamic(self):
            return True

        def loaded_size(self):
            return card.used.get(self.name, 0)

        def loaded_ram_size(self):
            return self.pinned

        pinned_memory_size = loaded_ram_size

        def partially_unload_ram(self, ram_to_unload, subsets=()):
            freed, self.pinned = self.pinned, 0
            return freed

        unregister_inactive_pins = partially_unload_ram

        def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
            card.used[self.name] = self.model_size()

        def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
            return card.used.pop(self.name, 0)

        def detach(self, unpatch_all=True):
            self.detached += unpatch_all
            card.used.pop(self.name, None)
            return self.model

        def __del__(self):
            pass

    return Dynamic


def test_loading_ours_unloads_no_model_that_gives_way_by_itself(comfy, ours, native, card):
    flux = native("flux", 20 * GB, pinned=12 * GB)
    comfy.management.load_models_gpu([flux])
    magi = ours("magi", 9 * GB)
    assert comfy.module("nodes.comfyui.memory").load(magi, working=2 * GB) == ["magi"]
    assert card.used == {"flux": 20 * GB, "magi": 9 * GB}, "the card gives flux's pages to magi as torch asks for them"
    assert flux.detached == 0
    assert flux.pinned == 12 * GB, "its page-locked weights stay for its next turn"
    assert magi.model.rooms == [float("inf")], "what is free now says nothing where others give way"


def test_ours_is_evicted_for_a_native_model_that_needs_the_room(comfy, ours, native, card):
    magi, flux = ours("magi", 18 * GB), native("flux", 12 * GB)
    comfy.module("nodes.comfyui.memory").load(magi)
    assert not magi.is_dynamic(), "it does not give way by itself"
    comfy.management.load_models_gpu([flux])
    assert card.used == {"flux": 12 * GB}
    assert magi.model.loaded is None


def test_a_native_model_that_fits_beside_ours_leaves_it_alone(comfy, ours, native, card):
    magi, vae = ours("magi", 9 * GB), native("vae", 1 * GB)
    comfy.module("nodes.comfyui.memory").load(magi)
    comfy.management.load_models_gpu([vae])
    assert card.used == {"magi": 9 * GB, "vae": 1 * GB}


def test_our_models_make_room_for_each_other(comfy, ours, card):
    load = comfy.module("nodes.comfyui.memory").load
    magi, vae = ours("magi", 20 * GB), ours("vae", 1 * GB)
    load(magi)
    load(vae, working=8 * GB)
    assert card.used == {"vae": 1 * GB}
    assert load(magi, vae) == ["magi", "vae"]
    assert not magi.is_dynamic()
    assert not vae.is_dynamic()


def test_a_load_that_fails_leaves_no_model_that_claims_to_give_way(comfy, ours, card, monkeypatch):
    magi = ours("magi", 9 * GB)

    def broken(room):
        raise RuntimeError("The disk is gone.")

    monkeypatch.setattr(magi.model, "read", broken)
    with pytest.raises(RuntimeError, match="disk"):
        comfy.module("nodes.comfyui.memory").load(magi)
    assert not magi.is_dynamic()
    assert card.used == {}


def test_without_dynamic_vram_ours_takes_what_comfyui_gives(comfy, ours, card, monkeypatch):
    monkeypatch.setattr(card.memory, "aimdo_enabled", False)
    card.used["others"] = 10 * GB
    magi = ours("magi", 9 * GB)
    comfy.module("nodes.comfyui.memory").load(magi, working=2 * GB)
    assert len(magi.model.rooms) == 1
    assert 9 * GB < magi.model.rooms[0] <= 14 * GB


def test_room_for_a_text_encoder_is_made_without_unloading_what_gives_way(comfy, ours, native, card):
    flux, magi = native("flux", 8 * GB), ours("magi", 12 * GB)
    comfy.management.load_models_gpu([flux])
    comfy.module("nodes.comfyui.memory").load(magi)
    comfy.module("nodes.comfyui.host").make_room(15 * GB)
    assert card.used == {"flux": 8 * GB}


# -- page-locked memory ------------------------------------------------------------------------------------------------


@pytest.fixture
def pinned(comfy, driver, monkeypatch):
    """The pack's module of page-locked memory, under a limit of 16 GB and with 32 GB of RAM free."""
    if not hasattr(comfy.management, "pin_memory"):
        pytest.skip("this ComfyUI has no account of page-locked memory")
    monkeypatch.setattr(comfy.management, "MAX_PINNED_MEMORY", 16 * GB)
    monkeypatch.setattr(comfy.management, "TOTAL_PINNED_MEMORY", 0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=32 * GB, total=64 * GB))
    monkeypatch.setattr(comfy.management, "current_loaded_models", [])
    module = comfy.module("nodes.comfyui.page_locked")
    monkeypatch.setattr(module, "memory_beside", lambda device: 32 * GB)
    return module


def test_page_locked_memory_is_counted_by_comfyui(comfy, driver, pinned):
    memory = comfy.module("magi.offload.pinned_memory").PinnedMemory(CARD, pinned.pin_for(CARD))
    data = memory.allocate(3000)
    assert comfy.management.TOTAL_PINNED_MEMORY == 3000
    assert driver.locked == {data.data_ptr(): 3000}
    memory.unpin_all()
    assert comfy.management.TOTAL_PINNED_MEMORY == 0
    assert driver.locked == {}
    data.fill_(1)  # still there


@pytest.mark.parametrize("limit", [2000, -1], ids=["used up", "switched off"])
def test_comfyuis_limit_is_kept(comfy, driver, pinned, monkeypatch, limit):
    monkeypatch.setattr(comfy.management, "MAX_PINNED_MEMORY", limit)
    offload = comfy.module("magi.offload.pinned_memory")
    memory = offload.PinnedMemory(CARD, pinned.pin_for(CARD))
    with pytest.raises(offload.PinningError, match="ComfyUI"):
        memory.allocate(3000)
    assert memory.allocate_or_pageable(3000).shape == (3000,), "slower, and all there"
    assert driver.locked == {}


def test_ram_that_comfyui_keeps_free_is_left_free(comfy, card, pinned, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=GB, total=64 * GB))
    offload = comfy.module("magi.offload.pinned_memory")
    with pytest.raises(offload.PinningError, match="ComfyUI"):
        offload.PinnedMemory(CARD, pinned.pin_for(CARD)).allocate(3000)


def test_memory_that_is_filled_already_is_page_locked_again_however_little_ram_is_left(
    comfy, card, driver, pinned, monkeypatch
):
    memory = comfy.module("magi.offload.pinned_memory").PinnedMemory(CARD, pinned.pin_for(CARD))
    data = memory.allocate(3000)
    memory.unpin_all()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=GB, total=64 * GB))
    memory.pin_all([data])
    assert memory.nbytes == 3000
    monkeypatch.setattr(comfy.management, "MAX_PINNED_MEMORY", 0)
    memory.unpin_all()
    with pytest.warns(UserWarning, match="stays pageable"):
        memory.pin_all([data])


def test_idle_native_models_give_their_page_locked_memory_up(comfy, card, pinned, native, monkeypatch):
    flux = native("flux", 4 * GB, pinned=16 * GB)
    comfy.management.load_models_gpu([flux])
    monkeypatch.setattr(comfy.management, "TOTAL_PINNED_MEMORY", 16 * GB)
    offload = comfy.module("magi.offload.pinned_memory")
    offload.PinnedMemory(CARD, pinned.pin_for(CARD)).allocate(3000)
    assert flux.pinned == 0


def test_plans_count_on_what_comfyui_will_page_lock(comfy, card, pinned, native, monkeypatch):
    assert pinned.host_room(CARD) == 16 * GB, "its limit"
    monkeypatch.setattr(comfy.management, "TOTAL_PINNED_MEMORY", 6 * GB)
    assert pinned.host_room(CARD) == 10 * GB
    comfy.management.load_models_gpu([flux := native("flux", 4 * GB, pinned=5 * GB)])
    assert pinned.host_room(CARD) == 15 * GB, "an idle model gives way"
    monkeypatch.setattr(card.memory, "RAM_CACHE_HEADROOM", 50 * GB)
    assert pinned.host_room(CARD) == (32 + 5 - 25) * GB, "and so does its RAM, beside the headroom"
    monkeypatch.setattr(comfy.management, "MAX_PINNED_MEMORY", -1)
    assert pinned.host_room(CARD) == 0, "it was switched off"
    assert flux.detached == 0


def test_an_older_account_has_a_limit_only(comfy, pinned, monkeypatch):
    if hasattr(comfy.management, "ensure_pin_budget"):
        pytest.skip("this ComfyUI's account is the newer one")
    assert pinned.host_room(CARD) == 16 * GB
    monkeypatch.setattr(comfy.management, "MAX_PINNED_MEMORY", 64 * GB)
    assert pinned.host_room(CARD) == 32 * GB


def test_a_comfyui_without_an_account_leaves_page_locking_to_us(comfy):
    if hasattr(comfy.management, "pin_memory"):
        pytest.skip("this ComfyUI has an account")
    assert comfy.module("nodes.comfyui.page_locked").pin_for(CARD) is None


def test_layers_are_page_locked_only_while_a_sampler_runs(comfy, monkeypatch):
    """Nobody may wait for memory that an idle model holds."""
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["model"] = random_model(comfy, "deep", num_layers=4)
    calls = []
    blocks = comfy.module("magi.offload.streamed_blocks").StreamedBlocks
    for name in ("pin", "unpin"):
        monkeypatch.setattr(blocks, name, lambda self, name=name: calls.append(name))
    forward = comfy.module("magi.transformer.model").Transformer.forward
    monkeypatch.setattr(
        comfy.module("magi.transformer.model").Transformer,
        "forward",
        lambda *args, **options: calls.append("forward") or forward(*args, **options),
    )
    comfy.run(graph)
    assert calls[0] == "pin"
    first = calls.index("unpin")
    assert set(calls[1:first]) == {"forward"}
    assert set(calls[first:]) == {"unpin"}


def test_what_comfyui_asks_a_patcher(comfy):
    """Of any version: memory in RAM and page-locked, and clones with whatever arguments."""
    made = comfy.run(text_to_video(comfy))
    patcher = made["model"][0].patcher
    assert patcher.loaded_size() == patcher.model_size() > 0
    assert (patcher.loaded_ram_size(), patcher.pinned_memory_size()) == (0, 0), "on a CPU nothing waits elsewhere"
    assert patcher.partially_unload_ram(1e30, subsets=["weights"]) == 0
    assert patcher.clone(disable_dynamic=True, model_override=None, force_deepcopy=False) is patcher
    assert patcher.clone_has_same_weights(patcher, allow_multigpu=False)
    assert not patcher.is_dynamic()
