"""Stands in for ComfyUI's package of the same name."""
