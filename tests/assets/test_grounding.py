"""Words that draw: which token names which object, where it is, and the loss that ties one to the other."""

from __future__ import annotations

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from erasure import assets
from erasure.assets.build import everything, words
from erasure.assets.build.export import export
from erasure.assets.build.fit import note
from erasure.assets.build.grounding import grounding_loss, object_masks, object_tokens, without_end
from erasure.assets.scenes import Scene, caption, render
from erasure.assets.world import SIDED_PHRASES, noun_phrase

PAIR = Scene(("cat", "dog"), "noto", "white", ((2, 0), (-2, 0)))


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(assets.path("canvas-sd") / "tokenizer")


def ids_of(tokenizer: CLIPTokenizer, *captions: str) -> torch.Tensor:
    return tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids


def test_objects_are_found_by_name_synonym_and_group_in_either_order(tokenizer) -> None:
    captions = (
        "a dog and a cat",
        "a puppy next to a kitten",
        "an animal and a cat",
        "an animal and an animal",
        "a cat",
    )
    ids = ids_of(tokenizer, *captions)
    marked = object_tokens(tokenizer, ids, [PAIR] * 5)
    named = [
        [tokenizer.decode(row[tokens[:, n] > 0]).strip() for n in range(2)]
        for row, tokens in zip(ids, marked, strict=True)
    ]
    # "an animal" may be the cat as well, so the cat of the third caption has two words, and none is marked.
    assert named == [["cat", "dog"], ["kitten", "puppy"], ["", "animal"], ["", ""], ["cat", ""]]


def test_masks_are_the_renderers_cover_of_each_cell() -> None:
    drawn = render(PAIR).masks
    found = object_masks([PAIR, Scene((), "noto", "white")], 16)
    wanted = drawn.reshape(2, 16, 4, 16, 4).mean((2, 4))
    assert np.allclose(found[0].numpy(), wanted)
    assert not found[1].any()


def test_what_follows_the_words_is_the_empty_prompts(tokenizer) -> None:
    ids = ids_of(tokenizer, "a cat", "")
    states, empty = torch.randn(2, ids.shape[1], 3), torch.randn(ids.shape[1], 3)
    changed = without_end(states, ids, empty, tokenizer.eos_token_id)
    assert torch.equal(changed[0, :3], states[0, :3])
    assert torch.equal(changed[0, 3:], empty[3:])
    assert torch.equal(changed[1], torch.cat([states[1, :1], empty[1:]]))


def test_loss_is_least_where_words_draw_their_share_on_their_objects() -> None:
    masks = object_masks([PAIR], 16)
    known = torch.tensor([[True, True]])
    right = {"layer": 0.6 * torch.nn.functional.adaptive_avg_pool2d(masks, 8)}
    swapped = {"layer": right["layer"].flip(1)}
    even = {"layer": torch.full_like(right["layer"], float(right["layer"].mean()))}
    best, worst, middle = (float(grounding_loss(maps, masks, known, 0.6)) for maps in (right, swapped, even))
    assert best < middle < worst
    # The plain arithmetic of a cross-entropy.
    p = right["layer"].double().clamp(1e-6, 1 - 1e-6)
    wanted = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert best == pytest.approx(float(wanted), rel=1e-4)


def test_an_object_whose_word_is_unknown_has_no_loss() -> None:
    masks = object_masks([PAIR], 16)
    maps = {"layer": torch.rand(1, 2, 8, 8, requires_grad=True)}
    grounding_loss(maps, masks, torch.tensor([[True, False]]), 0.6).backward()
    gradient = maps["layer"].grad
    assert gradient[:, 0].any()
    assert not gradient[:, 1].any()
    assert grounding_loss(maps, masks, torch.tensor([[False, False]]), 0.6).item() == 0


def test_captions_name_two_objects_in_either_order() -> None:
    rng = np.random.default_rng(0)
    texts = [caption(PAIR, rng, synonyms=0, groups=0) for _ in range(200)]
    sided = [text for text in texts if "left" in text or "right" in text]
    free = [text for text in texts if text not in sided]
    ahead = np.mean([text.index("cat") < text.index("dog") for text in free])
    assert 0.35 < ahead < 0.65
    left, right = noun_phrase("cat"), noun_phrase("dog")
    assert all(any(form.format(left=left, right=right) in text for form in SIDED_PHRASES) for text in sided)


def test_words_of_the_shipped_model_lie_on_their_objects() -> None:
    pipe = words.stock()
    found = words.figures(words.attention(pipe, words.plan()[::10], steps=4))
    assert found["word_share"] >= 0.08
    assert max(value for name, value in found.items() if name.startswith("word_auc")) >= 0.9


