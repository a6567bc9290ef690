"""What the package promises of every strategy on every family, over both registries.

A strategy that is registered is tested here, and so is a family, whose tiny pipeline stands in `tests/conftest.py`.
Making is tested for every pair that works. What happens to an erasure afterwards depends on its carriers and not on
who made it, so it is tested with one case for each carrier on every family (`ATTACHED`), and what does not depend on
the family with each on the first one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import shutil
import warnings
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline
from torch import nn

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.backbones import FAMILIES, backbone_for
from erasure.carriers.features import EditedFeatures
from erasure.errors import (
    ArtifactError,
    AttachError,
    BypassedErasureWarning,
    ConceptError,
    DivergenceError,
    OptionError,
    UnknownTokenWarning,
    UnsupportedModelError,
    VerificationError,
    WrongBaseError,
)
from erasure.interop import paths
from erasure.pipelines import pipeline_class
from erasure.strategies import available, get
from erasure.world import World

QUICK: dict[str, Any] = {
    "steps": 3, "vocabulary": 8, "retain_vocabulary": 2, "contexts": 2, "d_sae": 128, "target_rate": 0.1,
    "retain_rate": 1.0, "false_positive_rate": 1.0, "batch": 2, "retain_batch": 2, "rollout_steps": 2,
    "attack_steps": 1,
}  # fmt: skip
"""Cheap values for the options that cost time, lenient ones where a random tower tells nothing apart. A strategy
gets those that it has."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in available()},
    "hirm-pinned": ("hirm", {"unconditional": "stock"}),
    "uce-map": ("uce", {"saved_as": "map"}),
    "esd-full": ("esd", {"rank": 0, "method": "x-strict"}),
}
"""Strategies by default options, and settings that use another carrier."""

TRAJECTORIES = "a latent consistency UNet"
REFUSED: dict[tuple[str, str], str] = {
    ("esd", "latent-consistency"): TRAJECTORIES,
    ("esd-full", "latent-consistency"): TRAJECTORIES,
    ("advunlearn", "latent-consistency"): TRAJECTORIES,
}
"""Pairs of a case and a kind of model that cannot work, with a part of the reason that is given. All others work."""
NAMES = [family.family for family in FAMILIES if family.family != "chroma"]
"""Families that everything is tested on; Chroma is a Flux with fewer parts."""
FIRST = NAMES[:1]
UNETS = [family.family for family in FAMILIES if family.family in NAMES and family.denoiser_component == "unet"]

ATTACHED: dict[str, set[str]] = {
    "uce": {"low_rank"}, "uce-map": {"maps"}, "hirm-pinned": {"deltas", "pinned"}, "itd": {"features"},
}  # fmt: skip
"""Cases that stand for all others once they are made, with the kinds of edits that they have. One for each kind."""
ALONE: dict[str, set[str]] = {"hirm": {"deltas"}, "esd-full": {"deltas"}}
"""Further ones on the first family: changes of whole parameters in the text encoder alone, and in the denoiser."""
TEXT_SIDE = ("hirm-pinned", "itd")
"""Those of `ATTACHED` that are in text encoders, which prompts that come encoded go around."""
COMPILED = [
    *(((case, family), first) for family in FIRST for case in ("uce", *TEXT_SIDE) for first in ("attach", "compile")),
    *(
        ((case, family), first)
        for family in NAMES[1:]
        for case, first in (("uce", "compile"), ("hirm-pinned", "attach"))
    ),
]
"""Pairs whose networks are compiled, and whether that is done ahead of attaching or after it. Tracing takes seconds,
so that a further family has one of each: the denoiser with changed weights, and a text encoder with a hook."""

PROMPT = "a photo of a cat"

LEARNED = {"<my-pet>": 3, "<my-home>": 2, "<your-pet>": 2}
"""Vectors of learned tokens."""
LEARNED_CONCEPT = Concept(
    "<my-pet>", anchor="<my-home>", retain="<your-pet>", templates=("a {}", "a {} and <your-pet>")
)


def fit(pipe: Any, case: str, concepts: Any = "cat", **options: Any) -> Erasure:
    name, chosen = CASES[case]
    fields = {field.name for field in dataclasses.fields(get(name))}
    quick = {key: value for key, value in QUICK.items() if key in fields}
    return erasure.erase(pipe, concepts, name, **{"attach": False, "progress": False, **quick, **chosen, **options})


def pairs(cases: Any, families: Any = NAMES, *, alone: Any = ()) -> Any:
    """Run a test, or all of a class, for cases on families that they work on, and some more on the first family."""
    chosen = [(case, family) for family in families for case in (*cases, *(alone if family in FIRST else ()))]
    working = [pair for pair in chosen if pair not in REFUSED]
    return pytest.mark.parametrize("pair", working, ids="-".join)


@pytest.fixture(scope="session")
def originals(tiny_models: Any) -> Any:
    """The tiny pipeline of each family, made once: read it, never change it."""
    return functools.cache(lambda family: tiny_models[family]())


@pytest.fixture(scope="session")
def erasures(originals: Any) -> Any:
    """The erasure of a concept by a case on a family, made once."""
    return functools.cache(lambda case, family, concept: fit(originals(family), case, concept))


@pytest.fixture(scope="session")
def pictures(originals: Any, erasures: Any, draw: Any) -> Any:
    """What the pipeline of a family draws, without an erasure and with that of "cat" by a case; each drawn once."""

    def picture(family: str, case: str | None = None) -> torch.Tensor:
        pipe = originals(family)
        if case is not None:
            pipe = copy.deepcopy(pipe)
            ErasureManager(pipe).add(erasures(case, family, "cat"), "cat")
        return draw(pipe)

    return functools.cache(picture)


@pytest.fixture
def case(pair: tuple[str, str]) -> str:
    return pair[0]


