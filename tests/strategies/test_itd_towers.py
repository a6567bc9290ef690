"""ItD on models with several text encoders: a dictionary and gates for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5EncoderModel

import erasure
from erasure import ErasureManager
from erasure.backbones import TextTower, backbone_for
from erasure.carriers.features import FeatureEdit
from erasure.carriers.reconstruction import ReconstructionEdit
from erasure.errors import ConceptError, OptionError, WrongBaseError
from erasure.sae import SAEConfig, SparseAutoencoder, dictionaries, mining, save
from erasure.sae.detection import Detection, detect_concepts
from erasure.sae.stream import block_fingerprint, default_block
from erasure.strategies import itd

QUICK: dict[str, Any] = {
    "progress": False, "attach": False, "retain_rate": 1.0, "target_rate": 0.0, "vocabulary": 8, "contexts": 2,
    "false_positive_rate": 1.0, "gate": "probe",
}  # fmt: skip
KEYS = ["text_encoder/encoder.layers.1", "text_encoder_2/encoder.layers.1"]


@pytest.fixture
def pipe(tiny_xl: Any) -> Any:
    return tiny_xl


@pytest.fixture(scope="module")
def towers(tiny_xl_original: Any) -> list[TextTower]:
    return backbone_for(tiny_xl_original).towers


def write(folder: Path, tower: TextTower | None, seed: int = 0, **metadata: Any) -> Path:
    """A random dictionary of width 32, of a text encoder's second block."""
    if tower is not None:
        metadata = {"layer": 1, "fingerprint": block_fingerprint(tower, 1), **metadata}
    sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=512, k=4, architecture="jumprelu", metadata=metadata))
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(torch.randn(50, 32, generator=generator), generator)
    return save(sae, folder)


