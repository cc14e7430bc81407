"""Tensors from and to files, of any model."""