@pytest.fixture
def family(pair: tuple[str, str]) -> str:
    return pair[1]


@pytest.fixture
def tiny_pipe_factory(family: str, tiny_models: Any) -> Any:
    """Makes tiny pipelines of the pair's family."""
    return tiny_models[family]


@pytest.fixture
def tiny_pipe_original(family: str, originals: Any) -> Any:
    return originals(family)


@pytest.fixture
def stock_class(tiny_pipe_original: Any) -> Any:
    """The family's pipeline of diffusers."""
    return type(tiny_pipe_original)


@pytest.fixture
def drop_in(stock_class: Any) -> Any:
    """Its drop-in."""
    return pipeline_class(stock_class.__name__)


@pytest.fixture
def made(pair: tuple[str, str], erasures: Any) -> Erasure:
    """An erasure of "cat" by the case, made for the pipeline of the session."""
    return erasures(*pair, "cat")


@pytest.fixture
def other(pair: tuple[str, str], erasures: Any) -> Erasure:
    """An erasure of "monet" by the case."""
    return erasures(*pair, Concept("monet", kind="style"))


@pytest.fixture
def base(tiny_pipe_original: Any, tensors_of: Any) -> dict[str, Any]:
    """The tensors of the test's pipeline before anything happens."""
    return tensors_of(tiny_pipe_original)


@pytest.fixture
def base_image(family: str, pictures: Any) -> Any:
    """What the stock pipeline draws."""
    return pictures(family)


@pytest.fixture
def erased_image(pair: tuple[str, str], pictures: Any) -> Any:
    """What a fresh copy of the pipeline draws with the erasure."""
    return pictures(pair[1], pair[0])


@pytest.fixture
def manager(tiny_pipe: Any) -> ErasureManager:
    return ErasureManager(tiny_pipe)


def edited(made: Erasure) -> set[str]:
    """Parameters that it changes."""
    return set(made.edits.parameters)


def known(made: Erasure) -> set[str]:
    """Parameters by which it knows its base."""
    return set(made.config.base["tensors"])


def kinds(made: Erasure) -> set[str]:
    """The kinds of edits that it has."""
    return {field.name for field in dataclasses.fields(made.edits) if getattr(made.edits, field.name)}


def is_text_side(made: Erasure) -> bool:
    return any(component.startswith("text_encoder") for component in made.components)


def denoiser(pipe: Any) -> Any:
    return backbone_for(pipe).denoiser


def text_weight(pipe: Any) -> torch.Tensor:
    """The first matrix of the text encoder that the denoiser reads."""
    return next(layer.weight for layer in backbone_for(pipe).reader.module.modules() if isinstance(layer, nn.Linear))


def modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


@pairs(available(), alone=[case for case in CASES if case not in available()])
class TestMaking:
    """What holds while an erasure is made, for every strategy on every family, and for its variants on the first."""

    def test_makes_an_erasure_of_several_and_leaves_the_model_untouched(
        self, case: str, tiny_pipe: Any, made: Erasure, base: dict, changed_tensors: Any
    ) -> None:
        def gradients() -> list[bool]:
            return [parameter.requires_grad for part in modules(tiny_pipe) for parameter in part.parameters()]

        flags = gradients()
        gogh, gun = Concept("van gogh", kind="style", anchor="painting"), Concept("gun", kind="unsafe")
        result = fit(tiny_pipe, case, ["cat", gogh, gun])
        check_config(result, ["cat", "van gogh", "gun"], tiny_pipe)
        assert differ(result, made)
        assert changed_tensors(base, tiny_pipe) == set()
        assert gradients() == flags
        assert all(parameter.grad is None for part in modules(tiny_pipe) for parameter in part.parameters())
        assert ErasureManager(tiny_pipe).erasures == {}

    def test_is_the_same_again_where_gradients_are_off(
        self, case: str, tiny_pipe_original: Any, made: Erasure
    ) -> None:
        torch.manual_seed(123)
        state = torch.random.get_rng_state()
        with torch.inference_mode():
            again = fit(tiny_pipe_original, case)
        assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state moved"
        assert all(torch.equal(a, b) for a, b in zip(flat(again), flat(made), strict=True))
        assert not any(tensor.is_inference() for tensor in flat(again))

    def test_is_made_from_the_base_while_another_is_attached(
        self, case: str, tiny_pipe: Any, manager: ErasureManager, made: Erasure, other: Erasure, tensors_of: Any,
        changed_tensors: Any,
    ) -> None:  # fmt: skip
        manager.add(other, "monet")
        attached = tensors_of(tiny_pipe)
        again = fit(tiny_pipe, case)
        assert all(torch.equal(a, b) for a, b in zip(flat(again), flat(made), strict=True))
        assert changed_tensors(attached, tiny_pipe) == set()
        assert manager.verify() > 0

    def test_a_concept_without_a_token_is_refused(
        self, case: str, tiny_pipe: Any, base: dict, changed_tensors: Any
    ) -> None:
        for concept in ("", "   ", "猫"):
            with pytest.raises(ConceptError, match="concept"):
                fit(tiny_pipe, case, concept, attach=True)
        assert changed_tensors(base, tiny_pipe) == set()

    def test_nan_attaches_nothing(self, case: str, tiny_pipe: Any, tensors_of: Any, changed_tensors: Any) -> None:
        with torch.no_grad():
            text_weight(tiny_pipe)[0, 0] = torch.nan
        before = {key: tensor.nan_to_num(nan=1e9) for key, tensor in tensors_of(tiny_pipe).items()}
        with pytest.raises(DivergenceError):
            fit(tiny_pipe, case, attach=True)
        assert ErasureManager(tiny_pipe).erasures == {}
        with torch.no_grad():
            text_weight(tiny_pipe)[0, 0] = 1e9
        assert changed_tensors(before, tiny_pipe) == set()

    def test_made_in_half_precision_fits_the_same_model_in_full(
        self, case: str, tiny_pipe: Any, tiny_pipe_original: Any, manager: ErasureManager
    ) -> None:
        low = copy.deepcopy(tiny_pipe_original).to(torch.bfloat16)
        result = fit(low, case)
        ErasureManager(low).add(result)
        manager.add(result)
        assert manager.verify() > 0

    def test_made_beside_a_users_lora_has_canonical_keys(self, case: str, tiny_pipe: Any, made: Erasure) -> None:
        tiny_pipe.load_lora_weights(users_lora(tiny_pipe), adapter_name="mine")
        result = fit(tiny_pipe, case, attach=True)
        assert edited(result) == edited(made)
        assert ErasureManager(tiny_pipe).verify() > 0

    def test_every_vector_of_learned_tokens_is_read(self, case: str, tiny_pipe: Any, teach: Any) -> None:
        teach_all(teach, tiny_pipe, "a", "cat", "a")
        teach_all(teach, tiny_pipe, "a", "house", token="<my-home>")
        teach_all(teach, tiny_pipe, "white", "dog", token="<your-pet>")
        known = {word: tiny_pipe.tokenizer.convert_tokens_to_ids(word) for word in LEARNED}
        seen: list[torch.Tensor] = []
        table = tiny_pipe.text_encoder.get_input_embeddings()
        table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        result = fit(tiny_pipe, case, LEARNED_CONCEPT)
        rows = torch.cat(seen).tolist()
        for word, vectors in LEARNED.items():
            starts = [(row, at) for row in rows for at, token in enumerate(row) if token == known[word]]
            assert starts or word != "<my-pet>"
            for row, at in starts:
                assert row[at : at + vectors] == list(range(known[word], known[word] + vectors))
        assert set(result.config.base["learned_tokens"]["text_encoder"]) == set(LEARNED)


