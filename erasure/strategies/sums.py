"""Sums of edits: one erasure with the effect of two, the later of which was made on top of the earlier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import reduce

import torch
from torch import Tensor

from erasure.carriers.activations import Pinned
from erasure.carriers.edits import Edit, Edits, InputMap, LowRank
from erasure.carriers.membranes import joined as joined_branches
from erasure.carriers.membranes import joined_gates
from erasure.errors import UnsupportedModelError
from erasure.strategies.base import Strategy
from erasure.strategies.closed_form import factors

Weight = Callable[[str], Tensor]
"""Gives the value of a parameter by its key."""


def refuse_on_top(method: Strategy, earlier: Edits) -> None:
    """Refuse, before any training, a strategy that cannot be made on top of an erasure.

    Raises:
        OptionError: The options retain nothing, so that concepts that are erased already would come back.
        UnsupportedModelError: Both erasures edit activations, at least one of them latents of a sparse autoencoder.
    """
    if option := method.ignores_retain():
        method.refuse(
            option, getattr(method, option),
            "what lets prompts survive: on top of an erasure nothing else keeps its concepts erased",
        )  # fmt: skip
    if earlier.features and "activations" in method.carriers:
        raise UnsupportedModelError(
            f"{method.name} edits activations, and so does the earlier erasure ({next(iter(earlier.features))}): two "
            "such edits have no sum. Erase all concepts in one erasure, or make two and attach both"
        )


def added_up(earlier: Edits, later: Edits, stock: Weight, erased: Weight) -> Edits:
    """Add the edits of two erasures.

    Low-rank changes are joined, and shortened to the rank that their precision can distinguish. A sum of other forms
    is a change of the whole parameter. An input map stays an input map where nothing else changes its layer.

    Args:
        earlier: Edits of the stock model.
        later: Edits of the model with the earlier ones in force.
        stock: Gives values of the stock model's parameters, to which earlier input maps apply.
        erased: Gives values with the earlier edits in force, to which later input maps apply.

    Raises:
        UnsupportedModelError: Both erasures edit the same part of the model in ways that cannot be added.
    """
    one, two = _by_parameter(earlier), _by_parameter(later)
    made = Edits()
    for key in dict.fromkeys([*one, *two]):
        parts = [one[key]] if key in one else []
        if key in two:
            parts.append(two[key])
        if len(parts) == 2:
            plain = [_without_map(part, weight(key)) for part, weight in zip(parts, (stock, erased), strict=True)]
            parts = [_sum(*plain)]
        _put(made, key, parts[0])
    known = {"low_rank", "deltas", "maps"}
    for name in (field.name for field in fields(Edits) if field.name not in known):
        ours, theirs = getattr(earlier, name), getattr(later, name)
        if name == "pinned":
            made.pinned = _pins(ours, theirs)
            continue
        if name in ("membranes", "gates") and ours and theirs:
            continue
        if both := sorted(set(ours) & set(theirs)):
            raise UnsupportedModelError(
                f"both erasures have {name} of {both[0]}, which have no sum: erase all concepts in one erasure, or "
                "make two and attach both"
            )
        setattr(made, name, {**ours, **theirs})
    if earlier.membranes and later.membranes:
        _put_branches(made, earlier, later)
    return made


def joined(first: LowRank, second: LowRank) -> LowRank:
    """Add two low-rank changes: concatenate their factors, and lower the rank where the product allows it.

    The dropped directions together are smaller than the rounding error of the factors' precision.
    """
    dtype = reduce(torch.promote_types, (part.dtype for pair in (first, second) for part in pair))
    down = torch.cat([first.down.to(dtype), second.down.to(dtype)])
    up = torch.cat([first.up.to(dtype), second.up.to(dtype)], 1)
    # The product equals that of two small triangular matrices between orthonormal columns.
    left, core_left = torch.linalg.qr(up.double())
    right, core_right = torch.linalg.qr(down.double().T)
    core = core_left @ core_right.T
    if not core.any():
        return LowRank(down, up)
    directions, rest = factors(core)
    sizes = directions.norm(dim=0)
    tail = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = max(1, int((tail > torch.finfo(dtype).eps / 2 * tail[0]).sum()))
    if rank == len(down):
        return LowRank(down, up)
    half = sizes[:rank].sqrt()
    short = LowRank((half[:, None] * rest[:rank]) @ right.T, left @ (directions[:, :rank] / half))
    return LowRank(*(part.to(dtype).contiguous() for part in short))


def _by_parameter(edits: Edits) -> dict[str, Edit]:
    layers: dict[str, LowRank | InputMap] = {**edits.low_rank, **edits.maps}
    return {**{f"{key}.weight": edit for key, edit in layers.items()}, **edits.deltas}


def _put(made: Edits, key: str, edit: Edit) -> None:
    if isinstance(edit, LowRank):
        made.low_rank[key.removesuffix(".weight")] = edit
    elif isinstance(edit, InputMap):
        made.maps[key.removesuffix(".weight")] = edit
    else:
        made.deltas[key] = edit


def _without_map(edit: Edit, weight: Tensor) -> Tensor | LowRank:
    """Convert an input map into low-rank factors in float32; give other edits unchanged."""
    if isinstance(edit, InputMap):
        return LowRank(edit.down.float(), (weight.detach().double().cpu() @ edit.up.double()).float())
    return edit


def _sum(first: Tensor | LowRank, second: Tensor | LowRank) -> Tensor | LowRank:
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return joined(first, second)
    dense = [part.up.double() @ part.down.double() if isinstance(part, LowRank) else part for part in (first, second)]
    dtype = torch.promote_types(*((part.up if isinstance(part, LowRank) else part).dtype for part in (first, second)))
    total = dense[0].double() + dense[1].double()
    rounded = total.to(dtype)
    return rounded if torch.isfinite(rounded).all() else total.float()


def _put_branches(made: Edits, earlier: Edits, later: Edits) -> None:
    """Combine the branches of two erasures, each with its own gates.

    Raises:
        UnsupportedModelError: The gates of the two erasures read the conditioning in different ways.
    """
    if set(earlier.gates) != set(later.gates):
        raise UnsupportedModelError(
            f"the earlier erasure has gates of {', '.join(earlier.gates)}, the later of {', '.join(later.gates)}: "
            "erase all concepts in one erasure, or make two and attach both"
        )
    one, two = (len(next(iter(edits.gates.values())).floor) for edits in (earlier, later))
    made.gates = {key: joined_gates(key, gate, later.gates[key]) for key, gate in earlier.gates.items()}
    made.membranes = {
        key: joined_branches(earlier.membranes.get(key), later.membranes.get(key), (one, two))
        for key in dict.fromkeys([*earlier.membranes, *later.membranes])
    }


def _pins(earlier: Mapping[str, Pinned], later: Mapping[str, Pinned]) -> dict[str, Pinned]:
    """Combine the prompts whose encodings are fixed; for prompts of both, the earlier erasure's encodings stay.

    Raises:
        UnsupportedModelError: Only one of the two erasures has the states of blocks for its fixed prompts.
    """
    made = {**later, **earlier}
    for component in set(earlier) & set(later):
        one, two = earlier[component], later[component]
        new = [row for row in range(len(two.input_ids)) if not (one.input_ids == two.input_ids[row]).all(1).any()]
        if not new:
            continue
        if bool(one.blocks.numel()) != bool(two.blocks.numel()):
            raise UnsupportedModelError(
                f"the earlier erasure pins prompts of {component} in another form, an older one: make it again"
            )
        blocks = torch.cat([one.blocks, two.blocks[new]]) if one.blocks.numel() else one.blocks
        made[component] = Pinned(
            torch.cat([one.input_ids, two.input_ids[new]]),
            torch.cat([one.hidden_states, two.hidden_states[new].to(one.hidden_states.dtype)]),
            blocks,
        )
    return made
