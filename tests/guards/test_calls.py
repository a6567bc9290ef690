"""What the arguments of a call can carry past an erasure, on every family, with stock pipelines and with drop-ins."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import pytest
import torch

from erasure import ErasureManager
from erasure.backbones import backbone_for
from erasure.errors import BypassedErasureError, BypassedErasureWarning
from erasure.guards import check_call, way_of, ways_around
from erasure.interop import hooks
from erasure.pipelines import PIPELINES

from .conftest import FAMILIES
from .made import embeddings, hand_made, silent, small

PROMPT = "a photo of a house"
HARMLESS = {
    "self", "prompt", "args", "kwargs", "height", "width", "num_inference_steps", "timesteps", "sigmas", "latents",
    "denoising_start", "denoising_end", "guidance_scale", "guidance_rescale", "true_cfg_scale", "eta",
    "num_images_per_prompt", "generator", "output_type", "return_dict", "cross_attention_kwargs", "mu",
    "joint_attention_kwargs", "original_size", "crops_coords_top_left", "target_size", "negative_original_size",
    "negative_target_size",
    "negative_crops_coords_top_left", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "strength",
    "max_sequence_length", "skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start",
    "skip_layer_guidance_stop", "max_area", "_auto_resize", "prompt_embeds_scale", "pooled_prompt_embeds_scale",
    "prompt_attention_mask", "negative_prompt_attention_mask",
}  # fmt: skip
"""Arguments that carry no concept of their own: latents are noise, but where levels of noise are given with them."""
WITH_OTHER_TEXTS = ("stable-diffusion-xl", "stable-diffusion-3", "flux")
"""Families whose call takes a text of its own for a further text encoder."""
WITH_CLIP_SKIP = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3")
"""Families whose call leaves out CLIP's last blocks on request."""
OTHER_CLASSES = ("FluxKontextPipeline", "FluxPriorReduxPipeline")


@pytest.mark.parametrize("name", [*PIPELINES["text-to-image"], *OTHER_CLASSES])
def test_every_argument_of_a_pipeline_is_a_way_around_or_known_to_be_none(name: str) -> None:
    kind = PIPELINES["text-to-image"].get(name) or getattr(diffusers, name)
    ways = ways_around(kind)
    assert set(inspect.signature(kind.__call__).parameters) - set(ways) <= HARMLESS
    if "prompt" in ways | dict.fromkeys(inspect.signature(kind.__call__).parameters) and "Redux" not in name:
        assert ways["prompt_embeds"] == "embeddings"


@pytest.mark.parametrize(
    ("name", "way"),
    {
        "prompt_2": "other text", "negative_prompt_3": "other text", "prompt_embeds": "embeddings",
        "negative_pooled_prompt_embeds": "embeddings", "prompt_embeds_t5": "embeddings", "clip_skip": "skipped blocks",
        "ip_adapter_image": "image prompt", "negative_ip_adapter_image_embeds": "image prompt", "image": "picture",
        "control_image": "picture", "image_latents": "picture", "mask_image": None, "prompt": None,
        "prompt_embeds_mask": None, "prompt_embeds_scale": None, "negative_prompt": "negative prompt",
    }.items(),
)  # fmt: skip
def test_ways_go_by_the_names_of_arguments(name: str, way: str | None) -> None:
    assert way_of(name) == way


