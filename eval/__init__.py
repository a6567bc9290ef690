"""Measure erasures: before against after, on the same noise, with intervals.

Example:
    >>> from erasure.eval import evaluate
    >>> results = evaluate(pipe, "canvas", ["cat"], size="quick", out="cat-hirm-eval")
    >>> results.get("UA")["value"]
    0.95
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from erasure.lazy import importer

if TYPE_CHECKING:
    from erasure.eval.attacks.runner import attack, replay
    from erasure.eval.audits.runner import Audit, audit
    from erasure.eval.comparison import compare
    from erasure.eval.dossiers.runner import Dossier, report_on
    from erasure.eval.report import write_report
    from erasure.eval.results import Results
    from erasure.eval.runner import evaluate
    from erasure.eval.stress.runner import stress_test
    from erasure.eval.sweeps.runner import sweep

__all__ = [
    "Audit", "Dossier", "Results", "attack", "audit", "compare", "evaluate", "replay", "report_on", "stress_test",
    "sweep", "write_report",
]  # fmt: skip

_HOMES = {
    "Audit": "erasure.eval.audits.runner",
    "Results": "erasure.eval.results",
    "attack": "erasure.eval.attacks.runner",
    "audit": "erasure.eval.audits.runner",
    "compare": "erasure.eval.comparison",
    "Dossier": "erasure.eval.dossiers.runner",
    "evaluate": "erasure.eval.runner",
    "replay": "erasure.eval.attacks.runner",
    "report_on": "erasure.eval.dossiers.runner",
    "stress_test": "erasure.eval.stress.runner",
    "sweep": "erasure.eval.sweeps.runner",
    "write_report": "erasure.eval.report",
}

__getattr__ = importer(__name__, _HOMES)
