"""What a caller gives to a suite besides concepts, size and seed: prompts, detectors, a preset, and how to draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from erasure.errors import EvaluationError
from erasure.eval.detectors.choices import Chosen
from erasure.files import shown
from erasure.shown import did_you_mean

# No import of torch here: suites are listed without it.


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A caller's inputs to a suite; `None` or empty where the suite decides."""

    prompts: str | Path | None = None
    """Prompt list: a CSV, TSV or JSONL file, a folder of the library `datasets`, or `hf:NAME` of its Hub."""
    detectors: Chosen | None = None
    """Detectors in the place of the suite's own."""
    preset: str | None = None
    """A paper's choices of detectors, steps, guidance and size."""
    category: str | None = None
    """Category of the prompt list's rows that are drawn; `all` for every row."""
    retain: tuple[str, ...] = ()
    """Names that the suite's own prompts are put together with besides the concepts: what must survive."""
    world: str | None = None
    """Name of the closed world that the model was made for, where it does not declare it itself."""
    steps: int | None = None
    """Denoising steps."""
    guidance: float | None = None
    """Scale of guidance."""
    side: int | None = None
    """Height and width of images in pixels."""
    clip: str | None = None
    """Folder of a CLIP model, for a suite whose detector is made of one."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            EvaluationError: One is out of range.
        """
        for name, least, most in (("steps", 1, 10_000), ("guidance", 0, 1_000), ("side", 8, 8_192)):
            value, kind = getattr(self, name), "number" if name == "guidance" else "whole number"
            right = isinstance(value, (int, float) if name == "guidance" else int) and not isinstance(value, bool)
            if value is not None and not (right and least <= value <= most):
                raise EvaluationError(f"{name} is {shown(value)}, allowed: a {kind} from {least} to {most}")

    @classmethod
    def read(cls, given: Mapping[str, object], **more: object) -> Inputs:
        """Read the arguments of a call.

        Raises:
            EvaluationError: One is unknown, or out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise EvaluationError(
                    f"an evaluation takes no argument {shown(name)}; suites take: {', '.join(known)}."
                    f"{did_you_mean(name, known)}"
                )
        values = {**given, **more}
        if "retain" in values:
            retain = values["retain"]
            values["retain"] = (retain,) if isinstance(retain, str) else tuple(retain or ())  # type: ignore[arg-type]
        return cls(**values)  # type: ignore[arg-type]

    def named(self) -> list[str]:
        """List the names of the given inputs."""
        return [field.name for field in fields(self) if getattr(self, field.name) not in (None, ())]
