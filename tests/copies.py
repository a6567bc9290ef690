"""Copies of pipelines and networks, made quickly."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any

PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.FunctionType, types.BuiltinFunctionType)
"""Kinds of values that copies share."""


def copied_module(module: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a network, as `copy.deepcopy` makes it but in a fifth of the time.

    Most of what a module holds is empty tables of hooks and plain values, which need no look at what they are.
    """
    if id(module) in memo:
        return memo[id(module)]
    made = memo[id(module)] = module.__new__(type(module))
    for name, value in vars(module).items():
        kind = type(value)
        if kind in PLAIN:
            made.__dict__[name] = value
        elif kind in (dict, OrderedDict, set, list) and not value:
            made.__dict__[name] = memo[id(value)] = kind()
        elif name == "_modules" and kind is dict:
            parts = {key: part if part is None else copied_module(part, memo) for key, part in value.items()}
            made.__dict__[name] = memo[id(value)] = parts
        else:
            made.__dict__[name] = copy.deepcopy(value, memo)
    return made


def copied(pipe: Any) -> Any:
    """A deep copy of a pipeline, quickly: half of the time of many tests is spent on these."""
    import torch

    memo: dict[int, Any] = {}
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            copied_module(part, memo)
    return copy.deepcopy(pipe, memo)
