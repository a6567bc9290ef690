"""Arguments of commands, parsed into dataclasses: one-line errors, lists whose flags may be repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar, get_origin, get_type_hints

from erasure.cli.streams import printing
from erasure.errors import ErasureError
from erasure.shown import did_you_mean

Options = TypeVar("Options")

BOX = re.compile(r"[\u2500-\u257f]|\x1b\[[0-9;]*m|-{4,}")
"""Box drawing and colours in the parser's messages."""


class UsageError(ErasureError, ValueError):
    """The command line cannot be carried out as given."""


def parse(
    options: type[Options],
    command: str,
    argv: Sequence[str],
    default: Options | None = None,
    *,
    negatable: bool = False,
    program: str = "erasure",
) -> Options:
    """Parse the arguments of a command into a dataclass.

    Lists take several values after one flag and the flag several times: `--concept a b --concept c` gives three.

    Args:
        options: The dataclass, or one whose fields are dataclasses; their options are all on one level.
        command: What the user called, without the program.
        argv: What came after it.
        default: Where options start from that are not given; the defaults of the dataclass when left out.
        negatable: Whether each boolean has a `--no-` form too.
        program: How the program is called.

    Raises:
        UsageError: The arguments do not fit; the message is one line.
    """
    import tyro

    lists = {
        "--" + field.replace("_", "-")
        for part in _parts(options)
        for field, kind in get_type_hints(part).items()
        if get_origin(kind) in (tuple, list)
    }
    given = merge_repeated(argv, lists)
    called = f"{program} {command}"
    _check_flags(given, options, called, ("", "no-") if negatable else ("",))
    plain = bool(os.environ.get("NO_COLOR")) or sys.stdout is None
    said, shown = io.StringIO(), io.StringIO() if plain else sys.stdout
    try:
        # The parser knows nothing of NO_COLOR, and leaves colours out where it does not write to a terminal.
        with printing(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            return tyro.cli(
                options,
                prog=called,
                args=given,
                config=(tyro.conf.OmitArgPrefixes, *(() if negatable else (tyro.conf.FlagCreatePairsOff,))),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as end:
        if not end.code:
            if isinstance(shown, io.StringIO):
                with printing():
                    print(shown.getvalue(), end="")
            raise
        text = " ".join(BOX.sub(" ", said.getvalue()).split())
        text = re.sub(r"\s*For full helptext.*$|^Value error Error parsing \w+: ", "", text)
        raise UsageError(f"{text}; see: {called} --help") from None


def _check_flags(argv: Sequence[str], options: type, called: str, prefixes: Sequence[str]) -> None:
    """Raise `UsageError` for a flag that a command does not have; the message names the nearest."""
    fields = {field.replace("_", "-") for part in _parts(options) for field in get_type_hints(part)}
    known = {f"--{prefix}{field}" for field in fields for prefix in prefixes} | {"--help"}
    for token in argv:
        flag = token.partition("=")[0].replace("_", "-")
        if token.startswith("--") and flag not in known:
            hint = did_you_mean(flag, sorted(known))
            raise UsageError(f"unknown option {flag}.{hint} See: {called} --help")


def _parts(options: type) -> Iterator[type]:
    yield options
    for kind in get_type_hints(options).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield kind


def merge_repeated(argv: Sequence[str], flags: set[str]) -> list[str]:
    """Gather the values of each of `flags` behind its first use."""
    current: list[str] = []
    groups: list[list[str]] = [current]
    by_flag: dict[str, list[str]] = {}
    for token in argv:
        flag, equals, value = token.partition("=")
        flag = flag.replace("_", "-")
        if flag in flags:
            if flag not in by_flag:
                groups.append(by_flag.setdefault(flag, [flag]))
            current = by_flag[flag]
            current += [value] if equals else []
        elif token.startswith("--"):
            current = [token]
            groups.append(current)
        else:
            current.append(token)
    return [token for group in groups for token in group]
