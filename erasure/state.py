"""The state of erasures on one component of a pipeline, and updating the component accordingly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from erasure.artifact import Erasure
from erasure.backbones import FAMILIES
from erasure.carriers import beside, extra_rows, membranes, weights
from erasure.carriers.activations import Pinned, PinnedPrompts
from erasure.carriers.edits import FILTERS, GUIDES, Edit
from erasure.carriers.extra_rows import ExtraRows, Family, FilterTerm
from erasure.carriers.features import EditedFeatures, Term
from erasure.carriers.filters import PromptFilter
from erasure.carriers.gating import GateTerm
from erasure.carriers.permeability import PromptGate
from erasure.carriers.readings import Readings
from erasure.carriers.weights import Terms, WritePlan, WrittenEdits
from erasure.errors import VerificationError
from erasure.interop import paths

_ATTRIBUTE = "_erasures"


@dataclass(frozen=True)
class Attached:
    """An attached erasure, on one or several components."""

    erasure: Erasure
    strength: float = 1.0
    active: bool = True
    """Whether `set_erasures` chose it."""
    fused: bool = False
    """Whether it counts as part of the model, so that `set_erasures`, `disable` and `unload` do not change it."""
    beside: frozenset[str] = frozenset()
    """Components where it runs beside the layers, because their weights are quantised."""
    strict: bool = False
    """Whether bypassing it is an error instead of a warning."""

    def beyond_weights(self, component: str) -> str | None:
        """Describe what the erasure does on a component beyond its weights; `None` for weights only."""
        if component in self.beside:
            return "runs beside quantised layers"
        edits = self.erasure.edits
        if component in edits.pinned:
            return "pins prompts"
        if component in edits.safety:
            return GUIDES
        if edits.filters_of(component):
            return FILTERS
        if edits.gates_of(component):
            return membranes.GATED
        return "edits features" if edits.features_of(component) else None


def with_chosen(attached: Mapping[str, Attached], strengths: Mapping[str, float]) -> dict[str, Attached]:
    """Give the attached erasures with exactly those of some names active, at these strengths; fused ones stay."""
    return {
        name: one if one.fused else replace(one, active=name in strengths, strength=strengths.get(name, one.strength))
        for name, one in attached.items()
    }


@dataclass(frozen=True)
class Record:
    """The complete state of one component's erasures at a time. A switch replaces the whole record."""

    attached: Mapping[str, Attached] = field(default_factory=dict)
    enabled: bool = True
    written: WrittenEdits = field(default_factory=WrittenEdits)
    reads: Mapping[str, Tensor] = field(default_factory=dict)
    """CPU copies of the base parameters of the blocks whose output is edited, by path."""
    canary: object = None
    """Outputs of the pipeline when these erasures were put in force, see `canary.py`."""


@dataclass(frozen=True, eq=False)
class Locked:
    """A lock on the erasures of components; all of its components refer to the same object."""

    refuses: frozenset[str] = frozenset()
    """Names of what is refused in addition to the defaults; see `erasure.guards.messages.REFUSED_ON_REQUEST`."""


