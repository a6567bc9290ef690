"""Merging the erased model: averages with the stock model, and a LoRA of somebody's on top."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Gt, Lt
from diffusers import DiffusionPipeline

from erasure.attach import ErasureManager
from erasure.errors import EvaluationError
from erasure.eval.attempts import Change
from erasure.eval.rows import Record
from erasure.eval.stress import StressTest, register
from erasure.eval.stress.bench import Bench
from erasure.eval.stress.conditions import Condition
from erasure.eval.stress.files import fingerprint_of
from erasure.eval.stress.weights import mean_of, plain, with_values
from erasure.interop.pipelines import components_of
from erasure.options import NotNegative, PathText

ADAPTER = "stress"


@register("merge")
@dataclass(frozen=True, kw_only=True)
class Merge(StressTest):
    """Average the erased weights with the stock model's, as users do who merge checkpoints, or add a LoRA to them.

    An average `(1 - share) E + share B` holds `1 - share` of the edit: the question is where the concept is back.
    With a LoRA, the stock model with the same LoRA is the control: it must still show the concept.
    """

    title: ClassVar[str] = "averages with the stock model, and a LoRA added"
    paper: ClassVar[str] = "a stress test of this package"
    control: ClassVar[str] = "the stock model must show the concept, also with the LoRA"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 2, "retained": 2, "shares": (0.5,)},
        "quick": {"samples": 20, "retained": 12},
        "full": {},
    }

    shares: tuple[Annotated[float, Gt(0), Lt(1)], ...] = (0.1, 0.25, 0.5, 0.75)
    """Shares of the stock model in the average."""
    lora: PathText = ""
    """File or folder of a LoRA in a format that diffusers loads; none is added where it is left out."""
    lora_scale: NotNegative = 1.0
    """Scale of the LoRA."""

    def conditions(self, bench: Bench) -> list[Condition]:
        """Give the averages, the erased model with the LoRA, and the stock model with the LoRA as control."""
        made: list[Condition] = []
        if not self.shares and not self.lora:
            raise EvaluationError("nothing to merge with: give shares of the stock model, or a LoRA")
        if self.shares:
            edited = bench.require_edited("there is nothing to average; test them with 'strength', or a LoRA alone")
            stock = components_of(bench.stock)
            base = {name: {path: plain(stock[name], path) for path in some} for name, some in edited.items()}
            made += [
                Condition(
                    f"merge_{share:g}", change=with_values(edited, mean_of(base, share)), compared=True,
                    about=f"the erased model was averaged with the stock model, whose share is {share:g}",
                )
                for share in dict.fromkeys(self.shares)
            ]  # fmt: skip
        if self.lora:
            change = _with_lora(self.lora, self.lora_scale)
            made += [
                Condition(
                    "stock_lora", erased=False, change=change, roles=("target",), control="positive",
                    about="the LoRA was added to the stock model",
                ),
                Condition(
                    "lora", change=change, needs=("stock_lora",), compared=True,
                    about="the LoRA was added to the erased model",
                ),
            ]  # fmt: skip
        return made

    def recipe(self, bench: Bench) -> Record:
        """Give the options, with the LoRA's fingerprint instead of its path."""
        return super().recipe(bench) | {"lora": fingerprint_of(self.lora, "LoRA") if self.lora else ""}


def _with_lora(source: str, scale: float) -> Change:
    @contextmanager
    def change(pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        # Another object: diffusers wraps the layers that it adds a LoRA to.
        made = ErasureManager(pipe).twin()
        path = Path(source)
        where = {"weight_name": path.name} if path.is_file() else {}
        try:
            made.load_lora_weights(str(path.parent if path.is_file() else path), adapter_name=ADAPTER, **where)
            made.set_adapters(ADAPTER, scale)
        except Exception as error:  # diffusers has many
            text = str(error).strip().splitlines()
            raise EvaluationError(
                f"the LoRA {source} cannot be added to {type(pipe).__name__} "
                f"({type(error).__name__}: {text[0][:300] if text else 'no message'}): give one of this family"
            ) from error
        yield made

    return change
