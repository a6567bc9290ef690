"""Optional dependencies: imported where they are used, with the pip line in the error when they are missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from erasure.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: The module to import, as in `import`.
        extra: The extra of this package that installs it.

    Raises:
        MissingExtraError: It cannot be imported; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} cannot be imported ({error}); install it with: pip install 'erasure-diffusers[{extra}]'"
        ) from error
