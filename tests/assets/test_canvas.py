"""The embedded world: what is shipped is whole, loads in the real libraries, and is as good as its record says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from erasure import assets, sae
from erasure.assets import scenes, world
from erasure.assets.build.evaluate import generate, judge_accuracy
from erasure.backbones import backbone_for
from erasure.errors import ArtifactError
from erasure.eval.detectors import CanvasJudge
from erasure.sae.quality import quality
from erasure.sae.stream import TokenStream, reads_from


@pytest.fixture(scope="module")
def canvas() -> dict:
    return assets.canvas()


def test_assets_are_small_enough_to_ship() -> None:
    files = [file for file in assets.ROOT.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 90e6
    assert {"canvas-sd", "canvas-clip", "canvas-judge", "canvas-scenes"} <= {
        file.relative_to(assets.ROOT).parts[0] for file in files
    }


def test_description_is_the_world(canvas: dict) -> None:
    assert canvas["objects"] == list(world.OBJECTS)
    assert len(canvas["objects"]) >= 24
    assert canvas["styles"] == list(world.STYLES)
    assert len(canvas["styles"]) >= 5
    assert canvas["backgrounds"] == list(world.BACKGROUNDS)
    assert len(scenes.PLAIN_COLOURS) >= 5
    assert set(canvas["unsafe"]) < set(canvas["objects"])
    assert all("{object}" in template for template in canvas["templates"])
    assert not set(canvas["templates"]) & set(canvas["held_out_templates"])
    assert {"steps", "samples", "hours", "accuracy"} <= set(canvas["training"])


def test_recorded_accuracies_meet_what_is_demanded(canvas: dict) -> None:
    figures = canvas["training"]["accuracy"]
    assert figures["object"] >= 0.95
    assert figures["style"] >= 0.90
    assert figures["shape"] >= 0.85
    assert figures["both_objects"] >= 0.50
    assert figures["seconds_per_image_one_core"] <= 1.5


def test_judge_on_fresh_renders() -> None:
    accuracy = judge_accuracy(CanvasJudge(), scenes=250, seed=4)
    assert accuracy["judge_object"] >= 0.99
    assert accuracy["judge_style"] >= 0.99
    assert accuracy["judge_shape"] >= 0.97
    assert accuracy["judge_both"] >= 0.95


def test_judge_sees_nothing_on_a_bare_background() -> None:
    bare = [Image.fromarray(scenes.render(scenes.Scene((), "noto", name)).image) for name in world.BACKGROUNDS]
    assert all(judgement.objects == () for judgement in CanvasJudge()(bare))
    assert CanvasJudge()([]) == []


def test_generated_images_show_what_was_asked() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(assets.path("canvas-sd"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    wanted = [(name, style) for name in ("cat", "car", "house") for style in ("noto", "ink")]
    images = generate(pipe, [f"{world.noun_phrase(name)} in {style} style" for name, style in wanted], list(range(6)))
    judged = CanvasJudge()(images)
    assert sum(j.object == name for j, (name, _) in zip(judged, wanted, strict=True)) >= 5
    assert sum(j.style == style for j, (_, style) in zip(judged, wanted, strict=True)) >= 5


def test_denoiser_attends_at_every_resolution() -> None:
    config = json.loads((assets.path("canvas-sd") / "unet" / "config.json").read_text())
    assert config["sample_size"] >= 16
    assert all("CrossAttn" in block for block in (*config["down_block_types"], *config["up_block_types"]))


def test_loads_in_one_dtype_whether_one_is_named_or_not() -> None:
    for named, expected in (({}, torch.float32), ({"dtype": torch.float16}, torch.float16)):
        pipe = DiffusionPipeline.from_pretrained(assets.path("canvas-sd"), **named)
        parts = (pipe.unet, pipe.vae, pipe.text_encoder)
        assert {parameter.dtype for part in parts for parameter in part.parameters()} == {expected}


def test_weights_are_fp16_safetensors() -> None:
    # Detectors are networks of others, in the precision in which they were published.
    for file in assets.ROOT.glob("canvas-*/**/*.safetensors"):
        with safe_open(file, "pt") as stored:
            assert {stored.get_slice(name).get_dtype() for name in stored.keys()} <= {"F16", "I64"}, file  # noqa: SIM118
    assert not [*assets.ROOT.rglob("*.bin"), *assets.ROOT.rglob("*.ckpt"), *assets.ROOT.rglob("*.pt")]


@torch.no_grad()
def test_open_clip_tower_equals_transformers_tower() -> None:
    folder = f"local-dir:{assets.path('canvas-clip')}"
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    tokenizer = open_clip.get_tokenizer(folder)
    text = CLIPTextModel.from_pretrained(assets.path("canvas-sd"), subfolder="text_encoder", dtype=torch.float32)
    stock = CLIPTokenizer.from_pretrained(assets.path("canvas-sd"), subfolder="tokenizer")
    prompts = ["a cat in noto style", "a gun next to a pizza on a striped background", "", "Van Gogh"]
    ids = stock(prompts, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(tokenizer(prompts), ids)
    pooled = text(ids).pooler_output @ model.text_projection
    torch.testing.assert_close(model.eval().encode_text(ids), pooled, atol=1e-5, rtol=0)
    shown = [Image.fromarray(scenes.render(scenes.Scene((name,), "noto", "white")).image) for name in ("cat", "car")]
    images = model.encode_image(torch.stack([preprocess(image) for image in shown]), normalize=True)
    texts = model.encode_text(tokenizer(["a cat in noto style", "a car in noto style"]), normalize=True)
    assert (images @ texts.T).argmax(1).tolist() == [0, 1]


def test_dictionary_describes_the_text_encoder_on_captions_it_never_saw() -> None:
    tower = backbone_for(StableDiffusionPipeline.from_pretrained(assets.path("canvas-sd"))).towers[0]
    dictionary = sae.load(assets.path("canvas-sae"))
    layer = dictionary.config.metadata["layer"]
    assert reads_from(tower, layer, dictionary.config.metadata["fingerprint"])
    found = quality(dictionary, TokenStream(tower, layer, scenes.captions(300, seed=123)), 3)
    assert found.fvu < 0.05
    assert found.latents_per_token < 12


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(assets.path("canvas-sd"), subfolder="tokenizer")
    synonyms = [word for thing in world.OBJECTS.values() for word in thing.synonyms]
    for word in (*world.OBJECTS, *world.STYLES, *world.BACKGROUNDS, *synonyms):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_render_gives_masks_and_the_clean_background() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        scene = scenes.sample_scene(rng)
        made = scenes.render(scene)
        assert made.image.shape == made.background.shape == (64, 64, 3)
        assert made.masks.shape == (len(scene.objects), 64, 64)
        assert not (made.masks.sum(0) > 1).any()
        shadow = np.abs(made.image.astype(int) - made.background).max(-1) > 0
        assert not shadow.any() or scene.objects
        for mask in made.masks:
            assert 100 < mask.sum() < 56 * 56
        if len(scene.objects) == 2:
            left, right = (np.nonzero(mask)[1].mean() for mask in made.masks)
            assert left < right


def test_captions_name_what_the_scene_shows() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = scenes.sample_scene(rng)
        text = scenes.caption(scene, rng, synonyms=0, groups=0)
        assert all(f"{world.noun_phrase(name)}" in text for name in scene.objects)
        assert not [style for style in world.STYLES if style != scene.style and style in text.replace(",", "").split()]


def test_unknown_asset_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="canvas-sd"):
        assets.path("canvas-nothing")
    with pytest.raises(ArtifactError, match=r"canvas\.json"):
        assets.canvas(tmp_path)
