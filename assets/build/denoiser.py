"""Train the denoiser of Canvas on frozen text features and cached latents.

Runs under `torchrun` or `accelerate launch` on any number of processes, each with its own share of scenes. They train
on their own and average their weights every few steps (local SGD): on CPU cores that other work shares, waiting for
the slowest process at every step would cost about a third of the time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from erasure.assets import path as embedded
from erasure.assets.build.grounding import grounding_loss, object_masks, object_tokens, without_end
from erasure.assets.build.loop import batches, log
from erasure.assets.build.tokenizer import CONTEXT
from erasure.assets.scenes import Scene, caption
from erasure.backbones import attention_sites
from erasure.carriers.attention import AttentionController, Layout
from erasure.training.checkpoint import Checkpoint

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


def latent_bank(vae: AutoencoderKL, path: Path, size: int, seed: int) -> tuple[Tensor, list[Scene]]:
    """Scaled latents `(size, 4, 16, 16)` of `size` scenes, kept in `path`."""
    scenes: list[Scene] = []
    stream = batches(50, seed)
    cached = torch.load(path, weights_only=True) if path.exists() else None
    latents = []
    with torch.no_grad():
        while len(scenes) < size:
            drawn, pixels, _ = next(stream)
            scenes += drawn
            if cached is None:
                latents.append(vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
    if cached is None:
        cached = torch.cat(latents)
        torch.save(cached, path)
    return cached, scenes


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
    # Processes on CPU cores find each other only when they are told that it is a CPU.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rank = accelerator.process_index
    torch.manual_seed(seed)
    source = embedded("canvas-sd") if shipped else folder
    vae = AutoencoderKL.from_pretrained(source / "vae").requires_grad_(False)
    text = CLIPTextModel.from_pretrained(source / ("text_encoder" if shipped else "clip")).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(source / "unet") if shipped else UNet2DConditionModel(**CONFIG)
    sites = [site for site in attention_sites(unet) if site.kind == "cross"]
    scheduler = DDIMScheduler(**SCHEDULER)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = EMAModel(unet.parameters(), decay=0.995, inv_gamma=1.0, power=0.75, use_ema_warmup=True)
    state = Checkpoint(folder / "unet.ckpt", model=unet, optimiser=optimiser, average=average)
    start = state.resume()
    if accelerator.is_main_process:
        options = {"batch": batch, "processes": accelerator.num_processes, "peak": peak, "pairs": pairs}
        note(folder / "unet.options.json", start, options | {
            "emptied": emptied, "grounding": grounding, "grounded": grounded,
        })  # fmt: skip
    latents, scenes = latent_bank(vae, folder / f"latents-{rank}.pt", bank, seed + 1000 * rank + 30_000)
    masks = object_masks(scenes, latents.shape[-1])
    double = np.array([len(scene.objects) == 2 for scene in scenes])
    odds = np.where(double, pairs / double.sum(), (1 - pairs) / (~double).sum())
    rng = np.random.default_rng([seed, rank, start])
    torch.manual_seed(seed + 1000 * rank + start)

    def encode(captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and states of captions."""
        ids = tokenizer(captions, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            return ids, text(ids).last_hidden_state

    empty = encode([""])[1][0]
    losses = []
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 200, (steps - step) / (decay * steps))
        rows = rng.choice(bank, size=batch, p=odds)
        captions = ["" if rng.random() < drop else caption(scenes[row], rng) for row in rows]
        ids, condition = encode(captions)
        bare = without_end(condition, ids, empty, tokenizer.eos_token_id)
        condition = torch.where((torch.rand(batch) < emptied)[:, None, None], bare, condition)
        marked = object_tokens(tokenizer, ids, [scenes[row] for row in rows])
        control = AttentionController(unet, Layout((latents.shape[2], latents.shape[3]), batch))
        control.capture(marked, sites)
        clean, noise = latents[rows], torch.randn(batch, *latents.shape[1:])
        t = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        noisy, target = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)
        with control:
            drawn = unet(noisy, t, condition).sample
        known = marked.sum(1) > 0
        errors = {"loss": F.mse_loss(drawn, target)}
        errors["grounding"] = grounding_loss(control.maps, masks[rows], known, grounded)
        loss = errors["loss"] + grounding * errors["grounding"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        losses.append({name: error.item() for name, error in errors.items()})
        if (step + 1) % sync == 0 or step + 1 == steps:
            share_weights(accelerator, unet)
            average.step(unet.parameters())
        if (step + 1) % (25 * sync) == 0 and accelerator.is_main_process:
            log(folder / "unet.jsonl", step=step + 1, seconds=state.seconds, **means(losses))
            losses = []
            state.save(step + 1)
    if accelerator.is_main_process:
        average.copy_to(unet.parameters())
        unet.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")


def note(path: Path, step: int, options: dict[str, float]) -> None:
    """Note the options of a training from a step on, after those of the steps before."""
    rows = json.loads(path.read_text()) if path.exists() and step else []
    if not rows or {**rows[-1], "from_step": 0} != {**options, "from_step": 0}:
        rows.append({"from_step": step, **options})
    path.write_text(json.dumps(rows))


@torch.no_grad()
def share_weights(accelerator: Accelerator, network: torch.nn.Module) -> None:
    """Replace the weights of every process by their mean."""
    if accelerator.num_processes > 1:
        parameters = list(network.parameters())
        mean = accelerator.reduce(torch.nn.utils.parameters_to_vector(parameters), reduction="mean")
        torch.nn.utils.vector_to_parameters(mean, parameters)


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each column."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
