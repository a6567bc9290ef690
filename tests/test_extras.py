"""Optional packages: found without being imported, or named in the error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from erasure import extras
from erasure.errors import MissingExtraError


def test_a_file_of_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nudenet").mkdir()
    (tmp_path / "nudenet" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "nudenet" / "weights.onnx").write_bytes(b"weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert extras.locate("nudenet", "weights.onnx").read_bytes() == b"weights"
    with pytest.raises(MissingExtraError, match=r"nudenet has no file other.onnx; install it with: pip install 'nude"):
        extras.locate("nudenet", "other.onnx")
    assert "nudenet" not in sys.modules


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="nudenet is not installed; install it with: pip install 'nudenet>="):
        extras.locate("nudenet", "weights.onnx")
