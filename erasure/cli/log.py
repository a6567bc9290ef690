"""`erasure log FILE`: whether the audit log of a locked pipeline is whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from erasure.cli.arguments import parse
from erasure.cli.serve import secret
from erasure.cli.terminal import Terminal


@dataclass(kw_only=True)
class LogOptions:
    """Check that no line of an audit log was changed, moved or removed, and find the lines about a prompt."""

    file: tyro.conf.Positional[Path]
    """File of the log. If it was written with a secret, set the variable ERASURE_AUDIT_KEY to that secret."""
    head: str | None = None
    """Digest of a line that must be in the log, which was kept elsewhere (`log_head` of /health). It shows whether
    lines are missing at the end."""
    prompt: str | None = None
    """Prompt to look for: the lines about it are listed."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(LogOptions, "log", argv)
    terminal.json_only = options.json
    from erasure.locking import find, verify_log

    key = secret()
    verified = verify_log(options.file, key=key, head=options.head)
    lines = None if options.prompt is None else find(options.file, options.prompt, key=key)
    if options.json:
        report = {
            "lines": verified.lines, "head": verified.head, "events": dict(verified.events),
            "keyed": verified.keyed, "torn": verified.torn,
        }  # fmt: skip
        terminal.result(report if lines is None else {**report, "about_the_prompt": lines})
        return
    events = ", ".join(f"{count} {event}" for event, count in verified.events.items())
    terminal.say(f"{verified.lines} lines ({events}), each as it was written; the last has the digest {verified.head}")
    if verified.torn:
        terminal.say(f"{verified.torn} lines were cut short when a process was killed, and are accounted for")
    if not verified.keyed:
        terminal.say(f"Written without a secret (ERASURE_AUDIT_KEY): who may write {options.file} can write it anew")
    if options.head is None:
        terminal.say("Lines that are missing at its end cannot be seen: compare the digest with one kept elsewhere")
    if lines is not None:
        shown = ", ".join(map(str, lines)) or "none"
        terminal.say(f"Lines about the prompt: {shown}")
