"""The example workflows and subgraph blueprints, from a description of each: `python -m tools.workflows` writes them."""
