"""`erasure report`: everything that was measured of one erasure on one page, and what was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from erasure.cli.arguments import UsageError, parse
from erasure.cli.audit import say_outcomes
from erasure.cli.models import DeviceOptions, open_model, read_erasure
from erasure.cli.terminal import Terminal

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(kw_only=True)
class ReportOptions(DeviceOptions):
    """Put evaluations, attacks, stress tests and audits of one erasure on one page, with what was not measured."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of `erasure eval`, `attack`, `stress` and `audit`, and of the cells of `erasure sweep`."""
    erasure: str
    """The erasure: its folder, or its repository of the Hugging Face Hub. Measurements of another erasure are
    refused."""
    out: Path
    """Folder of report.html, README.md and report.json."""
    model: str | None = None
    """Model on which to verify that the erasure is in force; not verified when left out."""
    json: bool = False
    """Print report.json, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> int:
    """Carry out the command.

    Returns:
        The exit code: 1 where the erasure is not in force on the model.
    """
    options = parse(ReportOptions, "report", argv)
    terminal.json_only = options.json
    if not options.folders:
        raise UsageError("nothing to report: erasure report FOLDER ... --erasure E --out page")
    from erasure.eval.dossiers.runner import report_on

    made = read_erasure(options.erasure)
    pipe: DiffusionPipeline | None = None
    if options.model is not None:
        pipe = open_model(options.of(options.model))
    found = report_on(options.folders, made, out=options.out, pipe=pipe)
    if options.json:
        terminal.result(found.to_dict())
    else:
        say_outcomes(found, terminal)
        terminal.say(*(f"Not measured: {line}" for line in found.not_measured))
        terminal.say(f"Everything on one page: {options.out / 'report.html'}")
    if found.verified.state == "not in force":
        terminal.complain("error", f"the erasure is not in force: {found.verified.detail}")
        return 1
    return 0
