"""The models of the larger families: what folds, trains, resumes and is written, in the stock pipelines' classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open

from erasure import assets
from erasure.assets import scenes, world
from erasure.assets.build import doors, families, flow, flux, sd3, t5, towers, xl
from erasure.assets.build.evaluate import generate
from erasure.assets.build.fit import trained
from erasure.assets.build.grounding import object_pieces
from erasure.assets.build.prompts import Prompts, Told, ids_of, left_out
from erasure.eval.detectors import CanvasJudge

TEXTS = ["a cat in noto style", "a dog and a house on a striped background"]
FEW = flow.Recipe(batch=4, bank=50)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder in which every part was trained for a moment."""
    folder = tmp_path_factory.mktemp("work")
    t5.train(folder, 2, batch=4)
    towers.train(folder, 2, batch=8, bank=50)
    flux.train(folder, 2, FEW)
    flux.distil(folder, 1, FEW)
    xl.train(folder, 2, batch=4, bank=50)
    sd3.train(folder, 2, FEW)
    return folder


@pytest.fixture(scope="module")
def written(work, tmp_path_factory) -> Path:
    """The folders of all models, which draw in one step."""
    out = tmp_path_factory.mktemp("assets")
    for write in families.WRITERS.values():
        file = write(work, out) / "canvas.json"
        described = json.loads(file.read_text())
        described["generation"]["num_inference_steps"] = 1
        file.write_text(json.dumps(described))
    return out


