"""The errors and warnings of `erasure`.

All errors derive from `ErasureError` and from the fitting builtin error. A message says what went wrong, what was
found, what is allowed, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class ErasureError(Exception):
    """Root of all errors of this package."""


class ConceptError(ErasureError, ValueError):
    """A concept cannot be erased as given."""


class UnknownStrategyError(ErasureError, KeyError):
    """No strategy of that name is registered."""

    def __str__(self) -> str:
        """The message itself: `KeyError` would show its `repr`."""
        return str(self.args[0]) if self.args else ""


class BrokenPluginError(ErasureError, ImportError):
    """A plug-in from another package cannot be loaded."""


class OptionError(ErasureError, ValueError):
    """An option or preset does not exist, or its value is not allowed."""


class UnsupportedModelError(ErasureError, ValueError):
    """The pipeline, or the state that it is in, does not allow what was asked."""


class NoMatchingModuleError(ErasureError, ValueError):
    """No module of the model matches what the erasure should change."""


class ArtifactError(ErasureError, ValueError):
    """An erasure on disk is missing, damaged, or from a newer version."""


class WrongBaseError(ArtifactError):
    """The erasure was made for another base model."""


class AttachError(ErasureError, ValueError):
    """An erasure cannot be attached: its name, its strength or the combination of erasures is not allowed."""


class VerificationError(ErasureError, RuntimeError):
    """An attached erasure is not in force."""


class DivergenceError(ErasureError, ArithmeticError):
    """NaN or infinity occurred in computing or training an erasure."""


class TrainingError(ErasureError, RuntimeError):
    """A training cannot be run, resumed or saved."""


class ImageError(ErasureError, ValueError):
    """A picture cannot be read."""


class MaskError(ErasureError, ValueError):
    """A mask does not fit its image, or covers all of it."""


class EvaluationError(ErasureError, ValueError):
    """An evaluation cannot be run, resumed or compared."""


class ResultsFolderError(EvaluationError):
    """A folder of results is in use, holds something else, is damaged, or cannot be written."""


class MissingExtraError(ErasureError, ImportError):
    """An optional dependency is not installed."""


class BypassedErasureError(ErasureError, RuntimeError):
    """A call bypasses an erasure that was attached with `strict=True`."""


class LockedError(BypassedErasureError):
    """A locked pipeline refuses to bypass or to remove its erasures."""


class RefusedError(LockedError):
    """A locked pipeline refuses prompts, or generated pictures, because of their content.

    Args:
        message: Error message.
        refused: Reasons, by index of the prompt or picture in the call.
        pictures: Generated pictures, with `None` for refused ones; empty where prompts were refused.
    """

    def __init__(self, message: str, refused: Mapping[int, str], pictures: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.refused, self.pictures = dict(refused), list(pictures)


class BypassedErasureWarning(UserWarning):
    """A call bypasses an erasure, with embeddings, pictures, networks, or texts of an unfit length."""


class OneStepWarning(UserWarning):
    """A call sets steps or guidance of a one-step generator, which ignores them."""


class ExperimentalWarning(UserWarning):
    """An experimental feature is used, which no paper and no measurement on full models supports yet."""


class BrokenPluginWarning(UserWarning):
    """A plug-in from another package cannot be loaded, and is left out."""


class IgnoredRetainWarning(UserWarning):
    """A concept has a retain list that the options of the strategy ignore."""


class UnknownTokenWarning(UserWarning):
    """Texts contain a learned token (textual inversion) that a pipeline lacks, or for which it has other vectors."""


class ConceptWarning(UserWarning):
    """Words may have another meaning than the assumed one, or are unknown to a model."""


class TwiceAttachedWarning(UserWarning):
    """The same edits are attached to a pipeline under two names."""
