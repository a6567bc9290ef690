"""What an erasure changes, by carrier, and its tensors' names on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.carriers.activations import Pinned
from erasure.carriers.features import BlockEdit, FeatureEdit, ReconstructionEdit
from erasure.errors import ArtifactError, DivergenceError

KINDS: dict[type[FeatureEdit] | type[ReconstructionEdit], str] = {
    FeatureEdit: "features",
    ReconstructionEdit: "reconstruction",
}
"""What edits of blocks are called on disk."""


class LowRank(NamedTuple):
    """The edit `delta = up @ down` of one linear layer."""

    down: Tensor
    """`(rank, in_features)`."""
    up: Tensor
    """`(out_features, rank)`."""


@dataclass
class Edits:
    """All edits of one erasure."""

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    """By `component/module.path`; edits that module's `weight`."""
    deltas: dict[str, Tensor] = field(default_factory=dict)
    """By `component/module.path.parameter`; same shape as the parameter."""
    pinned: dict[str, Pinned] = field(default_factory=dict)
    """By text encoder component: prompts whose encoding stays as it is."""
    features: dict[str, BlockEdit] = field(default_factory=dict)
    """By `component/block.path`: autoencoder latents to change at that block's output."""

    def __len__(self) -> int:
        """Number of edited parameters and blocks."""
        return len(self.low_rank) + len(self.deltas) + len(self.features)

    @property
    def parameters(self) -> list[str]:
        """Keys of every edited parameter, `component/module.path.parameter`."""
        return [*(f"{key}.weight" for key in self.low_rank), *self.deltas]

    @property
    def is_empty(self) -> bool:
        """Whether every edit is zero, so that nothing would change."""
        products = (bool(down.any()) and bool(up.any()) for down, up in self.low_rank.values())
        return not (any(products) or any(bool(delta.any()) for delta in self.deltas.values()) or bool(self.features))

    @property
    def components(self) -> list[str]:
        """Pipeline components that are edited, each once."""
        return list(dict.fromkeys(key.split("/")[0] for key in (*self.parameters, *self.features)))

    @property
    def beyond_weights(self) -> str | None:
        """What it does that the weights of a model cannot hold, if anything."""
        return "pins prompts" if self.pinned else "edits features" if self.features else None

    def of(self, component: str) -> dict[str, Tensor | LowRank]:
        """The edits of one component by parameter path without the component's name."""
        prefix = component + "/"
        edits: dict[str, Tensor | LowRank] = {
            key.removeprefix(prefix) + ".weight": edit for key, edit in self.low_rank.items() if key.startswith(prefix)
        }
        edits |= {key.removeprefix(prefix): delta for key, delta in self.deltas.items() if key.startswith(prefix)}
        return edits

    def features_of(self, component: str) -> dict[str, BlockEdit]:
        """The feature edits of one component by block path."""
        prefix = component + "/"
        return {key.removeprefix(prefix): edit for key, edit in self.features.items() if key.startswith(prefix)}

    @property
    def carriers(self) -> list[str]:
        """Where the erasure lives, as its config says it."""
        return [*(["weights"] if self.parameters else []), *(["activations"] if self.beyond_weights else [])]

    def check_finite(self) -> None:
        """Raise `DivergenceError` when a tensor holds NaN or infinity."""
        tensors = {**self.delta_state_dict(), **self.lora_state_dict()}
        broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise DivergenceError(f"{len(broken)} of {len(tensors)} tensors hold NaN or infinity, first {broken[0]!r}")

    def delta_state_dict(self) -> dict[str, Tensor]:
        """Everything that is not low-rank, under the names of `erasure.safetensors`."""
        pins = {f"{key}/pinned.{part}": t for key, pin in self.pinned.items() for part, t in pin._asdict().items()}
        slices = {
            f"{key}/{KINDS[type(edit)]}.{part}": tensor
            for key, edit in self.features.items()
            for part, tensor in edit._asdict().items()
        }
        return {key: tensor.contiguous() for key, tensor in (*self.deltas.items(), *pins.items(), *slices.items())}

    def lora_state_dict(self) -> dict[str, Tensor]:
        """The low-rank edits under the names of diffusers' LoRA files (scale 1)."""
        state = {}
        for key, (down, up) in self.low_rank.items():
            component, path = key.split("/", 1)
            # diffusers' text encoder files carry the prefix; its loader strips it where the class has none.
            prefix = "text_model." if component.startswith("text_encoder") else ""
            state[f"{component}.{prefix}{path}.lora_A.weight"] = down.contiguous()
            state[f"{component}.{prefix}{path}.lora_B.weight"] = up.contiguous()
        return state

    @classmethod
    def from_state_dicts(cls, deltas: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> Edits:
        """The inverse of saving: deltas as they are, low-rank edits from diffusers' LoRA names.

        Raises:
            ArtifactError: A key that is none of ours, half of a pair, or factors that do not fit.
        """
        low_rank = {}
        for name in lora:
            if name.endswith(".lora_B.weight"):
                if name.replace(".lora_B.", ".lora_A.") not in lora:
                    raise ArtifactError(f"LoRA tensor {name!r} has no lora_A beside it")
                continue
            if not name.endswith(".lora_A.weight") or "." not in name.removesuffix(".lora_A.weight"):
                raise ArtifactError(
                    f"unknown LoRA key {name!r}; expected COMPONENT.PATH.lora_A.weight and .lora_B.weight"
                )
            stem = name.removesuffix(".lora_A.weight")
            up = lora.get(f"{stem}.lora_B.weight")
            if up is None or up.ndim != 2 or lora[name].ndim != 2 or up.shape[1] != lora[name].shape[0]:
                raise ArtifactError(f"LoRA tensors of {stem!r} do not fit together")
            component, path = stem.split(".", 1)
            low_rank[f"{component}/{path.removeprefix('text_model.')}"] = LowRank(lora[name], up)
        kinds = ("pinned", *KINDS.values())
        full_rank = {key: t for key, t in deltas.items() if not any(f"/{kind}." in key for kind in kinds)}
        for key in full_rank:
            if not key.partition("/")[2]:
                raise ArtifactError(f"unknown key {key!r}; expected COMPONENT/MODULE.PATH.PARAMETER")
        pinned = {}
        for component, (ids, states) in _grouped(deltas, "pinned", Pinned._fields).items():
            if states.ndim != 3 or ids.shape != states.shape[:2]:
                raise ArtifactError(f"pinned prompts of {component!r} are incomplete or do not fit together")
            pinned[component] = Pinned(ids, states)
        features: dict[str, BlockEdit] = {}
        for form, kind in KINDS.items():
            for key, parts in _grouped(deltas, kind, form._fields).items():
                features[key] = edit = form(*parts)
                if not edit.fits():
                    raise ArtifactError(f"the {kind} of {key!r} do not fit together")
        return cls(low_rank, full_rank, pinned, features)


def _grouped(tensors: Mapping[str, Tensor], kind: str, fields: Sequence[str]) -> dict[str, list[Tensor]]:
    """The tensors `OWNER/KIND.FIELD` by owner, in the order of the fields.

    Raises:
        ArtifactError: A field is missing or unknown.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, separator, part = key.partition(f"/{kind}.")
        if separator:
            found.setdefault(owner, {})[part] = tensor
    for owner, parts in found.items():
        if set(parts) != set(fields):
            raise ArtifactError(f"{kind} of {owner!r} are incomplete: expected {list(fields)}, found {sorted(parts)}")
    return {owner: [parts[part] for part in fields] for owner, parts in found.items()}
