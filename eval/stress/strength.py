"""Sweeping the strength of the erasures: where does the concept go, and is strength 0 the stock model to the bit?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from diffusers import DiffusionPipeline

from erasure.errors import EvaluationError
from erasure.eval.attempts import Change
from erasure.eval.generation import generate
from erasure.eval.samples import Sample
from erasure.eval.stress import StressTest, register
from erasure.eval.stress.bench import Bench
from erasure.eval.stress.conditions import Condition
from erasure.eval.variants import Draw, Drawn
from erasure.options import NotNegative


@register("strength")
@dataclass(frozen=True, kw_only=True)
class Strength(StressTest):
    """Attach the erasures at several multiples of their strengths.

    At 0 every picture must equal the stock model's to the bit, else the run stops with an error: something of an
    erasure would stay in a model that is said to be without it.
    """

    title: ClassVar[str] = "the strength from 0, which must be the stock model to the bit, to beyond 1"
    paper: ClassVar[str] = "a sanity check"
    of_attackers: ClassVar[bool] = False
    control: ClassVar[str] = "at strength 0 every picture must equal the stock model's to the bit"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 2, "retained": 2, "strengths": (0.0, 0.5)},
        "quick": {"samples": 20, "retained": 12},
        "full": {},
    }

    strengths: tuple[NotNegative, ...] = (0.0, 0.25, 0.5, 0.75, 1.5, 2.0)
    """Factors on the strength of every erasure. 1 is the erased model as it is, which is drawn in any case, and 0 is
    always among them."""

    def conditions(self, bench: Bench) -> list[Condition]:
        """Give each strength; at 0 the pictures are compared with the stock model's."""
        made = []
        for scale in dict.fromkeys((0.0, *self.strengths)):
            if scale == 1:
                continue
            zero = scale == 0
            made.append(
                Condition(
                    f"strength_{scale:g}", change=_at(bench, scale), draw=_equal_to(bench.stock) if zero else None,
                    about=f"the erasures are at {scale:g} times their strength", compared=not zero,
                    control="positive" if zero else "", needs=() if zero else ("strength_0",),
                )
            )  # fmt: skip
        return made


def _at(bench: Bench, scale: float) -> Change:
    @contextmanager
    def change(_pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        yield bench.rebuilt(scale)

    return change


def _equal_to(stock: DiffusionPipeline) -> Draw:
    """Draw, and compare every picture with the stock model's of the same batch."""

    def draw(pipe: DiffusionPipeline, samples: Sequence[Sample], batch_size: int) -> Iterator[Drawn]:
        pairs = zip(generate(pipe, samples, batch_size), generate(stock, samples, batch_size), strict=True)
        for (batch, images), (_, expected) in pairs:
            for sample, image, other in zip(batch, images, expected, strict=True):
                own, base = np.asarray(image, dtype=np.int16), np.asarray(other, dtype=np.int16)
                if own.shape != base.shape or (own != base).any():
                    apart = "another size" if own.shape != base.shape else f"up to {np.abs(own - base).max()} of 255"
                    raise EvaluationError(
                        f"strength 0 is not the stock model: the picture of {sample.sample_id!r} differs from the "
                        f"stock model's ({apart}), expected: equal to the bit. The erasure leaves something behind "
                        "that its strength does not scale; report it, and do not trust its strengths"
                    )
            yield batch, images

    return draw
