"""Measure what the package costs: commands for a source checkout, which are no part of the installed package."""

PROGRAM = "python -m benchmarks"
"""Words of a shell that call the benchmarks, ahead of the name of one."""
