"""Parts of an audit: one evaluation, attack or stress test each, and which of them answers for which attacker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from erasure.errors import EvaluationError
from erasure.eval.attacks import ATTACKS, Access
from erasure.eval.stress import STRESS_TESTS
from erasure.eval.suites import SUITES

Kind = Literal["evaluation", "attack", "stress"]
Grade = Literal["prompts", "gradients", "inputs", "weights"]
"""What an attacker is assumed to have, the least first."""

GRADES: dict[Grade, tuple[str, str]] = {
    "prompts": ("Prompts", "Users who type what they like, and whoever searches words without the model's gradients."),
    "gradients": ("Search with gradients", "Whoever has the weights to search with, and gives the service a prompt."),
    "inputs": ("Other inputs", "Whoever gives pictures, embeddings or noise, or chooses how images are sampled."),
    "weights": ("The weights", "Whoever has the erased weights, and changes them."),
}
"""Title of each grade, and who is meant."""
OWN_OPTION = "--control"
"""How facts of attacks say that an option of their own measures chance."""
OF_ACCESS: dict[Access, Grade] = {
    "prompt": "prompts", "weights": "gradients", "embeddings": "inputs", "noise": "inputs", "image": "inputs",
}  # fmt: skip
"""Grade of an attack by what it needs. An attack that takes gradients through the weights leaves them as they are."""


@dataclass(frozen=True)
class Part:
    """One evaluation, attack or stress test."""

    kind: Kind
    name: str
    """In its registry."""
    concept: str | None = None
    """What it is about; `None` for an evaluation, which is about all concepts at once."""
    number: int = 0
    """Of the concept."""
    measures_chance: bool = False
    """Whether an attack is tried with nothing of the concept in it, so that its rate is what chance gives."""

    @property
    def grade(self) -> Grade:
        """Which attacker it answers for."""
        if self.kind == "attack":
            return OF_ACCESS[ATTACKS.facts(self.name).attributes["access"]]
        return "weights" if self.kind == "stress" else "prompts"

    @property
    def is_control(self) -> bool:
        """Whether its rate is what chance gives."""
        return self.measures_chance or (
            self.kind == "attack" and bool(ATTACKS.facts(self.name).attributes["is_control"])
        )

    @property
    def counts(self) -> bool:
        """Whether it is something that an attacker does, so that the word for that attacker depends on it."""
        is_of_attackers = self.kind != "stress" or bool(STRESS_TESTS.facts(self.name).attributes["of_attackers"])
        return is_of_attackers and not self.is_control

    @property
    def chance(self) -> tuple[str, bool] | None:
        """Name and `measures_chance` of the part that tells what chance gives; `None` where there is no chance."""
        if self.kind != "attack" or self.is_control:
            return None
        control = str(ATTACKS.facts(self.name).attributes["chance"])
        return None if not control else (self.name, True) if control == OWN_OPTION else (control, False)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        number = f"-{self.number + 1}" if self.number else ""
        return f"{self.kind}-{self.name}{number}{'-chance' if self.measures_chance else ''}"

    @property
    def title(self) -> str:
        """What it does, in a line."""
        facts = {"evaluation": SUITES.facts, "attack": ATTACKS.facts, "stress": STRESS_TESTS.facts}[self.kind]
        return str(facts(self.name).attributes["title"])


def parts_of(
    concepts: Sequence[str], suites: Sequence[str], attacks: Sequence[str] | None, stress: Sequence[str] | None
) -> list[Part]:
    """The parts in their order: evaluations, attacks, each behind what its chance is told by, and stress tests.

    Args:
        concepts: Targets of the erased concepts; attacks and stress tests are of one each.
        suites: Names of suites.
        attacks: Names of attacks; all when left out.
        stress: Names of stress tests; all when left out.

    Raises:
        EvaluationError: An unknown name.
    """
    chosen = ATTACKS.names() if attacks is None else list(attacks)
    tests = STRESS_TESTS.names() if stress is None else list(stress)
    for registry, names in ((SUITES, suites), (ATTACKS, chosen), (STRESS_TESTS, tests)):
        for name in names:
            registry.check(name)
    if not (suites or chosen or tests):
        raise EvaluationError("nothing to audit: name a suite, an attack or a stress test")
    return [
        *(Part("evaluation", name) for name in dict.fromkeys(suites)),
        *dict.fromkeys(part for each in _each("attack", chosen, concepts) for part in with_chance(each)),
        *_each("stress", tests, concepts),
    ]


def _each(kind: Kind, names: Sequence[str], concepts: Sequence[str]) -> Iterator[Part]:
    for name in dict.fromkeys(names):
        for number, concept in enumerate(concepts):
            yield Part(kind, name, concept, number)


def with_chance(part: Part) -> Iterator[Part]:
    """Give an attack behind the part that tells what chance gives, if there is one."""
    if part.chance is not None:
        name, measures_chance = part.chance
        yield replace(part, name=name, measures_chance=measures_chance)
    yield part


def left_out(parts: Sequence[Part]) -> list[str]:
    """Names of attacks and stress tests that there are and that no part is of."""
    taken = {(part.kind, part.name) for part in parts}
    every = [("attack", name) for name in ATTACKS.names()] + [("stress", name) for name in STRESS_TESTS.names()]
    return [name for kind, name in every if (kind, name) not in taken]
