"""SPEED: Scalable, Precise, and Efficient Concept Erasure (Li et al., ICLR 2026, arXiv 2503.07392)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from erasure.backbones.conditioning import Source
from erasure.concept import Concept
from erasure.options import Count, CountOrZero, NotNegative, Positive, Presets
from erasure.strategies.base import register
from erasure.strategies.closed_form import solve
from erasure.strategies.closed_form.entry import EntryEdit, EntryGroup
from erasure.strategies.closed_form.null_space import centres, constrained, null_space
from erasure.strategies.closed_form.written import Change
from erasure.text.encodings import Reader

FEW = {
    "tokens": "last", "templates": False, "style_anchor": "art", "preserve_start": False, "vocabulary": 0,
    "layers": "values", "relative": False, "regularisation": 1.0, "threshold": 1e-1, "influence": True,
    "augmentations": 10, "augmented_directions": 1, "centroids": 3, "leniency": 0.0, "averaged": False,
    "tolerance": 0.0,
}  # fmt: skip
"""Options of the recipe for a few objects or styles."""
MANY = {**FEW, "threshold": 1e-4, "regularisation": 0.05, "influence": False}
"""Options of the recipe for 10 to 100 people."""
NUDITY = {**FEW, "tokens": "all", "regularisation": 0.7, "leniency": 0.5}


@register("speed")
@dataclass(frozen=True, kw_only=True)
class SPEED(EntryEdit):
    """Change the denoiser's text layers only in directions that preserved features do not use.

    For each layer `W` through which text enters the denoiser, find the change `D P` that minimises

        |(W + D P) C_1 - W C_*|^2 + s |D P|^2    such that    D P C_2 = 0

    with erased features `C_1`, the features `C_*` that replace them, and invariants `C_2`: the start token and the
    centres of the empty prompt's other tokens. `P` projects onto the null space of the preserved features, the
    directions in which they have almost no energy, so that the outputs for preserved features stay whatever `D` is.
    The solution is `W (C_* - C_1) C_1^T P Q M`; see `closed_form.null_space.constrained`. Its rank is at most the
    number of erased features. The null space shrinks with the number of preserved features, so these are chosen for
    each layer:

    - *Filtering by influence*: only those preserved features are used that the unconstrained change would move by more
      than the mean.
    - *Directed augmentation*: noise is added to each feature along the directions to which `W` responds least, which
      gives features of similar meaning; of these, too, only those are used that are moved by more than the mean.

    Layers that read a pooled vector of the prompt are changed in the same way, from the pooled vectors of the same
    prompts, with that of the empty prompt as the invariant.

    Presets `paper` and `released` are the recipe for a few objects or styles, `-many` that for 10 to 100 people,
    `-nudity` that for nudity. Where the paper sums over concepts, the code averages. The code preserves its own list
    of names; here names that must survive are given as retain lists, of which the bare names are used, and without any
    list the empty prompt is preserved. The code's noise comes from a GPU's random generator and cannot be reproduced.

    Protects released weights against prompts; learned embeddings can bring the concept back.
    """

    title: ClassVar[str] = "closed-form edit of keys and values in the null space of what is preserved"
    paper: ClassVar[str] = "Li et al. 2026, arXiv 2503.07392"

    layers: Literal["values", "keys", "both"] = "both"
    """Which layers of a cross-attention are changed (paper: values, which on Canvas leaves more of a style). Layers
    before all attention, through which text enters a transformer, are always changed."""
    regularisation: Positive = 1.0
    """Weight s of the squared change (paper: 1; released code: 0.05 for 10 to 100 people, 0.7 for nudity)."""
    relative: bool = True
    """Scale s, the threshold and the noise by the mean square of the features' values, which is about 1 in Stable
    Diffusion and very different in other text encoders; when off, they are absolute numbers (released code)."""
    threshold: Positive = 3e-2
    """Mean square of the preserved features along a direction below which the direction belongs to the null space
    (released code: 1e-1, with which similar concepts suffer on Canvas; 1e-4 for 10 to 100 people)."""
    influence: bool = True
    """Preserve only features that the unconstrained change would move by more than the mean (released code: off for
    people)."""
    augmentations: CountOrZero = 10
    """Number of noisy copies of each preserved feature (released code: 10)."""
    augmented_directions: Count = 1
    """Number of directions of the noise, which are those of a layer's smallest singular values (released code: 1)."""
    centroids: CountOrZero = 3
    """Number of centres of the empty prompt's tokens that are invariants, in addition to its start token (released
    code: 3)."""
    leniency: NotNegative = 0.0
    """How far invariants may move: ridge coefficient of their constraint (released code: 0; 0.5 for nudity). 0
    keeps them exactly."""
    averaged: bool = False
    """Average over the erased prompts (released code); when off, sum over them."""

    presets: ClassVar[Presets] = {
        "paper": FEW,
        "paper-many": MANY,
        "paper-nudity": NUDITY,
        **{f"released{name}": {**preset, "averaged": True}
           for name, preset in (("", FEW), ("-many", MANY), ("-nudity", NUDITY))},
    }  # fmt: skip

    def changes(self, group: EntryGroup, seed: int) -> list[Change]:
        """Compute a change for each layer, see `EntryEdit.changes`.

        Raises:
            OptionError: The null space of the preserved features is empty in every layer, or erased features have no
                part in it.
        """
        unit = group.mean_square if self.relative else 1.0
        share = self.prompts(group) ** -0.5 if self.averaged else 1.0
        erased, replacing = share * group.erased, share * group.replacing
        empty = self.empty_prompt(group)
        preserved = group.preserved if len(group.preserved) else empty.rest
        invariant = torch.cat([empty.start, centres(empty.rest, self.centroids)])
        # Change of a layer's input by the closed form without constraint.
        free = solve(erased, replacing, preserved[:0], 1.0, 0.0, unit)
        generator = torch.Generator().manual_seed(seed)
        made = []
        for layer, weight in zip(group.layers, group.weights, strict=True):
            if self.layers in ("both", layer.part) or layer.part == "both":
                covariance = self.refined(weight, free, preserved, unit**0.5, generator)
                space = null_space(covariance, self.threshold * unit)
                right = constrained(erased, space, invariant, self.regularisation * unit, self.leniency * unit)
                made.append(Change([layer], [weight], (replacing - erased).T, right, group.features))
        if not any((change.right.norm() > 1e-9 * change.left.norm()) for change in made):
            self.refuse(
                "threshold", self.threshold,
                f"a larger one: preserved features leave no direction in which the concept's {group.source} go; or "
                "preserve less, by shorter retain lists and a smaller vocabulary",
            )  # fmt: skip
        return made

    def preserved_features(self, reader: Reader, source: Source, concepts: Sequence[Concept], seed: int) -> Tensor:
        """See `EntryEdit.preserved_features`; of bare names only the last tokens are preserved (released code)."""
        if self.tokens == "all" and not self.templates:
            return replace(self, tokens="last").preserved_features(reader, source, concepts, seed)
        return super().preserved_features(reader, source, concepts, seed)

    def refined(self, weight: Tensor, free: Tensor, preserved: Tensor, size: float, generator: Generator) -> Tensor:
        """Compute the mean outer product of a layer's preserved features, filtered and augmented, `(dim, dim)`.

        Args:
            weight: Weight of the layer, `(out, dim)`.
            free: Matrix `(dim, dim)` of the closed form without constraint, which adds `free c` to an input c of the
                layer.
            preserved: Preserved features, `(preserved, dim)`.
            size: Standard deviation of the noise along each direction.
            generator: Draws the noise.
        """
        shift = weight @ free
        if self.influence:
            preserved = preserved[_above_mean((preserved @ shift.T).norm(dim=1))]
        directions = torch.linalg.svd(weight, full_matrices=False).Vh[-self.augmented_directions :]
        shape = (len(preserved), self.augmentations, len(directions))
        noise = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        # This computes |shift (c + V s)|^2 for every copy without making the copies.
        along = directions @ shift.T
        own = preserved @ shift.T
        moved = own.square().sum(1)[:, None] + 2 * (noise @ (own @ along.T)[:, :, None])[..., 0]
        moved = moved + ((noise @ (along @ along.T)) * noise).sum(2)
        kept = _above_mean(moved.clamp_min(0).sqrt()).double()
        mixed = preserved.T @ (kept[..., None] * noise).sum(1) @ directions
        added = torch.einsum("na,nai,naj->ij", kept, noise, noise)
        total = preserved.T @ ((1 + kept.sum(1, keepdim=True)) * preserved)
        total = total + mixed + mixed.T + directions.T @ added @ directions
        return total / (len(preserved) + kept.sum())

    def prompts(self, group: EntryGroup) -> int:
        """Give the number of erased prompts."""
        return sum(len(self.pairs(group.reader.backbone.reader, concept)) for concept in group.concepts)

    def empty_prompt(self, group: EntryGroup) -> EmptyPrompt:
        """Give the features of the empty prompt that the layers read."""
        states = group.reader.read([""])([""]).of(group.source)[0].double().cpu()
        if group.source == "pooled":
            return EmptyPrompt(states, states[:0])
        start, rest = [states[:0]], [states[:0]]
        for run in group.reader.backbone.token_runs:
            first = run.first + run.tower.leading
            stop = None if run.tokens is None else run.first + run.tokens
            start.append(states[run.first : first])
            rest.append(states[first:stop])
        return EmptyPrompt(torch.cat(start), torch.cat(rest))


class EmptyPrompt(NamedTuple):
    """Features of the empty prompt, `(n, dim)` float64 each."""

    start: Tensor
    """Features of the start tokens, or the pooled vector."""
    rest: Tensor
    """Features of all other tokens."""


def _above_mean(values: Tensor) -> Tensor:
    """Mark values above their mean; all values where they are equal."""
    return values >= values.mean().clamp_max(values.max()) if values.numel() else values > 0
