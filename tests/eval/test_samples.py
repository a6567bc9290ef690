"""Samples as rows, and back."""

from __future__ import annotations

import json

import pytest

from erasure.errors import EvaluationError
from erasure.eval.samples import Sample


def test_a_sample_comes_back_from_its_row() -> None:
    sample = Sample("cat-ink-0", "a cat", 2**40, "target", ("cat",), "ink", ("cat",), scene={"offsets": [[1, 2]]})
    row = json.loads(json.dumps(sample.row() | {"judged": None, "seconds": 1.0}))
    assert Sample.from_row(row) == sample
    del row["seed"]
    with pytest.raises(EvaluationError, match="seed"):
        Sample.from_row(row)
