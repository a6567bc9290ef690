"""Erasures that somebody else wrote: broken, hostile or large ones are named errors, at once, and nothing is lost."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure import Concept, Erasure, ErasureConfig
from erasure.artifact import CONFIG_FILE, DELTA_FILE, LORA_FILE
from erasure.carriers.activations import Pinned
from erasure.carriers.edits import EDITABLE_COMPONENTS, Edits, LowRank
from erasure.carriers.features import FeatureEdit
from erasure.carriers.reconstruction import ReconstructionEdit
from erasure.carriers.weights import fingerprint
from erasure.errors import ArtifactError, ErasureError, WrongBaseError

UNET, TEXT, BLOCK = (
    "unet/mid_block.attn2.to_k",
    "text_encoder/encoder.layers.0.mlp.fc1.bias",
    "text_encoder/encoder.layers.1",
)
RATES = {"tpr": 0.9, "fpr": 0.1, "auc": 0.95, "roc": [[0.0, 0.5], [1.0, 1.0]]}
GATE = {"decides": "probe", "features": RATES, "probe": RATES, "prompts_with": 3, "prompts_without": 4}


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def feature_edit(**changes: Tensor) -> FeatureEdit:
    pairs = torch.tensor([[0, 0], [0, 1]])
    edit = FeatureEdit(
        some(4, 3), some(3), some(3, 4), some(3), some(3), some(3), pairs, pairs.clone(), some(2), some(1), some(1),
        some(4, 1), some(1), some(1), torch.zeros(0, 4), *(torch.tensor(number) for number in (0, 1, 1, 9)),
    )  # fmt: skip
    return edit._replace(**changes)


def reconstruction(**changes: Tensor) -> ReconstructionEdit:
    edit = ReconstructionEdit(
        some(4, 6), some(6), some(6, 4), some(4), torch.tensor(2), some(6), torch.tensor(0.5), torch.tensor(1),
        torch.tensor(9),
    )  # fmt: skip
    return edit._replace(**changes)


def edits(**changes: Any) -> Edits:
    made = {
        "low_rank": {UNET: LowRank(some(2, 4), some(5, 2))}, "deltas": {TEXT: some(6).half()},
        "pinned": {"text_encoder": Pinned(torch.arange(6).view(2, 3), some(2, 3, 4))},
        "features": {BLOCK: feature_edit()},
    }  # fmt: skip
    return Edits(**{**made, **changes})


def erasure(changed: Edits | None = None, **config: Any) -> Erasure:
    changed = edits() if changed is None else changed
    touched = [*changed.parameters, *(f"{block}.layer_norm1.weight" for block in changed.features)]
    base = {"model": "someone/model", "tensors": {key: fingerprint(torch.ones(1)) for key in touched}}
    given = {
        "strategy": "itd", "concepts": [Concept("cat").to_dict()], "family": "stable-diffusion", "base": base,
        "carriers": changed.carriers, "gates": {"cat": GATE}, "evaluation": {"UA": 0.97, "CLIP": None},
    }  # fmt: skip
    return Erasure(ErasureConfig(**{**given, **config}), changed)


def write(folder: Path, made: Erasure, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As somebody does who checks nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(Edits, "check", lambda self: None)
        return made.save(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return erasure().save(tmp_path / "saved")


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_what_is_whole_is_read(folder: Path) -> None:
    assert Erasure.load(folder).config == erasure().config
    rewrite(folder, base={**erasure().config.base, "text_encoders": {"text_encoder": fingerprint(torch.ones(1))}})
    assert set(Erasure.load(folder).config.base["text_encoders"]) == {"text_encoder"}


# What may be edited --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "component", ["safety_checker", "vae", "image_encoder", "tokenizer", "controlnet", "unet2", ""]
)
@pytest.mark.parametrize("kind", ["deltas", "low_rank", "pinned", "features"])
def test_only_text_encoders_and_denoisers_are_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str, kind: str
) -> None:
    key = {"deltas": "vision.weight", "low_rank": "vision", "features": "layers.1", "pinned": ""}[kind]
    key = f"{component}/{key}" if key else component
    edit = getattr(edits(), kind).popitem()[1]
    hostile = edits(**{kind: {key: edit}})
    with pytest.raises(ArtifactError, match="no erasure may; allowed: text_encoder"):
        hostile.check()
    with pytest.raises(ArtifactError):
        erasure(hostile).save(tmp_path / "a")
    with pytest.raises(ArtifactError):
        Erasure.load(write(tmp_path / "a", erasure(hostile), monkeypatch))


@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_what_only_text_encoders_hold_is_refused_elsewhere(component: str) -> None:
    for changed in (
        edits(pinned={component: edits().pinned["text_encoder"]}), edits(features={f"{component}/a": feature_edit()})
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match="allowed: text_encoder, text_encoder_2, text_encoder_3"):
            changed.check()
    assert component in EDITABLE_COMPONENTS
    edits(deltas={f"{component}/a.weight": some(3)}).check()


@pytest.mark.parametrize("key", ["unet/", "unet/a..b", "unet/../x", "unet/a/b", "unet/a b", "unet/a\u202e", "unet/.a"])
def test_keys_name_parameters(key: str) -> None:
    with pytest.raises(ArtifactError, match="names no parameter"):
        edits(deltas={key: some(3)}).check()


# Tensors -------------------------------------------------------------------------------------------------------------

PAIRS = torch.tensor([[0, 0], [0, 1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"low_rank": {UNET: LowRank(some(2, 4), some(5, 2))}, "deltas": {f"{UNET}.weight": some(5, 4)}},
            "edited twice",
        ),
        ({"deltas": {TEXT: torch.arange(6)}}, "int64, allowed: float"),
        ({"deltas": {TEXT: torch.ones(6, dtype=torch.complex64)}}, "complex64"),
        ({"deltas": {TEXT: torch.ones(6).to(torch.float8_e4m3fn)}}, "float8"),
        ({"deltas": {TEXT: torch.zeros(0)}}, "no values"),
        ({"low_rank": {UNET: LowRank(torch.zeros(0, 4), torch.zeros(5, 0))}}, "no values"),
        ({"pinned": {"text_encoder": Pinned(torch.arange(6).view(3, 2), some(2, 3, 4))}}, "do not fit"),
        ({"pinned": {"text_encoder": Pinned(torch.arange(6).view(2, 3), some(2, 3, 4), some(2, 3, 4))}}, "do not fit"),
        ({"pinned": {"text_encoder": Pinned(torch.arange(6).view(2, 3), some(2, 3, 4), some(2, 5, 3, 9))}}, "not fit"),
        ({"pinned": {"text_encoder": Pinned(torch.ones(2, 3), some(2, 3, 4))}}, "input_ids.*float32"),
        ({"pinned": {"text_encoder": Pinned(torch.arange(6).view(2, 3) - 1, some(2, 3, 4))}}, "token -1"),
        ({"features": {BLOCK: feature_edit(w_dec=some(3, 5))}}, "do not fit"),
        ({"features": {BLOCK: feature_edit(probe=some(5, 1))}}, "do not fit"),
        ({"features": {BLOCK: feature_edit(edits=PAIRS + 7)}}, "do not fit"),
        ({"features": {BLOCK: feature_edit(edits=PAIRS.float())}}, "edits is torch.float32"),
        ({"features": {BLOCK: feature_edit(rule=torch.tensor(2))}}, "rule is 2"),
        ({"features": {BLOCK: feature_edit(first=torch.tensor(-1))}}, "first is -1"),
        ({"features": {BLOCK: feature_edit(end=torch.tensor(2**40))}}, "end is"),
        ({"features": {BLOCK: reconstruction(b_dec=some(5))}}, "do not fit"),
        ({"features": {BLOCK: reconstruction(k=torch.tensor(0))}}, "do not fit"),
        ({"features": {BLOCK: reconstruction(gate=torch.tensor([0.5]))}}, "do not fit"),
    ],
)
def test_tensors_that_cannot_be_are_found_when_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    changed = edits(**changes)
    with pytest.raises(ArtifactError, match=message):
        changed.check()
    with pytest.raises(ErasureError):
        erasure(changed).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ArtifactError):
        Erasure.load(write(tmp_path / "b", erasure(changed), monkeypatch))


@pytest.mark.parametrize(
    "changed",
    [
        Edits(deltas={TEXT: torch.zeros(6)}),
        Edits(deltas={TEXT: torch.full((6,), 1e-30)}),
        Edits(low_rank={UNET: LowRank(some(2, 4), torch.zeros(5, 2))}),
        Edits(low_rank={UNET: LowRank(torch.zeros(2, 4), some(5, 2))}),
        Edits(low_rank={UNET: LowRank(torch.eye(2, 4), torch.eye(2)[[0, 0, 0]] * torch.tensor([0.0, 1.0]))}),
        Edits(features={BLOCK: feature_edit(gain=torch.zeros(3), offset=torch.zeros(3))}),
        Edits(features={BLOCK: feature_edit(w_dec=torch.zeros(3, 4))}),
        Edits(features={BLOCK: feature_edit(edits=torch.zeros(2, 0, dtype=torch.int64))}),
        Edits(features={BLOCK: reconstruction(factor=torch.ones(6))}),
        Edits(pinned={"text_encoder": Pinned(torch.arange(6).view(2, 3), some(2, 3, 4))}),
        Edits(),
    ],
)
def test_an_erasure_that_changes_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: Edits
) -> None:
    with pytest.raises(ArtifactError, match="changes nothing"):
        changed.check()
    with pytest.raises(ArtifactError, match="changes nothing"):
        Erasure.load(write(tmp_path / "a", erasure(changed), monkeypatch))


def test_one_edit_among_others_may_be_nothing() -> None:
    Edits(deltas={TEXT: torch.zeros(6), f"{UNET}.bias": some(3)}).check()
    Edits(features={BLOCK: feature_edit(gain=torch.zeros(3), offset=torch.zeros(3), filler=some(2, 4))}).check()


def test_the_same_lora_layer_under_two_names_is_refused(folder: Path) -> None:
    tensors = load_file(folder / LORA_FILE)
    for part in "AB":
        tensors[f"text_encoder.a.lora_{part}.weight"] = some(2, 2)
        tensors[f"text_encoder.text_model.a.lora_{part}.weight"] = some(2, 2) + 1
    save_file(tensors, folder / LORA_FILE)
    with pytest.raises(ArtifactError, match="edited twice"):
        Erasure.load(folder)


def test_widths_are_compared_with_the_encoder() -> None:
    edits().check_width("text_encoder", 4)
    edits().check_width("text_encoder_2", 7)
    for changed in (edits(features={}), edits(pinned={}), edits(features={BLOCK: reconstruction()}, pinned={})):
        with pytest.raises(WrongBaseError, match="width of 4, the text_encoder of this pipeline has 8"):
            changed.check_width("text_encoder", 8)


def test_shared_tensors_can_be_written(tmp_path: Path) -> None:
    shared = some(6)
    made = erasure(Edits(deltas={TEXT: shared, f"{UNET}.bias": shared, f"{UNET}.scale": shared[:3]}))
    assert torch.equal(Erasure.load(made.save(tmp_path / "a")).deltas[f"{UNET}.scale"], shared[:3])


def test_reading_is_apart_from_the_file(folder: Path) -> None:
    made = Erasure.load(folder)
    path = folder / DELTA_FILE
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(made.deltas[TEXT], edits().deltas[TEXT])


# Configs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"gates": []}, {"gates": {"cat": 1}}, {"gates": {"cat": {}}}, {"gates": {"cat": {**GATE, "decides": "me"}}},
        {"gates": {"cat": {**GATE, "features": {**RATES, "roc": 3}}}}, {"gates": {"cat": {**GATE, "more": 1}}},
        {"gates": {"cat": {**GATE, "probe": {**RATES, "tpr": "<script>"}}}},
        {"gates": {"cat": {**GATE, "probe": {**RATES, "auc": 7}}}}, {"gates": {"a\x1b[31m": GATE}},
        {"evaluation": 1}, {"evaluation": []}, {"evaluation": {"UA": {"deep": {"er": 1}}}}, 
        {"evaluation": {"a\nb": 1}},
        {"evaluation": {"UA": "\x1b[2J"}}, {"evaluation": {"UA": "x" * 2_000_000}},
        {"strategy_config": []}, {"strategy_config": {"\u202e": 1}}, {"strategy_config": {"": 1}},
        {"versions": {"torch": 2}}, {"versions": "2"}, {"versions": {"torch": "2\n3"}},
        {"cost": {"seconds": "1"}}, {"cost": [1]}, {"cost": {"seconds": True}}, {"cost": {"seconds": None}},
        {"carriers": "weights"}, {"carriers": [1]}, {"carriers": ["weights", "weights"]}, {"carriers": {}},
        {"seed": "3"}, {"seed": 1.5}, {"seed": True}, {"seed": None}, {"seed": 2**64}, {"seed": -(2**70)},
        {"strategy": ""}, {"strategy": None}, {"strategy": ["esd"]}, {"strategy": "a\x9bb"},
        {"strategy": "x" * 10_000},
        {"family": {}}, {"family": "a\u2028b"}, {"protects": 5}, {"protects": "\x07"},
        {"base": {"tensors": {TEXT: "abc"}}}, {"base": {"tensors": {TEXT: {"float32": 5}}}}, {"base": []},
        {"base": {"tensors": {TEXT: {"float32": "zz"}}}}, {"base": {"tensors": {TEXT: {"\x1b": "0" * 64}}}},
        {"base": {"tensors": {"../../x": {}}}}, {"base": {"tensors": []}}, {"base": {"model": 5, "tensors": {}}},
        {"base": {"surprise": 1}}, {"base": {"revision": "\x00"}},
        {"base": {**erasure().config.base, "text_encoders": {"safety_checker": {}}}},
        {"base": {**erasure().config.base, "text_encoders": {"text_encoder": "abc"}}},
        {"concepts": {}}, {"concepts": [[]]}, {"concepts": [{"target": 5}]},
        {"concepts": [{"target": "a", "kind": "b"}]},
        {"concepts": [{"target": "a", "retain": "b"}]}, {"concepts": [{"target": "a", "retain": [1]}]},
        {"concepts": [{"target": "a", "templates": ["no place"]}]}, {"concepts": [{"target": "a", "surprise": 1}]},
        {"concepts": [{"target": "\u202ea"}]}, {"concepts": [{"target": "x" * 100_000}]},
        {"concepts": [{"target": None}]},
        {"concepts": [{"target": "a", "anchor": []}]}, {"concepts": [{"target": "a", "retain": ["A"]}]},
        {"format_version": 0}, {"format_version": -1}, {"format_version": True}, {"format_version": 1.0},
        {"format_version": 10**30},
    ],
)  # fmt: skip
def test_every_field_has_a_type(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder, **changes)
    with pytest.raises(ArtifactError) as caught:
        Erasure.load(folder)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert said.isprintable()
    assert len(said) < 1500


@pytest.mark.parametrize(
    "text", ["[" * 5000, "9" * 5000, '"\\ud800"', "NaN", "1e999", '{"a": 1, "a": 2}', "[" * 5000 + "]" * 5000]
)
@pytest.mark.parametrize("field", ["seed", "evaluation", "strategy_config", "cost"])
def test_json_that_hurts(folder: Path, field: str, text: str) -> None:
    rewrite(folder, **{field: "@"})
    path = folder / CONFIG_FILE
    path.write_text(path.read_text().replace('"@"', text))
    with pytest.raises(ArtifactError, match="cannot be read"):
        Erasure.load(folder)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    for config in (
        {"seed": 2**70},
        {"strategy": "a\x1b"},
        {"cost": {"seconds": float("nan")}},
        {"evaluation": {"a": {"b": {}}}},
    ):
        with pytest.raises(ArtifactError):
            erasure(**config).save(tmp_path / "a")
        assert not (tmp_path / "a").exists()


# What stands in a file's place ---------------------------------------------------------------------------------------


def become_pipe(path: Path) -> None:
    os.mkfifo(path)


def become_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 4 * 2**30)


@pytest.mark.parametrize("name", [CONFIG_FILE, DELTA_FILE, LORA_FILE])
@pytest.mark.parametrize(
    "become",
    [
        become_pipe, Path.mkdir, become_huge, lambda path: path.symlink_to("gone"),
        lambda path: path.symlink_to(path.name), lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/etc/passwd"), lambda path: path.write_bytes(b""),
    ],
)  # fmt: skip
def test_no_file_is_a_named_error_at_once(folder: Path, name: str, become: Callable[[Path], Any]) -> None:
    (folder / name).unlink()
    become(folder / name)
    started = time.monotonic()
    with pytest.raises(ArtifactError, match="cannot be read"):
        Erasure.load(folder)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy_config": {f"option {i}": [i] * 10 for i in range(40_000)}},
        {"base": {"tensors": {f"unet/a{i}.weight": {} for i in range(150_000)}}},
        {"evaluation": {"UA": [1] * 1_000_000}},
        {"evaluation": {"UA": "x" * 50_000_000}},
        {"concepts": [{}] * 500_000},
    ],
    ids=["options", "tensors", "values", "text", "concepts"],
)
def test_large_files_are_refused_at_once(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder, **changes)
    started = time.process_time()
    with pytest.raises(ArtifactError) as caught:
        Erasure.load(folder)
    assert time.process_time() - started < 3
    assert len(str(caught.value)) < 1500
