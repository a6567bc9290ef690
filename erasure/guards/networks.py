"""Guards on the networks of a pipeline, which apply to every pipeline that shares them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.backbones import Backbone
from erasure.carriers.calls import NamedArguments
from erasure.guards import encodings as known
from erasure.guards import one_step
from erasure.guards.encodings import KNOWN, Encodings
from erasure.guards.messages import (
    APART,
    CLIP_SKIP,
    CONTROL,
    EMBEDDINGS,
    IMAGE_PROMPT,
    PICTURE,
    REFERENCE,
    STRANGER,
    TEXT_LENGTH,
    is_refused,
    lock_of,
    made_for_others,
    names_in_denoisers,
    names_in_force,
    names_on_text,
    warn_or_refuse,
)  # fmt: skip
from erasure.guards.saving import refuse_unsaveable
from erasure.guards.words import words_of
from erasure.interop import hooks, rounds
from erasure.interop.pipelines import CallGuard, EncodedTogether
from erasure.interop.protocols import Arguments
from erasure.state import ComponentState

_ENTRY = "erasure_entry"
CONTROLLED = ("down_block_additional_residuals", "controlnet_block_samples", "block_controlnet_hidden_states")
"""Arguments from a ControlNet: in UNets, in Flux's transformer, in SD3's."""
SHOWN = ("image_embeds", "ip_adapter_image_embeds", "ip_hidden_states")
"""Arguments from an IP-Adapter."""


class _AtEntry(NamedArguments):
    """Hook on a denoiser that checks its inputs other than latents.

    Args:
        denoiser: UNet or transformer.
        states: What is attached.
        encodings: What the text encoders gave.
        read: See `blocks_read`.
    """

    def __init__(
        self, denoiser: nn.Module, states: Iterable[ComponentState], encodings: Encodings, read: Mapping[str, int]
    ) -> None:
        super().__init__(denoiser)
        self.states, self.encodings, self.read = list(states), encodings, read
        self.reported: set[str] = set()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Warn, or raise `BypassedErasureError` under a strict erasure or a lock; change nothing."""
        if torch.compiler.is_compiling() or KNOWN.quiet or not any(state.in_force() for state in self.states):
            return args, kwargs
        if (locked := lock_of(self.states)) is not None and not known.is_admitted(locked):
            warn_or_refuse(self.states, names_in_force(self.states), STRANGER)
        if apart := rounds.differing_subjects() & {name for state in self.states for name in state.in_force()}:
            warn_or_refuse(self.states, ", ".join(sorted(apart)), APART)
        given = self.by_name(args, kwargs)
        added = given.get("added_cond_kwargs") or {}
        tokens, places = given.get("encoder_hidden_states"), given.get("img_ids")
        for way, conditioning in (
            ("prompt_embeds", tokens),
            ("pooled_prompt_embeds", added.get("text_embeds", given.get("pooled_projections"))),
        ):
            if isinstance(conditioning, Tensor) and not self._checked(conditioning):
                self._check(way, conditioning)
                # Tokens with a nonzero first position are those of reference images.
                if conditioning is tokens and isinstance(places, Tensor) and bool((places[..., 0] != 0).any()):
                    self._once(REFERENCE)
        shown = {**added, **(given.get("joint_attention_kwargs") or {})}
        if any(shown.get(key) is not None for key in SHOWN):
            self._once(IMAGE_PROMPT)
        if any(given.get(key) is not None for key in CONTROLLED) and (names := names_in_denoisers(self.states)):
            self._once(CONTROL, names)
        return args, kwargs

    def _check(self, way: str, conditioning: Tensor) -> None:
        """Search the denoiser's conditioning among the text encoders' outputs."""
        skipped = known.skipped_blocks(self.states, self.encodings, conditioning)
        if skipped is None:
            warn_or_refuse(self.states, names_on_text(self.states), EMBEDDINGS, way=way)
        elif skipped and not KNOWN.calling and (unfit := known.unfit_for_skipping(self.states, self.read, skipped)):
            warn_or_refuse(self.states, unfit, CLIP_SKIP, way=str(skipped))
        free = self.encodings.free
        if free is not None and conditioning.ndim == 3:
            length = conditioning[:, free.places].shape[1]
            if others := made_for_others(self.states, free.component, length):
                self._once(TEXT_LENGTH, ", ".join(others), length=length, made=next(iter(others.values())))
        KNOWN.checked.append((weakref.ref(conditioning), self.encodings))

    def _checked(self, conditioning: Tensor) -> bool:
        """Whether it was checked in an earlier pass; the same tensors are used at every step of an image."""
        return any(last() is conditioning and encodings is self.encodings for last, encodings in KNOWN.checked)

    def _once(self, reason: str, names: str = "", **words: object) -> None:
        key = reason.format(names=names, **words)
        if key not in self.reported or is_refused(self.states, reason):
            self.reported.add(key)
            warn_or_refuse(self.states, names or names_in_force(self.states), reason, **words)


class _WatchPictures:
    """Check on a VAE for initial pictures, with the states of the pipeline's other networks."""

    def __init__(self, states: Iterable[ComponentState]) -> None:
        self.states = list(states)

    def __call__(self, vae: nn.Module, *args: object, **kwargs: object) -> None:
        """Warn while an erasure is in force."""
        if not KNOWN.quiet and (names := names_in_force(self.states)):
            warn_or_refuse(self.states, names, PICTURE)


def install(components: Mapping[str, nn.Module], backbone: Backbone, states: Mapping[str, ComponentState]) -> None:
    """Install a pipeline's guards, or remove them where nothing is attached any more."""
    denoiser = components[backbone.denoiser_component]
    attached = {name: state for name, state in states.items() if state.record.attached}
    in_force = [item for state in attached.values() if state.is_text_encoder for item in state.in_force().items()]
    signature = tuple((name, one.strength) for name, one in in_force)
    before = encodings_of(denoiser)
    if before is not None and before.erasures == signature:
        encodings = before
    else:
        tokens = backbone.written()
        free = next((part for part in tokens if not backbone.tower(part.component).causal), None)
        encodings = Encodings(signature, tokens, backbone.pooled(), free)
    for component in components.values():
        if attached:
            CallGuard.install(component, "save_pretrained", refuse_unsaveable)
        else:
            CallGuard.remove(component, "save_pretrained")
    for tower in backbone.towers:
        known.forget(tower)
        if tower.component in attached:
            known.watch(tower, encodings)
    for one in {
        id(one.erasure): one for state in attached.values() for one in state.record.attached.values()
    }.values():
        words_of(one.erasure)
    share_gates(backbone.pipe, states.values())
    one_step.install(denoiser, backbone, attached.values())
    hooks.remove_hook(denoiser, _ENTRY)
    if "vae" in components:
        CallGuard.remove(components["vae"], "encode")
    if attached:
        entry = _AtEntry(denoiser, attached.values(), encodings, known.blocks_read(components))
        hooks.register_hook(denoiser, entry, _ENTRY)
        if "vae" in components:
            CallGuard.install(components["vae"], "encode", _WatchPictures(attached.values()))


def share_gates(pipe: DiffusionPipeline, states: Iterable[ComponentState]) -> None:
    """Let a pipeline's text encoders share which gates are open, if an erasure has gates in several."""
    EncodedTogether.set(pipe, any(state.shares_gates for state in states))


def encodings_of(denoiser: nn.Module) -> Encodings | None:
    """Get the encodings that a denoiser's guard remembers."""
    hook = hooks.find_hook(denoiser, _ENTRY)
    return hook.encodings if isinstance(hook, _AtEntry) else None
