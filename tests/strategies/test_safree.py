"""SAFREE against the paper's plain arithmetic: numpy's pseudo-inverses, and a loop over passes of the denoiser."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DDIMScheduler
from torch.nn import functional as F

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.backbones import backbone_for
from erasure.carriers import filters, skips
from erasure.errors import ArtifactError, IgnoredRetainWarning, UnsupportedModelError

PROMPT, OTHER, STEPS, WEIGHT = "a photo of a cat", "a dog and a house", 6, 3.0
ALPHA = -0.5
"""At which words of a random text encoder are triggers; the tests look at the arithmetic."""
FIGURES = {"alpha": ALPHA, "against": "others", "carried": False, "phrasings": False, "most_steps": 25,
           "sharpness": 0.3, "midpoint": 2.0, "validated": True}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny_models: Any) -> Any:
    """A tiny Stable Diffusion: what a test attaches it takes off."""
    made = tiny_models["stable-diffusion"]()
    made.scheduler = DDIMScheduler.from_config(made.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def stock(pipe: Any) -> Any:
    """The same model, that nothing is ever attached to."""
    return copy.deepcopy(pipe)


@pytest.fixture
def manager(pipe: Any) -> Any:
    made = ErasureManager(pipe)
    yield made
    made.unload()


def fit(pipe: Any, **options: Any) -> Erasure:
    return erasure.erase(
        pipe, Concept("cat", synonyms="kitten"), "safree", attach=False, progress=False, **{**FIGURES, **options}
    )


def draw(pipe: Any, prompt: Any = PROMPT, **options: Any) -> torch.Tensor:
    chosen = {"height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "latent",
              "guidance_scale": WEIGHT, **options}  # fmt: skip
    count = len(prompt) if isinstance(prompt, list) else 1
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(prompt, generator=generators, **chosen).images


# The paper's arithmetic, in numpy and double precision --------------------------------------------------------------


def projection(vectors: np.ndarray) -> np.ndarray:
    """`E (E^T E)^+ E^T` of columns."""
    columns = vectors.T
    return columns @ np.linalg.pinv(columns.T @ columns) @ columns.T


def pooled(pipe: Any, rows: list[list[int]]) -> np.ndarray:
    with torch.no_grad():
        return np.stack([pipe.text_encoder(torch.tensor([row])).pooler_output[0].double().numpy() for row in rows])


def plain(pipe: Any, prompt: str, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """States of a prompt as they are and with triggers projected, and the last of 50 steps that reads the latter."""
    own = pipe.tokenizer(prompt).input_ids
    words = len(own) - 2
    masked = [[0 if place == at + 1 else token for place, token in enumerate(own)] for at in range(words)]
    vectors = pooled(pipe, masked)
    away = np.eye(vectors.shape[1]) - projection(pooled(pipe, [pipe.tokenizer(name).input_ids for name in names]))
    inside = projection(vectors)
    distances = np.linalg.norm(vectors @ away.T, axis=1)
    found = [distances[at] >= (1 + FIGURES["alpha"]) * np.delete(distances, at).mean() for at in range(words)]
    backbone = backbone_for(pipe)
    states = backbone.encode([prompt]).tokens[0].detach()
    every = torch.from_numpy(states.double().numpy() @ (away @ inside).T)
    z = 1 - float(F.cosine_similarity(every[: words + 2], states[: words + 2].double(), dim=-1).mean())
    last = round(FIGURES["most_steps"] / (1 + math.exp(-FIGURES["sharpness"] * (10 * z - FIGURES["midpoint"]))))
    places = [at + 1 for at in range(words) if found[at]]
    safe = states.clone()
    safe[places] = every[places].to(states)
    return states, safe, last


def plain_loop(pipe: Any, prompt: str, seed: int, *, factors: Any = None, strength: float = 1.0) -> torch.Tensor:
    """The paper's sampling, one pass for each prediction or one of both prompts where features are compared."""
    backbone = backbone_for(pipe)
    states, safe, last = plain(pipe, prompt, ["cat", "kitten"])
    safe = states + strength * (safe - states)
    null = backbone.encode([""]).tokens[0]
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, *backbone.latents.shape(32, 32), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            filtered = index * 50 / STEPS <= last
            told = safe if filtered else states
            without = pipe.unet(x, t, encoder_hidden_states=null[None]).sample
            if filtered and factors is not None:
                own = both(pipe.unet, x, t, torch.stack([told, states]), factors)[:1]
            else:
                own = pipe.unet(x, t, encoder_hidden_states=told[None]).sample
            x = scheduler.step(without + WEIGHT * (own - without), t, x).prev_sample
    return x


