"""Sweeps: many runs that are planned, run and judged together (`slmjax sweep`)."""
