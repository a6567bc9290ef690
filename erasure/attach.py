"""Attach any number of erasures to a live pipeline, and remove them bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from erasure import guards, proof
from erasure.artifact import Erasure
from erasure.backbones import backbone_for
from erasure.baked import before_saving
from erasure.errors import AttachError, BypassedErasureWarning, LockedError, UnsupportedModelError
from erasure.fitting import (
    CONTROLNET,
    check_fit,
    check_name,
    check_strength,
    is_denoiser,
    sources_of,
    strengths_of,
    warn_of_misfits,
)  # fmt: skip
from erasure.guards import one_step
from erasure.interop import adapters, hooks, patches, scopes
from erasure.interop.pipelines import CallGuard, components_of
from erasure.interop.tokenizers import take_turns
from erasure.leases import Lease
from erasure.state import Attached, ComponentState, Record, with_chosen
from erasure.switching import Target, interrupted, recover, switch
from erasure.twins import erased_of, states_of, stock_of

_NAMES = "_erasure_names"
"""Attribute of a pipeline with the components of every attached erasure, by which erasures are noticed that were
lost with a replaced component."""


class ErasureManager:
    """The erasures of one pipeline.

    The manager is a view: the state is stored on the pipeline's modules, so all managers of the same pipeline, and
    pipelines made from it by `from_pipe`, agree. Every change is made completely or not at all, and waits for running
    calls to end.

    Args:
        pipe: Any diffusers pipeline of a supported family.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe

    # What there is ------------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, nn.Module]:
        return components_of(self.pipe)

    def _states(self) -> dict[str, ComponentState]:
        return states_of(self.pipe)

    def _remembered(self) -> dict[str, list[str]]:
        return vars(self.pipe).setdefault(_NAMES, {})

    def _attached(self) -> dict[str, Attached]:
        return {name: one for state in self._states().values() for name, one in state.record.attached.items()}

    @property
    def erasures(self) -> dict[str, Erasure]:
        """Attached erasures, by name."""
        return {name: attached.erasure for name, attached in self._attached().items()}

    @property
    def strengths(self) -> dict[str, float]:
        """Strengths of the attached erasures, by name."""
        return {name: attached.strength for name, attached in self._attached().items()}

    def list_erasures(self) -> dict[str, list[str]]:
        """List the names of all attached erasures by component, as diffusers' `get_list_adapters` does."""
        states = self._states().items()
        return {component: list(state.record.attached) for component, state in states if state.record.attached}

    def active_erasures(self) -> list[str]:
        """List the names of the erasures in force."""
        return list(dict.fromkeys(name for state in self._states().values() for name in state.in_force()))

    @property
    def fused_erasures(self) -> list[str]:
        """Names of the fused erasures."""
        return [name for name, attached in self._attached().items() if attached.fused]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Prevent switches inside of the block, around a call of a stock pipeline that other threads may switch.

        The drop-in pipelines do this automatically.
        """
        with scopes.same_gradient_mode(), Lease(self._modules().values(), exclusive=False):
            yield

    # Attaching ----------------------------------------------------------------------------------------------------

    def load(self, source: str | Path | Erasure, name: str | None = None, *, revision: str | None = None,
             token: str | None = None, check_base: bool = True, strict: bool = False,
             controlnet: bool = False) -> Erasure:  # fmt: skip
        """Attach an erasure from a folder, a Hub repository or memory, in addition to others; see `add`."""
        erasure = source if isinstance(source, Erasure) else Erasure.load(source, revision=revision, token=token)
        self.add(erasure, name, check_base=check_base, strict=strict, controlnet=controlnet)
        return erasure

    def add(self, erasure: Erasure, name: str | None = None, strength: float = 1.0, *, check_base: bool = True,
            strict: bool = False, controlnet: bool = False, replaces: str | None = None) -> int:  # fmt: skip
        """Attach an erasure, and put it in force together with all others that `set_erasures` did not leave out.

        Args:
            erasure: Erasure to attach.
            name: Name to attach it under; its own name by default.
            strength: Factor of its edits, finite and not negative; 1 is the strength with which it was made.
            check_base: Compare the base tensors with the fingerprints in the erasure's config.
            strict: Raise an error instead of a warning when a call bypasses the erasure.
            controlnet: Also edit the layers of the pipeline's ControlNet that the denoiser has too.
            replaces: Name of an attached erasure that is removed in the same step.

        Returns:
            Number of parameters that it edits.

        Raises:
            AttachError: The name is in use or invalid, the strength is invalid, or something else has changed an
                edited parameter meanwhile.
            WrongBaseError: The pipeline is not the model that the erasure was made for.
            UnsupportedModelError: A full-rank edit is for quantised weights, or projections are fused.
            NoMatchingModuleError: The erasure changes nothing in the model.
            DivergenceError: The erasure has NaN or infinity.
        """
        name = name or erasure.name
        self.check_name(name, replaces)
        attached = Attached(erasure, check_strength(strength), strict=strict)
        with self._switching() as modules:
            self.check_name(name, replaces)
            sources = sources_of(self.pipe, modules, name, erasure, controlnet)
            attached = replace(attached, beside=check_fit(self.pipe, sources, name, erasure, check_base))
            one_step.check_level(self.pipe, name, one_step.sampling_of(attached))
            warn_of_misfits(self.pipe, name, erasure, {n: e for n, e in self.erasures.items() if n != replaces})
            records, states = {}, self._states()
            for component in {**sources, **states}:
                record = replace(states[component].record if component in states else Record(), enabled=True)
                if replaces is not None:
                    record = replace(record, attached={n: a for n, a in record.attached.items() if n != replaces})
                if component in sources:
                    record = replace(record, attached={**record.attached, name: attached})
                records[component] = record
            self._apply(modules, records, sources)
        edits = erasure.edits
        edited = [each for each in sources if is_denoiser(each) and (edits.of(each) or edits.membranes_of(each))]
        if edited and not controlnet and CONTROLNET in modules:
            warnings.warn(guards.CONTROL.format(names=name), BypassedErasureWarning, stacklevel=2)
        return len(erasure.edits)

    def check_name(self, name: str, replaces: str | None = None) -> None:
        """Raise `AttachError` when a name is invalid, or is used by an erasure other than the replaced one."""
        check_name(name, [other for other in self._attached() if other != replaces])

    def adopt(self) -> None:
        """Take over the erasures of components that came from another pipeline."""
        brought: dict[str, list[str]] = {}
        for component, names in self.list_erasures().items():
            for name in names:
                brought.setdefault(name, []).append(component)
        vars(self.pipe)[_NAMES] = brought
        states = self._states()
        guards.share_gates(self.pipe, states.values())
        one_step.set_sampler(self.pipe, next(iter(one_step.levels_of(states.values()).values()), None))

    # Switching ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _switching(self) -> Iterator[dict[str, nn.Module]]:
        """Give the modules when no call is running and nothing is offloaded, after undoing any interrupted switch.

        Raises:
            LockedError: The erasures are locked.
        """
        modules = self._modules()
        patches.refuse_deep_cache(modules.values(), "attaching and switching erasures")
        with scopes.same_gradient_mode(), Lease(modules.values(), exclusive=True):
            recover(modules)
            if guards.lock_of(self._states().values()) is not None:
                raise LockedError(
                    f"this pipeline is locked: its erasures ({', '.join(self.active_erasures())}) cannot be attached, "
                    "scaled, switched off or taken off. unlock_erasures(key) first, with the key that lock_erasures "
                    "gave. Nothing was switched"
                )
            with scopes.without_offloading(self.pipe):
                yield modules

    def _apply(
        self, modules: Mapping[str, nn.Module], records: Mapping[str, Record], sources: Mapping[str, str] | None = None
    ) -> None:
        """Give components new records, and update hooks, weights and guards; other components keep theirs."""
        states = self._states()
        everything = {**{name: state.record for name, state in states.items()}, **records}
        if not everything:
            return
        one_step.check_together(states, everything)
        known = {name: list(components) for name, components in self._remembered().items()}
        dropped = set(self._attached()) - {name for record in everything.values() for name in record.attached}
        targets = []
        for component, record in everything.items():
            state = states.get(component) or ComponentState(component, (sources or {}).get(component))
            targets.append(Target(modules[component], state, state.reading(modules[component], record)))
        backbone = backbone_for(self.pipe)

        def install() -> None:
            now = {target.state.component: target.state for target in targets}
            guards.install(modules, backbone, now)
            hooks.reset_caches(*modules.values())
            if any(state.record.attached for state in now.values()):
                self._guard_calls()
                take_turns(self.pipe)
            else:
                CallGuard.remove(self.pipe, "save_pretrained")
                CallGuard.remove(self.pipe, "check_inputs")
            kept = {name: parts for name, parts in known.items() if name not in dropped}
            for component, state in now.items():
                for name in state.record.attached:
                    kept[name] = [*(part for part in kept.get(name, []) if part != component), component]
            vars(self.pipe)[_NAMES] = kept

        switch(targets, install, lambda: proof.look(self.pipe, targets))

    def stock(self, *, without_adapters: bool = False, offloaded: bool = False) -> DiffusionPipeline:
        """Make a pipeline without erasures, as another object on the same weights; this pipeline does not change.

        It needs memory for the edited parameters. Changes of the new object (training, switching, another scheduler)
        affect neither this pipeline nor threads that draw with it.

        Args:
            without_adapters: Leave out a user's LoRA adapters too.
            offloaded: Offload the other object as this one is, if it is.

        Raises:
            UnsupportedModelError: An adapter to leave out is merged into the weights (`fuse_lora`).
        """
        merged = [name for module in self._modules().values() for name in adapters.merged_names(module)]
        if without_adapters and merged:
            raise UnsupportedModelError(f"the LoRA {merged[0]!r} is fused into the weights: unfuse_lora() first")
        return self._beside(lambda: stock_of(self.pipe, without_adapters=without_adapters), offloaded)

    def guard(self) -> None:
        """Notice what goes around the erasures of a pipeline that was made beside theirs (`twin`) as well.

        What is drawn with a twin is looked at by nobody otherwise.
        """
        if states := self._states():
            guards.install(self._modules(), backbone_for(self.pipe), states)
            self._guard_calls()

    def _guard_calls(self) -> None:
        CallGuard.install(self.pipe, "save_pretrained", _before_saving)
        CallGuard.install(self.pipe, "check_inputs", guards.check_arguments)

    def twin(self, *, offloaded: bool = False) -> DiffusionPipeline:
        """Make a pipeline with the erasures as another object on the same weights, on which hooks can be put.

        Args:
            offloaded: Offload the other object as this one is, if it is.
        """
        return self._beside(lambda: erased_of(self.pipe), offloaded)

    def _beside(self, make: Callable[[], DiffusionPipeline], offloaded: bool) -> DiffusionPipeline:
        modules = self._modules()
        patches.refuse_deep_cache(modules.values(), "making erasures, which copies the networks,")
        if scopes.is_offloaded(self.pipe) or any(map(interrupted, modules.values())):
            with scopes.same_gradient_mode(), Lease(modules.values(), exclusive=True):
                recover(modules)
                with scopes.without_offloading(self.pipe) as put_back:
                    made = make()
                    if offloaded:
                        put_back(made)
                    return made
        with scopes.same_gradient_mode(), Lease(modules.values(), exclusive=False):
            return make()

    def _change(
        self, change: Callable[[Mapping[str, Attached]], Mapping[str, Attached]], enabled: bool | None
    ) -> None:
        """Switch every component by a function of its attached erasures, and on or off."""
        with self._switching() as modules:
            records = {}
            for component, state in self._states().items():
                on = state.record.enabled if enabled is None else enabled
                records[component] = replace(state.record, attached=dict(change(state.record.attached)), enabled=on)
            self._apply(modules, records)

    def _known(self, names: str | Sequence[str] | None) -> list[str]:
        attached = self._attached()
        chosen = list(attached) if names is None else [names] if isinstance(names, str) else list(names)
        unknown = [name for name in chosen if name not in attached]
        if unknown:
            raise AttachError(
                f"no erasure named {unknown[0]!r} is attached; attached: {', '.join(attached) or 'none'}"
            )
        return chosen

    def set_erasures(self, names: str | Sequence[str], strengths: float | Sequence[float] | None = None) -> None:
        """Put exactly these erasures in force (fused ones stay), as diffusers' `set_adapters` does.

        Raises:
            AttachError: A name is unknown or fused, the numbers of strengths and names differ, or a strength is
                invalid.
        """
        wanted = strengths_of(self._known(names), strengths)
        fused = [name for name in wanted if name in self.fused_erasures]
        if fused:
            raise AttachError(f"{fused[0]!r} is fused and always in force: unfuse_erasure() first")

        self._change(lambda attached: with_chosen(attached, wanted), True)

    def disable(self) -> None:
        """Switch all erasures off that are not fused; `enable` undoes it."""
        self._change(lambda attached: attached, False)

    def enable(self) -> None:
        """Undo `disable`."""
        self._change(lambda attached: attached, True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch erasures off inside of the block, for all users of the pipeline; restore them afterwards.

        `stock` gives a second pipeline without erasures instead.
        """
        before = self._enabled()
        try:
            self.disable()
            yield
        finally:
            try:
                self._restore(before)
            except BaseException:
                # An interrupted switch is undone, which here would leave everything switched off.
                self._restore(before)
                raise

    def _enabled(self) -> dict[str, bool]:
        return {name: state.record.enabled for name, state in self._states().items()}

    def _restore(self, enabled: Mapping[str, bool]) -> None:
        if all(enabled.get(name, on) == on for name, on in self._enabled().items()):
            return
        with self._switching() as modules:
            records = {
                component: replace(state.record, enabled=enabled.get(component, state.record.enabled))
                for component, state in self._states().items()
            }
            self._apply(modules, records)

    def delete(self, names: str | Sequence[str]) -> None:
        """Remove erasures; parameters that only they edit are then the base's, bit for bit."""
        chosen = self._known(names)
        self._change(lambda attached: {name: one for name, one in attached.items() if name not in chosen}, None)

    def unload(self) -> None:
        """Remove every erasure that is not fused, and forget those lost with a component."""
        self._change(lambda attached: {name: one for name, one in attached.items() if one.fused}, None)
        attached = self._attached()
        vars(self.pipe)[_NAMES] = {name: parts for name, parts in self._remembered().items() if name in attached}

    def fuse(self, names: str | Sequence[str] | None = None) -> None:
        """Make erasures part of the model: they stay through `set_erasures`, `disable` and `unload`.

        Raises:
            AttachError: An erasure is not in force, or runs beside quantised weights.
        """
        chosen, in_force = self._known(names), self.active_erasures()
        for name in chosen:
            if name not in in_force:
                raise AttachError(f"{name!r} is not in force: enable it or set_erasures([{name!r}]) before fusing")
            if self._attached()[name].beside:
                raise AttachError(
                    f"{name!r} runs beside quantised weights and cannot be fused: fuse into the unquantised model"
                )
        self._set_fused(chosen, True)

    def unfuse(self, names: str | Sequence[str] | None = None) -> None:
        """Undo `fuse`."""
        self._set_fused(self._known(self.fused_erasures if names is None else names), False)

    def _set_fused(self, names: Sequence[str], fused: bool) -> None:
        self._change(
            lambda attached: {n: replace(a, fused=fused) if n in names else a for n, a in attached.items()}, None
        )

    # Proof --------------------------------------------------------------------------------------------------------

    def verify(self, *, least_strength: float = proof.LEAST_STRENGTH) -> int:
        """Prove that every attached erasure is in force.

        Each edited tensor and hook is compared with its expected value. The pipeline's output for a prompt of each
        erasure is compared with the output when the erasure was put in force.

        Args:
            least_strength: An erasure with a smaller strength counts as switched off.

        Returns:
            Number of compared tensors.

        Raises:
            VerificationError: No erasure is attached, or one is switched off or too weak, lost with a replaced
                component, overwritten, or without effect.
        """
        modules = self._modules()
        if any(map(interrupted, modules.values())):
            with self._switching():
                pass  # entering has undone it
        # Pipelines made by a stock class's `from_pipe` lack it.
        guards.share_gates(self.pipe, self._states().values())
        with scopes.same_gradient_mode(), Lease(modules.values(), exclusive=False):
            return proof.verify(self.pipe, self._remembered(), least_strength)

    def check_saveable(self, *, beyond_weights: bool = False) -> None:
        """Raise `AttachError` when stock files cannot contain the erasures in force, or could not be loaded again.

        Args:
            beyond_weights: Whether edits that are not plain weights are saved elsewhere.
        """
        if self._attached():
            guards.check_saveable(self._modules().values(), beyond_weights)


def _before_saving(pipe: DiffusionPipeline, *args: object, **kwargs: object) -> None:
    """Refuse saving before the first file is written, or write a list of the erasures beside the files."""
    before_saving(ErasureManager(pipe), args, kwargs)
