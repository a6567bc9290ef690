"""What holds while an erasure is made, and which pairs of a strategy and a family cannot work."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.backbones import FAMILIES, backbone_for
from erasure.errors import (
    AttachError,
    ConceptError,
    DivergenceError,
    OptionError,
    UnknownTokenWarning,
    UnsupportedModelError,
)
from erasure.eval.run import Models, Subject
from erasure.strategies import available, get

from .cases import (
    ALONE,
    ATTACHED,
    CASES,
    FIRST,
    LEARNED,
    LEARNED_CONCEPT,
    NAMES,
    REFUSED,
    check_config,
    differ,
    edited,
    fit,
    flat,
    kinds,
    modules,
    pairs,
    spread,
    teach_all,
    text_weight,
    users_lora,
)


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

    def test_every_vector_of_learned_tokens_is_read(self, case: str, tiny_pipe: Any, teach: Any) -> None:
        teach_all(teach, tiny_pipe, "a", "cat", "a")
        teach_all(teach, tiny_pipe, "a", "house", token="<my-home>")
        teach_all(teach, tiny_pipe, "white", "dog", token="<your-pet>")
        # Of a text encoder that gives nothing but a pooled vector a strategy need not read anything.
        reader = backbone_for(tiny_pipe).reader
        known = {word: reader.tokenizer.convert_tokens_to_ids(word) for word in LEARNED}
        seen: list[torch.Tensor] = []
        table = reader.module.get_input_embeddings()
        table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        result = fit(tiny_pipe, case, LEARNED_CONCEPT)
        rows = torch.cat(seen).tolist()
        for word, vectors in LEARNED.items():
            starts = [(row, at) for row in rows for at, token in enumerate(row) if token == known[word]]
            assert starts or word != "<my-pet>"
            for row, at in starts:
                assert row[at : at + vectors] == list(range(known[word], known[word] + vectors))
        assert set(result.config.base["learned_tokens"]["text_encoder"]) == set(LEARNED)


@spread((*ATTACHED, *ALONE))
class TestMakingInHalfPrecision:
    """What holds for every kind of edit; that trained ones are trained in full precision is tested with the loop."""

    def test_made_in_half_precision_fits_the_same_model_in_full(
        self, case: str, tiny_pipe: Any, tiny_pipe_original: Any, manager: ErasureManager
    ) -> None:
        low = copy.deepcopy(tiny_pipe_original).to(torch.bfloat16)
        result = fit(low, case)
        ErasureManager(low).add(result)
        manager.add(result)
        assert manager.verify() > 0


@spread(CASES)
class TestMakingOnPipelines:
    """What holds for every strategy on the first family, and for some on each of the others."""

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

    def test_made_beside_a_users_lora_has_canonical_keys(self, case: str, tiny_pipe: Any, made: Erasure) -> None:
        tiny_pipe.load_lora_weights(users_lora(tiny_pipe), adapter_name="mine")
        result = fit(tiny_pipe, case, attach=True)
        assert edited(result) == edited(made)
        assert ErasureManager(tiny_pipe).verify() > 0


@pairs(CASES, FIRST)
class TestMakingOnOneFamily:
    """What holds while an erasure is made and does not depend on the family."""

    def test_makes_an_erasure_of_every_kind_of_concept(self, case: str, tiny_pipe_original: Any) -> None:
        cat = Concept("cat", kind="object", anchor="animal", retain=("dog",), synonyms=("kitten",))
        gogh, gun = Concept("van gogh", kind="style", retain="monet"), Concept("gun", kind="unsafe")
        for concepts in ([cat], [gogh, gun]):
            made = fit(tiny_pipe_original, case, concepts)
            check_config(made, [concept.target for concept in concepts], tiny_pipe_original)

    def test_works_where_no_gradients_are_kept(self, case: str, tiny_pipe_original: Any, made: Erasure) -> None:
        with torch.no_grad():
            again = fit(tiny_pipe_original, case)
        assert all(torch.equal(a, b) for a, b in zip(flat(again), flat(made), strict=True))

    def test_another_seed_gives_another_one_where_words_are_drawn(
        self, case: str, tiny_pipe_original: Any, made: Erasure
    ) -> None:
        options = {field.name for field in dataclasses.fields(get(CASES[case][0]))}
        if {"vocabulary", "retain_vocabulary"} & options:
            assert differ(fit(tiny_pipe_original, case, seed=1), made)

    def test_a_taken_name_is_refused_before_the_work(
        self, case: str, tiny_pipe: Any, made: Erasure, manager: ErasureManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manager.add(made)
        monkeypatch.setattr(get(CASES[case][0]), "fit", lambda *_, **__: pytest.fail("the work was done"))
        with pytest.raises(AttachError, match="attached already"):
            fit(tiny_pipe, case, attach=True)

    def test_recipes_of_measurements_are_those_of_the_stock_model(
        self, case: str, tiny_pipe: Any, made: Erasure, manager: ErasureManager
    ) -> None:
        """Or no comparison and no mean could hold figures of one method beside those of another."""
        without = Subject.of(Models.of(tiny_pipe), lambda _images: [])
        manager.add(made)
        erased = Subject.of(Models.of(tiny_pipe), lambda _images: [])
        assert erased.drawing == without.drawing
        assert erased.sampler == without.sampler
        assert erased.erased_drawing != without.erased_drawing

    def test_unknown_options_and_values_are_refused(self, case: str, tiny_pipe_original: Any) -> None:
        with pytest.raises(OptionError, match="no option 'stepz'"):
            fit(tiny_pipe_original, case, stepz=1)
        with pytest.raises(OptionError, match="no preset"):
            fit(tiny_pipe_original, case, preset="nonsense")


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
