"""ItD: choosing features, setting the gate, and its effect on the embedded model."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.assets.world import STYLES
from erasure.backbones import backbone_for
from erasure.carriers.reconstruction import ReconstructionEdit
from erasure.cli.main import main
from erasure.errors import ArtifactError, AttachError, ConceptError, OptionError, WrongBaseError
from erasure.sae import mining, save
from erasure.sae.detection import detect_concepts
from erasure.sae.selection import Evidence, evidence, top_sets
from erasure.strategies import get
from erasure.strategies.itd import ItD, select
from erasure.strategies.prompts import anchor_of
from erasure.world import World


def test_evidence_counts_what_is_above_the_floor() -> None:
    target = torch.tensor([[4.0, 0.0], [2.0, 1.0]])
    retain = torch.tensor([[0.5, 1.0], [0.9, 0.0], [0.0, 0.0], [0.0, 0.0]])
    found = evidence(target, retain, 0.25)
    assert found.magnitude.tolist() == [3.0, 0.5]
    assert found.target_rate.tolist() == [1.0, 0.5]
    assert found.retain_rate.tolist() == [0.25, 0.25]


def test_the_features_that_say_most_come_first_and_common_ones_not_at_all() -> None:
    found = Evidence(
        torch.tensor([1.0, 1.0, 0.9, 0.2]), torch.tensor([0.0, 0.9, 0.1, 0.0]), torch.tensor([1.0, 9.0, 5.0, 9.0])
    )
    assert select(found, ItD()) == [2, 0]
    assert select(found, ItD(features=1)) == [2]
    rarer = Evidence(torch.tensor([0.9, 1.0, 0.9, 0.2]), *found[1:])
    assert select(rarer, ItD(retain_rate=0.0, target_rate=1.0)) == []


def test_silent_latents_are_in_no_set() -> None:
    activity = torch.tensor([[0.0, 3.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    assert top_sets(activity, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert top_sets(activity, 3).sum(1).tolist() == [2, 1]


@pytest.fixture(scope="module")
def canvas() -> Any:
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def default(canvas: Any) -> Callable[[str], Erasure]:
    """The erasure of a concept with default options, made once: read it, never change it."""
    return functools.cache(lambda target: erasure.erase(canvas, target, "itd", attach=False, progress=False))


def images_of(pipe: Any, prompts: list[str], seed: int = 0, steps: int = 10) -> list[Any]:
    """Images of prompts from the same noise; two steps do where nothing is asked but whether an image changed."""
    noise = [torch.Generator().manual_seed(seed) for _ in prompts]
    return pipe(prompts, num_inference_steps=steps, guidance_scale=2.0, generator=noise).images


def bytes_of(pipe: Any, prompts: list[str]) -> list[bytes]:
    """Pixels of images of two steps, each drawn alone: what else is drawn with one may change how sums are rounded."""
    return [images_of(pipe, [prompt], steps=2)[0].tobytes() for prompt in prompts]


@pytest.fixture(scope="module")
def stock_bytes(canvas: Any) -> Callable[[str], bytes]:
    """Pixels of an image of two steps without an erasure, drawn once."""
    return functools.cache(lambda prompt: bytes_of(canvas, [prompt])[0])


def test_erases_the_concept_and_no_bit_of_anything_else(
    canvas: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], default: Any, stock_bytes: Any
) -> None:
    from erasure.eval.detectors import CanvasJudge

    prompts = ["a dog in noto style", "a castle in pixel style", ""]
    before = [stock_bytes(prompt) for prompt in prompts]
    made, manager = default("gun"), ErasureManager(canvas)
    manager.add(made)
    try:
        assert bytes_of(canvas, prompts) == before
        images = images_of(canvas, [f"a gun in {style} style" for style in ("noto", "ink")], seed=1)
        assert all("gun" not in answer.objects for answer in CanvasJudge()(images))
    finally:
        manager.unload()
    assert made.size_bytes < 100_000
    assert made.config.carriers == ["activations"]
    gate = made.config.gates["gun"]
    assert gate["features"]["tpr"] >= 0.95
    assert gate["features"]["fpr"] <= 0.01
    assert gate["probe"]["auc"] >= 0.99
    rates = [tpr for _, tpr in gate["features"]["roc"]]
    assert rates == sorted(rates)
    made.save(tmp_path / "made")
    card = (tmp_path / "made" / "README.md").read_text()
    assert f"| gun | features (decides) | {gate['features']['tpr']} |" in card
    assert Erasure.load(tmp_path / "made").config.gates["gun"]["decides"] == "features"
    assert main(["info", str(tmp_path / "made")]) == 0
    shown = capsys.readouterr().out
    assert "features (decides)" in shown
    assert str(gate["probe"]["auc"]) in shown


def test_concepts_of_a_prompt_are_told(canvas: Any) -> None:
    manager = ErasureManager(canvas)
    prompts = ["an apple on a blue background", "a car in noto style", "a house in ink style", "a house in noto style",
               "an apple and a car in ink style"]  # fmt: skip
    try:
        erasure.erase(canvas, ["apple", Concept("ink", kind="style")], "itd", name="two", progress=False)
        erasure.erase(canvas, "car", "itd", name="one", gate="probe", progress=False)
        found = detect_concepts(manager.pipe, prompts)
        assert [{name for name, one in each.items() if one.present} for each in found] == [
            {"apple"}, {"car"}, {"ink"}, set(), {"apple", "car", "ink"},
        ]  # fmt: skip
        assert all(0 <= one.score <= 1 and 0 <= one.probe <= 1 for each in found for one in each.values())
        # Where the probe decides, its score is the score.
        assert found[1]["car"].score == found[1]["car"].probe
        assert found[3]["apple"].score != found[3]["apple"].probe
        assert manager.verify() == 2
        assert detect_concepts(manager.pipe, prompts[1]) == [found[1]]
    finally:
        manager.unload()
    with pytest.raises(AttachError, match="no attached erasure"):
        detect_concepts(manager.pipe, prompts)


@pytest.mark.parametrize(
    "options",
    [{"tau": -1.0}, {"mode": "clamp", "tau": -1.0}, {"mode": "replace"}, {"tokens": "word"}, {"gate": "probe"}],
)
def test_every_way_of_editing_changes_the_concept_alone(
    canvas: Any, options: dict[str, Any], stock_bytes: Any
) -> None:
    prompts = ["a gun in noto style", "a dog in noto style"]
    before = [stock_bytes(prompt) for prompt in prompts]
    made = erasure.erase(canvas, "gun", "itd", progress=False, **options)
    try:
        after = bytes_of(canvas, prompts)
    finally:
        ErasureManager(canvas).unload()
    assert before[0] != after[0]
    assert before[1] == after[1]
    (edit,) = made.edits.features.values()
    assert (edit.filler.shape[0] > 0) == (options.get("mode") == "replace")
    assert int(edit.local) == int(options.get("tokens") == "word" or options.get("mode") == "replace")


def test_shared_latents_are_stored_once_and_adding_a_concept_changes_no_other(canvas: Any, default: Any) -> None:
    alone = default("cat")
    both = erasure.erase(canvas, ["cat", "dog"], "itd", attach=False, progress=False)
    (single,), (pair,) = alone.edits.features.values(), both.edits.features.values()
    used = {int(i) for part in (pair.edits, pair.votes) for i in part[1]}
    assert used == set(range(pair.w_enc.shape[1]))
    # Once as it is, and once more for each concept that writes something else in its place.
    kept = [(tuple(read), tuple(row)) for read, row in zip(pair.w_enc.T.tolist(), pair.w_dec.tolist(), strict=True)]
    assert len(set(kept)) == len(kept)
    read = {column for column, _ in kept}
    written = int((pair.edits[1] >= len(read)).sum())
    assert len(kept) == len(read) + written
    assert (pair.edits[0] == 0).sum() == single.edits.shape[1]


def test_the_released_edit_erases_and_says_how_sure_it_is(canvas: Any, stock_bytes: Any) -> None:
    prompts = ["a gun in ink style", "a dog in noto style"]
    before = stock_bytes(prompts[0])
    # The embedded dictionary is small, and its model never read the phrasings of the released code.
    options: dict[str, Any] = {"top": 8, "phrasings": "concept", "contexts": 96, "gate_statistic": "mean"}
    made = erasure.erase(canvas, "gun", "itd", preset="released", progress=False, **options)
    manager = ErasureManager(canvas)
    try:
        (edit,) = made.edits.features.values()
        assert isinstance(edit, ReconstructionEdit)
        assert set(edit.factor.tolist()) == {-8.0, 1.0}
        found = detect_concepts(manager.pipe, prompts)
        assert found[0]["gun"].score > found[1]["gun"].score
        assert found[0]["gun"].probe is None
        assert bytes_of(canvas, prompts[:1]) != [before]
        # Target prompts open the gate by construction.
        assert all(each["gun"].present for each in detect_concepts(manager.pipe, ["a gun", "a photo of a gun"]))
    finally:
        manager.unload()


RECIPES = {
    "released": (
        ["A portrait of {}", "An image capturing {} at a public event", "An oil painting of {}", "A sketch of {}",
         "{} in an official photo"], 128, -8.0, max,
    ),
    "released-style": (
        ["Image in the style of {}", "Art inspired by {}", "Painting in the style of {}",
         "A reproduction of art by {}", "A famous artwork by {}"], 256, -6.0, statistics.fmean,
    ),
    "released-nudity": (["{}"], 128, -8.0, None),
}  # fmt: skip
"""Prompts, active latents, factor where the threshold is set, and its statistic over a prompt's tokens, as
`generate_images.py` has them for people, styles and nudity."""


@pytest.mark.parametrize("preset", RECIPES)
def test_a_released_recipe_has_the_script_s_numbers(preset: str) -> None:
    made = get("itd").configured(preset)
    assert (made.tau, made.top, made.gate_tau) == (-8.0, *RECIPES[preset][1:3])
    assert (made.parity, made.contexts, made.mining_steps) == ("itd", 0, 0)


@pytest.mark.parametrize("preset", RECIPES)
@torch.no_grad()
def test_the_released_choice_and_threshold_equal_plain_loops(
    tiny_pipe_factory: Any, make_dictionary: Any, tmp_path: Path, preset: str
) -> None:
    """Top-K sets of target prompts less those of the others, and 0.99 of the least change of a target prompt."""
    from erasure.sae import load

    pipe = tiny_pipe_factory()
    folder = make_dictionary(pipe, layer=1, d_sae=512)
    others = ["a dog", "a white car"]
    (tmp_path / "others.txt").write_text("\n".join(others))
    concept = Concept("cat", synonyms=("monet",))
    made = erasure.erase(
        pipe, concept, "itd", dictionary=str(folder), prompts=str(tmp_path / "others.txt"), preset=preset, top=5,
        attach=False, progress=False,
    )  # fmt: skip
    templates, _, tau, statistic = RECIPES[preset]
    sae, encoder = load(folder), pipe.text_encoder

    def states(prompt: str, padded: bool) -> torch.Tensor:
        ids = pipe.tokenizer(prompt, padding="max_length" if padded else False, return_tensors="pt").input_ids
        return encoder(ids, output_hidden_states=True).hidden_states[2][0]

    def kept(token: torch.Tensor) -> dict[int, float]:
        before = ((token - sae.b_dec) @ sae.W_enc + sae.b_enc).tolist()
        return {i: before[i] for i in sorted(range(512), key=lambda i: -before[i])[:4] if before[i] > 0}

    def active(prompt: str) -> set[int]:
        greatest: dict[int, float] = {}
        for token in states(prompt, padded=False)[1:]:
            for i, value in kept(token).items():
                greatest[i] = max(value, greatest.get(i, 0.0))
        return set(sorted(greatest, key=lambda i: -greatest[i])[:5])

    targets = [template.format(name) for name in ("cat", "monet") for template in templates]
    chosen = set().union(*map(active, targets)) - set().union(*map(active, ["", *others]))
    ((_, edit),) = made.edits.features.items()
    assert {i for i, factor in enumerate(edit.factor.tolist()) if factor == -8.0} == chosen
    assert chosen
    if statistic is None:
        assert float(edit.gate) == 0, "always open"
        return
    change = []
    for prompt in targets:
        tokens = []
        for position, token in enumerate(states(prompt, padded=True)):
            row = sae.b_dec.clone()
            for i, value in kept(token).items():
                row += value * (tau if i in chosen and position else 1.0) * sae.W_dec[i]
            tokens.append(float((row - token).square().mean()))
        change.append(statistic(tokens))
    assert float(edit.gate) == pytest.approx(0.99 * min(change), rel=1e-5)


def test_what_is_erased_gives_way_to_its_anchor_and_not_to_a_weapon(canvas: Any, default: Any) -> None:
    from erasure.assets.world import UNSAFE
    from erasure.eval.detectors import CanvasJudge

    judge, prompts = CanvasJudge(), [f"a cat image in {style} style" for style in ("ink", "noto", "pixel")]
    seen, manager = {}, ErasureManager(canvas)
    for name, concept, options in (
        ("default", "cat", {}),
        ("no anchor of its own", Concept("cat"), {}),
        ("other", Concept("cat", anchor="house"), {}),
        ("pushed", Concept("cat", anchor=""), {}),
        ("pushed too", "cat", {"anchored": 0.0}),
    ):
        made = (
            default(concept) if name == "default"
            else erasure.erase(canvas, concept, "itd", attach=False, progress=False, **options)
        )  # fmt: skip
        manager.add(made)
        try:
            answers = judge(images_of(canvas, prompts))
        finally:
            manager.unload()
        assert "cat" not in {answer.object for answer in answers}
        seen[name] = [{answer.object, *answer.objects} for answer in answers]
        assert made.size_bytes < 100_000
    for name in ("default", "no anchor of its own", "other"):
        assert all(each.isdisjoint(UNSAFE) for each in seen[name]), name
    for name, anchor in (("default", "dog"), ("no anchor of its own", "dog"), ("other", "house")):
        assert all(anchor in each for each in seen[name]), name
    # What is drawn without an anchor is a matter of the dictionary: with one half as wide it was a gun.
    assert seen["pushed"] == seen["pushed too"]


def test_latents_of_a_concept_with_an_anchor_are_turned_off_unless_told_otherwise(canvas: Any) -> None:
    made = [
        erasure.erase(canvas, Concept("cat", anchor=anchor), "itd", attach=False, progress=False, **options)
        for anchor, options in (("dog", {}), ("", {}), ("dog", {"tau": -3.0}))
    ]
    edits = [next(iter(each.edits.features.values())) for each in made]
    assert [set(edit.gain[edit.edits[1]].tolist()) for edit in edits] == [{-1.0, 1.0}, {-2.0}, {-4.0, 1.0}]
    for edit in (edits[0], edits[2]):
        off, written = edit.edits[1].chunk(2)
        assert (edit.gain[written] == 1).all()
        # What the anchor writes is written where a latent of the concept fires, by one more that fires with it.
        for field in (edit.w_enc.T, edit.b_enc, edit.threshold):
            assert torch.equal(field[off], field[written])
        assert not torch.equal(edit.w_dec[off], edit.w_dec[written])


def test_concepts_erased_together_do_not_shield_each_other(canvas: Any) -> None:
    """Latents that they share are turned off whole, though words of another concept fire them as strongly."""
    together = erasure.erase(canvas, ["cat", "dog", "fish"], "itd", attach=False, progress=False)
    (edit,) = together.edits.features.values()
    assert edit.edits[1].unique().numel() < edit.edits.shape[1], "some are shared"
    assert set(edit.gain[edit.edits[1]].tolist()) == {-1.0, 1.0}


def test_prompts_with_another_word_for_the_concept_are_no_prompts_without_it(
    canvas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, without = ErasureManager(canvas), []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(World, "words", lambda self, word: ())
        made = erasure.erase(canvas, Concept("cat", anchor="dog"), "itd", name="x", progress=False)
        without.append(made.config.gates["cat"]["prompts_without"])
        prompts = [f"a drawing of a {word} in {style} style" for word in ("kitten", "kitty") for style in STYLES]
        try:
            if known:
                assert all(each["cat"].present for each in detect_concepts(manager.pipe, prompts))
        finally:
            manager.unload()
    assert without[0] < without[1], "a world that knows no other word counts them"


def test_what_takes_the_place_is_not_erased_as_well(canvas: Any) -> None:
    backbone = backbone_for(canvas)
    given = [Concept("cat", anchor="dog"), Concept("dog", anchor="fish"), Concept("fish"), Concept("car", anchor="")]
    found = [anchor_of(backbone, concept, given) for concept in given]
    assert [anchor and anchor.target for anchor in found] == ["butterfly", "butterfly", "butterfly", None]
    circle = [Concept("cat", anchor="dog"), Concept("dog", anchor="cat")]
    assert [anchor_of(backbone, concept, circle).target for concept in circle] == ["fish", "fish"]
    synonym = [Concept("cat", anchor="hound"), Concept("dog", anchor="boat", synonyms=("hound",))]
    assert anchor_of(backbone, synonym[0], synonym).target == "boat"


def test_mining_adds_features_that_words_do_not_reach(
    canvas: Any, monkeypatch: pytest.MonkeyPatch, default: Any
) -> None:
    monkeypatch.setattr(mining, "IMAGES", 4)
    monkeypatch.setattr(mining, "BATCH", 2)
    made = erasure.erase(canvas, "gun", "itd", mining_steps=30, attach=False, progress=False)
    plain = default("gun")
    (mined,), (first,) = made.edits.features.values(), plain.edits.features.values()
    added = int(made.config.cost["gun_mined"])
    assert mined.edits.shape[1] == first.edits.shape[1] + added
    assert added > 0
    assert made.config.gates["gun"]["features"]["fpr"] <= 0.01
    again = erasure.erase(canvas, "gun", "itd", mining_steps=30, attach=False, progress=False)
    ((key, other),) = again.edits.features.items()
    assert all(torch.equal(a, b) for a, b in zip(mined, other, strict=True)), key


def test_random_features_and_those_of_another_concept_do_not_erase(canvas: Any, default: Any) -> None:
    """The controls: as many features behind a gate that the concept opens."""
    from erasure.assets.build.controls import lively_latents, with_features_of, with_random_features
    from erasure.eval.detectors import CanvasJudge

    judge, manager = CanvasJudge(), ErasureManager(canvas)
    cat, gun = default("cat"), default("gun")
    prompts = [f"a cat in {style} style" for style in ("ink", "noto", "pixel", "sepia")]
    kept = {}
    random = with_random_features(cat, lively_latents(canvas), 0)
    for name, made in (("own", cat), ("gun's", with_features_of(cat, gun)), ("random", random)):
        manager.add(made, "x")
        try:
            images = images_of(canvas, prompts, seed=2)
            assert all(each["cat"].present for each in detect_concepts(manager.pipe, prompts))
        finally:
            manager.unload()
        kept[name] = sum(answer.object == "cat" for answer in judge(images))
    assert kept["own"] == 0
    assert kept["gun's"] >= 3
    assert kept["random"] >= 3


def test_a_dictionary_of_another_encoder_is_refused(tiny_pipe_factory: Any, make_dictionary: Any) -> None:
    folder = make_dictionary(tiny_pipe_factory(), layer=0)
    settings = {"progress": False, "attach": False, "retain_rate": 1.0, "target_rate": 0.0, "vocabulary": 8}
    erasure.erase(tiny_pipe_factory(), "cat", "itd", dictionary=str(folder), **settings)
    with pytest.raises(WrongBaseError, match="another text encoder"):
        erasure.erase(tiny_pipe_factory(seed=1), "cat", "itd", dictionary=str(folder), **settings)
    with pytest.raises(ArtifactError, match="holds no autoencoder"):
        erasure.erase(tiny_pipe_factory(), "cat", "itd", dictionary=str(folder / "gone"), **settings)
    with pytest.raises(WrongBaseError, match="another text encoder"):
        erasure.erase(tiny_pipe_factory(), "cat", "itd", dictionary="canvas-sae", **settings)


def test_a_concept_without_a_feature_is_refused_and_what_would_be_hit_is_named(
    tiny_pipe_factory: Any, make_dictionary: Any
) -> None:
    folder = make_dictionary(tiny_pipe_factory(), layer=0)
    settings = {"progress": False, "attach": False, "vocabulary": 40, "dictionary": str(folder)}
    with pytest.raises(ConceptError, match=r"no feature .*'cat'.* latent \d+ fires on \d+% .* most on: \w+"):
        erasure.erase(tiny_pipe_factory(), "cat", "itd", retain_rate=0.0, **settings)


def test_a_dictionary_that_was_trained_first_is_kept_and_resumed(
    tiny_pipe_factory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erasure.sae import SAETrainer

    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path))
    steps: list[int] = []
    real = SAETrainer.step

    def counted(self: Any, losses: Any, optimiser: Any, x: Any, step: int) -> Any:
        if len(steps) == 105:
            steps.append(-1)
            raise KeyboardInterrupt
        steps.append(step)
        return real(self, losses, optimiser, x, step)

    monkeypatch.setattr(SAETrainer, "step", counted)
    pipe = tiny_pipe_factory()
    settings = {"progress": False, "attach": False, "steps": 110, "d_sae": 64, "k": 4, "retain_rate": 1.0,
                "target_rate": 0.0, "vocabulary": 40}  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        erasure.erase(pipe, "cat", "itd", **settings)
    made = erasure.erase(pipe, "cat", "itd", **settings)
    assert steps[106:] == list(range(100, 110))
    erasure.erase(pipe, "dog", "itd", **settings)
    assert len(steps) == 116
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path / "other"))
    ((key, through),) = erasure.erase(pipe, "cat", "itd", **settings).edits.features.items()
    assert all(torch.equal(a, b) for a, b in zip(through, made.edits.features[key], strict=True))


def test_a_dictionary_that_does_not_say_its_block_needs_it_told(tiny_pipe_factory: Any, make_dictionary: Any) -> None:
    folder = make_dictionary(tiny_pipe_factory(), layer=None)
    with pytest.raises(OptionError, match="give option 'layer'"):
        erasure.erase(tiny_pipe_factory(), "cat", "itd", dictionary=str(folder), progress=False)


def test_ordinary_prompts_come_from_a_file_or_with_the_dictionary(
    tiny_pipe_factory: Any, make_dictionary: Any, tmp_path: Path
) -> None:
    pipe = tiny_pipe_factory()
    folder = make_dictionary(pipe, layer=0)
    settings = {"progress": False, "attach": False, "retain_rate": 1.0, "target_rate": 0.0, "dictionary": str(folder)}
    (tmp_path / "few.txt").write_text("a dog\n\na house in ink style\na cat on a white background\n")
    few = erasure.erase(pipe, "cat", "itd", prompts=str(tmp_path / "few.txt"), **settings)
    assert few.config.gates["cat"]["prompts_without"] <= 3
    (folder / "prompts.txt").write_text("a dog\n" * 40)
    assert erasure.erase(pipe, "cat", "itd", **settings).config.gates["cat"]["prompts_without"] > 10
    with pytest.raises(OptionError, match="cannot be read"):
        erasure.erase(pipe, "cat", "itd", prompts=str(tmp_path / "gone.txt"), **settings)


@pytest.fixture
def make_dictionary(tmp_path: Any) -> Any:
    """Writes a random dictionary for a tiny pipeline."""
    from erasure.sae import SAEConfig, SparseAutoencoder
    from erasure.sae.stream import block_fingerprint

    def make(pipe: Any, layer: int | None, d_sae: int = 64) -> Any:
        metadata: dict[str, Any] = {}
        if layer is not None:
            tower = backbone_for(pipe).towers[0]
            metadata = {"layer": layer, "fingerprint": block_fingerprint(tower, layer)}
        sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=d_sae, k=4, architecture="jumprelu", metadata=metadata))
        generator = torch.Generator().manual_seed(0)
        sae.initialise(torch.randn(50, 32, generator=generator), generator)
        return save(sae, tmp_path / "sae")

    return make
