"""Whether `torch.compile` can make kernels on this machine: it needs a compiler that is not part of torch."""

import torch

from ..errors import MagiError


def check_compile(device: torch.device) -> None:
    """Compiles one tiny function, which takes seconds, so that what is missing is found before a model is loaded.

    Raises:
        MagiError: no kernel could be made.
    """
    try:
        torch.compile(_probe, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # of several backends, each with its own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise MagiError(
            f"torch.compile makes no kernels for {device} here ({reason}). It needs a C++ compiler, and Triton for a "
            "graphics card. Install them, or run without compiling."
        ) from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