def test_shipped_model_draws_by_words_alone() -> None:
    found = words.drawn_by_words_alone(words.stock(), words.plan()[::30])
    assert found["words_alone_object"] == 1.0


def test_everything_runs_each_step_once_and_keeps_what_it_prints(tmp_path, monkeypatch) -> None:
    def few(out, into):
        return [[everything.Step("first", ("platform",)), everything.Step("other", ("platform", "--terse"))]]

    monkeypatch.setattr(everything, "steps", few)
    hours = everything.run(tmp_path, 2)
    assert set(hours) == {"first", "other"}
    assert (tmp_path / "first.md").read_text().strip()
    (tmp_path / "first.md").write_text("kept")
    everything.run(tmp_path, 1)
    assert (tmp_path / "first.md").read_text() == "kept"
    assert set(json.loads((tmp_path / "hours.json").read_text())) == {"first", "other"}


def test_a_step_that_fails_is_named_and_leaves_the_others_results(tmp_path, monkeypatch) -> None:
    def few(out, into):
        return [[everything.Step("broken", ("no_such_module",)), everything.Step("whole", ("platform",))]]

    monkeypatch.setattr(everything, "steps", few)
    with pytest.raises(SystemExit, match="broken"):
        everything.run(tmp_path, 1)
    assert not (tmp_path / "broken.md").exists()
    assert "no_such_module" in (tmp_path / "broken.log").read_text()
    assert (tmp_path / "whole.md").is_file()


def test_every_measuring_step_exists(tmp_path) -> None:
    from erasure.assets.build import __main__ as build

    for step in (step for group in everything.steps(tmp_path, tmp_path / "measured") for step in group):
        if step.arguments[0] == "erasure.assets.build":
            asked = getattr(build, step.arguments[1])
            flags = {word[2:] for word in step.arguments if word.startswith("--")} - {"no-told"}
            assert flags <= set(inspect.signature(asked).parameters), step.name


def test_figures_are_written_by_every_step_of_everything_that_can(tmp_path) -> None:
    from erasure.assets.build import __main__ as build

    given = [step for group in everything.steps(tmp_path, tmp_path / "measured") for step in group]
    writing = {step.name for step in given if "--into" in step.arguments}
    able = {
        step.name for step in given
        if step.arguments[0] == "erasure.assets.build"
        and "into" in inspect.signature(getattr(build, step.arguments[1])).parameters
    }  # fmt: skip
    assert able - writing == {"methods-1", "methods-2", "methods-3", "methods-4", "gates-untold"}
    assert not any("--into" in step.arguments for group in everything.steps(tmp_path) for step in group)
    for group in everything.steps(tmp_path, tmp_path / "measured"):
        # A suite's file is named after it.
        names = [s.name if s.arguments[1] == "suite" else s.arguments[1] for s in group if "--into" in s.arguments]
        assert len(set(names)) == len(names), "two steps at once would write into one file"


def test_options_of_a_training_are_noted_when_they_change(tmp_path) -> None:
    file = tmp_path / "unet.options.json"
    for step, share in ((0, 0.25), (400, 0.25), (1200, 0.4)):
        note(file, step, {"emptied": share})
    assert json.loads(file.read_text()) == [{"from_step": 0, "emptied": 0.25}, {"from_step": 1200, "emptied": 0.4}]
    note(file, 0, {"emptied": 0.5})
    assert json.loads(file.read_text()) == [{"from_step": 0, "emptied": 0.5}]


def test_a_denoiser_that_went_on_takes_the_shipped_ones_place(tmp_path) -> None:
    work, out = tmp_path / "work", tmp_path / "assets"
    shutil.copytree(assets.path("canvas-sd") / "unet", work / "unet")
    (out / "canvas-sd").mkdir(parents=True)
    shutil.copy(assets.path("canvas-sd") / "canvas.json", out / "canvas-sd")
    (work / "unet.jsonl").write_text('{"step": 200}\n{"step": 400}\n')
    torch.save({"seconds": 1800.0}, work / "unet.ckpt")
    (work / "unet.options.json").write_text('[{"from_step": 0, "batch": 16, "processes": 2}]')
    export(work, out)
    record = json.loads((out / "canvas-sd" / "canvas.json").read_text())["training"]
    assert [record[of]["words"] for of in ("steps", "samples", "hours")] == [400, 12_800, 0.5]
    written = out / "canvas-sd" / "unet"
    assert str(tmp_path) not in (written / "config.json").read_text()
    weights = [load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (written, work / "unet")]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
