"""What a strategy is, and how it is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from erasure.errors import UnknownStrategyError
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
"""How concepts are added to an erasure: all of its concepts are fitted anew, or edits are made on top of its edits."""


class Standing(NamedTuple):
    """An erasure that is in force on the model while another is made on top of it."""

    fingerprint: str
    """Of its tensors."""
    concepts: Sequence[Concept]
    """What it erases: prompts with them must go on to give what they give now."""


class Fit(NamedTuple):
    """What a strategy makes."""

    edits: Edits
    """Tensors on the CPU."""
    log: dict[str, float]
    """Figures worth keeping, for instance the last loss."""
    gates: Mapping[str, dict[str, Any]] = MappingProxyType({})
    """How well each concept's gate tells it, by concept, where there is one."""
    level: int | None = None
    """Noise level of the one step that the model draws in from now on; `None` where it is sampled as before."""


@dataclass(frozen=True, kw_only=True)
class Strategy(Options, ABC):
    """A method of erasure with its options: subclass it as a frozen, keyword-only dataclass and register it.

    Fields are the options; their annotations say which values are allowed (see `erasure.options.Options`). Every
    behaviour that the package promises of strategies is tested over the registry, so a registered one is tested.
    """

    name: ClassVar[str] = ""
    """Name in the registry; `register` sets it."""
    title: ClassVar[str] = ""
    """One line for lists: what the method does."""
    paper: ClassVar[str] = ""
    """Where it comes from."""
    needs: ClassVar[tuple[Need, ...]] = ()
    """What a model must have for it to work, see `erasure.needs.Need`."""
    protects: ClassVar[str] = ""
    """`hosted pipeline` when a user who holds the weights can undo it, else `released weights`."""
    cost: ClassVar[str] = ""
    """What making one costs."""
    carriers: ClassVar[tuple[str, ...]] = ("weights",)
    """Where the result lives."""
    trains: ClassVar[bool] = False
    """Whether it trains on trajectories, so that a killed run goes on."""

    @abstractmethod
    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Make the edits.

        Args:
            backbone: The model, with no erasure in force; left as it was found.
            concepts: What to erase, all at once.
            seed: Seeds every random choice.
            progress: To be called with the share that is done, 0-1.
        """

    def session(self, backbone: Backbone) -> Backbone:
        """The model with the size and the text length that the options ask for: as it is, where they do not ask.

        Raises:
            OptionError: The model does not allow it.
        """
        return backbone

    def adds(self, earlier: Sequence[str]) -> Way:
        """How further concepts are added to an erasure.

        Where this method made all of it, everything is fitted `anew`: exact, since it is the same as to erase all
        concepts at once. Over another method's edits it is fitted `on top`: for the model with the earlier erasure in
        force, whose edits are then added to these. Methods that train for long always work on top.

        Args:
            earlier: Names of the strategies that carried out the earlier requests.

        Raises:
            UnsupportedModelError: Nothing can be added with this strategy; the message gives the reason.
        """
        return "anew" if set(earlier) == {self.name} else "on top"

    def ignores_retain(self) -> str:
        """Name of the option whose value leaves out what must survive; empty when retain lists have an effect."""
        return ""


def _refusal(thing: object) -> str:
    """Say what keeps a thing from being a strategy; empty where nothing does."""
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
    told=("title", "paper", "needs", "protects", "cost", "carriers", "presets", "trains"),
    accepts=_refusal,
    unknown=UnknownStrategyError,
)


register, available, get = STRATEGIES.register, STRATEGIES.available, STRATEGIES.get
