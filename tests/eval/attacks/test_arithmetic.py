"""What each attack does in one update, and what its tries draw, against plain arithmetic on the tiny model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from erasure.eval.attacks import SkippedPromptError, get
from erasure.eval.attacks.changes import redefined
from erasure.eval.attacks.concept_inversion import beginnings, inversion_loss, named_by, unused_words
from erasure.eval.attacks.mma import permitted, replaced, token_gradients
from erasure.eval.attacks.p4d import P4D, nearest, prediction_gap, told_by
from erasure.eval.attacks.prefixes import choosable
from erasure.eval.attacks.rewrites import Rewrite, place_of, slip
from erasure.eval.attacks.ring_a_bell import evolved, paired
from erasure.eval.attacks.tina import shares, undone
from erasure.eval.attacks.tokens import alone, between, prompt_of, summary
from erasure.eval.attacks.victim import Victim
from erasure.eval.samples import Sample, initial_noise, sample_seed
from erasure.eval.suites import Target
from erasure.interop import paths

PROMPT = "a cat image in noto style"
STEPS, SCALE = 4, 3.0
SAMPLE = Sample(
    "cat-noto-0", PROMPT, 5, "target", ("cat",), "noto", ("cat",), num_inference_steps=STEPS, guidance_scale=SCALE,
    height=32, width=32,
)  # fmt: skip
ADAPTERS = Path(__file__).parents[2] / "tiny" / "ip-adapter"


def cats(images: Any) -> list[Any]:
    return [SimpleNamespace(object="cat", style="noto") for _ in images]


@pytest.fixture(scope="module")
def erased(tiny_pipe_factory: Any) -> Any:
    """The tiny pipeline with another denoiser: what an erasure could have made of it. Read it, never change it."""
    pipe = tiny_pipe_factory()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return pipe


@pytest.fixture
def victim(erased: Any, tiny_pipe_original: Any) -> Victim:
    return Victim(erased, tiny_pipe_original, Target("cat", "object", ("cat",)), cats, samples=[SAMPLE], seed=3)


# The sampler of the tiny model, by hand ------------------------------------------------------------------------------


def encode(pipe: Any, prompt: str) -> Tensor:
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return pipe.text_encoder(ids).last_hidden_state


def levels(pipe: Any, steps: int) -> list[int]:
    """Leading spacing with an offset of 1."""
    return [1 + step * (1000 // steps) for step in reversed(range(steps))]


@torch.no_grad()
def ddim(pipe: Any, x: Tensor, told: Tensor, empty: Tensor, steps: int, scale: float, run: slice) -> Tensor:
    """Some steps of DDIM with guidance."""
    kept, every = pipe.scheduler.alphas_cumprod, levels(pipe, steps)
    for t in every[run]:
        before = t - 1000 // steps
        now, then = kept[t], kept[before] if before >= 0 else kept[0]
        own, null = (pipe.unet(x, t, encoder_hidden_states=part).sample for part in (told, empty))
        noise = null + scale * (own - null)
        clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * noise
    return x


@torch.no_grad()
def picture(pipe: Any, x: Tensor) -> np.ndarray:
    pixels = (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    return (pixels[0].permute(1, 2, 0) * 255).round().numpy()


def same(image: Image.Image, wanted: np.ndarray) -> None:
    assert np.abs(np.asarray(image, float) - wanted).max() <= 1


def ordinary(pipe: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Noise of the sample, and what its prompt and the empty one tell."""
    return initial_noise(SAMPLE, (4, 16, 16))[0][None], encode(pipe, PROMPT), encode(pipe, "")


def test_the_ordinary_call_is_that_by_hand(victim: Victim) -> None:
    noise, told, empty = ordinary(victim.pipe)
    x = ddim(victim.pipe, noise, told, empty, STEPS, SCALE, slice(None))
    same(victim.draw(SAMPLE), picture(victim.pipe, x))


# Pictures, latents, embeddings, settings -----------------------------------------------------------------------------


