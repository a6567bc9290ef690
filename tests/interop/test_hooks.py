"""Hooks that are removed leave those above and beneath them in force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import HookRegistry
from torch import Tensor, nn

from erasure.interop import hooks
from erasure.interop.hooks import ModelHook, SurroundingHook


class Adds(SurroundingHook):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def around(self, forward: Callable[..., Any], x: Tensor) -> Tensor:
        return forward(x) + self.number


class Theirs(ModelHook):
    """As diffusers' own hooks are written."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.fn_ref.original_forward(x) + self.number


def computed(module: nn.Module) -> float:
    return float(module(torch.zeros(1)))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 1), (1, 0), (0, 2), (1, 2), (0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("kinds", [(Adds, Adds, Adds), (Theirs, Adds, Theirs), (Adds, Theirs, Adds)])
def test_the_others_stay_in_force(kinds: tuple[Any, ...], gone: tuple[int, ...], copied: bool) -> None:
    module, numbers = nn.Identity(), (1.0, 10.0, 100.0)
    for kind, number in zip(kinds, numbers, strict=True):
        hooks.register_hook(module, kind(number), f"{number}")
    chosen = copy.deepcopy(module) if copied else module
    for index in gone:
        hooks.remove_hook(chosen, f"{numbers[index]}")
    assert computed(chosen) == sum(number for index, number in enumerate(numbers) if index not in gone)
    assert all(hooks.runs_hook(chosen, f"{n}") == (i not in gone) for i, n in enumerate(numbers))
    assert computed(module) == (111 if copied else computed(chosen))


def test_diffusers_own_removal_beneath_a_hook_of_ours() -> None:
    module = nn.Identity()
    hooks.register_hook(module, Theirs(1.0), "theirs")
    hooks.register_hook(module, Adds(10.0), "ours")
    HookRegistry.check_if_exists_or_initialize(module).remove_hook("theirs")
    assert computed(module) == 10
