"""What is attached to one component of a pipeline, and bringing the component in line with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from erasure.artifact import Erasure
from erasure.carriers.activations import Pinned, PinnedPrompts
from erasure.carriers.edits import LowRank
from erasure.carriers.features import EditedFeatures
from erasure.carriers.features import Terms as FeatureTerms
from erasure.carriers.weights import ComponentWeights, Terms
from erasure.errors import VerificationError
from erasure.interop import adapters, paths

_ATTRIBUTE = "_erasures"


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
    """All erasures of one component. Lives on the module, so pipelines that share the module share it.

    Args:
        component: Name of the component in the pipeline.
    """

    def __init__(self, component: str) -> None:
        self.component = component
        self.attached: dict[str, Attached] = {}
        self.enabled = True
        self.weights = ComponentWeights()

    @staticmethod
    def of(module: nn.Module) -> ComponentState | None:
        """The state of a module that has erasures."""
        return vars(module).get(_ATTRIBUTE)

    def bind(self, module: nn.Module) -> None:
        """Keep the state on the module while anything is attached, and no longer."""
        if self.attached:
            vars(module)[_ATTRIBUTE] = self
        else:
            vars(module).pop(_ATTRIBUTE, None)

    def in_force(self) -> dict[str, Attached]:
        """What must be in force now, by name."""
        return {name: a for name, a in self.attached.items() if a.fused or (self.enabled and a.active)}

    def terms(self) -> dict[str, Terms]:
        """The terms of every parameter to write, by name: rounding must not depend on the order of attaching."""
        found: dict[str, Terms] = {}
        for _, attached in sorted(self.in_force().items()):
            if self.component not in attached.adapters:
                for path, edit in attached.erasure.edits.of(self.component).items():
                    found.setdefault(path, []).append((attached.strength, edit))
        return found

    def pins(self) -> list[Pinned]:
        """The prompts to hold fixed."""
        pinned = (attached.erasure.edits.pinned for attached in self.in_force().values())
        return [pins[self.component] for pins in pinned if self.component in pins]

    def features(self) -> dict[str, FeatureTerms]:
        """The feature edits of every block, by name of the erasure."""
        found: dict[str, FeatureTerms] = {}
        for _, attached in sorted(self.in_force().items()):
            for path, edit in attached.erasure.edits.features_of(self.component).items():
                found.setdefault(path, []).append((attached.strength, edit))
        return found

    def refresh(self, module: nn.Module) -> None:
        """Bring the module in line with what must be in force.

        Raises:
            AttachError: Something else changed an edited parameter meanwhile.
        """
        self.weights.write(module, self.terms())
        current = self.in_force()
        for name, attached in self.attached.items():
            if self.component in attached.adapters:
                adapters.scale_lora(module, name, attached.strength if name in current else 0.0)
        PinnedPrompts.write(module, self.pins())
        EditedFeatures.write(module, self.features())

    def verify(self, module: nn.Module) -> int:
        """Compare everything that must be in force with what is; returns how many tensors were compared.

        Raises:
            VerificationError: An erasure is switched off, overwritten or bypassed.
        """
        idle = [name for name in self.attached if name not in self.in_force()]
        if idle:
            raise VerificationError(
                f"{idle[0]!r} is attached to {self.component} but switched off: enable_erasures() or set_erasures()"
            )
        compared = 0
        for path, terms in self.terms().items():
            where = f"{self.component}/{path}"
            if paths.is_fused(module, path.rsplit(".", 2)[0]):
                raise VerificationError(
                    f"{where} is bypassed by fused query-key-value projections: unfuse_qkv_projections()"
                )
            if paths.parameter(module, path).device.type == "meta":
                raise VerificationError(
                    f"{where} is offloaded and cannot be read: verify before enabling sequential offload"
                )
            if not self.weights.holds(module, path, terms):
                raise VerificationError(f"{where} is not what the erasures make of it: something else changed it")
            compared += 1
        for name, attached in self.attached.items():
            if self.component in attached.adapters:
                edits = attached.erasure.edits.of(self.component).values()
                layers = adapters.active_lora(module, name, attached.strength)
                expected = sum(isinstance(edit, LowRank) for edit in edits)
                if layers != expected:
                    raise VerificationError(
                        f"adapter {name!r} is in force in {layers} of {expected} layers of {self.component}: "
                        "something else switched it off or scaled it"
                    )
                compared += layers
        if not PinnedPrompts.is_written(module, self.pins()):
            raise VerificationError(
                f"the pinned prompts of {self.component} are not in force: something removed their hooks"
            )
        if not EditedFeatures.is_written(module, self.features()):
            raise VerificationError(
                f"the feature edits of {self.component} are not in force: something removed their hooks"
            )
        return compared + sum(map(len, self.features().values()))
