"""`erasure sae`: train a sparse autoencoder of a text tower, and look at one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from erasure.cli.arguments import UsageError, parse
from erasure.cli.generate import call_settings
from erasure.cli.models import ModelOptions, open_model
from erasure.cli.output import check_output_folder
from erasure.cli.processes import is_main_process, process
from erasure.cli.terminal import Terminal
from erasure.shown import did_you_mean
from erasure.world import World

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

    from erasure.interop.protocols import Settings
    from erasure.sae import SAEConfig
    from erasure.sae.stream import DatasetPrompts, TokenStream

ACTIONS = {"train": "train one on the prompts of a file", "info": "what one is, and how well it describes a model"}
TOWER = "text_encoder"
KEPT = 2000
"""Prompts that are kept with the autoencoder, for strategies to calibrate on."""
HELD_OUT = 1_000_000
"""Seed of draws that nothing is trained on."""


@dataclass(kw_only=True)
class TowerOptions:
    """Source of the activations."""

    prompts: Path | None = None
    """Text file, one prompt per line. An embedded model brings its own."""
    dataset: str | None = None
    """Dataset to read instead of --prompts, as a stream: a repository of the Hugging Face Hub, a folder or a file."""
    column: str = "text"
    """Column of the dataset that holds the prompts."""
    split: str = "train"
    """Split of the dataset."""
    tower: str | None = None
    """Component of the pipeline: text_encoder (the default of a new autoencoder), text_encoder_2, ..."""
    layer: int | None = None
    """Index of the block whose output is read, from 0. When left out: two thirds of the depth, and a sixth of it in
    encoders without causal attention (T5)."""
    prompts_per_step: int = 64
    """Prompts encoded at each step."""


@dataclass(kw_only=True)
class InfoOptions(TowerOptions):
    """Show the sizes and training of an autoencoder; with --model, measure its quality on held-out prompts."""

    sae: tyro.conf.Positional[Path]
    """Folder of the autoencoder: of sae-lens, sparsify or OpenAI's layout."""
    model: str | None = None
    """Repository of the Hugging Face Hub, folder, or embedded model (`canvas-sd`)."""
    clip: Path | None = None
    """Folder of an open_clip model, to measure how much CLIP score images lose when the text encoder uses the
    reconstruction. An embedded model brings its own."""
    images: int = 32
    """Number of images to measure the loss of CLIP score on; 0 skips that."""
    json: bool = False
    """Print JSON."""


