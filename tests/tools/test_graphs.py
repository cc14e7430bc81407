"""A step as a CUDA graph is the step."""

import pytest
import torch

from tools.train_embedded import components, train
from tools.train_embedded.batches import Stream, examples, loader
from tools.train_embedded.graphs import Graphs, _Flat
from tools.train_embedded.windows import WindowDrawer


@pytest.fixture
def batches(monkeypatch):
    """A stream of batches of few videos."""
    monkeypatch.setattr(components, "SCENES", 10)
    monkeypatch.setattr("tools.train_embedded.videos.FIRST", 8)
    drawer = WindowDrawer(train.BASE, windows=(1, 2))
    return Stream(components.Components.of_world(), [(drawer, examples)], {1: 1.0, 2: 1.0}, 6, 24, (0, 1), 0)


def gradients(model, batch, device):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
        loss = model.loss(batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_flat_it_is_the_same(batches):
    torch.manual_seed(0)
    model = train.Trained(train.BASE)
    batch = next(iter(batches))
    wanted, expected = gradients(model, batch, "cpu")

    method = model.core

    def flat(embeds, step):
        tensors = []
        step.each(lambda t: tensors.append(t) or t)
        return _Flat(model, method, step)(embeds, *tensors)

    model.core = flat
    loss, found = gradients(model, batch, "cpu")
    assert loss == wanted
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.gpu
def test_a_graph_gives_the_same_gradients(batches):
    torch.manual_seed(0)
    model = train.Trained(train.BASE).cuda()
    method = model.core
    for batch, _ in zip(loader(batches, 0, "cuda"), range(6), strict=False):
        model.core = method
        wanted, expected = gradients(model, batch, "cuda")
        model.core = graphs = Graphs(model, method)
        for _ in range(2):
            loss, found = gradients(model, batch, "cuda")
            assert loss == pytest.approx(wanted, rel=1e-3)
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], atol=2e-3, rtol=5e-2)
        assert len(graphs._graphs) == 1
