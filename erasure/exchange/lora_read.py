"""LoRA files of others as edits: kohya's, LECO's and the sliders', SPM's, diffusers' and PEFT's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.backbones.layouts import unformed
from erasure.carriers.edits import Edits, LowRank
from erasure.errors import ArtifactError, UnsupportedModelError, WrongBaseError
from erasure.exchange.names_read import Table, Target, layer_table
from erasure.exchange.reading import Source
from erasure.files import shown
from erasure.interop import paths
from erasure.interop.pipelines import components_of

PAIRS: tuple[tuple[str, str, str], ...] = (
    (".lora_down.weight", ".lora_up.weight", "kohya's"),
    (".lora_A.weight", ".lora_B.weight", "PEFT's"),
    (".lora_A.default.weight", ".lora_B.default.weight", "PEFT's"),
    ("_lora.down.weight", "_lora.up.weight", "diffusers' first"),
    (".lora.down.weight", ".lora.up.weight", "diffusers' first"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", "diffusers' first"),
)
"""Endings of the two factors, and whose names they are."""
ALPHA, WEIGHT, BIAS = ".alpha", ".diff", ".diff_b"
OTHERS = {
    ".hada_": "a LoHa", ".lokr_": "a LoKr", ".dora_scale": "a DoRA", ".lora_magnitude_vector": "a DoRA",
    ".lora_mid.": "a LoRA with a third factor", ".oft_": "an OFT", ".a1.weight": "a GLoRA",
    ".w_norm": "a change of norms", ".b_norm": "a change of norms",
}  # fmt: skip
"""What other endings say of a file, which is not read."""
ADAPTERS = "lora_adapter_metadata"
"""Text of diffusers in the header: rank and alpha of PEFT's adapters, which have no tensors of their own."""


@dataclass
class Layer:
    """The tensors of one layer in a file."""

    down: Tensor | None = None
    up: Tensor | None = None
    scheme: str = ""
    alpha: Tensor | None = None
    weight: Tensor | None = None
    """Change of the whole weight."""
    bias: Tensor | None = None


@dataclass
class ReadResult:
    """Result of reading a file, with remarks for the user."""

    edits: Edits
    notes: list[str] = field(default_factory=list)


def is_lora(source: Source) -> bool:
    """Whether a file holds changes of layers rather than their weights."""
    ends = (*(end for pair in PAIRS for end in pair[:2]), WEIGHT, BIAS)
    return any(name.endswith(ends) or any(sign in name for sign in OTHERS) for name in source.tensors)


def read_lora(source: Source, pipe: DiffusionPipeline) -> ReadResult:
    """Read the edits of a LoRA file.

    Args:
        source: The file.
        pipe: The model that it is for.

    Raises:
        ArtifactError: Half of a LoRA, unknown names, names of two kinds, or an alpha that is missing or no number.
        UnsupportedModelError: Another kind of adapter than a LoRA.
        WrongBaseError: Layers or sizes of another model.
    """
    notes: list[str] = []
    layers, scales = parts_of_lora(source, notes)
    table, modules = layer_table(pipe), components_of(pipe)
    if unknown := [stem for stem in layers if stem not in table]:
        raise WrongBaseError(
            f"{source.shown} changes {len(layers)} layers, and {len(unknown)} of them are none of this "
            f"{type(pipe).__name__} (first {shown(unknown[0])}): it is for another model, or names them in a way that "
            "is not known; name the model that it was made for (--model)"
        )
    edits, zero = Edits(), 0
    for stem, layer in layers.items():
        if len(table[stem]) > 1 and any(target.rows is None for target in table[stem]):
            raise WrongBaseError(
                f"{source.shown}: {shown(stem)} could be {' or '.join(each.key for each in table[stem])}; rename it"
            )
        for target in table[stem]:
            weight = paths.parameter(modules[target.component], f"{target.path}.weight")
            zero += _add(edits, source, stem, layer, scales.get(stem, 1.0), target, table, weight)
    if zero:
        notes.append(f"{zero} layers of the file change nothing and were left out")
    return ReadResult(edits, notes)


def parts_of_lora(source: Source, notes: list[str]) -> tuple[dict[str, Layer], dict[str, float]]:
    """Read the tensors of each layer in a file, and the scales of their products.

    Args:
        source: The file.
        notes: Receives what is to be said about it.

    Raises:
        ArtifactError: See `read_lora`.
        UnsupportedModelError: See `read_lora`.
    """
    layers = _layers(source)
    _check_whole(source, layers)
    return layers, _scales(source, layers, notes)


