"""Train the denoiser of `canvas-sd` on frozen text features and cached latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from erasure.assets import path as embedded
from erasure.assets.build.bank import Bank
from erasure.assets.build.fit import fit, processes
from erasure.assets.build.grounding import grounding_loss, object_masks, object_tokens, without_end
from erasure.assets.build.tokenizer import CONTEXT
from erasure.backbones import attention_sites
from erasure.carriers.attention import AttentionController, Layout

SCHEDULER: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (48, 96, 192),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 1,
    "attention_head_dim": (3, 6, 6),
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
}


def train(
    folder: Path,
    steps: int,
    batch: int = 16,
    peak: float = 1e-3,
    decay: float = 0.3,
    bank: int = 12_000,
    drop: float = 0.1,
    pairs: float = 0.4,
    emptied: float = 0.4,
    grounding: float = 0.3,
    grounded: float = 0.8,
    shipped: bool = False,
    sync: int = 8,
    seed: int = 3,
) -> None:
    """Train for `steps` steps (resuming from `folder`) and save `folder / "unet"` with averaged weights.

    Args:
        folder: Where the other steps left `vae`, `clip` and `tokenizer`.
        steps: Optimiser steps in all; may be changed when resuming before the decay starts.
        batch: Scenes of each process per step.
        peak: Learning rate, constant until the last `decay` of the run, then linear to zero.
        decay: Share of the run over which the learning rate falls.
        bank: Scenes whose latents each process keeps.
        drop: Share of captions replaced by "" for guidance.
        pairs: Share of two-object scenes in a batch; more of them late in the run teach which object is where.
        emptied: Share of captions whose end token and padding have the states of the empty prompt, so that the words
            alone say what to draw.
        grounding: Weight of the loss on words' attention, see `grounding_loss`.
        grounded: Share of attention that an object's word should draw on the object.
        shipped: Go on from the shipped denoiser, with the shipped autoencoder and text tower, in place of `folder`'s.
        sync: Steps between two averagings over the processes; the exported weights are a running mean of them.
        seed: Seeds everything; process i uses `seed + 1000 * i`.
    """
    accelerator = processes()
    device, rank = accelerator.device, accelerator.process_index
    torch.manual_seed(seed)
    source = embedded("canvas-sd") if shipped else folder
    vae = AutoencoderKL.from_pretrained(source / "vae").requires_grad_(False).to(device)
    text = CLIPTextModel.from_pretrained(source / ("text_encoder" if shipped else "clip")).requires_grad_(False)
    text.to(device)
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(source / "unet") if shipped else UNet2DConditionModel(**CONFIG)
    unet.to(device)
    scheduler = DDIMScheduler(**SCHEDULER)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    stored = Bank.of(vae, folder / f"latents-{rank}.pt", bank, seed + 1000 * rank + 30_000, pairs).to(device)
    masks = object_masks(stored.scenes, stored.latents.shape[-1]).to(device)

    def encode(captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and states of captions."""
        ids = tokenizer(captions, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            return ids.to(device), text(ids.to(device)).last_hidden_state

    empty = encode([""])[1][0]

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        rows, captions = stored.draw(rng, batch, drop)
        ids, condition = encode(captions)
        bare = without_end(condition, ids, empty, tokenizer.eos_token_id)
        condition = torch.where((torch.rand(batch) < emptied).to(device)[:, None, None], bare, condition)
        marked = object_tokens(tokenizer, ids.cpu(), [stored.scenes[row] for row in rows]).to(device)
        return losses_of(
            unet, scheduler, stored.latents[rows], {"encoder_hidden_states": condition}, marked, masks[rows], grounded
        )  # fmt: skip

    options = {
        "batch": batch, "peak": peak, "pairs": pairs, "emptied": emptied, "grounding": grounding, "grounded": grounded,
    }  # fmt: skip
    fit(
        folder, "unet", unet, {"optimiser": optimiser}, losses, accelerator, steps=steps, options=options,
        weights={"grounding": grounding}, decay=decay, sync=sync, seed=seed,
    )  # fmt: skip
    if accelerator.is_main_process:
        scheduler.save_pretrained(folder / "scheduler")


def losses_of(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    clean: Tensor,
    told: Mapping[str, Any],
    marked: Tensor,
    masks: Tensor,
    grounded: float,
) -> dict[str, Tensor]:
    """Losses of a UNet at random noise: of what it draws, and of where words' attention lies.

    Args:
        unet: What draws.
        scheduler: Of the noise.
        clean: Scaled latents, `(batch, 4, 16, 16)`.
        told: What the UNet is told, by the name of its argument.
        marked: Which token names which object, see `object_tokens`.
        masks: Where objects are, see `object_masks`.
        grounded: Share of attention that an object's word should draw on the object.
    """
    batch, device = len(clean), clean.device
    control = AttentionController(unet, Layout((clean.shape[2], clean.shape[3]), batch))
    control.capture(marked, [site for site in attention_sites(unet) if site.kind == "cross"])
    noise = torch.randn(clean.shape).to(device)
    t = torch.randint(scheduler.config.num_train_timesteps, (batch,)).to(device)
    noisy, target = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)
    with control:
        drawn = unet(noisy, t, **told).sample
    known = marked.sum(1) > 0
    return {
        "loss": F.mse_loss(drawn.float(), target),
        "grounding": grounding_loss(control.maps, masks, known, grounded),
    }
