from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure import Concept, Erasure, ErasureConfig
from erasure.artifact import CARD_FILE, CONFIG_FILE, DELTA_FILE, LORA_FILE, default_name
from erasure.carriers.activations import Pinned
from erasure.carriers.edits import Edits, LowRank
from erasure.carriers.weights import fingerprint
from erasure.errors import ArtifactError, DivergenceError

UNET, TEXT = "unet/mid_block.attn2.to_k", "text_encoder/encoder.layers.0.mlp.fc1.bias"


def make(*, pinned: bool = True, low_rank: bool = True) -> Erasure:
    """An erasure of every kind of tensor, for no model in particular."""
    generator = torch.Generator().manual_seed(0)
    edits = Edits(deltas={TEXT: torch.randn(6, generator=generator).half()})
    if low_rank:
        edits.low_rank[UNET] = LowRank(torch.randn(2, 4, generator=generator), torch.randn(5, 2, generator=generator))
    if pinned:
        states, blocks = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 5, 3, 4, generator=generator)
        edits.pinned["text_encoder"] = Pinned(torch.arange(6).view(2, 3), states, blocks)
    digests = {key: fingerprint(torch.ones(1)) for key in edits.parameters}
    config = ErasureConfig(
        strategy="hirm",
        strategy_config={"steps": 3, "lr": 1e-3},
        concepts=[Concept("Van Gogh", kind="style", retain=("Monet",)).to_dict()],
        family="stable-diffusion",
        base={"model": "someone/model", "revision": None, "tensors": digests},
        carriers=edits.carriers,
        protects="hosted pipeline",
        seed=3,
        cost={"seconds": 1.5},
        evaluation={"UA": 0.97},
    )
    return Erasure(config, edits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make().save(tmp_path / "saved")


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_round_trip(folder: Path) -> None:
    made, again = make(), Erasure.load(folder)
    assert again.config == made.config
    assert again.concepts == [Concept("Van Gogh", kind="style", retain=("Monet",))]
    assert again.name == made.name == "van-gogh-hirm"
    assert torch.equal(again.deltas[TEXT], made.deltas[TEXT])
    assert again.deltas[TEXT].dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(again.low_rank[UNET], made.low_rank[UNET], strict=True))
    pins = zip(again.edits.pinned["text_encoder"], made.edits.pinned["text_encoder"], strict=True)
    assert all(torch.equal(a, b) for a, b in pins)
    assert again.components == ["unet", "text_encoder"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([CARD_FILE, CONFIG_FILE, DELTA_FILE, LORA_FILE])
    assert made.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert "Van Gogh" not in repr(again)
    assert "van-gogh-hirm" in repr(again)


def test_saving_is_reproducible(folder: Path, tmp_path: Path) -> None:
    again = Erasure.load(folder).save(tmp_path / "again")
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_only_the_files_that_are_needed(tmp_path: Path) -> None:
    folder = make(pinned=False, low_rank=False).save(tmp_path / "saved")
    assert not (folder / LORA_FILE).exists()
    assert Erasure.load(folder).low_rank == {}


def test_names() -> None:
    assert default_name([Concept("Van Gogh"), Concept("cat")], "uce") == "van-gogh-cat-uce"
    assert default_name([Concept(word) for word in "abcd"], "hirm") == "a-and-3-more-hirm"


def test_the_card_says_what_it_is() -> None:
    card = make(pinned=False).card()
    assert "base_model: someone/model" in card
    assert "Van Gogh (style)" in card
    assert "Protects: hosted pipeline" in card
    assert "| UA | 0.97 |" in card
    assert "load_lora_weights" not in card, "stock diffusers would load a part of it only"


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [DELTA_FILE, LORA_FILE])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
def test_truncated_tensors(folder: Path, name: str, share: float) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ArtifactError, match=r"cannot be read .* damaged"):
        Erasure.load(folder)


def test_tampered_header(folder: Path) -> None:
    path = folder / DELTA_FILE
    content = bytearray(path.read_bytes())
    content[4] = 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="damaged"):
        Erasure.load(folder)


def test_a_pickle_is_not_read(folder: Path) -> None:
    torch.save({TEXT: torch.ones(6)}, folder / DELTA_FILE)
    with pytest.raises(ArtifactError, match="damaged"):
        Erasure.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged"),
        ('{"format_version": 1', "damaged"),
        ("[]", "is this an erasure"),
        ("{}", "is this an erasure"),
        ('"text"', "is this an erasure"),
    ],
)
def test_a_config_that_is_none(folder: Path, content: str, message: str) -> None:
    (folder / CONFIG_FILE).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        Erasure.load(folder)


