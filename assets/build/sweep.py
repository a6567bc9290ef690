"""Run the sweeps of this folder, which the figures of docs come from, and write their tables as docs have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from erasure.eval.rows import Row
from erasure.eval.sweeps.means import table_of
from erasure.eval.sweeps.plan import Cell, Method, SweepPlan
from erasure.eval.sweeps.runner import ERASURE, CellOutcome, sweep

RATES = ("UA", "IRA", "CRA", "AA")
"""Columns of the tables."""


def plan(name: str, size: str | None = None) -> SweepPlan:
    """A sweep of this folder.

    Args:
        name: Of its file, without the ending.
        size: In the place of the file's.
    """
    return SweepPlan.read(Path(__file__).with_name(f"{name}.toml"), size=size)


def measure(chosen: SweepPlan, out: Path, share: tuple[int, int]) -> None:
    """Make and measure what is left of a sweep, and print what became of each cell.

    Raises:
        SystemExit: A cell failed.
    """
    failed = [one for one in sweep(chosen, out=out, share=share, tell=_tell) if one.state == "failed"]
    if failed:
        raise SystemExit(f"{len(failed)} cells failed; the first: {failed[0].cell}: {'; '.join(failed[0].reasons)}")


def _tell(outcome: CellOutcome, ended: int, count: int) -> None:
    print(f"[{ended}/{count}] {outcome.cell}: {outcome.state}", *outcome.reasons, sep="\n  ", flush=True)


def erasure_of(made: Path, strategy: str, concept: str) -> Path:
    """Folder of the erasure that the step `table` makes with a strategy as it comes.

    Args:
        made: Folder of the step.
        strategy: Its name.
        concept: What is erased.
    """
    return made / Cell("canvas-sd", Method(strategy, strategy), concept, 0).folder / ERASURE


def markdown(chosen: SweepPlan, out: Path, about: Callable[[Row], str], head: str) -> str:
    """Means over concepts as they stand in `docs/numbers.md`, a row for each method and group or model.

    Args:
        chosen: The sweep.
        out: Where its results are.
        about: What the second column says of a row.
        head: Title of the second column.
    """
    lines = [f"| method | {head} | " + " | ".join(RATES) + " | seconds | kB |", "|---" * (4 + len(RATES)) + "|"]
    rows = [row for row in table_of(chosen, out).rows if row["variant"] == "after"]
    order = {method.label: number for number, method in enumerate(chosen.methods)}
    for row in sorted(rows, key=lambda each: order[each["name"]]):
        if row["missing"] and not row["cells"]:
            reason = next(iter(row["missing"].values()))
            lines.append(f"| `{row['name']}` | {about(row)} | {reason}{' |' * (len(RATES) + 2)}")
            continue
        cells = [row["cells"][rate] for rate in RATES]
        rates = " | ".join(f"{cell['value']:.3f} ({cell['low']:.2f}-{cell['high']:.2f})" for cell in cells)
        size = row["size_bytes"] / 1000
        lines.append(f"| `{row['name']}` | {about(row)} | {rates} | {row['seconds']:.1f} | {size:.0f} |")
    return "\n".join(lines)
