"""What the studio says of methods and erasures, as names and values."""

from __future__ import annotations

from erasure.cards import figure
from erasure.strategies import STRATEGIES
from erasure.studio.shared import Stacked


def facts_of_method(name: str) -> list[tuple[str, str]]:
    """What lists say about a method, as names and values.

    Raises:
        UnknownStrategyError: There is no such method.
    """
    attributes = STRATEGIES.facts(name).attributes
    rows = [(fact, attributes[fact]) for fact in ("title", "protects", "cost", "needs", "paper")]
    return [(name, ", ".join(value) if isinstance(value, (list, tuple)) else str(value)) for name, value in rows]


def presets_of(name: str) -> list[str]:
    """Names of the presets of a method."""
    return list(STRATEGIES.facts(name).attributes["presets"])


def facts_of_erasure(stacked: Stacked) -> list[tuple[str, str]]:
    """What an erasure is, what it cost, and what was measured of it, as names and values."""
    made, config = stacked.erasure, stacked.erasure.config
    rows = [
        ("erases", "; ".join(concept.target for concept in made.concepts)),
        ("method", config.strategy),
        ("protects", config.protects),
        ("made in", f"{config.cost['seconds']:.1f} s" if "seconds" in config.cost else "not recorded"),
        ("size", f"{made.size_bytes / 1000:.0f} kB, {len(made.edits)} tensors"),
        ("fingerprint", made.fingerprint),
    ]
    measured = [(key, figure(value)) for key, value in config.evaluation.items()]
    return rows + (measured or [("measured", "nothing yet: download it, and run erasure eval")])
