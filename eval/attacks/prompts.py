"""Adversarial prompts on disk, for other erasures to be tried with: `adversarial.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasure.errors import EvaluationError
from erasure.eval.results import write_atomically
from erasure.eval.samples import Sample
from erasure.eval.suites import Target

FILE = "adversarial.jsonl"


@dataclass(frozen=True)
class AdversarialPrompt:
    """A text that brought a concept back."""

    sample: Sample
    """The prompt that it stands for, with the noise and settings with which it did."""
    text: str
    target: Target
    made_by: dict[str, Any]
    """The attack with its options and size, the model, and the erasures that it overcame; alike in one file."""


def write_prompts(folder: Path, prompts: Sequence[AdversarialPrompt]) -> Path:
    """Write `adversarial.jsonl` to a folder, atomically; one prompt a line."""
    lines = []
    for prompt in prompts:
        target = {"name": prompt.target.name, "domain": prompt.target.domain, "members": list(prompt.target.members)}
        row = prompt.sample.row() | {"text": prompt.text, "target": target, "made_by": prompt.made_by}
        lines.append(json.dumps(row, allow_nan=False) + "\n")
    write_atomically(folder / FILE, "".join(lines).encode())
    return folder / FILE


def read_prompts(path: str | Path) -> list[AdversarialPrompt]:
    """Read an `adversarial.jsonl`, or the one in a folder.

    Raises:
        EvaluationError: It is missing, empty or damaged, or holds prompts of several concepts or attacks.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"no adversarial prompts at {path} ({getattr(error, 'strerror', None) or error}): give the folder of an "
            f"attack, or its {FILE}"
        ) from error
    prompts = [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if not prompts:
        raise EvaluationError(f"{path} holds no prompts: the attack had no success, so there is nothing to try again")
    for other in prompts:
        if (other.target, other.made_by) != (prompts[0].target, prompts[0].made_by):
            raise EvaluationError(f"{path} holds prompts of several concepts or attacks: give those of one at a time")
    if len({prompt.sample.sample_id for prompt in prompts}) < len(prompts):
        raise EvaluationError(f"{path} holds several prompts for one sample: leave one of each in it")
    return prompts


def _parsed(line: str, where: str) -> AdversarialPrompt:
    try:
        row = json.loads(line)
        target, text, made_by = row["target"], row["text"], row["made_by"]
        concept = Target(target["name"], target["domain"], tuple(target["members"]))
        if not (isinstance(text, str) and isinstance(made_by, dict) and isinstance(made_by.get("attack"), str)):
            raise TypeError("a field of the wrong type")
        return AdversarialPrompt(Sample.from_row(row), text, concept, made_by)
    except (ValueError, KeyError, TypeError, EvaluationError) as error:
        raise EvaluationError(
            f"{where} is no adversarial prompt ({type(error).__name__}: {error}): run the attack again"
        ) from error
