"""`python -m benchmarks NAME`: measure what the package costs; `python -m benchmarks NAME --help` says more."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks import PROGRAM
from erasure.cli.arguments import UsageError
from erasure.cli.main import carry_out
from erasure.cli.terminal import Terminal

COMMANDS = {
    "attention": "redirected attention, shared trunks and early exits, against plain implementations",
    "full-size": "images, memory and updates of models of the size that people use",
    "serving": "many requests at once to a service on loopback, every picture judged",
    "itd": "feature edits, and the training of dictionaries",
    "eval-unlearn": "the same pictures, measured by the package eval-unlearn and by this one, side by side",
    "training": "trained strategies with trajectories kept, and with every state rolled out anew",
}
"""Benchmarks by name, with what they measure; `benchmarks/NAME.py` holds each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark.

    Args:
        argv: Its name and options; those of the process when left out.

    Returns:
        The exit code: 0, 1 where a part of it failed, 2 for bad usage.
    """
    return carry_out(list(sys.argv[1:] if argv is None else argv), _dispatch)


def _dispatch(arguments: list[str], terminal: Terminal) -> int:
    known = "\n".join(f"  {name:<14}{what}" for name, what in COMMANDS.items())
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} NAME [options]\n\n{known}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        raise UsageError(f"give the name of a benchmark: {', '.join(COMMANDS)}. See: {PROGRAM} --help")
    name, *rest = arguments
    found = import_module(f"benchmarks.{name.replace('-', '_')}").run(rest, terminal)
    return int(found or 0)


if __name__ == "__main__":
    sys.exit(main())