class ComponentState:
    """All erasures of one component. It is stored on the module, so pipelines that share the module share it.

    Args:
        component: Name of the component in the pipeline.
        source: Name of the component whose edits apply; differs for a ControlNet, which shares layers with the
            denoiser.
    """

    def __init__(self, component: str, source: str | None = None) -> None:
        self.component, self.source = component, source or component
        self.record = Record()
        self.locked: Locked | None = None
        """Lock on the erasures, if there is one: see `erasure.locking`."""

    @staticmethod
    def of(module: nn.Module) -> ComponentState | None:
        """Get the state of a module; `None` without erasures."""
        return vars(module).get(_ATTRIBUTE)

    def bind(self, module: nn.Module) -> None:
        """Keep the state on the module while anything is attached, and no longer."""
        if self.record.attached:
            vars(module)[_ATTRIBUTE] = self
        else:
            vars(module).pop(_ATTRIBUTE, None)

    @property
    def is_text_encoder(self) -> bool:
        """Whether the component encodes text."""
        return self.component.startswith("text_encoder")

    def in_force(self, record: Record | None = None) -> dict[str, Attached]:
        """Give the erasures that must be in force now, by name."""
        record = record or self.record
        return {name: a for name, a in record.attached.items() if a.fused or (record.enabled and a.active)}

    def edits(self, attached: Attached, module: nn.Module) -> dict[str, Terms]:
        """Give the edits of one erasure on this component with its strength, by parameter."""
        edits = attached.erasure.edits.of(self.source)
        if self.source != self.component:
            edits = {path: edit for path, edit in edits.items() if _has_like(module, path, edit)}
        return {path: [(attached.strength, edit)] for path, edit in edits.items()}

    def terms(self, module: nn.Module, record: Record | None = None, *, run_beside: bool = False) -> dict[str, Terms]:
        """Give every parameter's edits, sorted by erasure: rounding must not depend on the order of attaching.

        Args:
            module: The component.
            record: Record to use; the current one when left out.
            run_beside: Give edits that run beside quantised layers, instead of those that are written into weights.
        """
        found: dict[str, Terms] = {}
        for _, attached in sorted(self.in_force(record).items()):
            if (self.component in attached.beside) is run_beside:
                for path, terms in self.edits(attached, module).items():
                    found.setdefault(path, []).extend(terms)
        return found

    def reading(self, module: nn.Module, record: Record) -> Record:
        """Add copies of the parameters of edited blocks to a record, once."""
        attached = record.attached.values()
        blocks = tuple({path + "." for one in attached for path in one.erasure.edits.features_of(self.source)})
        known = [path for path in paths.canonical_parameters(module) if path.startswith(blocks)] if blocks else []
        written = self.record.written
        reads = {
            path: record.reads.get(path, written.base(module, path).detach().to("cpu", copy=True)) for path in known
        }
        return replace(record, reads=reads)

    def pins(self) -> list[Pinned]:
        """List the prompts whose encoding stays fixed."""
        pinned = (attached.erasure.edits.pinned for attached in self.in_force().values())
        return [pins[self.component] for pins in pinned if self.component in pins]

    def features(self) -> dict[str, list[Term]]:
        """Give the feature edits of every block, sorted by erasure."""
        found: dict[str, list[Term]] = {}
        for name, attached in sorted(self.in_force().items()):
            edits = attached.erasure.edits
            shared = name if len({key.split("/")[0] for key in edits.features}) > 1 else ""
            for path, edit in edits.features_of(self.component).items():
                found.setdefault(path, []).append(Term(attached.strength, edit, shared))
        return found

    def safety(self) -> list[extra_rows.Term]:
        """List the safety guidance of a denoiser, sorted by erasure; none at strength 0, which changes no bit."""
        there = [one for _, one in sorted(self.in_force().items()) if self.component in one.erasure.edits.safety]
        return [extra_rows.Term(a.strength, a.erasure.edits.safety[self.component]) for a in there if a.strength]

    def filters(self) -> list[FilterTerm]:
        """List the prompt filters of this text encoder or denoiser, sorted by erasure."""
        there = sorted(self.in_force().items())
        return [
            FilterTerm(one.strength, edit)
            for _, one in there
            for edit in (one.erasure.edits.filters_of(self.component) if one.strength else ())
        ]

    def gated(self) -> list[Attached]:
        """List the erasures with gates on this text encoder or denoiser, sorted by name.

        Erasures at strength 0, which change no bit, are left out.
        """
        there = [one for _, one in sorted(self.in_force().items()) if one.strength]
        return [one for one in there if one.erasure.edits.gates_of(self.component)]

    def gates(self) -> list[GateTerm]:
        """List the gates of each erasure, see `gated`."""
        return [GateTerm(tuple(one.erasure.edits.gates_of(self.component))) for one in self.gated()]

    def membranes(self) -> dict[str, list[membranes.Term]]:
        """Give the branches of every layer of this denoiser."""
        found: dict[str, list[membranes.Term]] = {}
        for place, one in enumerate(self.gated() if not self.is_text_encoder else ()):
            edits = one.erasure.edits
            factors = edits.gates_of(self.component)[0].multiplies_factors
            for path, edit in edits.membranes_of(self.component).items():
                found.setdefault(path, []).append(membranes.Term(one.strength, edit, place, factors))
        return found

    @property
    def shares_gates(self) -> bool:
        """Whether gates of other text encoders also open those of this one."""
        return any(term.shared for terms in self.features().values() for term in terms)

    def plan(self, module: nn.Module, record: Record) -> WritePlan:
        """Plan a record's parameter values; see `weights.plan`."""
        every = [one for one in record.attached.values() if self.component not in one.beside]
        held = {path for one in every for path in self.edits(one, module)}
        return weights.plan(self.component, module, self.record.written, self.terms(module, record), held)

    def install(self, module: nn.Module) -> None:
        """Put exactly the record's hooks on the module."""
        beside.write(module, self._beside(module))
        PinnedPrompts.write(module, self.pins())
        EditedFeatures.write(module, self.features())
        filtering, gating = self.filters(), self.gates()
        if self.is_text_encoder:
            Readings.write(module, self._read(filtering, gating))
        else:
            Readings.write(module, [])
            membranes.write(module, self.membranes())
            ExtraRows.write(module, self.safety(), filtering, self._family(), gating)

    @staticmethod
    def _read(filtering: Sequence[FilterTerm], gating: Sequence[GateTerm]) -> list[PromptFilter | PromptGate]:
        """List the filters and gates that read a text encoder's prompts."""
        return [*(term.edit for term in filtering), *(gate for term in gating for gate in term.gates)]

    def _family(self) -> Family:
        """Properties of the erasures' model family, which is the pipeline's."""
        names = {one.erasure.config.family for one in self.record.attached.values()}
        known = next((family for family in FAMILIES if family.family in names), None)
        return extra_rows.FAMILY if known is None else Family(known.noisiest, known.guides_in_one_call)

    def _beside(self, module: nn.Module) -> dict[str, beside.Terms]:
        terms = self.terms(module, run_beside=True)
        return {
            path.removesuffix(".weight"): [
                (strength, edit) for strength, edit in pairs if not isinstance(edit, Tensor)
            ]
            for path, pairs in terms.items()
        }

    def verify(self, module: nn.Module) -> int:
        """Compare everything with its expected value; give the number of compared tensors.

        Raises:
            VerificationError: An erasure is switched off, overwritten or bypassed.
        """
        current = self.in_force()
        idle = [name for name in self.record.attached if name not in current]
        if idle:
            raise VerificationError(
                f"{idle[0]!r} is attached to {self.component} but switched off: enable_erasures() or set_erasures()"
            )
        compared = self._verify_weights(module) + self._verify_hooks(module)
        compared += self._verify_text_encoder(module) if self.is_text_encoder else self._verify_denoiser(module)
        for path, value in self.record.reads.items():
            if path not in self.record.written.originals and not weights.is_still(module, path, value):
                raise VerificationError(
                    f"{self.component}/{path} was overwritten, quantised or moved away since the erasure was "
                    "attached, which no longer knows what comes out of that block: load the model again"
                )
        return compared

    def _verify_weights(self, module: nn.Module) -> int:
        """Compare the edited weights; give their number."""
        written = self.record.written
        for path in written.terms:
            where = f"{self.component}/{path}"
            if paths.is_fused(module, path.rsplit(".", 2)[0]):
                raise VerificationError(
                    f"{where} is bypassed by fused query-key-value projections: unfuse_qkv_projections()"
                )
            if paths.is_on_meta(module, path):
                raise VerificationError(
                    f"{where} is offloaded and cannot be read: verify before enabling sequential offload"
                )
            if not written.holds(module, path):
                raise VerificationError(f"{where} is not what the erasures make of it: something else changed it")
        if (taken_back := weights.cancelled(module, written)) is not None:
            raise VerificationError(
                f"{self.component}/{taken_back} is edited, but a LoRA or another erasure takes the edit back: "
                "unload it"
            )
        return len(written.terms)

    def _verify_hooks(self, module: nn.Module) -> int:
        """Compare the hooks that text encoders and denoisers can have; give the number of their edits."""
        run_beside, features = self._beside(module), self.features()
        if not beside.is_written(module, run_beside):
            raise VerificationError(
                f"the edits beside the layers of {self.component} do not run: their hooks are gone"
            )
        if not PinnedPrompts.is_written(module, self.pins()):
            raise VerificationError(
                f"the pinned prompts of {self.component} are not in force: something removed their hooks"
            )
        if not EditedFeatures.is_written(module, features):
            raise VerificationError(
                f"the feature edits of {self.component} are not in force: something removed their hooks"
            )
        return sum(map(len, run_beside.values())) + sum(map(len, features.values()))

    def _verify_text_encoder(self, module: nn.Module) -> int:
        """Compare the hook that reads prompts; give the number of its filters and gates."""
        filtering, gating = self.filters(), self.gates()
        if not Readings.is_written(module, self._read(filtering, gating)):
            what = "prompt filters" if filtering else "prompt gates"
            raise VerificationError(f"the {what} of {self.component} are not in force: something removed their hook")
        return len(filtering) + len(gating)

    def _verify_denoiser(self, module: nn.Module) -> int:
        """Compare branches and the hook that adds rows; give the number of branches, filters, gates and guides."""
        branches, safety, filtering, gating = self.membranes(), self.safety(), self.filters(), self.gates()
        if not membranes.is_written(module, branches):
            raise VerificationError(
                f"the branches beside layers of {self.component} do not run: something removed their hooks"
            )
        if not ExtraRows.is_written(module, safety, filtering, gating):
            what = "prompt filters" if filtering else "safety guidance" if safety else "gates of branches"
            raise VerificationError(f"the {what} of {self.component} is not in force: something removed its hook")
        for path in branches:
            if paths.is_fused(module, path.rpartition(".")[0]):
                raise VerificationError(
                    f"the branch beside {self.component}/{path} is bypassed by fused query-key-value projections: "
                    "unfuse_qkv_projections()"
                )
        return len(branches) + len(safety) + len(filtering) + len(gating)


def _has_like(module: nn.Module, path: str, edit: Edit) -> bool:
    """Whether a ControlNet has a layer of the denoiser, of the same shape."""
    try:
        shape = tuple(paths.parameter(module, path).shape)
    except AttributeError:
        return False
    return shape == weights.shape_of(edit)
