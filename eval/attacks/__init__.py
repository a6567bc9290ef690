"""Attacks: prompts that bring an erased concept back. One module each, found by name."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from erasure.errors import EvaluationError, OptionError
from erasure.registry import Registry

if TYPE_CHECKING:
    from erasure.eval.attacks.victim import Victim
    from erasure.eval.samples import Sample

# No import of torch here: the command line lists attacks without it.

SIZES = ("smoke", "quick", "full")
"""`smoke`: does it run. `quick`: minutes on a laptop with a small model. `full`: as the paper has it."""


class SkippedPromptError(EvaluationError):
    """A prompt that cannot be attacked: its outcome is missing, and the others go on."""


class Candidate(NamedTuple):
    """A prompt that an attack wants tried."""

    text: str
    """What the pipeline is called with."""
    steps: int
    """Gradient steps since the last candidate."""
    loss: float | None
    """Mean loss of those; `None` where nothing is optimised."""
    changed: bool
    """Whether the tokeniser reads the text as other tokens than were optimised."""
    cut: bool
    """Whether it is then too long, so that the pipeline would cut words of the original prompt off."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack with its options: subclass it as a frozen dataclass and register it.

    It proposes prompts; the runner draws them with the erased pipeline's ordinary call, asks the judge, and stops at
    the first that shows the concept. So no attack knows the judge.
    """

    name: ClassVar[str] = ""
    """Name in the registry; `register` sets it."""
    title: ClassVar[str] = ""
    """What it is, in one line."""
    paper: ClassVar[str] = ""
    """Where it comes from."""
    access: ClassVar[str] = ""
    """What the attacker needs: `prompt`, `text encoder` or `weights`."""
    is_control: ClassVar[bool] = False
    """Whether it searches nothing, so that its rate is the chance level of others."""
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Options of each size; those of `full` are the paper's."""

    samples: int = 50
    """Prompts that are attacked at most, spread evenly over those of the suite (paper: 50)."""

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow.

        Raises:
            OptionError: A choice that is none of the listed ones, a number that is negative or not finite, or a count
                below 1.
        """
        for name, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            if get_origin(hint) is Literal:
                if value not in kinds:
                    raise self._refusal(name, value, ", ".join(map(repr, kinds)))
            elif int in kinds and value is not None and (type(value) is not int or value < 1):
                raise self._refusal(name, value, "whole numbers from 1 on")
            elif float in kinds and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise self._refusal(name, value, "numbers from 0 on")

    def _refusal(self, option: str, value: object, allowed: str) -> OptionError:
        return OptionError(f"{self.name}: option {option!r} is {value!r}; allowed: {allowed}")

    @property
    @abstractmethod
    def tries(self) -> int:
        """Candidates for a prompt at most."""

    @abstractmethod
    def candidates(self, victim: Victim, sample: Sample) -> Iterator[Candidate]:
        """Propose prompts in the place of a sample's, until nobody asks for more.

        Called where gradients are on. Everything random follows from the sample's seed, so that a resumed run goes
        the same way. The model is left as it was found, at every candidate.

        Raises:
            SkippedPromptError: This prompt cannot be attacked.
            DivergenceError: NaN or infinity during optimisation.
        """

    @classmethod
    def configured(cls: type[A], size: str = "quick", **options: Any) -> A:
        """An instance of a size with single options changed.

        Raises:
            EvaluationError: An unknown size.
            OptionError: An unknown option, or a value that an option does not allow.
        """
        if size not in SIZES:
            raise EvaluationError(f"attack {cls.name} has no size {size!r}; there are: {', '.join(SIZES)}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [option for option in options if option not in known]
        if unknown:
            raise OptionError(f"{cls.name} has no option {unknown[0]!r}; there are: {', '.join(known)}")
        return cls(**{**cls.sizes.get(size, {}), **options})


A = TypeVar("A", bound=Attack)


def _refusal(thing: object) -> str:
    """What keeps a thing from being an attack, or nothing."""
    is_attack = isinstance(thing, type) and issubclass(thing, Attack)
    return "" if is_attack else "it is no subclass of erasure.eval.attacks.Attack"


ATTACKS: Registry[type[Attack]] = Registry(
    "attack",
    {
        "random_prefix": "erasure.eval.attacks.random_prefix",
        "unlearndiffatk": "erasure.eval.attacks.unlearndiffatk",
    },
    told=("title", "paper", "access", "sizes", "is_control"),
    accepts=_refusal,
    unknown=EvaluationError,
)


def register(name: str) -> Callable[[type[A]], type[A]]:
    """Class decorator: make an attack known under a name.

    Packages of others may instead name their class in the entry-point group `erasure.attacks`.
    """

    def add(attack: type[A]) -> type[A]:
        ATTACKS.add(name, attack)
        return attack

    return add


def available() -> tuple[str, ...]:
    """Names of all attacks."""
    return ATTACKS.names()


def get(name: str) -> type[Attack]:
    """The attack of a name.

    Raises:
        EvaluationError: There is none; the message names the nearest.
        BrokenPluginError: Another package names it, and it cannot be loaded.
    """
    return ATTACKS.get(name)
