"""What commands share in talking to people and programs: parsing, tables, JSON, progress, one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, get_origin, get_type_hints

from erasure.errors import ErasureError
from erasure.progress import Lines, is_watched
from erasure.shown import LABEL, did_you_mean, message, number, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

Options = TypeVar("Options")

BOX = re.compile(r"[\u2500-\u257f]|\x1b\[[0-9;]*m|-{4,}")
"""Box drawing and colours in the parser's messages."""

WIDE = 200
"""Columns of tables that go to a file or a pipe."""

NARROW = 24
"""Characters in which a column of texts can still be read."""

LARGEST = 100_000
"""Characters of a table."""
MOST = 2000, 60
"""Rows and columns of a table."""

PACKAGE = Path(__file__).resolve().parents[1]
"""Where this package is."""

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
WORLDS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where `accelerate launch` and its launchers say which process this is, and of how many."""


class UsageError(ErasureError, ValueError):
    """The command line cannot be carried out as given."""


class OutputError(ErasureError, OSError):
    """The standard output of a command cannot be written to."""


class Remarks:
    """The standard error stream of a command, which goes on with its work where nobody can read that any more."""

    def __init__(self, stream: TextIO | None) -> None:
        """Take a stream; `None` is one that was closed before the program began (`2>&-`)."""
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, or drop it where it cannot be written."""
        with self._or_drop():
            if self.stream is not None:
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Have everything written, or drop what cannot be."""
        with self._or_drop():
            if self.stream is not None:
                self.stream.flush()

    def isatty(self) -> bool:
        """Whether people read it."""
        return self.stream is not None and self.stream.isatty()

    @contextlib.contextmanager
    def _or_drop(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if self.stream is not None:
                drop(self.stream)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self.stream, name)


def drop(stream: TextIO | None) -> None:
    """Let what is still written to a stream go nowhere: Python would fail once more when it flushes it at exit."""
    if stream is None:
        return
    with contextlib.suppress(OSError):  # a stream in memory has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """A block that writes to the standard output.

    Raises:
        BrokenPipeError: Whoever read it has gone.
        OutputError: It cannot be written for another reason, such as a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        drop(sys.stdout)
        raise
    except OSError as reason:
        drop(sys.stdout)
        raise OutputError(
            f"cannot write to the standard output ({reason.strerror or reason}): write it to another place, or make "
            "room; files that were written are whole"
        ) from reason


def process() -> tuple[int, int]:
    """Index of this process and how many there are, under `accelerate launch`; `(0, 1)` otherwise.

    Raises:
        UsageError: The environment says something else than numbers.
    """
    return _number_of(RANKS, 0), _number_of(WORLDS, 1)


def _number_of(names: Sequence[str], default: int) -> int:
    name = next((name for name in names if name in os.environ), None)
    if name is None:
        return default
    try:
        return int(os.environ[name])
    except ValueError:
        raise UsageError(
            f"the environment variable {name} is {os.environ[name]!r:.80}, expected a whole number: unset it, or "
            "start with accelerate launch"
        ) from None


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return process()[0] == 0


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


def json_text(data: object) -> str:
    """Data as JSON on lines of its own, without control characters."""
    return json.dumps(data, indent=2, default=str).replace("\x7f", "\\u007f") + "\n"


