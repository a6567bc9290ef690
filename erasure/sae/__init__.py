"""Sparse autoencoders of text features: the model, its training on any stream of activations, and file formats."""

from erasure.sae.formats import load, read_prompts, save
from erasure.sae.model import FeatureSlice, SAEConfig, SparseAutoencoder
from erasure.sae.training import SAETrainer, TrainingOptions

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
