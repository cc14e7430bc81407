"""Runs kept on disk, to be gone on with."""
