"""A run on disk, to be resumed."""
