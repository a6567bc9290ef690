"""`erasure erase STRATEGY`: make an erasure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erasure.cli.arguments import UsageError
from erasure.cli.described import changes, list_of, options_of, parse_with, value_of
from erasure.cli.lists import is_list_file, read_concepts
from erasure.cli.models import TaughtModelOptions, open_model, read_erasure, require_tokens
from erasure.cli.output import check_output_folder
from erasure.cli.processes import is_main_process
from erasure.cli.terminal import Terminal
from erasure.concept import Concept, Kind
from erasure.parsing import ConceptRequest
from erasure.strategies import STRATEGIES
from erasure.training.run import Run
from erasure.world import World, taken_for_objects

if TYPE_CHECKING:
    from erasure.artifact import Erasure

HELP = """usage: erasure erase STRATEGY --model M --concept C [C ...] [options]

Makes an erasure and writes it to a folder.

strategies:
{strategies}

The options of each: erasure erase STRATEGY --help"""


@dataclass(kw_only=True)
class EraseOptions(TaughtModelOptions):
    """What to erase, from which model, and where to write the result."""

    concept: tuple[str, ...] = ()
    """What to erase, as NAME, NAME:KIND, NAME>ANCHOR or NAME:KIND>ANCHOR, for instance "Van Gogh:style>painting".
    Several with ";" between them, or one behind the other; in double quotes every character is part of a name."""
    concepts: Path | None = None
    """File with concepts to erase: CSV with the columns concept, kind, anchor, retain, synonyms and templates, JSON
    with those keys, or text with one concept per line. In a cell, several words or templates have ";" between them."""
    kind: Kind | None = None
    """Kind of the concepts that are given without one. When left out, a Canvas model knows the kind, and other models
    treat the concepts as objects."""
    anchor: str | None = None
    """What prompts should mean instead of the concepts that are given without an anchor; "" for nothing. When left
    out, a Canvas model suggests one, and other models draw the prompt without the concept's words."""
    retain: tuple[str, ...] = ()
    """Concepts that must survive."""
    synonyms: tuple[str, ...] = ()
    """Other words for the concept, erased along with it."""
    concept_templates: tuple[str, ...] = ()
    """Phrasings of the concepts that are given without their own, each with {} in the concept's place, for instance
    "{}" "a photo of {}" of a person. When left out, those of the kind, such as "a photo of a {}" of objects."""
    preset: str | None = None
    """Named set of the strategy's options, for instance the paper's; further options change single values of it."""
    seed: int | None = None
    """Seed of everything random; 0, or that of what is fitted anew, when left out."""
    add_to: str | None = None
    """Folder or Hub repository of an erasure that the concepts are added to: the result, in a folder of its own,
    erases its concepts and these. What solves or fits for all concepts at once does so anew, with the options it had;
    what trains goes on from the model as it leaves it."""
    out: Path | None = None
    """Folder of the erasure; named after concepts and strategy when left out."""
    overwrite: bool = False
    """Replace an erasure that is in the folder."""
    json: bool = False
    """Print a summary as JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    if not argv or argv[0] in ("-h", "--help"):
        terminal.whole(f"{HELP.format(strategies=list_of(STRATEGIES))}\n")
        return
    name, *rest = argv
    if name.startswith("-"):
        raise UsageError(f"name the strategy first: erasure erase {{{','.join(STRATEGIES.names())}}} --model M ...")
    strategy = options_of(STRATEGIES, name)
    # `erase` takes what was changed beside the preset, so the two sources of options stay apart in the artifact.
    start = strategy.configured(value_of(rest, "--preset"))
    attributes = STRATEGIES.facts(name).attributes
    earlier = _added_to(rest)
    if (
        earlier is not None
        and earlier.config.strategy == name
        and not (attributes["trains"] or value_of(rest, "--preset"))
    ):
        # All is fitted anew with the options that it had: only what differs from them is asked for.
        start = strategy.configured(None, **earlier.config.strategy_config)
    cost, protects = attributes["cost"], attributes["protects"]
    about = f"{attributes['title']} ({attributes['paper']}). Cost: {cost}. Protects: {protects}."
    more = {"run": Run()} if attributes["trains"] else {}
    parsed = parse_with(EraseOptions, start, f"erase {name}", rest, about, **more)
    options: EraseOptions = parsed.command
    training: Run | None = getattr(parsed, "run", None)
    terminal.json_only = options.json
    concepts, assumed = concepts_of(options, earlier)

    import erasure
    from erasure import ledger
    from erasure.artifact import default_name

    named = default_name(concepts, name) if earlier is None else ledger.default_name(earlier, concepts, name)
    folder = options.out or Path(named)
    check_output_folder(folder, overwrite=options.overwrite)
    if training is not None and training.checkpoints is None:
        training = dataclasses.replace(training, checkpoints=folder.with_name(f"{folder.name}.training"))
    pipe = open_model(options)
    require_tokens(pipe, [text for concept in concepts for text in concept.texts()])
    say_assumed_objects(assumed, terminal)
    made = erasure.erase(
        pipe, concepts, strategy=name, seed=options.seed, attach=False, preset=options.preset,
        progress=terminal.speaks, run=training, add_to=earlier, **changes(parsed.options, start),
    )  # fmt: skip
    if is_main_process():
        folder = made.save(folder, overwrite=options.overwrite)
        if training is not None:
            training.discard()
    show_result(made, name, folder, options, terminal)


def concepts_of(options: EraseOptions, earlier: Erasure | None) -> tuple[list[Concept], list[str]]:
    """Make the concepts that the options name; learned tokens beside them are added to their retain lists.

    Args:
        options: Options of the command.
        earlier: Erasure to which the concepts are added, if there is one.

    Returns:
        The concepts, and the names of those that are taken for objects because neither the user nor the model says
        what they are.

    Raises:
        UsageError: Synonyms are given for several concepts.
        ConceptError: A concept is not valid.
    """
    learned = tokens_of(options.learned)
    world = dataclasses.replace(World.at(options.model), learned=frozenset(learned))
    asked = world.requests(wanted(options))
    concepts = world.concepts(
        asked, kind=options.kind, anchor=options.anchor, retain=options.retain, synonyms=options.synonyms,
        templates=options.concept_templates, erased=() if earlier is None else earlier.concepts, tell=False,
    )  # fmt: skip
    # A learned token resembles no word of the vocabulary, so it survives only where a retain list names it.
    erased = {name for concept in concepts for name in concept.names}
    beside = [token for token in learned if token not in erased]
    concepts = [
        dataclasses.replace(each, retain=(*each.retain, *(token for token in beside if token not in each.retain)))
        for each in concepts
    ]
    if len(concepts) > 1 and options.synonyms:
        raise UsageError("--synonyms go with one concept: make one erasure for each concept, or leave them out")
    return concepts, [] if options.kind or options.concept_templates else world.assumed(asked)


def say_assumed_objects(names: Sequence[str], terminal: Terminal) -> None:
    """Say which concepts are taken for objects, with a prompt of theirs, and how to say what else they are."""
    if not names:
        return
    terminal.say(
        f"{taken_for_objects(names)} For a style add --kind style; for other prompts, as of a person, "
        "--concept-templates."
    )


def show_result(made: Erasure, strategy: str, folder: Path, options: EraseOptions, terminal: Terminal) -> None:
    """Print a summary of an erasure that a strategy has made, as JSON or for people."""
    seconds = made.config.cost.get("seconds", 0.0)
    if options.json:
        terminal.result(
            {
                "name": made.name, "folder": str(folder), "strategy": strategy, "concepts": made.config.concepts,
                "strategy_config": made.config.strategy_config, "seed": made.config.seed, "bytes": made.size_bytes,
                "cost": made.config.cost, "requests": made.config.requests,
            }
        )  # fmt: skip
    else:
        terminal.say(f"{made.name}: {made.size_bytes / 1e6:.2f} MB in {folder}, made in {seconds:.1f} s")
        terminal.say(
            f"Draw with it: erasure generate --model {options.model} --erasure {folder} --prompt ... --out images"
        )


def tokens_of(folders: Sequence[str]) -> list[str]:
    """The tokens of learned concepts in folders.

    Raises:
        ArtifactError: One is missing or damaged.
    """
    if not folders:
        return []
    from erasure.learning import LearnedConcepts

    return [token for folder in folders for token in LearnedConcepts.read(folder).tokens]


def wanted(options: EraseOptions) -> list[ConceptRequest | str]:
    """Collect the concepts that the options and their file name.

    Raises:
        UsageError: Nothing is, the file cannot be read, or it is given as a concept.
    """
    for text in options.concept:
        if is_list_file(text):
            raise UsageError(f"--concept {text} is a file: --concepts {text} reads it")
    listed = read_concepts(options.concepts) if options.concepts is not None else []
    if not options.concept and not listed:
        raise UsageError("nothing to erase: name it with --concept, or a file of concepts with --concepts")
    return [*options.concept, *listed]


def _added_to(argv: Sequence[str]) -> Erasure | None:
    """The erasure that concepts are to be added to, if there is one, read before anything else is done.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    source = value_of(argv, "--add-to")
    if source is None or {"-h", "--help"} & set(argv):
        return None
    return read_erasure(source)
