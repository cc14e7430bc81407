"""From prompts to embeddings."""
