"""Which device to compute on, how much memory it has free, and what to do when it runs out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import MagiError

T = TypeVar("T")

_DEVICES = "cuda, cuda:1, xpu, mps or cpu"

# In messages of backends that raise a plain RuntimeError: Metal; the CPU on Windows; the CPU elsewhere
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """Returns the named device, or the best there is: CUDA (NVIDIA, AMD), XPU, MPS, CPU.

    Raises:
        MagiError: the named device is not there.
    """
    if device is None:
        return torch.device(next((kind for kind in ("cuda", "xpu", "mps") if _is_available(kind)), "cpu"))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise MagiError(f"There is no device {str(device)[:100]!r}. Use {_DEVICES}.") from error
    if chosen.type in ("cuda", "xpu", "mps") and not _is_available(chosen.type):
        raise MagiError(
            f"The device {str(device)!r} is not available to torch {torch.__version__}. Use cpu, or install the torch build "
            "for your graphics card."
        )
    if chosen.index is not None and chosen.type in ("cuda", "xpu"):
        count = getattr(torch, chosen.type).device_count()
        if chosen.index >= count:
            raise MagiError(f"There is no device {str(device)!r}: torch sees {count} of its kind, numbered from 0.")
    return chosen


def compute_device(device: torch.device | str | None = None) -> torch.device:
    """Returns the named device, or the best there is, where tensors can be computed on it.

    Raises:
        MagiError: the device is not there, or holds no numbers ("meta").
    """
    chosen = pick_device(device)
    try:
        torch.empty(1, device=chosen).item()
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise MagiError(
            f"torch {torch.__version__} cannot compute on the device {str(device)!r}. Use {_DEVICES}."
        ) from error
    return chosen


def free_memory(device: torch.device) -> int | None:
    """Returns the free bytes of an accelerator's memory; None on a CPU."""
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).mem_get_info(device)[0])
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def empty_cache(device: torch.device) -> None:
    """Gives memory that torch has cached but does not use back to the device."""
    if device.type in ("cuda", "xpu"):
        # torch takes no device here. It empties all of them today; with this one current it is among them in any case.
        with getattr(torch, device.type).device(device):
            getattr(torch, device.type).empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all work in its queue."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    elif device.type == "mps":  # there is only one, and torch takes none
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception means that a device or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def retry_with_less(work: Callable[[], T], shrink: Callable[[BaseException], None]) -> T:
    """Returns what `work` returns; whenever memory runs out, `shrink` has it take less and it runs again.

    Args:
        work: may be run any number of times.
        shrink: called with the out-of-memory error. It raises MagiError where nothing is left to give up; where it runs
            out of memory itself, it is called again.
    """
    failed: BaseException | None = None
    while True:
        try:
            if failed is not None:  # outside the handler, whose traceback would keep the tensors of the attempt alive
                shrink(failed)
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = error.with_traceback(None)


def _is_available(kind: str) -> bool:
    backend = getattr(torch.backends, "mps", None) if kind == "mps" else getattr(torch, kind, None)
    return backend is not None and bool(backend.is_available())
