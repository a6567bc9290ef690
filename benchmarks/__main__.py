"""`python -m benchmarks NAME`: measure what the package costs; `python -m benchmarks NAME --help` says more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from benchmarks import full_size, serving
from erasure.cli.main import main as program

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "full-size": (full_size.FullSize, full_size.run),
    "serving": (serving.Serving, serving.run),
}
FORWARDED = {"training": ("bench", "training")}
"""Benchmarks that the command line has, by the words that call them there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark.

    Args:
        argv: Its name and options; those of the process when left out.

    Returns:
        The exit code: 0, 1 where a part of it failed, 2 for bad usage.
    """
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in FORWARDED:
        return program([*FORWARDED[name], *rest[:-1]])
    if name not in COMMANDS:
        print(f"usage: python -m benchmarks {{{','.join((*COMMANDS, *FORWARDED))}}} [options]", file=sys.stderr)
        return 2
    options, measure = COMMANDS[name]
    return measure(tyro.cli(options, prog=f"python -m benchmarks {name}", args=rest[:-1]))


if __name__ == "__main__":
    sys.exit(main())
