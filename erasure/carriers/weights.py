"""Weight edits in a live model, which can be removed bit for bit.

An edit is written into the parameter itself: `W = W_base + sum_i strength_i * delta_i`, computed in float32 on the CPU
from a stored copy of `W_base`, never from the edited tensor. So removing an edit restores the base bit for bit; an
attached erasure has no cost per image, survives `torch.compile`, offloading, IP-Adapters and attention processors, and
keeps parameter names. Everything is checked and computed before the first value is written, and overwritten values are
kept until everything is written. Quantised weights cannot be written: low-rank edits run beside their layers
(`beside.py`), and full-rank ones are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from erasure.carriers.edits import Edit, InputMap, LowRank
from erasure.carriers.terms import same_terms
from erasure.errors import (
    AttachError,
    NoMatchingModuleError,
    UnsupportedModelError,
    WrongBaseError,
)
from erasure.interop import adapters, paths
from erasure.interop.scopes import plain_precision

SAMPLED = 32
"""Number of values of each parameter of a text encoder in its fingerprint."""
FINGERPRINT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@plain_precision()
def delta_of(edit: Edit, base: Tensor | None = None) -> Tensor:
    """Convert an edit to a dense float32 tensor on the CPU.

    Args:
        edit: The edit.
        base: Base value of the parameter, which input maps need.
    """
    if isinstance(edit, InputMap):
        assert base is not None, "an input map changes a weight by what the weight is"
        return base.detach().float().cpu() @ edit.up.float().cpu() @ edit.down.float().cpu()
    if isinstance(edit, LowRank):
        return edit.up.float().cpu() @ edit.down.float().cpu()
    return edit.float().cpu()


def shape_of(edit: Edit) -> tuple[int, ...]:
    """Give the shape of the parameter that an edit is for."""
    if isinstance(edit, InputMap):
        return (int(edit.outputs), edit.down.shape[1])
    return (edit.up.shape[0], edit.down.shape[1]) if isinstance(edit, LowRank) else tuple(edit.shape)


def fingerprint(tensor: Tensor) -> dict[str, str]:
    """Compute the sha256 of a tensor at its own precision and at every lower one, by dtype name."""
    source = tensor.detach().cpu()
    names = ["float16", "bfloat16"] if source.dtype in (torch.float32, torch.float64) else []
    own = str(source.dtype).removeprefix("torch.")
    names = [own if own in FINGERPRINT_DTYPES else "float32", *names]
    return {name: _sha256(source.to(FINGERPRINT_DTYPES[name])) for name in dict.fromkeys(names)}


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def same_base(tensor: Tensor, expected: Mapping[str, str]) -> bool:
    """Whether a base tensor has a fingerprint.

    Compared at the fingerprint's highest precision, and at a lower one if the tensor holds no more than that: the same
    model loaded in float16 is the same base, a fine-tuned one that float16 could not tell apart is not.
    """
    own = tensor.detach().cpu()
    for rank, name in enumerate(name for name in FINGERPRINT_DTYPES if name in expected):
        rounded = own.to(FINGERPRINT_DTYPES[name])
        if (rank == 0 or torch.equal(rounded.to(own.dtype), own)) and _sha256(rounded) == expected[name]:
            return True
    return False


def sample(encoder: nn.Module, written: WrittenEdits) -> Tensor:
    """Sample evenly spaced base values of a text encoder's parameters, without its token table, which tokens extend.

    Reading all of a large encoder whenever an erasure of the denoiser is attached would take seconds.
    """
    table = paths.token_table(paths.transformer_root(encoder)).weight
    every = [path for path in paths.canonical_parameters(encoder) if paths.parameter(encoder, path) is not table]
    return sample_of({path: written.base(encoder, path) for path in every})


def sample_of(parameters: Mapping[str, Tensor]) -> Tensor:
    """Sample parameters given by canonical path as `sample` does, without the token table."""
    flats = (parameters[path].detach().flatten() for path in sorted(parameters))
    return torch.cat([flat[:: max(1, flat.numel() // SAMPLED)].cpu() for flat in flats])


Terms = list[tuple[float, Edit]]
"""(strength, edit) pairs of one parameter."""


@dataclass(frozen=True)
class WrittenEdits:
    """The edits in the parameters of one component, and the base values."""

    originals: Mapping[str, Tensor] = field(default_factory=dict)
    """CPU copies of base parameters of attached erasures, in force or not, by path."""
    terms: Mapping[str, Terms] = field(default_factory=dict)
    """Edits that were written last, by path."""

    def base(self, component: nn.Module, path: str) -> Tensor:
        """Give the base value of a parameter, edited or not."""
        return self.originals[path] if path in self.originals else paths.parameter(component, path)

    def edited(self, component: nn.Module, path: str, terms: Terms) -> Tensor:
        """Compute the value of a parameter with these terms, in its base's dtype, on the CPU.

        Adapters that a user has merged into it (`fuse_lora`) count on top.

        Raises:
            AttachError: A merged adapter whose share in the weight cannot be told.
        """
        base = self.base(component, path)
        value = base.detach().cpu()
        value = value if value.dtype == torch.float64 else value.float()
        for strength, edit in terms:
            value = value + strength * delta_of(edit, base)
        # PEFT merges into weights; a base value that is read just now holds what is merged already.
        wrapper = _wrapper(component, path) if path in self.originals and path.endswith(".weight") else None
        try:
            merged = adapters.merged_delta(wrapper)
        except ValueError as error:
            raise AttachError(f"{path}: {error}; unfuse_lora() first") from error
        return (value if merged is None else value + merged).to(base.dtype)

    def holds(self, component: nn.Module, path: str) -> bool:
        """Whether a parameter has the written value, up to rounding by casts and merged adapters."""
        expected = self.edited(component, path, self.terms.get(path, []))
        return _is_now(component, path, expected, self.originals[path])

    def check_intact(self, name: str, component: nn.Module) -> None:
        """Raise `AttachError` when an edited parameter is not what was written into it."""
        for path in self.originals:
            if not self.holds(component, path):
                raise AttachError(
                    f"{name}/{path} was changed by something else since the erasure was attached, and that change "
                    "would be lost: undo it first (for instance unfuse_lora()), or load the model again. Nothing was "
                    "switched"
                )


@dataclass(frozen=True)
class WritePlan:
    """The values to write into one component, after all checks and before any change."""

    values: Mapping[str, Tensor]
    """New values by path, on the CPU."""
    written: WrittenEdits
    """State of the parameters afterwards."""


def plan(
    name: str, component: nn.Module, written: WrittenEdits, terms: Mapping[str, Terms], held: Collection[str]
) -> WritePlan:
    """Plan to make parameters equal to base + sum of strength * delta, and to restore all others.

    Args:
        name: The component's name, for messages.
        component: The module.
        written: What stands there now.
        terms: For every path that is to be edited, its terms.
        held: Paths whose base values are kept, edited now or not.

    Raises:
        AttachError: Something else changed an edited parameter meanwhile, or merged an adapter into one to be edited.
        UnsupportedModelError: A parameter is inside fused projections, which would ignore what is written.
    """
    written.check_intact(name, component)
    every = {**written.terms, **terms}
    changed = [
        path
        for path in every
        if path not in written.terms or path not in terms or not same_terms(written.terms[path], terms[path])
    ]
    # What is let go is as it was, to the last bit, whatever has been merged into it and taken out again.
    changed += [path for path in written.originals if path not in held and path not in every]
    originals = {path: value for path, value in written.originals.items() if path in held}
    for path in held:
        if path not in originals:
            if getattr(_wrapper(component, path), "merged", False):
                raise AttachError(f"{name}/{path} has a LoRA fused into it: unfuse_lora() first")
            originals[path] = paths.parameter(component, path).detach().to("cpu", copy=True)
    for path in changed:
        refuse_fused(name, component, path)
    after = WrittenEdits(originals, dict(terms))
    whole = WrittenEdits({**originals, **written.originals})
    return WritePlan({path: whole.edited(component, path, terms.get(path, [])) for path in changed}, after)


@torch.no_grad()
def write(component: nn.Module, values: Mapping[str, Tensor], before: list[tuple[Tensor, Tensor]]) -> None:
    """Write values into parameters.

    Args:
        component: The module.
        values: Values by path.
        before: Receives every parameter with a copy of what it held, ahead of being written.
    """
    for path, value in values.items():
        parameter = paths.parameter(component, path)
        before.append((parameter, parameter.detach().clone()))
        parameter.copy_(value)


def check_fits(
    name: str,
    component: nn.Module,
    written: WrittenEdits,
    edits: Mapping[str, Edit],
    digests: Mapping[str, Mapping[str, str]] | None,
) -> None:
    """Raise unless every edit fits: paths, shapes, the right base.

    Args:
        name: The component's name, for messages.
        component: The module.
        written: What stands in the parameters now.
        edits: Edits by parameter path.
        digests: Expected fingerprints by path, or `None` not to look.

    Raises:
        WrongBaseError: A shape or a fingerprint is another model's.
    """
    for path, edit in edits.items():
        found = paths.parameter(component, path)
        shape = shape_of(edit)
        if paths.is_plain(found) and tuple(found.shape) != shape:
            raise WrongBaseError(
                f"{name}/{path} has shape {tuple(found.shape)}, the erasure expects {shape}: "
                "it was made for another model"
            )
    if digests is None:
        return
    # Besides what is edited, the blocks whose output is.
    unknown = [path for path in digests if not _has_parameter(component, path)]
    if unknown:
        raise WrongBaseError(f"{name} has no {unknown[0]!r}: the erasure was made for another model")
    known = [path for path in {**edits, **digests} if paths.is_plain(paths.parameter(component, path))]
    unlike = [
        path for path in known if path in digests and not same_base(written.base(component, path), digests[path])
    ]
    if unlike:
        raise WrongBaseError(
            f"{len(unlike)} of {len(known)} tensors of {name!r} are not those that the erasure was made for, "
            f"first {unlike[0]!r}: load the base model named in its config, or pass check_base=False if you know "
            "that it fits"
        )


def refuse_fused(name: str, component: nn.Module, path: str) -> None:
    """Raise `UnsupportedModelError` where projections are fused: what is written there would change nothing."""
    if paths.is_fused(component, path.rsplit(".", 2)[0]):
        raise UnsupportedModelError(
            f"{name}/{path} is inside an attention with fused query-key-value projections, which would ignore the "
            "edit: call pipe.unfuse_qkv_projections() first. Nothing was switched"
        )


def is_still(component: nn.Module, path: str, value: Tensor) -> bool:
    """Whether an unedited parameter has its value, up to rounding and merged adapters."""
    expected = WrittenEdits({path: value}).edited(component, path, [])
    return _is_now(component, path, expected, expected)


def cancelled(component: nn.Module, written: WrittenEdits) -> str | None:
    """Find the path of an edit that a user's adapter cancels by half or more, or another erasure entirely."""
    for path, terms in written.terms.items():
        adapter = adapters.foreign_delta(_wrapper(component, path)) if path.endswith(".weight") else None
        if adapter is None and len(terms) < 2:
            continue
        base = written.base(component, path)
        deltas = [strength * delta_of(edit, base) for strength, edit in terms]
        whole = torch.stack(deltas).sum(0)
        # A large adapter has some share of any edit by chance; one that takes it back points the other way too.
        if adapter is not None and adapter.shape == whole.shape and _takes_back(adapter, whole, 0.5, 0.3):
            return path
        # Erasures that trade two concepts for each other take back some of each; one that negates another, all.
        if any(_takes_back(whole - delta, delta, 0.9, 0.9) for delta in deltas if len(deltas) > 1):
            return path
    return None


