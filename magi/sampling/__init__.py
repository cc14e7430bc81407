"""The sampler: which chunk is denoised when, and under which guidance."""
