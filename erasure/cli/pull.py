"""`erasure pull REPOSITORY`: fetch an erasure from the Hugging Face Hub into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from erasure.cli.arguments import parse
from erasure.cli.output import check_output_folder
from erasure.cli.terminal import Terminal


@dataclass(kw_only=True)
class PullOptions:
    """Fetch an erasure from the Hugging Face Hub into a folder, checked."""

    repository: tyro.conf.Positional[str]
    """Repository of the Hub, owner/name."""
    revision: str | None = None
    """Branch, tag or commit; the main branch when left out."""
    token: str | None = None
    """Token of the Hub; that of `hf auth login` when left out."""
    out: Path
    """Folder to write the erasure into, which must be empty or not exist yet."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(PullOptions, "pull", argv)
    terminal.json_only = options.json
    out = check_output_folder(options.out)
    from erasure.artifact import Erasure

    made, revision = Erasure.pull(options.repository, out, revision=options.revision, token=options.token)
    if options.json:
        terminal.result({"repository": options.repository, "revision": revision, "folder": str(out)})
        return
    terminal.say(f"Fetched {made.name} at revision {revision} into {out}")
