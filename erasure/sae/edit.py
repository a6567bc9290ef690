"""The edit of one text encoder's block, made from the chosen features of each concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.carriers.features import FeatureEdit
from erasure.sae.gates import Gate
from erasure.sae.model import SparseAutoencoder
from erasure.sae.standin import ALONE
from erasure.sae.stream import activations

Mode = Literal["scale", "clamp", "replace"]
"""How latents are edited; see `ItD.mode`."""


class Choice(NamedTuple):
    """Features and gate of one concept."""

    features: list[int]
    """Latents to edit."""
    magnitude: Tensor
    """Usual value of each latent in prompts with the concept, `(features,)`."""
    gate: Gate
    """Gate that decides in which prompts the latents are edited."""
    anchor: Tensor | None = None
    """Rows that the first n latents add to produce the anchor, `(n, dim)`; `None` without an anchor."""
    factor: float = ALONE
    """Factor of the concept's latents."""


def feature_edit(
    tower: TextTower, layer: int, sae: SparseAutoencoder, choices: Sequence[Choice], *, mode: Mode, by_probe: bool,
    local: bool,
) -> FeatureEdit:  # fmt: skip
    """Combine the latents of all concepts, each once, into one edit with dictionary rows in float16.

    Args:
        tower: The text encoder.
        layer: Block of the text encoder.
        sae: The dictionary.
        choices: Features and gate of every concept.
        mode: How latents are edited.
        by_probe: Whether the linear probe opens the gates.
        local: Whether only words whose own score opens a gate are edited.
    """
    used = sorted({i for choice in choices for i in (*choice.features, *choice.gate.features)})
    place = {feature: index for index, feature in enumerate(used)}
    part = sae.slice(used)

    # The rows added for an anchor belong to additional latents, because concepts that share a latent have different
    # rows.
    written = [
        (c, place[feature], row)
        for c, choice in enumerate(choices)
        for feature, row in zip(choice.features, () if choice.anchor is None else choice.anchor, strict=False)
    ]

    def pairs(of: Callable[[Choice], list[int]], more: Sequence[tuple[int, int]] = ()) -> Tensor:
        listed = [*((c, place[i]) for c, choice in enumerate(choices) for i in of(choice)), *more]
        return torch.tensor(listed, dtype=torch.int64).view(-1, 2).T.contiguous()

    reached, factor = torch.zeros(len(used)), torch.full((len(used),), torch.inf)
    for choice in choices:
        index = torch.tensor([place[i] for i in choice.features])
        reached[index] = torch.maximum(reached[index], choice.magnitude)
        # Where concepts share a latent, the lowest factor is used.
        factor[index] = factor[index].clamp(max=choice.factor)
    factor = torch.where(factor.isinf(), 1.0, factor)
    clamp = mode == "clamp"
    filler = torch.zeros(0, part.w_enc.shape[0])
    if mode == "replace":
        filler = activations(tower, layer, tower.tokenize([""]))[0].float().cpu()
    gates = [choice.gate for choice in choices]
    half = {"w_enc": part.w_enc, "b_enc": part.b_enc, "w_dec": part.w_dec, "threshold": part.threshold,
            "gain": torch.full((len(used),), -1.0) if clamp else factor - 1,
            "offset": factor * reached if clamp else torch.zeros(len(used)), "filler": filler}  # fmt: skip
    if written:
        again = torch.tensor([index for _, index, _ in written])
        more = {"w_enc": part.w_enc[:, again], "b_enc": part.b_enc[again], "threshold": part.threshold[again],
                "w_dec": torch.stack([row for _, _, row in written]), "gain": torch.ones(len(written)),
                "offset": torch.zeros(len(written))}  # fmt: skip
        half |= {name: torch.cat([half[name].cpu(), new.cpu()], int(name == "w_enc")) for name, new in more.items()}
    return FeatureEdit(
        **{name: tensor.cpu().to(torch.float16) for name, tensor in half.items()},
        edits=pairs(lambda choice: choice.features, [(c, len(used) + n) for n, (c, _, _) in enumerate(written)]),
        votes=pairs(lambda choice: choice.gate.features),
        weight=torch.cat([gate.weight for gate in gates]),
        bias=torch.tensor([gate.bias for gate in gates]),
        gate=torch.tensor([gate.level for gate in gates]),
        probe=torch.stack([gate.probe for gate in gates], 1),
        probe_bias=torch.tensor([gate.probe_bias for gate in gates]),
        probe_gate=torch.tensor([gate.probe_level for gate in gates]),
        rule=torch.tensor(int(by_probe)),
        local=torch.tensor(int(local)),
        first=torch.tensor(tower.leading),
        end=torch.tensor(tower.end),
    )
