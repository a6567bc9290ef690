"""Guidance by a second branch and by moved latents: which arguments have rows, and what the loop goes on with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.backbones import backbone_for
from erasure.carriers.calls import of_rows, twice
from erasure.carriers.guidance import BranchGuidance, LatentGuidance
from erasure.errors import UnsupportedModelError

TOKENS = 5


@pytest.fixture(scope="module")
def flux(tiny_models: Any) -> Any:
    """A tiny Flux that is not distilled for guidance: read it, never change it."""
    return tiny_models["flux"](guidance_embeds=False)


def call(transformer: Any, rows: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of a Flux transformer for as many rows as the text has tokens, if `rows` says so."""
    config, generator = transformer.config, torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "hidden_states": draw(rows, 16, config.in_channels), "timestep": torch.full((rows,), 0.5),
        "encoder_hidden_states": draw(rows, TOKENS, config.joint_attention_dim),
        "pooled_projections": draw(rows, config.pooled_projection_dim), "txt_ids": torch.zeros(TOKENS, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
    }  # fmt: skip


@pytest.mark.parametrize("rows", [TOKENS, 16, 2])
def test_places_of_tokens_are_no_rows_however_many_there_are(flux: Any, rows: int) -> None:
    """A batch as large as the text is long, or as the image has tokens."""
    transformer, arguments = flux.transformer, call(flux.transformer, rows)
    wanted = transformer(**arguments).sample
    with BranchGuidance(transformer, 3.0, shared_trunk=False):
        # Both branches are equal, since nothing changes the second.
        assert (transformer(**arguments).sample - wanted).abs().max() < 1e-5
        positional = [arguments.pop(name) for name in ("hidden_states", "encoder_hidden_states")]
        assert (transformer(*positional, **arguments).sample - wanted).abs().max() < 1e-5


def test_arguments_with_rows_are_known_by_name() -> None:
    rows, shared = torch.zeros(2, 3), torch.zeros(2, 7)
    arguments = {
        "sample": rows, "timestep": torch.tensor(9), "txt_ids": shared, "return_dict": False,
        "added_cond_kwargs": {"text_embeds": rows, "image_embeds": [rows]},
        "cross_attention_kwargs": {"scale": 1.0, "ip_adapter_masks": [shared]},
        "down_block_additional_residuals": (rows, torch.zeros(4, 3)),
    }  # fmt: skip
    changed = of_rows(arguments, 2, twice)
    shapes = lambda name: changed[name].shape  # noqa: E731
    assert shapes("sample") == (4, 3)
    assert changed["txt_ids"] is shared
    assert changed["added_cond_kwargs"]["text_embeds"].shape == (4, 3)
    assert changed["added_cond_kwargs"]["image_embeds"][0].shape == (4, 3)
    assert changed["cross_attention_kwargs"]["ip_adapter_masks"][0] is shared
    assert [part.shape[0] for part in changed["down_block_additional_residuals"]] == [4, 4]
    assert changed["timestep"].ndim == 0
    with pytest.raises(UnsupportedModelError, match="the denoiser is given brand_new="):
        of_rows({"brand_new": rows}, 2, twice)
    assert of_rows({"brand_new": torch.zeros(3)}, 2, twice)["brand_new"].shape == (3,)


@pytest.mark.parametrize("guided", [False, True])
def test_latents_of_a_transformers_loop_are_moved_once_a_step(flux: Any, guided: bool) -> None:
    """With a negative prompt the loop calls the transformer twice a step."""
    pipe = copy.copy(flux)
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 32, "output_type": "latent"}
    options |= {"true_cfg_scale": 2.0, "negative_prompt": "a dog"} if guided else {}
    start = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    at: list[float] = []
    seen: list[Tensor] = []

    def halve(latents: Tensor, t: Tensor, forward: Any) -> Tensor:
        at.append(float(t[0]))
        seen.append(forward(latents)[0])
        return latents / 2

    guidance = LatentGuidance(backbone_for(pipe), halve)

    def follow(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        guidance.follow(tensors["latents"])
        return tensors

    with guidance:
        given = start.clone()
        guidance.follow(given)
        found = pipe("a cat", latents=given, callback_on_step_end=follow, **options).images
    assert len(at) == 2
    assert at[0] == pytest.approx(1.0)

    def halved(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] / 2} if index == 0 else tensors

    wanted = pipe("a cat", latents=start / 2, callback_on_step_end=halved, **options).images
    assert (found - wanted).abs().max() < 1e-5
    backbone = backbone_for(pipe, length=32)
    told, level = backbone.encode(["a cat"]), torch.tensor(1000.0)
    own = backbone.predict(backbone.latents.unpacked(start, 32, 32), level, told)
    assert (backbone.latents.packed(own) - seen[0]).abs().max() < 1e-5
