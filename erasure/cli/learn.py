"""`erasure learn`: learn concepts from pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from erasure.cli.arguments import UsageError, parse
from erasure.cli.described import changes, parse_with, value_of
from erasure.cli.models import ModelOptions, check_seeds, open_model
from erasure.cli.output import check_output_folder
from erasure.cli.processes import is_main_process
from erasure.cli.terminal import Terminal
from erasure.training.run import Run

ABOUT = (
    "Learn new tokens for what pictures show, and write them to a folder: `generate --learned FOLDER` draws them, and "
    "`erase STRATEGY --learned FOLDER --concept TOKEN` erases them."
)


@dataclass(kw_only=True)
class LearnOptions(ModelOptions):
    """Learn new tokens for what pictures show.

    The method's own options (--steps, --trained, --sampling and others) are fields of
    `erasure.learning.attencraft.AttenCraft`; those of checkpoints and logs are as in `erasure erase esd`.
    """

    image: tuple[Path, ...]
    """Pictures, each of which shows everything that is learned."""
    token: tuple[str, ...]
    """A new word for each thing in them: "<logo>" "<mascot>". Where neither --like nor --mask says which is which,
    they name the things from left to right."""
    like: tuple[str, ...] = ()
    """For each token words that the model knows and that come near to the thing; "" for none."""
    mask: tuple[Path, ...] = ()
    """Masks of where each thing is, white on black: those of all tokens for the first picture, then for the second,
    and so on. When left out, the model finds the things by its own attention."""
    preset: str | None = None
    """Named set of the method's options, for instance the paper's; further options change single values of it."""
    seed: int = 0
    """Seed of everything random."""
    out: Path | None = None
    """Folder of the result; named after the tokens when left out."""
    overwrite: bool = False
    """Replace learned concepts that are in the folder."""
    json: bool = False
    """Print a summary as JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    if {"-h", "--help"} & set(argv):
        # The method's own options need torch, which takes seconds.
        parse(LearnOptions, "learn", argv)
    from erasure.learning.attencraft import AttenCraft

    start = AttenCraft.configured(value_of(argv, "--preset"))
    parsed = parse_with(LearnOptions, start, "learn", argv, f"{ABOUT} {AttenCraft.paper}.", run=Run())
    options: LearnOptions = parsed.command
    terminal.json_only = options.json
    check_seeds(options.seed)
    if not options.image or not options.token:
        raise UsageError("--image names what to learn from, and --token what to call it: both are needed")
    if options.like and len(options.like) != len(options.token):
        raise UsageError(
            f'{len(options.like)} --like for {len(options.token)} --token: give one for each ("" for none)'
        )
    count = len(options.token)
    if options.mask and len(options.mask) != count * len(options.image):
        raise UsageError(
            f"{len(options.mask)} --mask for {len(options.image)} pictures of {count} tokens: give {count} for each "
            "picture, or none"
        )
    from erasure.files import slug
    from erasure.learning import learn_concepts

    folder = options.out or Path("-".join(slug(token) or "concept" for token in options.token))
    check_output_folder(folder, overwrite=options.overwrite)
    training: Run = parsed.run
    if training.checkpoints is None:
        training = dataclasses.replace(training, checkpoints=folder.with_name(f"{folder.name}.training"))
    pipe = open_model(options)
    masks = [options.mask[first : first + count] for first in range(0, len(options.mask), count)]
    made = learn_concepts(
        pipe, options.image, options.token, like=dict(zip(options.token, options.like, strict=False)), masks=masks,
        seed=options.seed, load=False, preset=options.preset, progress=terminal.speaks, run=training,
        **changes(parsed.options, start),
    )  # fmt: skip
    if is_main_process():
        made.save(folder, overwrite=options.overwrite)
        training.discard()
    if options.json:
        config = made.config
        terminal.result(
            {
                "folder": str(folder), "tokens": made.tokens, "options": config.options, "seed": config.seed,
                "bytes": made.size_bytes, "cost": config.cost,
            }
        )  # fmt: skip
    else:
        seconds = made.config.cost["seconds"]
        terminal.say(f"{', '.join(made.tokens)}: {made.size_bytes / 1e3:.0f} kB in {folder}, made in {seconds:.1f} s")
        named = options.token[0]
        terminal.say(
            f'Draw it: erasure generate --model {options.model} --learned {folder} --prompt "a photo of {named}" '
            f'--out images. Erase it: erasure erase uce --model {options.model} --learned {folder} --concept "{named}"'
        )
