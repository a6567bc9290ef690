"""What words mean to a model, asked in one place."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import erasure
from erasure import Concept, Erasure, assets
from erasure.assets.build import concepts
from erasure.cli.main import main
from erasure.errors import ArtifactError, ConceptError, ConceptWarning
from erasure.eval import suites
from erasure.parsing import ConceptRequest
from erasure.world import Classes, World

FACTS = {
    "objects": ["cat", "dog", "knife", "gun"],
    "styles": ["ink", "line art"],
    "unsafe": ["gun", "knife"],
    "groups": {"cat": "animal", "dog": "animal", "gun": "weapon", "knife": "weapon"},
    "synonyms": {"cat": ["kitten"]},
    "anchors": {"cat": "dog", "dog": "cat", "gun": "cat", "ink": "line art"},
    "retain": {"ink": ["line art"]},
    "generation": {"num_inference_steps": 7, "guidance_scale": 2.5, "height": 32},
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "canvas.json").write_text(json.dumps(FACTS))
    return World.of(SimpleNamespace(name_or_path=str(tmp_path)))


@pytest.fixture(scope="module")
def canvas() -> Any:
    pipe = erasure.load_pipeline("canvas-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_world_is_what_the_model_declares(world: World) -> None:
    assert world.declared
    assert world.objects == ("cat", "dog", "knife", "gun")
    assert world.groups == {"animal": ("cat", "dog"), "weapon": ("gun", "knife")}
    assert (world.num_inference_steps, world.guidance_scale, world.side) == (7, 2.5, 32)


@pytest.mark.parametrize("place", [None, "", "someone/some-model", "/no/such/folder", "canvas-none"])
def test_a_model_that_declares_nothing_has_an_empty_world(place: str | None) -> None:
    world = World.of(SimpleNamespace(name_or_path=place))
    assert not world.declared
    assert world == World()
    assert world.find("cat") is None
    assert world.concept("ink") == Concept("ink")


def test_the_embedded_world_is_that_of_embedded_models_only(tmp_path: Path) -> None:
    facts = assets.canvas()
    for world in (World.at("canvas-sd"), World.at(assets.path("canvas-sd")), World.at("canvas-clip")):
        assert list(world.objects) == facts["objects"]
    assert not World.at(tmp_path).declared


def test_a_damaged_world_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "canvas.json").write_text('{"objects": 3}')
    with pytest.raises(ArtifactError):
        World.at(tmp_path)


@pytest.mark.parametrize(
    ("word", "classes"),
    [
        ("cat", ("object", ("cat",))), ("Cat", ("object", ("cat",))), (" a  CAT ", ("object", ("cat",))),
        ("the cats", ("object", ("cat",))), ("knives", ("object", ("knife",))), ("ｃａｔ", ("object", ("cat",))),
        ("kitten", ("object", ("cat",))), ("Kittens", ("object", ("cat",))),
        ("ink", ("style", ("ink",))), ("INK style", ("style", ("ink",))), ("line_art", ("style", ("line art",))),
        ("Line-Art style", ("style", ("line art",))), ("weapon", ("object", ("gun", "knife"))),
        ("Weapons", ("object", ("gun", "knife"))), ("unsafe", ("object", ("gun", "knife"))),
        ("animals", ("object", ("cat", "dog"))), ("zebra", None), ("caat", None), ("", None), ("s", None),
    ],
)  # fmt: skip
def test_words_are_found_however_they_are_written(world: World, word: str, classes: Classes | None) -> None:
    assert world.find(word) == classes


def test_a_name_of_an_object_and_a_style_is_told_by_the_kind() -> None:
    world = World(objects=("ink",), styles=("ink",))
    assert world.find("ink") == ("object", ("ink",))
    assert world.find("ink", "style") == ("style", ("ink",))


def test_concepts_come_with_kind_anchor_and_what_must_survive(world: World) -> None:
    assert world.concept("cat") == Concept("cat", anchor="dog", synonyms=("kitten",))
    assert world.concept("kitten") == world.concept("cat")
    assert world.concept("ink") == Concept("ink", kind="style", anchor="line art", retain=("line art",))
    assert world.concept("knife") == Concept("knife", kind="unsafe")
    assert world.concept("zebra") == Concept("zebra")


def test_spellings_of_one_word_are_one_concept(world: World) -> None:
    for spelling in ("Ink", "INK", " ink ", "ink style", "Ink Style", "ｉｎｋ"):
        assert world.concept(spelling) == world.concept("ink")


def test_groups_stand_for_their_members(world: World) -> None:
    assert [concept.target for concept in world.concepts("weapons")] == ["gun", "knife"]
    assert {concept.kind for concept in world.concepts("weapons")} == {"unsafe"}
    with pytest.raises(ConceptError, match="several concepts"):
        world.concept("weapons")


def test_anchors_pass_over_what_is_erased_too() -> None:
    world = World(objects=("a1", "b1", "c1"), anchors={"a1": "b1", "b1": "c1", "c1": "a1"})
    assert [concept.anchor for concept in world.concepts(["a1", "b1"])] == ["c1", "c1"]
    assert [concept.anchor for concept in world.concepts(["a1", "b1", "c1"])] == [None, None, None]
    assert world.anchor("b1", ["c1", "a1"]) is None, "a word is no anchor of its own"


def test_where_a_whole_group_is_erased_the_next_safe_word_of_the_kind_takes_the_place() -> None:
    world = World.at("canvas-sd")
    assert [concept.anchor for concept in world.concepts(["house", "castle"])] == ["cat", "cat"]
    animals = world.concepts("animals")
    assert {concept.anchor for concept in animals} == {"apple"}
    assert world.anchor("ink", world.styles) is None
    assert world.anchor("whatever") is None


def test_what_the_user_says_goes_first(world: World) -> None:
    (cat,) = world.concepts("cat", kind="style", anchor="", retain=["dog"], synonyms=["tabby"])
    assert cat == Concept("cat", kind="style", anchor="", retain=("dog",), synonyms=("tabby",))
    given = Concept("ink")
    assert world.concepts(given) == [given]


def test_what_a_text_says_goes_before_the_options(world: World) -> None:
    made = world.concepts(["cat:style>house", "dog"], kind="object", anchor="knife")
    assert [(concept.kind, concept.anchor) for concept in made] == [("style", "house"), ("object", "knife")]
    assert [concept.anchor for concept in world.concepts("weapons>cat")] == ["cat", "cat"]


def test_lists_are_several_concepts(world: World) -> None:
    assert world.concepts("cat, ink") == world.concepts(["cat", "ink"])
    assert world.concepts(["gun", "weapon"]) == world.concepts("weapons")
    assert world.concepts("weapons; gun") == world.concepts("weapons")[::-1]
    with pytest.raises(ConceptError, match="twice"):
        world.concepts(["cat", "kitten"])


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("cat>cat", {}), ("cat>Cats", {}), ("cat>kitten", {}), ("kitten>cat", {}), ("ink>INK style", {}),
        ("cat", {"anchor": "kittens"}), ("cat, dog", {"anchor": "dog"}), (Concept("cat", anchor="kitten"), {}),
        ("weapons>gun", {}),
    ],
)  # fmt: skip
def test_an_anchor_that_is_the_concept_itself_is_refused(world: World, given: Any, options: Any) -> None:
    with pytest.raises(ConceptError, match="nothing would change"):
        world.concepts(given, **options)


def test_what_survives_is_not_what_is_erased(world: World) -> None:
    (cat,) = world.concepts("cat", retain=["animals", "Gun"])
    assert cat.retain == ("dog", "gun")
    for kept in ("cat", "Cat", "kitten"):
        with pytest.raises(ConceptError):
            world.concepts("cat", retain=[kept])
    with pytest.raises(ConceptError, match="another word for 'cat'"):
        world.concepts(Concept("cat", retain=("kitten",)))


def test_words_that_a_declared_world_does_not_have_are_told(world: World) -> None:
    with pytest.warns(ConceptWarning, match="'caat': no word of the model's world.*did you mean 'cat'"):
        world.concepts("caat")
    with pytest.warns(ConceptWarning, match="'dgo'.*did you mean 'dog'"):
        world.concepts("cat>dgo")
    with pytest.warns(ConceptWarning, match="'Inkk'.*did you mean 'ink'"):
        world.concepts("cat", retain=["Inkk"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        World().concepts("caat:object")
        world.concepts([Concept("caat"), "<my-pet>", "kittens>", "weapons>dog"])


def test_words_that_are_taken_for_objects_are_told_once() -> None:
    for given, said in (
        (
            "Van Gogh",
            "'Van Gogh': taken for an object, with prompts such as 'a photo of a Van Gogh'. Write NAME:style",
        ),
        (["mug", "ink:style", "sky"], "'mug', 'sky': taken for objects"),
    ):
        with pytest.warns(ConceptWarning) as told:
            World().concepts(given)
        assert len(told) == 1
        assert str(told[0].message).startswith(said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        World().concepts(["Van Gogh:style", Concept("mug"), ConceptRequest("Ada", templates=("{}",))])
        World().concepts("Van Gogh", kind="object")
        World().concepts("Ada", templates=["{}"])
        World().concepts("Van Gogh", tell=False)
        World(learned=frozenset({"<pet>"})).concepts("<pet>")


def test_making_an_erasure_tells_what_is_taken_for_an_object(tiny_pipe: Any) -> None:
    with pytest.warns(ConceptWarning, match="'Van Gogh': taken for an object") as told:
        erasure.erase(tiny_pipe, "Van Gogh", "uce", attach=False, progress=False, vocabulary=4)
    assert len([each for each in told if each.category is ConceptWarning]) == 1


def test_learned_tokens_are_words(canvas: Any, teach: Any) -> None:
    pipe = copy.deepcopy(canvas)
    teach(pipe, "cat", token="my_pet, mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert World.of(pipe).concepts("my_pet, mine") == [Concept("my_pet, mine")]


# The same word by every way in ---------------------------------------------------------------------------------------


def tensors(made: Erasure) -> dict[str, torch.Tensor]:
    """Every tensor of an erasure by name."""
    return {**made.edits.lora_state_dict(), **made.edits.delta_state_dict()}


def same(first: Erasure, second: Erasure) -> bool:
    left, right = tensors(first), tensors(second)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("word", ["Ink", "weapons", "zebra"])
def test_a_word_is_one_erasure_by_every_way_in(canvas: Any, word: str, tmp_path: Path) -> None:
    by_function = erasure.erase(canvas, word, "uce", attach=False, progress=False, vocabulary=8)
    by_method = canvas.erase(word, "uce", attach=False, progress=False, vocabulary=8)
    stock = StableDiffusionPipeline.from_pipe(canvas)
    by_stock = erasure.erase(stock, [word], "uce", attach=False, progress=False, vocabulary=8)
    command = ["erase", "uce", "--model", "canvas-sd", "--device", "cpu", "--concept", word, "--vocabulary", "8"]
    assert main([*command, "--out", str(tmp_path / "made")]) == 0
    by_command = Erasure.load(tmp_path / "made")
    assert by_function.config.concepts == by_command.config.concepts == by_method.config.concepts
    for other in (by_method, by_stock, by_command):
        assert same(by_function, other)
    assert [concept.to_dict() for concept in World.of(canvas).concepts(word)] == by_function.config.concepts


def test_what_builds_the_table_asks_the_same_place(canvas: Any) -> None:
    world = World.of(canvas)
    assert concepts.concepts() == [world.concept(name) for name in (*world.objects, *world.styles)]


def test_the_evaluation_counts_the_classes_that_are_erased(canvas: Any) -> None:
    world, suite = World.of(canvas), suites.get("canvas")
    for word in ("cat", "ink", "Pixel", "weapons", "kittens", "unsafe"):
        (target,) = suite.plan(canvas, [word], "smoke", 0).targets
        (by_concept, *others) = suite.plan(canvas, world.concepts(word), "smoke", 0).targets
        assert {name for each in (by_concept, *others) for name in each.members} == set(target.members)
        assert by_concept.domain == target.domain
