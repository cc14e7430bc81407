"""All nodes by id; whoever starts the stand-in fills it."""

NODE_CLASS_MAPPINGS = {}
