"""Pruning: masks while training, one matrix at a time after it, and parts of a model that are removed."""
