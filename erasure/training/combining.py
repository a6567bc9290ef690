"""How the gradients of several losses are combined into the one that an optimiser takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Gradient = list[Tensor]
"""Gradients of a player's tensors, in their order."""
Scope = Literal["tensor", "all"]
NOISE = 1e-4
"""Norm of the kept gradient, relative to the other one, below which it is rounding noise. At the start the student
equals the teacher, so the retain loss is nearly zero and its gradient has a random direction."""


class Combine(ABC):
    """A rule that combines the gradients of an optimiser step's losses."""

    @abstractmethod
    def losses(self, terms: Mapping[str, Tensor]) -> list[Tensor]:
        """Group loss terms, by name, into the scalars that are differentiated separately."""

    @abstractmethod
    def combined(self, gradients: Sequence[Gradient]) -> Gradient:
        """Combine the gradients into the one for the optimiser.

        Args:
            gradients: Gradient of each of `losses`, over the whole batch.
        """


class Total(Combine):
    """The gradient of the sum of all terms."""

    def losses(self, terms: Mapping[str, Tensor]) -> list[Tensor]:
        """Give the sum of all terms."""
        return [added(list(terms.values()))]

    def combined(self, gradients: Sequence[Gradient]) -> Gradient:
        """Give the only gradient."""
        return gradients[0]


@dataclass(frozen=True)
class Surgery(Combine):
    r"""Removes from one gradient what opposes another (PCGrad, Yu et al. 2020, arXiv 2001.06782).

    With $a$ the gradient of all other terms and $b$ the gradient of the kept terms, where $\langle a, b \rangle < 0$

        pcgrad:    a - strength <a, b> / |b|^2 b
        released:  a' - strength <a' / |a'|, b' / |b'|> b' / |b'|        a', b': a and b, each of norm 1 at most

    and $a$ itself elsewhere. `released` is the code of DoCo, which lacks the factor |a|: where |a| is far below 1, as
    for single tensors, its result contains little of $a$.
    """

    kept: tuple[str, ...]
    """Names of the kept terms, whose decrease must not be undone. They enter only through the surgery, unless `add`
    is above 0."""
    form: Literal["pcgrad", "released"] = "pcgrad"
    scope: Scope = "tensor"
    """Whether inner products and norms are taken over each tensor, or over all tensors together."""
    strength: float = 1.0
    """Share of the opposing part that is removed."""
    add: float = 0.0
    """Weight of the kept gradient, which is added to the result."""

    def losses(self, terms: Mapping[str, Tensor]) -> list[Tensor]:
        """Give the sum of the other terms, and the sum of the kept terms."""
        others = [term for name, term in terms.items() if name not in self.kept]
        return [added(others), added([terms[name] for name in self.kept])]

    def combined(self, gradients: Sequence[Gradient]) -> Gradient:
        """Remove from the first gradient the part that opposes the second."""
        first, second = gradients
        if self.form == "released":
            first, second = shortened(first), shortened(second)
        if self.scope == "all":
            made = self._projected(flat(first), flat(second)).split([part.numel() for part in first])
            left = [part.view_as(like) for part, like in zip(made, first, strict=True)]
        else:
            left = [self._projected(a, b) for a, b in zip(first, second, strict=True)]
        return [a + self.add * b if self.add else a for a, b in zip(left, second, strict=True)]

    def _projected(self, a: Tensor, b: Tensor) -> Tensor:
        dot, squared = (a * b).sum(), (b * b).sum()
        below = squared * a.norm() if self.form == "released" else squared
        least = 0.0 if self.form == "released" else NOISE**2 * (a * a).sum()
        # The choice is made by arithmetic, so that no value leaves a GPU; a zero gradient opposes nothing.
        share = torch.where(
            (dot < 0) & (squared > least) & (below > 0), dot / below.clamp_min(torch.finfo(a.dtype).tiny), 0.0
        )
        return a - self.strength * share * b


def added(terms: Sequence[Tensor]) -> Tensor:
    """Add scalars in float32."""
    return torch.stack([term.float() for term in terms]).sum()


def flat(gradient: Gradient) -> Tensor:
    """Concatenate a gradient's tensors into one vector."""
    return torch.cat([part.flatten() for part in gradient])


def shortened(gradient: Gradient, most: float = 1.0) -> Gradient:
    """Clip a gradient to a norm of at most `most` over all tensors, as `clip_grad_norm_` does."""
    norm = torch.stack([part.norm() for part in gradient]).norm()
    factor = (most / (norm + 1e-6)).clamp_max(1.0)
    return [part * factor for part in gradient]
