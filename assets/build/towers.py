"""Text towers of `canvas-sdxl` and `canvas-sd3`: canvas-sd's, read one block before its end, and a second CLIP."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erasure.assets import path as embedded
from erasure.assets.build.clip import contrastive
from erasure.assets.build.loop import batches, cosine, log
from erasure.assets.build.tokenizer import CONTEXT
from erasure.assets.scenes import Scene, caption
from erasure.training.checkpoint import Checkpoint

SECOND = 96
"""Width of the second CLIP."""


def first_tower() -> CLIPTextModel:
    """The text tower of `canvas-sd` with one more block, which passes on what it gets.

    So the states before the last block are those of canvas-sd's last block, and the pooled vector is canvas-sd's.
    """
    clip = CLIPTextModel.from_pretrained(embedded("canvas-sd") / "text_encoder")
    last = clip.config.num_hidden_layers
    config = CLIPTextConfig.from_dict({**clip.config.to_dict(), "num_hidden_layers": last + 1})
    longer = CLIPTextModel(config)
    longer.load_state_dict(clip.state_dict(), strict=False)
    ends = re.compile(rf"layers\.{last}\.(self_attn\.out_proj|mlp\.fc2)\.")
    with torch.no_grad():
        for name, parameter in longer.named_parameters():
            if ends.search(name):
                parameter.zero_()
    return longer.eval().requires_grad_(False)


def with_projection(clip: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same tower in the class of Stable Diffusion 3's: its `text_embeds` are the pooled vector itself."""
    config = CLIPTextConfig.from_dict({**clip.config.to_dict(), "projection_dim": clip.config.hidden_size})
    tower = CLIPTextModelWithProjection(config)
    prefix = "" if next(iter(clip.state_dict())).startswith("text_model.") else "text_model."
    states = {f"{prefix}{name}": tensor for name, tensor in clip.state_dict().items()}
    tower.load_state_dict({**states, "text_projection.weight": torch.eye(clip.config.hidden_size)})
    return tower.eval().requires_grad_(False)


def tokenizer() -> CLIPTokenizer:
    """The tokeniser of `canvas-sd`, which both CLIPs use."""
    return CLIPTokenizer.from_pretrained(embedded("canvas-sd") / "tokenizer")


def second_config() -> CLIPTextConfig:
    """A CLIP of another width and depth than canvas-sd's, which ends in the same space of pictures and words."""
    own = CLIPTextConfig.from_pretrained(embedded("canvas-sd") / "text_encoder").to_dict()
    changed = {"hidden_size": SECOND, "intermediate_size": 4 * SECOND, "num_attention_heads": 3,
               "num_hidden_layers": 5}  # fmt: skip
    return CLIPTextConfig.from_dict({**own, **changed})


@torch.no_grad()
def features(scenes: int, seed: int) -> tuple[list[Scene], Tensor]:
    """Scenes, and what canvas-clip's image tower makes of them, `(scenes, 128)` of length 1."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{embedded('canvas-clip')}")
    model.eval().float()
    drawn: list[Scene] = []
    found = []
    stream = batches(50, seed)
    while len(drawn) < scenes:
        more, pixels, _ = next(stream)
        drawn += more
        found.append(model.encode_image(pixels, normalize=True))
    return drawn, torch.cat(found)


def train(
    folder: Path, steps: int, batch: int = 96, bank: int = 4000, peak: float = 1e-3, scale: float = 20.0, seed: int = 7
) -> None:
    """Train the second CLIP against canvas-clip's image tower, which stays as it is (Zhai et al. 2022).

    Resumes from `folder`, and saves `folder / "clip-2"`.

    Args:
        folder: Where the parts are kept.
        steps: Optimiser steps in all.
        batch: Scenes and captions per step.
        bank: Scenes whose image features are kept.
        peak: Greatest learning rate of AdamW.
        scale: Inverse temperature of the softmax.
        seed: Seeds everything.
    """
    torch.manual_seed(seed)
    model = CLIPTextModelWithProjection(second_config())
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    state = Checkpoint(folder / "clip-2.ckpt", model=model, optimiser=optimiser)
    start = state.resume()
    scenes, images = features(bank, seed + 10_000)
    pieces, rng = tokenizer(), np.random.default_rng([seed, start])
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, steps, peak)
        rows = rng.choice(bank, size=batch, replace=False)
        texts = [caption(scenes[row], rng) for row in rows]
        ids = pieces(texts, padding="longest", truncation=True, max_length=CONTEXT, return_tensors="pt").input_ids
        words = F.normalize(model(ids).text_embeds, dim=-1)
        loss, accuracy = contrastive(scale * words @ images[rows].T, texts)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log(folder / "clip-2.jsonl", step=step + 1, loss=loss.item(), accuracy=accuracy)
            state.save(step + 1)
    model.save_pretrained(folder / "clip-2")