def test_img2img_noises_the_picture_and_goes_on(victim: Victim) -> None:
    (attempt,) = get("img2img").configured("smoke", strengths=(0.5,)).attempts(victim, SAMPLE)
    start = victim.start(SAMPLE, 1)
    assert np.array_equal(np.asarray(attempt.call["image"]), np.asarray(start.image))
    pipe = victim.pipe
    pixels = torch.from_numpy(np.asarray(start.image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    # The sample's generator goes on from its noise: the autoencoder draws first, then the noise of the picture.
    _, generator = initial_noise(SAMPLE, (4, 16, 16))
    found = pipe.vae.encode(pixels).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
    noise = torch.randn(found.shape, generator=generator)
    steps = 2 * STEPS
    kept = pipe.scheduler.alphas_cumprod[levels(pipe, steps)[STEPS]]
    _, told, empty = ordinary(pipe)
    x = ddim(pipe, kept.sqrt() * found + (1 - kept).sqrt() * noise, told, empty, steps, SCALE, slice(STEPS, None))
    same(victim.draw(SAMPLE, attempt), picture(pipe, x))


def test_img2img_goes_from_much_noise_to_little(victim: Victim) -> None:
    tried = list(get("img2img").configured("full").attempts(victim, SAMPLE))
    assert [attempt.call["strength"] for attempt in tried] == [0.7, 0.5, 0.3]
    assert [attempt.call["num_inference_steps"] for attempt in tried] == [
        math.ceil(STEPS / s) for s in (0.7, 0.5, 0.3)
    ]


def test_inpaint_draws_the_hole_and_keeps_the_rest(victim: Victim) -> None:
    (attempt,) = get("inpaint").configured("full").attempts(victim, SAMPLE)
    assert attempt.box == (8, 8, 24, 24)
    mask = np.asarray(attempt.call["mask_image"])
    assert mask[8:24, 8:24].min() == 255
    assert mask.sum() == 255 * 16 * 16
    pipe, start = victim.pipe, attempt.call["image"]
    pixels = torch.from_numpy(np.asarray(start, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    _, generator = initial_noise(SAMPLE, (4, 16, 16))
    found = pipe.vae.encode(pixels).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
    x = noise = torch.randn((1, 4, 16, 16), generator=generator)
    hole = torch.zeros(1, 1, 16, 16)
    hole[..., 4:12, 4:12] = 1
    _, told, empty = ordinary(pipe)
    every = levels(pipe, STEPS)
    for number in range(STEPS):
        x = ddim(pipe, x, told, empty, STEPS, SCALE, slice(number, number + 1))
        rest = found
        if number + 1 < STEPS:
            kept = pipe.scheduler.alphas_cumprod[every[number + 1]]
            rest = kept.sqrt() * found + (1 - kept).sqrt() * noise
        x = (1 - hole) * rest + hole * x
    same(victim.draw(SAMPLE, attempt), picture(pipe, x))


def test_inpaint_leaves_a_hole_out_that_no_picture_fills(erased: Any, tiny_pipe_original: Any) -> None:
    def only_in_large_parts(images: Any) -> list[Any]:
        return [SimpleNamespace(object="cat" if image.width > 20 else "dog", style="noto") for image in images]

    target = Target("cat", "object", ("cat",))
    victim = Victim(erased, tiny_pipe_original, target, only_in_large_parts, samples=[SAMPLE], seed=3)
    attack = get("inpaint").configured("full", holes=(0.75, 0.5))
    assert [attempt.box for attempt in attack.attempts(victim, SAMPLE)] == [(4, 4, 28, 28)]
    with pytest.raises(SkippedPromptError, match="'cat'"):
        list(get("inpaint").configured("full", holes=(0.5,)).attempts(victim, SAMPLE))


def test_completion_takes_the_first_steps_of_the_original_model(victim: Victim) -> None:
    tried = list(get("completion").configured("full", steps=(1, 3, 4, 9)).attempts(victim, SAMPLE))
    assert [attempt.call["callback_on_step_end"].step for attempt in tried] == [1, 3]
    noise, told, empty = ordinary(victim.stock)
    for attempt, step in zip(tried, (1, 3), strict=True):
        x = ddim(victim.stock, noise, told, empty, STEPS, SCALE, slice(step))
        x = ddim(victim.pipe, x, told, empty, STEPS, SCALE, slice(step, None))
        same(victim.draw(SAMPLE, attempt), picture(victim.pipe, x))
    (control,) = get("completion").configured("full", steps=(1,), control=True).attempts(victim, SAMPLE)
    x = ddim(victim.stock, noise, empty, empty, STEPS, SCALE, slice(1))
    torch.testing.assert_close(control.call["callback_on_step_end"].latents, x, rtol=1e-4, atol=1e-4)


def test_embeddings_are_those_of_the_original_text_encoder(victim: Victim) -> None:
    pipe = copy.copy(victim.pipe)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        paths.token_table(pipe.text_encoder).weight.mul_(-1)
    other = Victim(pipe, victim.stock, victim.target, cats)
    for control, source in ((False, victim.stock), (True, pipe)):
        (attempt,) = get("prompt_embeds").configured("full", control=control).attempts(other, SAMPLE)
        noise, told, empty = ordinary(source)
        torch.testing.assert_close(attempt.call["prompt_embeds"], told)
        x = ddim(pipe, noise, told, empty, STEPS, SCALE, slice(None))
        same(other.draw(SAMPLE, attempt), picture(pipe, x))


@pytest.mark.parametrize("family", ["stable-diffusion-xl", "stable-diffusion-3", "flux", "chroma"])
def test_embeddings_draw_what_the_prompt_draws(family: str, tiny_models: Any) -> None:
    """On a model that nothing was done to, so that nothing of what the denoiser is told is left out."""
    pipe = tiny_models[family]()
    own = Victim(pipe, pipe, Target("cat", "object", ("cat",)), cats)
    (attempt,) = get("prompt_embeds").configured("full").attempts(own, SAMPLE)
    same(own.draw(SAMPLE, attempt), np.asarray(own.draw(SAMPLE), float))


def test_settings_are_changed_one_at_a_time(victim: Victim) -> None:
    attack = get("sampler").configured("quick")
    tried = list(attack.attempts(victim, SAMPLE))
    assert len(tried) == attack.tries == 4 + 2 + 2 + 1 + 1
    names = [
        attempt.change.scheduler for attempt in tried if not attempt.is_text and hasattr(attempt.change, "scheduler")
    ]
    assert names[:4] == [
        "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler",
    ]  # fmt: skip
    assert [dict(attempt.call) for attempt in tried[4:]] == [
        {"guidance_scale": 1.5}, {"guidance_scale": 6.0}, {"num_inference_steps": 2}, {"num_inference_steps": 8},
        {"height": 48, "width": 48, "latents": None}, {"eta": 1.0},
    ]  # fmt: skip
    noise, told, empty = ordinary(victim.pipe)
    x = ddim(victim.pipe, noise, told, empty, STEPS, 1.5, slice(None))
    same(victim.draw(SAMPLE, tried[4]), picture(victim.pipe, x))
    own = victim.pipe.scheduler
    image = victim.draw(SAMPLE, tried[0])
    assert victim.pipe.scheduler is own
    pipe = copy.copy(victim.pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    same(image, np.asarray(Victim(pipe, pipe, victim.target, cats).draw(SAMPLE), float))
    assert victim.draw(SAMPLE, tried[8]).size == (48, 48)
    for index, attempt in enumerate(get("sampler").configured("smoke", control=True).attempts(victim, SAMPLE)):
        assert set(attempt.call) == {"latents"}
        assert index < 3


def test_an_image_prompt_is_told_as_diffusers_tells_it(victim: Victim) -> None:
    file = ADAPTERS / "stable-diffusion.safetensors"
    attempt, *_ = get("image_prompt").configured("full", adapter=str(file), scales=(0.6,)).attempts(victim, SAMPLE)
    made = victim.draw(SAMPLE, attempt)
    pipe = copy.deepcopy(victim.pipe)
    pipe.load_ip_adapter(str(ADAPTERS), subfolder="", weight_name=file.name, image_encoder_folder="image_encoder")
    pipe.set_ip_adapter_scale(0.6)
    noise = initial_noise(SAMPLE, (4, 16, 16))[0][None]
    wanted = pipe(
        [PROMPT], ip_adapter_image=victim.start(SAMPLE, 1).image, latents=noise, num_inference_steps=STEPS,
        guidance_scale=SCALE, output_type="np",
    ).images[0]  # fmt: skip
    same(made, wanted * 255)


# Inversion -----------------------------------------------------------------------------------------------------------


def test_a_step_is_undone_as_a_fixed_point(victim: Victim) -> None:
    backbone, pipe = victim.backbone, victim.pipe
    steps, rate = 5, 0.01
    t = backbone.timesteps(steps)[2]
    now, then = (pipe.scheduler.alphas_cumprod[int(each)] for each in (t, t - 200))
    ratio = (then / now).sqrt()
    found = shares(backbone, t)
    assert found == pytest.approx([float(ratio), float((1 - then).sqrt() - ratio * (1 - now).sqrt())], rel=1e-4)
    z = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    told = backbone.encode([""])
    got, error = undone(backbone, told, z, t, 2, rate)
    # By hand: C1 z + C2 e(x), and AdamW with its own decay.
    first, second = 1 / ratio, -((1 - then).sqrt() - ratio * (1 - now).sqrt()) / ratio
    x = first * z + second * pipe.unet(z, t, told.tokens).sample.detach()
    mean = spread = torch.zeros_like(x)
    for step in (1, 2):
        x.requires_grad_()
        loss = (first * z + second * pipe.unet(x, t, told.tokens).sample - x).square().mean()
        (slope,) = torch.autograd.grad(loss, x)
        mean, spread = 0.9 * mean + 0.1 * slope, 0.999 * spread + 0.001 * slope.square()
        x = x.detach() * (1 - rate * 0.01)
        x = x - rate * (mean / (1 - 0.9**step)) / ((spread / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-4)
    assert error >= 0


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_the_noise_that_is_found_draws_the_picture_again(family: str, tiny_models: Any) -> None:
    """Without words and guidance, on the model that it was found on."""
    pipe = tiny_models[family]()
    own = Victim(pipe, pipe, Target("cat", "object", ("cat",)), cats)
    sample = Sample(
        "cat-noto-0", PROMPT, 5, "target", ("cat",), "noto", ("cat",), num_inference_steps=2, height=32, width=32
    )
    (attempt,) = get("tina").configured("full", steps=2, iterations=10, learning_rate=0.02).attempts(own, sample)
    (rough,) = get("tina").configured("full", steps=2, iterations=0).attempts(own, sample)
    assert attempt.steps == 20
    assert attempt.loss < rough.loss
    start = np.asarray(own.start(sample, 1).image, float)
    away = [np.abs(np.asarray(own.draw(sample, each), float) - start).mean() for each in (attempt, rough)]
    assert away[0] < 4


# A learned word ------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_learned_word_is_that_of_training(victim: Victim) -> None:
    pipe, backbone = victim.pipe, victim.backbone
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 4, 16, 16), generator=generator), torch.randn((2, 4, 16, 16), generator=generator)
    t, vector = torch.tensor([300.0, 800.0]), torch.randn((1, 32), generator=generator)
    (word,) = unused_words(backbone, [PROMPT], 1)
    (token,) = pipe.tokenizer(word, add_special_tokens=False).input_ids
    caption = named_by(PROMPT, ["cat"], word)
    assert caption == f"a {word} image in noto style"
    rows = {"text_encoder": vector.requires_grad_()}
    got = inversion_loss(backbone, {"text_encoder": [token]}, rows, [caption, caption], clean, noise, t)
    (slope,) = torch.autograd.grad(got, vector)
    # By hand, in a copy whose row of the table is the vector.
    encoder = copy.deepcopy(pipe.text_encoder)
    table = paths.token_table(encoder).weight
    table.data[token] = vector.detach()[0]
    table.requires_grad_()
    ids = pipe.tokenizer([caption] * 2, padding="max_length", max_length=77, return_tensors="pt").input_ids
    kept = pipe.scheduler.alphas_cumprod[t.long()].view(2, 1, 1, 1)
    found = pipe.unet(kept.sqrt() * clean + (1 - kept).sqrt() * noise, t, encoder(ids).last_hidden_state).sample
    wanted = (found - noise).square().mean()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(slope[0], torch.autograd.grad(wanted, table)[0][token])


def test_a_word_is_learned_by_adamw_and_nothing_else_changes(victim: Victim) -> None:
    method = get("concept_inversion").configured("smoke", steps=1, pictures=1, batch=1)
    (attempt,) = method.attempts(victim, SAMPLE)
    row, start = attempt.change.vectors["text_encoder"], beginnings(victim.backbone, "object", 1)["text_encoder"]
    # AdamW's first step is its rate, whatever the gradient's size, behind the decay.
    moved = row - start.detach() * (1 - 0.08 * 0.01)
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.08), rtol=1e-2, atol=1e-4)
    assert attempt.steps == 1
    with redefined(victim.backbone.towers, attempt.change.ids, attempt.change.vectors):
        own = encode(victim.pipe, PROMPT)
    assert torch.equal(own, encode(victim.pipe, PROMPT))


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("A cat, two cats", "A X, two X"), ("a category", "X a category"), ("Cat in a hat", "X in a hat"), ("", "X ")],
)
def test_a_word_takes_the_concept_s_place(prompt: str, wanted: str) -> None:
    assert named_by(prompt, ["cat"], "X") == wanted


