"""An erasure as patches of a MODEL and a CLIP: made, checked against the weights that are there, and verified.

The names are those that `erasure export --to comfyui` writes. ComfyUI passes over names that it does not know and over
shapes that do not fit, with a line in its log; here both are errors, and nothing is patched then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from erasure import Erasure
from erasure.backbones import family_named
from erasure.backbones.layouts import Place, heights, taken
from erasure.carriers.edits import TEXT_ENCODERS
from erasure.carriers.weights import same_base, sample_of, shape_of
from erasure.errors import NoMatchingModuleError, VerificationError, WrongBaseError
from erasure.exchange.factors import TOKEN_TABLES
from erasure.exchange.loaders import CLIP_H, Model, ahead_in_comfyui, encoder_in_comfyui
from erasure.exchange.lora_files import comfyui_tensors, refuse_in_comfyui
from erasure.fitting import check_strength

from .loaded import DENOISER, Clip, Patcher, Side, Target, sides_of

DOWN, UP, ALPHA, WHOLE, BIAS = ".lora_down.weight", ".lora_up.weight", ".alpha", ".diff", ".diff_b"
"""Ends of the names of tensors in a LoRA file."""
IN_FORCE = 0.9
"""Share of an edit that a weight must hold to count as erased: other patches may take back a tenth."""
UNCHECKED = "or switch check_base off if you know that it fits"


@dataclass(frozen=True)
class Change:
    """What an erasure changes of one tensor."""

    side: Side
    target: Target
    tensors: Mapping[str, Tensor]
    """As a LoRA file has them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the change is made for."""
        ends = {end: tensor for name, tensor in self.tensors.items() for end in (UP, DOWN) if name.endswith(end)}
        if ends:
            return (len(ends[UP]), *ends[DOWN].shape[1:])
        return tuple(next(iter(self.tensors.values())).shape)

    @property
    def delta(self) -> Tensor:
        """The change itself, in float32 on the CPU."""
        by_end = {end: t.float().cpu() for name, t in self.tensors.items() for end in (UP, DOWN) if name.endswith(end)}
        if by_end:
            return (by_end[UP].flatten(1) @ by_end[DOWN].flatten(1)).view(self.shape)
        return next(iter(self.tensors.values())).float().cpu()


class Weights:
    """The weights of a MODEL and a CLIP without patches, by the names that erasures have for them.

    Args:
        family: Family of the erasure.
        model: The MODEL.
        clip: The CLIP, where there is one.
    """

    def __init__(self, family: str, model: Side, clip: Side | None) -> None:
        self.sides = {"denoiser": model, "text": clip}
        kind = family_named(family)
        names = [key.removeprefix(DENOISER) for key in model.entries if key.startswith(DENOISER)]
        self.model = Model(family, None if kind is None else kind.layout_of(names))

    def side(self, component: str) -> Side | None:
        """The side on which a component stands."""
        return self.sides["text" if component in TEXT_ENCODERS else "denoiser"]

    def at(self, key: str) -> Tensor | None:
        """A parameter in the form that diffusers has it in; `None` where there is none.

        Args:
            key: `component/module.path.parameter`.
        """
        component, path = key.split("/", 1)
        side = self.side(component)
        if side is None:
            return None
        if component in TEXT_ENCODERS:
            encoder = encoder_in_comfyui(component, side.entries)
            return None if encoder is None else side.base(f"{ahead_in_comfyui(encoder)}{path}")
        place, found = self._placed(path)
        if place is None or found is None or place.parts == 1:
            return None if place is None or found is None else taken(place, found, [])
        rows = self._heights(path.rpartition(".")[0])
        return None if rows is None else taken(place, found, rows)

    def rows(self, path: str) -> int | None:
        """The rows of a layer's weight, by its path in the denoiser."""
        place, rows = self._placed(f"{path}.weight")[0], self._heights(path)
        return None if place is None or rows is None else rows[place.part]

    def _placed(self, path: str) -> tuple[Place | None, Tensor | None]:
        """The place of one of the denoiser's parameters, and the tensor there."""
        place, side = None if self.model.layout is None else self.model.layout(path), self.sides["denoiser"]
        return place, None if place is None or side is None else side.base(f"{DENOISER}{place.key}")

    def _heights(self, path: str) -> list[int] | None:
        """The rows of each layer in the tensor that holds a layer's weight."""
        place, found = self._placed(f"{path}.weight")
        return None if place is None or found is None else heights(place, found)

    def encoders(self, component: str) -> list[dict[str, Tensor]]:
        """The parameters of a text encoder by path, without the table of tokens, as pipelines may have it.

        Those of Stable Diffusion 2.x leave out its last block, which they never use. Empty where it is not there.
        """
        side = self.sides["text"]
        name = None if side is None else encoder_in_comfyui(component, side.entries)
        if side is None or name is None:
            return []
        ahead = ahead_in_comfyui(name)
        paths = [key.removeprefix(ahead) for key in side.entries if key.startswith(ahead)]
        found = {path: side.base(ahead + path) for path in paths if not path.endswith(TOKEN_TABLES)}
        whole = {path: tensor for path, tensor in found.items() if tensor is not None}
        if name != CLIP_H:
            return [whole]
        blocks = {int(path.split(".")[2]) for path in whole if path.startswith("encoder.layers.")}
        last = f"encoder.layers.{max(blocks, default=0)}."
        return [whole, {path: tensor for path, tensor in whole.items() if not path.startswith(last)}]


