"""Everything that adapts ComfyUI, or the pipeline to it."""