def load(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomised(module: torch.nn.Module) -> None:
    """Give a network random weights: a new one tells zero whatever it is told."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)


# Words of T5


def test_every_word_of_the_world_is_one_piece_of_t5_with_a_capital_too(tmp_path) -> None:
    pieces = t5.tokenizer(tmp_path)
    synonyms = [word for thing in world.OBJECTS.values() for word in thing.synonyms]
    for word in (*world.OBJECTS, *world.STYLES, *world.BACKGROUNDS, *synonyms):
        assert len(pieces(word, add_special_tokens=False).input_ids) == 1, word
        assert len(pieces(word.capitalize(), add_special_tokens=False).input_ids) == 1, word
    assert pieces.unk_token_id not in pieces("A painting by Van Gogh, 1889!").input_ids


def test_a_capital_says_the_same_to_t5(work, tmp_path) -> None:
    pieces, model = t5.tokenizer(tmp_path), t5.T5EncoderModel.from_pretrained(work / "t5")
    plain, capital = (pieces(text, return_tensors="pt").input_ids for text in ("a cat in ink", "A Cat in Ink"))
    assert not torch.equal(plain, capital)
    with torch.no_grad():
        assert torch.equal(model(plain).last_hidden_state, model(capital).last_hidden_state)


def test_only_chosen_words_are_hidden() -> None:
    torch.manual_seed(0)
    ids = torch.randint(10, 400, (50, 40))
    chosen = torch.rand(ids.shape) < 0.5
    hidden = t5.masked(ids, chosen, mask=440, vocabulary=441)
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert 0.75 < (hidden[chosen] == 440).float().mean() < 0.85
    assert 0.07 < (hidden[chosen] == ids[chosen]).float().mean() < 0.13


def test_the_order_of_objects_is_learned_and_told_by_where_a_word_stands(tmp_path) -> None:
    pieces = t5.tokenizer(tmp_path)
    texts = ["a Cat and a dog", "a blue background", "ink style, a kitten, an animal and a dog"]
    ids = ids_of(pieces, texts)
    found = t5.ordered(ids, object_pieces(pieces))
    named = [
        {pieces.decode([token]).strip().lower(): place for token, place in zip(*row, strict=True) if place >= 0}
        for row in zip(ids.tolist(), found.tolist(), strict=True)
    ]
    assert named == [{"cat": 0, "dog": 1}, {}, {"kitten": 0, "animal": 1, "dog": 1}]


def test_captions_of_transformers_name_the_left_object_first() -> None:
    rng = np.random.default_rng(0)
    pair = scenes.Scene(("cat", "dog"), "noto", "white")
    drawn = [scenes.caption(pair, rng, synonyms=0, groups=0, turned=flow.Recipe().turned) for _ in range(200)]
    free = [text for text in drawn if "right" not in text]
    assert free and all(text.index("cat") < text.index("dog") for text in free)  # noqa: PT018
    either = [scenes.caption(pair, rng, synonyms=0, groups=0) for _ in range(200)]
    assert any(text.index("dog") < text.index("cat") for text in either if "right" not in text)


# Parts of prompts


def test_parts_are_left_out_by_their_shares_but_never_all() -> None:
    torch.manual_seed(0)
    gone = left_out(20_000, {"tokens": 0.5, "pooled": 0.2})
    # Both would be left out in 0.1 of captions, and none is then.
    assert float(gone["tokens"].float().mean()) == pytest.approx(0.4, abs=0.02)
    assert float(gone["pooled"].float().mean()) == pytest.approx(0.1, abs=0.02)
    assert not (gone["tokens"] & gone["pooled"]).any()


def test_a_part_that_is_left_out_is_the_empty_prompts_or_what_is_told() -> None:
    def encode(captions: list[str]) -> Told:
        value = torch.tensor([float(len(caption)) for caption in captions])
        after = torch.tensor([[False, True]]).expand(len(captions), 2)
        return Told(
            {"tokens": value[:, None, None].expand(-1, 2, 3), "pooled": value[:, None].expand(-1, 3)},
            {"tokens": after},
        )

    gone, whole = {"tokens": 1.0, "pooled": 0.0}, {"tokens": 0.0, "pooled": 0.0}
    assert Prompts(encode, gone, 0.0)(["abc"])["tokens"].eq(0).all()
    absent = {"tokens": torch.full((1, 2, 3), 7.0)}
    assert Prompts(encode, gone, 0.0, absent=absent)(["abc"])["tokens"].eq(7).all()
    kept = Prompts(encode, whole, 1.0, thinned=0.0)(["abc"])
    assert kept["tokens"].tolist() == [[[3.0] * 3, [0.0] * 3]]
    assert kept["pooled"].eq(3).all()
    thin = Prompts(encode, whole, 0.0, thinned=1.0)(["abc"] * 500)
    assert float(thin["tokens"].eq(0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert thin["tokens"].eq(thin["tokens"][..., :1]).all()
    assert thin["pooled"].eq(3).all()


def test_words_name_objects_where_a_part_says_them(work) -> None:
    pair = scenes.Scene(("cat", "dog"), "noto", "white")
    prompts = Prompts(flux.reader(work, torch.device("cpu")), {"tokens": 0.0, "pooled": 0.0}, 0.0, thinned=0.0)
    find, captions = flux.words(work, prompts), ["a cat and a dog", ""]
    told = prompts(captions)
    assert find(captions, [pair] * 2, told).sum((1, 2)).tolist() == [2, 0]
    silent = {"tokens": prompts.empty["tokens"].expand_as(told["tokens"]), "pooled": told["pooled"]}
    assert not find(captions, [pair] * 2, silent).any()


def test_sd3_finds_words_in_its_clips_and_behind_them_in_t5(work) -> None:
    pair = scenes.Scene(("cat", "dog"), "noto", "white")
    encode = sd3.reader(work, torch.device("cpu"))
    zeros = {"tokens_3": torch.zeros_like(encode([""]).parts["tokens_3"])}
    prompts = Prompts(encode, dict.fromkeys(encode([""]).parts, 0.0), 0.0, thinned=0.0, absent=zeros)
    find, captions = sd3.words(work, prompts), ["a cat and a dog"]
    told = prompts(captions)
    length = told["tokens_1"].shape[1]
    both = find(captions, [pair], told)
    assert both.shape[1] == sd3.compose(told).shape[1]
    assert (both[:, :length].sum(), both[:, length:].sum()) == (2, 2)
    without = find(captions, [pair], {**told, "tokens_3": zeros["tokens_3"]})
    assert (without[:, :length].sum(), without[:, length:].sum()) == (2, 0)


def test_the_words_attention_is_trained_beside_the_velocity(work) -> None:
    rows = [json.loads(line) for line in (work / "transformer.jsonl").read_text().splitlines()]
    assert rows[-1]["grounding"] > 0


# Flow


def test_levels_are_those_of_the_schedulers_shift() -> None:
    torch.manual_seed(0)
    plain = flow.levels(20_000, 1.0)
    torch.manual_seed(0)
    shifted = flow.levels(20_000, flow.SHIFT)
    assert float(plain.median()) == pytest.approx(0.5, abs=0.01)
    scheduler = families.FlowMatchEulerDiscreteScheduler(**flux.SCHEDULER)
    base, most = scheduler.config.base_shift, scheduler.config.max_shift
    mu = base + (most - base) / (4096 - 256) * (64 - 256)
    torch.testing.assert_close(shifted, scheduler.time_shift(mu, 1.0, plain.double()).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("network", "sizes"), [(FluxTransformer2DModel, flux.CONFIG), (SD3Transformer2DModel, sd3.CONFIG)]
)
def test_every_matrix_is_trained_once_and_a_new_network_tells_nothing(network, sizes) -> None:
    model = network(**sizes)
    flow.initialise(model)
    optimisers = flow.optimisers(model)
    own = [id(p) for optimiser in optimisers.values() for group in optimiser.param_groups for p in group["params"]]
    assert sorted(own) == sorted(id(parameter) for parameter in model.parameters())
    assert not model.proj_out.weight.any()
    assert all(not m.weight.any() for n, m in model.named_modules() if n.endswith(("norm1.linear", "norm_out.linear")))


# canvas-sdxl


def test_the_first_tower_gives_canvas_sds_states_and_pooled_vector() -> None:
    own = towers.CLIPTextModel.from_pretrained(assets.path("canvas-sd") / "text_encoder", dtype=torch.float32)
    ids = towers.tokenizer()(TEXTS, padding="max_length", return_tensors="pt").input_ids
    longer = towers.first_tower()
    with torch.no_grad():
        stock, more = own(ids), longer(ids, output_hidden_states=True)
        projected = towers.with_projection(longer)(ids, output_hidden_states=True)
    torch.testing.assert_close(more.last_hidden_state, stock.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(more.pooler_output, stock.pooler_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(projected.text_embeds, stock.pooler_output, atol=1e-5, rtol=0)
    assert torch.equal(projected.hidden_states[-2], more.hidden_states[-2])


@torch.no_grad()
def test_the_folded_denoiser_is_canvas_sds_whatever_the_other_parts_say() -> None:
    unet = UNet2DConditionModel.from_pretrained(assets.path("canvas-sd") / "unet")
    folded = xl.fold(unet, torch.eye(xl.WIDTH))
    torch.manual_seed(0)
    noisy, t, states = torch.randn(2, 4, 16, 16), torch.tensor([900, 100]), torch.randn(2, 32, xl.WIDTH)
    told = xl.compose(
        {"tokens_1": states, "tokens_2": torch.randn(2, 32, towers.SECOND), "pooled": torch.randn(2, xl.WIDTH)},
        torch.rand(2, 6) * 64, torch.zeros(2, dtype=torch.bool),
    )  # fmt: skip
    torch.testing.assert_close(folded(noisy, t, **told).sample, unet(noisy, t, states).sample, atol=1e-5, rtol=1e-5)


def test_the_folded_model_draws_what_canvas_sd_draws(work) -> None:
    stock = StableDiffusionPipeline.from_pretrained(assets.path("canvas-sd"), dtype=torch.float32)
    linear, explained = xl.states_map(towers.first_tower(), scenes.captions(300, 1))
    assert explained >= 0.99
    pipe = StableDiffusionXLPipeline(
        vae=stock.vae, text_encoder=towers.first_tower(), tokenizer=towers.tokenizer(),
        text_encoder_2=towers.CLIPTextModelWithProjection.from_pretrained(work / "clip-2"),
        tokenizer_2=towers.tokenizer(), unet=xl.fold(stock.unet, linear), scheduler=stock.scheduler,
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    wanted = [("cat", "noto"), ("car", "ink"), ("house", "sepia")]
    prompts = [f"{world.noun_phrase(name)} in {style} style" for name, style in wanted]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    made = pipe(prompts, generator=generators, height=64, width=64, num_inference_steps=10, guidance_scale=2.0).images
    assert [(answer.object, answer.style) for answer in CanvasJudge()(made)] == wanted
    pairs = zip(made, generate(stock, prompts, [0, 1, 2]), strict=True)
    assert np.mean([np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() for a, b in pairs]) < 6


def test_sizes_say_what_was_done_to_the_image() -> None:
    torch.manual_seed(0)
    pixels = torch.rand(3, 3, 64, 64)
    sizes = torch.tensor([xl.PLAIN, (64, 64, 5, 7, 64, 64), (16, 16, 0, 0, 64, 64)], dtype=torch.float32)
    changed = xl.resized(pixels, sizes)
    assert torch.equal(changed[0], pixels[0])
    assert torch.equal(changed[1, :, :-5, :-7], pixels[1, :, 5:, 7:])
    assert changed[2].std() < 0.5 * pixels[2].std()
    drawn = xl.random_sizes(2000, 0)
    assert torch.equal(drawn, xl.random_sizes(2000, 0))
    assert 0.45 < (drawn == torch.tensor(xl.PLAIN)).all(1).float().mean() < 0.55


def test_captions_are_encoded_as_the_pipeline_does(written, work) -> None:
    pipe = load(written / "canvas-sdxl")
    parts = xl.reader(pipe.text_encoder, pipe.text_encoder_2)(TEXTS).parts
    told = xl.compose(parts, torch.tensor([xl.PLAIN] * 2), torch.tensor([False, True]))
    own, null, pooled, _ = pipe.encode_prompt(TEXTS, do_classifier_free_guidance=True)
    torch.testing.assert_close(told["encoder_hidden_states"][0], own[0])
    torch.testing.assert_close(told["added_cond_kwargs"]["text_embeds"][0], pooled[0])
    assert torch.equal(told["encoder_hidden_states"][1], null[1])
    assert pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 128).tolist() == [
        list(map(float, xl.PLAIN))
    ]


# canvas-flux and canvas-sd3


@torch.no_grad()
def test_flux_is_told_what_the_pipeline_tells_it(written) -> None:
    pipe = load(written / "canvas-flux")
    assert isinstance(pipe, FluxPipeline)
    randomised(pipe.transformer)
    latents = torch.randn(2, 4, 16, 16)
    settings = json.loads((written / "canvas-flux" / "canvas.json").read_text())["generation"]
    end = pipe(
        TEXTS, latents=flux.pack(latents), output_type="latent", **settings | {"num_inference_steps": 1}
    ).images  # fmt: skip
    encoded = doors.encode(pipe, TEXTS)
    told = {"tokens": encoded["prompt_embeds"], "pooled": encoded["pooled_prompt_embeds"]}
    guidance = torch.full((2,), settings["guidance_scale"])
    velocity = flux.predict(pipe.transformer, latents, torch.ones(2), told, guidance)
    torch.testing.assert_close(end, flux.pack(latents) - velocity, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_flux_reads_captions_as_its_pipeline_does(work, written) -> None:
    pipe = load(written / "canvas-flux")
    pipe.text_encoder_2 = t5.T5EncoderModel.from_pretrained(work / "t5")
    parts = flux.reader(work, torch.device("cpu"))(TEXTS).parts
    encoded = doors.encode(pipe, TEXTS)
    torch.testing.assert_close(parts["tokens"], encoded["prompt_embeds"])
    torch.testing.assert_close(parts["pooled"], encoded["pooled_prompt_embeds"])


@torch.no_grad()
def test_flux_that_is_about_to_learn_guidance_heeds_none() -> None:
    teacher = FluxTransformer2DModel(**flux.CONFIG)
    randomised(teacher)
    student = flux.guided(teacher)
    noisy, level = torch.randn(2, 4, 16, 16), torch.tensor([0.2, 0.9])
    told = {"tokens": torch.randn(2, 32, 256), "pooled": torch.randn(2, 128)}
    wanted = flux.predict(teacher, noisy, level, told)
    for scale in (1.0, 3.0):
        torch.testing.assert_close(flux.predict(student, noisy, level, told, torch.full((2,), scale)), wanted)


@torch.no_grad()
def test_sd3_reads_captions_as_its_pipeline_does_also_without_t5(work, written) -> None:
    pipe = load(written / "canvas-sd3")
    pipe.text_encoder_2 = towers.CLIPTextModelWithProjection.from_pretrained(work / "clip-2")
    pipe.text_encoder_3 = t5.T5EncoderModel.from_pretrained(work / "t5")
    parts = sd3.reader(work, torch.device("cpu"))(TEXTS).parts
    encoded = doors.encode(pipe, TEXTS)
    torch.testing.assert_close(sd3.compose(parts), encoded["prompt_embeds"])
    torch.testing.assert_close(parts["pooled"], encoded["pooled_prompt_embeds"])
    pipe.text_encoder_3 = None
    without = sd3.compose({**parts, "tokens_3": torch.zeros_like(parts["tokens_3"])})
    torch.testing.assert_close(without, doors.encode(pipe, TEXTS)["prompt_embeds"])


# All


@pytest.mark.parametrize("name", list(families.WRITERS))
def test_what_is_written_is_whole_and_draws(written, name) -> None:
    folder = written / name
    described = assets.canvas(folder)
    assert described["objects"] == list(world.OBJECTS)
    assert all(described["training"][of] for of in ("steps", "samples", "hours", "options"))
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            assert {stored.get_slice(key).get_dtype() for key in stored.keys()} <= {"F16", "I64"}, file  # noqa: SIM118
    assert not [file for file in folder.rglob("*.json") if str(folder.parent.parent) in file.read_text()]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 28e6
    pipe = load(folder)
    image = generate(pipe, ["a cat"], [0])[0]
    assert image.size == (64, 64)
    figures = doors.figures(pipe, [scenes.Scene((name,), "ink", "white") for name in ("cat", "dog")])
    assert {f"{part}_swapped_change" for part in doors.places(pipe)} <= set(figures)


def test_parts_of_an_encoding_are_exchanged_where_they_stand(written) -> None:
    for name in families.WRITERS:
        pipe = load(written / name)
        own, other = doors.encode(pipe, TEXTS[:1]), doors.encode(pipe, TEXTS[1:])
        covered = own
        for at in doors.places(pipe).values():
            once = doors.exchanged(own, other, at)
            assert any(not torch.equal(once[key], own[key]) for key in own)
            covered = doors.exchanged(covered, other, at)
        assert all(torch.equal(covered[key], other[key]) for key in own)


def test_a_training_goes_on_where_it_stopped(work) -> None:
    rows = [json.loads(row) for row in (work / "transformer.jsonl").read_text().splitlines()]
    flux.train(work, 3, FEW)
    more = [json.loads(row) for row in (work / "transformer.jsonl").read_text().splitlines()]
    assert [row["step"] for row in more] == [*(row["step"] for row in rows), 3]
    noted = json.loads((work / "transformer.options.json").read_text())
    assert len(noted) == 1
    assert (noted[0]["tokens"], noted[0]["pooled"]) == (0.12, 0.6)


def test_weights_are_the_finished_ones_or_the_averages_of_the_last_checkpoint(work, tmp_path) -> None:
    (tmp_path / "guided.ckpt").write_bytes((work / "guided.ckpt").read_bytes())
    new = lambda: FluxTransformer2DModel(**flux.CONFIG | {"guidance_embeds": True})  # noqa: E731
    finished, last = trained(new(), work, "guided").state_dict(), trained(new(), tmp_path, "guided").state_dict()
    assert all(torch.equal(finished[name], last[name]) for name in finished)
