"""Carriers: the forms in which an erasure is attached to a model."""
