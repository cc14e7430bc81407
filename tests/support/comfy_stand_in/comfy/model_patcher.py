"""What ComfyUI's memory management asks of a model."""

from . import model_management


class ModelPatcher:
    """A torch module that is on the device as a whole or not at all."""

    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        self.size, self.model = size, model
        self.load_device, self.offload_device = load_device, offload_device
        self.model_options = {"transformer_options": {}}
        self.parent = None
        if getattr(model, "device", None) is None:
            model.device = offload_device
        for name, value in (("model_loaded_weight_memory", 0), ("lowvram_patch_counter", 0), ("model_lowvram", False)):
            if not hasattr(model, name):
                setattr(model, name, value)
        self.model_size()

    def model_size(self):
        self.size = self.size or model_management.module_size(self.model)
        return self.size

    def loaded_size(self):
        return self.model.model_loaded_weight_memory

    def is_dynamic(self):
        return False

    def loaded_ram_size(self):
        return 0

    def pinned_memory_size(self):
        return 0

    def partially_unload_ram(self, ram_to_unload):
        return 0

    def lowvram_patch_counter(self):
        return self.model.lowvram_patch_counter

    def current_loaded_device(self):
        return self.model.device

    def clone(self):
        return type(self)(self.model, self.load_device, self.offload_device, self.size)

    def is_clone(self, other):
        return self.model is getattr(other, "model", None)

    def model_patches_to(self, device):
        """There are none."""

    def model_patches_models(self):
        return []

    def model_dtype(self):
        return self.model.get_dtype() if hasattr(self.model, "get_dtype") else None

    def _move(self, device, loaded):
        self.model.to(device)
        self.model.device, self.model.model_loaded_weight_memory = device, loaded

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        before = self.loaded_size()
        self._move(device_to, self.model_size())
        return self.loaded_size() - before

    def partially_unload(self, device_to, memory_to_free=0):
        return 0

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self._move(device_to, 0)

    def detach(self, unpatch_all=True):
        self.model_patches_to(self.offload_device)
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=unpatch_all)
        return self.model

    def cleanup(self):
        """After a run."""

    def __del__(self):
        self.detach(unpatch_all=False)
