"""UCE: Unified Concept Editing in Diffusion Models (Gandikota et al., WACV 2024, arXiv 2308.14761)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from erasure.carriers.edits import Edits
from erasure.options import NotNegative, Positive, Presets
from erasure.strategies.base import register
from erasure.strategies.closed_form import factors, solve
from erasure.strategies.closed_form.entry import Door, EntryEdit
from erasure.strategies.closed_form.written import LARGEST_LORA, Change, as_loras, as_maps, lora_bytes


@register("uce")
@dataclass(frozen=True, kw_only=True)
class UCE(EntryEdit):
    """Rewrite what the denoiser's text layers make of the concept, in closed form.

    For each linear layer `W` through which text enters the denoiser (cross-attention keys and values; in transformers
    the layer that reads the tokens), minimise

        sum_e s_e |W' c_e - W c_a|^2 + sum_p s_p |W' c_p - W c_p|^2 + lambda |W' - W|^2

    over `W'`, with erased features `c_e`, the features `c_a` that take their place, and preserved features `c_p`. The
    solution is `W' = W + W X` with one matrix `X = (sum_e s_e (c_a - c_e) c_e^T) M^-1`,
    `M = sum_e s_e c_e c_e^T + sum_p s_p c_p c_p^T + lambda I`, shared by all layers; its rank is at most the number of
    erased features. The file holds X once, in as few numbers as keep its effect. Biases cancel and stay untouched.
    A layer that reads a pooled vector of the prompt gets an X of its own, from the pooled vectors of the same prompts,
    in those of its columns that read it. Of a text encoder whose tokens see those that follow (T5), every token of a
    prompt carries the concept, so all are erased; a few of its paddings stand for the rest.

    Preset `released` is the authors' script of 2025: of every bare name the last token is erased, and the anchor's
    last token takes its place; where there is no anchor, that of "art" for a style and the start token for an object.
    Names on the retain lists are preserved, and nothing else.

    Protects released weights against prompts; learned embeddings can bring the concept back.
    """

    title: ClassVar[str] = "closed-form edit of cross-attention keys and values"
    paper: ClassVar[str] = "Gandikota et al. 2024, arXiv 2308.14761"

    erase_scale: Positive = 10.0
    """Weight s_e of an erased feature (released code: 1, with far fewer preserved ones against it)."""
    preserve_scale: NotNegative = 1.0
    """Weight s_p of a preserved feature (released code: 1)."""
    regularisation: Positive = 0.5
    """lambda (released code: 0.5)."""
    relative: bool = True
    """Whether lambda is in mean squares of the features' values, about 1 in Stable Diffusion and very different in
    other text encoders; else it is a plain number (released code)."""
    saved_as: Literal["auto", "lora", "map"] = "auto"
    """`lora`: a LoRA that other programs load too, with factors for every layer. `map`: X once for all layers, some
    thirty times smaller, which this package reads. `auto`: the LoRA while it takes no more than 1 MB a concept."""

    presets: ClassVar[Presets] = {
        "released": {
            "tokens": "last", "templates": False, "style_anchor": "art", "preserve_start": False, "vocabulary": 0,
            "regularisation": 0.5, "relative": False, "erase_scale": 1.0, "preserve_scale": 1.0, "tolerance": 0.0,
        },
    }  # fmt: skip

    def ignores_retain(self) -> str:
        """See `Strategy.ignores_retain`."""
        return "" if self.preserve_scale else "preserve_scale"

    def changes(self, door: Door, seed: int) -> list[Change]:
        """One change for all layers; see `EntryEdit.changes`."""
        return [Change(door.layers, door.weights, *factors(self.map_of(door)), door.features)]

    def map_of(self, door: Door) -> Tensor:
        """X, `(dim, dim)` float64."""
        weight = self.regularisation * (door.mean_square if self.relative else 1.0)
        return solve(door.erased, door.replacing, door.preserved, self.erase_scale, self.preserve_scale, weight)

    def written(self, changes: Sequence[Change], concepts: int) -> tuple[Edits, int]:
        """The changes as a LoRA, or as maps where a LoRA would be large; see `saved_as` and `EntryEdit.written`."""
        short = [change.shortened(self.tolerance) for change in changes]
        large = lora_bytes(changes, short) > LARGEST_LORA * concepts
        as_map = self.saved_as == "map" or (self.saved_as == "auto" and large)
        edits = Edits(maps=as_maps(changes, short)) if as_map else Edits(as_loras(changes, self.tolerance))
        return edits, sum(len(down) for _, down in short)
