"""What any turn can take behind its steps: retained inputs that no step may touch, and blocks that it may drop."""

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
"""Share of a concept's input that must be free to change; below it, what is retained spans the concept."""


class ErasabilityWarning(UserWarning):
    """What must be retained leaves little of the concept that could be changed."""


class InputGrams:
    """Gram matrices of the inputs of linear layers, gathered while a network runs on what must be retained."""

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}

    @contextmanager
    def gathering(self, network: nn.Module, layers: Sequence[str]) -> Iterator[None]:
        """Add every input of these layers inside, in float64."""
        handles = [paths.layer(network, path).register_forward_pre_hook(partial(self._add, path)) for path in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, columns: Mapping[str, slice]) -> None:
        """Forget all inputs of some layers but those to some columns of their weights."""
        for path in columns.keys() & self.grams.keys():
            gram, kept = self.grams[path], columns[path]
            self.grams[path] = torch.zeros_like(gram)
            self.grams[path][kept, kept] = gram[kept, kept]

    def _add(self, path: str, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().flatten(0, -2).double()
        self.grams[path] = self.grams.get(path, 0) + rows.T @ rows


def null_space(gram: Tensor, share: float) -> Tensor:
    """Projection onto the directions that retained inputs leave free, `(dim, dim)` float64.

    Args:
        gram: `(dim, dim)`, sum of outer products of the inputs.
        share: Of the inputs' energy to be protected; 1 protects all that they span (to a relative 1e-10).
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
    """Keeps what linear layers make of retained inputs, whatever the loss and the optimiser do.

    After every step the layer's whole change is multiplied by the projection onto the complement of the retained
    inputs: `dW <- dW P`, for a LoRA `down <- down P`. So `dW c = 0` for each retained input c. It is the step that is
    projected, not the gradient: Adam divides each gradient entry by its own scale and so leaves the subspace again
    (as published projections of gradients do), and weight decay leaves it too.

    Exact where the layer's inputs are fixed, as for the cross-attention's keys and values, which read the text; deeper
    layers see inputs that other changes have moved.

    Args:
        student: Its linear layers are projected.
        projections: `(dim, dim)` by layer; see `null_space`.
    """

    def __init__(self, student: Student, projections: Mapping[str, Tensor]) -> None:
        self.student = student
        self.found: dict[str, float] = {}
        self.projections = {path: p.to(paths.parameter(student.network, f"{path}.weight").device)
                            for path, p in projections.items()}  # fmt: skip

    def figures(self) -> dict[str, float]:
        """How much of the concept is free to change, once that was asked."""
        return self.found

    def start(self) -> None:
        """Project what the training starts from."""
        self.project()

    def apply(self, update: int, lr: float) -> None:
        """Project what a step has made."""
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Project the change that there is now."""
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
        """How much of the concept is free to change: the mean over layers of `|P c| / |c|`.

        Below `ERASABLE` it warns: then what is retained spans the concept, and erasing it means losing some of that.

        Args:
            grams: By layer, `(dim, dim)` of the inputs c of prompts with the concept.
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
    """Drops whole attention blocks from a LoRA: `alpha * sum over groups of |A, B of the group|`.

    Applied as the proximal step of the penalty after each optimiser step, `W_g <- W_g max(0, 1 - lr alpha / |W_g|)`:
    a penalty in the loss gives small groups but never exact zeros. A group that reached zero stays there, for its
    gradient is zero.

    Args:
        student: A LoRA.
        alpha: Weight of the penalty.
        since: First update that prunes.
    """

    def __init__(self, student: LowRankStudent, alpha: float, since: int = 0) -> None:
        self.alpha, self.since = alpha, since
        self.groups: dict[str, list[Tensor]] = {}
        for path, down, up in zip(student.paths, student.down, student.up, strict=True):
            self.groups.setdefault(group_of(path), []).extend([down, up])

    @torch.no_grad()
    def apply(self, update: int, lr: float) -> None:
        """One proximal step at this learning rate."""
        if update < self.since:
            return
        for tensors in self.groups.values():
            norm = torch.stack([tensor.norm() for tensor in tensors]).norm()
            if norm:
                factor = float((1 - lr * self.alpha / norm).clamp_min(0))
                for tensor in tensors:
                    tensor.mul_(factor)

    def figures(self) -> dict[str, float]:
        """How many groups there are, and how many were dropped."""
        return {"layers_dropped": float(self.dropped()), "layers": float(len(self.groups))}

    def dropped(self) -> int:
        """Groups that are exactly zero."""
        return sum(not any(bool(tensor.any()) for tensor in tensors) for tensors in self.groups.values())


def group_of(path: str) -> str:
    """The attention or feed-forward layer that a linear layer belongs to: `...attn2.to_out.0` is of `...attn2`."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.startswith(("attn", "self_attn", "ff", "mlp")):
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])
