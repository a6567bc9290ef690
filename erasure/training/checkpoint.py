"""Resumable training state in one file."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from erasure import files
from erasure.errors import TrainingError

MOST_VALUES, DEEPEST = 1_000_000, 20
"""Largest number of values in a checkpoint, and its deepest nesting."""
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""Names of Adam's state of a parameter."""


class Stateful(Protocol):
    """An object whose state can be saved and restored."""

    def state_dict(self) -> Mapping[str, object]:
        """Give the state: plain data and tensors."""
        ...

    def load_state_dict(self, state: Any, /) -> object:
        """Restore a state."""
        ...


class _Unfit(Exception):
    """A saved state does not belong to this training."""


class Checkpoint:
    """Resumable training state in one file, written atomically and read as tensors only.

    Args:
        path: The file.
        parts: Objects to save and restore, by name.
    """

    def __init__(self, path: Path, **parts: Stateful) -> None:
        self.path, self.parts = path, parts
        self.step, self.seconds = 0, 0.0
        self._started = time.monotonic()

    def resume(self, steps: int | None = None) -> int:
        """Load the last saved state, if there is one, and give the step at which to continue.

        Args:
            steps: Number of steps of the training.

        Raises:
            TrainingError: The file is damaged or belongs to another training; nothing has been loaded.
        """
        if self.path.exists():
            state = self._read(steps)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]
        self._started = time.monotonic() - self.seconds
        return self.step

    @property
    def elapsed(self) -> float:
        """Seconds of training in all sessions; sessions that were interrupted count up to their last checkpoint."""
        return time.monotonic() - self._started

    def _read(self, steps: int | None) -> dict[str, Any]:
        """Read the state from the file, and check it against every part."""
        try:
            state = files.read_archive(self.path, error=TrainingError)
            comparison = _Comparison(self.path.stat().st_size)
            if not isinstance(state, dict) or set(state) != {*self.parts, "step", "seconds"}:
                raise _Unfit(f"it holds {files.shown(sorted(map(str, state)))}, expected {sorted(self.parts)}")
            step, seconds = state["step"], state["seconds"]
            if type(step) is not int or not 0 <= step <= (2**53 if steps is None else steps):
                raise _Unfit(f"step {files.shown(step, 30)} of {'any number' if steps is None else steps}")
            if type(seconds) is not float or not (math.isfinite(seconds) and seconds >= 0):
                raise _Unfit(f"it took {files.shown(seconds, 30)} seconds")
            for name, part in self.parts.items():
                comparison.check(name, state[name], part.state_dict())
                if isinstance(part, torch.optim.Optimizer):
                    _check_moments(name, state[name], part)
            return state
        except Exception as error:  # torch, pickle and zip files have many
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TrainingError(
                f"the checkpoint {self.path} cannot be read ({reason}): delete it to start anew"
            ) from error

    def save(self, step: int) -> None:
        """Write the state after `step` steps.

        Raises:
            TrainingError: The file cannot be written; the former one is kept.
        """
        seconds = self.elapsed
        state = {name: part.state_dict() for name, part in self.parts.items()}
        content = io.BytesIO()
        torch.save({**state, "step": step, "seconds": seconds}, content)
        try:
            files.write_bytes(self.path, content.getbuffer(), error=TrainingError)
        except TrainingError as error:
            raise TrainingError(
                f"the checkpoint of step {step} is lost: {error}. So the one of step {self.step} is kept: run the "
                "same again to go on from there"
            ) from error
        self.step, self.seconds = step, seconds


class _Comparison:
    """Compares a saved state with the current one: the structure must be the same, and numbers finite.

    Args:
        size: Size of the file in bytes, which no tensor may exceed.
    """

    def __init__(self, size: int) -> None:
        self.size, self.left = size, MOST_VALUES

    def check(self, name: str, found: object, own: Any = None) -> None:
        """Raise `_Unfit` unless a saved value has the structure of the current one.

        Args:
            name: Path of the value in the state, for messages.
            found: Value from the file.
            own: Current value; an empty value or `None` allows any structure.
        """
        self.left -= 1
        if self.left < 0 or name.count(".") > DEEPEST:
            raise _Unfit(f"{name.partition('.')[0]} is nested too deeply")
        if isinstance(found, Tensor):
            self.check_tensor(name, found, own)
        elif isinstance(found, Mapping):
            if own and (not isinstance(own, Mapping) or set(found) != set(own)):
                raise _Unfit(
                    f"{name} holds {files.shown(sorted(map(str, found)))}, which is not what this training has"
                )
            for key, value in found.items():
                self.check(f"{name}.{key}", value, own[key] if own else None)
        elif isinstance(found, (list, tuple)):
            if own and (not isinstance(own, (list, tuple)) or len(found) != len(own)):
                raise _Unfit(f"{name} has {len(found)} values, which is not what this training has")
            for index, value in enumerate(found):
                self.check(f"{name}.{index}", value, own[index] if own else None)
        elif isinstance(found, float) and not math.isfinite(found):
            raise _Unfit(f"{name} is {found}")
        elif isinstance(own, (Tensor, Mapping, list, tuple)) or not isinstance(found, (str, int, float, type(None))):
            raise _Unfit(f"{name} is {files.shown(found, 40)}, expected {type(own).__name__}")

    def check_tensor(self, name: str, found: Tensor, own: object) -> None:
        """Raise `_Unfit` unless a tensor has the shape and type of another, and finite values."""
        if found.layout != torch.strided or found.device.type != "cpu" or found.nbytes > self.size:
            raise _Unfit(f"{name} is no plain tensor")
        if own is not None and not isinstance(own, Tensor):
            raise _Unfit(f"{name} is a tensor, expected {type(own).__name__}")
        if own is not None and (found.shape != own.shape or found.dtype != own.dtype):
            raise _Unfit(f"{name} is {list(found.shape)} {found.dtype}, expected {list(own.shape)} {own.dtype}")
        if not torch.isfinite(found).all():
            raise _Unfit(f"{name} holds NaN or infinity")


def _check_moments(name: str, found: Mapping[str, Any], optimiser: torch.optim.Optimizer) -> None:
    """Raise `_Unfit` unless a saved optimiser has this optimiser's options and state, which torch does not check."""
    for group, own in zip(found["param_groups"], optimiser.state_dict()["param_groups"], strict=True):
        # The learning rate is set at every step.
        changed = sorted(key for key in own if key != "lr" and group[key] != own[key])
        if changed or type(group["lr"]) not in (int, float):
            raise _Unfit(f"{name} has other options: {', '.join(changed) or 'lr'}")
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for index, moments in found["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(moments, Mapping):
            raise _Unfit(f"{name} has moments of parameter {files.shown(index, 30)} of {len(parameters)}")
        if isinstance(optimiser, torch.optim.Adam | torch.optim.AdamW) and set(moments) != MOMENTS:
            raise _Unfit(f"{name} has {files.shown(sorted(map(str, moments)))} of a parameter, not {sorted(MOMENTS)}")
        for key, value in moments.items():
            shape = () if key == "step" else parameters[index].shape
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise _Unfit(f"{name}: {files.shown(key)} of parameter {index} is none of {list(shape)}")
