"""Which models are on the device, and who must go when another needs room."""

import sys
import threading
import weakref

import torch

OOM_EXCEPTION = torch.OutOfMemoryError
current_loaded_models = []
free_bytes = 16 << 30  # what the device says is free; tests set it
_interrupted = False
_mutex = threading.RLock()


class InterruptProcessingException(BaseException):
    """The user has cancelled. No `except Exception` catches it, as in ComfyUI since 0.20."""


def interrupt_current_processing(value=True):
    global _interrupted
    with _mutex:
        _interrupted = value


def processing_interrupted():
    with _mutex:
        return _interrupted


def throw_exception_if_processing_interrupted():
    """Raises once per cancel."""
    global _interrupted
    with _mutex:
        if _interrupted:
            _interrupted = False
            raise InterruptProcessingException


def get_torch_device():
    return torch.device("cpu")


def vae_device():
    return get_torch_device()


def get_free_memory(dev=None, torch_free_too=False):
    return (free_bytes, free_bytes) if torch_free_too else free_bytes


def extra_reserved_memory():
    return 400 << 20


def minimum_inference_memory():
    return 1 << 30


def soft_empty_cache(force=False):
    """There is none."""


def module_size(module):
    return sum(t.nbytes for t in module.state_dict().values())


class LoadedModel:
    """An entry of the list: knows its patcher only weakly, and drops out when the model itself is gone."""

    def __init__(self, patcher):
        self._patcher = weakref.ref(patcher)
        self.device = patcher.load_device
        self.currently_used = True
        self.real_model = self.model_finalizer = None

    @property
    def model(self):
        return self._patcher()

    def __eq__(self, other):
        return self.model is other.model

    __hash__ = None

    def is_dead(self):
        return self.real_model() is not None and self.model is None

    def load(self, extra_memory):
        self.model.model_patches_to(self.device)
        self.model.model_patches_to(self.model.model_dtype())
        self.model.partially_load(self.device, extra_memory, force_patch_weights=False)
        self.real_model = weakref.ref(self.model.model)
        self.model_finalizer = weakref.finalize(self.model.model, _forget_dead)

    def unload(self, needed):
        """Gives up `needed` bytes or, where a part cannot go or would not do, all; True if all."""
        part = needed < self.model.loaded_size()
        if part and self.model.partially_unload(self.model.offload_device, needed) >= needed:
            return False
        self.model.detach(True)
        self.model_finalizer.detach()
        self.real_model = self.model_finalizer = None
        return True


def _forget_dead():
    current_loaded_models[:] = [entry for entry in current_loaded_models if entry.real_model() is not None]


def free_memory(memory_required, device, keep_loaded=(), for_dynamic=False, pins_required=0):
    """Unloads until so much is free: what is least on the device first, then the least referenced, then the smallest.

    For a dynamic model no other one is unloaded, as it gives way by itself; for others, pins of dynamic ones go, too.
    """
    order = []
    for i in reversed(range(len(current_loaded_models))):
        entry = current_loaded_models[i]
        if entry.device == device and entry not in keep_loaded and not entry.is_dead():
            size = entry.model.model_size()
            order.append((entry.model.loaded_size() - size, sys.getrefcount(entry.model), size, i))
            entry.currently_used = False
    gone = []
    for *_, i in sorted(order):
        needed = memory_required - get_free_memory(device)
        if for_dynamic and current_loaded_models[i].model.is_dynamic():
            memory_required -= current_loaded_models[i].model.loaded_size()
            continue
        if needed > 0 and current_loaded_models[i].unload(needed):
            gone.append(i)
    if not for_dynamic and pins_required > 0:
        ensure_pin_budget(pins_required)
        ensure_pin_registerable(pins_required)
    return [current_loaded_models.pop(i) for i in sorted(gone, reverse=True)]


def load_models_gpu(
    models, memory_required=0, force_patch_weights=False, minimum_memory_required=None, force_full_load=False
):
    """Brings models to their devices, evicting others; one already there is told again how much room there is."""
    entries = []
    for patcher in {*models, *(other for m in models for other in m.model_patches_models())}:
        entry = LoadedModel(patcher)
        known = [e for e in current_loaded_models if e == entry]
        entries.append(known[0] if known else entry)
        entries[-1].currently_used = True
    for entry in entries:
        for other in [e for e in current_loaded_models if e.model is not None and entry.model.is_clone(e.model)]:
            current_loaded_models.remove(other)
            other.model.detach(unpatch_all=False)
            other.model_finalizer.detach()
    extra = max(minimum_inference_memory(), memory_required + extra_reserved_memory())
    dynamic = all(entry.model.is_dynamic() for entry in entries)
    for device in {entry.device for entry in entries}:
        missing = sum(
            e.model.model_size() - (e.model.loaded_size() if device == e.model.current_loaded_device() else 0)
            for e in entries
            if e.device == device
        )
        pins = sum(e.model.model_size() for e in entries if e.device == device and not e.model.is_dynamic())
        free_memory(missing * 1.1 + extra, device, for_dynamic=dynamic, pins_required=pins)
    for entry in entries:
        entry.load(1e32 if force_full_load else max(128 << 20, get_free_memory(entry.device) - extra))
        current_loaded_models.insert(0, entry)


def loaded_models(only_currently_used=False):
    return [e.model for e in current_loaded_models if e.currently_used or not only_currently_used]


def unload_all_models():
    free_memory(1e30, get_torch_device())


# -- page-locked memory ------------------------------------------------------------------------------------------------

MAX_PINNED_MEMORY = -1  # bytes; -1: none, as on a CPU. Tests set it
TOTAL_PINNED_MEMORY = 0
_pinned = {}  # address -> bytes


def ensure_pin_budget(size, evict_active=False, loaded=False):
    """Frees RAM that idle dynamic models have page-locked, until there is room for `size` more beside the headroom."""
    from comfy import memory_management

    missing = size + max(memory_management.RAM_CACHE_HEADROOM / 2, 2 << 30) - memory_management.available_ram()
    return missing <= 0 or _free_pins(missing) >= missing


def ensure_pin_registerable(size, evict_active=True):
    """Frees what dynamic models have page-locked, until there is room for `size` more within the limit."""
    missing = TOTAL_PINNED_MEMORY + size - MAX_PINNED_MEMORY
    return MAX_PINNED_MEMORY > 0 and (missing <= 0 or _free_pins(missing) >= missing)


def _free_pins(size):
    freed = 0
    for patcher in loaded_models():
        if freed < size and patcher is not None and patcher.is_dynamic():
            freed += patcher.partially_unload_ram(size - freed)
    return freed


def pin_memory(tensor):
    global TOTAL_PINNED_MEMORY
    if MAX_PINNED_MEMORY <= 0 or not tensor.is_contiguous():
        return False
    ensure_pin_registerable(tensor.nbytes)
    if torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 1) != 0:
        return False
    _pinned[tensor.data_ptr()] = tensor.nbytes
    TOTAL_PINNED_MEMORY += tensor.nbytes
    return True


def unpin_memory(tensor):
    global TOTAL_PINNED_MEMORY
    if torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()) != 0:
        return False
    TOTAL_PINNED_MEMORY -= _pinned.pop(tensor.data_ptr())
    return True
