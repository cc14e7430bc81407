"""Released files: which they are, where they lie, loading and downloading them."""
