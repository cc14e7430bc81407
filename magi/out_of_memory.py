"""Telling that memory ran out: not every backend of every torch raises the error made for it."""

import torch

_SAID = ("out of memory", "not enough memory", "can't allocate memory")  # Metal; the CPU on Windows; elsewhere


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the host had too little memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