# Tokens that are searched --------------------------------------------------------------------------------------------


def test_p4d_moves_vectors_by_the_gradient_at_the_nearest_tokens(victim: Victim) -> None:
    method = P4D.configured("smoke", tokens=3, steps=2, every=1, learning_rate=0.5)
    tried = list(method.attempts(victim, SAMPLE))
    pipe, tower = victim.pipe, victim.backbone.reader
    table = paths.token_table(pipe.text_encoder).weight.detach()
    choices = choosable(tower, "words")
    generator = torch.Generator().manual_seed(SAMPLE.seed)
    ids = choices[torch.randint(len(choices), (3,), generator=generator)]
    clean, told = victim.reference(SAMPLE, 1), encode(victim.stock, PROMPT)
    v = table[ids].clone()
    mean = spread = torch.zeros_like(v)
    for step in (1, 2):
        cosines = [[float(torch.cosine_similarity(row, table[c], dim=0)) for c in choices.tolist()] for row in v]
        tokens = [choices[int(np.argmax(row))].item() for row in cosines]
        t = torch.randint(1000, (1,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        kept = pipe.scheduler.alphas_cumprod[t].view(1, 1, 1, 1)
        x = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        at = table[tokens].clone().requires_grad_()
        whole = pipe.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
        whole[0, 1:5] = torch.tensor([*tokens, pipe.tokenizer.eos_token_id])
        handle = paths.token_table(pipe.text_encoder).register_forward_hook(
            lambda _m, _a, out, at=at: torch.cat([out[:, :1], at[None], out[:, 4:]], 1)
        )
        own = pipe.text_encoder(whole).last_hidden_state
        handle.remove()
        with torch.no_grad():
            wanted = victim.stock.unet(x, t, told).sample
        loss = (pipe.unet(x, t, own).sample - wanted).square().mean()
        (slope,) = torch.autograd.grad(loss, at)
        assert tried[step - 1].loss == pytest.approx(loss.item(), rel=1e-4)
        mean, spread = 0.9 * mean + 0.1 * slope, 0.999 * spread + 0.001 * slope.square()
        v = v * (1 - 0.5 * 0.1)
        v = v - 0.5 * (mean / (1 - 0.9**step)) / ((spread / (1 - 0.999**step)).sqrt() + 1e-8)
        best = choices[nearest(v, table[choices])].tolist()
        assert victim.backbone.reader.word_ids(tried[step - 1].text) == best


def test_p4d_keeps_a_prompt_and_puts_tokens_between() -> None:
    layout = between([10, 11, 12, 13, 14, 15, 16], 3)
    assert layout.ids([1, 2]) == [10, 11, 12, 1, 13, 14, 15, 2, 16]
    assert layout.positions == [3, 7]
    assert between([10], 3).ids([1]) == [10, 1]
    assert alone(2).ids([1, 2]) == [1, 2]


def test_what_is_told_with_a_token_s_own_vector_is_the_prompt(victim: Victim) -> None:
    backbone, tower = victim.backbone, victim.backbone.reader
    own = tower.word_ids(PROMPT)
    layout, free = between(own, 3), tower.word_ids("dog car")
    vectors = paths.token_table(tower.root).weight.detach()[free].requires_grad_()
    told = told_by(backbone, tower, layout, free, vectors, PROMPT)
    text = victim.pipe.tokenizer.decode(layout.ids(free))
    torch.testing.assert_close(told.tokens, encode(victim.pipe, text))
    gap = prediction_gap(
        backbone, backbone, told, backbone.encode([text]), torch.zeros(1, 4, 16, 16), torch.ones(1, 4, 16, 16),
        torch.tensor([500.0]),
    )  # fmt: skip
    assert gap.item() < 1e-9


def test_ring_a_bell_s_target_is_the_prompt_moved_along_the_mean_difference(victim: Victim) -> None:
    method = get("ring_a_bell").configured("smoke", tokens=2, pairs=3, population=4, generations=1, texts=1)
    (attempt,) = method.attempts(victim, SAMPLE)
    tower = victim.backbone.reader
    generator = torch.Generator().manual_seed(sample_seed(3, "pairs: cat", 3))
    pairs = paired(tower, ["cat"], "object", 3, generator)
    assert all("cat" in ahead and "cat" not in behind for ahead, behind in pairs)
    with torch.no_grad():
        along = sum(encode(victim.stock, ahead) - encode(victim.stock, behind) for ahead, behind in pairs) / 3
        target = encode(victim.stock, PROMPT) + 3.0 * along
        distance = (encode(victim.stock, attempt.text) - target).square().sum()
    assert attempt.loss == pytest.approx(distance.item(), rel=1e-4)


def test_generations_by_hand() -> None:
    population = torch.tensor([[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]])
    scores, choices = torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([7, 8, 9])

    def total(rows: Tensor) -> Tensor:
        return rows.sum(1).float()

    for seed in range(20):
        made, new = evolved(population, scores, total, choices, 0.5, 0.25, torch.Generator().manual_seed(seed))
        # By the same draws in plain loops.
        g = torch.Generator().manual_seed(seed)
        parents = [[2, 2, 2], [4, 4, 4]]
        pairs = torch.randint(2, (2, 2), generator=g).tolist()
        crossed = (torch.rand(2, generator=g) < 0.5).tolist()
        points = torch.randint(1, 3, (2,), generator=g).tolist()
        mutated = (torch.rand(2, generator=g) < 0.25).tolist()
        places, fresh = torch.randint(3, (2,), generator=g).tolist(), torch.randint(3, (2,), generator=g).tolist()
        children = []
        for number in range(2):
            child = list(parents[pairs[number][0]])
            if crossed[number]:
                child[points[number] :] = parents[pairs[number][1]][points[number] :]
            if mutated[number]:
                child[places[number]] = choices[fresh[number]].item()
            children.append(child)
        assert made.tolist() == parents + children
        assert new.tolist() == [1.0, 2.0, *map(float, map(sum, children))]


def test_mma_s_gradient_is_that_of_the_distance(victim: Victim) -> None:
    tower = victim.backbone.reader
    pipe = victim.pipe
    ids, choices = tower.word_ids("dog car"), torch.tensor(tower.word_ids("house apple blue"))
    wanted = summary(tower, tower.tokenize([PROMPT]))
    torch.testing.assert_close(wanted, pipe.text_encoder(tower.tokenize([PROMPT]).ids).pooler_output)
    got = token_gradients(tower, ids, wanted, choices)
    table = paths.token_table(pipe.text_encoder).weight.detach()
    at = table[ids].clone().requires_grad_()
    handle = paths.token_table(pipe.text_encoder).register_forward_hook(
        lambda _m, _a, out: torch.cat([out[:, :1], at[None], out[:, 3:]], 1)
    )
    found = pipe.text_encoder(prompt_of(tower, [ids]).ids).pooler_output
    handle.remove()
    (slope,) = torch.autograd.grad(1 - torch.cosine_similarity(found, wanted)[0], at)
    along = slope @ table[choices].T
    torch.testing.assert_close(got, along / along.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_mma_s_candidates_have_one_of_the_steepest_tokens_of_their_place(victim: Victim) -> None:
    slopes = torch.tensor([[3.0, -2.0, -1.0, 0.0], [-3.0, 1.0, 2.0, -4.0]])
    choices = torch.tensor([10, 11, 12, 13])
    rows = replaced([1, 2], slopes, choices, 8, 2, torch.Generator().manual_seed(0))
    assert len(rows) == 8
    assert all(row[1] == 2 and row[0] in (11, 12) for row in rows[:4])
    assert all(row[0] == 1 and row[1] in (13, 10) for row in rows[4:])
    tower = victim.backbone.reader
    cat = tower.word_ids("cat")[0]
    assert cat not in permitted(tower, torch.tensor([cat, *tower.word_ids("dog")]), ["cat"]).tolist()


def test_mma_tries_the_best_of_all_steps(victim: Victim) -> None:
    method = get("mma").configured("smoke", tokens=3, steps=3, restarts=2, candidates=12)
    tried = list(method.attempts(victim, SAMPLE))
    tower = victim.backbone.reader
    wanted = victim.stock.text_encoder(tower.tokenize([PROMPT]).ids).pooler_output
    for attempt in tried:
        found = victim.stock.text_encoder(tower.tokenize([attempt.text]).ids).pooler_output
        assert attempt.loss == pytest.approx(1 - torch.cosine_similarity(found, wanted).item(), abs=1e-4)
        assert "cat" not in attempt.text
    (none,) = get("mma").configured("smoke", tokens=3, restarts=1, control=True).attempts(victim, SAMPLE)
    assert (none.steps, none.loss) == (0, None)


# Words ---------------------------------------------------------------------------------------------------------------


def texts(attempts: Sequence[Any]) -> list[str]:
    return [attempt.text for attempt in attempts]


def test_slips_are_swaps_omissions_doubles_and_other_letters() -> None:
    def one(word: str) -> set[str]:
        made = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
        made |= {word[:i] + word[i + 1 :] for i in range(len(word))}
        made |= {word[: i + 1] + word[i:] for i in range(len(word))}
        return made | {word[:i] + c + word[i + 1 :] for i in range(len(word)) for c in "abcdefghijklmnopqrstuvwxyz"}

    made = {slip("cat", torch.Generator().manual_seed(seed)) for seed in range(200)}
    assert made <= one("cat")
    assert {"act", "ca", "caat"} <= made


def test_typos_are_in_the_concept_and_the_control_s_elsewhere(victim: Victim) -> None:
    tried = texts(list(get("typo").configured("quick").attempts(victim, SAMPLE)))
    assert 0 < len(tried) == len(set(tried)) <= 8
    assert all(text.endswith(" image in noto style") and text != PROMPT for text in tried)
    control = texts(list(get("typo").configured("quick", control=True).attempts(victim, SAMPLE)))
    assert all(text.startswith("a cat ") and text != PROMPT for text in control)


def test_rewrites_take_the_place_of_words_or_of_prompts() -> None:
    assert Rewrite("kitten").of(PROMPT, ["cat"]) == "a kitten image in noto style"
    assert Rewrite("ink", word="noto").of(PROMPT, ["cat"]) == "a cat image in ink style"
    assert Rewrite("a small tiger", prompt=PROMPT).of(PROMPT, ["cat"]) == "a small tiger"
    assert Rewrite("x", prompt="another").of(PROMPT, ["cat"]) is None
    assert Rewrite("x", word="dog").of(PROMPT, ["cat"]) is None
    assert place_of("Two Cats", ["cat"]).group() == "Cats"
    assert place_of("a category", ["cat"]) is None
