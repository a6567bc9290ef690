"""What people take home."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

from erasure.artifact import Erasure


def zipped(made: Erasure) -> bytes:
    """A ZIP file with the folder of an erasure in it, which `Erasure.load` reads when it is unpacked."""
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        folder = made.save(Path(place) / made.name)
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{made.name}/{file.name}")
    return buffer.getvalue()
