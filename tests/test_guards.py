"""Ways around erasures are noticed on the networks, whatever pipeline draws with them."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.carriers.activations import NO_BLOCKS
from erasure.errors import AttachError, BypassedErasureError, BypassedErasureWarning, NoMatchingModuleError
from erasure.pipelines import StableDiffusionErasurePipeline, StableDiffusionXLErasurePipeline

PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def hirm(tiny_pipe_original: Any) -> Erasure:
    return make(tiny_pipe_original, "hirm", steps=3, contexts=2, retain_vocabulary=2)


@pytest.fixture(scope="module")
def uce(tiny_pipe_original: Any) -> Erasure:
    return make(tiny_pipe_original, "uce", vocabulary=8, saved_as="lora", tolerance=0.0)


@pytest.fixture(scope="module")
def pinned(tiny_pipe_original: Any) -> Erasure:
    return make(tiny_pipe_original, "hirm", steps=2, contexts=0, retain_vocabulary=2, unconditional="stock")


@pytest.fixture(scope="module")
def pinned_once(pinned: Erasure) -> Erasure:
    """As files of before have it: the last state of pinned prompts, and those of no block."""
    pins = {key: pin._replace(blocks=NO_BLOCKS) for key, pin in pinned.edits.pinned.items()}
    return Erasure(pinned.config, dataclasses.replace(pinned.edits, pinned=pins))


def itd_at(pipe: Any, layer: int) -> Erasure:
    options: dict[str, Any] = {"d_sae": 64, "steps": 2, "contexts": 4, "vocabulary": 8, "target_rate": 0.1}
    return make(pipe, "itd", layer=layer, retain_rate=1.0, false_positive_rate=1.0, **options)


@pytest.fixture(scope="module")
def features(tiny_pipe_original: Any) -> Erasure:
    return itd_at(tiny_pipe_original, len(tiny_pipe_original.text_encoder.encoder.layers) - 1)


@pytest.fixture(scope="module")
def early_features(tiny_pipe_original: Any) -> Erasure:
    return itd_at(tiny_pipe_original, 0)


@pytest.fixture(scope="module")
def every_block(tiny_pipe_original: Any) -> Erasure:
    options: dict[str, Any] = {"steps": 1, "batch": 1, "retain_batch": 1, "rollout_steps": 2, "attack_steps": 1}
    return make(tiny_pipe_original, "advunlearn", contexts=0, retain_vocabulary=2, **options)


def make(pipe: Any, strategy: str, **options: Any) -> Erasure:
    concept = Concept("cat", anchor="dog")
    return erasure.erase(pipe, concept, strategy, attach=False, progress=False, **options)


def parts(pipe: Any) -> dict[str, Any]:
    return {**pipe.components, "safety_checker": None, "feature_extractor": None}


def quietly(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


ROUTES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda pipe: pipe,
    "drop-in": StableDiffusionErasurePipeline.from_pipe,
    "from_pipe": StableDiffusionPipeline.from_pipe,
    "auto": AutoPipelineForText2Image.from_pipe,
    "components": lambda pipe: StableDiffusionPipeline(**parts(pipe), requires_safety_checker=False),
    "shallow copy": copy.copy,
    "deep copy": copy.deepcopy,
}


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return lambda pipe: quietly(ROUTES[request.param](pipe))


SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}


def embeddings(pipe: Any) -> dict[str, torch.Tensor]:
    own, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt="a dog")
    return {"prompt_embeds": own, "negative_prompt_embeds": negative}


def test_foreign_embeddings_are_noticed_on_every_route(tiny_pipe: Any, hirm: Erasure, route: Any) -> None:
    stock = embeddings(tiny_pipe)
    ErasureManager(tiny_pipe).add(hirm, "cat")
    pipe = route(tiny_pipe)
    with pytest.warns(BypassedErasureWarning, match="prompt_embeds= bypasses cat"):
        pipe(**stock, **SMALL)
    # One of the two is enough.
    mixed = {**embeddings(pipe), "negative_prompt_embeds": stock["negative_prompt_embeds"]}
    with pytest.warns(BypassedErasureWarning, match="prompt_embeds= bypasses cat"):
        pipe(**mixed, **SMALL)


def test_embeddings_of_the_pipeline_itself_are_no_bypass(tiny_pipe: Any, hirm: Erasure, route: Any) -> None:
    ErasureManager(tiny_pipe).add(hirm, "cat", strict=True)
    pipe = route(tiny_pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BypassedErasureWarning)
        own = embeddings(pipe)
        pipe(**own, **SMALL)
        pipe(**{key: value.half().float() for key, value in own.items()}, **SMALL)
        pipe(PROMPT, negative_prompt="a house", **SMALL)
        pipe([PROMPT, "a dog"], num_images_per_prompt=2, **SMALL)


@pytest.mark.parametrize("trimmed", [False, True], ids=["whole chunks", "starts and ends left out"])
def test_a_long_prompt_in_chunks_is_no_bypass(tiny_pipe: Any, hirm: Erasure, trimmed: bool) -> None:
    """As compel and the long prompt weighting pipeline put the encodings of chunks behind one another."""

    def chunked(*texts: str) -> torch.Tensor:
        rows = [tiny_pipe.encode_prompt(text, "cpu", 1, False)[0] for text in texts]
        if trimmed:
            rows = [rows[0][:, :-1], *(row[:, 1:-1] for row in rows[1:-1]), rows[-1][:, 1:]]
        return torch.cat(rows, 1)

    ErasureManager(tiny_pipe).add(hirm, "cat", strict=True)
    long, negative = chunked(PROMPT, "a car on a background", "a house"), chunked("", "", "")
    tiny_pipe(prompt_embeds=long, negative_prompt_embeds=negative, **SMALL)
    tiny_pipe(prompt_embeds=long.half().float(), negative_prompt_embeds=negative, **SMALL)
    ErasureManager(tiny_pipe).disable()
    stock = chunked(PROMPT, "a car on a background", "a house")
    ErasureManager(tiny_pipe).enable()
    mixed = torch.cat([stock[:, :77], chunked("a car", "a house")], 1)
    with pytest.raises(BypassedErasureError, match="prompt_embeds= bypasses cat"):
        tiny_pipe(prompt_embeds=mixed, negative_prompt_embeds=mixed, **SMALL)


def test_embeddings_from_before_a_switch_are_a_bypass_after_it(tiny_pipe: Any, hirm: Erasure) -> None:
    manager = ErasureManager(tiny_pipe)
    manager.add(hirm, "cat", strict=True)
    manager.disable()
    stock = embeddings(tiny_pipe)
    tiny_pipe(**stock, **SMALL)
    manager.enable()
    with pytest.raises(BypassedErasureError):
        tiny_pipe(**stock, **SMALL)


def test_an_erasure_of_the_denoiser_alone_is_not_bypassed_by_embeddings(tiny_pipe: Any, uce: Erasure) -> None:
    stock = embeddings(tiny_pipe)
    ErasureManager(tiny_pipe).add(uce, "cat", strict=True)
    tiny_pipe(**stock, **SMALL)


def test_after_unloading_nothing_is_left_on_the_networks(tiny_pipe: Any, hirm: Erasure, uce: Erasure) -> None:
    manager = ErasureManager(tiny_pipe)
    before = {name: set(vars(part)) for name, part in tiny_pipe.components.items() if hasattr(part, "parameters")}
    manager.add(hirm, "a")
    manager.add(uce, "b")
    manager.unload()
    kept = {"_diffusers_hook", "forward"}
    for name, attributes in before.items():
        part = tiny_pipe.components[name]
        assert set(vars(part)) - attributes <= kept
        registries = [m._diffusers_hook for m in part.modules() if hasattr(m, "_diffusers_hook")]
        assert not any(registry.hooks for registry in registries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_pipe(prompt_embeds=torch.ones(1, 77, 32), negative_prompt_embeds=torch.ones(1, 77, 32), **SMALL)


@pytest.mark.parametrize("kind", ["hirm", "uce"])
@pytest.mark.parametrize("made", ["components", "auto"])
def test_pictures_that_are_handed_in(tiny_pipe: Any, kind: str, made: str, request: Any) -> None:
    ErasureManager(tiny_pipe).add(request.getfixturevalue(kind), "cat")
    if made == "auto":
        pipe = AutoPipelineForImage2Image.from_pipe(tiny_pipe)
    else:
        pipe = StableDiffusionImg2ImgPipeline(**parts(tiny_pipe), requires_safety_checker=False)
    image = torch.rand(1, 3, 32, 32)
    with pytest.warns(BypassedErasureWarning, match="picture"):
        quietly(pipe)("a dog", image=image, num_inference_steps=2, strength=0.5, output_type="pt")


def drop_in(pipe: Any) -> Any:
    return quietly(StableDiffusionErasurePipeline.from_pipe(pipe))


CALLS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "latents and timesteps": ("hirm", {"latents": torch.zeros(1, 4, 16, 16), "timesteps": [501, 1]}, "picture"),
    "latents alone": ("hirm", {"latents": torch.zeros(1, 4, 16, 16)}, None),
    "negative concept": ("hirm", {"negative_prompt": "blurry, Cat, ugly"}, "negative prompt"),
    "negative anchor": ("uce", {"negative_prompt": "a dog"}, "negative prompt"),
    "negative of others": ("uce", {"negative_prompt": "catalogue, dogma"}, None),
    "clip_skip": ("uce", {"clip_skip": 1}, "clip_skip"),
    "clip_skip beside pinned prompts": ("pinned", {"clip_skip": 1}, None),
    "clip_skip beside pins of the last state alone": ("pinned_once", {"clip_skip": 1}, "clip_skip=1"),
    "clip_skip of the block whose features are edited": ("features", {"clip_skip": 1}, "nothing"),
    "clip_skip after the block whose features are edited": ("early_features", {"clip_skip": 1}, None),
    "clip_skip of a block that is trained": ("every_block", {"clip_skip": 1}, "clip_skip"),
    "clip_skip of a text-side erasure": ("hirm", {"clip_skip": 1}, None),
}


def test_calls_do_not_read_the_concepts_again(tiny_pipe: Any, hirm: Erasure, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = drop_in(tiny_pipe)
    pipe.load_erasure(hirm, name="cat")
    with pytest.warns(BypassedErasureWarning, match="negative prompt"):
        pipe(PROMPT, negative_prompt="a cat", **SMALL)
    read = []
    monkeypatch.setattr(Concept, "from_dict", classmethod(lambda cls, data: read.append(data)))
    with pytest.warns(BypassedErasureWarning, match="negative prompt"):
        pipe(PROMPT, negative_prompt="a cat", **SMALL)
    pipe(PROMPT, **SMALL)
    assert not read


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("strict", [False, True])
def test_arguments_that_go_around(
    tiny_pipe: Any, call: str, strict: bool, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, given, reason = CALLS[call]
    if "clip_skip" in given:
        # Newer versions of transformers have no `text_model`, which stock clip_skip asks for.
        monkeypatch.setattr(type(tiny_pipe.text_encoder), "text_model", property(lambda self: self), raising=False)
    if "timesteps" in given:
        from diffusers import LCMScheduler

        tiny_pipe.scheduler = LCMScheduler.from_config(tiny_pipe.scheduler.config)
    pipe = drop_in(tiny_pipe)
    pipe.load_erasure(request.getfixturevalue(kind), name="cat", strict=strict)
    settings = {
        key: value for key, value in SMALL.items() if not (key == "num_inference_steps" and "timesteps" in given)
    }
    if reason is None:
        expected: Any = nullcontext()
    elif strict:
        expected = pytest.raises(BypassedErasureError, match=reason)
    else:
        expected = pytest.warns(BypassedErasureWarning, match=reason)
    with warnings.catch_warnings():
        if reason is None:
            warnings.simplefilter("error", BypassedErasureWarning)
        with expected:
            pipe("a photo of a house", **given, **settings)


def test_image_prompts(tiny_pipe: Any, uce: Erasure, load_tiny_ip_adapter: Any, draw: Any) -> None:
    load_tiny_ip_adapter(tiny_pipe)
    ErasureManager(tiny_pipe).add(uce, "cat")
    with pytest.warns(BypassedErasureWarning, match="image prompt") as said:
        draw(tiny_pipe, ip_adapter_image_embeds=[torch.ones(2, 1, 16)], guidance_scale=2.0)
    assert len([w for w in said if "image prompt" in str(w.message)]) == 1, "said at every step"


@pytest.fixture
def controlled(tiny_pipe: Any) -> Any:
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(tiny_pipe.unet, conditioning_channels=3)
    # The picture of a tiny autoencoder is twice as large as its latents, not eight times.
    controlnet.controlnet_cond_embedding = torch.nn.Conv2d(3, 32, 3, stride=2, padding=1)
    for layer in controlnet.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.1)
    pipe = StableDiffusionControlNetPipeline(**parts(tiny_pipe), controlnet=controlnet, requires_safety_checker=False)
    return quietly(pipe)


def drawn(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, image=torch.rand(1, 3, 32, 32), generator=generator, **SMALL).images


def test_controlnets_are_named_and_edited_where_asked(controlled: Any, uce: Erasure, tensors_of: Any) -> None:
    manager = ErasureManager(controlled)
    base = tensors_of(controlled)
    with pytest.warns(BypassedErasureWarning, match="ControlNet has cross-attention of its own"):
        manager.add(uce, "cat")
    with pytest.warns(BypassedErasureWarning, match="ControlNet"):
        drawn(controlled)
    manager.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", BypassedErasureWarning)
        manager.add(uce, "cat", controlnet=True)
    assert manager.list_erasures() == {"unet": ["cat"], "controlnet": ["cat"]}
    assert manager.verify() > len(uce.edits)
    key = next(key for key in uce.low_rank if "down_blocks" in key or "mid_block" in key)
    path, edit = key.split("/")[1], uce.low_rank[key]
    found = controlled.controlnet.get_submodule(path).weight
    torch.testing.assert_close(found, base[f"unet/{path}.weight"] + edit.up @ edit.down)
    with torch.no_grad():
        found.view(-1)[0] += 1
    with pytest.raises(erasure.errors.VerificationError, match="controlnet/"):
        manager.verify()
    with torch.no_grad():
        found.view(-1)[0] -= 1
    manager.unload()
    assert all(torch.equal(value, base[key]) for key, value in tensors_of(controlled).items())


def test_controlnet_true_without_one_is_an_error(tiny_pipe: Any, uce: Erasure, hirm: Erasure, controlled: Any) -> None:
    for pipe, made in ((tiny_pipe, uce), (controlled, hirm)):
        with pytest.raises(NoMatchingModuleError, match="controlnet=True"):
            ErasureManager(pipe).add(made, "cat", controlnet=True)
        assert ErasureManager(pipe).erasures == {}


def users_lora(pipe: Any, component: str) -> dict[str, torch.Tensor]:
    path = {
        "unet": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "text_encoder": "encoder.layers.0.self_attn.q_proj",
    }
    layer = pipe.components[component].get_submodule(path[component])
    prefix = "text_model." if component == "text_encoder" else ""
    stem = f"{component}.{prefix}{path[component]}"
    return {
        f"{stem}.lora_A.weight": torch.full((1, layer.in_features), 0.1),
        f"{stem}.lora_B.weight": torch.full((layer.out_features, 1), 0.1),
    }


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", ["pipeline", "component", "sibling", "erased", "erased beside"])
def test_nothing_is_saved_with_a_users_lora_in_it(
    tiny_pipe: Any, uce: Erasure, component: str, fused: bool, way: str, tmp_path: Any
) -> None:
    """It would be written under PEFT's names, which reload as newly initialised layers."""
    pipe = drop_in(tiny_pipe)
    pipe.load_erasure(uce, name="cat")
    pipe.load_lora_weights(users_lora(pipe, component), adapter_name="mine")
    if fused:
        pipe.fuse_lora()
    folder = tmp_path / "out"
    save = {
        "pipeline": lambda: pipe.save_pretrained(folder),
        "component": lambda: pipe.components[component].save_pretrained(folder),
        "sibling": lambda: StableDiffusionPipeline(**parts(pipe), requires_safety_checker=False).save_pretrained(
            folder
        ),
        "erased": lambda: pipe.save_erased_pipeline(folder),
        "erased beside": lambda: pipe.save_erased_pipeline(folder, fuse=False),
    }[way]
    with pytest.raises(AttachError, match="unload_lora_weights"):
        save()
    assert not (folder / "model_index.json").exists()
    assert not (folder / "base").exists()


