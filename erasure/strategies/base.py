"""The base class of strategies, and their registry."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from erasure.errors import IgnoredRetainWarning, UnknownStrategyError
from erasure.needs import Need
from erasure.options import Options
from erasure.registry import Registry

if TYPE_CHECKING:
    from erasure.backbones import Backbone
    from erasure.carriers.edits import Edits
    from erasure.concept import Concept

BUILTIN = (
    "hirm", "uce", "rece", "speed", "mace", "diff_quickfix", "itd", "esd", "advunlearn", "concept_ablation", "doco",
    "co_erasing", "sfd", "sld", "safree", "spm",
)  # fmt: skip


Way = Literal["anew", "on top"]
"""How concepts are added to an erasure: `anew` fits all concepts again, `on top` adds edits to the earlier edits."""


class EarlierErasure(NamedTuple):
    """An erasure that is in force on the model while another is made on top of it."""

    fingerprint: str
    """Fingerprint of the erasure's tensors."""
    concepts: Sequence[Concept]
    """Concepts that the erasure erases. The model's predictions for prompts with them must not change."""


class Fit(NamedTuple):
    """The result of a strategy."""

    edits: Edits
    """Edits of the model, with tensors on the CPU."""
    log: dict[str, float]
    """Figures to save with the erasure, for instance the last loss."""
    gates: Mapping[str, dict[str, Any]] = MappingProxyType({})
    """Measured accuracy of each concept's gate, by concept; empty where the method has no gates."""
    level: int | None = None
    """Timestep of the only denoising step, where the erased model is a one-step generator; `None` for all other
    models."""


@dataclass(frozen=True, kw_only=True)
class Strategy(Options, ABC):
    """An erasure method with its options. Subclass it as a frozen, keyword-only dataclass and register it.

    Fields are the options; their annotations say which values are allowed (see `erasure.options.Options`). Every
    behaviour that the package promises of strategies is tested over the registry, so a registered one is tested.
    """

    name: ClassVar[str] = ""
    """Name in the registry; `register` sets it."""
    title: ClassVar[str] = ""
    """One line for lists: what the method does."""
    paper: ClassVar[str] = ""
    """Name of the paper and its arXiv number or venue."""
    needs: ClassVar[tuple[Need, ...]] = ()
    """What a model must have for the method to work, see `erasure.needs.Need`."""
    protects: ClassVar[str] = ""
    """`hosted pipeline` when a user who has the weights can undo the erasure, else `released weights`."""
    cost: ClassVar[str] = ""
    """Rough time that it takes to make an erasure, for instance `seconds`."""
    carriers: ClassVar[tuple[str, ...]] = ("weights",)
    """Carriers of the result: how the erasure is attached to a model."""
    trains: ClassVar[bool] = False
    """Whether the method trains in many steps, so that an interrupted run can be resumed."""

    @abstractmethod
    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Compute the edits that erase the concepts.

        Args:
            backbone: The model with no erasure in force. It is the same afterwards.
            concepts: Concepts to erase, all at once.
            seed: Seeds every random choice.
            progress: Called with the share of the work that is done, 0 to 1.
        """

    def session(self, backbone: Backbone) -> Backbone:
        """Return the model with the image size and the prompt length of the options; unchanged without any.

        Raises:
            OptionError: The model does not allow the size or the length.
        """
        return backbone

    def adds(self, earlier: Sequence[str]) -> Way:
        """How further concepts are added to an erasure.

        Where the same method made the earlier edits, all concepts are fitted `anew`: the result is the same as if all
        concepts had been erased at once. Over edits of another method the concepts are fitted `on top`: the new edits
        are made for the model with the earlier erasure in force, and are added to the earlier edits. Methods that
        train for long always work on top.

        Args:
            earlier: Names of the strategies that carried out the earlier requests.

        Raises:
            UnsupportedModelError: Nothing can be added with this strategy; the message gives the reason.
        """
        return "anew" if set(earlier) == {self.name} else "on top"

    def ignores_retain(self) -> str:
        """Name of the option whose value makes retain lists ineffective; empty when retain lists have an effect."""
        return ""


def warn_that_nothing_is_retained(strategy: str, concepts: Sequence[Concept]) -> None:
    """Warn of retain lists for a method that has no way to keep what they name; called by its `fit`."""
    if any(concept.retain for concept in concepts):
        warnings.warn(
            f"{strategy} keeps nothing on purpose, so what is to survive has no effect: take it off the retain list, "
            "or use a method that fits a model to it (uce, itd, esd)",
            IgnoredRetainWarning,
            stacklevel=6,
        )


def _refusal(thing: object) -> str:
    """Say why an object is not a valid strategy; empty when it is valid."""
    if not (isinstance(thing, type) and issubclass(thing, Strategy)):
        return "it is no subclass of erasure.strategies.Strategy"
    if "__dataclass_fields__" not in vars(thing):
        return "it lacks the decorator dataclass(frozen=True, kw_only=True)"
    if unknown := set(thing.needs) - set(get_args(Need)):
        return f"nobody knows its needs {', '.join(sorted(unknown))}; known: {', '.join(get_args(Need))}"
    return ""


STRATEGIES: Registry[type[Strategy]] = Registry(
    "strategy",
    {name: f"erasure.strategies.{name}" for name in BUILTIN},
    attributes=("title", "paper", "needs", "protects", "cost", "carriers", "presets", "trains"),
    accepts=_refusal,
    unknown=UnknownStrategyError,
)


register, available, get = STRATEGIES.register, STRATEGIES.available, STRATEGIES.get
