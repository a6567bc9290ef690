"""The components of a locked pipeline, compared with its current ones before every call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypedDict

from diffusers import DiffusionPipeline
from torch import nn

from erasure.backbones import backbone_for
from erasure.errors import LockedError, UnsupportedModelError, VerificationError
from erasure.interop import adapters, paths
from erasure.interop.marks import Change, Marks
from erasure.state import ComponentState, Locked

SCHEDULER = "scheduler"


def edited_paths(module: nn.Module, state: ComponentState | None) -> set[str]:
    """Canonical paths of a network's layers on which its erasures act, which no LoRA may change."""
    if state is None:
        return set()
    record = state.record
    written = {*record.written.originals, *record.reads}
    beside = {path for path, _ in state.terms(module, run_beside=True).items()}
    return {path.rpartition(".")[0] for path in {*written, *beside}} | {
        path.removesuffix(".weight") for path in state.membranes()
    }


class Seal:
    """The components of a pipeline, to notice changes.

    Args:
        pipe: The pipeline; its erasures have been verified.
        refuses: What the lock refuses in addition to its defaults.

    Raises:
        LockedError: The pipeline has a LoRA that the lock refuses.
        UnsupportedModelError: The weights are offloaded in a way that they cannot be compared.
    """

    def __init__(self, pipe: DiffusionPipeline, refuses: frozenset[str]) -> None:
        self.refuses = refuses
        fixed = {name: part for name, part in pipe.components.items() if name != SCHEDULER or "schedulers" in refuses}
        self.parts = {name: _itself(part) for name, part in fixed.items()}
        backbone = backbone_for(pipe)
        drawing = {backbone.denoiser_component, *(tower.component for tower in backbone.towers)}
        self.networks: dict[str, nn.Module] = {
            name: part
            for name, part in self.parts.items()
            if isinstance(part, nn.Module) and (name in drawing or ComponentState.of(part) is not None)
        }
        for name, network in self.networks.items():
            for path in (path for path, part in network.named_modules() if path and adapters.is_tuner_layer(part)):
                self._check_adapter(name, path)
        self.marks = self._marked()

    def _marked(self) -> dict[str, Marks]:
        made = {}
        for name, network in self.networks.items():
            state = ComponentState.of(network)
            edited = () if state is None else tuple(state.record.written.originals)
            if any(paths.is_on_meta(network, path) for path in edited):
                raise UnsupportedModelError(
                    f"the weights of {name} are kept elsewhere by sequential offloading, so that nothing tells "
                    "whether the erasures are still in them: use enable_model_cpu_offload() with a locked pipeline"
                )
            made[name] = Marks(network, edited)
        return made

    def is_whole(self, pipe: DiffusionPipeline) -> bool:
        """Whether a pipeline still has the same components, as far as marks show."""
        parts = all(_itself(getattr(pipe, name, None)) is part for name, part in self.parts.items())
        return parts and all(marks.is_as_before() for marks in self.marks.values())

    def locks(self) -> set[Locked | None]:
        """The locks on its networks that have erasures."""
        states = map(ComponentState.of, self.networks.values())
        return {state.locked for state in states if state is not None}

    def renewed(self, pipe: DiffusionPipeline) -> Seal:
        """Make a new seal if only LoRAs on unedited layers were added or removed.

        Raises:
            VerificationError: Something else changed.
            LockedError: The lock refuses an added LoRA.
        """
        for name, part in self.parts.items():
            if _itself(getattr(pipe, name, None)) is not part:
                raise VerificationError(
                    f"{name} is another one than when the pipeline was locked: a component was replaced. Put it back, "
                    "or unlock_erasures(key), load the erasures again and lock it again"
                )
        for name, marks in self.marks.items():
            for change in marks.changes():
                if not change.adapter:
                    raise VerificationError(_changed(name, change))
                self._check_adapter(name, change.path)
        return Seal(pipe, self.refuses)

    def _check_adapter(self, component: str, path: str) -> None:
        """Refuse a LoRA on a layer of a component, as the lock says."""
        network = self.networks[component]
        layer, label = _canonical(network, path), f"{component}/{path}"
        if not adapters.is_tuner_layer(network.get_submodule(path)):
            return  # It was taken off.
        if "loras" in self.refuses:
            raise LockedError(
                f"this pipeline is locked and takes no LoRA, and one lies on {label}: unload_lora_weights()"
            )
        if layer in edited_paths(network, ComponentState.of(network)):
            raise LockedError(
                f"a LoRA lies on {label}, which the erasures of this pipeline edit, and can take them back: "
                "unload_lora_weights(), or leave those layers out of the LoRA. A locked pipeline refuses it"
            )


def _changed(component: str, change: Change) -> str:
    where = f"{component}/{change.path}" if change.path else component
    return (
        f"{where} is not as it was when the pipeline was locked: {change.what}. What a pipeline is to have is loaded "
        "and set ahead of locking it: unlock_erasures(key), and lock it again when the erasures are verified"
    )


def _canonical(network: nn.Module, path: str) -> str:
    """Path of a layer as erasures name it."""
    root = paths.transformer_root(network)
    inside = next(name for name, part in network.named_modules() if part is root)
    own = path.removeprefix(f"{inside}.") if inside else path
    return ".".join(step for step in own.split(".") if step != "base_layer")


def _itself(part: object) -> object:
    return paths.uncompiled(part) if isinstance(part, nn.Module) else part


class InForce(TypedDict):
    """An erasure that is in force."""

    strategy: str
    concepts: list[str]
    strength: float
    fingerprint: str


def described(states: Mapping[str, ComponentState]) -> Iterator[tuple[str, InForce]]:
    """Yield every erasure in force, by name."""
    attached = {name: one for state in states.values() for name, one in state.in_force().items()}
    for name, one in attached.items():
        made = one.erasure
        yield name, {
            "strategy": made.config.strategy, "concepts": [concept.target for concept in made.concepts],
            "strength": one.strength, "fingerprint": made.fingerprint,
        }  # fmt: skip
