"""Puts a run together, and opens one again: the library behind the commands."""
