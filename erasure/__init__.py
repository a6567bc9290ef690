"""Concept erasure as a drop-in for Hugging Face diffusers.

    import erasure
    erasure.erase(pipe, "Van Gogh", strategy="hirm")

Attributes load on first use, so that importing the package is fast.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from erasure.api import erase, load, load_pipeline
    from erasure.artifact import Erasure, ErasureConfig
    from erasure.attach import ErasureManager
    from erasure.concept import Concept
    from erasure.learning.concepts import LearnedConcepts
    from erasure.learning.making import learn_concepts
    from erasure.sae.detection import detect_concepts

__version__ = "0.1.0"

__all__ = [
    "Concept",
    "Erasure",
    "ErasureConfig",
    "ErasureManager",
    "LearnedConcepts",
    "detect_concepts",
    "erase",
    "learn_concepts",
    "load",
    "load_pipeline",
]

_HOMES = {
    "Concept": "erasure.concept",
    "Erasure": "erasure.artifact",
    "ErasureConfig": "erasure.artifact",
    "ErasureManager": "erasure.attach",
    "LearnedConcepts": "erasure.learning.concepts",
    "detect_concepts": "erasure.sae.detection",
    "erase": "erasure.api",
    "learn_concepts": "erasure.learning.making",
    "load": "erasure.api",
    "load_pipeline": "erasure.api",
}

_root = _Path(__file__).resolve().parent
if not (_root / "pipelines").is_dir() and (_root.parent / "pipelines").is_dir():
    # A source checkout keeps pipelines/, eval/ and assets/ beside erasure/; the wheel has them inside.
    __path__.append(str(_root.parent))


def __getattr__(name: str) -> _Any:
    if name == "modules":  # its name before the private parts of other libraries got rooms of their own
        return _import_module("erasure.interop.paths")
    if name in _HOMES:
        return getattr(_import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'erasure' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
