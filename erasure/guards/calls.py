"""Checks of a pipeline's call arguments for bypasses of erasures."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.guards.encodings import KNOWN, blocks_read, skipped_blocks, unfit_for_skipping
from erasure.guards.messages import (
    CLIP_SKIP,
    EMBEDDINGS,
    HANDED_IN,
    IMAGE_PROMPT,
    LEVELS,
    NEGATIVE,
    NOISE,
    OTHER_TEXT,
    PICTURE,
    TEXT_LENGTH,
    is_locked_out,
    lock_of,
    made_for_others,
    names_in_force,
    names_on_text,
    warn_or_refuse,
)  # fmt: skip
from erasure.guards.networks import encodings_of
from erasure.guards.words import is_named
from erasure.interop import paths
from erasure.interop.pipelines import components_of
from erasure.state import ComponentState

Way = Literal[
    "other text", "embeddings", "image prompt", "picture", "skipped blocks", "negative prompt", "noise", "levels"
]  # fmt: skip
"""Ways in which an argument of a pipeline's call can bypass an erasure."""
WAYS: dict[Way, re.Pattern[str]] = {
    "other text": re.compile(r"(negative_)?prompt_\d+"),
    "embeddings": re.compile(r"(negative_)?(pooled_)?prompt_embeds(?!_mask|_scale)(_\w+)?"),
    "image prompt": re.compile(r"(negative_)?ip_adapter_image(_embeds)?"),
    "picture": re.compile(r"(?!mask_)(\w+_)?images?(_latents)?"),
    "skipped blocks": re.compile(r"clip_skip"),
    "negative prompt": re.compile(r"negative_prompt"),
    "noise": re.compile(r"latents"),
    "levels": re.compile(r"timesteps|sigmas|denoising_(start|end)"),
}
"""Patterns of such arguments' names, of which the first match counts; diffusers' pipelines use the same names."""


ONLY_LOCKED: dict[Way, str] = {"embeddings": HANDED_IN, "noise": NOISE, "levels": LEVELS}
"""Reasons for which a lock refuses an argument whatever its value; without a lock only the value matters."""
LENGTH = "max_sequence_length"
"""Name of the argument for T5's prompt length."""


def way_of(name: str) -> Way | None:
    """Say how an argument of this name can bypass an erasure; `None` where it cannot."""
    return next((way for way, names in WAYS.items() if names.fullmatch(name)), None)


def ways_around(pipeline: type[DiffusionPipeline]) -> dict[str, Way]:
    """List the arguments of a pipeline class's call that can bypass an erasure, by name, and how."""
    names = inspect.signature(pipeline.__call__).parameters
    return {name: way for name in names if (way := way_of(name)) is not None}


@contextmanager
def calling() -> Iterator[None]:
    """Mark that this thread is inside of a call whose arguments have been checked."""
    before, KNOWN.calling = KNOWN.calling, True
    try:
        yield
    finally:
        KNOWN.calling = before


def check_call(components: Mapping[str, nn.Module], given: Mapping[str, Any]) -> None:
    """Warn of bypasses of erasures in the arguments of a pipeline's call.

    Args:
        components: The networks of the pipeline.
        given: Arguments by name.

    Raises:
        LockedError: The erasures are locked, and the lock refuses the argument.
        BypassedErasureError: An erasure in force was attached with `strict=True`.
    """
    states = [state for module in components.values() if (state := ComponentState.of(module)) is not None]
    names = names_in_force(states)
    if not names or KNOWN.quiet:
        return
    set_levels = [given.get(key) for key in ("timesteps", "sigmas")]
    if given.get("latents") is not None and any(levels is not None for levels in set_levels):
        warn_or_refuse(states, names, PICTURE)
    on_text = names_on_text(states)
    compiled = [known for part in components.values() if paths.is_compiled(part) and (known := encodings_of(part))]
    locked = lock_of(states)
    for name, value in given.items():
        way = way_of(name) if value is not None else None
        if way in ONLY_LOCKED and is_locked_out(locked, ONLY_LOCKED[way]):
            warn_or_refuse(states, names, ONLY_LOCKED[way], way=name)
        if way == "other text" and on_text and _differs(value, given.get(usual := re.sub(r"_\d+$", "", name))):
            warn_or_refuse(states, on_text, OTHER_TEXT, way=name, usual=usual)
        elif way == "picture" and (is_locked_out(locked, PICTURE) or _is_of_latents(value)):
            warn_or_refuse(states, names, PICTURE)
        elif way == "skipped blocks" and value:
            if unfit := unfit_for_skipping(states, blocks_read(components), value):
                warn_or_refuse(states, unfit, CLIP_SKIP, way=str(value))
        elif way == "embeddings" and isinstance(value, Tensor):
            # The guard on the denoiser does not run inside of a compiled graph.
            if any(skipped_blocks(states, known, value) is None for known in compiled):
                warn_or_refuse(states, on_text, EMBEDDINGS, way=name)
        elif way == "image prompt" and (compiled or is_locked_out(locked, IMAGE_PROMPT)):
            warn_or_refuse(states, names, IMAGE_PROMPT)
        elif name == LENGTH and isinstance(value, int):
            for free in [known.free for known in compiled if known.free]:
                if others := made_for_others(states, free.component, value):
                    warn_or_refuse(
                        states, ", ".join(others), TEXT_LENGTH, length=value, made=next(iter(others.values()))
                    )
    if negated := _negated(states, given):
        warn_or_refuse(states, negated, NEGATIVE)


def check_arguments(pipe: DiffusionPipeline, *args: object, **kwargs: object) -> None:
    """Check a stock pipeline's call from the arguments of its `check_inputs`; see `check_call`."""
    named = inspect.signature(type(pipe).check_inputs).bind_partial(pipe, *args, **kwargs).arguments
    if not KNOWN.calling:
        check_call(components_of(pipe), named)


def _is_of_latents(picture: object) -> bool:
    """Whether a given picture is latents, which bypass the VAE."""
    return isinstance(picture, Tensor) and picture.ndim == 4 and picture.shape[1] not in (1, 3)


def _differs(text: object, usual: object) -> bool:
    """Whether the prompts for one text encoder differ from those for the first; empty ones are not used."""
    return bool(text) and _prompts(text) != _prompts(usual or "")


def _prompts(given: object) -> list[object]:
    """List one prompt or several, without repetition."""
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return listed[:1] if all(each == listed[0] for each in listed) else listed


def _negated(states: Iterable[ComponentState], given: Mapping[str, Any]) -> str:
    """Name the erasures whose concept or anchor a negative prompt contains, in any text encoder."""
    texts: list[str] = []
    for name, value in given.items():
        if re.fullmatch(r"negative_prompt(_\d+)?", name):
            texts += [text for text in _prompts(value) if isinstance(text, str)]
    if not any(texts):
        return ""
    written = "\n".join(texts).casefold()
    attached = {name: one for state in states for name, one in state.in_force().items()}
    return ", ".join(name for name, one in attached.items() if is_named(one.erasure, written))
