"""Benchmarks stand in the checkout and are not installed: found there, behind whatever is."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
