"""A machine that does to a pipeline with erasures whatever its users may, in any order, and knows what must be."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from erasure import Erasure, ErasureManager
from erasure.errors import AttachError, ErasureError, UnsupportedModelError
from erasure.pipelines import StableDiffusionErasurePipeline
from tests.copies import copied

from .looks import relative, verifies
from .model import COMPONENTS, Entry, Kit, Model, ReferencePipe, draw, encode, tensors_of

NAMES = ("a", "b", "c", "d")
CLOSE = 2e-4
"""Share of the greatest value by which an encoding or an image may differ: attention and merged adapters round."""
SKIPPED = set(os.environ.get("STRESS_SKIP", "").split(","))
"""Steps, refused calls and strengths (`strength 0.0`) to leave out, with commas: to see what fails besides them."""

STRENGTHS = tuple(factor for factor in (1.0, 0.5, 2.0, 0.1, 0.0) if f"strength {factor}" not in SKIPPED)

Condition = Callable[[Any], bool]


def step(when: Condition = lambda machine: True, **arguments: Any) -> Callable[[Any], Any]:
    """A rule that is only taken when a condition holds, and never when its name is in `STRESS_SKIP`."""

    def decorate(function: Any) -> Any:
        skipped = function.__name__ in SKIPPED
        return precondition(lambda machine: not skipped and when(machine))(rule(**arguments)(function))

    return decorate


kinds = st.sampled_from(("delta", "low", "over", "pin", "itd"))
names = st.sampled_from(NAMES)
strengths = st.sampled_from(STRENGTHS)


class Erasing(RuleBasedStateMachine):
    """One pipeline and the model of it."""

    original: ClassVar[Any]
    base: ClassVar[dict[str, Tensor]]
    kit: ClassVar[Kit]
    wrong: ClassVar[dict[str, Erasure]]
    """Erasures of another base model, by kind."""
    folders: ClassVar[Path]
    """A folder with every erasure of the kit in a folder of its kind."""
    loras: ClassVar[dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]]
    """A user's LoRAs by name: files and dense deltas."""
    references: ClassVar[dict[bool, ReferencePipe]]
    """Stock pipelines to compare with, by whether they have an IP-Adapter."""
    add_ip: ClassVar[Callable[[Any], Any]]
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.pipe = StableDiffusionErasurePipeline.from_pipe(copied(self.original))
        self.pipe.set_progress_bar_config(disable=True)
        self.model = Model(self.kit)
        self.casts = [torch.float32]
        self.adapters: dict[str, float] = {}
        self.merged: dict[str, Tensor] = {}
        self.rounded: set[str] = set()
        self.verified: object = None
        self.qkv = self.ip = self.offloaded = self.freeu = self.sliced = self.learned = False
        self.has_been_pickled = False

    @property
    def manager(self) -> ErasureManager:
        return ErasureManager(self.pipe)

    # What must be ----------------------------------------------------------------------------------------------------

    def possible(self, key: str, edited: bool) -> Iterator[Tensor]:
        """What a parameter may be: read and written between any two casts of the whole model."""
        if not edited and len(self.casts) == 1:
            yield self.base[key]
            return
        count = len(self.casts)
        for read in range(count):
            base = self.base[key]
            for dtype in self.casts[: read + 1]:
                base = base.to(dtype)
            for written in range(read, count):
                value = self.model.edited(key, base)
                for dtype in self.casts[written:]:
                    value = value.to(dtype)
                yield value

    def is_right(self, key: str, found: Tensor, edited: bool) -> bool:
        """Whether a parameter is what it must be: bit for bit where nothing edits it."""
        found = found[: len(self.base[key])] if found.ndim else found
        if key in self.merged or key in self.rounded:
            wanted = self.model.edited(key, self.base[key]) + self.merged.get(key, 0.0)
            return torch.allclose(found.float(), wanted, rtol=1e-4, atol=1e-4)
        if not edited:
            return any(torch.equal(found, wanted) for wanted in self.possible(key, edited))
        unit = torch.finfo(found.dtype).eps
        return any(torch.allclose(found, wanted, rtol=2 * unit, atol=unit) for wanted in self.possible(key, edited))

    @invariant()
    def holds(self) -> None:
        type(self).steps += 1
        self.weights_are_right()
        self.lists_are_right()
        self.encodings_are_right()

    def weights_are_right(self) -> None:
        tensors, recipe = tensors_of(self.pipe), self.model.recipe()
        # Where no original is held, merging an adapter and taking it out again leaves its rounding.
        self.rounded |= {key for key in self.merged if key not in recipe}
        wrong = [key for key in self.base if not self.is_right(key, tensors[key], key in recipe)]
        assert not wrong, f"{len(wrong)} tensors are not what they must be, first {wrong[0]}"

    def lists_are_right(self) -> None:
        model, manager = self.model, self.manager
        assert sorted(manager.active_erasures()) == sorted(model.in_force())
        assert dict(manager.strengths) == {name: entry.strength for name, entry in model.attached.items()}
        assert sorted(manager.erasures) == sorted(model.attached)
        assert sorted(manager.fused_erasures) == sorted(n for n, e in model.attached.items() if e.fused)
        assert {c: sorted(found) for c, found in manager.list_erasures().items()} == model.lists()
        # What a look at every tensor and two passes of the denoiser cost is spent where something is new.
        state = (id(self.pipe), repr(model.attached), model.enabled, self.qkv, self.ip, self.freeu, self.sliced,
                 tuple(self.casts), repr(self.adapters), bool(self.merged), self.offloaded, self.learned)  # fmt: skip
        if state != self.verified or type(self).steps % 10 == 0:
            assert verifies(manager) == (model.verifies() and not self.bypassed())
            self.verified = state

    def bypassed(self) -> bool:
        """Whether fused projections stand over an edited layer."""
        return self.qkv and any(map(in_attention, self.model.recipe()))

    def reference(self, *components: str) -> ReferencePipe:
        """A stock pipeline with the weights of this one, of some components, and the hooks that must be there."""
        made = self.references[self.ip]
        tensors = tensors_of(self.pipe, components or COMPONENTS)
        if not self.merged:
            for name, scale in self.adapters.items():
                for key, delta in self.loras[name][1].items():
                    if key in tensors:
                        tensors[key] = tensors[key] + scale * delta
        made.write(tensors)
        made.terms, made.pins = self.model.features(), self.model.pins()
        return made

    def encodings_are_right(self) -> None:
        if self.casts[-1] != torch.float32:
            return
        found = relative(encode(self.pipe), encode(self.reference("text_encoder").pipe))
        assert found < CLOSE, f"encodings differ by {found:.1e}"

    def settings(self) -> dict[str, Any]:
        return {"ip_adapter_image_embeds": [torch.ones(2, 1, 16)]} if self.ip else {}

    @step(lambda m: m.casts[-1] == torch.float32)
    def draw(self) -> None:
        reference = self.reference().pipe
        if self.freeu:
            reference.enable_freeu(0.9, 0.2, 1.2, 1.4)
        try:
            wanted = draw(reference, **self.settings())
        finally:
            reference.disable_freeu()
        found = relative(draw(self.pipe, **self.settings()), wanted)
        assert found < 5 * CLOSE, f"images differ by {found:.1e}"

    # Erasures --------------------------------------------------------------------------------------------------------

    def switch(self, call: Callable[[], Any], after: Model) -> None:
        """Do something that must work, or be refused under fused projections and over a LoRA that is fused."""
        touched = self.model.recipe().keys() | after.recipe().keys()
        try:
            call()
        except UnsupportedModelError:
            assert self.qkv
        except AttachError:
            assert self.qkv or touched & self.merged.keys(), "refused without a reason"
        else:
            under = any(map(in_attention, changed(self.model, after)))
            assert not (self.qkv and under), "switched under fused projections"
            self.model = after

    def free(self, name: str) -> str | None:
        left = [n for n in (name, *NAMES) if n not in self.model.attached]
        return left[0] if left else None

    def adding(self, kind: str, name: str, strength: float) -> tuple[bool, Model]:
        """Whether the base can be compared, and the model afterwards."""
        after = self.model.copy()
        after.attached[name], after.enabled = Entry(kind, strength), True
        touched = self.merged.keys() | self.rounded
        plain = len(self.casts) == 1 and not touched & set(self.kit.dense[kind])
        return plain, after

    @step(lambda m: len(m.model.attached) < len(NAMES), kind=kinds, name=names, strength=strengths)
    def add(self, kind: str, name: str, strength: float) -> None:
        name = self.free(name) or name
        check, after = self.adding(kind, name, strength)
        made = self.kit.erasures[kind]
        self.switch(lambda: self.manager.add(made, name, strength, check_base=check), after)

    @step(lambda m: len(m.model.attached) < len(NAMES), kind=kinds, name=names)
    def load(self, kind: str, name: str) -> None:
        name = self.free(name) or name
        check, after = self.adding(kind, name, 1.0)
        self.switch(lambda: self.pipe.load_erasure(self.folders / kind, name, check_base=check), after)

    @step(lambda m: m.model.attached, data=st.data())
    def set_erasures(self, data: st.DataObject) -> None:
        choice = [name for name, entry in self.model.attached.items() if not entry.fused]
        chosen = data.draw(st.lists(st.sampled_from(choice), unique=True)) if choice else []
        factors = [data.draw(strengths) for _ in chosen]
        after = self.model.copy()
        after.enabled = True
        for name, entry in after.attached.items():
            if not entry.fused:
                entry.active = name in chosen
                entry.strength = dict(zip(chosen, factors, strict=True)).get(name, entry.strength)
        self.switch(lambda: self.pipe.set_erasures(chosen, factors), after)

    @step(enabled=st.booleans())
    def enable_or_disable(self, enabled: bool) -> None:
        after = self.model.copy()
        after.enabled = enabled or not after.attached
        self.switch(self.pipe.enable_erasures if enabled else self.pipe.disable_erasures, after)

    @step(lambda m: not (m.qkv or m.merged), fails=st.booleans())
    def disabled_block(self, fails: bool) -> None:
        before = self.model

        class Stop(BaseException):
            pass

        try:
            with self.manager.disabled():
                self.model = before.copy()
                self.model.enabled = not before.attached
                self.weights_are_right()
                self.encodings_are_right()
                if fails:
                    raise Stop
        except Stop:
            pass
        finally:
            self.model = before

    @step(lambda m: m.model.attached, data=st.data())
    def delete(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model.attached)), unique=True, min_size=1))
        after = self.model.copy()
        after.attached = {n: e for n, e in after.attached.items() if n not in chosen}
        after.enabled = after.enabled or not after.attached
        self.switch(lambda: self.pipe.delete_erasure(chosen), after)

    @step()
    def unload(self) -> None:
        after = self.model.copy()
        after.attached = {name: entry for name, entry in after.attached.items() if entry.fused}
        after.enabled = after.enabled or not after.attached
        self.switch(self.pipe.unload_erasures, after)

    @step(lambda m: m.model.in_force(), data=st.data())
    def fuse(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model.in_force())), unique=True, min_size=1))
        after = self.model.copy()
        for name in chosen:
            after.attached[name].fused = True
        self.switch(lambda: self.pipe.fuse_erasure(chosen), after)

    @step()
    def unfuse(self) -> None:
        after = self.model.copy()
        for entry in after.attached.values():
            entry.fused = False
        self.switch(self.pipe.unfuse_erasure, after)

    # Refused ---------------------------------------------------------------------------------------------------------

    def bad_calls(self) -> dict[str, Callable[[], Any]]:
        """Calls that must be refused now."""
        manager, attached = self.manager, self.model.attached
        made, wrong = self.kit.erasures["low"], self.wrong
        flux = Erasure(dataclasses.replace(made.config, family="flux"), made.edits)
        calls: dict[str, Callable[[], Any]] = {
            "set nobody": lambda: manager.set_erasures("nobody"),
            "set one and nobody": lambda: manager.set_erasures([*attached, "nobody"]),
            "delete one and nobody": lambda: manager.delete([*attached, "nobody"]),
            "fuse one and nobody": lambda: manager.fuse([*attached, "nobody"]),
            "unfuse one and nobody": lambda: manager.unfuse([*attached, "nobody"]),
            "odd name": lambda: manager.add(made, "a/b"),
            "empty list of factors": lambda: manager.set_erasures([*attached], [1.0] * (len(attached) + 1)),
            "nowhere": lambda: self.pipe.load_erasure(self.folders / "nowhere", "e"),
            "wrong base": lambda: manager.add(wrong["low"], "e"),
            "wrong base of features": lambda: manager.add(wrong["itd"], "e"),
            "wrong family": lambda: manager.add(flux, "e"),
            "a folder in use": lambda: self.pipe.save_erased_pipeline(self.folders),
        }
        for factor in (float("nan"), float("inf"), -1.0):
            calls[f"add at {factor}"] = lambda factor=factor: manager.add(made, "e", factor)
            if plain := [name for name, entry in attached.items() if not entry.fused]:
                calls[f"set at {factor}"] = lambda plain=plain, factor=factor: manager.set_erasures(plain, factor)
        if attached:
            taken = sorted(attached)[0]
            calls["taken name"] = lambda: manager.add(made, taken)
        if idle := [name for name in attached if name not in self.model.in_force()]:
            calls["fuse idle"] = lambda: manager.fuse([*attached, idle[0]])
        if fused := [name for name, entry in attached.items() if entry.fused]:
            calls["set fused"] = lambda: manager.set_erasures(fused)
            calls["save fused beside"] = lambda: self.pipe.save_erased_pipeline(self.folders / "none", fuse=False)
        if attached and not self.model.verifies():
            calls["save idle"] = lambda: self.pipe.save_erased_pipeline(self.folders / "none", fuse=False)
        return {name: call for name, call in calls.items() if name not in SKIPPED}

    @step(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        calls = self.bad_calls()
        chosen = data.draw(st.sampled_from(sorted(calls)))
        with pytest.raises(ErasureError):
            calls[chosen]()
        assert not (self.folders / "none").exists()

    @step(lambda m: m.model.recipe() and not m.qkv, data=st.data())
    def tampered(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.recipe())))
        place = tensors_of(self.pipe)[key]
        before = place.clone()
        place.add_(0.125)
        assert not verifies(self.manager), "an edited weight was overwritten"
        calls = self.switches()
        call, inside, after = calls[data.draw(st.sampled_from(sorted(calls)))]
        snapshot = {k: t.clone() for k, t in tensors_of(self.pipe).items()}
        try:
            call()
        except AttachError:
            tensors = tensors_of(self.pipe)
            assert all(torch.equal(t, tensors[k]) for k, t in snapshot.items()), "a refusal changed weights"
        else:
            assert key not in changed(self.model, inside), "what something else wrote was overwritten"
            self.model = after
        assert torch.equal(tensors_of(self.pipe)[key], snapshot[key])
        tensors_of(self.pipe)[key].copy_(before)

    def switches(self) -> dict[str, tuple[Callable[[], Any], Model, Model]]:
        """Switching operations that would be possible now, with the model meanwhile and afterwards."""

        def block() -> None:
            with self.manager.disabled():
                pass

        attached = self.model.attached
        off, on, half, none, one = (self.model.copy() for _ in range(5))
        off.enabled, on.enabled, half.enabled = False, True, True
        plain = [name for name, entry in attached.items() if not entry.fused]
        for name in plain:
            half.attached[name].active, half.attached[name].strength = True, 0.75
        none.attached = {name: entry for name, entry in attached.items() if entry.fused}
        none.enabled = none.enabled or not none.attached
        first = sorted(attached)[0]
        one.attached = {name: entry for name, entry in one.attached.items() if name != first}
        one.enabled = one.enabled or not one.attached
        calls: dict[str, tuple[Callable[[], Any], Model, Model]] = {
            "disable": (self.manager.disable, off, off), "enable": (self.manager.enable, on, on),
            "unload": (self.manager.unload, none, none), "delete": (lambda: self.manager.delete(first), one, one),
            "disabled block": (block, off, self.model),
        }  # fmt: skip
        if plain:
            calls["set"] = (lambda: self.manager.set_erasures(plain, 0.75), half, half)
        if "e" not in attached:
            _, more = self.adding("over", "e", 1.0)
            made = self.kit.erasures["over"]
            calls["add"] = (lambda: self.manager.add(made, "e", check_base=False), more, more)
        return calls


def in_attention(key: str) -> bool:
    """Whether a parameter belongs to a layer that `fuse_qkv_projections` replaces."""
    return key.startswith("unet/") and ".attn" in key


def changed(before: Model, after: Model) -> set[str]:
    """Parameters whose value is another afterwards."""
    old, new = ({key: [term for term in terms if term[0]] for key, terms in m.recipe().items()}
                for m in (before, after))  # fmt: skip
    return {key for key in old.keys() | new.keys() if old.get(key, []) != new.get(key, [])}
