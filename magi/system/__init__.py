"""The machine: devices, free memory, threads, whole files. Nothing of MAGI-1."""
