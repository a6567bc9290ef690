"""What commands write into the pictures that they make, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from erasure.picture_record import FORMAT, AttachedErasure, PictureRecord, called, read_record

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from erasure.artifact import Erasure
    from erasure.cli.terminal import Terminal
    from erasure.interop.protocols import Settings


class Maker:
    """What all pictures of a run have in common, to be written into each of them."""

    def __init__(
        self, command: Literal["generate", "remove", "demo"], model: str, pipe: DiffusionPipeline, *,
        omit_prompt: bool = False,
    ) -> None:  # fmt: skip
        """Take the fingerprint of the model: call this ahead of attaching erasures.

        Args:
            command: Which command makes the pictures.
            model: What the user called the model; of a folder the last part is kept.
            pipe: The model as it was loaded.
            omit_prompt: Leave prompts out.
        """
        from erasure.cache import model_fingerprint

        self.command = command
        self.model = called(model)
        self.fingerprint = model_fingerprint(pipe)
        self.erasures: list[AttachedErasure] = []
        self.omit_prompt = omit_prompt

    def attached(self, pipe: DiffusionPipeline) -> Maker:
        """Note the erasures that are in force on a pipeline, with their strengths; give this back."""
        from erasure.attach import ErasureManager

        manager = ErasureManager(pipe)
        return self.erased({name: manager.erasures[name] for name in manager.active_erasures()}, manager.strengths)

    def erased(self, erasures: Mapping[str, Erasure], strengths: Mapping[str, float]) -> Maker:
        """Note erasures by name, with their strengths (1 where none is said); give this back."""
        self.erasures = [
            {
                "name": name, "strategy": made.config.strategy, "fingerprint": made.fingerprint,
                "strength": float(strengths.get(name, 1.0)),
            }
            for name, made in erasures.items()
        ]  # fmt: skip
        return self

    def record(
        self, seed: int, settings: Settings, prompt: str | None = None, negative_prompt: str | None = None
    ) -> PictureRecord:
        """What is written into one picture."""
        from erasure import __version__

        record: PictureRecord = {
            "format": FORMAT, "version": __version__, "command": self.command, "model": self.model,
            "fingerprint": self.fingerprint, "erasures": self.erasures, "seed": seed,
            "settings": json.loads(json.dumps(settings)),
        }  # fmt: skip
        if prompt is not None and not self.omit_prompt:
            record["prompt"] = prompt
        if negative_prompt is not None and not self.omit_prompt:
            record["negative_prompt"] = negative_prompt
        return record


def show_record(picture: Path, terminal: Terminal) -> None:
    """Print what made a picture.

    Raises:
        UsageError: It is damaged, or does not say.
    """
    from erasure.cli.arguments import UsageError

    record = read_record(picture, error=UsageError)
    if terminal.json_only:
        terminal.result(record)
        return
    prompts = [[name.replace("_", " "), str(record[name])] for name in ("prompt", "negative_prompt") if name in record]
    rows = [
        ["made by", f"erasure {record['command']}, version {record['version']}"],
        ["model", f"{record['model']} (weights {record['fingerprint']})"],
        *(prompts or [["prompt", "was left out"]]),
        ["seed", str(record["seed"])],
        ["settings", ", ".join(f"{name}={value}" for name, value in record["settings"].items()) or "the pipeline's"],
    ]
    terminal.table(("picture", picture.name), rows)
    if not record["erasures"]:
        terminal.say("No erasure was attached.")
        return
    attached = [
        [one["name"], one["strategy"], f"{one['strength']:.4g}", one["fingerprint"]] for one in record["erasures"]
    ]
    terminal.table(("erasure", "strategy", "strength", "fingerprint"), attached)