@pytest.fixture(scope="module")
def folders(towers: list[TextTower], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dictionary of each text encoder."""
    root = tmp_path_factory.mktemp("dictionaries")
    return [write(root / str(number), tower, number) for number, tower in enumerate(towers)]


@pytest.fixture(scope="module")
def both(folders: list[Path]) -> str:
    return ",".join(map(str, folders))


def test_every_text_encoder_has_its_own_dictionary_and_gates(
    tiny_xl_original: Any, folders: list[Path], both: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    real = itd.fit_gate

    def counted(*args: Any, rate: float, **options: Any) -> Any:
        rates.append(rate)
        return real(*args, rate=rate, **options)

    monkeypatch.setattr(itd, "fit_gate", counted)
    made = erasure.erase(
        tiny_xl_original, ["cat", "dog"], "itd", dictionary=both, **{**QUICK, "false_positive_rate": 0.5}
    )
    assert list(made.edits.features) == KEYS
    assert made.components == ["text_encoder", "text_encoder_2"]
    first, second = made.edits.features.values()
    assert len(first.gates) == len(second.gates) == 2
    assert not torch.equal(first.probe, second.probe)
    assert list(made.config.gates) == [
        f"{name} ({tower})" for tower in ("text_encoder", "text_encoder_2") for name in ("cat", "dog")
    ]
    assert made.config.cost["text_encoder_2_layer"] == 1
    assert made.config.cost["text_encoder_cat_features"] > 0
    assert rates == [0.25] * 4, "either may open a gate, so each is allowed half"
    rows = {tuple(row) for edit in (first, second) for row in edit.w_dec[:3].tolist()}
    known = [{tuple(row) for row in dictionaries.load(folder).W_dec.half().tolist()} for folder in folders]
    assert rows & known[0]
    assert rows & known[1]


def test_each_of_several_text_encoders_writes_the_anchor_as_strongly_as_it_is_told(
    tiny_xl_original: Any, both: str
) -> None:
    concept = erasure.Concept("cat", anchor="dog")
    usual, strong = (
        erasure.erase(tiny_xl_original, concept, "itd", dictionary=both, **QUICK, **options)
        for options in ({}, {"anchored": 3.0})
    )
    for own, other in zip(usual.edits.features.values(), strong.edits.features.values(), strict=True):
        off, written = own.edits[1].chunk(2)
        assert own.w_dec[written].any()
        torch.testing.assert_close(3 * own.w_dec[written].float(), other.w_dec[written].float(), rtol=1e-2, atol=1e-3)
        assert torch.equal(own.w_dec[off], other.w_dec[off])


def test_saved_and_loaded_it_shares_gates_again(pipe: Any, both: str, tmp_path: Path) -> None:
    made = erasure.erase(pipe, "cat", "itd", dictionary=both, **QUICK)
    folder = made.save(tmp_path / "made")
    again = erasure.Erasure.load(folder)
    assert again.edits.equals(made.edits)
    erasure.load(pipe, again)
    assert "encode_prompt" in vars(pipe)
    assert ErasureManager(pipe).verify() >= 2


def test_a_dictionary_goes_to_the_text_encoder_it_was_made_for(
    towers: list[TextTower], folders: list[Path], tmp_path: Path
) -> None:
    first, second = folders
    for given in (f"{first},{second}", f"{second}, {first}", f"text_encoder_2={second},{first}"):
        assert dictionaries.assigned(given, towers) == {"text_encoder": first, "text_encoder_2": second}
    assert dictionaries.assigned("", towers) == {}
    assert dictionaries.assigned(str(second), towers) == {"text_encoder_2": second}
    assert dictionaries.assigned(f"text_encoder_2={second}", towers) == {"text_encoder_2": second}
    told = write(tmp_path / "told", None, layer=1, hook_name=KEYS[1])
    assert dictionaries.assigned(str(told), towers) == {"text_encoder_2": told}
    # A folder may be called anything; of a model with one text encoder nobody has to say whose it is.
    odd = write(tmp_path / "a=b,c", towers[1])
    assert dictionaries.assigned(str(odd), towers) == {"text_encoder_2": odd}
    assert dictionaries.assigned(str(tmp_path / "gone"), towers[:1]) == {"text_encoder": tmp_path / "gone"}


def test_dictionaries_that_fit_nothing_are_refused(
    tiny_xl_original: Any, tiny_models: Any, towers: list[TextTower], folders: list[Path], tmp_path: Path
) -> None:
    first, second = folders
    with pytest.raises(OptionError, match=r"'text_encoder_3', which this model has not.*text_encoder, text_encoder_2"):
        dictionaries.assigned(f"text_encoder_3={first}", towers)
    with pytest.raises(OptionError, match="two dictionaries for text_encoder,"):
        dictionaries.assigned(f"{first},text_encoder={second}", towers)
    untold = write(tmp_path / "untold", None)
    with pytest.raises(OptionError, match=r"does not say for which text encoder it is: write text_encoder="):
        dictionaries.assigned(str(untold), towers)
    elsewhere = write(tmp_path / "elsewhere", backbone_for(tiny_models["stable-diffusion"](seed=3)).towers[0])
    with pytest.raises(WrongBaseError, match="another text encoder than any of text_encoder, text_encoder_2"):
        dictionaries.assigned(str(elsewhere), towers)
    with pytest.raises(WrongBaseError, match="another text encoder than this text_encoder of width 32"):
        erasure.erase(tiny_xl_original, "cat", "itd", dictionary=f"text_encoder={second}", **QUICK)
    with pytest.raises(WrongBaseError, match="another text encoder than any of"):
        erasure.erase(tiny_xl_original, "cat", "itd", dictionary="canvas-sae", **QUICK)


def test_for_an_encoder_without_a_dictionary_one_is_trained(
    tiny_xl_original: Any, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    real = dictionaries.trained

    def noted(tower: TextTower, *args: Any) -> Path:
        trained.append(tower.component)
        return real(tower, *args)

    monkeypatch.setattr(dictionaries, "trained", noted)
    options = {**QUICK, "steps": 2, "d_sae": 64, "k": 4}
    erasure.erase(tiny_xl_original, "cat", "itd", dictionary=str(folders[1]), **options)
    assert trained == ["text_encoder"]


def test_a_block_that_no_denoiser_reads_is_never_the_default(tiny_clip: Any, tiny_tokenizer: Any) -> None:
    encoder = tiny_clip(tiny_tokenizer)
    del encoder.encoder.layers[2:]
    assert default_block(TextTower("text_encoder", encoder, tiny_tokenizer, 77, consumed=-2)) == 0
    assert default_block(TextTower("text_encoder", encoder, tiny_tokenizer, 77)) == 1


def test_where_every_token_reads_every_other_an_early_block_is_the_default() -> None:
    layers = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "vocab_size": 64}
    for blocks, expected in ((4, 0), (24, 4)):
        encoder = T5EncoderModel(T5Config(num_layers=blocks, **layers))
        assert default_block(TextTower("text_encoder_2", encoder, None, 32)) == expected


@pytest.mark.parametrize("options", [{"mode": "replace"}, {"mode": "clamp"}, {"tokens": "word"},
                                     {"mining_steps": 2}], ids=str)  # fmt: skip
def test_every_way_of_editing_reaches_every_text_encoder(
    pipe: Any, both: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "IMAGES", 1)
    stock = pipe.encode_prompt("a photo of a cat", device="cpu")
    made = erasure.erase(pipe, "cat", "itd", dictionary=both, **{**QUICK, "attach": True, **options})
    after = pipe.encode_prompt("a photo of a cat", device="cpu")
    for part in (slice(32), slice(32, None)):
        assert not torch.equal(after[0][..., part], stock[0][..., part])
    assert not torch.equal(after[2], stock[2])
    assert all(isinstance(edit, FeatureEdit) for edit in made.edits.features.values())
    assert ErasureManager(pipe).verify() >= 2


@pytest.mark.parametrize("preset", ["released", "released-style", "released-nudity"])
def test_the_released_recipes_run_in_every_text_encoder(pipe: Any, both: str, preset: str, tmp_path: Path) -> None:
    """They were made for one; each has a threshold of its own here, and one that is passed opens both."""
    (tmp_path / "others.txt").write_text("a dog\na white car")
    made = erasure.erase(
        pipe, erasure.Concept("cat", synonyms=("monet",)), "itd", preset=preset, top=5, dictionary=both,
        prompts=str(tmp_path / "others.txt"), progress=False,
    )  # fmt: skip
    assert all(isinstance(edit, ReconstructionEdit) for edit in made.edits.features.values())
    assert list(made.edits.features) == KEYS
    assert "encode_prompt" in vars(pipe)
    assert ErasureManager(pipe).verify() >= 2
    told = detect_concepts(pipe, ["a photo of a cat"])[0]["cat"]
    assert told.probe is None


def test_the_surest_text_encoder_is_heard(pipe: Any, both: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from erasure.sae import detection

    erasure.erase(pipe, "cat", "itd", dictionary=both, **{**QUICK, "attach": True})
    answers = {"text_encoder": Detection(0.9, 0.95), "text_encoder_2": Detection(0.5, 0.4)}
    monkeypatch.setattr(detection, "detect", lambda tower, layer, edit, texts: [[answers[tower.component]]])
    assert detect_concepts(pipe, "a cat") == [{"cat": Detection(0.5, 0.4)}]
    answers["text_encoder_2"] = Detection(0.1, 0.4)
    assert detect_concepts(pipe, "a cat")[0]["cat"].present is False


def test_a_concept_that_one_dictionary_cannot_tell_is_refused_by_the_encoder_s_name(
    tiny_xl_original: Any, both: str
) -> None:
    strict = {**QUICK, "retain_rate": 0.0, "target_rate": 1.0, "floor": 1.0}
    with pytest.raises(ConceptError, match=r"dictionary of text_encoder.* tells 'cat' from the rest"):
        erasure.erase(tiny_xl_original, "cat", "itd", dictionary=both, **strict)


def test_the_embedded_dictionary_is_not_taken_for_an_encoder_that_was_trained_on() -> None:
    """It knows its encoder by one matrix, which stays where the embeddings move."""
    pipe = erasure.load_pipeline("canvas-sd", device="cpu")
    (tower,) = backbone_for(pipe).towers
    assert dictionaries.embedded(tower) is not None
    with torch.no_grad():
        table = tower.root.embeddings.token_embedding.weight
        table.copy_(table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))])
    assert dictionaries.embedded(tower) is None
    with pytest.raises(WrongBaseError, match="another text encoder than this text_encoder of width 128"):
        dictionaries.opened(tower, dictionaries.named("canvas-sae"), None)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("flux", ["text_encoder/encoder.layers.2", "text_encoder_2/encoder.block.0"]),
        ("stable-diffusion-3", ["text_encoder/encoder.layers.2", "text_encoder_2/encoder.layers.2",
                                "text_encoder_3/encoder.block.0"]),
        ("chroma", ["text_encoder/encoder.block.0"]),
    ],
)  # fmt: skip
def test_every_family_s_encoders_are_edited(tiny_models: Any, family: str, keys: list[str]) -> None:
    """T5 among them, whose prompts begin with a word, and CLIP of which a pooled vector alone is read."""
    pipe = tiny_models[family]()
    backbone = backbone_for(pipe)
    stock = backbone.encode(["cat, white background", "kitten of a dog"])
    options = {**QUICK, "attach": True, "steps": 2, "d_sae": 64, "k": 4}
    made = erasure.erase(pipe, erasure.Concept("cat", anchor="dog"), "itd", **options)
    assert list(made.edits.features) == keys
    firsts = [int(edit.first) for edit in made.edits.features.values()]
    assert firsts == [int(tower.causal) for tower in backbone.towers]
    after = backbone.encode(["cat, white background", "kitten of a dog"])
    assert not torch.equal(after.tokens[0], stock.tokens[0])
    if stock.pooled is not None:
        assert not torch.equal(after.pooled[0], stock.pooled[0])
    assert ErasureManager(pipe).verify() >= len(keys)
    assert ("encode_prompt" in vars(pipe)) is (len(keys) > 1)
    ErasureManager(pipe).unload()
    assert torch.equal(backbone.encode(["cat, white background", "kitten of a dog"]).tokens, stock.tokens)
