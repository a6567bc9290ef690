"""Train the transformer of `canvas-flux`: a real `FluxPipeline` in small.

Prompts enter by two doors, the tokens of T5 and the pooled vector of CLIP. Each is left out at random, so that either
carries the prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from erasure.assets import path as embedded
from erasure.assets.build import flow
from erasure.assets.build.fit import processes, trained
from erasure.assets.build.grounding import object_tokens
from erasure.assets.build.prompts import Prompts, Told, Tower, ids_of
from erasure.assets.scenes import Scene
from erasure.backbones.latents import pack

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


def words(folder: Path, prompts: Prompts) -> flow.Words:
    """Make the function that finds the tokens of T5 which name objects.

    Args:
        folder: Where the step `t5` left its parts.
        prompts: Made of `reader`.
    """
    pieces = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")

    def find(captions: list[str], scenes: Sequence[Scene], parts: Mapping[str, Tensor]) -> Tensor:
        marked = object_tokens(pieces, ids_of(pieces, captions), scenes)
        return marked * prompts.said(parts, "tokens").cpu()[..., None]

    return find


def places(rows: int, columns: int) -> Tensor:
    """Where the tokens of an image stand, `(rows * columns, 3)`: 0, row and column."""
    grid = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns)))
    return F.pad(grid, (1, 0))


def predict(
    transformer: FluxTransformer2DModel,
    noisy: Tensor,
    level: Tensor,
    told: Mapping[str, Tensor],
    guidance: Tensor | None = None,
) -> Tensor:
    """Tell the velocity, packed, `(batch, tokens, channels * 4)`.

    Args:
        transformer: What tells it.
        noisy: `(batch, channels, rows, columns)`.
        level: `(batch,)` in 0-1.
        told: `tokens` and `pooled`.
        guidance: `(batch,)`, for a transformer that guides itself.
    """
    rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
    image = places(rows, columns).to(noisy.device)
    words = torch.zeros(told["tokens"].shape[1], 3, device=noisy.device)
    return transformer(pack(noisy), told["tokens"], told["pooled"], level, image, words, guidance).sample


def train(
    folder: Path,
    steps: int,
    recipe: flow.Recipe = flow.Recipe(),  # noqa: B008
    tokens: float = 0.12,
    pooled: float = 0.6,
    emptied: float = 0.4,
    seed: int = 5,
) -> None:
    """Train for `steps` steps (resuming from `folder`) and save `folder / "transformer"`.

    Args:
        folder: Where the step `t5` left its parts.
        steps: Optimiser steps in all; may be changed when resuming before the learning rate falls.
        recipe: Scenes and captions.
        tokens: How often the tokens are left out.
        pooled: How often the pooled vector is left out; where it seldom is, it carries all and the tokens little.
        emptied: Share of captions whose end token and padding say nothing.
        seed: Seeds everything.
    """
    accelerator = processes(reduced=True)
    torch.manual_seed(seed)
    prompts = Prompts(reader(folder, accelerator.device), {"tokens": tokens, "pooled": pooled}, emptied)
    transformer = FluxTransformer2DModel(**CONFIG)
    flow.initialise(transformer)
    transformer.to(accelerator.device)

    def compare(state: flow.State) -> tuple[Tensor, Tensor]:
        return predict(transformer, state.noisy, state.level, state.told), pack(state.velocity)

    flow.train(
        folder, "transformer", transformer, flow.optimisers(transformer), compare, prompts, words(folder, prompts),
        accelerator, recipe, steps=steps, seed=seed,
    )  # fmt: skip


def distil(
    folder: Path,
    steps: int,
    recipe: flow.Recipe = flow.Recipe(batch=32, drop=0.15),  # noqa: B008
    tokens: float = 0.2,
    pooled: float = 0.1,
    emptied: float = 0.3,
    greatest: float = 4.0,
    seed: int = 6,
) -> None:
    """Teach the trained transformer to guide itself, as FLUX.1 dev does, and save `folder / "guided"`.

    One pass at guidance g then tells what two passes tell with classifier-free guidance (Meng et al. 2023). Resumes
    from `folder`.

    Args:
        folder: Where `train` left `transformer`.
        steps: Optimiser steps in all.
        recipe: Scenes and captions; empty captions are those that guidance must not change.
        tokens: How often the tokens are left out.
        pooled: How often the pooled vector is left out.
        emptied: Share of captions whose end token and padding say nothing.
        greatest: Greatest guidance; it is drawn evenly from 1 on.
        seed: Seeds everything.
    """
    accelerator = processes(reduced=True)
    torch.manual_seed(seed)
    prompts = Prompts(reader(folder, accelerator.device), {"tokens": tokens, "pooled": pooled}, emptied)
    teacher = trained(FluxTransformer2DModel(**CONFIG), folder, "transformer").requires_grad_(False)
    student = guided(teacher).to(accelerator.device)
    teacher.to(accelerator.device)

    def compare(state: flow.State) -> tuple[Tensor, Tensor]:
        guidance = (1 + (greatest - 1) * torch.rand(len(state.noisy))).to(state.noisy.device)
        with torch.no_grad():
            own = predict(teacher, state.noisy, state.level, state.told)
            null = predict(teacher, state.noisy, state.level, state.empty)
        drawn = predict(student, state.noisy, state.level, state.told, guidance)
        return drawn, null + guidance[:, None, None] * (own - null)

    optimisers = flow.optimisers(student, matrices=0.002, others=5e-4)
    flow.train(
        folder, "guided", student, optimisers, compare, prompts, words(folder, prompts), accelerator, recipe,
        steps=steps, seed=seed,
    )  # fmt: skip


def guided(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A copy that is told a guidance, and heeds none of it yet."""
    copy = FluxTransformer2DModel(**CONFIG | {"guidance_embeds": True})
    copy.load_state_dict(transformer.state_dict(), strict=False)
    last = copy.time_text_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return copy
