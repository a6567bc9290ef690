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
from erasure.strategies.closed_form.entry import EntryEdit, EntryGroup
from erasure.strategies.closed_form.written import LARGEST_LORA, Change, as_loras, as_maps, lora_bytes


@register("uce")
@dataclass(frozen=True, kw_only=True)
class UCE(EntryEdit):
    """Edit the denoiser's text layers in closed form, so that they give the anchor's outputs for the concept.

    For each linear layer `W` through which text enters the denoiser (cross-attention keys and values; in transformers
    the layer that reads the tokens), minimise

        sum_e s_e |W' c_e - W c_a|^2 + sum_p s_p |W' c_p - W c_p|^2 + lambda |W' - W|^2

    over `W'`, with erased features `c_e`, the features `c_a` that replace them, and preserved features `c_p`. The
    solution is `W' = W + W X` with one matrix `X = (sum_e s_e (c_a - c_e) c_e^T) M^-1`,
    `M = sum_e s_e c_e c_e^T + sum_p s_p c_p c_p^T + lambda I`, shared by all layers; its rank is at most the number of
    erased features. The file contains X once, compressed within `tolerance`. Biases do not change, because they
    cancel. Layers that read a pooled vector of the prompt get another X, computed from the pooled vectors of the same
    prompts, in the weight columns that read it. In a text encoder with bidirectional attention (T5) every token of a
    prompt carries the concept, so all of them are erased; a few padding tokens represent the rest of the padding.

    Preset `released` is the authors' script of 2025. It erases the last token of every bare name and replaces it by
    the anchor's last token; without an anchor by that of "art" for a style, and by the start token for an object. Only
    names on retain lists are preserved.

    Protects released weights against prompts. Learned embeddings can bring the concept back.
    """

    title: ClassVar[str] = "closed-form edit of cross-attention keys and values"
    paper: ClassVar[str] = "Gandikota et al. 2024, arXiv 2308.14761"

    erase_scale: Positive = 10.0
    """Weight s_e of an erased feature (released code: 1, with far fewer preserved features)."""
    preserve_scale: NotNegative = 1.0
    """Weight s_p of a preserved feature (released code: 1)."""
    regularisation: Positive = 0.5
    """Weight lambda of the squared change (released code: 0.5)."""
    relative: bool = True
    """Scale lambda by the mean square of the features' values, which is about 1 in Stable Diffusion and very
    different in other text encoders; when off, lambda is an absolute number (released code)."""
    saved_as: Literal["auto", "lora", "map"] = "auto"
    """File format of the result. `lora`: a LoRA that other programs can load too, with factors for every layer.
    `map`: X once for all layers, about thirty times smaller, which only this package can load. `auto`: the LoRA
    while it takes at most 1 MB per concept, else the map."""

    presets: ClassVar[Presets] = {
        "released": {
            "tokens": "last", "templates": False, "style_anchor": "art", "preserve_start": False, "vocabulary": 0,
            "regularisation": 0.5, "relative": False, "erase_scale": 1.0, "preserve_scale": 1.0, "tolerance": 0.0,
        },
    }  # fmt: skip

    def ignores_retain(self) -> str:
        """Name of an option that makes retain lists ineffective, see `Strategy.ignores_retain`."""
        return "" if self.preserve_scale else "preserve_scale"

    def changes(self, group: EntryGroup, seed: int) -> list[Change]:
        """Compute one change for all layers, see `EntryEdit.changes`."""
        return [Change(group.layers, group.weights, *factors(self.map_of(group)), group.features)]

    def map_of(self, group: EntryGroup) -> Tensor:
        """Compute X, `(dim, dim)` float64."""
        weight = self.regularisation * (group.mean_square if self.relative else 1.0)
        return solve(group.erased, group.replacing, group.preserved, self.erase_scale, self.preserve_scale, weight)

    def written(self, changes: Sequence[Change], concepts: int) -> tuple[Edits, int]:
        """Convert the changes into a LoRA, or into maps where it would be large; see `saved_as`."""
        short = [change.shortened(self.tolerance) for change in changes]
        large = lora_bytes(changes, short) > LARGEST_LORA * concepts
        as_map = self.saved_as == "map" or (self.saved_as == "auto" and large)
        edits = Edits(maps=as_maps(changes, short)) if as_map else Edits(as_loras(changes, self.tolerance))
        return edits, sum(len(down) for _, down in short)