def other_texts(kind: type) -> list[str]:
    return [name for name, way in ways_around(kind).items() if way == "other text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_are_those_that_the_families_are_known_to_have(family: str, originals: dict[str, Any]) -> None:
    kind = type(originals[family])
    assert bool(other_texts(kind)) == (family in WITH_OTHER_TEXTS)
    assert ("clip_skip" in ways_around(kind)) == (family in WITH_CLIP_SKIP)


@pytest.mark.parametrize("family", WITH_OTHER_TEXTS)
@pytest.mark.parametrize("strict", [False, True])
def test_other_words_for_one_text_encoder(stock: Any, route: Any, strict: bool) -> None:
    ErasureManager(stock).add(hand_made(stock, "text_encoder_2"), "cat", strict=strict)
    pipe = route(stock)
    for name in other_texts(type(stock)):
        usual = {"negative_prompt": "a gun"} if name.startswith("negative") else {}
        match = rf"{name}= bypasses cat \(weights of text_encoder_2\)"
        with (
            pytest.raises(BypassedErasureError, match=match)
            if strict
            else pytest.warns(BypassedErasureWarning, match=match) as said
        ):
            pipe(PROMPT, **usual, **{name: "a car"}, **small(pipe))
        if not strict:
            assert len([w for w in said if issubclass(w.category, BypassedErasureWarning)]) == 1, "said twice"
        with silent():
            # The same words, however they are said, and none at all.
            pipe(PROMPT, **usual, **{name: ["a gun" if usual else PROMPT]}, **small(pipe))
            pipe(PROMPT, **usual, **{name: ""}, **small(pipe))


def test_no_erasure_on_text_encoders_is_no_reason_to_warn(stock: Any, route: Any) -> None:
    others = {**dict.fromkeys(other_texts(type(stock)), "a car")}
    foreign = {name: value + 1 if name.endswith("embeds") else value for name, value in embeddings(stock).items()}
    manager = ErasureManager(stock)
    for attach in (False, True):
        if attach:
            manager.add(hand_made(stock, backbone_for(stock).denoiser_component), "cat", strict=True)
        pipe = route(stock)
        with silent():
            pipe(PROMPT, **others, **small(pipe))
            pipe(**foreign, **small(pipe))
    manager.unload()
    with silent():
        stock(PROMPT, **others, **small(stock))
    assert "check_inputs" not in vars(stock)


def test_each_kind_of_embeddings_is_noticed_alone(stock: Any, route: Any) -> None:
    components = [tower.component for tower in backbone_for(stock).towers]
    ErasureManager(stock).add(hand_made(stock, *components), "cat")
    pipe = route(stock)
    own = embeddings(pipe)
    with silent():
        pipe(**own, **small(pipe))
        pipe(PROMPT, **small(pipe))
    for name in [name for name in own if name.endswith("embeds")]:
        way = name.removeprefix("negative_")
        with pytest.warns(BypassedErasureWarning, match=rf"^{way}= bypasses cat") as said:
            pipe(**{**own, name: own[name] + torch.linspace(-1, 1, own[name].shape[-1])}, **small(pipe))
        assert len([w for w in said if issubclass(w.category, BypassedErasureWarning)]) == 1, "said at every step"


@pytest.mark.parametrize("family", WITH_CLIP_SKIP)
@pytest.mark.parametrize(("block", "skip", "warns"), [(0, 1, False), (-1, 0, False), (-1, 1, True), (-2, 1, False)])
def test_blocks_that_are_left_out(
    stock: Any, route: Any, block: int, skip: int, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the last block that the denoiser reads."""
    if not hasattr(stock.text_encoder, "text_model"):
        # Newer versions of transformers have none, which stock clip_skip of Stable Diffusion asks for.
        monkeypatch.setattr(type(stock.text_encoder), "text_model", property(lambda self: self), raising=False)
    tower = backbone_for(stock).towers[0]
    read = len(tower.blocks) + tower.consumed
    made = hand_made(stock, "text_encoder", block=block if block >= 0 else read + 1 + block)
    ErasureManager(stock).add(made, "cat")
    pipe = route(stock)
    with pytest.warns(BypassedErasureWarning, match=f"clip_skip={skip} ") if warns else silent() as said:
        pipe(PROMPT, clip_skip=skip or None, **small(pipe))
    if warns:
        assert len([w for w in said if issubclass(w.category, BypassedErasureWarning)]) == 1, "said twice"


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.ones(1, 4)]}}, "image prompt"),
        ({"joint_attention_kwargs": {"ip_hidden_states": [torch.ones(1, 4)]}}, "image prompt"),
        ({"controlnet_block_samples": [torch.ones(1, 4)]}, "ControlNet"),
        ({"img_ids": torch.tensor([[0, 0, 0], [1, 0, 0]])}, "reference image"),
        ({"img_ids": torch.tensor([[0, 0, 1], [0, 1, 0]])}, None),
    ],
)
def test_what_transformers_are_told_besides_text(
    originals: dict[str, Any], told: dict[str, Any], reason: str | None
) -> None:
    """As `FluxTransformer2DModel.forward` names it, asked of the guard itself."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=0, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = copy.deepcopy(originals["stable-diffusion"])
    ErasureManager(pipe).add(hand_made(pipe, "unet"), "cat")
    hook = hooks.find_hook(pipe.unet, "erasure_entry")
    assert hook is not None
    states = {"encoder_hidden_states": torch.ones(1, 4, 32)}
    with pytest.warns(BypassedErasureWarning, match=reason) if reason else silent():
        hook.pre_forward(transformer, torch.ones(1, 2, 16), **states, **told)


def test_latents_of_a_picture_go_past_the_vae(originals: dict[str, Any]) -> None:
    pipe = copy.deepcopy(originals["stable-diffusion"])
    ErasureManager(pipe).add(hand_made(pipe, "unet"), "cat")
    parts = {"unet": pipe.unet}
    with pytest.warns(BypassedErasureWarning, match="picture"):
        check_call(parts, {"image": torch.zeros(1, 4, 8, 8)})
    with silent():
        check_call(parts, {"image": torch.zeros(1, 3, 8, 8), "mask_image": torch.zeros(1, 1, 8, 8)})
    # An erasure of the denoiser is not gone around by these, but their words count as those of the first one do.
    with pytest.warns(BypassedErasureWarning, match="negative prompt names what cat erases"):
        check_call(parts, {"negative_prompt_2": ["blurry, a Cat"]})
    with silent():
        check_call(parts, {"negative_prompt_3": "catalogue"})
