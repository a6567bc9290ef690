"""Concepts given by pictures: learned as new tokens, kept in a folder, loaded into pipelines, erased like words."""

from __future__ import annotations

from erasure.learning.concepts import LearnedConcepts
from erasure.learning.making import learn_concepts

__all__ = ["LearnedConcepts", "learn_concepts"]
