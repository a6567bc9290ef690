"""Concepts learned from pictures as new tokens: saved in a folder, loaded into pipelines, and erased like words."""

from __future__ import annotations

from erasure.learning.concepts import LearnedConcepts
from erasure.learning.making import learn_concepts

__all__ = ["LearnedConcepts", "learn_concepts"]
