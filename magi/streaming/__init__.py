"""Layers and keys on their way to the device, ahead of their use."""
