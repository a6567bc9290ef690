"""ItD: choosing features, setting the gate, and its effect on the embedded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import erasure
from erasure import Concept, ErasureManager
from erasure.backbones import backbone_for
from erasure.errors import ArtifactError, AttachError, ConceptError, OptionError, WrongBaseError
from erasure.sae import save
from erasure.strategies.itd import Evidence, ItD, area, calibrate, evidence, select


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
    assert select(found, ItD(), "cat") == [2, 0]
    assert select(found, ItD(features=1), "cat") == [2]
    with pytest.raises(ConceptError, match=r"latent 0 fires on 100% of them"):
        select(found, ItD(retain_rate=0.0, target_rate=1.01), "cat")


def test_the_gate_stands_in_the_middle_of_the_gap() -> None:
    target, retain = torch.tensor([0.8, 0.9, 1.0]), torch.tensor([0.0, 0.1, 0.2])
    assert calibrate(target, retain, 5.0) == pytest.approx(0.5)


def test_the_gate_weighs_false_positives() -> None:
    target = torch.tensor([0.5] * 50 + [0.9] * 50)
    retain = torch.tensor([0.0] * 98 + [0.6] * 2)  # two words that nobody said were synonyms
    assert calibrate(target, retain, 5.0) < 0.5
    assert 0.6 < calibrate(target, retain, 50.0) < 0.9


def test_a_gate_without_any_difference_stays_above_nothing() -> None:
    assert calibrate(torch.zeros(3), torch.zeros(4), 5.0) > 0


def test_area_under_the_curve_is_the_share_of_right_pairs() -> None:
    assert area(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


@pytest.fixture(scope="module")
def canvas() -> Any:
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_of(pipe: Any, prompt: str, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=10, guidance_scale=2.0, generator=generator).images[0]


def test_erases_the_concept_and_no_bit_of_anything_else(canvas: Any) -> None:
    from erasure.eval.detectors import CanvasJudge

    prompts = ["a dog in noto style", "a castle in pixel style", ""]
    before = [image_of(canvas, prompt).tobytes() for prompt in prompts]
    made = erasure.erase(canvas, "gun", "itd", progress=False)
    manager = ErasureManager(canvas)
    try:
        after = [image_of(canvas, prompt).tobytes() for prompt in prompts]
        assert before == after
        images = [image_of(canvas, f"a gun in {style} style", seed=1) for style in ("noto", "ink")]
        assert all("gun" not in answer.objects for answer in CanvasJudge()(images))
    finally:
        manager.unload()
    assert made.size_bytes < 100_000
    assert made.config.carriers == ["activations"]
    assert made.config.cost["gun_tpr"] >= 0.95
    assert made.config.cost["gun_fpr"] <= 0.02


def test_concepts_of_a_prompt_are_told(canvas: Any) -> None:
    manager = ErasureManager(canvas)
    prompts = ["an apple on a blue background", "a car in noto style", "a house in ink style", "a house in noto style"]
    try:
        erasure.erase(canvas, ["apple", Concept("ink", kind="style")], "itd", name="two", progress=False)
        erasure.erase(canvas, "car", "itd", name="one", progress=False)
        found = manager.detect_concepts(prompts)
        assert [{name for name, one in each.items() if one.present} for each in found] == [
            {"apple"}, {"car"}, {"ink"}, set(),
        ]  # fmt: skip
        assert all(0 <= one.score <= 1 for each in found for one in each.values())
        assert manager.verify() == 2
        assert manager.detect_concepts(prompts[1]) == [found[1]]
    finally:
        manager.unload()
    with pytest.raises(AttachError, match="no attached erasure"):
        manager.detect_concepts(prompts)


def test_more_features_of_other_concepts_do_not_erase(canvas: Any) -> None:
    """The control: the features of a gun, put behind a gate that a cat opens, leave the cat a cat."""
    from erasure.eval.detectors import CanvasJudge

    gun = erasure.erase(canvas, "gun", "itd", attach=False, progress=False)
    ((key, edit),) = gun.edits.features.items()
    gun.edits.features[key] = edit._replace(gate=torch.tensor([-1.0]))
    manager = ErasureManager(canvas)
    manager.add(gun)
    try:
        image = image_of(canvas, "a cat in ink style", seed=2)
    finally:
        manager.unload()
    assert CanvasJudge()([image])[0].object == "cat"


def test_a_dictionary_of_another_encoder_is_refused(tiny_pipe_factory: Any, make_dictionary: Any) -> None:
    folder = make_dictionary(tiny_pipe_factory(), layer=0)
    settings = {"progress": False, "attach": False, "retain_rate": 1.0, "target_rate": 0.0, "vocabulary": 8}
    erasure.erase(tiny_pipe_factory(), "cat", "itd", dictionary=str(folder), **settings)
    with pytest.raises(WrongBaseError, match="another text encoder"):
        erasure.erase(tiny_pipe_factory(seed=1), "cat", "itd", dictionary=str(folder), **settings)
    with pytest.raises(ArtifactError, match="holds no autoencoder"):
        erasure.erase(tiny_pipe_factory(), "cat", "itd", dictionary=str(folder / "gone"), **settings)


def test_a_dictionary_that_does_not_say_its_block_needs_it_told(tiny_pipe_factory: Any, make_dictionary: Any) -> None:
    folder = make_dictionary(tiny_pipe_factory(), layer=None)
    with pytest.raises(OptionError, match="give option 'layer'"):
        erasure.erase(tiny_pipe_factory(), "cat", "itd", dictionary=str(folder), progress=False)


@pytest.fixture
def make_dictionary(tmp_path: Any) -> Any:
    """Writes a random dictionary for a tiny pipeline."""
    from erasure.sae import SAEConfig, SparseAutoencoder
    from erasure.sae.stream import block_fingerprint

    def make(pipe: Any, layer: int | None) -> Any:
        metadata: dict[str, Any] = {}
        if layer is not None:
            tower = backbone_for(pipe).towers[0]
            metadata = {"layer": layer, "fingerprint": block_fingerprint(tower, layer)}
        sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=64, k=4, architecture="jumprelu", metadata=metadata))
        generator = torch.Generator().manual_seed(0)
        sae.initialise(torch.randn(50, 32, generator=generator), generator)
        return save(sae, tmp_path / "sae")

    return make
