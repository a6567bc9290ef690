"""Every error that `erasure` raises on purpose.

All derive from `ErasureError` and from the builtin that users already catch. A message says what went wrong, what was
found, what is allowed, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class ErasureError(Exception):
    """Root of all errors of this package."""


class ConceptError(ErasureError, ValueError):
    """A concept that cannot be erased as given."""


class UnknownStrategyError(ErasureError, KeyError):
    """No strategy of that name is registered."""

    def __str__(self) -> str:
        """The message itself: `KeyError` would show its `repr`."""
        return str(self.args[0]) if self.args else ""


class BrokenPluginError(ErasureError, ImportError):
    """Something that another package adds to this one cannot be loaded."""


class OptionError(ErasureError, ValueError):
    """An option or preset that a strategy does not have, or a value that it does not allow."""


class UnsupportedModelError(ErasureError, ValueError):
    """The pipeline, or the state that it is in, does not allow what was asked."""


class NoMatchingModuleError(ErasureError, ValueError):
    """No module of the model matches what the erasure should change."""


class ArtifactError(ErasureError, ValueError):
    """An erasure on disk is missing, damaged, or from a newer version."""


class WrongBaseError(ArtifactError):
    """The erasure was made for another base model."""


class AttachError(ErasureError, ValueError):
    """An erasure name or a combination of erasures that does not work."""


class VerificationError(ErasureError, RuntimeError):
    """An attached erasure is not in force."""


class DivergenceError(ErasureError, ArithmeticError):
    """NaN or infinity during optimisation."""


class TrainingError(ErasureError, RuntimeError):
    """A training that cannot be run, resumed or written as asked."""


class ImageError(ErasureError, ValueError):
    """A picture that cannot be read."""


class MaskError(ErasureError, ValueError):
    """A mask that does not go with its image, or leaves nothing of it."""


class EvaluationError(ErasureError, ValueError):
    """An evaluation that cannot be run, resumed or compared as asked."""


class MissingExtraError(ErasureError, ImportError):
    """An optional dependency is not installed."""


class BypassedErasureError(ErasureError, RuntimeError):
    """A call goes around an erasure that was attached with `strict=True`."""


class LockedError(BypassedErasureError):
    """A locked pipeline refuses what goes around its erasures, or what would take them off."""


class RefusedError(LockedError):
    """A locked pipeline refuses prompts, or pictures that it has drawn, for what they show.

    Args:
        message: What is said.
        refused: Why, by the place of the prompt or picture in the call.
        pictures: What was drawn, with nothing in the place of refused ones; empty where prompts were refused.
    """

    def __init__(self, message: str, refused: Mapping[int, str], pictures: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.refused, self.pictures = dict(refused), list(pictures)


class BypassedErasureWarning(UserWarning):
    """A call goes around an erasure: with embeddings, pictures, networks or texts of a length that it is not for."""


class OneStepWarning(UserWarning):
    """A call asks a one-step generator for steps or guidance, which it does without."""


class ExperimentalWarning(UserWarning):
    """Something that no paper and no measurement on full models vouches for yet."""


class BrokenPluginWarning(UserWarning):
    """Something that another package adds to this one cannot be loaded, and is left out."""


class IgnoredRetainWarning(UserWarning):
    """A concept says what must survive, and the options of the strategy leave that out."""


class UnknownTokenWarning(UserWarning):
    """Words name a learned token (textual inversion) that a pipeline lacks, or has other vectors for."""


class ConceptWarning(UserWarning):
    """Words that may mean something else than what they are taken for, or that a model does not know."""


class TwiceAttachedWarning(UserWarning):
    """Equal edits are attached to a pipeline under two names."""
