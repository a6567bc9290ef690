"""`python -m benchmarks full-size`: what erasures cost on models of the size that people use."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from benchmarks import PROGRAM, parts
from benchmarks.models import MODELS, Size
from benchmarks.parts import Figures, Subject
from benchmarks.record import Record
from erasure.cli.arguments import parse
from erasure.cli.terminal import Terminal
from erasure.errors import OptionError
from erasure.versions import library_versions

REMOVAL = "removal"
"""The part that removes objects."""
ONLY = {REMOVAL: ("sdxl",), "sfd": ("sd15", "sdxl")}
"""Parts that are not measured of every model, with their models: SFD refuses those that flow."""
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(kw_only=True)
class FullSize:
    """Measure Stable Diffusion 1.5, XL and 3 and FLUX.1 dev at full size, with random weights.

    For each: an image stock, attached and fused; one update of ESD and of HiRM; passes with compiled blocks. Of the
    first two, the memory of SFD's update with two LoRAs on one network and with three networks. Besides, the removal
    of an object at 1024 pixels against an implementation that forms all probabilities. The figures of each part stand
    in one JSON as soon as it is done. The same command goes on after the last part that is done: one that was killed
    or failed is measured again.
    """

    out: Path = Path("full-size.json")
    """File with the figures."""
    models: tuple[str, ...] = tuple(MODELS)
    """Names of the models that are measured."""
    parts: tuple[str, ...] = (*parts.PARTS, REMOVAL)
    """Names of the parts that are measured of each model; objects are removed with one model only, and `sfd` is
    measured of the first two."""
    width: float = 1.0
    """Share of the real width and depth, to try the command out."""
    pixels: int | None = None
    """Pixels along a side of an image; those that the model was made for when left out."""
    steps: int | None = None
    """Denoising steps of an image; those that are usual for the model when left out."""
    tokens: int | None = None
    """Tokens that T5 pads prompts to; as many as are usual for the model when left out."""
    repeats: int = 2
    """Rounds of which medians are reported."""
    device: str = "cuda"
    """Device that the models run on."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the weights."""
    backend: str = "inductor"
    """Backend that `torch.compile` uses."""
    minutes: float = 9.0
    """No part is started after so many minutes: the same command goes on with the rest."""


def run(argv: Sequence[str], terminal: Terminal) -> int:
    """Measure what is not measured yet.

    Returns:
        The exit code: 0, 1 where a part failed or time ran out.

    Raises:
        OptionError: Options that cannot be.
    """
    options = parse(FullSize, "full-size", argv, program=PROGRAM)
    check(options)
    record = Record(options.out, settings_of(options))
    started, bad, workbench = time.perf_counter(), 0, Workbench(options)
    for name in record.pending(names_of(options)):
        if time.perf_counter() - started > 60 * options.minutes:
            terminal.say(f"{options.minutes:g} minutes are over: the same command goes on from {name}")
            return 1
        terminal.say(f"{name} ...")
        failure = record.measure(name, partial(workbench.measure, name))
        terminal.say(f"{name}: {failure or 'done'}")
        bad += bool(failure)
        if failure:
            # What the part has left behind, on the device or in the model.
            workbench.clear()
    terminal.say(str(options.out))
    return int(bool(bad))


def check(options: FullSize) -> None:
    """Refuse what cannot be measured.

    Raises:
        OptionError: An unknown model, a width or a number out of range, or no such device.
    """
    for name, chosen, known in (
        ("models", options.models, [*MODELS]), ("parts", options.parts, [*parts.PARTS, REMOVAL]),
    ):  # fmt: skip
        if unknown := sorted(set(chosen) - set(known)):
            raise OptionError(f"--{name} names {', '.join(unknown)}; known: {', '.join(known)}")
    if not 0 < options.width <= 1:
        raise OptionError(f"--width is {options.width:g}: give a share above 0, and 1 at most")
    counts = {"repeats": options.repeats, "steps": options.steps, "pixels": options.pixels, "tokens": options.tokens}
    if low := [name for name, count in counts.items() if count is not None and count < 1]:
        raise OptionError(f"--{low[0]} is at least 1")
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {options.device} cannot be used: {str(error).splitlines()[0]}") from error


def settings_of(options: FullSize) -> dict[str, object]:
    """Name what figures depend on; those of one file have it in common."""
    device = torch.device(options.device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    names = ("width", "pixels", "steps", "tokens", "repeats", "dtype", "backend")
    return {"device": chip, "versions": library_versions(), **{name: getattr(options, name) for name in names}}


def names_of(options: FullSize) -> list[str]:
    """The parts in order: those of one model behind one another; what changes a model for good comes last."""
    return [
        f"{model}/{part}"
        for model in options.models
        for part in (REMOVAL, *parts.PARTS)
        if part in options.parts and model in ONLY.get(part, (model,))
    ]


class Workbench:
    """Measures parts on one model at a time: there is no room for two.

    Args:
        options: Of the command.
    """

    def __init__(self, options: FullSize) -> None:
        self.options = options
        self._held: dict[str, Subject] = {}

    def measure(self, name: str) -> Figures:
        """The figures of a part, on the model of the part before where it is the same."""
        model, part = name.split("/")
        if part in parts.ALONE:
            # Its own processes need the room.
            self.clear()
        subject = self._subject(model)
        return parts.removal(subject) if part == REMOVAL else parts.PARTS[part](subject)

    def clear(self) -> None:
        """Give the memory of the model back."""
        self._held.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _subject(self, name: str) -> Subject:
        if name not in self._held:
            self.clear()
            options, model = self.options, MODELS[name]
            self._held[name] = Subject(
                model, Size(options.width, torch.device(options.device), PRECISIONS[options.dtype]),
                options.pixels or model.pixels, options.steps or model.steps,
                model.tokens and (options.tokens or model.tokens), options.repeats, options.backend,
            )  # fmt: skip
        return self._held[name]
