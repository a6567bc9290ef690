"""Train the transformer of `canvas-sd3`: a real `StableDiffusion3Pipeline` in small.

Prompts enter by the states of two CLIPs and of T5, and by a pooled vector. Each is left out at random, T5 as zeros, so
that the pipeline also works without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, T5EncoderModel, T5TokenizerFast

from erasure.assets.build import flow, towers
from erasure.assets.build.fit import processes
from erasure.assets.build.grounding import object_tokens
from erasure.assets.build.prompts import Prompts, Told, Tower, ids_of
from erasure.assets.scenes import Scene

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 256,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
}
SCHEDULER: dict[str, Any] = {"shift": flow.SHIFT}


def reader(folder: Path, device: torch.device) -> Callable[[list[str]], Told]:
    """What encodes captions: states as `tokens_1` to `tokens_3`, and both CLIPs' vectors side by side as `pooled`.

    Args:
        folder: Where the steps `t5` and `towers` left their parts.
        device: Where the towers run.
    """
    pieces = towers.tokenizer()
    one = Tower(towers.with_projection(towers.first_tower()).to(device), pieces)
    two = Tower(CLIPTextModelWithProjection.from_pretrained(folder / "clip-2").to(device), pieces)
    three = Tower(
        T5EncoderModel.from_pretrained(folder / "t5").to(device),
        T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )

    def encode(captions: list[str]) -> Told:
        first, second, third = one(captions), two(captions), three(captions)
        assert first.pooled is not None and second.pooled is not None  # noqa: PT018
        return Told(
            {
                "tokens_1": first.states, "tokens_2": second.states, "tokens_3": third.states,
                "pooled": torch.cat([first.pooled, second.pooled], -1),
            },
            {"tokens_1": first.after, "tokens_2": second.after, "tokens_3": third.after},
        )  # fmt: skip

    return encode


def words(folder: Path, prompts: Prompts) -> flow.Words:
    """Make the function that finds the tokens which name objects: those of the CLIPs, and T5's behind them.

    Args:
        folder: Where the step `t5` left its parts.
        prompts: Made of `reader`.
    """
    pieces, third = towers.tokenizer(), T5TokenizerFast.from_pretrained(folder / "tokenizer_2")

    def find(captions: list[str], scenes: Sequence[Scene], parts: Mapping[str, Tensor]) -> Tensor:
        of_clips = prompts.said(parts, "tokens_1") | prompts.said(parts, "tokens_2")
        of_t5 = prompts.said(parts, "tokens_3")
        return torch.cat(
            [
                object_tokens(pieces, ids_of(pieces, captions), scenes) * of_clips.cpu()[..., None],
                object_tokens(third, ids_of(third, captions), scenes) * of_t5.cpu()[..., None],
            ],
            1,
        )

    return find


def compose(parts: Mapping[str, Tensor]) -> Tensor:
    """Tokens as the pipeline puts them together, `(captions, tokens of CLIP + tokens of T5, 256)`."""
    clips = torch.cat([parts["tokens_1"], parts["tokens_2"]], -1)
    wide = F.pad(clips, (0, parts["tokens_3"].shape[-1] - clips.shape[-1]))
    return torch.cat([wide, parts["tokens_3"]], 1)


def train(
    folder: Path,
    steps: int,
    recipe: flow.Recipe = flow.Recipe(),  # noqa: B008
    tokens: float = 0.3,
    pooled: float = 0.6,
    emptied: float = 0.4,
    seed: int = 9,
) -> None:
    """Train for `steps` steps (resuming from `folder`) and save `folder / "transformer-3"`.

    Args:
        folder: Where the steps `t5` and `towers` left their parts.
        steps: Optimiser steps in all; may be changed when resuming before the learning rate falls.
        recipe: Scenes and captions.
        tokens: How often the tokens of each text encoder are left out.
        pooled: How often the pooled vector is left out; where it seldom is, it carries all and the tokens little.
        emptied: Share of captions whose end tokens and padding say nothing.
        seed: Seeds everything.
    """
    accelerator = processes(reduced=True)
    torch.manual_seed(seed)
    encode = reader(folder, accelerator.device)
    parts = encode([""]).parts
    absent = {"tokens_3": torch.zeros_like(parts["tokens_3"])}
    shares = dict.fromkeys(parts, tokens) | {"pooled": pooled}
    prompts = Prompts(encode, shares, emptied, absent=absent)
    transformer = SD3Transformer2DModel(**CONFIG)
    flow.initialise(transformer)
    transformer.to(accelerator.device)

    def compare(state: flow.State) -> tuple[Tensor, Tensor]:
        told = state.told
        return transformer(state.noisy, compose(told), told["pooled"], 1000 * state.level).sample, state.velocity

    flow.train(
        folder, "transformer-3", transformer, flow.optimisers(transformer), compare, prompts,
        words(folder, prompts), accelerator, recipe, steps=steps, seed=seed,
    )  # fmt: skip
