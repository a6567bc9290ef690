"""Noise on the erased weights: does a small disturbance bring the concept back?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from erasure.eval.attempts import Change
from erasure.eval.stress import StressTest, register
from erasure.eval.stress.bench import Bench, Edited
from erasure.eval.stress.conditions import Condition, with_control
from erasure.eval.stress.weights import noise_like, with_values
from erasure.interop import paths
from erasure.interop.pipelines import components_of
from erasure.options import Count, Positive


@register("noise")
@dataclass(frozen=True, kw_only=True)
class Noise(StressTest):
    """Add Gaussian noise to the weights of the erased model, relative to the spread of each parameter.

    The same noise, number for number, is added to the stock model: where that no longer shows the concept, the noise
    has ruined the model.
    """

    title: ClassVar[str] = "Gaussian noise on the weights, relative to their spread"
    paper: ClassVar[str] = "a stress test of this package"
    control: ClassVar[str] = "the stock model must still show the concept under the same noise"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 2, "retained": 2, "levels": (0.01,), "draws": 1},
        "quick": {"samples": 20, "retained": 12, "draws": 1},
        "full": {},
    }

    levels: tuple[Positive, ...] = (0.01, 0.03, 0.1)
    """Standard deviations of the noise, over that of the values of each parameter."""
    draws: Count = 3
    """Times that noise of each level is drawn anew."""
    weights: Literal["edited", "all"] = "edited"
    """What is disturbed: the parameters that the erasures change, or all of the components that they change (those of
    the denoiser where they change none)."""

    def conditions(self, bench: Bench) -> list[Condition]:
        """Give each level and draw on the erased model, and on the stock model as control."""
        chosen = self.chosen(bench)
        made = []
        for level in dict.fromkeys(self.levels):
            for number in range(self.draws):
                name = f"noise_{level:g}" + (f"_{number + 1}" if self.draws > 1 else "")
                change = _disturbed(bench, chosen, level, number)
                made += with_control(
                    name, change, f"noise of {level:g} was added to the erased model",
                    f"noise of {level:g} was added to the stock model",
                )  # fmt: skip
        return made

    def chosen(self, bench: Bench) -> Edited:
        """Choose the parameters that get noise.

        Raises:
            EvaluationError: The erasures change none, and only such were asked for.
        """
        if self.weights == "edited":
            return bench.require_edited("disturb all weights of the denoiser instead (weights='all')")
        components = list(bench.edited) or [bench.backbone.denoiser_component]
        return {name: list(paths.canonical_parameters(components_of(bench.pipe)[name])) for name in components}


def _disturbed(bench: Bench, chosen: Edited, level: float, number: int) -> Change:
    """Make a change that adds noise, scaled by the stock model's values so that both models get the same."""
    stock = components_of(bench.stock)

    def values(component: str, path: str, own: Tensor) -> Tensor:
        base = paths.parameter(stock[component], path)
        return own.float() + noise_like(base, level, bench.seed, "noise", number, component, path).to(own.device)

    return with_values(chosen, values)
