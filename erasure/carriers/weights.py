"""Weight edits in a live model: put in, and taken out again bit for bit.

An edit is written into the parameter itself: `W = W_base + sum_i strength_i * delta_i`, computed in float32 on the CPU
from a copy of `W_base` that stays there, never from the edited tensor. So taking an edit off restores the base bit for
bit, and an attached erasure costs nothing per image, survives `torch.compile`, offloading, IP-Adapter and attention
processors, and leaves parameter names alone. Quantised weights cannot be written: there, low-rank edits become PEFT
adapters and full-rank ones are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from erasure.carriers.edits import LowRank
from erasure.errors import (
    AttachError,
    NoMatchingModuleError,
    UnsupportedModelError,
    WrongBaseError,
)
from erasure.interop import paths

FINGERPRINT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def delta_of(edit: Tensor | LowRank) -> Tensor:
    """An edit as a dense float32 tensor on the CPU."""
    if isinstance(edit, LowRank):
        return edit.up.float().cpu() @ edit.down.float().cpu()
    return edit.float().cpu()


def fingerprint(tensor: Tensor) -> dict[str, str]:
    """sha256 of a tensor at its own precision and at every lower one, by dtype name."""
    source = tensor.detach().cpu()
    names = ["float16", "bfloat16"] if source.dtype in (torch.float32, torch.float64) else []
    own = str(source.dtype).removeprefix("torch.")
    names = [own if own in FINGERPRINT_DTYPES else "float32", *names]
    return {name: _sha256(source.to(FINGERPRINT_DTYPES[name])) for name in dict.fromkeys(names)}


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def same_base(tensor: Tensor, expected: Mapping[str, str]) -> bool:
    """Whether a base tensor is the one of a fingerprint.

    Compared at the fingerprint's highest precision, and at a lower one if the tensor holds no more than that: the same
    model loaded in float16 is the same base, a fine-tuned one that float16 could not tell apart is not.
    """
    own = tensor.detach().cpu()
    for rank, name in enumerate(name for name in FINGERPRINT_DTYPES if name in expected):
        rounded = own.to(FINGERPRINT_DTYPES[name])
        if (rank == 0 or torch.equal(rounded.to(own.dtype), own)) and _sha256(rounded) == expected[name]:
            return True
    return False


Terms = list[tuple[float, Tensor | LowRank]]
"""(strength, edit) pairs of one parameter."""


class ComponentWeights:
    """The edited parameters of one component.

    Kept on the module itself (not on the pipeline), because pipelines share modules and copies of a module must carry
    their own state.
    """

    def __init__(self) -> None:
        self.originals: dict[str, Tensor] = {}
        """CPU copies of base parameters that are edited now, by path."""
        self.written: dict[str, Terms] = {}
        """The terms that were last written, by path."""

    def base(self, component: nn.Module, path: str) -> Tensor:
        """The base value of a parameter, whether it is edited now or not."""
        return self.originals[path] if path in self.originals else paths.parameter(component, path)

    def check(
        self,
        name: str,
        component: nn.Module,
        edits: Mapping[str, Tensor | LowRank],
        digests: Mapping[str, Mapping[str, str]] | None,
    ) -> None:
        """Raise unless every edit can be written here: paths, shapes, plain weights, the right base.

        Args:
            name: The component's name, for messages.
            component: The module.
            edits: Edits by parameter path.
            digests: Expected fingerprints by path, or `None` not to look.
        """
        for path, edit in edits.items():
            found = paths.parameter(component, path)
            shape = (edit.up.shape[0], edit.down.shape[1]) if isinstance(edit, LowRank) else tuple(edit.shape)
            if paths.is_plain(found) and tuple(found.shape) != shape:
                raise WrongBaseError(
                    f"{name}/{path} has shape {tuple(found.shape)}, the erasure expects {shape}: "
                    "it was made for another model"
                )
        if digests is None:
            return
        # Besides what is edited, the blocks whose output is.
        known = [path for path in {**edits, **digests} if paths.is_plain(paths.parameter(component, path))]
        unlike = [
            path for path in known if path in digests and not same_base(self.base(component, path), digests[path])
        ]
        if unlike:
            raise WrongBaseError(
                f"{len(unlike)} of {len(known)} tensors of {name!r} are not those that the erasure was made for, "
                f"first {unlike[0]!r}: load the base model named in its config, or pass check_base=False if you know "
                "that it fits"
            )

    def write(self, component: nn.Module, edits: Mapping[str, Terms]) -> None:
        """Make the parameters equal to base + sum of strength * delta, and restore all others.

        Args:
            component: The module.
            edits: For every path to edit, its terms.

        Raises:
            AttachError: Something else changed an edited parameter meanwhile; nothing is written then.
        """
        self.check_intact(component)
        for path in list(self.originals):
            if path not in edits:
                self._set(component, path, self.originals.pop(path))
        for path, terms in edits.items():
            if path not in self.originals:
                self.originals[path] = paths.parameter(component, path).detach().to("cpu", copy=True)
            self._set(component, path, self.edited(component, path, terms))
        self.written = dict(edits)

    def edited(self, component: nn.Module, path: str, terms: Terms) -> Tensor:
        """What a parameter must be with these terms, in its base's dtype, on the CPU."""
        base = self.base(component, path)
        value = base.detach().float().cpu()
        for strength, edit in terms:
            value = value + strength * delta_of(edit)
        return value.to(base.dtype)

    def holds(self, component: nn.Module, path: str, terms: Terms) -> bool:
        """Whether a parameter is what these terms make of it, but for a cast of the whole model since."""
        found, expected = paths.parameter(component, path).detach().cpu(), self.edited(component, path, terms)
        routes = (found.dtype, torch.float16, torch.bfloat16)
        return any(torch.equal(expected.to(route).to(found.dtype).float(), found.float()) for route in routes)

    def check_intact(self, component: nn.Module) -> None:
        """Raise `AttachError` when an edited parameter is not what was written into it."""
        for path, terms in self.written.items():
            if not self.holds(component, path, terms):
                raise AttachError(
                    f"{path} was changed by something else since the erasure was attached, and that change would be "
                    "lost: undo it first (for instance unfuse_lora()), or load the model again"
                )

    @torch.no_grad()
    def _set(self, component: nn.Module, path: str, value: Tensor) -> None:
        paths.parameter(component, path).copy_(value)


def refuse_unwritable(name: str, component: nn.Module, edits: Mapping[str, Tensor | LowRank]) -> bool:
    """Whether edits must go through a PEFT adapter because weights are quantised.

    Raises:
        UnsupportedModelError: Full-rank edits on quantised weights, or fused query-key-value projections.
        NoMatchingModuleError: The component lacks a module that the erasure edits.
    """
    quantised = []
    for path, edit in edits.items():
        if paths.is_fused(component, path.rsplit(".", 2)[0]):
            raise UnsupportedModelError(
                f"{name}/{path} is inside an attention with fused query-key-value projections, which would ignore the "
                "edit: call pipe.unfuse_qkv_projections() first"
            )
        try:
            found = paths.parameter(component, path)
        except AttributeError:
            raise NoMatchingModuleError(
                f"{name} has no {path!r}: the erasure was made for another architecture"
            ) from None
        if not paths.is_plain(found):
            if not isinstance(edit, LowRank):
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
