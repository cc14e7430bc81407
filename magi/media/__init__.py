"""Pixels and sound from and to files."""