@pytest.mark.parametrize("way", ["pipeline", "component", "sibling", "auto"])
def test_hooks_are_not_left_out_of_a_saved_model_in_silence(
    tiny_pipe: Any, pinned: Erasure, way: str, tmp_path: Any
) -> None:
    ErasureManager(tiny_pipe).add(pinned, "cat")
    pipe = {
        "pipeline": lambda: tiny_pipe,
        "component": lambda: tiny_pipe.text_encoder,
        "sibling": lambda: StableDiffusionPipeline(**parts(tiny_pipe), requires_safety_checker=False),
        "auto": lambda: AutoPipelineForText2Image.from_pipe(tiny_pipe),
    }[way]()
    with pytest.raises(AttachError, match="pins prompts"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()
    ErasureManager(tiny_pipe).unload()
    pipe.save_pretrained(tmp_path / "out")


# Two text encoders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xl(tiny_models: Any) -> Any:
    """A drop-in of SDXL whose text encoders are erased, and four blocks long; the last of each is not read."""
    pipe = StableDiffusionXLErasurePipeline.from_pipe(tiny_models["stable-diffusion-xl"]())
    pipe.set_progress_bar_config(disable=True)
    pipe.erase("cat", "hirm", steps=2, contexts=0, retain_vocabulary=2, progress=False)
    return pipe


@pytest.mark.parametrize(("skip", "warns"), [(None, False), (2, False), (3, True)])
def test_clip_skip_counts_from_the_state_that_sdxl_reads(xl: Any, skip: int | None, warns: bool) -> None:
    with pytest.warns(BypassedErasureWarning, match="clip_skip=3") if warns else warnings.catch_warnings():
        if not warns:
            warnings.simplefilter("error", BypassedErasureWarning)
        xl(PROMPT, clip_skip=skip, **SMALL)


@pytest.mark.parametrize("part", [0, 1])
def test_embeddings_of_either_encoder_made_elsewhere_are_noticed(xl: Any, part: int) -> None:
    own, negative, pooled, negative_pooled = xl.encode_prompt(PROMPT, device="cpu")
    own = own.clone()
    own[:, 1, 32 * part : 32 * part + 32] += 1
    with pytest.warns(BypassedErasureWarning, match="prompt_embeds= bypasses"):
        xl(
            prompt_embeds=own, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=negative_pooled, **SMALL,
        )  # fmt: skip
