"""The noise of a sample is its own: batch size, order and neighbours do not change it."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from erasure.errors import EvaluationError, UnsupportedModelError
from erasure.eval.generation import batches, generate
from erasure.eval.samples import Sample, drawing, initial_noise, sample_seed


def samples(count: int = 5) -> list[Sample]:
    return [
        Sample(f"s{i}", f"a photo of a cat {i}", seed=i, role="retain", num_inference_steps=2, height=32, width=32)
        for i in range(count)
    ]


def images_by_id(pipe: Any, table: list[Sample], batch_size: int) -> dict[str, np.ndarray]:
    return {
        sample.sample_id: np.asarray(image, dtype=np.int16)
        for batch, images in generate(pipe, table, batch_size)
        for sample, image in zip(batch, images, strict=True)
    }


def test_noise_depends_on_the_seed_only() -> None:
    table = samples()
    first = {s.sample_id: initial_noise(s, (4, 16, 16))[0] for s in table}
    torch.manual_seed(123)
    random.Random(0).shuffle(table)
    second = {s.sample_id: initial_noise(s, (4, 16, 16))[0] for s in table}
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["s0"], first["s1"])
    big = Sample("big", "", seed=2**63 + 5, role="retain")
    assert initial_noise(big, (4, 2, 2))[0].shape == (4, 2, 2)


def test_noise_is_what_the_pipeline_would_draw_from_that_generator(tiny_pipe) -> None:
    sample = samples(1)[0]
    ours = images_by_id(tiny_pipe, [sample], 1)["s0"]
    stock = tiny_pipe(
        sample.prompt, negative_prompt="", generator=torch.Generator().manual_seed(0), num_inference_steps=2,
        guidance_scale=3.0, height=32, width=32,
    ).images[0]  # fmt: skip
    assert np.array_equal(ours, np.asarray(stock))


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_images_do_not_depend_on_batch_order_or_share(tiny_pipe, scheduler) -> None:
    if scheduler is not None:
        tiny_pipe.scheduler = scheduler.from_config(tiny_pipe.scheduler.config)
    table = samples()
    whole = images_by_id(tiny_pipe, table, 5)
    shuffled = random.Random(1).sample(table, 5)
    for other in (
        images_by_id(tiny_pipe, table, 1),
        images_by_id(tiny_pipe, shuffled, 2),
        images_by_id(tiny_pipe, table[0::2], 3) | images_by_id(tiny_pipe, table[1::2], 3),
    ):
        for key, image in whole.items():
            assert np.abs(other[key] - image).max() <= 1


def test_batches_share_settings() -> None:
    table = [*samples(3), Sample("wide", "a cat", 0, "retain", width=128), *samples(2)]
    found = list(batches(table, 4))
    assert [len(batch) for batch in found] == [4, 1, 1]
    assert all(len({sample.settings for sample in batch}) == 1 for batch in found)


def test_the_progress_bar_setting_is_given_back(tiny_pipe) -> None:
    tiny_pipe.set_progress_bar_config(desc="mine")
    list(generate(tiny_pipe, samples(1)))
    assert tiny_pipe._progress_bar_config == {"desc": "mine"}
    del tiny_pipe._progress_bar_config
    list(generate(tiny_pipe, samples(1)))
    assert not hasattr(tiny_pipe, "_progress_bar_config")


def test_a_safety_checker_is_refused() -> None:
    pipe = SimpleNamespace(safety_checker=object())
    with pytest.raises(EvaluationError, match="safety_checker=None"):
        next(generate(pipe, samples(1)))


@pytest.mark.parametrize("family", ["stable-diffusion-xl", "stable-diffusion-3", "flux", "chroma"])
def test_every_family_draws_what_its_pipeline_does(tiny_models, family) -> None:
    """From the noise that it would draw itself, with its own way of guidance, of packing and of lengths."""
    pipe = tiny_models[family]()
    table = [replace(sample, negative_prompt="" if family == "flux" else "fog") for sample in samples(2)]
    ours = images_by_id(pipe, table, 2)
    for sample in table:
        options = drawing(pipe).call_options(3.0, 2, (32, 32), [sample.negative_prompt])
        noise = torch.Generator().manual_seed(sample.seed)
        stock = np.asarray(pipe([sample.prompt], generator=noise, **options).images[0], dtype=np.int16)
        assert np.abs(ours[sample.sample_id] - stock).max() <= 1


def test_a_pipeline_of_no_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no supported family"):
        drawing(SimpleNamespace(components={}))


def test_seeds_of_prompts_differ_and_repeat() -> None:
    assert sample_seed(0, "a cat", 0) == sample_seed(0, "a cat", 0)
    assert len({sample_seed(s, p, i) for s in (0, 1) for p in ("a cat", "a dog") for i in (0, 1)}) == 8


def test_the_key_leaves_out_what_does_not_change_the_image() -> None:
    first = Sample("a", "a cat", 1, "target", weight=2.0)
    assert first.key == Sample("b", "a cat", 1, "retain", unsafe=True).key
    assert first.key != Sample("a", "a cat", 1, "target", guidance_scale=7.5).key
