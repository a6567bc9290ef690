"""How the gradients of several losses become the one that an optimiser takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Gradient = list[Tensor]
"""Of each of a player's tensors, in their order."""
Scope = Literal["tensor", "all"]
NOISE = 1e-4
"""Length of a kept gradient, relative to the other one, below which it is rounding: at the start a student still is
what it is kept at, and the direction of what little differs is random."""


class Combine(ABC):
    """Takes gradients of a turn's losses apart, and makes one of them."""

    @abstractmethod
    def losses(self, terms: Mapping[str, Tensor]) -> list[Tensor]:
        """The scalars that are differentiated apart from one another, made of loss terms by name."""

    @abstractmethod
    def combined(self, gradients: Sequence[Gradient]) -> Gradient:
        """What the optimiser takes.

        Args:
            gradients: One for each of `losses`, of the whole batch.
        """


class Total(Combine):
    """The gradient of the sum of all terms."""

    def losses(self, terms: Mapping[str, Tensor]) -> list[Tensor]:
        """Their sum."""
        return [added(list(terms.values()))]

    def combined(self, gradients: Sequence[Gradient]) -> Gradient:
        """The only one."""
        return gradients[0]


@dataclass(frozen=True)
class Surgery(Combine):
    r"""Takes from one gradient what is opposed to another (PCGrad, Yu et al. 2020, arXiv 2001.06782).

    With $a$ the gradient of all other terms and $b$ that of the kept ones, where $\langle a, b \rangle < 0$

        pcgrad:    a - strength <a, b> / |b|^2 b
        released:  a' - strength <a' / |a'|, b' / |b'|> b' / |b'|        a', b': a and b, each of norm 1 at most

    and $a$ itself elsewhere. `released` is the code of DoCo, which lacks the factor |a|: where |a| is far below 1, as
    it is for single tensors, little of $a$ is left in what it gives.
    """

    kept: tuple[str, ...]
    """Names of the terms whose decrease must not be undone. They enter by the surgery alone, unless `add` says so."""
    form: Literal["pcgrad", "released"] = "pcgrad"
    scope: Scope = "tensor"
    """Whether products and norms are those of each tensor, or of all together."""
    strength: float = 1.0
    """Share of the opposed part that is taken away."""
    add: float = 0.0
    """Weight at which the kept gradient itself is added."""

    def losses(self, terms: Mapping[str, Tensor]) -> list[Tensor]:
        """The sum of the other terms and that of the kept ones."""
        others = [term for name, term in terms.items() if name not in self.kept]
        return [added(others), added([terms[name] for name in self.kept])]

    def combined(self, gradients: Sequence[Gradient]) -> Gradient:
        """The first gradient without what is opposed to the second."""
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
        # Chosen by arithmetic, so that no value has to leave a GPU; a gradient of zero is opposed to nothing.
        share = torch.where(
            (dot < 0) & (squared > least) & (below > 0), dot / below.clamp_min(torch.finfo(a.dtype).tiny), 0.0
        )
        return a - self.strength * share * b


def added(terms: Sequence[Tensor]) -> Tensor:
    """The sum of scalars, in float32."""
    return torch.stack([term.float() for term in terms]).sum()


def flat(gradient: Gradient) -> Tensor:
    """All of a gradient as one vector."""
    return torch.cat([part.flatten() for part in gradient])


def shortened(gradient: Gradient, most: float = 1.0) -> Gradient:
    """A gradient whose norm over all tensors is `most` at most, as `clip_grad_norm_` makes it."""
    norm = torch.stack([part.norm() for part in gradient]).norm()
    factor = (most / (norm + 1e-6)).clamp_max(1.0)
    return [part * factor for part in gradient]
