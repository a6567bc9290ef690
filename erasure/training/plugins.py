"""Actions after optimiser steps: protection of retained inputs, and pruning of blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from erasure.interop import paths
from erasure.training.student import LowRankStudent, Student, SubsetStudent
from erasure.training.turns import After

ERASABLE = 0.3
"""Share of a concept's inputs in unprotected directions below which a warning is given."""


class ErasabilityWarning(UserWarning):
    """Retained inputs leave few directions in which the concept's outputs can change."""


class InputGrams:
    """Gram matrices of linear layers' inputs, gathered while a network runs."""

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}

    @contextmanager
    def gathering(self, network: nn.Module, layers: Sequence[str]) -> Iterator[None]:
        """Add, in float64, every input of these layers inside of the block."""
        handles = [paths.layer(network, path).register_forward_pre_hook(partial(self._add, path)) for path in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, columns: Mapping[str, slice]) -> None:
        """Keep, in some layers, only the inputs of given weight columns."""
        for path in columns.keys() & self.grams.keys():
            gram, kept = self.grams[path], columns[path]
            self.grams[path] = torch.zeros_like(gram)
            self.grams[path][kept, kept] = gram[kept, kept]

    def _add(self, path: str, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().flatten(0, -2).double()
        self.grams[path] = self.grams.get(path, 0) + rows.T @ rows


def null_space(gram: Tensor, share: float) -> Tensor:
    """Compute the projection onto directions that retained inputs do not use, `(dim, dim)` float64.

    Args:
        gram: Sum of the inputs' outer products, `(dim, dim)`.
        share: Share of the inputs' energy that is protected; 1 protects all directions that they span (to a relative
            1e-10).
    """
    energy, directions = torch.linalg.eigh(gram)
    energy, directions = energy.flip(0).clamp_min(0), directions.flip(1)
    if share >= 1:
        count = int((energy > 1e-10 * energy[0]).sum())
    else:
        count = int((energy.cumsum(0) < share * energy.sum()).sum()) + 1
    kept = directions[:, :count]
    return torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - kept @ kept.T


class RetainProjection(After):
    """Keeps linear layers' outputs for retained inputs, whatever the loss and the optimiser do.

    After every step the layer's whole change is multiplied by the projection onto the complement of the retained
    inputs: `dW <- dW P`, for a LoRA `down <- down P`. So `dW c = 0` for each retained input c. The change is
    projected, not the gradient, because Adam scales each gradient entry and so leaves the subspace again (as in
    published methods that project gradients), and weight decay leaves it too.

    The outputs are exactly kept where the layer's inputs do not change in training, as in the keys and values of
    cross-attention, which read the text. Deeper layers read inputs that other changes have moved.

    Args:
        student: Student whose linear layers are projected.
        projections: Projection of each layer, `(dim, dim)`; see `null_space`.
    """

    def __init__(self, student: Student, projections: Mapping[str, Tensor]) -> None:
        self.student = student
        self.found: dict[str, float] = {}
        self.projections = {path: p.to(paths.parameter(student.network, f"{path}.weight").device)
                            for path, p in projections.items()}  # fmt: skip

    def figures(self) -> dict[str, float]:
        """Give the figures of `erasability`, once it was called."""
        return self.found

    def start(self) -> None:
        """Project the change from which the training starts."""
        self.project()

    def apply(self, update: int, lr: float) -> None:
        """Project the change after a step."""
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Project the student's current change."""
        student = self.student
        if isinstance(student, LowRankStudent):
            for path, down in zip(student.paths, student.down, strict=True):
                if path in self.projections:
                    down.copy_(down.double() @ self.projections[path])
        elif isinstance(student, SubsetStudent):
            for path, value in zip(student.paths, student.values, strict=True):
                layer = path.removesuffix(".weight")
                if layer in self.projections and layer != path:
                    stock = paths.parameter(student.network, path).double()
                    value.copy_(stock + (value.double() - stock) @ self.projections[layer])

    def erasability(self, grams: Mapping[str, Tensor]) -> float:
        """Measure how much of the concept can change: the mean over layers of `|P c| / |c|`.

        A result below `ERASABLE` gives a warning: retained inputs nearly span the concept's, so it can hardly be
        erased.

        Args:
            grams: Gram matrices `(dim, dim)` of the inputs c of prompts with the concept, by layer.
        """
        shares = [
            float((self.projections[path].cpu() * gram.cpu()).sum().clamp_min(0) / gram.trace().cpu()) ** 0.5
            for path, gram in grams.items()
            if path in self.projections
        ]
        found = sum(shares) / max(len(shares), 1)
        if shares and found < ERASABLE:
            warnings.warn(
                f"what is retained leaves {found:.0%} of the concept free to change (below {ERASABLE:.0%}): it will "
                "hardly be erased. Retain less, or lower projection",
                ErasabilityWarning,
                stacklevel=2,
            )
        self.found["erasability"] = found
        return found


class GroupLasso(After):
    """Prunes whole attention layers from a LoRA, by the penalty `alpha * sum over groups of |A, B of the group|`.

    The penalty is applied as a proximal step after each optimiser step, `W_g <- W_g max(0, 1 - lr alpha / |W_g|)`,
    because a penalty in the loss gives small groups but no exact zeros. A group at zero stays there, because its
    gradient is zero.

    Args:
        student: Student with a LoRA.
        alpha: Weight of the penalty.
        since: First update after which groups are pruned.
    """

    def __init__(self, student: LowRankStudent, alpha: float, since: int = 0) -> None:
        self.alpha, self.since = alpha, since
        self.groups: dict[str, list[Tensor]] = {}
        for path, down, up in zip(student.paths, student.down, student.up, strict=True):
            self.groups.setdefault(group_of(path), []).extend([down, up])

    @torch.no_grad()
    def apply(self, update: int, lr: float) -> None:
        """Take one proximal step at this learning rate."""
        if update < self.since:
            return
        for tensors in self.groups.values():
            norm = torch.stack([tensor.norm() for tensor in tensors]).norm()
            if norm:
                factor = float((1 - lr * self.alpha / norm).clamp_min(0))
                for tensor in tensors:
                    tensor.mul_(factor)

    def figures(self) -> dict[str, float]:
        """Give the number of groups, and the number of pruned ones."""
        return {"layers_dropped": float(self.dropped()), "layers": float(len(self.groups))}

    def dropped(self) -> int:
        """Count the groups that are exactly zero."""
        return sum(not any(bool(tensor.any()) for tensor in tensors) for tensors in self.groups.values())


def group_of(path: str) -> str:
    """Give the attention or feed-forward layer of a linear layer: `...attn2.to_out.0` belongs to `...attn2`."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.startswith(("attn", "self_attn", "ff", "mlp")):
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])
