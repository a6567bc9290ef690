"""Versions of the libraries that a result depends on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def library_versions(others: Sequence[str] = ()) -> dict[str, str]:
    """Give the versions of this package and of its main dependencies, as far as they are installed.

    Args:
        others: Names of further distributions.
    """
    from erasure import __version__

    versions = {"erasure-diffusers": __version__}
    for name in (*LIBRARIES, *others):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
