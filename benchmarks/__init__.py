"""Measure what the package costs: commands for a source checkout, which are no part of the installed package."""

PROGRAM = "python -m benchmarks"
"""How they are called."""
