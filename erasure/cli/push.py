"""`erasure push FOLDER REPOSITORY`: share an erasure on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from erasure.cli.arguments import parse
from erasure.cli.terminal import Terminal


@dataclass(kw_only=True)
class PushOptions:
    """Share an erasure on the Hugging Face Hub, with a card that holds what was measured of it."""

    erasure: tyro.conf.Positional[Path]
    """Folder of the erasure."""
    repository: tyro.conf.Positional[str]
    """Repository of the Hub, as owner/name; it is created if it does not exist."""
    private: bool = False
    """Make the repository private, if it is created."""
    revision: str | None = None
    """Branch to upload to, which is created if it does not exist; the main branch when left out."""
    collection: str | None = None
    """Slug of a collection to add the repository to."""
    keep_card: bool = False
    """Upload the folder's README.md as it is, instead of a card that is written anew."""
    token: str | None = None
    """Token of the Hub; that of `hf auth login` when left out."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(PushOptions, "push", argv)
    terminal.json_only = options.json
    from erasure.artifact import CARD_FILE, Erasure
    from erasure.files import read_text

    made = Erasure.read(options.erasure)
    card = read_text(options.erasure / CARD_FILE) if options.keep_card else None
    put = made.push_to_hub(
        options.repository, private=options.private or None, token=options.token, revision=options.revision,
        collection=options.collection, card=card,
    )  # fmt: skip
    if options.json:
        terminal.result({"repository": options.repository, "address": put.address, "revision": put.revision})
        return
    terminal.say(f"Uploaded {made.name} to {put.address}")
    if not made.config.evaluation:
        terminal.say(f"Its card holds no measurement: erasure eval --erasure {options.erasure}, and push again")
    terminal.say(f"Exactly this one: --erasure {options.repository} at revision {put.revision}")