@pairs(CASES, FIRST)
class TestMakingOnOneFamily:
    """What holds while an erasure is made and does not depend on the family."""

    @pytest.mark.parametrize(
        "concept",
        [
            Concept("cat", kind="object", anchor="animal", retain=("dog",), synonyms=("kitten",)),
            Concept("van gogh", kind="style", retain="monet"),
            Concept("gun", kind="unsafe"),
        ],
        ids=["object", "style", "unsafe"],
    )
    def test_makes_an_erasure(self, case: str, tiny_pipe_original: Any, concept: Concept) -> None:
        check_config(fit(tiny_pipe_original, case, concept), [concept.target], tiny_pipe_original)

    def test_works_where_no_gradients_are_kept(self, case: str, tiny_pipe_original: Any, made: Erasure) -> None:
        with torch.no_grad():
            again = fit(tiny_pipe_original, case)
        assert all(torch.equal(a, b) for a, b in zip(flat(again), flat(made), strict=True))

    def test_another_seed_gives_another_one_where_words_are_drawn(
        self, case: str, tiny_pipe_original: Any, made: Erasure
    ) -> None:
        options = {field.name for field in dataclasses.fields(get(CASES[case][0]))}
        another = fit(tiny_pipe_original, case, seed=1)
        if {"vocabulary", "retain_vocabulary"} & options:
            assert differ(another, made)

    def test_a_taken_name_is_refused_before_the_work(
        self, case: str, tiny_pipe: Any, made: Erasure, manager: ErasureManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manager.add(made)
        monkeypatch.setattr(get(CASES[case][0]), "fit", lambda *_, **__: pytest.fail("the work was done"))
        with pytest.raises(AttachError, match="attached already"):
            fit(tiny_pipe, case, attach=True)

    def test_unknown_options_and_values_are_refused(self, case: str, tiny_pipe_original: Any) -> None:
        with pytest.raises(OptionError, match="no option 'stepz'"):
            fit(tiny_pipe_original, case, stepz=1)
        with pytest.raises(OptionError, match="no preset"):
            fit(tiny_pipe_original, case, preset="nonsense")


@pairs(ATTACHED, alone=ALONE)
class TestAttached:
    """What holds for an erasure on every family, whoever made it."""

    # Attaching ----------------------------------------------------------------------------------------------------

    def test_changes_only_what_its_config_lists(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, base: dict, changed_tensors: Any
    ) -> None:
        assert manager.add(made) == len(made.edits)
        changed = changed_tensors(base, tiny_pipe)
        assert bool(changed) == bool(edited(made))
        assert changed <= edited(made) <= known(made)

    def test_attach_generate_unload_restores_every_bit(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, base: dict, base_image: Any, draw: Any,
        changed_tensors: Any,
    ) -> None:  # fmt: skip
        manager.add(made)
        assert not torch.equal(draw(tiny_pipe), base_image)
        manager.unload()
        assert changed_tensors(base, tiny_pipe) == set()
        assert torch.equal(draw(tiny_pipe), base_image)
        assert manager.list_erasures() == {}
        assert not any(
            "_erasures" in vars(part) for part in tiny_pipe.components.values() if hasattr(part, "__dict__")
        )
        assert "encode_prompt" not in vars(tiny_pipe)

    def test_saved_and_loaded_gives_the_same_pixels(
        self, tiny_pipe: Any, erased_image: Any, made: Erasure, manager: ErasureManager, draw: Any, tmp_path: Any
    ) -> None:
        manager.load(made.save(tmp_path / "saved"), name="cat")
        assert torch.equal(draw(tiny_pipe), erased_image)
        assert manager.verify() > 0

    def test_stacked_erasures_do_not_depend_on_their_order(
        self, tiny_pipe: Any, tiny_pipe_original: Any, made: Erasure, other: Erasure, manager: ErasureManager,
        base: dict, tensors_of: Any, changed_tensors: Any, draw: Any, erased_image: Any,
    ) -> None:  # fmt: skip
        manager.add(made, "cat")
        alone = tensors_of(tiny_pipe)
        manager.add(other, "monet")
        both = tensors_of(tiny_pipe)
        assert bool(changed_tensors(alone, tiny_pipe)) == bool(edited(other))
        reverse = copy.deepcopy(tiny_pipe_original)
        for name, erased in (("monet", other), ("cat", made)):
            ErasureManager(reverse).add(erased, name)
        assert changed_tensors(both, reverse) == set()
        assert torch.equal(draw(tiny_pipe), draw(reverse))
        assert manager.verify() >= len(made.edits)
        manager.delete("monet")
        assert changed_tensors(alone, tiny_pipe) == set()
        assert manager.active_erasures() == ["cat"]
        assert torch.equal(draw(tiny_pipe), erased_image)
        manager.delete("cat")
        assert changed_tensors(base, tiny_pipe) == set()

    def test_a_token_learned_over_it_leaves_it_in_force(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, teach: Any, draw: Any, base_image: Any
    ) -> None:
        manager.add(made)
        erased = draw(tiny_pipe)
        teach_all(teach, tiny_pipe, "a", "cat")
        assert torch.equal(draw(tiny_pipe), erased)
        assert manager.verify() > 0
        manager.unload()
        assert torch.equal(draw(tiny_pipe), base_image)

    # What happens to pipelines ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("first", ["offload", "attach"])
    def test_survives_model_offload(
        self, tiny_pipe: Any, erased_image: Any, made: Erasure, manager: ErasureManager, base: dict,
        base_image: Any, draw: Any, changed_tensors: Any, first: str,
    ) -> None:  # fmt: skip
        if first == "offload":
            tiny_pipe.enable_model_cpu_offload(device="cpu")
            manager.add(made)
            assert hasattr(denoiser(tiny_pipe), "_hf_hook"), "attaching took the offloading off for good"
        else:
            manager.add(made)
            tiny_pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(draw(tiny_pipe), erased_image)
        assert torch.equal(draw(tiny_pipe), erased_image)
        assert manager.verify() > 0
        manager.unload()
        assert hasattr(denoiser(tiny_pipe), "_hf_hook")
        assert torch.equal(draw(tiny_pipe), base_image)
        assert torch.equal(draw(tiny_pipe), base_image)
        tiny_pipe.remove_all_hooks()
        assert changed_tensors(base, tiny_pipe) == set()

    def test_from_pipe_keeps_it(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, base: dict, draw: Any, changed_tensors: Any,
        stock_class: Any, drop_in: Any, erased_image: Any,
    ) -> None:  # fmt: skip
        automatic, of_images = AutoPipelineForText2Image.from_pipe, AutoPipelineForImage2Image.from_pipe
        ways = [stock_class.from_pipe, drop_in.from_pipe, automatic, lambda pipe: automatic(drop_in.from_pipe(pipe))]
        for way in (*ways, of_images):
            manager.add(made, "cat")
            shared = way(tiny_pipe)
            assert isinstance(shared, drop_in) == (way in (ways[1], ways[3]))
            assert ErasureManager(shared).active_erasures() == ["cat"]
            assert ErasureManager(shared).verify() > 0
            shared.set_progress_bar_config(disable=True)
            if way is not of_images:
                assert torch.equal(draw(shared), erased_image)
            ErasureManager(shared).unload()
            assert changed_tensors(base, tiny_pipe) == set()

    def test_half_precision_and_back_keeps_it(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, base: dict
    ) -> None:
        manager.add(made, "cat")
        tiny_pipe.to(torch.float16)
        assert manager.verify() > 0
        tiny_pipe.to(torch.float32)
        assert manager.verify() > 0
        manager.unload()
        for key in edited(made):
            component, path = key.split("/")
            assert torch.equal(paths.parameter(tiny_pipe.components[component], path), base[key]), key

    def test_deepcopy_keeps_it_and_is_independent(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, base: dict, base_image: Any, draw: Any,
        changed_tensors: Any,
    ) -> None:  # fmt: skip
        manager.add(made, "cat")
        erased = draw(tiny_pipe)
        twin = copy.deepcopy(tiny_pipe)
        theirs = ErasureManager(twin)
        assert torch.equal(draw(twin), erased)
        assert theirs.verify() == manager.verify()
        theirs.unload()
        assert changed_tensors(base, twin) == set()
        assert torch.equal(draw(twin), base_image)
        assert torch.equal(draw(tiny_pipe), erased)
        assert manager.verify() > 0

    # Bad input ----------------------------------------------------------------------------------------------------

    def test_another_model_is_refused(
        self, tiny_pipe_factory: Any, made: Erasure, tensors_of: Any, changed_tensors: Any
    ) -> None:
        stranger = tiny_pipe_factory(seed=1)
        before = tensors_of(stranger)
        with pytest.raises(WrongBaseError, match="not those that the erasure was made for"):
            ErasureManager(stranger).add(made)
        assert changed_tensors(before, stranger) == set()
        assert ErasureManager(stranger).erasures == {}
        ErasureManager(stranger).load(made, check_base=False)
        assert ErasureManager(stranger).verify() > 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_same_model_in_half_precision_is_accepted(
        self, tiny_pipe: Any, tiny_pipe_factory: Any, made: Erasure, manager: ErasureManager, tensors_of: Any,
        changed_tensors: Any, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        tiny_pipe.to(dtype)
        base = tensors_of(tiny_pipe)
        manager.add(made)
        assert manager.verify() > 0
        assert bool(changed_tensors(base, tiny_pipe)) == bool(edited(made))
        manager.unload()
        assert changed_tensors(base, tiny_pipe) == set()
        with pytest.raises(WrongBaseError):
            ErasureManager(tiny_pipe_factory(seed=1).to(dtype)).add(made)

    def test_bypassing_the_text_side_warns(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, draw: Any
    ) -> None:
        own = embeddings(tiny_pipe)
        manager.add(made)
        if is_text_side(made):
            with pytest.warns(BypassedErasureWarning, match=made.name):
                draw(tiny_pipe, None, **own)
        with warnings.catch_warnings():
            warnings.simplefilter("error", BypassedErasureWarning)
            draw(tiny_pipe)
            if not is_text_side(made):
                draw(tiny_pipe, None, **own)
            manager.disable()
            draw(tiny_pipe, None, **own)
            manager.enable()
            manager.unload()
            draw(tiny_pipe, None, **own)

    # Whole pipelines on disk --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", ["stock_class", "drop_in"])
    def test_save_pretrained_never_writes_a_corrupt_model(
        self, tiny_pipe: Any, made: Erasure, draw: Any, tmp_path: Any, kind: str, tensors_of: Any,
        changed_tensors: Any, stock_class: Any, request: pytest.FixtureRequest,
    ) -> None:  # fmt: skip
        pipe = request.getfixturevalue(kind).from_pipe(tiny_pipe)
        pipe.set_progress_bar_config(disable=True)
        manager = ErasureManager(pipe)
        manager.add(made, "cat")
        if made.edits.beyond_weights:
            with pytest.raises(AttachError, match=made.edits.beyond_weights):
                pipe.save_pretrained(tmp_path / "model")
            assert not (tmp_path / "model").exists()
            manager.disable()
        wanted, tensors = draw(pipe), tensors_of(pipe)
        pipe.save_pretrained(tmp_path / "model")
        again = stock_class.from_pretrained(tmp_path / "model")
        again.set_progress_bar_config(disable=True)
        assert changed_tensors(tensors, again) == set()
        assert torch.equal(draw(again), wanted)

    def test_save_and_load_an_erased_pipeline(
        self,
        tiny_pipe: Any,
        made: Erasure,
        base: dict,
        base_image: Any,
        draw: Any,
        tmp_path: Any,
        changed_tensors: Any,
        stock_class: Any,
        drop_in: Any,
    ) -> None:
        pipe = drop_in.from_pipe(tiny_pipe)
        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(VerificationError):
            pipe.save_erased_pipeline(tmp_path / "model", fuse=False)
        pipe.load_erasure(made, name="cat")
        pipe.set_erasures("cat", 0.75)
        wanted = draw(pipe)
        pipe.save_erased_pipeline(tmp_path / "model", fuse=False)
        assert torch.equal(draw(pipe), wanted)
        loaders = (drop_in.load_erased_pipeline, erasure.load_pipeline)
        for load in loaders:
            again = load(str(tmp_path / "model"))
            again.set_progress_bar_config(disable=True)
            assert again.active_erasures() == ["cat"]
            assert torch.equal(draw(again), wanted)
        again.unload_erasures()
        assert changed_tensors(base, again) == set()
        # Nobody gets the base without a word: by our class it comes erased, stock classes refuse the folder.
        ours = drop_in.from_pretrained(tmp_path / "model")
        assert ours.active_erasures() == ["cat"]
        for kind in (stock_class, DiffusionPipeline, AutoPipelineForText2Image):
            with pytest.raises((OSError, ValueError)):
                kind.from_pretrained(tmp_path / "model")
        stock = stock_class.from_pretrained(tmp_path / "model" / "base")
        stock.set_progress_bar_config(disable=True)
        assert torch.equal(draw(stock), base_image)
        shutil.rmtree(tmp_path / "model" / "erasures" / "cat")
        with pytest.raises(ArtifactError):
            drop_in.from_pretrained(tmp_path / "model")

    # Proof --------------------------------------------------------------------------------------------------------

    def test_verify_is_fail_closed(
        self, tiny_pipe: Any, tiny_pipe_original: Any, made: Erasure, manager: ErasureManager, tensors_of: Any
    ) -> None:
        with pytest.raises(VerificationError, match="no erasure is attached"):
            manager.verify()
        manager.add(made, "cat")
        assert manager.verify() >= len(made.edits)
        manager.disable()
        with pytest.raises(VerificationError, match="switched off"):
            manager.verify()
        manager.enable()
        component, path = next(iter(known(made))).split("/")
        tensor = paths.parameter(tiny_pipe.components[component], path)
        kept = tensor.detach().clone()
        if edited(made):
            with torch.no_grad():
                tensor.view(-1)[0] += 1e-3
            with pytest.raises(VerificationError, match="something else changed it"):
                manager.verify()
            with pytest.raises(AttachError, match="changed by something else"):
                manager.unload()
            with torch.no_grad():
                tensor.copy_(kept)
        else:
            EditedFeatures.write(tiny_pipe.components[component], {})
            with pytest.raises(VerificationError, match="removed their hooks"):
                manager.verify()
            manager.set_erasures("cat")
        assert manager.verify() >= len(made.edits)
        setattr(tiny_pipe, component, copy.deepcopy(tiny_pipe_original.components[component]))
        with pytest.raises(VerificationError, match="replaced"):
            manager.verify()
        manager.unload()
        with pytest.raises(VerificationError, match="no erasure is attached"):
            manager.verify()
        manager.load(made, name="cat")
        assert manager.verify() >= len(made.edits)

    # Beside others ------------------------------------------------------------------------------------------------

    def test_attention_processors_are_left_alone(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, draw: Any
    ) -> None:
        network = denoiser(tiny_pipe)

        class Counting(type(next(iter(network.attn_processors.values())))):
            calls = 0

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                Counting.calls += 1
                return super().__call__(*args, **kwargs)

        network.set_attn_processor(Counting())
        before, stock = dict(network.attn_processors), draw(tiny_pipe)
        calls = Counting.calls
        assert calls >= 2 * len(before)
        manager.add(made)
        assert dict(network.attn_processors) == before
        Counting.calls = 0
        assert not torch.equal(draw(tiny_pipe), stock)
        assert Counting.calls == calls
        manager.unload()
        assert torch.equal(draw(tiny_pipe), stock)

    @pytest.mark.parametrize("first", ["lora", "erasure"])
    def test_beside_a_users_lora(
        self,
        tiny_pipe: Any,
        made: Erasure,
        manager: ErasureManager,
        base: dict,
        draw: Any,
        changed_tensors: Any,
        first: str,
    ) -> None:
        lora = users_lora(tiny_pipe)
        reference = copy.deepcopy(tiny_pipe)
        reference.load_lora_weights(dict(lora), adapter_name="mine")
        only_lora = draw(reference)
        for step in [first, "erasure" if first == "lora" else "lora"]:
            if step == "lora":
                tiny_pipe.load_lora_weights(dict(lora), adapter_name="mine")
            else:
                manager.add(made)
        both = draw(tiny_pipe)
        assert not torch.equal(both, only_lora)
        assert manager.verify() >= len(made.edits)
        ErasureManager(reference).add(made)
        assert torch.equal(draw(reference), both), "the order matters"
        manager.unload()
        assert torch.equal(draw(tiny_pipe), only_lora)
        tiny_pipe.unload_lora_weights()
        assert changed_tensors(base, tiny_pipe) == set()


@pairs(ATTACHED, FIRST, alone=ALONE)
class TestAttachedOnOneFamily:
    """What holds for an erasure, whoever made it, and does not depend on the family."""

    def test_strength(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, base_image: Any, draw: Any
    ) -> None:
        manager.add(made, "cat")
        full = draw(tiny_pipe)
        manager.set_erasures("cat", 0.5)
        half = draw(tiny_pipe)
        assert not torch.equal(half, full)
        assert not torch.equal(half, base_image)
        assert manager.verify() > 0
        manager.set_erasures("cat", strengths=[0.0])
        assert torch.equal(draw(tiny_pipe), base_image)
        assert manager.strengths == {"cat": 0.0}

    def test_set_disable_enable(
        self, tiny_pipe: Any, made: Erasure, other: Erasure, manager: ErasureManager, base: dict, tensors_of: Any,
        changed_tensors: Any, base_image: Any, draw: Any,
    ) -> None:  # fmt: skip
        manager.add(made, "cat")
        alone, alone_image = tensors_of(tiny_pipe), draw(tiny_pipe)
        manager.add(other, "monet")
        both, both_image = tensors_of(tiny_pipe), draw(tiny_pipe)
        manager.set_erasures("cat")
        assert changed_tensors(alone, tiny_pipe) == set()
        assert torch.equal(draw(tiny_pipe), alone_image)
        assert manager.active_erasures() == ["cat"]
        assert set(manager.erasures) == {"cat", "monet"}
        manager.set_erasures(["cat", "monet"])
        manager.disable()
        assert changed_tensors(base, tiny_pipe) == set()
        assert torch.equal(draw(tiny_pipe), base_image)
        assert manager.active_erasures() == []
        manager.enable()
        assert changed_tensors(both, tiny_pipe) == set()
        with contextlib.suppress(ZeroDivisionError), manager.disabled():
            assert changed_tensors(base, tiny_pipe) == set()
            raise ZeroDivisionError
        assert torch.equal(draw(tiny_pipe), both_image)
        with pytest.raises(AttachError, match="no erasure named 'dog'"):
            manager.set_erasures("dog")
        with pytest.raises(AttachError, match="1 strengths for 2"):
            manager.set_erasures(["cat", "monet"], [1.0])
        with pytest.raises(AttachError, match="attached already"):
            manager.add(made, "cat")
        with pytest.raises(AttachError, match="letters"):
            manager.add(made, "a.b")
        assert changed_tensors(both, tiny_pipe) == set()

    def test_attaching_to_a_disabled_pipeline_erases(
        self, tiny_pipe: Any, made: Erasure, other: Erasure, manager: ErasureManager
    ) -> None:
        manager.add(made, "cat")
        manager.disable()
        manager.add(other, "monet")
        assert manager.active_erasures() == ["cat", "monet"]
        assert manager.verify() > 0

    def test_fuse_unfuse(
        self, tiny_pipe: Any, made: Erasure, other: Erasure, manager: ErasureManager, base: dict, tensors_of: Any,
        changed_tensors: Any, case: str,
    ) -> None:  # fmt: skip
        manager.add(made, "cat")
        alone = tensors_of(tiny_pipe)
        manager.fuse()
        assert manager.fused_erasures == ["cat"]
        manager.add(other, "monet")
        manager.disable()
        with pytest.raises(AttachError, match="'monet' is not in force"):
            manager.fuse(["cat", "monet"])
        assert changed_tensors(alone, tiny_pipe) == set()
        with pytest.raises(AttachError, match="fused and always in force"):
            manager.set_erasures("cat")
        with pytest.raises(UnsupportedModelError, match="fused"):
            fit(tiny_pipe, case, "dog")
        manager.unload()
        assert changed_tensors(alone, tiny_pipe) == set()
        manager.unfuse()
        assert changed_tensors(base, tiny_pipe) == set(), "disabled, and no longer fused"
        manager.enable()
        assert changed_tensors(alone, tiny_pipe) == set()
        manager.unload()
        assert changed_tensors(base, tiny_pipe) == set()

    def test_a_copy_runs_its_own_weights(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, draw: Any
    ) -> None:
        manager.add(made, "cat")
        twin = copy.deepcopy(tiny_pipe)
        before = draw(twin)
        with torch.no_grad():
            for parameter in tiny_pipe.text_encoder.parameters():
                parameter.zero_()
        assert torch.equal(draw(twin), before)

    def test_a_slightly_tuned_model_is_refused(self, tiny_pipe: Any, made: Erasure, manager: ErasureManager) -> None:
        component, path = next(key for key in known(made) if key.endswith(".weight")).split("/")
        with torch.no_grad():
            paths.parameter(tiny_pipe.components[component], path).mul_(1 + 1e-6)
        with pytest.raises(WrongBaseError):
            manager.add(made)

    def test_another_family_is_refused(self, tiny_pipe: Any, made: Erasure, manager: ErasureManager) -> None:
        config = dataclasses.replace(made.config, family="flux")
        with pytest.raises(WrongBaseError, match="is for flux"):
            manager.add(Erasure(config, made.edits))

    def test_unloading_the_users_lora_leaves_the_erasure(
        self, tiny_pipe: Any, erased_image: Any, made: Erasure, manager: ErasureManager, draw: Any
    ) -> None:
        manager.add(made)
        tiny_pipe.load_lora_weights(users_lora(tiny_pipe), adapter_name="mine")
        tiny_pipe.unload_lora_weights()
        assert torch.equal(draw(tiny_pipe), erased_image)
        assert manager.verify() > 0

    @pytest.mark.parametrize("order", ["unfuse, unload", "unload, unfuse", "disable, unfuse, enable"])
    def test_a_lora_fused_over_it_and_taken_out_again(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, base: dict, order: str, base_image: Any,
        draw: Any,
    ) -> None:  # fmt: skip
        """PEFT subtracts what it added, which leaves rounding; the originals are held."""
        manager.add(made)
        alone = draw(tiny_pipe)
        tiny_pipe.load_lora_weights(users_lora(tiny_pipe), adapter_name="mine")
        tiny_pipe.fuse_lora(lora_scale=0.7)
        assert manager.verify() > 0
        both = draw(tiny_pipe)
        assert (both - alone).abs().max() > 1e-3
        for step in order.split(", "):
            tiny_pipe.unfuse_lora() if step == "unfuse" else getattr(manager, step)()
        tiny_pipe.unload_lora_weights()
        if "enable" in order:
            assert manager.verify() > 0
            torch.testing.assert_close(draw(tiny_pipe), alone, atol=1e-4, rtol=0)
            manager.unload()
        if order != "unload, unfuse":
            for key in edited(made):
                component, path = key.split("/")
                assert torch.equal(paths.parameter(tiny_pipe.components[component], path), base[key]), key
        torch.testing.assert_close(draw(tiny_pipe), base_image, atol=1e-4, rtol=0)


@pairs(CASES)
def test_has_no_kind_of_edit_that_is_not_tested_when_attached(pair: tuple[str, str], made: Erasure) -> None:
    case, family = pair
    tested = {**ATTACHED, **(ALONE if family in FIRST else {})}
    assert tested.get(case, set()) <= kinds(made)
    assert kinds(made) <= set().union(*(found for name, found in tested.items() if (name, family) not in REFUSED))


@pairs(("uce", "itd"))
def test_learned_tokens_that_a_pipeline_lacks_are_said(
    case: str, tiny_pipe: Any, tiny_pipe_original: Any, teach: Any, tmp_path: Any
) -> None:
    teach_all(teach, tiny_pipe, "a", "cat")
    saved = fit(tiny_pipe, case, "<my-pet>").save(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownTokenWarning)
        erasure.load(tiny_pipe, saved, name="same")
    lacking, unlike = copy.deepcopy(tiny_pipe_original), copy.deepcopy(tiny_pipe_original)
    with pytest.warns(UnknownTokenWarning, match="which this pipeline lacks"):
        erasure.load(lacking, saved, name="lacking")
    teach_all(teach, unlike, "a", "dog")
    with pytest.warns(UnknownTokenWarning, match="other vectors"):
        erasure.load(unlike, saved, name="unlike")


@pytest.mark.parametrize(
    ("pair", "first"), COMPILED, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
@pytest.mark.compile
def test_survives_compile(
    tiny_pipe: Any, erased_image: Any, made: Erasure, manager: ErasureManager, base_image: Any,
    draw: Any, first: str,
) -> None:  # fmt: skip
    torch.compiler.reset()
    component = made.components[0]
    if first == "attach":
        manager.add(made)
    if first == "attach":
        getattr(tiny_pipe, component).compile(backend="eager")
    else:
        setattr(tiny_pipe, component, torch.compile(getattr(tiny_pipe, component), backend="eager"))
        torch.testing.assert_close(draw(tiny_pipe), base_image)
        manager.add(made)
    torch.testing.assert_close(draw(tiny_pipe), erased_image)
    assert manager.verify() > 0
    manager.unload()
    torch.testing.assert_close(draw(tiny_pipe), base_image)
    with pytest.raises(VerificationError, match="no erasure is attached"):
        manager.verify()


@pairs(TEXT_SIDE)
def test_the_drop_in_from_pipe_warns_of_bypassing_too(tiny_pipe: Any, made: Erasure, draw: Any, drop_in: Any) -> None:
    ErasureManager(tiny_pipe).add(made)
    shared = drop_in.from_pipe(tiny_pipe)
    shared.set_progress_bar_config(disable=True)
    with pytest.warns(BypassedErasureWarning):
        draw(shared, None, **{name: torch.zeros_like(part) for name, part in embeddings(shared).items()})


@pairs(ATTACHED, UNETS, alone=ALONE)
def test_an_ip_adapter_is_left_alone(
    tiny_pipe: Any, made: Erasure, manager: ErasureManager, base: dict, changed_tensors: Any,
    load_tiny_ip_adapter: Any,
) -> None:  # fmt: skip
    before = load_tiny_ip_adapter(tiny_pipe)
    embeds = torch.zeros(2, 1, 1, 16)
    options = {"ip_adapter_image_embeds": [embeds[:, 0]], "output_type": "np"}
    stock = draw_with(tiny_pipe, options)
    tensors = {key: value.clone() for key, value in tiny_pipe.unet.state_dict().items()}
    manager.add(made)
    assert tiny_pipe.unet.attn_processors == before
    assert not torch.equal(draw_with(tiny_pipe, options), stock)
    manager.unload()
    assert torch.equal(draw_with(tiny_pipe, options), stock)
    after = tiny_pipe.unet.state_dict()
    assert set(after) == set(tensors)
    assert all(torch.equal(after[key], value) for key, value in tensors.items())


@pairs(("uce", "esd"))
def test_a_low_rank_erasure_is_a_stock_lora(
    tiny_pipe: Any, tiny_pipe_original: Any, made: Erasure, draw: Any, tmp_path: Any, erased_image: Any
) -> None:
    assert kinds(made) == {"low_rank"}
    folder = made.save(tmp_path / "lora")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "erasure_config.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    tiny_pipe.load_lora_weights(folder)
    torch.testing.assert_close(draw(tiny_pipe), erased_image, rtol=0, atol=1e-4)
    assert (draw(tiny_pipe) - draw(tiny_pipe_original)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [*NAMES, "latent-consistency"])
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_refused_with_the_reason_and_nothing_else_is(case: str, kind: str, originals: Any) -> None:
    pipe, reason = originals(kind), REFUSED.get((case, kind))
    strategy, lacks = get(CASES[case][0]), backbone_for(pipe).lacks
    assert any(lacks(need) for need in strategy.needs) == (reason is not None)
    if reason is not None:
        with pytest.raises(UnsupportedModelError, match=rf"{strategy.name} needs .*{reason}"):
            fit(pipe, case)


def test_every_family_has_a_tiny_pipeline_of_its_own(tiny_models: Any) -> None:
    names = [family.family for family in FAMILIES]
    assert [backbone_for(tiny_models[name]()).family for name in names] == names


def teach_all(teach: Any, pipe: Any, *words: str, token: str = "<my-pet>") -> None:
    """Teach a token to all of a pipeline's text encoders."""
    if not hasattr(pipe, "load_textual_inversion"):
        pytest.skip("its pipeline has no loader of learned tokens")
    for name in ("", "_2", "_3"):
        if pipe.components.get(f"tokenizer{name}") is not None:
            teach(pipe, *words, token=token, suffix=name)


def embeddings(pipe: Any) -> dict[str, torch.Tensor]:
    """What a pipeline encodes the prompt as, by arguments of its call."""
    world = World.of(pipe)
    backbone = backbone_for(pipe, size=world.size, length=world.text_length)
    own, null = backbone.encode([PROMPT]), backbone.null(backbone.encode([""]))
    found = {
        "prompt_embeds": own.tokens, "pooled_prompt_embeds": own.pooled, "prompt_attention_mask": own.mask,
        "negative_prompt_embeds": null.tokens, "negative_pooled_prompt_embeds": null.pooled,
        "negative_prompt_attention_mask": null.mask,
    }  # fmt: skip
    taken = inspect.signature(type(pipe).__call__).parameters
    return {name: part for name, part in found.items() if part is not None and name in taken}


def check_config(made: Erasure, targets: list[str], pipe: Any) -> None:
    """Check what an erasure says of itself."""
    assert [concept.target for concept in made.concepts] == targets
    assert len(made.edits) > 0
    assert known(made) >= edited(made)
    assert known(made)
    assert made.config.family == backbone_for(pipe).family
    assert made.config.protects in ("hosted pipeline", "released weights")
    assert made.config.cost["seconds"] > 0
    json.dumps(dataclasses.asdict(made.config), allow_nan=False)


def differ(one: Erasure, another: Erasure) -> bool:
    """Whether some of their tensors do."""
    pairs = zip(flat(one), flat(another), strict=False)
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def flat(made: Erasure) -> list[torch.Tensor]:
    """Every tensor of an erasure."""
    return [*made.edits.delta_state_dict().values(), *made.edits.lora_state_dict().values()]


def draw_with(pipe: Any, options: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    made = pipe(PROMPT, num_inference_steps=1, height=32, width=32, generator=generator, **options)
    return torch.from_numpy(made.images[0])


def users_lora(pipe: Any) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on layers that strategies edit and on others, in diffusers' file format."""
    generator = torch.Generator().manual_seed(3)
    backbone, state = backbone_for(pipe), {}
    for part, kind in (("to_k", "self"), ("to_q", "cross")):
        site = next(site for site in backbone.attention_sites() if site.kind != kind)
        key = f"{backbone.denoiser_component}.{site.name}.{part}"
        state |= lora_pair(key, getattr(site.module, part), generator)
    root = backbone.tower("text_encoder").root
    if hasattr(root.encoder, "layers"):  # no T5: stock pipelines load no LoRA into one
        for path in (
            "encoder.layers.0.self_attn.out_proj",
            "encoder.layers.0.self_attn.q_proj",
            "encoder.layers.1.mlp.fc1",
        ):
            state |= lora_pair(f"text_encoder.text_model.{path}", root.get_submodule(path), generator)
    return state


def lora_pair(key: str, layer: torch.nn.Linear, generator: torch.Generator) -> dict[str, torch.Tensor]:
    down = torch.randn(2, layer.in_features, generator=generator) * 0.2
    up = torch.randn(layer.out_features, 2, generator=generator) * 0.2
    return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
