"""Numbers that are none, NaN and infinity: told from a result before they become black pictures."""

import torch

from ..errors import MagiError


def is_finite(x: torch.Tensor) -> bool:
    """Returns whether all numbers of a tensor are finite, and so small that float32 holds their sum.

    The sum is the cheapest test: one pass that allocates nothing. It waits for the tensor's device.
    """
    if x.is_meta:  # a trial run that counts memory
        return True
    if x.dtype.itemsize == 1 and x.is_floating_point():  # torch cannot add float8
        x = x.float()
    return bool(x.sum(dtype=torch.float32).isfinite())


def check_finite(x: torch.Tensor, what: str, remedy: str) -> None:
    """Raises MagiError where a number of a tensor is NaN or infinite; `what` names the tensor within a sentence."""
    if not is_finite(x):
        raise MagiError(f"There are numbers that are none (NaN or infinity) in {what}. {remedy}")
