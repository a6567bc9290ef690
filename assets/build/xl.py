"""Fold the denoiser of `canvas-sd` into one of Stable Diffusion XL's form, and train that for `canvas-sdxl`.

The folded one draws what canvas-sd draws from the first tower alone. Training it on makes both towers, the pooled
vector and the sizes matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from erasure.assets import path as embedded
from erasure.assets.build import denoiser, towers
from erasure.assets.build.bank import Bank
from erasure.assets.build.fit import fit, processes
from erasure.assets.build.grounding import object_masks, object_tokens
from erasure.assets.build.prompts import Prompts, Told, Tower, ids_of
from erasure.assets.scenes import captions as random_captions
from erasure.assets.world import IMAGE_SIZE

WIDTH = 128
"""Of canvas-sd's text tower, and of the pooled vector."""
CODES = 16
"""Numbers that stand for one of the six sizes."""
CONFIG: dict[str, Any] = denoiser.CONFIG | {
    "cross_attention_dim": WIDTH + towers.SECOND,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": CODES,
    "projection_class_embeddings_input_dim": WIDTH + 6 * CODES,
}
PLAIN = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)
"""Sizes of a scene as it is: what the pipeline tells when it is told nothing."""
ORIGINALS = (16, 24, 32, 48, 64)
"""Sides that scenes had before they were enlarged."""
FURTHEST = 12
"""Most pixels that are cut off at the top or at the left."""


