"""Entry point: picks the command, and turns every failure into one line and an exit code."""

from __future__ import annotations

import contextlib
import keyword
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from types import TracebackType
from typing import TextIO, cast

from erasure.cli.arguments import UsageError
from erasure.cli.streams import OutputError, Remarks, drop
from erasure.cli.terminal import Terminal
from erasure.errors import ErasureError
from erasure.shown import did_you_mean, message, visible

COMMANDS: dict[str, str] = {
    "demo": "erase a cat and a style from the embedded model, measure before and after",
    "strategies": "list the methods: what each needs of a model, protects and costs",
    "erase": "make an erasure of a concept with one of the methods",
    "learn": "learn concepts from pictures, to draw them or to erase them",
    "generate": "draw images, with or without erasures",
    "remove": "remove objects from images",
    "eval": "measure a model without and with its erasures",
    "attack": "search for prompts, noise or pictures that bring an erased concept back",
    "stress": "change the erased model, and measure which changes bring the concept back",
    "audit": "run evaluations, attacks and stress tests, and grade the erasure by attacker",
    "report": "write all measurements of one erasure on one page",
    "sweep": "make and measure many erasures from one file, and print a table of means",
    "compare": "show the results of several measurements side by side",
    "detect": "run a detector on pictures, and measure how reliable it is",
    "info": "show what an erasure contains, or how a picture was made",
    "export": "write an erasure as a LoRA or checkpoint for other programs",
    "import": "read an erasure that others published in another format",
    "push": "upload an erasure to the Hugging Face Hub, with a card of its measurements",
    "pull": "download an erasure from the Hugging Face Hub",
    "serve": "serve a model with locked erasures over HTTP",
    "studio": "open a page in the browser to erase, compare and remove objects",
    "log": "check the audit log of a locked pipeline",
    "bench": "measure the time and memory that erasures cost on this machine",
    "sae": "train or inspect a sparse autoencoder of a text encoder",
}
"""Commands by name with what they do; `erasure/cli/NAME.py` holds each, or `NAME_.py` for a word of Python."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process when left out.

    Returns:
        The exit code: 0, 1 for an unexpected failure or where nobody can read what is printed, 2 for bad usage or an
        `ErasureError`, 130 after Ctrl-C.
    """
    return carry_out(list(sys.argv[1:] if argv is None else argv), _dispatch)


def carry_out(arguments: list[str], dispatch: Callable[[list[str], Terminal], int]) -> int:
    """Run a command with its failures turned into one line and an exit code.

    Args:
        arguments: What the user called, without the program's name.
        dispatch: Carries out the command of these arguments and returns its exit code.

    Returns:
        The exit code, as of `main`.
    """
    # Python prints to the standard output what is for an error stream that is closed.
    with contextlib.redirect_stderr(cast(TextIO, Remarks(sys.stderr))):
        return _carry_out(arguments, dispatch)


def _carry_out(arguments: list[str], dispatch: Callable[[list[str], Terminal], int]) -> int:
    debug = "--debug" in arguments
    arguments = [_at_home(argument) for argument in arguments if argument != "--debug"]
    try:
        terminal = Terminal()
    except UsageError as error:  # of which process this is
        print(f"erasure: error: {message(error)}", file=sys.stderr)
        return 2
    if not debug:
        for library in ("TRANSFORMERS", "DIFFUSERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                warnings.showwarning = terminal.warn
            # Flushed here, where a fault has a message: Python's own flush at exit has none.
            try:
                code = dispatch(arguments, terminal)
            except SystemExit:  # a help was printed
                terminal.flush()
                raise
            terminal.flush()
            return code
    except (ErasureError, KeyboardInterrupt, BrokenPipeError, Exception) as error:
        if debug:
            sys.excepthook = _show_traceback
            raise
        return _report(error, terminal)


def _at_home(argument: str) -> str:
    """Give an argument with the home folder for `~`, which shells leave as it is in `--out=~/made` and in quotes."""
    flag, equals, value = argument.partition("=")
    if argument.startswith("--") and equals and value.startswith("~/"):
        return f"{flag}={os.path.expanduser(value)}"
    return os.path.expanduser(argument) if argument.startswith("~/") else argument


def _dispatch(arguments: list[str], terminal: Terminal) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        terminal.whole(f"{_help()}\n")
        return 0
    if arguments[0] in ("-V", "--version"):
        from erasure import __version__

        terminal.whole(f"erasure {__version__}\n")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        raise UsageError(f"unknown command {name!r}; there are: {', '.join(COMMANDS)}.{hint} See: erasure --help")
    module = f"{name}_" if keyword.iskeyword(name) else name
    return int(import_module(f"erasure.cli.{module}").run(rest, terminal) or 0)


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: erasure COMMAND [options]",
            "",
            "Erases concepts from diffusers pipelines, and measures what is left of them.",
            "",
            "commands:",
            *rows,
            "",
            "options:",
            "  --help     this text; after a command, its options",
            "  --version  version of the package",
            "  --debug    show the traceback of a failure",
            "",
            "Start with: erasure demo --out demo",
        ]
    )


def _report(error: BaseException, terminal: Terminal) -> int:
    if isinstance(error, KeyboardInterrupt):
        if terminal.speaks:
            print("erasure: interrupted; nothing half-written is left, run the same command to go on", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe (`| head`) has gone: not a failure.
        drop(sys.stdout)
        return 1
    if isinstance(error, ErasureError):
        if terminal.speaks:
            terminal.complain("error", error)
        return 1 if isinstance(error, OutputError) else 2
    text = f"{type(error).__name__}: {error}"
    terminal.complain("error", text, " (unexpected; --debug shows where it happened)")
    return 1


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of Python's own, which prints messages as they are."""
    for block in traceback.format_exception(kind, error, trace):
        for line in block.splitlines():
            print(visible(line), file=sys.stderr)
