"""Guidance by attention: losses in closed form, subjects from words, and nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from erasure.backbones import TextTower, text_towers
from erasure.errors import DivergenceError, MaskError, OptionError
from erasure.pipelines import StableDiffusionAStarPipeline, StableDiffusionXLAStarPipeline
from erasure.pipelines import attention_losses as losses
from erasure.pipelines.a_star import composition_sites
from erasure.pipelines.subjects import subject_weights

SUBJECTS = ["cat", "dog"]
PROMPT = "a cat and a dog"


@pytest.fixture
def pipe(stock: Any) -> Any:
    kind = StableDiffusionXLAStarPipeline if isinstance(stock, StableDiffusionXLPipeline) else None
    made = (kind or StableDiffusionAStarPipeline).from_pipe(stock)
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: Any, prompt: Any = PROMPT, subjects: Any = SUBJECTS, **options: Any) -> Tensor:
    settings = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "pt",
                "height": 32, "width": 32, "step_size": 50.0, "grid": 16}  # fmt: skip
    return pipe(prompt, subjects=subjects, **settings | options).images


def maps_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).view(1, len(rows), 1, -1)


# Losses -------------------------------------------------------------------------------------------------------------


def test_segregation_of_disjoint_and_equal_maps() -> None:
    both = torch.tensor([[True, True]])
    assert losses.segregation(maps_of([1.0, 0, 0, 0], [0, 0, 1, 1]), both).item() == 0
    assert losses.segregation(maps_of([1.0, 2, 0, 0], [1.0, 2, 0, 0]), both).item() == pytest.approx(0.5)
    # min 1 + 0, sums 3 + 3
    assert losses.segregation(maps_of([2.0, 1, 0], [1.0, 0, 2]), both).item() == pytest.approx(1 / 6)


def test_segregation_sums_over_pairs_that_are_there() -> None:
    three = maps_of([1.0, 0], [1.0, 0], [1.0, 0])
    assert losses.segregation(three, torch.tensor([[True, True, True]])).item() == pytest.approx(1.5)
    assert losses.segregation(three, torch.tensor([[True, False, True]])).item() == pytest.approx(0.5)
    assert losses.segregation(three, torch.tensor([[True, False, False]])).item() == 0


def test_retention_is_half_where_nothing_moved_and_one_where_all_did() -> None:
    kept, one = maps_of([1.0, 1, 0, 0]), torch.tensor([[True]])
    assert losses.retention(kept, kept, one).item() == pytest.approx(0.5)
    assert losses.retention(maps_of([0.0, 0, 1, 1]), kept, one).item() == 1
    two = torch.cat([kept, kept], 1)
    assert losses.retention(two, two, torch.tensor([[True, True]])).item() == pytest.approx(1.0)
    assert losses.retention(two, two, torch.tensor([[True, False]])).item() == pytest.approx(0.5)


def test_excitation_is_of_the_most_neglected_subject() -> None:
    maps = maps_of([0.9, 0.1], [0.2, 0.3])
    assert losses.excitation(maps, torch.tensor([[True, True]])).item() == pytest.approx(0.7)
    assert losses.excitation(maps, torch.tensor([[True, False]])).item() == pytest.approx(0.1)


def test_what_is_high_and_what_is_rivalled() -> None:
    assert losses.where_high(maps_of([0.2, 0.6, 1.0]), 0.5).flatten().tolist() == [0, 1, 1]
    maps = torch.rand(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    words = torch.tensor([[False, True, True, False]])
    shares = losses.rivalled(maps, words, 100.0)
    assert torch.equal(shares[:, [0, 3]], torch.zeros(1, 2, 2, 2))
    wanted = (100 * (maps[:, 1] - maps[:, 2])).sigmoid()
    assert torch.allclose(shares[:, 1], wanted, atol=1e-6)


@pytest.mark.parametrize("loss", ["segregation", "retention", "excitation"])
def test_losses_have_exact_gradients(loss: str) -> None:
    maps = torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    kept = torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    present = torch.tensor([[True, True, True], [True, True, False]])
    arguments = (kept, present) if loss == "retention" else (present,)
    assert torch.autograd.gradcheck(lambda m: getattr(losses, loss)(m, *arguments), maps)


# Subjects -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def towers(tiny_pipe_original: Any) -> list[TextTower]:
    return text_towers(tiny_pipe_original)


def test_subjects_are_found_by_their_words(towers: Any) -> None:
    words = subject_weights(towers, ["a cat and a dog", "van gogh"], [["cat", "dog"], ["van gogh"]])
    assert words.weights.shape == (2, 77, 2)
    assert words.weights[0, :, 0].nonzero()[:, 0].tolist() == [2]
    assert words.weights[0, :, 1].nonzero()[:, 0].tolist() == [5]
    assert words.weights[1, :3, 0].tolist() == [0, 0.5, 0.5]
    assert words.present.tolist() == [[True, True], [True, False]]
    assert words.inside.sum(1).tolist() == [5, 2]


def test_a_word_of_several_tokens_is_one_subject(towers: Any) -> None:
    spelled = len(towers[0].word_ids("zebra"))
    words = subject_weights(towers, ["a zebra and a cat"], ["zebra", "cat"])
    assert spelled > 1
    assert (words.weights[0, :, 0] > 0).sum() == spelled
    assert words.weights[0].sum(0).tolist() == pytest.approx([1, 1])


def test_the_second_of_two_like_subjects_is_another(towers: Any) -> None:
    words = subject_weights(towers, ["a cat and a cat"], ["cat", "cat"])
    assert words.weights[0].nonzero()[:, 0].tolist() == [2, 5]


def test_subjects_that_are_not_there_are_refused(pipe: Any, towers: Any) -> None:
    for subjects in (["cat", "house"], ["cat", "cat"], [""]):
        with pytest.raises(OptionError, match="not among the words"):
            run(pipe, subjects=subjects)
    with pytest.raises(OptionError, match="not among the words"):
        subject_weights(towers, ["a photo " * 60 + "cat"], ["cat"])
    with pytest.raises(OptionError, match="2 prompts need"):
        run(pipe, [PROMPT] * 2, [["cat"]])
    with pytest.raises(OptionError, match="option 'loss' is 'none'"):
        run(pipe, loss="none")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_vector_of_a_learned_token_is_its_subject(
    kind: str, tiny_pipe: Any, tiny_xl_original: Any, teach: Any
) -> None:
    pipe = tiny_pipe
    teach(pipe, "a", "cat")
    if kind == "sdxl":
        pipe = copy.deepcopy(tiny_xl_original)
        pipe.register_modules(tokenizer_2=copy.deepcopy(pipe.tokenizer))
        teach(pipe, "a", "cat")
        teach(pipe, "a", "cat", "a", suffix="_2")
    words = subject_weights(text_towers(pipe), ["a dog and <my-pet> in ink style"], ["<my-pet>", "dog"])
    expected = {"sd": {4: 1 / 2, 5: 1 / 2}, "sdxl": {4: 5 / 12, 5: 5 / 12, 6: 1 / 6}}[kind]
    assert words.weights[0, :, 0].nonzero()[:, 0].tolist() == list(expected)
    assert words.weights[0, list(expected), 0].tolist() == pytest.approx(list(expected.values()))
    assert words.weights[0, :, 1].nonzero()[:, 0].tolist() == [2]
    assert words.inside[0].nonzero()[:, 0].tolist() == list(range(1, {"sd": 9, "sdxl": 10}[kind]))
    with pytest.raises(OptionError, match="not among the words"):
        subject_weights(text_towers(pipe), ["a dog and <my-pet>"], ["cat"])


# Drawing ------------------------------------------------------------------------------------------------------------


def test_without_a_step_it_is_the_stock_pipeline(stock: Any, pipe: Any) -> None:
    settings = {"num_inference_steps": 4, "output_type": "pt", "height": 32, "width": 32}
    wanted = stock(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images
    assert torch.equal(run(pipe, step_size=0.0), wanted)
    for loss in ("a_star", "attend_and_excite"):
        assert (run(pipe, loss=loss) - wanted).abs().max() > 1e-4


def test_latents_go_down_the_gradient_of_the_loss(tiny_pipe: Any) -> None:
    """The first update against the whole UNet, its probabilities as diffusers' own processor gives them."""
    pipe = StableDiffusionAStarPipeline.from_pipe(tiny_pipe)
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs: list[Tensor] = []
    conv: Any = pipe.unet.conv_in
    handle = conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    run(pipe, latents=start, num_inference_steps=1, guidance_scale=3.0)
    handle.remove()
    moved = inputs[-1][1:]
    assert torch.equal(inputs[-1][:1], moved)

    from diffusers.models.attention_processor import Attention

    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    z = start.clone().requires_grad_(True)
    maps: list[Tensor] = []
    handles = []
    for site in composition_sites(pipe.unet, (16, 16), 16):

        def watch(attn: Attention, args: Any, kwargs: Any) -> None:
            q = attn.head_to_batch_dim(attn.to_q(args[0]))
            k = attn.head_to_batch_dim(attn.to_k(kwargs["encoder_hidden_states"]))
            maps.append(attn.get_attention_scores(q, k).mean(0).T.view(77, 16, 16)[[2, 5]])

        handles.append(site.module.register_forward_pre_hook(watch, with_kwargs=True))
    pipe.unet(z, pipe.scheduler.timesteps[0], encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    mean = losses.ranged(losses.smoothed(torch.stack(maps).mean(0)[None]))
    loss = torch.minimum(mean[:, 0], mean[:, 1]).sum() / (mean[:, 0] + mean[:, 1]).sum()
    wanted = start - 50 * torch.autograd.grad(loss, z)[0]
    assert (wanted - start).abs().max() > 1e-3
    assert (moved - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("loss", ["a_star", "attend_and_excite"])
def test_a_batch_equals_its_parts(pipe: Any, loss: str) -> None:
    prompts, subjects = [PROMPT, "a car"], [SUBJECTS, ["car"]]
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    settings = {"num_images_per_prompt": 2, "num_inference_steps": 3, "loss": loss, "refinements": 2}
    both = run(pipe, prompts, subjects, generator=seeds(), **settings)
    parts = [run(pipe, prompts[i], subjects[i], generator=seeds()[2 * i : 2 * i + 2], **settings) for i in range(2)]
    assert (both - torch.cat(parts)).abs().max() < 1e-3


def test_one_negative_prompt_serves_all_prompts(stock: Any, pipe: Any) -> None:
    prompts, subjects = [PROMPT, "a car"], [SUBJECTS, ["car"]]
    beside = {"negative_prompt": "a house", "guidance_scale": 3.0}
    if isinstance(stock, StableDiffusionXLPipeline):
        beside |= {"negative_prompt_2": "a gun", "prompt_2": "a drawing"}
        prompts, subjects = [PROMPT, PROMPT], SUBJECTS
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(2)]  # noqa: E731
    one = run(pipe, prompts, subjects, generator=seeds(), **beside)
    for form in (list, tuple):
        listed = {name: form([text] * 2) if isinstance(text, str) else text for name, text in beside.items()}
        assert torch.equal(run(pipe, prompts, subjects, generator=seeds(), **listed), one)
    assert torch.isfinite(run(pipe, **beside)).all()
    assert not torch.equal(run(pipe, prompts, subjects, generator=seeds(), guidance_scale=3.0), one)


def test_things_follow_a_layout() -> None:
    """On the embedded model, with the same noise: each thing is found on the side that was asked for."""
    import erasure

    model = erasure.load_pipeline("canvas-sd", device="cpu")
    pipe = StableDiffusionAStarPipeline.from_pipe(model)
    for each in (model, pipe):
        each.set_progress_bar_config(disable=True)
    left = np.zeros((64, 64), dtype=bool)
    left[16:56, 2:30] = True
    right = left[:, ::-1].copy()

    def middles(layout: Any) -> Tensor:
        """The column in the middle of each subject, in 0-64."""
        image = pipe(
            "an apple and a rocket in noto style", subjects=["apple", "rocket"], layout=layout, num_inference_steps=10,
            guidance_scale=2.0, grid=8, step_size=100.0, segregation_until=0.4, retention_until=0.4,
            generator=torch.Generator().manual_seed(1),
        ).images[0]  # fmt: skip
        masks = model.localize(image, ["apple", "rocket"]).masks[0].double()
        return (masks.sum(1) * torch.arange(64)).sum(1) / masks.sum((1, 2))

    apple, rocket = middles([left, right])
    assert apple + 10 < rocket
    apple, rocket = middles([right, left])
    assert rocket + 10 < apple


def test_a_layout_that_means_nothing_is_refused(pipe: Any) -> None:
    left, empty = torch.zeros(32, 32), torch.zeros(32, 32)
    left[:, :16] = 1
    for layout, said in (([left], "1 masks for 2 subjects"), ([left, empty], "mask 1 of the layout covers nothing")):
        with pytest.raises(MaskError, match=said):
            run(pipe, layout=layout)


def test_prompts_and_subjects_are_texts_or_lists(pipe: Any) -> None:
    one = run(pipe, PROMPT, "cat")
    assert torch.equal(run(pipe, [PROMPT], ["cat"]), one)
    assert torch.equal(run(pipe, (PROMPT,), [["cat"]]), one)
    for prompt in ([], [None], 7, [PROMPT, 7]):
        with pytest.raises(OptionError, match="prompt"):
            run(pipe, prompt)
    for negative in (["a house"] * 3, [], 7, [None]):
        with pytest.raises(OptionError, match="negative_prompt"):
            run(pipe, [PROMPT] * 2, negative_prompt=negative)


@pytest.mark.parametrize(
    "options",
    [
        {"step_size": float("nan")}, {"step_size": -1.0}, {"step_size": True}, {"grid": 0}, {"grid": 1.5},
        {"threshold": 2.0}, {"retention_until": -0.1}, {"refine": {0.0: 7.0}}, {"refinements": -1}, {"rivals": "all"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_without_meaning_are_refused(tiny_pipe: Any, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        run(StableDiffusionAStarPipeline.from_pipe(tiny_pipe), **options)


def test_neither_the_callers_latents_nor_the_pipeline_is_changed(stock: Any, pipe: Any, draw: Any) -> None:
    before, start = draw(stock), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    given = start.clone()
    first = run(pipe, latents=given)
    assert torch.equal(given, start)
    assert torch.equal(run(pipe, latents=given), first)
    assert torch.equal(draw(stock), before)
    assert pipe._guide is None


def test_nan_is_reported_and_nothing_is_left_behind(stock: Any, pipe: Any, draw: Any) -> None:
    before = draw(stock)
    with pytest.raises(DivergenceError, match="NaN"):
        run(pipe, latents=torch.full((1, 4, 16, 16), torch.nan))

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback_on_step_end=stop)
    assert torch.equal(draw(stock), before)


def test_the_callers_callback_is_called(pipe: Any) -> None:
    seen = []

    def watch(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, sorted(tensors)))
        return tensors

    run(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [(index, ["latents", "prompt_embeds"]) for index in range(4)]


def test_localize_a_drawn_prompt(tiny_pipe_folder: Any) -> None:
    import erasure

    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "generator": torch.Generator().manual_seed(0)}
    found = pipe.localize(PROMPT, "cat", others=["dog"], call=call, num_inference_steps=4)
    call["generator"] = torch.Generator().manual_seed(0)
    drawn = pipe(PROMPT, output_type="pt", **call).images
    assert (found.images - drawn).abs().max() < 1 / 255
    again = pipe.localize(found.images, "cat", others=["dog"], num_inference_steps=4)
    assert torch.equal(again.masks, found.masks)
