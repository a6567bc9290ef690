"""Attach erasures to a live pipeline, in any number, and take them off bit for bit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from erasure import modules
from erasure.artifact import Erasure
from erasure.backbones import backbone_for
from erasure.carriers.activations import PinnedPrompts
from erasure.carriers.weights import ComponentWeights, LowRank, refuse_unwritable
from erasure.errors import AttachError, BypassedErasureWarning, NoMatchingModuleError, VerificationError, WrongBaseError

_STATE = "_erasures"
_NAMES = "_erasure_names"


@dataclass
class Attached:
    """One erasure on one or several components."""

    erasure: Erasure
    strength: float = 1.0
    active: bool = True
    """Whether `set_erasures` chose it."""
    fused: bool = False
    """Whether it counts as part of the model: not touched by `set_erasures`, `disable` and `unload`."""
    adapters: set[str] = field(default_factory=set)
    """Components where it is a PEFT adapter, because their weights are quantised."""


class ComponentState:
    """All erasures of one component. Lives on the module, so pipelines that share the module share it."""

    def __init__(self) -> None:
        self.attached: dict[str, Attached] = {}
        self.enabled = True
        self.weights = ComponentWeights()

    def in_force(self) -> dict[str, Attached]:
        """What must be in force now, by name."""
        return {name: a for name, a in self.attached.items() if a.fused or (self.enabled and a.active)}

    def terms(self, component: str) -> dict[str, list[tuple[float, Any]]]:
        """The (strength, edit) pairs of every parameter to write, in the order of attaching."""
        found: dict[str, list[tuple[float, Any]]] = {}
        for attached in self.in_force().values():
            if component not in attached.adapters:
                for path, edit in attached.erasure.edits.of(component).items():
                    found.setdefault(path, []).append((attached.strength, edit))
        return found

    def refresh(self, component: str, module: nn.Module) -> None:
        """Bring the module in line with what must be in force."""
        self.weights.write(module, self.terms(component))
        current = self.in_force()
        for name, attached in self.attached.items():
            if component in attached.adapters:
                modules.scale_lora(module, name, attached.strength if name in current else 0.0)
        PinnedPrompts.write(module, [a.erasure.edits.pinned[component] for a in current.values() if component in a.erasure.edits.pinned])


class ErasureManager:
    """The erasures of one pipeline.

    A view: the state lives on the pipeline's modules, so any number of managers of the same pipeline, and pipelines made
    from it with `from_pipe`, agree.

    Args:
        pipe: Any diffusers pipeline of a supported family.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe

    # What there is ------------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.pipe.components.items() if isinstance(module, nn.Module)}

    def _states(self) -> dict[str, ComponentState]:
        return {name: vars(module)[_STATE] for name, module in self._modules().items() if _STATE in vars(module)}

    def _attached(self) -> dict[str, Attached]:
        return {name: attached for state in self._states().values() for name, attached in state.attached.items()}

    @property
    def erasures(self) -> dict[str, Erasure]:
        """Every attached erasure by name."""
        return {name: attached.erasure for name, attached in self._attached().items()}

    @property
    def strengths(self) -> dict[str, float]:
        """Strength of every attached erasure."""
        return {name: attached.strength for name, attached in self._attached().items()}

    def list_erasures(self) -> dict[str, list[str]]:
        """Names of all attached erasures by component, as diffusers' `get_list_adapters`."""
        return {component: list(state.attached) for component, state in self._states().items() if state.attached}

    def active_erasures(self) -> list[str]:
        """Names of the erasures that are in force."""
        return list(dict.fromkeys(name for state in self._states().values() for name in state.in_force()))

    @property
    def fused_erasures(self) -> list[str]:
        """Names of the erasures that are fused."""
        return [name for name, attached in self._attached().items() if attached.fused]

    # Attaching ----------------------------------------------------------------------------------------------------

    def load(self, source: str | Path | Erasure, name: str | None = None, *, revision: str | None = None,
             token: str | None = None, check_base: bool = True) -> Erasure:  # fmt: skip
        """Attach an erasure from a folder, a Hub repository or memory, beside those already there."""
        erasure = source if isinstance(source, Erasure) else Erasure.load(source, revision=revision, token=token)
        self.add(erasure, name, check_base=check_base)
        return erasure

    def add(self, erasure: Erasure, name: str | None = None, strength: float = 1.0, *, check_base: bool = True) -> int:
        """Attach an erasure.

        Args:
            erasure: What to attach.
            name: What to call it; its own name by default.
            strength: Factor on its edits; 1 is as made.
            check_base: Compare the base tensors with the fingerprints in the artifact.

        Returns:
            How many parameters it edits.

        Raises:
            AttachError: The name is taken or unusable.
            WrongBaseError: The pipeline is not the model that the erasure was made for.
            UnsupportedModelError: Quantised weights under a full-rank edit, or fused projections.
            NoMatchingModuleError: Nothing to change.
            DivergenceError: It holds NaN or infinity.
        """
        name = name or erasure.name
        if not re.fullmatch(r"[\w-]+", name):
            raise AttachError(f"{name!r} cannot name an erasure: use letters, digits, '-' and '_'")
        if name in self._attached():
            raise AttachError(f"an erasure named {name!r} is attached already: pass another name, or delete_erasure({name!r}) first")
        family = backbone_for(self.pipe).family
        if erasure.config.family != family:
            raise WrongBaseError(f"the erasure {name!r} is for {erasure.config.family}, the pipeline {type(self.pipe).__name__} is {family}")
        if not len(erasure.edits):
            raise NoMatchingModuleError(f"the erasure {name!r} changes nothing: it holds no tensors")
        erasure.edits.check_finite()
        attached = Attached(erasure, strength)
        with modules.without_offloading(self.pipe):
            available = self._modules()
            for component in erasure.components:
                if component not in available:
                    raise WrongBaseError(f"the erasure {name!r} edits {component!r}, which this pipeline lacks (it has {', '.join(available)})")
                self._check(component, available[component], attached, check_base)
            written: list[str] = []
            try:
                for component in erasure.components:
                    written.append(component)
                    self._put(component, available[component], name, attached)
            except BaseException:
                for component in written:
                    self._take(component, available[component], name)
                raise
        vars(self.pipe).setdefault(_NAMES, {})[name] = list(erasure.components)
        self._guard()
        return len(erasure.edits)

    def _check(self, component: str, module: nn.Module, attached: Attached, check_base: bool) -> None:
        edits = attached.erasure.edits.of(component)
        if refuse_unwritable(component, module, edits):
            attached.adapters.add(component)
        state = vars(module).get(_STATE, ComponentState())
        prefix = component + "/"
        digests = attached.erasure.config.base.get("tensors", {})
        expected = {key.removeprefix(prefix): value for key, value in digests.items() if key.startswith(prefix)}
        state.weights.check(component, module, edits, expected if check_base else None)

    def _put(self, component: str, module: nn.Module, name: str, attached: Attached) -> None:
        state = vars(module).setdefault(_STATE, ComponentState())
        state.attached[name] = attached
        if component in attached.adapters:
            lora = attached.erasure.edits.lora_state_dict()
            modules.add_lora(self.pipe, component, name, lora, attached.strength)
        state.refresh(component, module)

    def _take(self, component: str, module: nn.Module, name: str) -> None:
        state = vars(module).get(_STATE)
        if state is None or name not in state.attached:
            return
        attached = state.attached.pop(name)
        if component in attached.adapters:
            modules.delete_lora(module, name)
        state.refresh(component, module)
        if not state.attached:
            del vars(module)[_STATE]

    def _refresh(self) -> None:
        with modules.without_offloading(self.pipe):
            for component, state in self._states().items():
                state.refresh(component, self._modules()[component])
        self._guard()

    def _known(self, names: str | Sequence[str] | None) -> list[str]:
        attached = self._attached()
        chosen = list(attached) if names is None else [names] if isinstance(names, str) else list(names)
        unknown = [name for name in chosen if name not in attached]
        if unknown:
            raise AttachError(f"no erasure named {unknown[0]!r} is attached; attached: {', '.join(attached) or 'none'}")
        return chosen

    # Changing -----------------------------------------------------------------------------------------------------

    def set_erasures(self, names: str | Sequence[str], strengths: float | Sequence[float] | None = None) -> None:
        """Put exactly these erasures in force (fused ones stay), as diffusers' `set_adapters`.

        Raises:
            AttachError: An unknown or fused name, or another number of strengths than of names.
        """
        chosen = self._known(names)
        factors = [1.0 if strengths is None else float(strengths)] * len(chosen) if not isinstance(strengths, Sequence) else list(strengths)
        if len(factors) != len(chosen):
            raise AttachError(f"{len(factors)} strengths for {len(chosen)} erasures: give one for each, or a single number")
        fused = [name for name in chosen if name in self.fused_erasures]
        if fused:
            raise AttachError(f"{fused[0]!r} is fused and always in force: unfuse_erasure() first")
        wanted = dict(zip(chosen, factors, strict=True))
        for name, attached in self._attached().items():
            if not attached.fused:
                attached.active, attached.strength = name in wanted, wanted.get(name, attached.strength)
        self._refresh()

    def disable(self) -> None:
        """Put the stock model in force (fused erasures stay); `enable` undoes it."""
        self._switch(False)

    def enable(self) -> None:
        """Undo `disable`."""
        self._switch(True)

    def _switch(self, enabled: bool) -> None:
        for state in self._states().values():
            state.enabled = enabled
        self._refresh()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The stock model inside the block; afterwards what was in force before."""
        before = {name: state.enabled for name, state in self._states().items()}
        self.disable()
        try:
            yield
        finally:
            for name, state in self._states().items():
                state.enabled = before.get(name, state.enabled)
            self._refresh()

    def delete(self, names: str | Sequence[str]) -> None:
        """Take erasures off; what they alone edited equals the base bit for bit afterwards."""
        chosen = self._known(names)
        with modules.without_offloading(self.pipe):
            for name in chosen:
                for component, module in self._modules().items():
                    self._take(component, module, name)
                vars(self.pipe).get(_NAMES, {}).pop(name, None)
        self._guard()

    def unload(self) -> None:
        """Take every erasure off that is not fused."""
        self.delete([name for name, attached in self._attached().items() if not attached.fused])

    def fuse(self, names: str | Sequence[str] | None = None) -> None:
        """Make erasures part of the model: they stay through `set_erasures`, `disable` and `unload`.

        Raises:
            AttachError: One is not in force, or lives in PEFT adapters on quantised weights.
        """
        for name in self._known(names):
            attached = self._attached()[name]
            if name not in self.active_erasures():
                raise AttachError(f"{name!r} is not in force: enable it or set_erasures([{name!r}]) before fusing")
            if attached.adapters:
                raise AttachError(f"{name!r} is an adapter on quantised weights and cannot be fused: fuse into the unquantised model")
            attached.fused = True

    def unfuse(self, names: str | Sequence[str] | None = None) -> None:
        """Undo `fuse`."""
        for name in self._known(self.fused_erasures if names is None else names):
            self._attached()[name].fused = False
        self._refresh()

    # Proof --------------------------------------------------------------------------------------------------------

    def verify(self) -> int:
        """Prove that every attached erasure is in force, by comparing each edited tensor with what it must be.

        Returns:
            How many tensors were compared.

        Raises:
            VerificationError: None is attached; one is switched off, lost with a replaced component, or overwritten.
        """
        states, compared = self._states(), 0
        remembered: dict[str, list[str]] = vars(self.pipe).get(_NAMES, {})
        if not remembered and not self._attached():
            raise VerificationError("no erasure is attached: load_erasure() or erase() first")
        for name, components in remembered.items():
            lost = [c for c in components if c not in states or name not in states[c].attached]
            if lost:
                raise VerificationError(f"{name!r} is gone from {', '.join(lost)}: the component was replaced; load the erasure again")
        for component, state in states.items():
            idle = [name for name in state.attached if name not in state.in_force()]
            if idle:
                raise VerificationError(f"{idle[0]!r} is attached to {component} but switched off: enable_erasures() or set_erasures()")
            module = self._modules()[component]
            for path, terms in state.terms(component).items():
                compared += 1
                found = modules.parameter(module, path)
                if found.device.type == "meta":
                    raise VerificationError(f"{component}/{path} is offloaded and cannot be read: verify before enabling sequential offload")
                if modules.is_fused(module, path.rsplit(".", 2)[0]):
                    raise VerificationError(f"{component}/{path} is bypassed by fused query-key-value projections: unfuse_qkv_projections()")
                if not torch.equal(found, state.weights.edited(module, path, terms)):
                    raise VerificationError(f"{component}/{path} is not what the erasures make of it: something else changed it")
            for name, attached in state.attached.items():
                if component in attached.adapters:
                    layers = sum(name in layer.lora_A and name in layer.active_adapters for layer in modules.lora_layers(module))
                    expected = sum(isinstance(edit, LowRank) for edit in attached.erasure.edits.of(component).values())
                    if layers != expected:
                        raise VerificationError(f"adapter {name!r} is active in {layers} of {expected} layers of {component}")
                    compared += layers
            pins = [a.erasure.edits.pinned[component] for a in state.in_force().values() if component in a.erasure.edits.pinned]
            if not PinnedPrompts.is_written(module, pins):
                raise VerificationError(f"the pinned prompts of {component} are not in force: something removed their hooks")
        return compared

    def _guard(self) -> None:
        """Warn about `prompt_embeds=` exactly while a text-side erasure is in force."""
        text_side = any(component.startswith("text_encoder") and state.in_force() for component, state in self._states().items())
        if text_side and hasattr(type(self.pipe), "encode_prompt"):
            modules.CallGuard.install(self.pipe, "encode_prompt", warn_if_bypassed)
        else:
            modules.CallGuard.remove(self.pipe, "encode_prompt")


def warn_if_bypassed(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> None:
    """Warn when a call brings its own prompt embeddings past an erasure in the text encoder."""
    if kwargs.get("prompt_embeds") is not None:
        names = [name for part, found in ErasureManager(pipe).list_erasures().items() if part.startswith("text_encoder") for name in found]
        warnings.warn(
            f"prompt_embeds= bypasses the text-side erasures {', '.join(dict.fromkeys(names))}: unless these embeddings come from this "
            "pipeline's own encode_prompt, nothing is erased. Pass prompt=, or use a strategy that edits the denoiser.",
            BypassedErasureWarning,
            stacklevel=3,
        )
