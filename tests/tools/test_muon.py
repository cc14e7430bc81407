"""The batched Muon steps as torch's."""

import copy

import pytest
import torch
from torch import nn

from tools.train_embedded.muon import Muon, orthogonal


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_it_steps_as_torchs_does():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((16, 8), (8, 8), (16, 8), (4, 12), (8, 8))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    batched = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.01)
    plain = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.01)
    for step in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) if step != 2 else None  # nothing learned: nothing moves
            b.grad = None if a.grad is None else a.grad.clone()
        batched.step()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)  # products in bfloat16, which a batch rounds otherwise


@pytest.mark.parametrize("shape", [(3, 16, 8), (2, 8, 24)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_its_state_can_be_kept():
    torch.manual_seed(0)
    kept = [nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    first = Muon(kept, lr=0.1)
    for p in kept:
        p.grad = torch.randn_like(p)
    first.step()
    copies = [nn.Parameter(p.detach().clone()) for p in kept]
    second = Muon(copies, lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(kept, copies, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    first.step()
    second.step()
    for p, q in zip(kept, copies, strict=True):
        assert torch.equal(p, q)
