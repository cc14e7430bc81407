"""Muon (K. Jordan et al., 2024), which steps along the nearest orthogonal matrix to a matrix' momentum.

It gives what `torch.optim.Muon` gives (tests/tools/test_muon.py) but takes all matrices of equal shape at once. One after the other
they took as long as the rest of a step on a GPU, which waits for every small product to be asked for.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

_STEPS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315  # of the Newton-Schulz iteration
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Takes a step for all matrices that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), same in by_shape.items():
                grads = [p.grad for p in same]
                moments = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in same]
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                updates = orthogonal(torch.stack(torch._foreach_lerp(grads, moments, group["momentum"])))
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_add_(same, list(updates.to(same[0].dtype).unbind()), alpha=-rate)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Returns the orthogonal matrices nearest to some, (N, R, C), by a few steps of Newton and Schulz: singular values about 1."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)  # what is faster
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(_EPSILON)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
