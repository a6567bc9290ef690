"""`erasure export`: an erasure as a file that other programs load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from erasure.cli.arguments import UsageError, parse
from erasure.cli.models import ModelOptions, open_model, read_erasure
from erasure.cli.terminal import Terminal

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from erasure.artifact import Erasure
    from erasure.exchange.lora_files import Exported

Program = Literal["kohya", "comfyui", "a1111", "diffusers", "single-file"]


@dataclass(kw_only=True)
class ExportOptions:
    """Write an erasure as a file that other programs load: a LoRA, or the whole erased model.

    What a file cannot hold (hooks, gates, a sampler of its own) is refused, and the message says what works.
    """

    erasure: tyro.conf.Positional[str]
    """Folder of an erasure, or a repository of the Hugging Face Hub."""
    to: Program
    """Which program it is for: kohya (sd-scripts, Forge), comfyui, a1111 and diffusers get a LoRA under the names that
    they know; single-file is a checkpoint of the erased model in the layout it was published in."""
    out: Path
    """The file, which ends with .safetensors."""
    model: str | None = None
    """Base model: a repository, a folder, a single-file checkpoint or an embedded model. Needed for single-file, and
    for a LoRA where the erasure alone does not say enough."""
    config: str | None = None
    """Where --model is a single-file checkpoint: folder or repository of a model of its kind, from which the configs,
    tokenisers and what the file lacks are taken. Left out, the Hub is asked for those of the published model."""
    rank: int | None = None
    """The most ranks of a layer whose edit is of full rank; as many as --residual asks for when left out."""
    residual: float = 1e-4
    """Share of the energy of a full-rank edit that its LoRA may leave out."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of a single-file checkpoint."""
    overwrite: bool = False
    """Replace a file that is there."""
    json: bool = False
    """Print a summary as JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(ExportOptions, "export", argv)
    terminal.json_only = options.json
    if options.to == "single-file" and options.model is None:
        raise UsageError("--to single-file writes the whole model: name it with --model")
    from erasure.exchange.writing import check_out

    check_out(options.out, overwrite=options.overwrite)
    made = read_erasure(options.erasure)
    pipe = None
    if options.model is not None:
        precision = options.dtype if options.to == "single-file" else "float32"
        pipe = open_model(ModelOptions(model=options.model, config=options.config, device="cpu", dtype=precision))
    if options.to == "single-file":
        assert pipe is not None
        _checkpoint(made, pipe, options, terminal)
        return
    from erasure.exchange.lora_files import export_lora

    export = export_lora(
        made, options.to, options.out, pipe=pipe, rank=options.rank, residual=options.residual,
        overwrite=options.overwrite,
    )  # fmt: skip
    _say(made, export, terminal)


def _checkpoint(made: Erasure, pipe: DiffusionPipeline, options: ExportOptions, terminal: Terminal) -> None:
    from erasure.exchange.checkpoints import export_checkpoint

    written = export_checkpoint(made, pipe, options.out, overwrite=options.overwrite)
    if terminal.json_only:
        export = {"name": made.name, "file": str(written.path), "to": options.to, "components": written.components}
        terminal.result({**export, "tensors": written.tensors, "parameters": written.parameters})
    else:
        terminal.say(f"{options.out}: {made.name} as a checkpoint, {written}")


def _say(made: Erasure, export: Exported, terminal: Terminal) -> None:
    if terminal.json_only:
        terminal.result({"name": made.name, "file": str(export.path), **export.facts})
    else:
        terminal.say(f"{export.path}: {made.name} for {export.to}, {export}")
