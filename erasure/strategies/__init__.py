"""The registry of strategies: one module per method, found by name."""

from __future__ import annotations

from erasure.strategies.base import Fit, Strategy, available, get, register

__all__ = ["Fit", "Strategy", "available", "get", "register"]
