"""The edit of one text encoder's block from what was chosen for each concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.carriers.features import FeatureEdit
from erasure.sae.gates import Gate
from erasure.sae.model import SparseAutoencoder
from erasure.sae.standin import ALONE, columns, stand_in
from erasure.sae.stream import activations

Mode = Literal["scale", "clamp", "replace"]
"""What becomes of a latent; see `ItD.mode`."""


class Choice(NamedTuple):
    """What an erasure holds of one concept."""

    features: list[int]
    """Latents to edit."""
    magnitude: Tensor
    """`(features,)`: what each usually reaches in prompts with the concept."""
    gate: Gate
    """When to."""
    anchor: Tensor | None = None
    """`(dim,)`: what takes the concept's place; `None` where nothing does."""
    factor: float = ALONE
    """Factor of its latents."""


def feature_edit(
    tower: TextTower, layer: int, sae: SparseAutoencoder, choices: Sequence[Choice], *, mode: Mode, by_probe: bool,
    local: bool,
) -> FeatureEdit:  # fmt: skip
    """The latents of all concepts, each once, with who edits and who counts them; dictionary rows in float16.

    Args:
        tower: The text encoder.
        layer: Its block.
        sae: The dictionary.
        choices: Of every concept.
        mode: What becomes of a latent.
        by_probe: Whether the linear probe opens the gates.
        local: Whether only words whose own score opens a gate are edited.
    """
    used = sorted({i for choice in choices for i in (*choice.features, *choice.gate.features)})
    place = {feature: index for index, feature in enumerate(used)}
    part = sae.slice(used)

    anchored = [(c, choice, choice.anchor) for c, choice in enumerate(choices) if choice.anchor is not None]
    latents = [stand_in(sae, choice.features, choice.magnitude, anchor) for _, choice, anchor in anchored]

    def pairs(of: Callable[[Choice], list[int]], more: Sequence[tuple[int, int]] = ()) -> Tensor:
        listed = [*((c, place[i]) for c, choice in enumerate(choices) for i in of(choice)), *more]
        return torch.tensor(listed, dtype=torch.int64).view(-1, 2).T.contiguous()

    reached, factor = torch.zeros(len(used)), torch.full((len(used),), torch.inf)
    for choice in choices:
        index = torch.tensor([place[i] for i in choice.features])
        reached[index] = torch.maximum(reached[index], choice.magnitude)
        # Of several concepts that share a latent, the one that pushes hardest.
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
    for name, tensor in columns(latents).items() if latents else ():
        half[name] = torch.cat([half[name].detach().cpu(), tensor], half[name].ndim - 1 if name != "w_dec" else 0)
    return FeatureEdit(
        **{name: tensor.cpu().to(torch.float16) for name, tensor in half.items()},
        edits=pairs(lambda choice: choice.features, [(c, len(used) + n) for n, (c, _, _) in enumerate(anchored)]),
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
