"""Rectified flow: what the trainings of Canvas's transformers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.assets import path as embedded
from erasure.assets.build.bank import Bank
from erasure.assets.build.fit import fit
from erasure.assets.build.grounding import grounding_loss, object_masks
from erasure.assets.build.prompts import Prompts
from erasure.assets.scenes import Scene
from erasure.backbones import attention_sites
from erasure.backbones.parametrisation import TIMESTEPS, Flow
from erasure.carriers.attention import AttentionController
from erasure.carriers.layout import Layout

SHIFT = 1.6
"""Shift of noise levels that suits 64 image tokens: what Flux's dynamic shift comes to."""


@dataclass(frozen=True)
class Recipe:
    """Scenes and captions of a training."""

    batch: int = 48
    """Scenes of each process per step."""
    bank: int = 12_000
    """Scenes whose latents each process keeps."""
    drop: float = 0.1
    """Share of captions replaced by "" for guidance."""
    pairs: float = 0.5
    """Share of two-object scenes."""
    turned: float = 0.0
    """Chance that of two objects the right one is named first: here, unlike in canvas-sd, the prompt says what stands
    where, as T5's states know the order of words."""
    grounding: float = 0.3
    """Weight of the loss on words' attention, see `grounding_loss`."""
    grounded: float = 0.4
    """Share of joint attention that an object's word should draw on the object."""
    layers: int = 4
    """Layers, from the first on, in which it should."""


class State(NamedTuple):
    """Noised scenes and what a model is told of them."""

    noisy: Tensor
    """`(batch, channels, rows, columns)`."""
    velocity: Tensor
    """Target of the network, of the shape of `noisy`: the noise less the scenes."""
    level: Tensor
    """`(batch,)` in 0-1."""
    told: Mapping[str, Tensor]
    """Parts of the captions."""
    empty: Mapping[str, Tensor]
    """Parts of as many empty captions."""


Comparison = Callable[[State], tuple[Tensor, Tensor]]
"""What a network tells at a state, and what it should, of the same shape."""

Words = Callable[[list[str], Sequence[Scene], Mapping[str, Tensor]], Tensor]
"""Given captions, their scenes and their parts: which token of a joint attention names which object, as
`object_tokens` tells; a word that is left out names nothing."""


def train(
    folder: Path,
    name: str,
    network: ModelMixin,
    optimisers: Mapping[str, torch.optim.Optimizer],
    compare: Comparison,
    prompts: Prompts,
    words: Words,
    accelerator: Accelerator,
    recipe: Recipe,
    *,
    steps: int,
    seed: int,
) -> None:
    """Train a transformer (resuming from `folder`), and save `folder / name`; see `fit`.

    Args:
        folder: Where latents, checkpoint and log are kept.
        name: Name of the network.
        network: What trains.
        optimisers: What trains it.
        compare: Gives what the network tells, and what it should.
        prompts: Encodes captions.
        words: Finds the tokens that name objects.
        accelerator: The processes.
        recipe: Scenes and captions.
        steps: Optimiser steps in all; may be changed when resuming before the learning rate falls.
        seed: Seeds everything.
    """
    way = Flow()
    device, rank, batch = accelerator.device, accelerator.process_index, recipe.batch
    vae = AutoencoderKL.from_pretrained(embedded("canvas-sd") / "vae").to(device)
    latents = folder / f"latents-{rank}.pt"
    bank = Bank.of(vae, latents, recipe.bank, 1000 * rank + 30_000, recipe.pairs).to(device)

    masks = object_masks(bank.scenes, bank.latents.shape[-1]).to(device)
    joint = [site for site in attention_sites(network) if site.kind == "joint"][: recipe.layers]

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        rows, captions = bank.draw(rng, batch, recipe.drop, recipe.turned)
        clean, told = bank.latents[rows], prompts(captions)
        marked = words(captions, [bank.scenes[row] for row in rows], told).to(device)
        level = levels(batch, SHIFT).to(device)
        noise, t = torch.randn(clean.shape).to(device), TIMESTEPS * level
        noisy, velocity = way.noised(clean, noise, t), way.target(clean, noise, t)
        empty = {part: states.expand(batch, *states.shape[1:]) for part, states in prompts.empty.items()}
        control = AttentionController(network, Layout((clean.shape[2], clean.shape[3]), batch))
        control.capture(marked, joint)
        with control:
            drawn, wanted = compare(State(noisy, velocity, level, told, empty))
        return {
            "loss": F.mse_loss(drawn.float(), wanted),
            "grounding": grounding_loss(control.maps, masks[rows], marked.sum(1) > 0, recipe.grounded),
        }

    options = {**asdict(recipe), **prompts.shares, "emptied": prompts.emptied, "thinned": prompts.thinned}
    fit(
        folder, name, network, optimisers, losses, accelerator, steps=steps, options=options,
        weights={"grounding": recipe.grounding}, every=96, memory=0.98, seed=seed,
    )  # fmt: skip


def levels(count: int, shift: float) -> Tensor:
    """Noise levels in 0-1 of a logit-normal distribution, shifted towards noise, `(count,)` (Esser et al. 2024).

    Args:
        count: How many.
        shift: 1 shifts nothing; the sampler should shift by the same.
    """
    level = torch.sigmoid(torch.randn(count))
    return shift * level / (1 + (shift - 1) * level)


def initialise(network: ModelMixin) -> None:
    """Start every block as the identity and the output at zero (adaLN-zero, Peebles and Xie 2023).

    diffusers gives the modulations the usual random weights, from which a small model learns badly.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def optimisers(network: ModelMixin, matrices: float = 0.02, others: float = 2e-3) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks but for their modulations, AdamW for all else.

    Args:
        network: A transformer.
        matrices: Learning rate of Muon.
        others: Learning rate of AdamW.
    """
    by_muon: list[nn.Parameter] = []
    by_adam: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = "transformer_blocks." in name and "norm" not in name and parameter.ndim == 2
        (by_muon if inside else by_adam).append(parameter)
    return {
        "muon": torch.optim.Muon(by_muon, lr=matrices, momentum=0.95, weight_decay=0.0),
        "optimiser": torch.optim.AdamW(by_adam, lr=others, betas=(0.9, 0.99), weight_decay=1e-3, fused=True),
    }
