"""What requests ask for, checked."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import BaseModel, ConfigDict, JsonValue

from erasure.backbones import backbone_for
from erasure.carriers.embeddings import require_tokens
from erasure.errors import ConceptError, OptionError
from erasure.serving.limits import Limits
from erasure.world import World

if TYPE_CHECKING:
    from erasure.interop.protocols import Callback

MOST_GUIDANCE = 50.0
"""Largest scale of guidance: above it pictures are noise."""
SEEDS = 2**63
"""Seeds are below it, so that those of several pictures of one request fit into 64 bits."""


class Problem(Exception):
    """An error of a request or of the service, with its HTTP status.

    Args:
        status: Status of HTTP.
        code: One word for programs.
        message: What was found, what is allowed, what to do.
        headers: Headers of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    def body(self) -> dict[str, object]:
        """Give the answer's body as plain data."""
        return {"error": {"code": self.code, "message": self.message}}


class GenerateRequest(BaseModel):
    """Body of a request for pictures."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str
    """What to draw."""
    negative_prompt: str = ""
    """What the pictures must not show."""
    seed: int | None = None
    """Seed of the noise of the first picture, 0 or more; those behind it have the next ones. Random when left out."""
    count: int = 1
    """Number of pictures."""
    steps: int | None = None
    """Denoising steps; the model's own number when left out."""
    guidance: float | None = None
    """Scale of guidance; the model's own when left out."""
    height: int | None = None
    """Pixels; the model's own when left out."""
    width: int | None = None
    """Pixels; the model's own when left out."""


@dataclass(frozen=True)
class Drawing:
    """One picture to draw."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    settings: tuple[tuple[str, JsonValue], ...] = field(default=())
    """Steps, guidance, height and width, by name. Pictures are drawn together where these are the same."""


def drawings(request: GenerateRequest, limits: Limits, world: World, pipe: DiffusionPipeline) -> list[Drawing]:
    """Check a request, and list the pictures to draw.

    Args:
        request: The request.
        limits: What it may ask for.
        world: How the model draws.
        pipe: The pipeline.

    Raises:
        Problem: Something that is not allowed, or that the model cannot draw.
    """
    for name in ("prompt", "negative_prompt"):
        _check_text(name, getattr(request, name), limits.max_prompt)
    if not request.prompt.strip():
        raise _refused("prompt is empty: say what to draw")
    _check_range("count", request.count, 1, limits.max_count)
    _check_range("steps", request.steps, 1, limits.max_steps)
    _check_range("guidance", request.guidance, 0, MOST_GUIDANCE)
    _check_range("height", request.height, 8, limits.max_side)
    _check_range("width", request.width, 8, limits.max_side)
    _check_range("seed", request.seed, 0, SEEDS - limits.max_count)
    known = world.call_settings(request.steps, request.guidance)
    known |= {name: value for name in ("height", "width") if (value := getattr(request, name)) is not None}
    if "num_inference_steps" in known:
        _check_range("steps", known["num_inference_steps"], 1, limits.max_steps)
    backbone = backbone_for(pipe)
    try:
        backbone.latents.shape(known.get("height"), known.get("width"))
        require_tokens(backbone.towers, [request.prompt, request.negative_prompt])
    except (OptionError, ConceptError) as error:
        raise _refused(str(error)) from error
    first = secrets.randbelow(SEEDS - limits.max_count) if request.seed is None else request.seed
    settings = tuple(sorted(known.items()))
    return [
        Drawing(request.prompt, request.negative_prompt, first + index, settings) for index in range(request.count)
    ]


def draw(pipe: DiffusionPipeline, wanted: Sequence[Drawing], on_step: Callback | None = None) -> list[Image.Image]:
    """Draw pictures of equal settings in one call, each with the noise of its own seed.

    Args:
        pipe: The pipeline.
        wanted: What to draw.
        on_step: Is called after every denoising step, as diffusers calls `callback_on_step_end`.
    """
    settings = dict(wanted[0].settings)
    options = backbone_for(pipe).call_options(
        settings.get("guidance_scale"), settings.get("num_inference_steps"),  # type: ignore[arg-type]
        (settings.get("height"), settings.get("width")), [each.negative_prompt for each in wanted],  # type: ignore[arg-type]
    )  # fmt: skip
    if on_step is not None:
        options["callback_on_step_end"] = on_step
    generators = [torch.Generator("cpu").manual_seed(each.seed) for each in wanted]
    return list(pipe([each.prompt for each in wanted], generator=generators, **options).images)


def _check_text(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise _refused(f"{name} has {len(text):,} characters, at most {most:,} are allowed: shorten it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refused(f"{name} holds half a character (a lone surrogate) at {error.start}: take it out") from None


def _check_range(name: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        raise _refused(f"{name} is {value:,}, allowed: {least:,} to {most:,}")


def _refused(message: str) -> Problem:
    return Problem(422, "invalid", message)
