"""Finding or training a text encoder's dictionary (sparse autoencoder)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from erasure import files
from erasure.backbones import TextTower
from erasure.cache import cache_folder
from erasure.carriers.weights import fingerprint
from erasure.errors import ArtifactError, OptionError, WrongBaseError
from erasure.sae.formats import load, read_prompts, save
from erasure.sae.gates import read_words
from erasure.sae.model import SparseAutoencoder
from erasure.sae.stream import TokenStream, activations, block_fingerprint, reads_from
from erasure.sae.training import SAETrainer, TrainingOptions, variance_share

ERROR_ALLOWED, ERROR_FACTOR = 0.1, 3.0
"""Limits above which a dictionary counts as made for another text encoder: unexplained share of the activations'
variance, and its multiple of the share in the dictionary's training."""
SAMPLE = 64
"""Number of prompts on which the unexplained share is measured."""


def named(name: str) -> Path:
    """Resolve a folder, or the name of an embedded autoencoder, to a path."""
    from erasure import assets

    return assets.find(name) or Path(name)


def assigned(given: str, towers: Sequence[TextTower]) -> dict[str, Path]:
    """Assign the dictionaries that a user names to text encoders, by component.

    Args:
        given: One folder or name of an embedded dictionary, or several, separated by commas; each plain, or as
            `COMPONENT=FOLDER`.
        towers: The text encoders of the model.

    Raises:
        OptionError: A text encoder is unknown or gets two dictionaries, or a dictionary does not say for which encoder
            it was made.
        WrongBaseError: A dictionary was made for none of the text encoders.
    """
    # Names of folders may contain commas and equals signs.
    listed = [given] if os.path.exists(given) else [part.strip() for part in given.split(",") if part.strip()]
    found: dict[str, Path] = {}
    for part in listed:
        component, sign, folder = part.partition("=")
        if not sign or os.path.exists(part):
            folder, component = part, _component_of(named(part), towers)
        elif component not in {tower.component for tower in towers}:
            raise OptionError(
                f"itd: dictionary {part!r} is for {component!r}, which this model has not; its text encoders: "
                f"{', '.join(tower.component for tower in towers)}"
            )
        if component in found:
            raise OptionError(f"itd: two dictionaries for {component}, {found[component]} and {folder}: name one")
        found[component] = named(folder)
    return found


def _component_of(folder: Path, towers: Sequence[TextTower]) -> str:
    """Find the text encoder for which a dictionary was made."""
    if len(towers) == 1:
        (only,) = towers
        return only.component
    sae = load(folder)
    about = sae.config.metadata
    layer, known = about.get("layer"), about.get("fingerprint")
    component = str(about.get("hook_name", "")).split("/")[0]
    fits = [tower for tower in towers if layer is not None and known and reads_from(tower, layer, known)]
    if known and not fits:
        raise WrongBaseError(_made_for_another(folder, sae, "any of " + ", ".join(t.component for t in towers)))
    names = [tower.component for tower in fits or towers]
    if len(names) > 1 and component not in names:
        raise OptionError(
            f"itd: the dictionary {folder} does not say for which text encoder it is: write {names[0]}={folder}"
        )
    return names[0] if len(names) == 1 else component


def opened(tower: TextTower, folder: Path, layer: int | None) -> tuple[SparseAutoencoder, int]:
    """Load the dictionary of a text encoder, and say which block it reads.

    Args:
        tower: The text encoder.
        folder: Folder of the dictionary.
        layer: Block that it reads; the one named by the dictionary when `None`.

    Raises:
        OptionError: Neither `layer` nor the dictionary names a block.
        WrongBaseError: It was made for another text encoder.
    """
    sae = load(folder)
    about = sae.config.metadata
    layer = about.get("layer") if layer is None else layer
    if layer is None:
        raise OptionError(f"itd: the dictionary {folder} does not say which block it reads: give option 'layer'")
    width = activations(tower, layer, tower.tokenize([""])).shape[-1]
    known = about.get("fingerprint")
    if sae.config.d_in != width or (known and not reads_from(tower, layer, known)) or not explains(tower, folder, sae):
        raise WrongBaseError(_made_for_another(folder, sae, f"this {tower.component} of width {width}"))
    return sae.to(next(tower.root.parameters()).device), layer


def _made_for_another(folder: Path, sae: SparseAutoencoder, found: str) -> str:
    return (
        f"the dictionary {folder} (of {sae.config.metadata.get('model_name', 'an unknown model')}, width "
        f"{sae.config.d_in}) was made for another text encoder than {found}: train one with erasure sae train"
    )


@torch.no_grad()
def explains(tower: TextTower, folder: Path, sae: SparseAutoencoder) -> bool:
    """Whether a dictionary explains a text encoder's activations about as well as those that it was trained on.

    The fingerprint in its metadata covers one matrix of the block only, which fine-tuned encoders may share. The
    result is true where the dictionary lacks figures or prompts for the comparison.
    """
    about, prompts = sae.config.metadata, read_prompts(folder)[:SAMPLE]
    error, layer = about.get("fvu"), about.get("layer")
    if error is None or layer is None or not prompts:
        return True
    states = read_words(tower, layer, prompts).states
    left = variance_share(states - sae.cpu()(states), states)
    return float(left) <= max(ERROR_ALLOWED, ERROR_FACTOR * error)


def embedded(tower: TextTower) -> Path | None:
    """Find the autoencoder that is embedded in the package, if it was made for this text encoder."""
    from erasure import assets

    folder = assets.find("canvas-sae")
    if folder is None:
        return None
    sae = load(folder)
    about = sae.config.metadata
    fits = reads_from(tower, about["layer"], about["fingerprint"]) and explains(tower, folder, sae)
    return folder if fits else None


def trained(
    tower: TextTower, layer: int, prompts: Sequence[str], options: TrainingOptions, progress: Callable[[float], None]
) -> Path:
    """Train a dictionary, or find it in the cache; an interrupted training is resumed.

    Args:
        tower: Text encoder whose activations are read.
        layer: Block whose output is read.
        prompts: Prompts to train on.
        options: Options of the training.
        progress: Called with the share of the work that is done, 0 to 1.
    """
    known = block_fingerprint(tower, layer)
    # Both the matrix and some activations are compared: fine-tuned encoders can share the matrix, and broken encoders
    # all give the same NaN.
    given = fingerprint(activations(tower, layer, tower.tokenize(prompts[:4])).float())
    recipe = [known, given, layer, dataclasses.asdict(options), list(prompts)]
    folder = cache_folder() / "dictionaries" / files.digest(recipe)
    # A damaged dictionary is trained again.
    with suppress(ArtifactError):
        if load(folder).config.metadata.get("fingerprint") == known:
            return folder
    trainer = SAETrainer(TokenStream(tower, layer, prompts, seed=options.seed), options, folder=folder)
    sae = trainer.train(progress)
    where = {"layer": layer, "fingerprint": known, "hook_name": tower.key(tower.block_path(layer))}
    sae.config.metadata.update(where)
    save(sae, folder)
    trainer.discard_checkpoint()
    return folder
