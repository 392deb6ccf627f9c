"""Losses: pure functions and frozen dataclasses that are functions."""