def _takes_back(other: Tensor, edit: Tensor, share: float, cosine: float) -> bool:
    if not edit.any() or _share(other, edit) > -share:
        return False
    return bool(torch.cosine_similarity(other.flatten().double(), edit.flatten().double(), 0) <= -cosine)


def _is_now(component: nn.Module, path: str, expected: Tensor, base: Tensor) -> bool:
    try:
        found = paths.parameter(component, path)
    except AttributeError:
        return False
    if not paths.is_plain(found) or found.shape != expected.shape:
        return False
    own = found.detach().cpu()
    return _equal(own, expected) or _rounded(own, expected, base)


def _wrapper(component: nn.Module, path: str) -> adapters.BaseTunerLayer | None:
    return adapters.wrapper_at(component, path.rsplit(".", 1)[0])


def _has_parameter(component: nn.Module, path: str) -> bool:
    try:
        paths.parameter(component, path)
    except AttributeError:
        return False
    return True


def _share(found: Tensor, wanted: Tensor) -> float:
    """Compute the share of `wanted` in `found`: 1 for all of it, 0 for none, -1 when it is subtracted."""
    a, b = found.double().flatten(), wanted.double().flatten()
    return float(a @ b / (b @ b).clamp(min=torch.finfo(torch.float64).tiny))


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Whether a tensor equals another one, cast to its dtype directly or by way of another."""
    routes = (found.dtype, torch.float16, torch.bfloat16)
    return any(torch.equal(expected.to(route).to(found.dtype).float(), found.float()) for route in routes)


def _rounded(found: Tensor, expected: Tensor, base: Tensor) -> bool:
    """Whether a tensor equals another one up to rounding by casts, or by adapters merged and unmerged.

    Besides being near, it must hold the edit, which may be smaller than the rounding of a single value.
    """
    own, wanted, stock = found.double(), expected.double(), base.double().cpu()
    away = (own - wanted).abs()
    step = torch.finfo(found.dtype).eps
    near = bool((away <= 16 * step * wanted.abs().max()).all())
    # Rounding is large in a few values at most: in bfloat16 the line above alone lets an eighth pass everywhere.
    near = near and bool(away.square().mean() <= (16 * step) ** 2 * wanted.square().mean())
    for coarse in (torch.float16, torch.bfloat16):
        if not near and torch.equal(found.to(coarse).to(found.dtype), found):
            near = bool((away <= 2 * torch.finfo(coarse).eps * wanted.abs() + torch.finfo(coarse).tiny).all())
    edit = wanted - stock
    return near and (not edit.any() or 0.9 <= _share(own - stock, edit) <= 1.1)


def is_beside(name: str, component: nn.Module, edits: Mapping[str, Edit]) -> bool:
    """Whether edits must run beside the layers, because quantised weights cannot be written.

    Raises:
        UnsupportedModelError: Full-rank edits on quantised weights, or fused query-key-value projections.
        NoMatchingModuleError: The component lacks a module that the erasure edits.
    """
    quantised = []
    for path, edit in edits.items():
        refuse_fused(name, component, path)
        try:
            found = paths.parameter(component, path)
        except AttributeError:
            if (holder := paths.holder_of(component, path)) is not None:
                raise UnsupportedModelError(
                    f"{name}/{path} is held by a {type(holder).__name__} that gives no tensor for it, quantised in a "
                    "way that is not supported: load the model plain, or with bitsandbytes, torchao or GGUF"
                ) from None
            raise NoMatchingModuleError(
                f"{name} has no {path!r}: the erasure was made for another architecture"
            ) from None
        if not paths.is_plain(found):
            if isinstance(edit, Tensor):
                raise UnsupportedModelError(
                    f"{name}/{path} is quantised ({type(found).__name__}, {found.dtype}) and a full-rank edit cannot "
                    "be written into it: attach the erasure to the unquantised model, save that and quantise it"
                )
            quantised.append(path)
    if quantised and len(quantised) < len(edits):
        raise AttachError(
            f"{name} mixes quantised and plain weights among the {len(edits)} layers to edit: "
            "quantise all of them or none"
        )
    return bool(quantised)
