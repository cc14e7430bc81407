"""Which chunk is denoised, when, and under which guidance."""
