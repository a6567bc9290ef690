"""The summary of a measurement goes into the erasure that was measured, where its card and `erasure info` show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from erasure.cli.models import ErasedModelOptions
from erasure.errors import ErasureError

if TYPE_CHECKING:
    from erasure.artifact import Erasure
    from erasure.eval import Results
    from erasure.interop.protocols import Settings


def record(
    options: ErasedModelOptions, erasures: Mapping[str, Erasure], results: Results, whole: bool = True
) -> list[str]:
    """Write the summary of results into the one erasure that they are of.

    Nothing that goes wrong here is an error: the results are kept in any case.

    Args:
        options: Where the erasures came from, and their strengths.
        erasures: Those that were measured.
        results: What was found.
        whole: Whether all concepts of the erasure were measured, and nothing else.

    Returns:
        Lines that say what was done, or why nothing was.
    """
    from erasure.artifact import Erasure, is_local
    from erasure.eval.summary import is_smaller, is_valid, merged, summary

    if not erasures or results.size == "smoke":
        return []
    (source, *more), (measured, *_) = options.erasure, erasures.values()
    reason = None
    if more:
        reason = "several erasures were measured together"
    elif any(strength != 1 for strength in options.strength):
        reason = f"it was measured at strength {options.strength[0]:g}"
    elif not whole:
        reason = "other concepts than its own were measured"
    elif not is_local(source):
        reason = f"{source} is a repository of the Hub, not a folder here"
    elif not is_valid(results):
        reason = "a control fails, so that some numbers cannot be given"
    if reason is not None:
        return [f"Not written into the erasure, because {reason}."]
    try:
        now = Erasure.load(source)
        if now.fingerprint != measured.fingerprint:
            return [f"Not written into the erasure, because {source} holds another one by now."]
        if is_smaller(now.config.evaluation, results):
            return [f"Not written into the erasure, which has figures of {results.suite} in a larger size."]
        figures = merged(now.config.evaluation, summary(results), results.suite)
        if Erasure.record_evaluation(source, figures):
            return [f"Wrote the figures into the config and the card of {source}."]
        return [f"Wrote the figures into the config of {source}; its card was edited and is left alone."]
    except ErasureError as error:
        return [f"Not written into the erasure: {error}"]


def left_out(model: Settings) -> list[str]:
    """Give remarks on the pipeline that was measured."""
    if "safety_checker" in model and model["safety_checker"] != "off":
        return ["The pipeline's safety checker was left out: its black images would count as erased."]
    return []