def both(unet: Any, x: torch.Tensor, t: torch.Tensor, told: torch.Tensor, factors: Any) -> torch.Tensor:
    """A pass in which the first row's features are compared with the second's, block by block."""
    widest, second, *_ = sorted(set(unet.config.block_out_channels), reverse=True)
    handles = []

    def compare(block: Any) -> Any:
        def change(module: Any, args: Any, kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            handed, given = list(kwargs["res_hidden_states_tuple"]), kwargs["hidden_states"].shape[1]
            for index, part in enumerate(module.resnets):
                factor = {widest: factors[0], second: factors[1]}.get(given)
                if factor is not None:
                    handed[-1 - index] = plain_filter(handed[-1 - index], factor)
                given = part.out_channels
            return args, {**kwargs, "res_hidden_states_tuple": tuple(handed)}

        return block.register_forward_pre_hook(change, with_kwargs=True)

    handles = [compare(block) for block in unet.up_blocks]
    try:
        return unet(torch.cat([x, x]), t, encoder_hidden_states=told).sample
    finally:
        for handle in handles:
            handle.remove()


def plain_filter(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Equation 8, frequency by frequency: the middle 2 x 2 of the shifted spectrum is low."""
    safe, own = (np.fft.fftshift(np.fft.fft2(row.double().numpy()), axes=(-2, -1)) for row in features)
    rows, columns = (size // 2 for size in features.shape[-2:])
    for channel in range(len(safe)):
        for row in (rows - 1, rows):
            for column in (columns - 1, columns):
                if abs(safe[channel, row, column]) > abs(own[channel, row, column]):
                    safe[channel, row, column] *= factor
    changed = np.fft.ifft2(np.fft.ifftshift(safe, axes=(-2, -1))).real
    return torch.stack([torch.from_numpy(changed).to(features), features[1]])


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_drawing_is_the_papers(pipe: Any, stock: Any, manager: ErasureManager, strength: float) -> None:
    before = draw(pipe)
    *_, last = plain(stock, PROMPT, ["cat", "kitten"])
    assert 0 < last < 50 * (STEPS - 1) / STEPS, "some steps are filtered, and some are not"
    manager.add(fit(pipe, reattention=False), strength=strength)
    found = draw(pipe)
    assert_close(found, plain_loop(stock, PROMPT, 0, strength=strength))
    assert float((found - before).abs().max()) > 1e-3
    manager.unload()
    assert torch.equal(draw(pipe), before)


def test_features_are_held_below_those_of_the_prompt_as_it_is(pipe: Any, stock: Any, manager: ErasureManager) -> None:
    manager.add(fit(pipe, widest=0.9, second=0.2))
    found = draw(pipe)
    assert_close(found, plain_loop(stock, PROMPT, 0, factors=(0.9, 0.2)))
    manager.unload()
    manager.add(fit(pipe, reattention=False))
    assert float((found - draw(pipe)).abs().max()) > 1e-4


def test_every_prompt_of_a_batch_has_its_own_filter(pipe: Any, stock: Any, manager: ErasureManager) -> None:
    manager.add(fit(pipe))
    together = draw(pipe, [PROMPT, OTHER])
    for row, prompt in enumerate([PROMPT, OTHER]):
        assert_close(together[row : row + 1], plain_loop(stock, prompt, row, factors=(0.9, 0.2)))


def test_a_prompt_without_a_trigger_and_negative_prompts_stay_to_the_bit(pipe: Any, manager: ErasureManager) -> None:
    before, negative = draw(pipe), draw(pipe, "", negative_prompt=OTHER)
    manager.add(fit(pipe, alpha=10.0))
    assert torch.equal(draw(pipe), before)
    manager.unload()
    manager.add(fit(pipe))
    assert torch.equal(draw(pipe, "", negative_prompt=OTHER), negative)


def test_embeddings_that_the_pipeline_has_encoded_are_known_again(pipe: Any, manager: ErasureManager) -> None:
    manager.add(fit(pipe))
    own, null = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    assert torch.equal(draw(pipe), draw(pipe, None, prompt_embeds=own, negative_prompt_embeds=null))


def test_a_drawing_on_a_picture_counts_steps_from_its_own_first(
    pipe: Any, stock: Any, manager: ErasureManager
) -> None:
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    calls: list[bool] = []
    states, _, _ = plain(stock, PROMPT, ["cat", "kitten"])
    manager.add(fit(pipe, reattention=False, most_steps=10, sharpness=0.0))

    def look(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(bool(torch.equal(kwargs["encoder_hidden_states"][1], states)))

    attention = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2"))
    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.warns(UserWarning, match="picture"):
        other(PROMPT, image=picture, strength=0.5, num_inference_steps=12, guidance_scale=WEIGHT)
    handle.remove()
    # Six of twelve steps are left, and 1 + 5 of 50 are filtered: one of six.
    assert calls == [False, True, True, True, True, True]


def test_triggers_are_what_the_paper_says() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, basis = torch.randn(6, 12, generator=generator), filters.span(torch.randn(3, 12, generator=generator))
    distances = [float(np.linalg.norm(v - projection(basis.numpy()) @ v)) for v in vectors.double().numpy()]
    for alpha in (-0.1, 0.0, 0.1, 0.3):
        found = filters.triggers(vectors, vectors[0], basis, alpha).tolist()
        assert found == [
            d >= (1 + alpha) * float(np.mean(distances[:at] + distances[at + 1 :])) for at, d in enumerate(distances)
        ]
        against = filters.triggers(vectors[1:], vectors[0], basis, alpha, True).tolist()
        assert against == [d >= (1 + alpha) * distances[0] for d in distances[1:]]


def test_a_span_leaves_out_what_others_say_already() -> None:
    rows = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    basis = filters.span(torch.cat([rows, rows.sum(0, keepdim=True)]))
    assert len(basis) == 2
    np.testing.assert_allclose((basis.T @ basis).numpy(), projection(rows.double().numpy()), atol=1e-6)


def test_attenuated_features_are_equation_8() -> None:
    features = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(2))
    found = skips.attenuated(features[:1], features[1:], torch.tensor([0.3]))
    torch.testing.assert_close(found[0], plain_filter(features, 0.3)[0], atol=1e-5, rtol=1e-5)


def test_features_of_a_transformer_cannot_be_compared(tiny_models: Any) -> None:
    pipe = tiny_models["flux"]()
    with pytest.raises(UnsupportedModelError, match="a transformer hands none"):
        fit(pipe, reattention=True)
    made = fit(pipe)
    assert {key: one.attenuation.numel() for key, one in made.edits.filters.items()} == {
        "transformer/text_encoder_2": 0
    }


def test_what_is_to_survive_is_said_to_have_no_effect(pipe: Any) -> None:
    with pytest.warns(IgnoredRetainWarning, match="safree keeps nothing"):
        erasure.erase(pipe, Concept("cat", retain="dog"), "safree", attach=False, progress=False)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("basis", torch.ones(1, 32), "not orthonormal"),
        ("figures", torch.tensor([0.0, 51.0, 1.0, 0.0]).double(), "at most 51 of 50"),
        ("attenuation", torch.tensor([2.0, 0.5]), "amplifies"),
        ("place", torch.tensor([0, 0, -1]), "below 0"),
        ("marks", torch.tensor([1.0, 2.0, 3.0]), "does not fit together"),
    ],
)
def test_a_filter_that_is_damaged_is_refused(pipe: Any, field: str, value: torch.Tensor, message: str) -> None:
    made = fit(pipe)
    ((key, one),) = made.edits.filters.items()
    made.edits.filters[key] = one._replace(**{field: value})
    with pytest.raises(ArtifactError, match=message):
        made.edits.check()
