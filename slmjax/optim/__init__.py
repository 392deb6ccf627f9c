"""Optimizer recipes and learning-rate schedules, from optax."""