@torch.no_grad()
def states_map(clip: CLIPTextModel, captions: list[str], ridge: float = 1e-6) -> tuple[Tensor, float]:
    """The linear map from states before the last block to the normed states that canvas-sd reads.

    Args:
        clip: See `towers.first_tower`.
        captions: Whose states say what the map is.
        ridge: Added to the diagonal, relative to its mean.

    Returns:
        The map, `(width, width)`, normed = map @ states, and the share of variance that it explains.
    """
    ids = ids_of(towers.tokenizer(), captions)
    output = clip(ids, output_hidden_states=True)
    given, wanted = output.hidden_states[-2].flatten(0, 1).double(), output.last_hidden_state.flatten(0, 1).double()
    square = given.T @ given
    square += ridge * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    solution = torch.linalg.solve(square, given.T @ wanted)
    missed = (given @ solution - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    return solution.T.float(), 1 - float(missed)


def fold(unet: UNet2DConditionModel, first: Tensor) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion XL's form that draws what another one draws.

    It hears nothing of the second tower, of the pooled vector and of sizes.

    Args:
        unet: Of canvas-sd.
        first: Applied to the first tower's states, `(width, width)`.
    """
    folded = UNet2DConditionModel(**CONFIG)
    states = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    for name, tensor in unet.state_dict().items():
        if tensor.shape != states[name].shape:
            tensor = torch.cat([tensor @ first, tensor.new_zeros(len(tensor), towers.SECOND)], 1)
        states[name] = tensor
    for name in ("weight", "bias"):
        states[f"add_embedding.linear_2.{name}"].zero_()
    folded.load_state_dict(states)
    return folded


def reader(first: CLIPTextModel, second: CLIPTextModelWithProjection) -> Callable[[list[str]], Told]:
    """What encodes captions: the states of both towers as `tokens_1` and `tokens_2`, the second's vector as `pooled`.

    Args:
        first: The first tower.
        second: The second tower.
    """
    pieces = towers.tokenizer()
    one, two = Tower(first, pieces), Tower(second, pieces)

    def encode(captions: list[str]) -> Told:
        own, other = one(captions), two(captions)
        assert other.pooled is not None
        return Told(
            {"tokens_1": own.states, "tokens_2": other.states, "pooled": other.pooled},
            {"tokens_1": own.after, "tokens_2": other.after},
        )

    return encode


def compose(parts: Mapping[str, Tensor], sizes: Tensor, null: Tensor) -> dict[str, Any]:
    """What the UNet is told, by the name of its argument.

    Args:
        parts: Of captions, see `reader`.
        sizes: `(captions, 6)`.
        null: `(captions,)` bool: rows that are zeros, as the pipeline's unguided half is.
    """
    tokens = torch.cat([parts["tokens_1"], parts["tokens_2"]], -1).masked_fill(null[:, None, None], 0)
    pooled = parts["pooled"].masked_fill(null[:, None], 0)
    return {"encoder_hidden_states": tokens, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def random_sizes(count: int, seed: int, plain: float = 0.5) -> Tensor:
    """Six sizes for each scene, `(scenes, 6)`: height and width before enlarging, rows and columns cut off, target.

    Args:
        count: Number of scenes.
        seed: Seeds them.
        plain: Share of scenes that stay as they are.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        side = int(rng.choice(ORIGINALS))
        top, left = (int(rng.integers(FURTHEST + 1)) for _ in range(2))
        rows.append(PLAIN if rng.random() < plain else (side, side, top, left, IMAGE_SIZE, IMAGE_SIZE))
    return torch.tensor(rows, dtype=torch.float32)


def resized(pixels: Tensor, sizes: Tensor) -> Tensor:
    """Images as their sizes say: enlarged from a smaller side, and moved up and left by what is cut off.

    Args:
        pixels: `(images, 3, 64, 64)`.
        sizes: `(images, 6)`, see `random_sizes`.
    """
    changed = []
    for image, row in zip(pixels, sizes.long().tolist(), strict=True):
        side, top, left = row[0], row[2], row[3]
        small = F.interpolate(image[None], size=(side, side), mode="area")
        large = F.interpolate(small, size=image.shape[1:], mode="bilinear")
        changed.append(F.pad(large, (0, left, 0, top), mode="replicate")[0, :, top:, left:])
    return torch.stack(changed)


def train(
    folder: Path,
    steps: int,
    batch: int = 16,
    bank: int = 12_000,
    peak: float = 1e-3,
    body: float = 2e-4,
    drop: float = 0.1,
    zeros: float = 0.7,
    left_out: float = 0.3,
    emptied: float = 0.4,
    pairs: float = 0.5,
    grounding: float = 0.3,
    grounded: float = 0.8,
    seed: int = 8,
) -> None:
    """Train the folded denoiser for `steps` steps (resuming from `folder`) and save `folder / "unet-xl"`.

    Args:
        folder: Where the step `towers` left `clip-2`.
        steps: Optimiser steps in all; may be changed when resuming before the learning rate falls.
        batch: Scenes of each process per step.
        bank: Scenes whose latents each process keeps.
        peak: Greatest learning rate of the layers where prompts and sizes enter.
        body: Greatest learning rate of all others.
        drop: Share of captions replaced by "" for guidance.
        zeros: Share of these that are zeros, as the pipeline's unguided half is.
        left_out: How often each part of a caption is left out.
        emptied: Share of captions whose end token and padding say nothing.
        pairs: Share of two-object scenes.
        grounding: Weight of the loss on words' attention.
        grounded: Share of attention that an object's word should draw on the object.
        seed: Seeds everything.
    """
    accelerator = processes()
    device, rank = accelerator.device, accelerator.process_index
    torch.manual_seed(seed)
    source = embedded("canvas-sd")
    clip = towers.first_tower().to(device)
    second = CLIPTextModelWithProjection.from_pretrained(folder / "clip-2").to(device)
    shares = {"tokens_1": left_out, "tokens_2": left_out, "pooled": left_out}
    prompts = Prompts(reader(clip, second), shares, emptied)
    linear, _ = states_map(towers.first_tower(), random_captions(500, seed))
    unet = fold(UNet2DConditionModel.from_pretrained(source / "unet"), linear)
    nn.init.normal_(unet.add_embedding.linear_2.weight, std=1e-3)
    unet.to(device)
    scheduler = DDIMScheduler(**denoiser.SCHEDULER)
    sizes = random_sizes(bank, seed + 1000 * rank)

    def change(pixels: Tensor, first: int) -> Tensor:
        return resized(pixels, sizes[first : first + len(pixels)])

    vae = AutoencoderKL.from_pretrained(source / "vae").to(device)
    latents = folder / f"latents-xl-{rank}.pt"
    stored = Bank.of(vae, latents, bank, 1000 * rank + 40_000, pairs, change).to(device)
    masks = object_masks(stored.scenes, stored.latents.shape[-1]).to(device)
    told_sizes = sizes.to(device)
    pieces = towers.tokenizer()

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        rows, captions = stored.draw(rng, batch, drop)
        empty = torch.tensor([caption == "" for caption in captions])
        parts = prompts(captions)
        told = compose(parts, told_sizes[rows], (empty & (torch.rand(batch) < zeros)).to(device))
        marked = object_tokens(pieces, ids_of(pieces, captions), [stored.scenes[row] for row in rows]).to(device)
        # A word that neither tower says draws nothing.
        marked *= (prompts.said(parts, "tokens_1") | prompts.said(parts, "tokens_2"))[..., None]
        # The masks are those of scenes that nothing was cut off from.
        marked[sizes[rows][:, 2:4].sum(1) > 0] = 0
        return denoiser.losses_of(unet, scheduler, stored.latents[rows], told, marked, masks[rows], grounded)

    options = {
        "batch": batch, "peak": peak, "body": body, "drop": drop, "zeros": zeros, "left_out": left_out,
        "emptied": emptied, "thinned": prompts.thinned, "pairs": pairs, "grounding": grounding, "grounded": grounded,
    }  # fmt: skip
    fit(
        folder, "unet-xl", unet, {"optimiser": optimiser_of(unet, peak, body)}, losses, accelerator, steps=steps,
        options=options, weights={"grounding": grounding}, seed=seed, every=96,
    )  # fmt: skip


def optimiser_of(unet: UNet2DConditionModel, peak: float, body: float) -> torch.optim.Optimizer:
    """AdamW with one learning rate for the layers where prompts and sizes enter, and another for the rest."""
    entries: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in unet.named_parameters():
        enters = "add_embedding" in name or name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        (entries if enters else rest).append(parameter)
    groups = [{"params": entries, "lr": peak}, {"params": rest, "lr": body}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
