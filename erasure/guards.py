"""What goes around erasures, noticed where it happens: on the networks themselves, whatever pipeline uses them.

A text-side erasure acts while a prompt is encoded. Embeddings that were made elsewhere, pictures that enter through
the VAE, an IP-Adapter or a ControlNet bring a concept along without ever passing it. Guards on the denoiser, the VAE
and the components' `save_pretrained` are shared by every pipeline that shares those networks.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from erasure.backbones import Backbone
from erasure.backbones.base import Written
from erasure.errors import AttachError, BypassedErasureError, BypassedErasureWarning
from erasure.interop import adapters, hooks, paths
from erasure.interop.encoders import anatomy_of, block_of, blocks_of
from erasure.interop.hooks import ModelHook
from erasure.interop.pipelines import CallGuard
from erasure.interop.protocols import Arguments
from erasure.state import ComponentState

_ENCODINGS, _ENTRY = "erasure_encodings", "erasure_entry"
SAMPLED, REMEMBERED = 8, 4096
"""Values of a token's encoding by which it is known again, and prompts whose encodings are remembered."""


class _Known(threading.local):
    """What this thread does on purpose, or has looked at already."""

    quiet: bool = False
    checked: tuple[weakref.ref[Tensor], Encodings] | None = None


_KNOWN = _Known()


@contextmanager
def unguarded() -> Iterator[None]:
    """Nothing is noticed inside of the block, in this thread: for passes that measure and draw nothing."""
    before, _KNOWN.quiet = _KNOWN.quiet, True
    try:
        yield
    finally:
        _KNOWN.quiet = before


class Encodings:
    """The encodings that text encoders gave under the erasures in force now, known again by some of their values.

    Copies of a pipeline share it: what either has encoded, both know.

    Args:
        erasures: Names and strengths of those erasures.
        written: Where the states of each text encoder stand in what the denoiser is told.
    """

    def __init__(self, erasures: Iterable[tuple[str, float]], written: Iterable[Written]) -> None:
        self.erasures, self.written = tuple(erasures), tuple(written)
        self.rows: deque[Tensor] = deque(maxlen=REMEMBERED)
        self.blind = False
        """Whether an encoder has been compiled, inside of which nothing can be taken note of."""

    def __deepcopy__(self, memo: dict[int, object]) -> Encodings:
        """Give the same object: see the class."""
        return self

    def remember(self, states: Tensor) -> None:
        """Take note of encodings `(batch, tokens, dim)`."""
        self.rows.extend(_sampled(states.detach()).cpu())

    def knows(self, told: Tensor, components: Iterable[str]) -> bool:
        """Whether all that text encoders wrote into tokens is made of those encodings.

        Args:
            told: What the denoiser is told, `(batch, tokens, dim)`.
            components: The text encoders whose part is looked at.
        """
        wanted = set(components)
        parts = [told[:, part.places, part.columns] for part in self.written if part.component in wanted]
        return all(self._knows(part) for part in parts)

    def _knows(self, states: Tensor) -> bool:
        """Whether every encoding `(batch, tokens, dim)` is made of those, but for a cast, or zero beside one.

        A long prompt is encoded in chunks that are put behind one another, with or without the start and the end of
        each, so tokens are looked for in all that is known, not whole prompts.
        """
        asked = _sampled(states.detach()).cpu()
        asked = asked[asked.abs().amax((1, 2)) > 0]
        if self.blind:
            return True
        known = [row for row in list(self.rows) if row.shape[1] == asked.shape[2]]
        if not known or not len(asked):
            return False
        return all(_is_made_of(tokens, known) for tokens in asked)


def _is_made_of(asked: Tensor, known: Sequence[Tensor]) -> bool:
    """Whether every token `(tokens, values)` of an encoding is one of known encodings, the newest looked at first."""
    left = asked
    for row in reversed(known):
        away = (row[None] - left[:, None]).abs().amax(-1).amin(1)
        left = left[away > 0.02 * left.abs().amax(1)]
        if not len(left):
            return True
    return False