def _layers(source: Source) -> dict[str, Layer]:
    """Group the tensors of a file by layer name, without endings."""
    found: dict[str, Layer] = {}
    for name, tensor in source.tensors.items():
        if kind := next((what for sign, what in OTHERS.items() if sign in name), None):
            raise UnsupportedModelError(
                f"{source.shown} is {kind} ({shown(name)}), and only plain LoRA is read: merge it into its model with "
                "the tool that made it, and import the weights of the layers that it changes"
            )
        pair = next((pair for pair in PAIRS if name.endswith(pair[:2])), None)
        if pair is not None:
            down = name.endswith(pair[0])
            layer = found.setdefault(name.removesuffix(pair[0] if down else pair[1]), Layer())
            if layer.scheme not in ("", pair[2]) or (layer.down if down else layer.up) is not None:
                raise ArtifactError(f"{source.shown} holds {shown(name)} twice, under two names: keep one of them")
            layer.scheme = pair[2]
            if down:
                layer.down = tensor
            else:
                layer.up = tensor
        elif end := next((end for end in (ALPHA, BIAS, WEIGHT) if name.endswith(end)), None):
            layer = found.setdefault(name.removesuffix(end), Layer())
            setattr(layer, {ALPHA: "alpha", BIAS: "bias", WEIGHT: "weight"}[end], tensor)
        else:
            raise ArtifactError(
                f"{source.shown} holds {shown(name)}, which is no part of a LoRA: expected a layer's name and "
                f"{', '.join(PAIRS[0][:2])} and {ALPHA}, or {' and '.join(PAIRS[1][:2])}"
            )
    return found


def _check_whole(source: Source, layers: Mapping[str, Layer]) -> None:
    """Raise `ArtifactError` for half a LoRA, or one of two kinds of names."""
    schemes = sorted({layer.scheme for layer in layers.values() if layer.scheme})
    if len(schemes) > 1:
        first = {s: next(stem for stem, layer in layers.items() if layer.scheme == s) for s in schemes}
        told = " and ".join(f"{scheme} ({shown(stem)})" for scheme, stem in first.items())
        raise ArtifactError(
            f"{source.shown} holds names of two kinds, {told}: programs read one of them and leave out the other, so "
            "nobody knows what it is to do. Split it into two files and import each"
        )
    for stem, layer in layers.items():
        if (layer.down is None) != (layer.up is None):
            lost = "down (A)" if layer.down is None else "up (B)"
            raise ArtifactError(
                f"{source.shown}: {shown(stem)} has no {lost} factor: the file is half of a LoRA; fetch it again"
            )
        if layer.down is None and layer.weight is None and layer.bias is None:
            raise ArtifactError(
                f"{source.shown}: {shown(stem)} has an alpha and no factors: the file is damaged; fetch it again"
            )


def _scales(source: Source, layers: Mapping[str, Layer], notes: list[str]) -> dict[str, float]:
    """Compute the scale of each layer's product: alpha over rank."""
    pairs = {stem: layer for stem, layer in layers.items() if layer.down is not None}
    with_alpha = [stem for stem, layer in pairs.items() if layer.alpha is not None]
    if with_alpha and len(with_alpha) < len(pairs):
        lost = next(stem for stem in pairs if stem not in with_alpha)
        raise ArtifactError(
            f"{source.shown} has an alpha for {len(with_alpha)} of {len(pairs)} layers, and none for {shown(lost)}: "
            "its scale is unknown. Fetch the file again, or write the alpha (the rank, where the scale is 1)"
        )
    if not with_alpha:
        header = _adapters(source)
        if any(layer.scheme == PAIRS[0][2] for layer in pairs.values()):
            notes.append("the file names no alpha: its scale is taken to be 1, as programs do")
        return {stem: _header_scale(source, stem, layer, header) for stem, layer in pairs.items()}
    scales = {}
    for stem, layer in pairs.items():
        assert layer.alpha is not None
        assert layer.down is not None
        value = float(layer.alpha) if layer.alpha.numel() == 1 else math.nan
        if not math.isfinite(value) or value == 0:
            raise ArtifactError(
                f"{source.shown}: the alpha of {shown(stem)} is {shown(layer.alpha.flatten()[:3].tolist())}, expected "
                "one number other than 0; fetch the file again"
            )
        scales[stem] = value / len(layer.down)
    return scales


def _adapters(source: Source) -> dict[str, object]:
    """Read the ranks and alphas of PEFT's adapters that diffusers wrote into the header; empty without."""
    if ADAPTERS not in source.metadata:
        return {}
    try:
        held = json.loads(source.metadata[ADAPTERS])
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise ArtifactError(f"{source.shown}: {ADAPTERS} in its header cannot be read: fetch the file again")
    return held