@dataclass(kw_only=True)
class OutOptions(ModelOptions):
    """Train a sparse autoencoder on the activations of a text encoder.

    Run the same command again to resume an interrupted training.
    """

    out: Path
    """Folder of the autoencoder, in sae-lens' layout."""
    precision: Literal["float32", "float16"] = "float16"
    """Precision of the file."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the arithmetic in training; that of `accelerate launch` or its config when left out."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Tracker that the figures of every step are logged to."""
    json: bool = False
    """Print JSON."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    if not argv or argv[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<6} {what}" for name, what in ACTIONS.items())
        usage = "usage: erasure sae ACTION [options]"
        terminal.whole(f"{usage}\n\nactions:\n{rows}\n\nThe options of each: erasure sae ACTION --help\n")
        return
    action, *rest = argv
    if action not in ACTIONS:
        hint = did_you_mean(action, ACTIONS)
        raise UsageError(f"unknown action {action!r}; there are: {', '.join(ACTIONS)}.{hint} See: erasure sae --help")
    (train if action == "train" else info)(rest, terminal)


def train(argv: Sequence[str], terminal: Terminal) -> None:
    """`erasure sae train`."""
    from erasure.sae import TrainingOptions

    every = dataclasses.make_dataclass(
        "Train",
        [
            ("command", Annotated[OutOptions, tyro.conf.FlagCreatePairsOff]),
            ("tower", TowerOptions),
            ("training", TrainingOptions, field(default_factory=TrainingOptions)),
        ],
        namespace={"__doc__": OutOptions.__doc__},
    )
    parsed: Any = parse(every, "sae train", argv, negatable=True)
    options: OutOptions = parsed.command
    terminal.json_only = options.json
    check_output_folder(options.out, may_hold=True)
    import torch

    from erasure.sae import SAETrainer, save
    from erasure.sae.quality import quality

    pipe = open_model(options, text_only=True)
    stream, place = open_stream(pipe, options.model, parsed.tower, parsed.training.seed + process()[0])
    with terminal.progress(1) as progress:
        progress.stage("training")
        accelerator = make_accelerator(options)
        trainer = SAETrainer(stream, parsed.training, folder=options.out, accelerator=accelerator)
        with progress.part() as report:
            sae = trainer.train(report)
    accelerator.end_training()
    sae.config.metadata.update(place)
    found = quality(sae, stream.reseeded(HELD_OUT))._asdict()
    sae.config.metadata.update(found)
    if is_main_process():
        save(sae, options.out, getattr(torch, options.precision), stream.sample(KEPT))
        trainer.discard_checkpoint()
    show(options.out, sae.config, found, terminal, as_json=options.json)


def make_accelerator(options: OutOptions) -> Accelerator:
    """Accelerate, with the tracker that was asked for.

    Raises:
        MissingExtraError: The tracker is not installed.
    """
    from accelerate import Accelerator

    from erasure.extras import require

    if options.tracker is not None:
        require(options.tracker)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, log_with=options.tracker, project_dir=str(options.out)
    )
    if options.tracker is not None:
        accelerator.init_trackers("erasure-sae")
    return accelerator


def info(argv: Sequence[str], terminal: Terminal) -> None:
    """`erasure sae info`."""
    options = parse(InfoOptions, "sae info", argv)
    terminal.json_only = options.json
    from erasure import assets
    from erasure.eval.metrics.clip_score import ClipModel, clip_score, cosine
    from erasure.sae import load, read_prompts
    from erasure.sae.quality import clip_loss, quality

    sae = load(options.sae)
    about, found = sae.config.metadata, {}
    if options.model is not None:
        folder = (
            assets.find("canvas-clip") if options.clip is None and World.at(options.model).declared else options.clip
        )
        draws = folder is not None and options.images > 0
        pipe = open_model(ModelOptions(model=options.model), text_only=not draws)
        place = dataclasses.replace(
            options,
            layer=about.get("layer") if options.layer is None else options.layer,
            tower=options.tower or about.get("hook_name", TOWER).split("/")[0],
        )
        stream, _ = open_stream(pipe, options.model, place, HELD_OUT, read_prompts(options.sae))
        found = quality(sae, stream)._asdict()
        if folder is not None and draws:
            scored = ClipModel(folder)
            lost = clip_loss(
                pipe, stream.tower, stream.layer, sae, stream.sample(options.images),
                lambda images, texts: clip_score(cosine(scored.images(images), scored.texts(texts))),
                **call_settings(options.model),
            )  # fmt: skip
            found |= lost._asdict()
    show(options.sae, sae.config, found, terminal, as_json=options.json)


def open_stream(
    pipe: DiffusionPipeline, model: str, options: TowerOptions, seed: int, kept: Sequence[str] = ()
) -> tuple[TokenStream, Settings]:
    """The activations of a pipeline, and what to write down about where they come from.

    Args:
        pipe: The pipeline.
        model: What it was opened from.
        options: Which tower, block and prompts.
        seed: Of the draws.
        kept: Prompts that came with an autoencoder, for when no others are named.

    Raises:
        UsageError: No such tower, or no prompts.
    """
    from erasure.backbones import text_towers
    from erasure.sae.stream import TokenStream, block_fingerprint, default_block

    towers = {tower.component: tower for tower in text_towers(pipe)}
    name = options.tower or TOWER
    if name not in towers:
        raise UsageError(f"--tower {name} is not in this pipeline; there are {', '.join(towers)}")
    tower = towers[name]
    layer = default_block(tower) if options.layer is None else options.layer
    prompts = open_prompts(options, World.at(model).declared, kept)
    stream = TokenStream(tower, layer, prompts, batch_size=options.prompts_per_step, seed=seed)
    place = {
        "model_name": Path(model).name if Path(model).is_absolute() else model,
        "hook_name": tower.key(tower.block_path(layer)), "layer": layer,
        "positions": "all but the start token, 10 % of padding", "pad_policy": "max_length",
        "fingerprint": block_fingerprint(tower, layer),
    }  # fmt: skip
    return stream, place


def open_prompts(options: TowerOptions, embedded: bool, kept: Sequence[str]) -> Sequence[str] | DatasetPrompts:
    """The prompts of a file or a dataset, those that were kept, or captions of the embedded world.

    Raises:
        UsageError: None of them, or both.
    """
    from erasure.sae import read_prompts
    from erasure.sae.stream import DatasetPrompts

    if options.prompts is not None and options.dataset is not None:
        raise UsageError("--prompts and --dataset: give one of them")
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if options.dataset is not None:
        return DatasetPrompts.open(options.dataset, options.column, options.split)
    if kept:
        return kept
    if not embedded:
        raise UsageError("--prompts FILE is needed, a text file with one prompt per line, or --dataset NAME")
    from erasure.assets.scenes import captions

    return captions(20_000, seed=0)


def show(folder: Path, config: SAEConfig, found: Settings, terminal: Terminal, *, as_json: bool) -> None:
    """Print what an autoencoder is and how good."""
    facts = {
        "folder": str(folder), "architecture": config.architecture, "d_in": config.d_in, "d_sae": config.d_sae,
        "k": config.k, **config.metadata, **found,
    }  # fmt: skip
    if as_json:
        terminal.result(facts)
        return
    rows = [[name, f"{value:.4g}" if isinstance(value, float) else str(value)] for name, value in facts.items()]
    terminal.table(("autoencoder", ""), rows)