class Terminal:
    """Results go to stdout, remarks and progress to stderr; all but the main process are silent.

    Every text goes out through here, cut and with its control characters visible (`erasure.shown`).
    """

    def __init__(self) -> None:
        self.speaks = is_main_process()
        self.json_only = False
        for stream in (sys.stdout, sys.stderr.stream if isinstance(sys.stderr, Remarks) else sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # What the terminal's encoding lacks is escaped as well.
                stream.reconfigure(errors="backslashreplace")

    def result(self, data: object) -> None:
        """Print data as JSON, whole: programs read it."""
        self.whole(json_text(data))

    def whole(self, text: str) -> None:
        """Print a text that programs read, whole; whoever made it has made its control characters visible."""
        if self.speaks:
            with printing():
                print(text, end="")

    def say(self, *lines: str) -> None:
        """Lines for people: on stdout, or on stderr when stdout is for JSON."""
        if self.speaks:
            with printing():
                for line in lines:
                    print(visible(line), file=sys.stderr if self.json_only else sys.stdout, flush=True)

    def flush(self) -> None:
        """Have everything written that was printed.

        Raises:
            BrokenPipeError: Whoever read it has gone.
            OutputError: It cannot be written for another reason.
        """
        if sys.stdout is not None:
            with printing():
                sys.stdout.flush()

    def complain(self, kind: str, text: object, remark: str = "") -> None:
        """A line on stderr about what went wrong.

        Args:
            kind: `error` or `warning`.
            text: The message, an exception or a warning for instance.
            remark: What is said behind it, however long it is.
        """
        print(f"erasure: {kind}: {message(text)}{remark}", file=sys.stderr, flush=True)

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int = 0,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """A warning of this package as one line on stderr, in place of `warnings.showwarning`; others are left out."""
        ours = category.__module__.startswith("erasure.") or Path(filename).is_relative_to(PACKAGE)
        if self.speaks and ours:
            self.complain("warning", message)

    @property
    def width(self) -> int:
        """Characters of a line of a table."""
        return self._console().width

    def _console(self) -> Console:
        from rich.console import Console

        console = Console(stderr=self.json_only)
        # A file or a pipe has no width, unless the user says one.
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = WIDE
        return console

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """Print a table; columns after the first that hold only numbers are set to the right.

        Where it is too wide for the terminal, each row is printed as a block, with a line for every column. Of a very
        large table the beginning is printed, and how much there is.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        if not self.speaks:
            return
        # Never strings: rich would look for markup in them.
        heads, *cells = [[visible(cell) for cell in row[: MOST[1]]] for row in (columns, *rows[: MOST[0]])]
        sizes = itertools.accumulate(sum(map(len, row)) for row in cells)
        cells = [row for row, size in zip(cells, sizes, strict=True) if size <= LARGEST]
        console = self._console()
        parts: list[RenderableType] = [Text(visible(title))] if title else []
        if _readable_width([heads, *cells]) > console.width:
            for first, *others in cells:
                block = Table.grid(padding=(0, 2))
                block.add_column()
                block.add_column(overflow="fold")
                for head, cell in zip(heads[1:], others, strict=True):
                    block.add_row(Text(f"  {head}"), Text(cell))
                parts += [Text(first), block, Text()]
        else:
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for index, head in enumerate(heads):
                numeric = index > 0 and all(re.match(r"^[-+]?[\d.]|^-?$", row[index]) for row in cells)
                table.add_column(Text(head), justify="right" if numeric else "left", overflow="fold")
            for row in cells:
                table.add_row(*map(Text, row))
            parts.append(table)
        with printing():
            for part in parts:
                console.print(part)
        if len(cells) < len(rows) or len(heads) < len(columns):
            shown = f"{len(cells)} of {len(rows)} rows and {len(heads)} of {len(columns)} columns"
            self.say(f"… {shown} are shown; --json gives all.")

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        """A progress bar of `total` steps on stderr; where that is no terminal, a line now and then."""
        if not is_watched():
            yield Progress(Lines("", total, shown=self.speaks))
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(), console=Console(stderr=True), disable=not self.speaks, transient=False,
        )  # fmt: skip
        with bar:
            yield Progress(Moving(bar, bar.add_task("", total=total)))


def _readable_width(rows: Sequence[Sequence[str]]) -> int:
    """Characters of a line that a table needs so that no word is broken and few texts are."""
    longest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [max(len(word) for cell in column for word in cell.split(" ")) for column in zip(*rows, strict=True)]
    return sum(max(word, min(text, NARROW)) + 3 for word, text in zip(words, longest, strict=True))


class Moving:
    """The task of a bar in a terminal, handled like `Lines`."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        self.bar, self.task = bar, task

    @property
    def label(self) -> str:
        """Description of the work's present stage, in front of the bar."""
        return self.bar.tasks[0].description

    @label.setter
    def label(self, text: str) -> None:
        self.bar.update(self.task, description=visible(text, LABEL))

    def update(self, n: float = 1) -> None:
        """Go on by so many steps."""
        self.bar.advance(self.task, n)


class Progress:
    """Handle of a running progress bar."""

    def __init__(self, bar: Moving | Lines) -> None:
        self.bar = bar

    def stage(self, text: str) -> None:
        """Say what is being done now."""
        self.bar.label = text

    def advance(self, steps: float = 1) -> None:
        """Go on by so many steps."""
        self.bar.update(steps)

    @contextlib.contextmanager
    def part(self) -> Iterator[Callable[[float], None]]:
        """One step that reports the share of it that is done."""
        reached = 0.0

        def report(share: float) -> None:
            nonlocal reached
            self.advance(share - reached)
            reached = share

        yield report
        report(1.0)


def check_output_folder(folder: Path, *, overwrite: bool = False, may_hold: bool = False) -> Path:
    """Make sure before any work is done that results can be written, and leave everything as it is.

    A command that is refused later, such as for a model that there is not, has made no folder then: whatever writes
    the first file makes it. Of several processes the main one looks for all.

    Args:
        folder: Where they go.
        overwrite: The user asked to replace what is there.
        may_hold: Files there are no obstacle, for commands that go on where they stopped.

    Returns:
        The folder, which need not be there.

    Raises:
        UsageError: It is a file, is not empty, or cannot be written.
    """
    if not is_main_process():
        return folder
    # Unlike those of `Path`, these give no error for names that cannot be.
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UsageError(f"--out {folder} is a file: name a folder")
    if os.path.isdir(folder) and not (overwrite or may_hold) and _holds_something(folder):
        raise UsageError(f"--out {folder} is not empty: name another folder, or add --overwrite")
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        # Whether it can be made is known when it has been.
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise UsageError(
            f"--out {folder} cannot be made ({error.strerror}): name a folder that you may write"
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
    if not writable:
        raise UsageError(f"--out {folder} cannot be written: name a folder that you may write")
    return folder


def _holds_something(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError as error:
        raise UsageError(
            f"--out {folder} cannot be read ({error.strerror}): name a folder that you may read"
        ) from error


def format_metric(row: Mapping[str, object] | None) -> str:
    """`0.970 [0.932, 0.991]`; what was not or could not be measured is `-`."""
    if row is None or row.get("value") is None:
        return "-"
    value, low, high = (number(row.get(key), ".3f") for key in ("value", "low", "high"))
    return value if row.get("low") is None or row.get("high") is None else f"{value} [{low}, {high}]"