def _header_scale(source: Source, stem: str, layer: Layer, header: Mapping[str, object]) -> float:
    """Compute a layer's scale from the header: from its own alpha and rank, or those of its network."""
    component, _, path = stem.partition(".")
    if f"{component}.lora_alpha" not in header:
        return 1.0
    if header.get(f"{component}.use_dora"):
        raise UnsupportedModelError(
            f"{source.shown} is a DoRA, and only plain LoRA can be read: ask its author for a plain LoRA, or for "
            "the whole weights"
        )
    assert layer.down is not None
    alpha: object = header[f"{component}.lora_alpha"]
    patterns = header.get(f"{component}.alpha_pattern") or {}
    if isinstance(patterns, Mapping):
        # PEFT's rule: the first pattern that a path ends with.
        own = (value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({re.escape(pattern)})", path))
        alpha = next(own, alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or not alpha:
        raise ArtifactError(
            f"{source.shown}: the alpha of {shown(stem)} is {shown(alpha)}, expected a number other than 0"
        )
    rank = len(layer.down)
    return alpha / (math.sqrt(rank) if header.get(f"{component}.use_rslora") else rank)


def _add(
    edits: Edits, source: Source, stem: str, layer: Layer, scale: float, target: Target, table: Table, weight: Tensor
) -> bool:
    """Add a file's change of one layer to edits; return whether the change is zero."""
    where = f"{source.shown}: {shown(stem)}"
    nothing = True
    if layer.down is not None and layer.up is not None:
        down, up = _checked(where, layer.down, layer.up, target, table[stem], weight)
        if scale != 1:
            up = up.float() * scale
        up = unformed(up[target.first : target.first + target.rows] if target.rows is not None else up, target.form)
        # Ranks without effect: padding, and what belongs to other layers of the same tensor.
        kept = (
            down.flatten(1).any(1) & up.flatten(2).any(2).any(0) if up.ndim > 2 else down.flatten(1).any(1) & up.any(0)
        )
        if kept.any():
            nothing = False
            _put(edits, where, target.key, down[kept], up[:, kept], weight)
    for tensor, parameter in ((layer.weight, "weight"), (layer.bias, "bias")):
        if tensor is None or not tensor.any():
            continue
        nothing = False
        key = f"{target.key}.{parameter}"
        if key in edits.deltas or target.rows is not None:
            raise ArtifactError(f"{where} changes {key} twice, or in part: keep one of the changes")
        if parameter == "weight" and tensor.shape != weight.shape:
            raise WrongBaseError(_unlike(where, tuple(tensor.shape), tuple(weight.shape)))
        edits.deltas[key] = tensor
    return nothing


def _checked(
    where: str, down: Tensor, up: Tensor, target: Target, targets: list[Target], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Convert the factors of a layer to the form of its weight, and check their shapes.

    Raises:
        ArtifactError: They do not go together.
        WrongBaseError: They are for a layer of another size.
    """
    if not (down.ndim in (2, 4) and up.ndim in (2, 4) and down.is_floating_point() and up.is_floating_point()):
        raise ArtifactError(f"{where} has factors of {down.ndim} and {up.ndim} dimensions, expected 2 or 4 of numbers")
    if up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
        raise ArtifactError(
            f"{where} has factors that do not go together: down {tuple(down.shape)}, up {tuple(up.shape)}; fetch it "
            "again"
        )
    rows = sum(each.rows for each in targets if each.rows is not None) if target.rows is not None else len(weight)
    made = (up.shape[0], *down.shape[1:])
    expected = (rows, *weight.shape[1:])
    if math.prod(made[2:]) == math.prod(expected[2:]) == 1:  # a linear layer, whichever way it is written
        made, expected = made[:2], expected[:2]
    if made != expected:
        raise WrongBaseError(_unlike(where, made, expected))
    return down, up.flatten(1)


def _put(edits: Edits, where: str, key: str, down: Tensor, up: Tensor, weight: Tensor) -> None:
    """Add the factors of one layer to edits; those of a convolution are multiplied."""
    if key in edits.low_rank or f"{key}.weight" in edits.deltas:
        raise ArtifactError(f"{where} changes {key} again, which another name in the file does: keep one of them")
    if weight.ndim == 2:
        edits.low_rank[key] = LowRank(down.flatten(1).contiguous(), up.contiguous())
    else:
        edits.deltas[f"{key}.weight"] = (up.float() @ down.flatten(1).float()).view(weight.shape)


def _unlike(where: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"{where} is for a layer of shape {found}, the model's has {expected}: the file is for another model; name "
        "the one that it was made for (--model)"
    )


__all__ = ["ReadResult", "is_lora", "read_lora"]
