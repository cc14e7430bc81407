"""The nodes: a thin layer between ComfyUI and the pipeline in `magi/`."""
