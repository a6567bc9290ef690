"""Attend-and-Excite against the pipeline of diffusers, and its two variants against their plain arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erasure.backbones import backbone_for, text_towers
from erasure.pipelines import StableDiffusionAStarPipeline
from erasure.pipelines.a_star import CompositionSettings, Guide
from erasure.pipelines.attention_losses import excitation, rivalled, smoothed
from erasure.pipelines.subjects import Words, rival_tokens, subject_weights

PROMPT, SUBJECTS, PLACES = "a cat and a dog", ["cat", "dog"], [2, 5]


@pytest.mark.parametrize(
    "thresholds", [{}, {0: 0.05, 1: 0.5, 2: 0.8}, {1: 0.0135}], ids=["plain", "refined", "reached"]
)
def test_it_draws_what_the_pipeline_of_diffusers_draws(tiny_pipe: Any, thresholds: dict[int, float]) -> None:
    """Stable Diffusion 1.x, five steps of which three are guided."""
    from diffusers import StableDiffusionAttendAndExcitePipeline

    call = {"num_inference_steps": 5, "height": 32, "width": 32, "output_type": "latent", "guidance_scale": 7.5}
    parts = {name: part for name, part in tiny_pipe.components.items() if name != "image_encoder"}
    theirs = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(
        PROMPT, token_indices=PLACES, attn_res=(16, 16), max_iter_to_alter=3, thresholds=thresholds, scale_factor=1000,
        generator=torch.Generator().manual_seed(0), **call,
    ).images  # fmt: skip
    ours = StableDiffusionAStarPipeline.from_pipe(tiny_pipe)
    ours.set_progress_bar_config(disable=True)
    found = ours(
        PROMPT, subjects=SUBJECTS, loss="attend_and_excite", excitation_until=0.6, step_size=1000.0, grid=16,
        refine={step / 5: goal for step, goal in thresholds.items()},
        generator=torch.Generator().manual_seed(0), **call,
    ).images  # fmt: skip
    plain = tiny_pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images
    assert (wanted - plain).abs().max() > 1e-2
    assert (found - wanted).abs().max() < 1e-3 * (wanted - plain).abs().max()


def papers_loss(maps: Tensor, places: list[int], last: int) -> float:
    """The code of the paper: tokens 1 to `last`, times 100, softmax, 3x3 Gaussian `exp(-(x / 2 sigma)^2)`, maximum."""
    shares = (100 * maps[:, :, 1:last]).softmax(-1)
    line = np.exp(-((np.arange(-1, 2) / (2 * 0.5)) ** 2))
    kernel = torch.from_numpy(np.outer(line, line) / np.outer(line, line).sum()).to(maps)
    best = []
    for place in places:
        padded = torch.nn.functional.pad(shares[None, None, :, :, place - 1], (1, 1, 1, 1), mode="reflect")
        best.append(torch.nn.functional.conv2d(padded, kernel[None, None]).max())
    return max(max(0.0, 1 - float(value)) for value in best)


@pytest.mark.parametrize(("pads_with_end", "rivals", "last"), [(True, "padded", -1), (False, "words", 6)])
def test_the_model_decides_over_which_tokens_the_softmax_goes(
    tiny_pipe: Any, pads_with_end: bool, rivals: Any, last: int
) -> None:
    """Tokens 1 to -2 for Stable Diffusion 1.x, up to the end of the prompt for 2.1, whose tokeniser pads with `!`."""
    if not pads_with_end:
        tiny_pipe.tokenizer = copy.deepcopy(tiny_pipe.tokenizer)
        tiny_pipe.tokenizer.pad_token = "!"
    towers = text_towers(tiny_pipe)
    words = subject_weights(towers, [PROMPT], SUBJECTS)
    chosen = rival_tokens(towers, words.inside, None)
    assert torch.equal(chosen, rival_tokens(towers, words.inside, rivals))
    maps = torch.rand(77, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 20
    won = smoothed(rivalled(maps[None], chosen))[:, PLACES]
    found = excitation(won, torch.tensor([[True, True]])).item()
    assert found == pytest.approx(papers_loss(maps.permute(1, 2, 0), PLACES, last), abs=1e-9)
    other = rival_tokens(towers, words.inside, "words" if pads_with_end else "padded")
    assert not torch.equal(chosen, other)


def test_steps_become_shorter_as_in_its_code(tiny_pipe: Any) -> None:
    words = Words(torch.zeros(1, 77, 1), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 77, dtype=torch.bool))
    guide = Guide(backbone_for(tiny_pipe), CompositionSettings(), words, (16, 16), None)
    sizes = []
    for step in range(50):
        guide.at(step, 50)
        sizes.append(guide.size)
    np.testing.assert_allclose(sizes, 20 * np.sqrt(np.linspace(1.0, 0.5, 50)))


def test_its_numbers_are_those_of_its_code() -> None:
    """`config.py` and `run.py` of yuval-alaluf/Attend-and-Excite."""
    settings = CompositionSettings(loss="attend_and_excite")
    assert settings.step_size == 20.0
    assert settings.excitation_until == 25 / 50
    assert dict(settings.refine) == {0 / 50: 0.05, 10 / 50: 0.5, 20 / 50: 0.8}
    assert settings.refinements == 20
    assert settings.grid is None  # a quarter of the latents' side: 16 of 64
