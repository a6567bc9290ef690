"""Messages about bypasses of erasures: a warning, or an error under a strict erasure or a lock."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from erasure.errors import BypassedErasureError, BypassedErasureWarning, LockedError
from erasure.state import ComponentState, Locked

EMBEDDINGS = (
    "{way}= bypasses {names}: these embeddings were not made by this model's text encoder under the erasures "
    "that are in force now. Pass prompt=, or encode_prompt's embeddings, or use a strategy that edits the denoiser."
)
OTHER_TEXT = (
    "{way}= bypasses {names}: it tells one text encoder other words than {usual}= tells the others, and the erasure "
    "was made with all of them reading the same. Leave {way}= out, or use a strategy that edits the denoiser."
)
IMAGE_PROMPT = (
    "an image prompt (IP-Adapter) brings its content into the denoiser past {names}: an erasure is fitted to words. "
    "Check the pictures that users hand in."
)
REFERENCE = (
    "a reference image stands beside the drawing, and the denoiser reads it past {names}: an erasure is fitted to "
    "words. Check the pictures that users hand in."
)
CONTROL = (
    "a ControlNet has cross-attention of its own, which {names} does not edit: attach the erasure with "
    "controlnet=True, or check what is drawn."
)
PICTURE = (
    "a picture that is handed in starts the drawing past {names}: what it shows stays, whatever the prompt says. "
    "Check the pictures that users hand in."
)
CLIP_SKIP = (
    "clip_skip={way} feeds the denoiser states of the text encoder that {names} was not fitted to, or leaves out "
    "blocks that it edits: it may erase less, or nothing. Leave clip_skip out, or use a strategy that edits the first "
    "block of the text encoder (hirm, diff_quickfix)."
)
APART = (
    "a gate of {names} opened in one text encoder and stayed shut in another, because this pipeline runs them apart: "
    "the concept may be drawn from what the other one says. Call ErasureManager(pipe).adopt() once, for a pipeline "
    "that from_pipe of a stock class has made."
)
TEXT_LENGTH = (
    "texts of {length} tokens (max_sequence_length) are told past {names}: what the text encoder says of a word "
    "depends on the length that a text is padded to, so it may erase less. Pass max_sequence_length={made}, or make "
    "the erasure anew for texts of this length."
)
NEGATIVE = (
    "the negative prompt names what {names} erases, or what takes its place, and pushes the drawing away from it, "
    "which can bring the concept back: leave that word out."
)
HANDED_IN = (
    "{way}= is refused under {names}: embeddings can be searched that no prompt gives and that bring a concept back, "
    "whatever was edited. Pass prompt=."
)
NOISE = (
    "{way}= is refused under {names}: noise can be searched that brings a concept back. Pass generator=, and let the "
    "pipeline draw the noise."
)
LEVELS = (
    "{way}= is refused under {names}: it chooses noise levels by hand, which the erasure was not measured with. Pass "
    "num_inference_steps=."
)
STRANGER = (
    "the networks of a locked pipeline, which carry {names}, are run by something else than a call of that pipeline. "
    "Draw with the locked pipeline, or with one that its class makes of it (from_pipe), which is locked as well."
)

Refusable = Literal["image_prompts", "pictures", "controls", "noise", "schedulers", "loras"]
"""Names of what a lock can refuse in addition to its defaults."""
REFUSABLE: tuple[Refusable, ...] = get_args(Refusable)
REFUSED_ON_REQUEST: Mapping[str, Refusable] = {
    IMAGE_PROMPT: "image_prompts", REFERENCE: "image_prompts", PICTURE: "pictures", CONTROL: "controls",
    NOISE: "noise", LEVELS: "schedulers",
}  # fmt: skip
"""Bypasses that a lock refuses only if requested, and otherwise warns of. A lock refuses all others."""


def lock_of(states: Iterable[ComponentState]) -> Locked | None:
    """Get the lock on components."""
    return next((state.locked for state in states if state.locked is not None), None)


def is_refused(states: Iterable[ComponentState], reason: str) -> bool:
    """Whether a bypass is an error: under an erasure attached with `strict=True`, or under a lock."""
    states = list(states)
    return is_strict(states) or is_locked_out(lock_of(states), reason)


def is_locked_out(locked: Locked | None, reason: str) -> bool:
    """Whether a lock refuses a bypass."""
    return locked is not None and (reason not in REFUSED_ON_REQUEST or REFUSED_ON_REQUEST[reason] in locked.refuses)


def names_in_force(states: Iterable[ComponentState]) -> str:
    """Name the erasures in force on components, for a message."""
    return ", ".join(dict.fromkeys(name for state in states for name in state.in_force()))


def names_in_denoisers(states: Iterable[ComponentState]) -> str:
    """Names of the erasures in force that edit layers of a denoiser, for a message; empty without one."""
    edited = (
        name
        for state in states
        if not state.is_text_encoder
        for name, attached in state.in_force().items()
        if attached.erasure.edits.of(state.source) or attached.erasure.edits.membranes_of(state.source)
    )
    return ", ".join(dict.fromkeys(edited))


def names_on_text(states: Iterable[ComponentState]) -> str:
    """Names of the erasures in force on text encoders, each with what of which it edits; empty without one."""
    places: dict[str, list[str]] = {}
    for state in states:
        if state.is_text_encoder:
            for name, attached in state.in_force().items():
                edits = attached.erasure.edits
                part = state.component
                inside = part in edits.pinned or edits.features_of(part) or edits.filters_of(part)
                carriers = {"weights": edits.of(part), "activations": inside}
                what = " and ".join(carrier for carrier, there in carriers.items() if there)
                places.setdefault(name, []).append(f"{what} of {state.component}")
    return ", ".join(f"{name} ({', '.join(where)})" for name, where in places.items())


def made_for_others(states: Iterable[ComponentState], component: str, length: int) -> dict[str, int]:
    """Get the erasures in force that were made for another prompt length, with theirs in tokens, by name.

    Args:
        states: What is attached.
        component: The text encoder whose texts have no fixed length. The denoiser reads it; others do not.
        length: Tokens of a text now.
    """
    return {
        name: made
        for state in states
        if state.component == component or not state.is_text_encoder
        for name, attached in state.in_force().items()
        if (made := attached.erasure.config.text_length) is not None and made != length
    }


def is_strict(states: Iterable[ComponentState]) -> bool:
    """Whether one of the erasures in force was attached with `strict=True`."""
    return any(attached.strict for state in states for attached in state.in_force().values())


def warn_or_refuse(states: Iterable[ComponentState], names: str, reason: str, **words: object) -> None:
    """Warn of a bypass of erasures.

    Args:
        states: What is attached.
        names: Names of the bypassed erasures.
        reason: Message, one of the constants above.
        **words: Values for the message's other fields in braces.

    Raises:
        LockedError: The erasures are locked, and the lock refuses the bypass.
        BypassedErasureError: One of the erasures in force was attached with `strict=True`.
    """
    states, text = list(states), reason.format(names=names, **words)
    if is_locked_out(lock_of(states), reason):
        raise LockedError(f"this pipeline is locked: {text}")
    if is_strict(states):
        raise BypassedErasureError(text)
    warnings.warn(text, BypassedErasureWarning, stacklevel=4)
