"""The registry of strategies: one module per method, found by name."""

from __future__ import annotations

from erasure.strategies.base import STRATEGIES, Fit, Strategy, available, get, register

__all__ = ["STRATEGIES", "Fit", "Strategy", "available", "get", "register"]
