"""Attach erasures to a live pipeline, in any number, and take them off bit for bit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from erasure.artifact import Erasure
from erasure.backbones import backbone_for
from erasure.carriers.embeddings import warn_of_unlike_tokens
from erasure.carriers.weights import refuse_unwritable
from erasure.errors import (
    AttachError,
    BypassedErasureWarning,
    NoMatchingModuleError,
    VerificationError,
    WrongBaseError,
)
from erasure.interop import adapters, paths, pipelines, scopes
from erasure.sae.detection import Detection, detect
from erasure.state import Attached, ComponentState

_NAMES = "_erasure_names"
"""Attribute of a pipeline: the components of every attached erasure, to notice one that is lost with its component."""


class ErasureManager:
    """The erasures of one pipeline.

    A view: the state lives on the pipeline's modules, so any number of managers of the same pipeline, and pipelines
    made from it with `from_pipe`, agree.

    Args:
        pipe: Any diffusers pipeline of a supported family.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe

    # What there is ------------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, nn.Module]:
        parts = self.pipe.components.items()
        return {name: paths.uncompiled(part) for name, part in parts if isinstance(part, nn.Module)}

    def _states(self) -> dict[str, ComponentState]:
        found = {name: ComponentState.of(module) for name, module in self._modules().items()}
        return {name: state for name, state in found.items() if state is not None}

    def _remembered(self) -> dict[str, list[str]]:
        return vars(self.pipe).setdefault(_NAMES, {})

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
        """Attach an erasure and put all attached ones in force that `set_erasures` did not leave out.

        Args:
            erasure: What to attach.
            name: What to call it; its own name by default.
            strength: Factor on its edits; 1 is as made.
            check_base: Compare the base tensors with the fingerprints in the artifact.

        Returns:
            How many parameters it edits.

        Raises:
            AttachError: The name is taken or unusable, or something else changed an edited parameter meanwhile.
            WrongBaseError: The pipeline is not the model that the erasure was made for.
            UnsupportedModelError: Quantised weights under a full-rank edit, or fused projections.
            NoMatchingModuleError: Nothing to change.
            DivergenceError: It holds NaN or infinity.
        """
        name = name or erasure.name
        self.check_name(name)
        backbone = backbone_for(self.pipe)
        family = backbone.family
        if erasure.config.family != family:
            raise WrongBaseError(
                f"the erasure {name!r} is for {erasure.config.family}, this {type(self.pipe).__name__} is {family}"
            )
        if not len(erasure.edits):
            raise NoMatchingModuleError(f"the erasure {name!r} changes nothing: it holds no tensors")
        erasure.edits.check_finite()
        attached = Attached(erasure, strength)
        with scopes.without_offloading(self.pipe):
            available = self._modules()
            for component in erasure.components:
                if component not in available:
                    raise WrongBaseError(
                        f"the erasure {name!r} edits {component!r}, which this pipeline lacks "
                        f"(it has {', '.join(available)})"
                    )
                self._check(component, available[component], attached, check_base)
            warn_of_unlike_tokens(name, backbone.towers, erasure.config.base.get("learned_tokens", {}))
            try:
                for component in erasure.components:
                    self._put(component, available[component], name, attached)
            except BaseException:
                for component in erasure.components:
                    self._take(available[component], name)
                raise
        self._remembered()[name] = list(erasure.components)
        self._switch(True)
        return len(erasure.edits)

    def check_name(self, name: str) -> None:
        """Raise `AttachError` when a name is taken, or cannot name an erasure."""
        if not re.fullmatch(r"[\w-]+", name):
            raise AttachError(f"{name!r} cannot name an erasure: use letters, digits, '-' and '_'")
        if name in self._attached():
            raise AttachError(
                f"an erasure named {name!r} is attached already: pass another name, or delete_erasure({name!r}) first"
            )

    def _check(self, component: str, module: nn.Module, attached: Attached, check_base: bool) -> None:
        edits = attached.erasure.edits.of(component)
        if refuse_unwritable(component, module, edits):
            attached.adapters.add(component)
        for path in attached.erasure.edits.features_of(component):
            paths.require_block(module, path, component)
        state = ComponentState.of(module) or ComponentState(component)
        prefix = component + "/"
        digests = attached.erasure.config.base.get("tensors", {})
        expected = {key.removeprefix(prefix): value for key, value in digests.items() if key.startswith(prefix)}
        state.weights.check_intact(module)
        state.weights.check(component, module, edits, expected if check_base else None)

    def _put(self, component: str, module: nn.Module, name: str, attached: Attached) -> None:
        state = ComponentState.of(module) or ComponentState(component)
        state.attached[name] = attached
        state.bind(module)
        if component in attached.adapters:
            lora = attached.erasure.edits.lora_state_dict()
            adapters.add_lora(self.pipe, component, name, lora, attached.strength)
        state.refresh(module)

    def _take(self, module: nn.Module, name: str) -> None:
        state = ComponentState.of(module)
        if state is None or name not in state.attached:
            return
        state.weights.check_intact(module)
        attached = state.attached.pop(name)
        if state.component in attached.adapters:
            adapters.delete_lora(module, name)
        state.refresh(module)
        state.bind(module)

    def _refresh(self) -> None:
        with scopes.without_offloading(self.pipe):
            available = self._modules()
            for component, state in self._states().items():
                state.refresh(available[component])
        self._guard()

    def _known(self, names: str | Sequence[str] | None) -> list[str]:
        attached = self._attached()
        chosen = list(attached) if names is None else [names] if isinstance(names, str) else list(names)
        unknown = [name for name in chosen if name not in attached]
        if unknown:
            raise AttachError(
                f"no erasure named {unknown[0]!r} is attached; attached: {', '.join(attached) or 'none'}"
            )
        return chosen

    def adopt(self) -> None:
        """Take charge of the erasures that components of another pipeline brought along."""
        for component, names in self.list_erasures().items():
            for name in names:
                self._remembered().setdefault(name, []).append(component)
        self._guard()

    # Changing -----------------------------------------------------------------------------------------------------

    def set_erasures(self, names: str | Sequence[str], strengths: float | Sequence[float] | None = None) -> None:
        """Put exactly these erasures in force (fused ones stay), as diffusers' `set_adapters`.

        Raises:
            AttachError: An unknown or fused name, or another number of strengths than of names.
        """
        chosen = self._known(names)
        factors = list(strengths) if isinstance(strengths, Sequence) else [strengths] * len(chosen)
        if len(factors) != len(chosen):
            raise AttachError(
                f"{len(factors)} strengths for {len(chosen)} erasures: give one for each, or a single number"
            )
        fused = [name for name in chosen if name in self.fused_erasures]
        if fused:
            raise AttachError(f"{fused[0]!r} is fused and always in force: unfuse_erasure() first")
        wanted = {name: 1.0 if factor is None else float(factor) for name, factor in zip(chosen, factors, strict=True)}
        for name, attached in self._attached().items():
            if not attached.fused:
                attached.active, attached.strength = name in wanted, wanted.get(name, attached.strength)
        self._switch(True)

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
        with scopes.without_offloading(self.pipe):
            for name in chosen:
                for module in self._modules().values():
                    self._take(module, name)
                self._remembered().pop(name, None)
        self._guard()

    def unload(self) -> None:
        """Take every erasure off that is not fused."""
        self.delete([name for name, attached in self._attached().items() if not attached.fused])
        for name in set(self._remembered()) - set(self._attached()):
            del self._remembered()[name]

    def fuse(self, names: str | Sequence[str] | None = None) -> None:
        """Make erasures part of the model: they stay through `set_erasures`, `disable` and `unload`.

        Raises:
            AttachError: One is not in force, or lives in PEFT adapters on quantised weights.
        """
        chosen, in_force = self._known(names), self.active_erasures()
        for name in chosen:
            if name not in in_force:
                raise AttachError(f"{name!r} is not in force: enable it or set_erasures([{name!r}]) before fusing")
            if self._attached()[name].adapters:
                raise AttachError(
                    f"{name!r} is an adapter on quantised weights and cannot be fused: fuse into the unquantised model"
                )
        for name in chosen:
            self._attached()[name].fused = True

    def unfuse(self, names: str | Sequence[str] | None = None) -> None:
        """Undo `fuse`."""
        for name in self._known(self.fused_erasures if names is None else names):
            self._attached()[name].fused = False
        self._refresh()

    def detect_concepts(self, prompts: str | Sequence[str]) -> list[dict[str, Detection]]:
        """How surely prompts hold the concepts of the attached feature erasures (`itd`), by concept, for each prompt.

        Raises:
            AttachError: None of the attached erasures can tell.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        towers = {tower.component: tower for tower in backbone_for(self.pipe).towers}
        found: list[dict[str, Detection]] = [{} for _ in texts]
        known = [erasure for erasure in self.erasures.values() if erasure.edits.features]
        if not known:
            raise AttachError("no attached erasure can tell concepts in prompts: attach one that was made with itd")
        with scopes.without_offloading(self.pipe), self.disabled():
            for erasure in known:
                for key, edit in erasure.edits.features.items():
                    component, path = key.split("/", 1)
                    rows = detect(towers[component], int(path.rsplit(".", 1)[1]), edit, texts)
                    for row, each in zip(rows, found, strict=True):
                        # The released code has one gate for all concepts.
                        answers = row * len(erasure.concepts) if len(row) == 1 else row
                        each |= {c.target: answer for c, answer in zip(erasure.concepts, answers, strict=True)}
        return found

    # Proof --------------------------------------------------------------------------------------------------------

    def verify(self) -> int:
        """Prove that every attached erasure is in force, by comparing each edited tensor with what it must be.

        Returns:
            How many tensors were compared.

        Raises:
            VerificationError: None is attached; one is switched off, lost with a replaced component, or overwritten.
        """
        states, remembered = self._states(), self._remembered()
        if not remembered and not states:
            raise VerificationError("no erasure is attached: load_erasure() or erase() first")
        for name, components in remembered.items():
            lost = [part for part in components if part not in states or name not in states[part].attached]
            if lost:
                raise VerificationError(
                    f"{name!r} is gone from {', '.join(lost)}: the component was replaced; load the erasure again"
                )
        return sum(state.verify(self._modules()[component]) for component, state in states.items())

    def check_saveable(self) -> None:
        """Raise `AttachError` when stock files cannot hold what is in force, because it is more than plain weights."""
        for name in self.active_erasures():
            attached = self._attached()[name]
            what = "is an adapter" if attached.adapters else attached.erasure.edits.beyond_weights
            if what is not None:
                raise AttachError(
                    f"{name!r} {what} besides the weights, which the files of a stock pipeline cannot hold: use "
                    "save_erased_pipeline(folder, fuse=False), or disable_erasures() to save the base"
                )

    def _guard(self) -> None:
        """Guard the pipeline's methods exactly while erasures are in force that they could bypass or corrupt."""
        states = self._states()
        guards = {
            "encode_prompt": (warn_if_bypassed, any(map(_is_text_side, states.values()))),
            "save_pretrained": (refuse_unsaveable, bool(self.active_erasures())),
        }
        for method, (check, needed) in guards.items():
            if needed and hasattr(type(self.pipe), method):
                pipelines.CallGuard.install(self.pipe, method, check)
            else:
                pipelines.CallGuard.remove(self.pipe, method)


def _is_text_side(state: ComponentState) -> bool:
    return state.component.startswith("text_encoder") and bool(state.in_force())


def warn_if_bypassed(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> None:
    """Warn when a call brings its own prompt embeddings past an erasure in the text encoder."""
    if kwargs.get("prompt_embeds") is not None:
        found = [state.in_force() for state in ErasureManager(pipe)._states().values() if _is_text_side(state)]
        names = ", ".join(dict.fromkeys(name for in_force in found for name in in_force))
        warnings.warn(
            f"prompt_embeds= bypasses the text-side erasures {names}: unless these embeddings come from this "
            "pipeline's own encode_prompt, nothing is erased. Pass prompt=, or a strategy that edits the denoiser.",
            BypassedErasureWarning,
            stacklevel=3,
        )


def refuse_unsaveable(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> None:
    """Raise `AttachError` rather than write files that lack a part of what is in force."""
    ErasureManager(pipe).check_saveable()
