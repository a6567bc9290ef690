"""Attacks: what brings an erased concept back. One module each, found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from erasure.errors import EvaluationError
from erasure.eval.sizes import SizedOptions
from erasure.options import Count
from erasure.registry import Registry

if TYPE_CHECKING:
    from erasure.backbones import Backbone
    from erasure.eval.attacks.together import Step
    from erasure.eval.attacks.victim import Victim
    from erasure.eval.attempts import Attempt
    from erasure.eval.samples import Sample

# No import of torch here: the command line lists attacks without it.

Access = Literal["prompt", "embeddings", "noise", "image", "weights"]
"""What an attacker chooses or has: words; what the text encoders give; the noise that a picture starts from, and how
it is taken away (sampler, steps, guidance, size); a picture that is given; or the weights, through which gradients are
taken. Whoever has one may choose words as well, and knows the original model where it is public."""


class SkippedPromptError(EvaluationError):
    """A prompt that cannot be attacked: its outcome is missing, and the others go on."""


@dataclass(frozen=True, kw_only=True)
class Attack(SizedOptions, ABC):
    """An attack with its options: subclass it as a frozen dataclass and register it.

    It proposes attempts; the runner draws them with the erased pipeline, asks the judge, and stops at the first that
    shows the concept. So no attack knows the judge.
    """

    kind: ClassVar[str] = "attack"
    name: ClassVar[str] = ""
    """Name in the registry; `register` sets it."""
    title: ClassVar[str] = ""
    """One line for lists: what the attack does."""
    paper: ClassVar[str] = ""
    """Where it comes from."""
    access: ClassVar[Access] = "weights"
    """What the attacker must be able to choose or to have; the most there is, unless said otherwise."""
    is_control: ClassVar[bool] = False
    """Whether it searches nothing, so that its rate is the chance level of others."""
    chance: ClassVar[str] = ""
    """How its chance level is measured: by the attack of this name, or by its own option `--control`; empty where
    there is no chance to speak of."""

    samples: Count = 50
    """Prompts that are attacked at most, spread evenly over those of the suite (paper: 50)."""

    @property
    def measures_chance(self) -> bool:
        """Whether its rate is a chance level."""
        return self.is_control

    def lacks(self, backbone: Backbone) -> str:
        """Say why a model cannot be attacked so; empty where it can."""
        return ""

    @property
    @abstractmethod
    def tries(self) -> int:
        """Attempts for a prompt at most."""

    @abstractmethod
    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose what to try in the place of a sample's ordinary call, until nobody asks for more.

        Called where gradients are on. Everything random follows from the sample's seed, so that a resumed run goes
        the same way. The model is left as it was found, at every attempt; what one changes, its `change` puts back.

        Raises:
            SkippedPromptError: This prompt cannot be attacked.
            DivergenceError: NaN or infinity during optimisation.
        """

    def search(self, victim: Victim, sample: Sample) -> Generator[Attempt | Step, object, None]:
        """The same with the steps of its search, each of which is sent what comes of it.

        For attacks whose steps can be taken for several prompts at once: such a one has its way here, and `attempts`
        gives `by_itself` of it.
        """
        yield from self.attempts(victim, sample)


@dataclass(frozen=True, kw_only=True)
class ControlledAttack(Attack):
    """An attack that measures its own chance level."""

    chance: ClassVar[str] = "--control"

    control: bool = False
    """Measure chance instead: as many tries of the same kind with nothing of the concept in them (what it is that is
    left out, each attack says)."""

    @property
    def measures_chance(self) -> bool:
        """Whether the option says so."""
        return self.control


def _refusal(thing: object) -> str:
    """Say what keeps a thing from being an attack; empty where nothing does."""
    is_attack = isinstance(thing, type) and issubclass(thing, Attack)
    return "" if is_attack else "it is no subclass of erasure.eval.attacks.Attack"


ATTACKS: Registry[type[Attack]] = Registry(
    "attack",
    {
        "completion": "erasure.eval.attacks.completion",
        "concept_inversion": "erasure.eval.attacks.concept_inversion",
        "image_prompt": "erasure.eval.attacks.image_prompt",
        "img2img": "erasure.eval.attacks.img2img",
        "inpaint": "erasure.eval.attacks.inpaint",
        "mma": "erasure.eval.attacks.mma",
        "p4d": "erasure.eval.attacks.p4d",
        "prompt_embeds": "erasure.eval.attacks.prompt_embeds",
        "random_prefix": "erasure.eval.attacks.random_prefix",
        "ring_a_bell": "erasure.eval.attacks.ring_a_bell",
        "sampler": "erasure.eval.attacks.sampler",
        "synonym": "erasure.eval.attacks.rewrites",
        "tina": "erasure.eval.attacks.tina",
        "translation": "erasure.eval.attacks.rewrites",
        "typo": "erasure.eval.attacks.rewrites",
        "unlearndiffatk": "erasure.eval.attacks.unlearndiffatk",
    },
    attributes=("title", "paper", "access", "sizes", "is_control", "chance"),
    accepts=_refusal,
    unknown=EvaluationError,
)


register, available, get = ATTACKS.register, ATTACKS.names, ATTACKS.get
