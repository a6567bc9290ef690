"""Which concept an attack or a stress test is of, and which of its samples are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from erasure.concept import Concept
from erasure.errors import EvaluationError
from erasure.eval import suites
from erasure.eval.inputs import Inputs
from erasure.eval.run import Models
from erasure.eval.samples import Sample
from erasure.eval.suites import Plan, Suite
from erasure.eval.suites.prompts import PromptSuite


def plan_of(kit: Suite, concept: str | Concept | None, models: Models, seed: int, what: str, how: str) -> Plan:
    """All samples that a suite has of one concept.

    Args:
        kit: The suite.
        concept: The concept; that of the attached erasures when left out.
        models: The model with its erasures.
        seed: Chooses the noise of the samples.
        what: What is done with the concept, for messages: `attack`.
        how: What is to be done with one at a time, for messages: `attack`.

    Raises:
        EvaluationError: The suite has no prompts of concepts, or the concept is none or several.
    """
    if not kit.of_concepts:
        raise EvaluationError(f"suite {kit.name} has no prompts of a concept to {what}: name another, such as canvas")
    found = kit.plan(models.pipe, [one_concept(concept, models)], "full", seed)
    if len(found.targets) != 1:
        raise EvaluationError(
            f"{concept!r} names {len(found.targets)} concepts ({found.concept}): {how} one at a time"
        )
    return found


def suite_of(name: str, inputs: Inputs, models: Models, concept: str | Concept) -> Suite:
    """The suite that prompts and judge come from, with what is given to it.

    Args:
        name: Of the suite.
        inputs: What is given.
        models: The model with its erasures.
        concept: The concept.

    Raises:
        EvaluationError: There is no such suite, it has no prompts of concepts, or it has no use for what is given.
    """
    kit = suites.get(name)
    if kit.of_concepts and inputs.detectors is not None and not isinstance(kit, PromptSuite):
        raise EvaluationError(
            f"suite {name} has a judge of its own: detectors are for suites on prompts, such as prompts; name a judge "
            "instead (judge)"
        )
    return kit.prepared(inputs, models.pipe, [concept]) if kit.of_concepts else kit


def one_concept(concept: str | Concept | None, models: Models) -> str | Concept:
    """The concept that is given, or the only one of the erasures.

    Raises:
        EvaluationError: None is given, and the erasures are of none or several.
    """
    if concept is not None:
        return concept
    erased = {each.target: each for each in models.concepts}
    if len(erased) != 1:
        raise EvaluationError(f"name the concept: the erasures attached are of {', '.join(erased) or 'none'}")
    return next(iter(erased.values()))


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, evenly over the list, its ends included."""
    if len(samples) <= count:
        return list(samples)
    return [samples[round(index * (len(samples) - 1) / max(count - 1, 1))] for index in range(count)]
