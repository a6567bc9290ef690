"""Quantising the erased weights: does rounding to 8 or 4 bits bring the concept back?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.errors import EvaluationError
from erasure.eval.rows import Record
from erasure.eval.stress import StressTest, register
from erasure.eval.stress.bench import Bench, Edited
from erasure.eval.stress.conditions import Condition, with_control
from erasure.eval.stress.formats import FORMATS, NF4_BLOCK
from erasure.eval.stress.weights import plain, with_values
from erasure.extras import require
from erasure.interop.pipelines import components_of

Format = Literal["int8", "int4", "nf4"]


@register("quantise")
@dataclass(frozen=True, kw_only=True)
class Quantise(StressTest):
    """Send the weights of the erased model through few bits and back, and draw with what is left of them.

    All linear layers of the components that the erasures change are quantised, with the edits written into them: that
    is what a user does who folds an erasure and quantises the model. Edits that live in hooks stay as they are. The
    stock model goes through the same round trip; where it no longer shows the concept, the format has ruined the
    model, and the erasure's silence proves nothing.

    `edit_survives` needs no image: the share of the edit that is left along its own direction,
    `<Q(E) - Q(B), E - B> / |E - B|^2`, with the share of codes that change. Rounding acts like dither, so an edit of
    few changed codes can survive whole.
    """

    title: ClassVar[str] = "the weights rounded to 8 and 4 bits"
    paper: ClassVar[str] = "Zhang et al. 2025 (ICLR), for language models; MANSU, arXiv 2605.15138"
    control: ClassVar[str] = "the stock model must still show the concept after the same rounding"
    metrics: ClassVar[tuple[str, ...]] = (*StressTest.metrics, "edit_survives")
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 2, "retained": 2},
        "quick": {"samples": 20, "retained": 12},
        "full": {},
    }

    formats: tuple[Format, ...] = ("int8", "int4", "nf4")
    """`int8`: one scale a row; `int4`: groups of 128 with a scale and a zero; `nf4`: blocks of 64."""
    backend: Literal["torch", "torchao", "bitsandbytes"] = "torch"
    """Who rounds: this package in plain torch, or a library that is installed: torchao (`int8`) or bitsandbytes
    (`nf4`)."""
    convolutions: bool = False
    """Whether convolutions are rounded too; the libraries leave them alone."""

    def __post_init__(self) -> None:
        """Check that the backend has the formats."""
        super().__post_init__()
        if not self.formats:
            self.refuse("formats", self.formats, "at least one of 'int8', 'int4', 'nf4'")
        if unknown := [each for each in self.formats if each not in BACKENDS[self.backend]]:
            self.refuse(
                "formats", unknown[0],
                f"{', '.join(BACKENDS[self.backend])} with backend {self.backend!r}; take backend 'torch' for all",
            )  # fmt: skip
        if self.convolutions and self.backend != "torch":
            self.refuse("convolutions", True, f"False with backend {self.backend!r}, which rounds linear layers only")

    def conditions(self, bench: Bench) -> list[Condition]:
        """Give each format on the erased model, and on the stock model as control."""
        chosen = self.chosen(bench)
        made = []
        for name in self.formats:
            change = with_values(chosen, partial(_rounded, self, name))
            made += with_control(
                name, change, f"the erased model was rounded to {name}", f"the stock model was rounded to {name}"
            )
        return made

    def chosen(self, bench: Bench) -> Edited:
        """Choose what is rounded: linear layers of the components that erasures change, else of the denoiser.

        Raises:
            EvaluationError: A component has no linear layer.
        """
        components = list(bench.edited) or [bench.backbone.denoiser_component]
        found = {name: bench.linear(name, convolutions=self.convolutions) for name in components}
        if empty := [name for name, some in found.items() if not some]:
            raise EvaluationError(
                f"the {empty[0]} has no linear layer to quantise: pass convolutions=True (--convolutions)"
            )
        return found

    def rounded(self, weight: Tensor, name: str) -> Tensor:
        """Round a weight, and give it in float32."""
        return BACKENDS[self.backend][name](weight)

    @torch.no_grad()
    def measured(self, bench: Bench) -> dict[str, Record]:
        """Measure how much of the edits is left after rounding; see the class."""
        found: dict[str, Record] = {}
        chosen = {name: set(some) for name, some in self.chosen(bench).items()}
        edited = {name: [p for p in some if p in chosen.get(name, ())] for name, some in bench.edited.items()}
        erased, stock = components_of(bench.pipe), components_of(bench.stock)
        for name in self.formats:
            along = size = codes = flips = 0.0
            layers = 0
            for component, some in edited.items():
                for path in some:
                    after, before = plain(erased[component], path).float(), plain(stock[component], path).float()
                    edit = (after - before).double()
                    left = (self.rounded(after, name) - self.rounded(before, name)).double()
                    along, size = along + float((left * edit).sum()), size + float(edit.square().sum())
                    first, second = FORMATS[name](before).codes, FORMATS[name](after).codes
                    flips, codes = flips + float((first != second).sum()), codes + first.numel()
                    layers += 1
            key = f"edit_survives/{name}"
            if not layers or not size:
                reason = "no linear layer that is rounded holds an edit: the erasure lives elsewhere"
                found[key] = {"value": None, "n": 0, "reason": reason}
            else:
                found[key] = {"value": along / size, "n": layers, "codes_changed": flips / codes}
        return found


def _rounded(test: Quantise, name: str, _component: str, _path: str, own: Tensor) -> Tensor:
    return test.rounded(own, name)


def _torch(name: str) -> Callable[[Tensor], Tensor]:
    return lambda weight: FORMATS[name](weight).value


def _torchao(weight: Tensor) -> Tensor:
    """Round a weight by torchao's int8 quantisation of a linear layer, weights only."""
    require("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    layer.weight = nn.Parameter(weight.float().clone(), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig())
    quantised: Any = layer.weight
    value: Tensor = quantised.dequantize()
    return value.float()


def _bitsandbytes(weight: Tensor) -> Tensor:
    """Round a weight by bitsandbytes' NF4 in blocks of 64."""
    require("bitsandbytes")
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    value: Tensor = functional.dequantize_4bit(packed, state)
    return value.float()


BACKENDS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "torch": {name: _torch(name) for name in FORMATS},
    "torchao": {"int8": _torchao},
    "bitsandbytes": {"nf4": _bitsandbytes},
}
"""Round trips by backend and format."""
