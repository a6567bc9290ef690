"""`erasure sweep`: methods by concepts by seeds from one file, made, measured, and put into a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from erasure.cli.arguments import UsageError, parse
from erasure.cli.compare import present, written
from erasure.cli.models import DeviceOptions, open_model
from erasure.cli.output import check_output_folder
from erasure.cli.terminal import Terminal

if TYPE_CHECKING:
    from erasure.eval.sweeps.plan import SweepPlan
    from erasure.eval.sweeps.runner import CellOutcome

PAGE, TITLE = "table.html", "Means over concepts and seeds"


@dataclass(kw_only=True)
class SweepOptions(DeviceOptions):
    """Make and measure every erasure that a file lists, and print a table of means.

    Run the same command again to resume an interrupted run.
    """

    file: tyro.conf.Positional[Path]
    """TOML file: models, concepts, methods, seeds, suites, attacks and stress tests."""
    out: Path
    """Folder to write results into: one folder for each erasure, with its measurements."""
    share: str = "1/1"
    """Part of the work for this machine: 1/4 to 4/4 for four machines. Afterwards, copy their folders into one, and
    print the table with --table-only."""
    dry_run: bool = False
    """List the cells of this share and their state, and make nothing."""
    table_only: bool = False
    """Make nothing, and print the table of the finished cells."""
    format: Literal["table", "csv", "latex", "json", "html"] = "table"
    """`table` for people; `csv` with a line for every number; `latex` for the package booktabs; `json`; `html`, which
    is written to table.html in the folder."""
    json: bool = False
    """Print JSON; the same as --format json."""


def run(argv: Sequence[str], terminal: Terminal) -> int:
    """Carry out the command.

    Returns:
        The exit code: 1 where something failed that nobody expected.
    """
    options = parse(SweepOptions, "sweep", argv)
    chosen = "json" if options.json else options.format
    terminal.json_only = chosen not in ("table", "html")
    if options.dry_run and options.table_only:
        raise UsageError("--dry-run lists cells and --table-only prints the table: give one of them")
    from erasure.eval.sweeps.plan import SweepPlan, read_share
    from erasure.eval.sweeps.runner import sweep

    plan, share = SweepPlan.read(options.file), read_share(options.share)
    if options.dry_run:
        _list(plan, share, options.out, terminal)
        return 0
    code = 0
    if not options.table_only:
        outcomes = sweep(
            plan, out=check_output_folder(options.out, may_hold=True), share=share,
            load=lambda model: open_model(options.of(model)), tell=partial(_tell, terminal), progress=terminal.speaks,
        )  # fmt: skip
        code = _ended(outcomes, terminal)
        if share[1] > 1:
            terminal.say(f"Share {options.share} is done. The table of all: --table-only, once their folders are one.")
            return code
    _table(plan, options.out, chosen, terminal)
    return code


def _list(plan: SweepPlan, share: tuple[int, int], out: Path, terminal: Terminal) -> None:
    """Print what there is to do."""
    from erasure.eval.sweeps.runner import outcomes_of

    outcomes = outcomes_of(plan, out, share)
    if terminal.json_only:
        terminal.result([outcome.to_dict() for outcome in outcomes])
        return
    columns = ("model", "method", "concept", "seed", "state", "folder")
    rows = [
        [o.cell.model, o.cell.method.label, o.cell.concept, str(o.cell.seed), o.state, o.cell.folder.as_posix()]
        for o in outcomes
    ]
    terminal.table(columns, rows)
    terminal.say(f"{len(outcomes)} cells, each measured by {', '.join(one.folder for one in plan.measures)}")


def _tell(terminal: Terminal, outcome: CellOutcome, ended: int, count: int) -> None:
    """Say what became of a cell; on stderr, where a table goes to stdout."""
    if terminal.speaks:
        terminal.say(f"[{ended}/{count}] {outcome.cell}: {outcome.state}", *outcome.reasons)


def _ended(outcomes: Sequence[CellOutcome], terminal: Terminal) -> int:
    counts = Counter(outcome.state for outcome in outcomes)
    terminal.say(", ".join(f"{count} {state}" for state, count in counts.items()))
    if counts["elsewhere"]:
        terminal.say("Other processes are at some cells: run the command again when they have ended.")
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        names = ", ".join(outcome.cell.folder.as_posix() for outcome in failed[:5])
        terminal.complain(
            "error", f"{len(failed)} cells failed ({names}); cell.json says why, and they are tried again"
        )
    return int(bool(failed))


def _table(plan: SweepPlan, out: Path, kind: str, terminal: Terminal) -> None:
    """Print or write the means."""
    from erasure.eval.sweeps.means import table_of
    from erasure.files import write_text

    if not (out / "cells").is_dir():
        raise UsageError(f"{out} holds no cells of a sweep: run it first, or give its folder")
    comparison = table_of(plan, out)
    present(comparison, kind, terminal, printed=kind != "html")
    if kind == "html" and terminal.speaks:
        write_text(out / PAGE, written(comparison, "html", TITLE), error=UsageError)
        terminal.say(f"Wrote {out / PAGE}")
