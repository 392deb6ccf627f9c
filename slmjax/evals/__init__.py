"""Evaluation (perplexity, accuracy), generation and text embeddings."""