def _sampled(states: Tensor) -> Tensor:
    """Some values of each token, `(batch, tokens, values)`."""
    return states[..., :: max(1, states.shape[-1] // SAMPLED)].float()


class _Remember(ModelHook):
    """Where states leave a text encoder: on its final norm, which pipelines also call by itself, or on its blocks."""

    def __init__(self, encodings: Encodings) -> None:
        super().__init__()
        self.encodings = encodings

    def post_forward(self, module: nn.Module, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Take note of what comes out, but of canaries."""
        if torch.compiler.is_compiling():
            self.encodings.blind = True
        elif not _KNOWN.quiet:
            self.encodings.remember(output[0] if isinstance(output, tuple) else output)
        return output


class _AtEntry(ModelHook):
    """On a denoiser: looks at what it is told besides the latents."""

    def __init__(self, states: Iterable[ComponentState], encodings: Encodings) -> None:
        super().__init__()
        self.states, self.encodings = list(states), encodings
        self.said: set[str] = set()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Warn, or raise `BypassedErasureError` under a strict erasure, and change nothing."""
        if torch.compiler.is_compiling() or _KNOWN.quiet or not any(state.in_force() for state in self.states):
            return args, kwargs
        told = kwargs.get("encoder_hidden_states", (*args, None, None, None)[2])
        if isinstance(told, Tensor) and told.ndim == 3 and not self._checked(told):
            if names := bypassed_by_embeddings(self.states, self.encodings, told):
                said(self.states, names, EMBEDDINGS)
            _KNOWN.checked = (weakref.ref(told), self.encodings)
        if (kwargs.get("added_cond_kwargs") or {}).get("image_embeds") is not None:
            self._once(IMAGE_PROMPT)
        if kwargs.get("down_block_additional_residuals") is not None:
            self._once(CONTROL)
        return args, kwargs

    def _checked(self, told: Tensor) -> bool:
        """Whether it is the tensor of the last pass: the same one comes back at every step of a drawing."""
        last = _KNOWN.checked
        return last is not None and last[0]() is told and last[1] is self.encodings

    def _once(self, reason: str) -> None:
        if reason not in self.said or any(a.strict for state in self.states for a in state.in_force().values()):
            self.said.add(reason)
            said(self.states, names_in_force(self.states), reason)


EMBEDDINGS = (
    "prompt_embeds= bypasses {names}: these embeddings were not made by this model's text encoder under the erasures "
    "that are in force now. Pass prompt=, or encode_prompt's embeddings, or use a strategy that edits the denoiser."
)
IMAGE_PROMPT = (
    "an image prompt (IP-Adapter) brings its content into the denoiser past {names}: an erasure is fitted to words. "
    "Check the pictures that users hand in."
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
    "clip_skip={skip} feeds the denoiser states of the text encoder that {names} was not fitted to, or leaves out "
    "blocks that it edits: it may erase less, or nothing. Leave clip_skip out, or use a strategy that edits the first "
    "block of the text encoder (hirm, diff_quickfix)."
)
NEGATIVE = (
    "the negative prompt names what {names} erases, or what takes its place, and pushes the drawing away from it, "
    "which can bring the concept back: leave that word out."
)


def names_in_force(states: Iterable[ComponentState]) -> str:
    """Names of the erasures in force on some components, for a message."""
    return ", ".join(dict.fromkeys(name for state in states for name in state.in_force()))


def bypassed_by_embeddings(states: Iterable[ComponentState], encodings: Encodings, given: Tensor) -> str:
    """Names of the text-side erasures that embeddings `(batch, tokens, dim)` go around; empty where they do not."""
    erased = [state for state in states if state.is_text_encoder and state.in_force()]
    known = not erased or encodings.knows(given, [state.component for state in erased])
    return "" if known else names_in_force(erased)


def check_call(components: Mapping[str, nn.Module], given: Mapping[str, Any]) -> None:
    """Warn of ways around erasures that the arguments of a pipeline's call show.

    Args:
        components: The networks of the pipeline.
        given: Arguments by name.

    Raises:
        BypassedErasureError: Under an erasure that was attached with `strict=True`.
    """
    states = [state for module in components.values() if (state := ComponentState.of(module)) is not None]
    names = names_in_force(states)
    if not names:
        return
    set_levels = [given.get(key) for key in ("timesteps", "sigmas")]
    if given.get("latents") is not None and any(levels is not None for levels in set_levels):
        said(states, names, PICTURE)
    skip = given.get("clip_skip")
    if skip and (unfit := _unfit_for_clip_skip(components, skip)):
        said(states, unfit, CLIP_SKIP.replace("{skip}", str(skip)))
    if negated := _negated(states, given):
        said(states, negated, NEGATIVE)
    for component in components.values():
        encodings = encodings_of(component)
        if encodings is not None and paths.is_compiled(component):
            # The guard on the denoiser is not asked inside of a compiled graph.
            for key in ("prompt_embeds", "negative_prompt_embeds"):
                embeddings = given.get(key)
                if embeddings is not None and (around := bypassed_by_embeddings(states, encodings, embeddings)):
                    said(states, around, EMBEDDINGS)


def _unfit_for_clip_skip(components: Mapping[str, nn.Module], skip: int) -> str:
    """Names of the erasures that do less, or other, where the text encoder's last blocks are left out.

    These are edits of the denoiser, which are fitted to the last block's states, edits of a block that is left out,
    and pinned prompts of which only the last state is known.
    """
    found = []
    anatomies = [anatomy_of(paths.transformer_root(module)) for module in components.values()]
    # Of several CLIPs side by side pipelines read the last state but one.
    unread = int(sum(each is not None and each.causal for each in anatomies) > 1)
    for module in components.values():
        state = ComponentState.of(module)
        if state is None:
            continue
        last = len(blocks_of(paths.transformer_root(module))) - 1 - unread - skip
        for name, attached in state.in_force().items():
            edits = attached.erasure.edits
            places = [*edits.of(state.component), *edits.features_of(state.component)]
            left_out = any((block := block_of(path)) is not None and block > last for path in places)
            pin = edits.pinned.get(state.component)
            if not state.is_text_encoder or left_out or (pin is not None and not pin.blocks.numel()):
                found.append(name)
    return ", ".join(dict.fromkeys(found))


def _negated(states: Iterable[ComponentState], given: Mapping[str, Any]) -> str:
    """Names of the erasures whose concept or anchor a negative prompt names."""
    texts = given.get("negative_prompt") or ()
    texts = [texts] if isinstance(texts, str) else [text for text in texts if isinstance(text, str)]
    if not any(texts):
        return ""
    found, written = [], "\n".join(texts).casefold()
    for name, attached in {name: one for state in states for name, one in state.in_force().items()}.items():
        concepts = attached.erasure.concepts
        words = [word for concept in concepts for word in (*concept.names, concept.anchor) if word]
        # An expression for each of a thousand words would cost more than an image's text encoder.
        likely = (word for word in words if word.casefold() in written)
        if any(re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", written) for word in likely):
            found.append(name)
    return ", ".join(found)


def said(states: Iterable[ComponentState], names: str, reason: str) -> None:
    """Warn of a way around erasures.

    Raises:
        BypassedErasureError: One of the erasures in force was attached with `strict=True`.
    """
    text = reason.format(names=names)
    if any(attached.strict for state in states for attached in state.in_force().values()):
        raise BypassedErasureError(text)
    warnings.warn(text, BypassedErasureWarning, stacklevel=4)


class _WatchPictures:
    """Check on a VAE: pictures go in. Holds the states of the networks that its pipeline draws with."""

    def __init__(self, states: Iterable[ComponentState]) -> None:
        self.states = list(states)

    def __call__(self, vae: nn.Module, *args: object, **kwargs: object) -> None:
        """Warn while an erasure is in force."""
        if not _KNOWN.quiet and (names := names_in_force(self.states)):
            said(self.states, names, PICTURE)


def refuse_unsaveable(module: nn.Module, *args: object, **kwargs: object) -> None:
    """Raise rather than write files of a component that lack a part of what is in force, or cannot be read again.

    Raises:
        AttachError: Hooks are a part of an erasure in force, or a user's adapter is loaded beside one.
    """
    refuse_adapters(module)
    state = ComponentState.of(module)
    for name, attached in state.in_force().items() if state else ():
        what = attached.beyond_weights(state.component) if state else None
        if what is not None:
            raise AttachError(
                f"{name!r} {what} besides the weights, which the files of a stock model cannot hold: use "
                "save_erased_pipeline(folder, fuse=False), or disable_erasures() to save the base"
            )


def check_saveable(modules: Iterable[nn.Module], beyond_weights: bool) -> None:
    """Check every component of a pipeline with erasures before the first file is written; see `refuse_unsaveable`."""
    for module in modules:
        refuse_adapters(module)
        if not beyond_weights:
            refuse_unsaveable(module)


def refuse_adapters(module: nn.Module) -> None:
    """Raise `AttachError` where a user's adapter would be written under names that no loader finds."""
    if adapters.tuner_layers(module):
        raise AttachError(
            f"a LoRA is loaded into the {type(module).__name__} beside erasures: its layers would be written under "
            "names that no loader finds. unload_lora_weights() first, and keep the LoRA in a file of its own"
        )


def install(components: Mapping[str, nn.Module], backbone: Backbone, states: Mapping[str, ComponentState]) -> None:
    """Put the guards of a pipeline in place, or take them off where nothing is attached any more."""
    denoiser = backbone.denoiser_component
    leaving = {tower.component: tower.leaving for tower in backbone.towers}
    attached = {name: state for name, state in states.items() if state.record.attached}
    in_force = [item for state in attached.values() if state.is_text_encoder for item in state.in_force().items()]
    signature = tuple((name, one.strength) for name, one in in_force)
    known = encodings_of(components[denoiser])
    is_same = known is not None and known.erasures == signature
    encodings = known if known is not None and is_same else Encodings(signature, backbone.written())
    for name, component in components.items():
        if attached:
            CallGuard.install(component, "save_pretrained", refuse_unsaveable)
        else:
            CallGuard.remove(component, "save_pretrained")
        for module in leaving.get(name, ()):
            hooks.remove_hook(module, _ENCODINGS)
            if name in attached:
                hooks.register_hook(module, _Remember(encodings), _ENCODINGS)
    hooks.remove_hook(components[denoiser], _ENTRY)
    if "vae" in components:
        CallGuard.remove(components["vae"], "encode")
    if attached:
        hooks.register_hook(components[denoiser], _AtEntry(attached.values(), encodings), _ENTRY)
        if "vae" in components:
            CallGuard.install(components["vae"], "encode", _WatchPictures(attached.values()))


def encodings_of(denoiser: nn.Module) -> Encodings | None:
    """The encodings that the guard of a denoiser knows."""
    hook = hooks.find_hook(denoiser, _ENTRY)
    return hook.encodings if isinstance(hook, _AtEntry) else None
