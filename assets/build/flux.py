"""Train the transformer of `canvas-flux`: a real `FluxPipeline` in small.

Prompts enter by two doors, the tokens of T5 and the pooled vector of CLIP. Each is left out at random, so that either
carries the prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from erasure.assets import path as embedded
from erasure.assets.build import flow
from erasure.assets.build.bank import Bank
from erasure.assets.build.fit import fit, processes
from erasure.assets.build.prompts import Prompts, Told, Tower
from erasure.assets.build.tokenizer import CONTEXT

CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
SCHEDULER: dict[str, Any] = {"use_dynamic_shifting": True}
SHIFT = 1.6
"""What the scheduler's dynamic shift comes to at 64 image tokens."""


def reader(folder: Path, device: torch.device) -> Callable[[list[str]], Told]:
    """What encodes captions for Flux: T5's states as `tokens`, CLIP's pooled state as `pooled`.

    Args:
        folder: Where the step `t5` left its parts.
        device: Where the towers run.
    """
    source = embedded("canvas-sd")
    clip = Tower(
        CLIPTextModel.from_pretrained(source / "text_encoder").to(device),
        CLIPTokenizer.from_pretrained(source / "tokenizer"),
    )
    t5 = Tower(
        T5EncoderModel.from_pretrained(folder / "t5").to(device),
        T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )

    def encode(captions: list[str]) -> Told:
        tokens, pooled = t5(captions), clip(captions).pooled
        assert pooled is not None
        return Told({"tokens": tokens.states, "pooled": pooled}, {"tokens": tokens.after})

    return encode


def pack(latents: Tensor) -> Tensor:
    """Latents as Flux reads them: a token for each 2 x 2, `(batch, tokens, channels * 4)`."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def positions(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids of image tokens, `(tokens, 3)`, for latents of `side`, and of text tokens."""
    image = FluxPipeline._prepare_latent_image_ids(1, side // 2, side // 2, device, torch.float32)
    return image, torch.zeros(CONTEXT, 3, device=device)


def train(
    folder: Path,
    steps: int,
    batch: int = 48,
    bank: int = 12_000,
    drop: float = 0.1,
    tokens: float = 0.25,
    pooled: float = 0.15,
    emptied: float = 0.4,
    pairs: float = 0.5,
    seed: int = 5,
) -> None:
    """Train for `steps` steps (resuming from `folder`) and save `folder / "transformer"`.

    Args:
        folder: Where the step `t5` left its parts.
        steps: Optimiser steps in all; may be changed when resuming before the learning rate falls.
        batch: Scenes of each process per step.
        bank: Scenes whose latents each process keeps.
        drop: Share of captions replaced by "" for guidance.
        tokens: Share of captions of which only the pooled vector is told.
        pooled: Share of captions of which only the tokens are told.
        emptied: Share of captions whose end token and padding say nothing.
        pairs: Share of two-object scenes.
        seed: Seeds everything.
    """
    accelerator = processes()
    device, rank = accelerator.device, accelerator.process_index
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(embedded("canvas-sd") / "vae").to(device)
    prompts = Prompts(reader(folder, device), {"tokens": tokens, "pooled": pooled}, emptied)
    transformer = FluxTransformer2DModel(**CONFIG)
    flow.initialise(transformer)
    transformer.to(device)
    optimisers = flow.optimisers(transformer)
    stored = Bank.of(vae, folder / f"latents-{rank}.pt", bank, seed + 1000 * rank + 30_000, pairs).to(device)
    image, words = positions(stored.latents.shape[-1], device)

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        rows, captions = stored.draw(rng, batch, drop)
        told = prompts(captions)
        clean = stored.latents[rows]
        level = flow.levels(batch, SHIFT).to(device)
        noisy, velocity = flow.noised(clean, torch.randn(clean.shape).to(device), level)
        drawn = transformer(pack(noisy), told["tokens"], told["pooled"], level, image, words).sample
        return {"loss": F.mse_loss(drawn.float(), pack(velocity))}

    options = {"batch": batch, "drop": drop, "tokens": tokens, "pooled": pooled, "emptied": emptied, "pairs": pairs}
    fit(
        folder, "transformer", transformer, optimisers, losses, accelerator, steps=steps, options=options, seed=seed,
        every=96,
    )  # fmt: skip


def distil(
    folder: Path,
    steps: int,
    batch: int = 32,
    bank: int = 12_000,
    drop: float = 0.15,
    tokens: float = 0.2,
    pooled: float = 0.1,
    emptied: float = 0.3,
    pairs: float = 0.5,
    greatest: float = 4.0,
    seed: int = 6,
) -> None:
    """Teach the trained transformer to guide itself, as FLUX.1 dev does, and save `folder / "guided"`.

    One pass at guidance g then tells what two passes tell with classifier-free guidance (Meng et al. 2023). Resumes
    from `folder`.

    Args:
        folder: Where `train` left `transformer`.
        steps: Optimiser steps in all.
        batch: Scenes of each process per step.
        bank: Scenes whose latents each process keeps.
        drop: Share of empty captions, which guidance must not change.
        tokens: Share of captions of which only the pooled vector is told.
        pooled: Share of captions of which only the tokens are told.
        emptied: Share of captions whose end token and padding say nothing.
        pairs: Share of two-object scenes.
        greatest: Greatest guidance; it is drawn evenly from 1 on.
        seed: Seeds everything.
    """
    accelerator = processes()
    device, rank = accelerator.device, accelerator.process_index
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(embedded("canvas-sd") / "vae").to(device)
    prompts = Prompts(reader(folder, device), {"tokens": tokens, "pooled": pooled}, emptied)
    teacher = FluxTransformer2DModel.from_pretrained(folder / "transformer").requires_grad_(False).to(device)
    student = guided(teacher).to(device)
    optimisers = flow.optimisers(student, matrices=0.002, others=5e-4)
    stored = Bank.of(vae, folder / f"latents-{rank}.pt", bank, seed + 1000 * rank + 30_000, pairs).to(device)
    image, words = positions(stored.latents.shape[-1], device)

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        rows, captions = stored.draw(rng, batch, drop)
        told = prompts(captions)
        clean = stored.latents[rows]
        level = flow.levels(batch, SHIFT).to(device)
        noisy = pack(flow.noised(clean, torch.randn(clean.shape).to(device), level)[0])
        guidance = 1 + (greatest - 1) * torch.rand(batch).to(device)
        with torch.no_grad():
            own = teacher(noisy, told["tokens"], told["pooled"], level, image, words).sample
            empty = {name: part.expand(batch, *part.shape[1:]) for name, part in prompts.empty.items()}
            null = teacher(noisy, empty["tokens"], empty["pooled"], level, image, words).sample
        drawn = student(noisy, told["tokens"], told["pooled"], level, image, words, guidance).sample
        return {"loss": F.mse_loss(drawn.float(), null + guidance[:, None, None] * (own - null))}

    options = {"batch": batch, "drop": drop, "tokens": tokens, "pooled": pooled, "emptied": emptied, "pairs": pairs}
    fit(
        folder, "guided", student, optimisers, losses, accelerator, steps=steps, options=options, seed=seed, every=48,
    )  # fmt: skip


def guided(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A copy that is told a guidance, and heeds none of it yet."""
    copy = FluxTransformer2DModel(**CONFIG | {"guidance_embeds": True})
    copy.load_state_dict(transformer.state_dict(), strict=False)
    last = copy.time_text_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return copy
