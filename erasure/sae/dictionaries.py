"""Where a text tower's autoencoder is found, or made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from erasure import files
from erasure.backbones import TextTower
from erasure.cache import cache_folder
from erasure.carriers.weights import fingerprint
from erasure.errors import ArtifactError
from erasure.sae.formats import load, save
from erasure.sae.stream import TokenStream, activations, block_fingerprint, reads_from
from erasure.sae.training import SAETrainer, TrainingOptions


def named(name: str) -> Path:
    """A folder, or an embedded autoencoder by its name."""
    from erasure import assets

    return assets.find(name) or Path(name)


def embedded(tower: TextTower) -> Path | None:
    """The autoencoder that comes with the package, when it was made for this text encoder."""
    from erasure import assets

    folder = assets.find("canvas-sae")
    if folder is None:
        return None
    about = load(folder).config.metadata
    fits = about["layer"] < len(tower.blocks) and reads_from(tower, about["layer"], about["fingerprint"])
    return folder if fits else None


def trained(
    tower: TextTower, layer: int, prompts: Sequence[str], options: TrainingOptions, progress: Callable[[float], None]
) -> Path:
    """One that is trained now, or was before: it is kept in the cache, and a run that is killed goes on later.

    Args:
        tower: Whose activations.
        layer: Of which block.
        prompts: To train on.
        options: How.
        progress: Called with the share that is done.
    """
    known = block_fingerprint(tower, layer)
    # One matrix is the same in many a fine-tuned encoder; what it gives is not.
    given = fingerprint(activations(tower, layer, tower.tokenize(prompts[:4])).float())
    recipe = [given, layer, dataclasses.asdict(options), list(prompts)]
    folder = cache_folder() / "dictionaries" / files.digest(recipe)
    # What is damaged is made again.
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
