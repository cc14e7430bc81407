"""Released files: identifying, finding, loading and downloading them."""
