"""The edits of an erasure by carrier, and the names of their tensors on disk."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.carriers import membranes
from erasure.carriers.activations import Pinned
from erasure.carriers.blocks import FLOATS, KINDS, acts, check_block
from erasure.carriers.features import BlockEdit
from erasure.carriers.filters import PromptFilter
from erasure.carriers.lora_names import PAIRS, file_names, is_read_by_stock, layer_of
from erasure.carriers.membranes import GATED, GATES, MEMBRANES, Membrane
from erasure.carriers.names import grouped
from erasure.carriers.permeability import PromptGate
from erasure.carriers.safety import SafetyGuidance
from erasure.errors import ArtifactError, DivergenceError, WrongBaseError
from erasure.files import shown

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS = ("unet", "transformer")
EDITABLE_COMPONENTS = (*TEXT_ENCODERS, *DENOISERS)
"""Components of a pipeline that an erasure may change: text encoders and denoisers, but no safety checker."""
PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
"""Pattern of the canonical path of a module or parameter inside a component."""
LOW_RANK = "low_rank"
"""Name on disk of low-rank edits that are not saved in a LoRA file."""
SAFETY = "safety"
"""Name on disk of safety guidance."""
GUIDES = "guides the denoiser"
"""Description of safety guidance in messages."""
FILTER = "filter"
"""Name on disk of prompt filters."""
FILTERS = "filters prompts"
"""Description of prompt filters in messages."""
FAINTEST = 1e-7
"""Norm of all weight edits together below which an erasure counts as empty, because no image changes."""


class LowRank(NamedTuple):
    """The edit `delta = up @ down` of one linear layer."""

    down: Tensor
    """Factor that reads the input, `(rank, in_features)`."""
    up: Tensor
    """Factor that gives the output, `(out_features, rank)`."""


class InputMap(NamedTuple):
    """The edit `delta = W @ up @ down` of one linear layer with base weight `W`: a map of the layer's input.

    Layers with the same input share the factors, which are saved once.
    """

    down: Tensor
    """Factor that reads the input, `(rank, in_features)`."""
    up: Tensor
    """Factor that gives the change of the input, `(in_features, rank)`."""
    outputs: Tensor
    """Number of the layer's `out_features`, `()` int."""


Edit = Tensor | LowRank | InputMap
"""The edit of one parameter."""


