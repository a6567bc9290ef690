"""Networks in ONNX files of other packages: found without importing those, known by their sha256, run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from erasure.errors import ArtifactError
from erasure.eval.detectors.weights import sha256
from erasure.extras import locate, require
from erasure.files import shown


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that a package contains, with its known fingerprint."""

    module: str
    """Module of the package, one of `erasure.extras.REQUIREMENTS`."""
    file: str
    """Path below the module's folder."""
    known: str
    """sha256 of the version whose scores are known."""

    def path(self, own: str | None = None) -> Path:
        """Find the file.

        Args:
            own: Another file of the user's in its place.

        Raises:
            MissingExtraError: The package is not installed.
        """
        return locate(self.module, self.file) if own is None else Path(own)


def session(path: Path, outputs: int) -> Callable[[np.ndarray], np.ndarray]:
    """Make a function that runs a network with one input and one output, float32, batch first.

    Args:
        path: The ONNX file.
        outputs: Size of the second axis of what it gives, by which another network is told.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ArtifactError: The file is damaged, or of another network.
    """
    runtime = require("onnxruntime")
    sha256(path)  # says in plain words when it cannot be read
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        running = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path} cannot be loaded ({shown(text, 200)}): install its package again") from error
    given, answers = running.get_inputs(), running.get_outputs()
    if len(given) != 1 or len(answers) != 1 or len(answers[0].shape) < 2 or answers[0].shape[1] != outputs:
        raise ArtifactError(
            f"{path} is another network: it gives {[shown(each.shape) for each in answers]}, expected (batch, "
            f"{outputs}, ...). Install its package again"
        )
    name: str = given[0].name

    def run(batch: np.ndarray) -> np.ndarray:
        (found,) = running.run(None, {name: np.ascontiguousarray(batch, dtype=np.float32)})
        return np.asarray(found)

    return run
