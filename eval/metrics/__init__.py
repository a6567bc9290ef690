"""Metrics: one module each, pure functions on rows, images or features."""
