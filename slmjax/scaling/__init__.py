"""Scaling laws: fitted to a table of runs, with what the runs can and cannot tell. NumPy and SciPy alone."""