def check_fit(erasure: Erasure, weights: Weights, check_base: bool) -> None:
    """Raise unless every edit of an erasure fits the weights that are there.

    Args:
        erasure: The erasure.
        weights: The weights.
        check_base: Compare them with the fingerprints that the erasure has of its base.

    Raises:
        NoMatchingModuleError: It edits text encoders, and there is no CLIP.
        WrongBaseError: A layer is missing, has another shape, or is not the one that the erasure was made for.
    """
    digests: Mapping[str, Mapping[str, str]] = erasure.config.base.get("tensors", {})
    unlike, known = [], 0
    for component in erasure.components:
        if weights.side(component) is None:
            raise NoMatchingModuleError(
                f"{erasure.name} edits the {component}, and no CLIP is connected: connect that of the same model"
            )
        for path, edit in erasure.edits.of(component).items():
            key = f"{component}/{path}"
            if (found := weights.at(key)) is None:
                raise WrongBaseError(
                    f"{erasure.name} edits {key!r}, which this model does not have: it was made for "
                    f"{_base_of(erasure)}. Load that model"
                )
            if tuple(found.shape) != shape_of(edit):
                raise WrongBaseError(
                    f"{key} has the shape {tuple(found.shape)} here, {erasure.name} expects {shape_of(edit)}: it was "
                    f"made for {_base_of(erasure)}. Load that model"
                )
            known += 1
            if check_base and key in digests and not same_base(found, digests[key]):
                unlike.append(key)
    if unlike:
        raise WrongBaseError(
            f"{len(unlike)} of {known} tensors are not those that {erasure.name} was made for, first {unlike[0]!r} "
            f"(weights in 8 bits and less are never the same): load {_base_of(erasure)}, {UNCHECKED}"
        )
    if check_base and weights.sides["text"] is not None:
        _check_encoders(erasure, weights)


def _check_encoders(erasure: Erasure, weights: Weights) -> None:
    """Raise `WrongBaseError` unless the text encoders are those in whose language the denoiser is told to forget."""
    for component, digest in erasure.config.base.get("text_encoders", {}).items():
        if not any(same_base(sample_of(found), digest) for found in weights.encoders(component) if found):
            raise WrongBaseError(
                f"{erasure.name} was fitted to another {component} than this CLIP has, so it would erase something "
                f"else: load {_base_of(erasure)}, {UNCHECKED}"
            )


def _base_of(erasure: Erasure) -> str:
    return f"{erasure.config.base.get('model') or 'a model without a name'} ({erasure.config.family})"


def changes_of(erasure: Erasure, model: Patcher, clip: Clip | None, check_base: bool) -> list[Change]:
    """What an erasure changes in a model that ComfyUI has loaded.

    Raises:
        UnsupportedModelError: Patches cannot hold what the erasure does.
        NoMatchingModuleError: It edits text encoders, and there is no CLIP.
        WrongBaseError: It is for another model.
    """
    refuse_in_comfyui(erasure)
    denoiser, text = sides_of(model, clip)
    weights = Weights(erasure.config.family, denoiser, text)
    check_fit(erasure, weights, check_base)
    bases = {key: base for key in erasure.edits.maps if (base := weights.at(f"{key}.weight")) is not None}
    by_stem: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for name, tensor in comfyui_tensors(erasure, weights.model, bases, weights.rows).items():
        ending = next(end for end in (DOWN, UP, ALPHA, BIAS, WHOLE) if name.endswith(end))
        by_stem.setdefault((name.removesuffix(ending), ending == BIAS), {})[name] = tensor
    return [_change(erasure, stem, of_bias, tensors, denoiser, text) for (stem, of_bias), tensors in by_stem.items()]


def _change(
    erasure: Erasure, stem: str, of_bias: bool, tensors: Mapping[str, Tensor], denoiser: Side, text: Side | None
) -> Change:
    side = next((side for side in (denoiser, text) if side is not None and stem in side.names), None)
    if side is None:
        raise WrongBaseError(
            f"{erasure.name} changes {stem!r}, which ComfyUI does not know in this model and would pass over: load "
            f"{_base_of(erasure)}"
        )
    target = side.names[stem]
    if of_bias:
        target = f"{(target if isinstance(target, str) else target[0]).removesuffix('.weight')}.bias"
    change = Change(side, target, tensors)
    if tuple(side.required(target).shape) != change.shape:
        raise WrongBaseError(
            f"{target!r} has the shape {tuple(side.required(target).shape)} in this {side.title}, {erasure.name} "
            f"expects {change.shape}: load {_base_of(erasure)}"
        )
    return change