@pytest.mark.parametrize("key", ["strategy", "concepts", "family", "base", "carriers"])
def test_a_missing_key(folder: Path, key: str) -> None:
    rewrite(folder, **{key: ...})
    with pytest.raises(ArtifactError, match=f"lacks .*{key}"):
        Erasure.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, r"unknown keys \['surprise'\]; allowed"),
        ({"format_version": 99}, "format version 99.* pip install --upgrade"),
        ({"format_version": "1"}, "no whole number"),
        ({"concepts": []}, "cannot be read"),
        ({"concepts": ["cat"]}, "cannot be read"),
        ({"concepts": [{"kind": "object"}]}, "cannot be read"),
        ({"concepts": [{"target": ""}]}, "cannot be read"),
        ({"base": "model"}, "cannot be read"),
        ({"base": {}}, "tensors and config disagree"),
        ({"base": {"tensors": {TEXT: {}}}}, "tensors and config disagree"),
        ({"carriers": ["weights"]}, "carriers"),
    ],
)
def test_a_wrong_config(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(ArtifactError, match=message):
        Erasure.load(folder)


def test_a_missing_tensor_file(folder: Path) -> None:
    (folder / LORA_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"disagree \(missing \['unet"):
        Erasure.load(folder)


def test_lost_pins_are_noticed(folder: Path) -> None:
    tensors = load_file(folder / DELTA_FILE)
    save_file({key: tensor for key, tensor in tensors.items() if "pinned" not in key}, folder / DELTA_FILE)
    with pytest.raises(ArtifactError, match="carriers"):
        Erasure.load(folder)


def test_an_unknown_tensor(folder: Path) -> None:
    save_file({**load_file(folder / DELTA_FILE), "unet/conv_in.bias": torch.ones(2)}, folder / DELTA_FILE)
    with pytest.raises(ArtifactError, match=r"unknown \['unet/conv_in.bias'\]"):
        Erasure.load(folder)


def test_mixed_up_files(folder: Path, tmp_path: Path) -> None:
    other = make(low_rank=False)
    other.edits.deltas["text_encoder/final_layer_norm.bias"] = torch.ones(4)
    stranger = Erasure(
        dataclasses.replace(other.config, base={"tensors": {key: {} for key in other.edits.parameters}}), other.edits
    ).save(tmp_path / "other")
    (folder / DELTA_FILE).write_bytes((stranger / DELTA_FILE).read_bytes())
    with pytest.raises(ArtifactError, match="files of different erasures are mixed"):
        Erasure.load(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["delta", "low rank", "pinned"])
def test_nan_is_neither_written_nor_read(folder: Path, tmp_path: Path, value: float, where: str) -> None:
    made = make()
    if where == "delta":
        made.deltas[TEXT][0] = value
        path, tensors = folder / DELTA_FILE, made.edits.delta_state_dict()
    elif where == "low rank":
        made.low_rank[UNET].up[0, 0] = value
        path, tensors = folder / LORA_FILE, made.edits.lora_state_dict()
    else:
        made.edits.pinned["text_encoder"].hidden_states[0, 0] = value
        path, tensors = folder / DELTA_FILE, made.edits.delta_state_dict()
    with pytest.raises(DivergenceError, match="NaN or infinity"):
        made.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        Erasure.load(folder)


def test_no_such_folder_or_repository(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="neither a folder nor the name"):
        Erasure.load(tmp_path / "nothing" / "here")
    with pytest.raises(ArtifactError, match="no folder here, and the Hub does not give it"):
        Erasure.load("nobody/nothing")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "image.png").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"no erasure: .* missing \(found: image.png\)"):
        Erasure.load(tmp_path / "plain")


# Writing -------------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(folder: Path, tmp_path: Path) -> None:
    before = (folder / CONFIG_FILE).read_bytes()
    with pytest.raises(ArtifactError, match="not empty"):
        make(pinned=False).save(folder)
    assert (folder / CONFIG_FILE).read_bytes() == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(ArtifactError, match="no erasure and is left alone"):
        make().save(tmp_path / "photos", overwrite=True)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ArtifactError, match="not empty"):
        make().save(tmp_path / "file")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    (tmp_path / "empty").mkdir()
    assert Erasure.load(make().save(tmp_path / "empty")).name == "van-gogh-hirm"


def test_overwrite_replaces_the_whole_folder(folder: Path) -> None:
    make(pinned=False, low_rank=False).save(folder, overwrite=True)
    assert not (folder / LORA_FILE).exists()
    assert Erasure.load(folder).low_rank == {}
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_kill_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    write = Path.write_bytes

    def fail(self: Path, content: bytes) -> int:
        if self.name == DELTA_FILE:
            write(self, content[:10])
            raise error
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(ArtifactError if isinstance(error, OSError) else KeyboardInterrupt):
        make().save(tmp_path / "deep" / "saved")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_a_kill_while_overwriting_keeps_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    replace, calls = os.replace, []

    def fail(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ArtifactError, match=r"cannot write .* Input/output error"):
        make(pinned=False, low_rank=False).save(folder, overwrite=True)
    monkeypatch.undo()
    assert Erasure.load(folder).config == make().config
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_no_write_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(ArtifactError, match=r"cannot write .* Permission denied"):
        make().save(locked / "saved")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ArtifactError, match="cannot write"):
        make().save(tmp_path / "file" / "saved")
