"""What brought a concept back, on disk, for other erasures to be tried with: `adversarial.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from erasure.errors import EvaluationError
from erasure.eval.attacks.stored import restore
from erasure.eval.attempts import Attempt
from erasure.eval.rows import Row
from erasure.eval.samples import Sample, sample_seed
from erasure.eval.schemas import PromptRow
from erasure.eval.suites import Target
from erasure.files import read_lines, shown, write_bytes

FILE = "adversarial.jsonl"
MOST = 10_000
"""Prompts in a file."""


@dataclass(frozen=True)
class AdversarialPrompt:
    """A text that brought a concept back, or something else that did."""

    sample: Sample
    """The prompt that it stands for, with the noise and settings with which it did."""
    text: str | None
    """`None` where it is more than texts, or none."""
    target: Target
    made_by: Row
    """The attack with its options and size, the model, and the erasures that it overcame; alike in one file."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Texts for the other text encoders, by argument of the pipeline's call; none where all read the same."""
    stored: Row | None = None
    """Record of the attempt where it is more than texts; see `erasure.eval.attacks.stored`."""
    folder: Path | None = field(default=None, compare=False)
    """Where the files of that are."""

    @property
    def attempt(self) -> Attempt:
        """Give the attempt that tries it again.

        Raises:
            EvaluationError: Files beside it are missing or damaged.
        """
        if self.stored is None:
            return Attempt({"prompt": self.text, **self.others})
        assert self.folder is not None
        return restore(self.stored, self.folder)


def write_prompts(folder: Path, prompts: Sequence[AdversarialPrompt]) -> Path:
    """Write `adversarial.jsonl` to a folder, atomically; one prompt a line.

    Raises:
        EvaluationError: It cannot be written.
    """
    lines = []
    for prompt in prompts:
        target = {"name": prompt.target.name, "domain": prompt.target.domain, "members": list(prompt.target.members)}
        row = (
            prompt.sample.row()
            | {
                "text": prompt.text,
                "others": dict(prompt.others),
                "target": target,
                "made_by": prompt.made_by,
            }
            | ({} if prompt.stored is None else {"attempt": prompt.stored})
        )
        lines.append(json.dumps(row, allow_nan=False) + "\n")
    return write_bytes(folder / FILE, "".join(lines).encode(), error=EvaluationError)


def read_prompts(path: str | Path) -> list[AdversarialPrompt]:
    """Read an `adversarial.jsonl`, or the one in a folder.

    Raises:
        EvaluationError: It is missing, empty or damaged, or holds prompts of several concepts or attacks.
    """
    path = Path(path) / FILE if os.path.isdir(path) else Path(path)
    if not os.path.lexists(path):
        raise EvaluationError(f"no adversarial prompts at {path}: give the folder of an attack, or its {FILE}")
    rows: Iterator[PromptRow] = read_lines(path, PromptRow, count=MOST, error=EvaluationError)
    prompts = [_prompt(row, path, number) for number, row in enumerate(rows, 1)]
    if not prompts:
        raise EvaluationError(f"{path} holds no prompts: the attack had no success, so there is nothing to try again")
    for other in prompts:
        if (other.target, other.made_by) != (prompts[0].target, prompts[0].made_by):
            raise EvaluationError(f"{path} holds prompts of several concepts or attacks: give those of one at a time")
    if len({prompt.sample.sample_id for prompt in prompts}) < len(prompts):
        raise EvaluationError(f"{path} holds several prompts for one sample: leave one of each in it")
    return prompts


def listed_prompts(
    prompts: Sequence[tuple[str, int | None]], like: Sample, target: Target, made_by: Row
) -> list[AdversarialPrompt]:
    """Prompts of a list of others, which nobody knows the original prompts of: each stands for itself.

    Args:
        prompts: Each with the seed of its noise, where the list says it.
        like: A sample of the concept, whose settings they are drawn with.
        target: The concept that they are said to bring back.
        made_by: What is known of where they come from: `attack`, and `source`.

    Raises:
        EvaluationError: There are none, too many, or one comes twice.
    """
    if not prompts or len(prompts) > MOST:
        raise EvaluationError(f"a list of {len(prompts)} prompts; allowed: 1 to {MOST}")
    if len(set(prompts)) < len(prompts):
        twice = next(prompt for number, prompt in enumerate(prompts) if prompt in prompts[:number])
        raise EvaluationError(f"the list has {shown(twice[0])} with one seed twice: delete one of them")
    return [
        AdversarialPrompt(
            replace(
                like, sample_id=f"listed-{number:05}", prompt=text, weight=1.0,
                seed=sample_seed(0, text, number) if seed is None else seed % 2**64,
            ),
            text, target, made_by,
        )
        for number, (text, seed) in enumerate(prompts)
    ]  # fmt: skip


def _prompt(row: PromptRow, path: Path, number: int) -> AdversarialPrompt:
    target, stored = row["target"], row.get("attempt")
    if row["text"] is None and stored is None:
        raise EvaluationError(
            f"{path}, line {number} ({shown(row['sample_id'])}) has neither a text nor an attempt: delete it"
        )
    concept = Target(target["name"], target["domain"], tuple(target["members"]))
    return AdversarialPrompt(
        Sample.from_row(row),
        row["text"],
        concept,
        row["made_by"],
        {name: text for name, text in row.get("others", {}).items()},
        stored,
        path.parent,
    )
