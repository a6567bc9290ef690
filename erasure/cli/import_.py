"""`erasure import`: an erasure that others published, as one of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from erasure.cli.arguments import parse
from erasure.cli.models import ModelOptions, open_model
from erasure.cli.output import check_output_folder
from erasure.cli.terminal import Terminal
from erasure.concept import Kind
from erasure.world import World


@dataclass(kw_only=True)
class ImportOptions:
    """Read an erasure that somebody published, and write it to a folder of ours.

    LoRA files (kohya's, LECO's, sliders', SPM's, diffusers', EraseAnything's) and weights (ESD's, UCE's, those of
    Concept Ablation and DoCo, AdvUnlearn's text encoders, whole checkpoints). No code in a file is ever run.
    """

    file: tyro.conf.Positional[Path]
    """The file: .safetensors, or .bin, .pt, .pth and .ckpt with nothing but tensors."""
    model: str
    """The model that it was made for: a repository, a folder, a single-file checkpoint or an embedded model."""
    config: str | None = None
    """Where --model is a single-file checkpoint: folder or repository of a model of its kind, from which the configs,
    tokenisers and what the file lacks are taken. Left out, the Hub is asked for those of the published model."""
    concept: tuple[str, ...] = ()
    """What it erases, as `erasure erase` takes it; may be left out for files that say it."""
    kind: Kind | None = None
    """Kind of the concepts that do not say their own."""
    anchor: str | None = None
    """Anchor: what prompts mean in the concepts' place."""
    component: str | None = None
    """The network whose weights the file holds (text_encoder, text_encoder_2, ...), where its names fit several."""
    out: Path | None = None
    """Folder of the erasure; named after the concepts when left out."""
    overwrite: bool = False
    """Replace an erasure that is in the folder."""
    json: bool = False
    """Print a summary as JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(ImportOptions, "import", argv)
    terminal.json_only = options.json
    if options.out is not None:
        check_output_folder(options.out, overwrite=options.overwrite)
    world = World.at(options.model)
    asked = world.requests(options.concept)
    concepts = world.concepts(asked, kind=options.kind, anchor=options.anchor, tell=False) if asked else []
    from erasure.exchange.importing import import_file

    pipe = open_model(ModelOptions(model=options.model, config=options.config, device="cpu", dtype="float32"))
    read = import_file(options.file, pipe, concepts, component=options.component)
    if not options.kind:
        world.tell_assumed(asked)
    made = read.erasure
    folder = made.save(options.out or Path(made.name), overwrite=options.overwrite)
    if options.json:
        terminal.result(
            {
                "name": made.name, "folder": str(folder), "form": read.form, "notes": list(read.notes),
                "base": read.base, "tensors": len(made.edits), "bytes": made.size_bytes,
                "config": dataclasses.asdict(made.config),
            }
        )  # fmt: skip
        return
    terminal.say(f"{made.name}: {len(made.edits)} edits, {made.size_bytes / 1e6:.2f} MB in {folder}")
    terminal.say(*(f"{note[0].upper()}{note[1:]}." for note in (read.base, *read.notes)))
