"""Dynamic VRAM and the RAM that ComfyUI keeps free."""

import psutil

aimdo_enabled = False  # whether models' weights give way when torch allocates memory
RAM_CACHE_HEADROOM = 0  # bytes


def available_ram():
    return psutil.virtual_memory().available
