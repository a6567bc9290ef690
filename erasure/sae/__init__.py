"""Sparse autoencoders of text features: the model, its training on any stream of activations, and file formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from erasure.lazy import importer

if TYPE_CHECKING:
    from erasure.sae.formats import load, read_prompts, save
    from erasure.sae.model import FeatureSlice, SAEConfig, SparseAutoencoder
    from erasure.sae.options import TrainingOptions
    from erasure.sae.training import SAETrainer

__all__ = [
    "FeatureSlice",
    "SAEConfig",
    "SAETrainer",
    "SparseAutoencoder",
    "TrainingOptions",
    "load",
    "read_prompts",
    "save",
]

_HOMES = {
    "FeatureSlice": "erasure.sae.model",
    "SAEConfig": "erasure.sae.model",
    "SAETrainer": "erasure.sae.training",
    "SparseAutoencoder": "erasure.sae.model",
    "TrainingOptions": "erasure.sae.options",
    "load": "erasure.sae.formats",
    "read_prompts": "erasure.sae.formats",
    "save": "erasure.sae.formats",
}

__getattr__ = importer(__name__, _HOMES)
