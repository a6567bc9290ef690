"""The ways an erasure lives in a model."""