def applied(
    erasure: Erasure, model: Patcher, clip: Clip | None, strength: float = 1.0, check_base: bool = True
) -> tuple[Patcher, Clip | None, str]:
    """A model with an erasure; what was given stays as it was.

    Args:
        erasure: The erasure.
        model: What a loader gives as MODEL.
        clip: What it gives as CLIP; may be left out where no text encoder is edited.
        strength: How much of the erasure; 1 is as made, 0 gives back what came.
        check_base: Compare weights with the fingerprints that the erasure has of its base.

    Returns:
        MODEL and CLIP with patches, and a line on what was done.

    Raises:
        AttachError: A strength that is none.
        ErasureError: As `changes_of`; nothing is changed then.
        VerificationError: ComfyUI did not take every patch.
    """
    strength = check_strength(strength)
    changes = changes_of(erasure, model, clip, check_base)
    if strength == 0:
        return model, clip, f"{erasure.name}: strength 0, nothing is erased"
    of_model = [change for change in changes if change.side.title == "MODEL"]
    of_clip = [change for change in changes if change.side.title == "CLIP"]
    erased, read = model, clip
    if of_model:
        erased = model.clone()
        _add(erased, of_model, strength)
    if of_clip and clip is not None:
        read = clip.clone()
        _add(read, of_clip, strength)
    encoders = "" if clip is not None else ", its text encoders are unknown"
    base = f"base checked{encoders}" if check_base else "base not checked"
    told = f"{len(of_model)} tensors of MODEL, {len(of_clip)} of CLIP, strength {strength:g}, {base}"
    return erased, read, f"{erasure.name}: {told}"


def _add(patched: Patcher | Clip, changes: list[Change], strength: float) -> None:
    from comfy import lora

    names = {name: tensor for change in changes for name, tensor in change.tensors.items()}
    wanted = {change.target for change in changes}
    patches: Mapping[Target, object] = lora.load_lora(names, changes[0].side.names)
    held = set(patched.add_patches(patches, strength))
    if held != wanted or set(patches) != wanted or len(wanted) != len(changes):
        missing = sorted(map(str, wanted - held)) or sorted(map(str, set(patches) - wanted)) or ["a tensor twice"]
        raise VerificationError(
            f"ComfyUI took {len(held & wanted)} of {len(changes)} patches (first that is wrong: {missing[0]}): this "
            "version of ComfyUI reads LoRA files in another way. Export the erasure as a file (erasure export --to "
            "single-file)"
        )


def verified(erasure: Erasure, model: Patcher, clip: Clip | None, strength: float = 1.0) -> str:
    """Make sure that an erasure is in force in a model, whatever else was done to it.

    Every tensor that the erasure edits is computed as ComfyUI computes it for drawing, with all its patches, and must
    hold nine tenths of the edit or more.

    Args:
        erasure: The erasure.
        model: The MODEL that draws.
        clip: The CLIP that reads prompts.
        strength: The least strength.

    Returns:
        A line on what was found.

    Raises:
        ErasureError: As `changes_of`.
        VerificationError: The erasure is not in force.
    """
    from comfy import lora

    strength = check_strength(strength)
    if strength == 0:
        raise VerificationError("a strength of 0 is none: say at which strength the erasure is to be in force")
    changes = changes_of(erasure, model, clip, True)
    shares = []
    for change in changes:
        key, place = (change.target, None) if isinstance(change.target, str) else change.target
        base, edit = change.side.required(key).float().cpu(), change.delta.double()
        if not edit.any():
            continue
        patched = lora.calculate_weight(list(change.side.patches_of(key)), base.clone(), key)
        moved = (patched.cpu() - base).double()
        moved = moved if place is None else moved.narrow(*place)
        share = float((moved * edit).sum() / edit.square().sum())
        # A weight that is not finite has no share, and no comparison with it holds.
        if not share >= IN_FORCE * strength:
            raise VerificationError(
                f"{erasure.name} is not in force: {key} holds {share:.2f} of the edit, expected {strength:g}. Connect "
                "what Apply Erasure gives, and put other patches ahead of it or leave out those that take it back"
            )
        shares.append(share)
    least = min(shares)
    return f"{erasure.name}: in force in {len(changes)} tensors, at {least:.2f} or more of the strength as made"


__all__ = ["Change", "Weights", "applied", "changes_of", "check_fit", "verified"]
