import pytest
import torch

from magi import device
from magi.device import fits, free_memory, pick_device
from magi.errors import MagiError


@pytest.fixture
def have(monkeypatch):
    """(*kinds) -> only these accelerators are there."""
    return lambda *kinds: monkeypatch.setattr(device, "_is_available", lambda kind: kind in kinds)


@pytest.mark.parametrize(
    ("there", "picked"), [(("cuda", "xpu", "mps"), "cuda"), (("xpu", "mps"), "xpu"), (("mps",), "mps"), ((), "cpu")]
)
def test_the_best_there_is(there, picked, have):
    have(*there)
    assert pick_device() == torch.device(picked)


def test_a_named_device(have, monkeypatch):
    have("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(MagiError, match="no device 'cuda:2': torch sees 2"):
        pick_device("cuda:2")


def test_devices_that_are_not_there(have):
    have()
    for name in ("cuda", "cuda:1", "mps", "xpu"):
        with pytest.raises(MagiError, match=f"'{name}' is not available.*Use cpu"):
            pick_device(name)
    with pytest.raises(MagiError, match=r"no device 'gpu'\. Use cuda"):
        pick_device("gpu")


def test_the_hosts_own_memory_takes_everything():
    assert free_memory(torch.device("cpu")) is None
    assert fits(10**15, torch.device("cpu"))


def test_an_accelerators_memory_keeps_room_for_more_than_weights(monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda where: 1000)
    assert fits(600, torch.device("cuda"))
    assert not fits(900, torch.device("cuda"))