@dataclass
class Edits:
    """All edits of one erasure."""

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    """By `component/module.path`; edits that module's `weight`."""
    deltas: dict[str, Tensor] = field(default_factory=dict)
    """Full changes, shaped as the parameter, by `component/module.path.parameter`."""
    pinned: dict[str, Pinned] = field(default_factory=dict)
    """Prompts whose encoding stays fixed, by text encoder component."""
    features: dict[str, BlockEdit] = field(default_factory=dict)
    """Edits of sparse-autoencoder latents at a block's output, by `component/block.path`."""
    maps: dict[str, InputMap] = field(default_factory=dict)
    """By `component/module.path`; edits that module's `weight`."""
    safety: dict[str, SafetyGuidance] = field(default_factory=dict)
    """Safety guidance, by denoiser component."""
    filters: dict[str, PromptFilter] = field(default_factory=dict)
    """Prompt filters, by `denoiser/text_encoder`: what is projected away from this encoder's states for that
    denoiser."""
    membranes: dict[str, Membrane] = field(default_factory=dict)
    """Low-rank branches of a layer, each with the gate of a concept, by `denoiser/module.path`."""
    gates: dict[str, PromptGate] = field(default_factory=dict)
    """Gates of the branches, which read this encoder's prompts, by `denoiser/text_encoder`."""

    def __len__(self) -> int:
        """Number of edited parameters, blocks, layers, predictions and filters."""
        weights = len(self.low_rank) + len(self.deltas) + len(self.maps)
        return weights + len(self.features) + len(self.safety) + len(self.filters) + len(self.membranes)

    @property
    def parameters(self) -> list[str]:
        """List the keys of every edited parameter, `component/module.path.parameter`."""
        return [*(f"{key}.weight" for key in (*self.low_rank, *self.maps)), *self.deltas]

    @property
    def components(self) -> list[str]:
        """List the edited pipeline components, each once."""
        keyed = (*self.parameters, *self.features, *self.safety, *self.filters, *self.membranes)
        ends = [end for key in (*self.filters, *self.gates) for end in key.split("/")]
        return list(dict.fromkeys([*(key.split("/")[0] for key in keyed), *ends]))

    @property
    def beyond_weights(self) -> str | None:
        """Describe the edits that cannot be written into a model's weights; `None` without such edits."""
        if self.safety:
            return GUIDES
        if self.filters:
            return FILTERS
        if self.membranes:
            return GATED
        return "pins prompts" if self.pinned else "edits features" if self.features else None

    def of(self, component: str) -> dict[str, Edit]:
        """Give the edits of one component's parameters, by path inside the component."""
        prefix = component + "/"
        layers: dict[str, LowRank | InputMap] = {**self.low_rank, **self.maps}
        edits: dict[str, Edit] = {
            key.removeprefix(prefix) + ".weight": edit for key, edit in layers.items() if key.startswith(prefix)
        }
        edits |= {key.removeprefix(prefix): delta for key, delta in self.deltas.items() if key.startswith(prefix)}
        return edits

    def features_of(self, component: str) -> dict[str, BlockEdit]:
        """Give the block edits of one component, by block path."""
        prefix = component + "/"
        return {key.removeprefix(prefix): edit for key, edit in self.features.items() if key.startswith(prefix)}

    def filters_of(self, component: str) -> list[PromptFilter]:
        """List the prompt filters of a text encoder or a denoiser."""
        return [one for key, one in self.filters.items() if component in key.split("/")]

    def membranes_of(self, component: str) -> dict[str, Membrane]:
        """Give the branches of a denoiser, by path of the layer."""
        prefix = component + "/"
        return {key.removeprefix(prefix): one for key, one in self.membranes.items() if key.startswith(prefix)}

    def gates_of(self, component: str) -> list[PromptGate]:
        """List the gates of a text encoder or a denoiser."""
        return [one for key, one in self.gates.items() if component in key.split("/")]

    @property
    def carriers(self) -> list[str]:
        """List the carriers of the erasure, as named in its config."""
        inside = self.pinned or self.features or self.filters or self.membranes
        there = {"weights": self.parameters, "activations": inside, "guidance": self.safety}
        return [carrier for carrier, edits in there.items() if edits]

    def check(self) -> None:
        """Raise unless the edits are valid and change something.

        Raises:
            ArtifactError: The edits name a component that no erasure may change, edit a parameter twice, have tensors
                of a wrong or inconsistent type or shape, or are all zero.
            DivergenceError: A tensor holds NaN or infinity.
        """
        for key in (*self.parameters, *self.pinned, *self.features):
            check_key(key, text_only=key in self.pinned or key in self.features)
        for key, guidance in self.safety.items():
            if key not in DENOISERS:
                raise ArtifactError(f"safety guidance of {shown(key)}; allowed: {', '.join(DENOISERS)}")
            guidance.check(key)
        for key, one in self.filters.items():
            _check_pair(key, "a filter of prompts")
            one.check(key)
        for key, gate in self.gates.items():
            _check_pair(key, "a prompt gate")
            gate.check(key)
        for key, membrane in self.membranes.items():
            check_key(key)
            _check_tensors(key, membrane._asdict(), dict.fromkeys(membrane._fields, FLOATS))
        membranes.check(self.membranes, self.gates)
        every = Counter(self.parameters)
        if twice := sorted(key for key, count in every.items() if count > 1):
            raise ArtifactError(f"{twice[0]!r} is edited twice, in two forms: add both edits up to one")
        for key, edit in self.low_rank.items():
            _check_tensors(key, edit._asdict(), dict.fromkeys(edit._fields, FLOATS))
        for key, mapped in self.maps.items():
            _check_tensors(key, mapped._asdict(), {"down": FLOATS, "up": FLOATS, "outputs": (torch.int64,)})
            if not _goes_together(mapped) or int(mapped.outputs) < 1:
                raise ArtifactError(f"the input map of {key!r} does not fit together: make the erasure again")
        for key, delta in self.deltas.items():
            _check_tensors(key, {"delta": delta}, {"delta": FLOATS})
        for key, pin in self.pinned.items():
            _check_tensors(key, pin.stated(), {"input_ids": (torch.int64,), "hidden_states": FLOATS, "blocks": FLOATS})
            if not pin.fits():
                raise ArtifactError(f"the pinned prompts of {key!r} do not fit together")
            if pin.input_ids.numel() and int(pin.input_ids.min()) < 0:
                raise ArtifactError(
                    f"the pinned prompts of {key!r} hold token {int(pin.input_ids.min())}, allowed: 0 up"
                )
        for key, block in self.features.items():
            check_block(key, block)
        self.check_finite()
        if self.is_empty:
            raise ArtifactError(
                f"the erasure changes nothing: its {len(self)} edits are zero. It is damaged or was never trained; "
                "make it again"
            )

    @property
    def is_empty(self) -> bool:
        """Whether no edit would change an image."""
        total = 0.0
        pairs = [(edit.down, edit.up) for edit in self.low_rank.values()]
        pairs += [(edit.down, edit.up) for edit in self.maps.values()]
        for down, up in ((a.detach().double().cpu(), b.detach().double().cpu()) for a, b in pairs):
            # This is |up down|^2 without forming the product, which is as large as the layer.
            total += float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0))
        for delta in self.deltas.values():
            total += float(delta.detach().double().cpu().norm() ** 2)
        return total <= FAINTEST**2 and not any(
            [*map(acts, self.features.values()), *(one.acts for one in self.safety.values()), *self.filters,
             *(one.acts for one in self.membranes.values())]
        )  # fmt: skip

    def check_width(self, component: str, width: int) -> None:
        """Raise unless pinned prompts and block edits are as wide as the text encoder.

        Args:
            component: Name of the text encoder.
            width: Width of its hidden states.

        Raises:
            WrongBaseError: The width differs, so the erasure was made for another model.
        """
        found = {key: pin.hidden_states.shape[-1] for key, pin in self.pinned.items() if key == component}
        found |= {key: block.w_enc.shape[0] for key, block in self.features.items() if key.startswith(component + "/")}
        found |= {key: one.basis.shape[1] for key, one in self.filters.items() if key.endswith(f"/{component}")}
        found |= {key: one.states.shape[-1] for key, one in self.gates.items() if key.endswith(f"/{component}")}
        for key, wide in found.items():
            if wide != width:
                raise WrongBaseError(
                    f"{key} is edited at a width of {wide}, the {component} of this pipeline has {width}: the erasure "
                    "was made for another model"
                )

    def check_finite(self) -> None:
        """Raise `DivergenceError` when a tensor holds NaN or infinity."""
        tensors = {**self.delta_state_dict(), **self.lora_state_dict()}
        # 8-bit types have no test for finite values, so they are converted first.
        wide = {key: tensor.float() if tensor.itemsize == 1 else tensor for key, tensor in tensors.items()}
        broken = [key for key, tensor in wide.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise DivergenceError(f"{len(broken)} of {len(tensors)} tensors hold NaN or infinity, first {broken[0]!r}")

    def delta_state_dict(self) -> dict[str, Tensor]:
        """Give all tensors that are not in a LoRA file, by their names in `erasure.safetensors`."""
        pins = {f"{key}/pinned.{part}": t for key, pin in self.pinned.items() for part, t in pin.stated().items()}
        slices = {
            f"{key}/{KINDS[type(edit)]}.{part}": tensor
            for key, edit in self.features.items()
            for part, tensor in edit._asdict().items()
        }
        unread = {
            f"{key}/{LOW_RANK}.{part}": tensor
            for key, edit in self.low_rank.items()
            if not is_read_by_stock(key)
            for part, tensor in edit._asdict().items()
        }
        steered = {f"{key}/{SAFETY}.{part}": t for key, one in self.safety.items() for part, t in one.stated().items()}
        read = {f"{key}/{FILTER}.{part}": t for key, one in self.filters.items() for part, t in one._asdict().items()}
        gated = {
            f"{key}/{MEMBRANES}.{part}": t for key, one in self.membranes.items() for part, t in one._asdict().items()
        }
        gated |= {f"{key}/{GATES}.{part}": t for key, one in self.gates.items() for part, t in one._asdict().items()}
        tensors = {**self.deltas, **pins, **slices, **self._map_state_dict(), **unread, **steered, **read, **gated}
        return {key: tensor.contiguous() for key, tensor in tensors.items()}

    def _map_state_dict(self) -> dict[str, Tensor]:
        """Name input maps: `COMPONENT/input_map.NUMBER.down` and `.up`, and for each layer `LAYER/mapped.NUMBER`."""
        state, numbers = {}, dict[tuple[str, int, int], int]()
        for key, (down, up, outputs) in self.maps.items():
            component = key.split("/")[0]
            number = numbers.setdefault((component, id(down), id(up)), len(numbers))
            state[f"{component}/input_map.{number}.down"] = down
            state[f"{component}/input_map.{number}.up"] = up
            state[f"{key}/mapped.{number}"] = outputs
        return state

    def lora_state_dict(self, *, kohya: bool = True) -> dict[str, Tensor]:
        """Give the low-rank edits that stock pipelines load, by their names in LoRA files (scale 1).

        See `erasure.carriers.lora_names.file_names`; the other low-rank edits are in `delta_state_dict`.
        """
        read = {key: edit for key, edit in self.low_rank.items() if is_read_by_stock(key)}
        names = file_names(read, kohya=kohya)
        pairs = {name: tensor for key, edit in read.items() for name, tensor in zip(names[key], edit, strict=True)}
        return {name: tensor.contiguous() for name, tensor in pairs.items()}

    def equals(self, other: Edits) -> bool:
        """Whether other edits have the same effect, whatever their precision is."""
        one, two = ({**edits.lora_state_dict(), **edits.delta_state_dict()} for edits in (self, other))
        return {key: tensor.shape for key, tensor in one.items()} == {key: t.shape for key, t in two.items()} and all(
            torch.equal(tensor.cpu().float(), two[key].cpu().float()) for key, tensor in one.items()
        )

    @classmethod
    def from_state_dicts(cls, deltas: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> Edits:
        """Read edits from the tensors of `erasure.safetensors` and of a LoRA file.

        Only names and shapes are read, so tensors on the `meta` device work; `check` reads the values.

        Raises:
            ArtifactError: A key is unknown, one of two factors is missing, or factors do not fit together.
        """
        low_rank = _loras(lora)
        for key, factors in grouped(deltas, LOW_RANK, LowRank._fields).items():
            edit = LowRank(*factors)
            if key in low_rank or is_read_by_stock(key) or not _fits(edit):
                raise ArtifactError(f"the low-rank edit of {shown(key)} does not fit together: make the erasure again")
            low_rank[key] = edit
        kinds = (LOW_RANK, SAFETY, FILTER, MEMBRANES, GATES, "pinned", "input_map", "mapped", *KINDS.values())
        full_rank = {key: t for key, t in deltas.items() if not any(f"/{kind}." in key for kind in kinds)}
        for key in full_rank:
            if not key.partition("/")[2]:
                raise ArtifactError(f"unknown key {key!r}; expected COMPONENT/MODULE.PATH.PARAMETER")
        pinned, features = _pinned(deltas), _features(deltas)
        safety = {
            key: SafetyGuidance(*parts)
            for key, parts in grouped(deltas, SAFETY, SafetyGuidance._fields, optional=["pooled"]).items()
        }
        filters = {key: PromptFilter(*parts) for key, parts in grouped(deltas, FILTER, PromptFilter._fields).items()}
        branches = {key: Membrane(*parts) for key, parts in grouped(deltas, MEMBRANES, Membrane._fields).items()}
        gates = {key: PromptGate(*parts) for key, parts in grouped(deltas, GATES, PromptGate._fields).items()}
        return cls(low_rank, full_rank, pinned, features, _maps(deltas), safety, filters, branches, gates)


def check_key(key: str, *, text_only: bool = False) -> None:
    """Raise `ArtifactError` unless an erasure may edit the part of the model that a key names.

    Args:
        key: `component/path`, or a component's name alone.
        text_only: Whether only text encoders can have this kind of edit.
    """
    component, _, path = key.partition("/")
    allowed = TEXT_ENCODERS if text_only else EDITABLE_COMPONENTS
    if component not in allowed:
        raise ArtifactError(
            f"the erasure edits {shown(component)}, which no erasure may; allowed: {', '.join(allowed)}. Do not "
            "use it unless you know who made it and why"
        )
    if "/" in key and PATH.fullmatch(path) is None:
        raise ArtifactError(f"{shown(key)} names no parameter or block; expected COMPONENT/MODULE.PATH.PARAMETER")


def _check_pair(key: str, what: str) -> None:
    """Raise `ArtifactError` unless a key names a denoiser and a text encoder that it reads."""
    denoiser, _, encoder = key.partition("/")
    if denoiser not in DENOISERS or encoder not in TEXT_ENCODERS:
        raise ArtifactError(f"{what} of {shown(key)}; expected DENOISER/TEXT_ENCODER")


def _check_tensors(key: str, tensors: Mapping[str, Tensor], allowed: Mapping[str, Sequence[torch.dtype]]) -> None:
    """Raise `ArtifactError` unless every tensor of an edit has an allowed type and is not empty."""
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed[name]:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed[name])
            raise ArtifactError(f"the {name} of {key!r} is {tensor.dtype}, allowed: {names}; convert it")
        if not tensor.numel():
            raise ArtifactError(f"the {name} of {key!r} has no values (shape {list(tensor.shape)}): make it again")


def _fits(edit: LowRank) -> bool:
    """Whether the factors' shapes fit together."""
    return edit.up.ndim == 2 and edit.down.ndim == 2 and edit.up.shape[1] == edit.down.shape[0]


def _goes_together(edit: InputMap) -> bool:
    down, up = edit.down.shape, edit.up.shape
    return len(down) == 2 and up == down[::-1] and edit.outputs.ndim == 0


def _loras(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """Read the low-rank edits of a LoRA file, by layer.

    Raises:
        ArtifactError: A key is unknown, a factor is missing, factors do not fit, or a layer has two edits.
    """
    found: dict[str, LowRank] = {}
    for name in tensors:
        ends = next((pair for pair in PAIRS if name.endswith(pair)), None)
        stem = "" if ends is None else name.removesuffix(ends[0]).removesuffix(ends[1])
        key = layer_of(stem)
        if ends is None or key is None:
            raise ArtifactError(
                f"unknown LoRA key {name!r}; expected the name of a layer, and .lora_down.weight and "
                ".lora_up.weight, or .lora_A.weight and .lora_B.weight"
            )
        down, up = (tensors.get(stem + end) for end in ends)
        if down is None or up is None:
            raise ArtifactError(f"LoRA tensor {name!r} has no {ends[down is not None]} beside it")
        if name.endswith(ends[1]):
            continue
        if not _fits(LowRank(down, up)):
            raise ArtifactError(f"LoRA tensors of {stem!r} do not fit together")
        if key in found:
            raise ArtifactError(f"{key!r} is edited twice, under two names: keep one of them")
        found[key] = LowRank(down, up)
    return found


def _pinned(tensors: Mapping[str, Tensor]) -> dict[str, Pinned]:
    """Read the pinned prompts, by text encoder.

    Raises:
        ArtifactError: They are incomplete or do not fit together.
    """
    found = {}
    for component, parts in grouped(tensors, "pinned", Pinned._fields, optional=["blocks"]).items():
        found[component] = Pinned(*parts)
        if not found[component].fits():
            raise ArtifactError(f"pinned prompts of {component!r} are incomplete or do not fit together")
    return found


def _features(tensors: Mapping[str, Tensor]) -> dict[str, BlockEdit]:
    """Read the edits of latents, by block.

    Raises:
        ArtifactError: Tensors are missing, or a block has two edits.
    """
    found: dict[str, BlockEdit] = {}
    for form, kind in KINDS.items():
        for key, parts in grouped(tensors, kind, form._fields).items():
            if key in found:
                raise ArtifactError(f"the block {key!r} is edited twice: keep one of the edits")
            found[key] = form(*parts)
    return found


def _maps(tensors: Mapping[str, Tensor]) -> dict[str, InputMap]:
    """Read the input maps, by layer.

    Raises:
        ArtifactError: The map of a layer is missing, a map has no layer, tensors do not fit, or a layer has two maps.
    """
    found: dict[str, InputMap] = {}
    used = set()
    for name, outputs in tensors.items():
        key, separator, number = name.partition("/mapped.")
        if not separator:
            continue
        parts = [f"{key.split('/')[0]}/input_map.{number}.{part}" for part in ("down", "up")]
        if key in found or not all(part in tensors for part in parts):
            raise ArtifactError(f"the input map of {shown(key)} is missing or there are two: make the erasure again")
        found[key] = InputMap(tensors[parts[0]], tensors[parts[1]], outputs)
        if not _goes_together(found[key]):
            raise ArtifactError(f"the input map of {shown(key)} does not fit together: make the erasure again")
        used |= set(parts)
    if unused := sorted(name for name in tensors if "/input_map." in name and name not in used):
        raise ArtifactError(f"no layer has the input map {shown(unused[0])}: the file is damaged; make it again")
    return found
