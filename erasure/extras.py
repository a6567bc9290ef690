"""Optional dependencies: imported where they are used, with the pip line in the error when they are missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from erasure.errors import MissingExtraError

REQUIREMENTS = {
    "datasets": "datasets>=3",
    "tensorboard": "tensorboard>=2.16",
    "torchmetrics": "torchmetrics[image]>=1.5",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Requirement that pip installs for each optional package. Those with a version are extras of this package too."""


def require(module: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: The module to import, as in `import`; its package is one of `REQUIREMENTS`.

    Raises:
        MissingExtraError: It cannot be imported; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        needed = REQUIREMENTS[module.partition(".")[0]]
        raise MissingExtraError(
            f"{module} cannot be imported ({error}); install it with: pip install '{needed}'"
        ) from error
