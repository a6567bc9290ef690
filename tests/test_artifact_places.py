"""Where erasures are looked for, and what is left when they are written over others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import Concept, Erasure, ErasureConfig
from erasure.artifact import CONFIG_FILE, DELTA_FILE, LORA_FILE
from erasure.carriers.edits import Edits, LowRank
from erasure.carriers.weights import fingerprint
from erasure.errors import ArtifactError

TEXT, UNET = "text_encoder/encoder.layers.0.mlp.fc1.bias", "unet/mid_block.attn2.to_k"


def erasure(deltas: dict[str, Tensor] | None = None, **config: Any) -> Erasure:
    edits = (
        Edits(deltas={TEXT: torch.ones(6), f"{UNET}.bias": torch.ones(2)}) if deltas is None else Edits(deltas=deltas)
    )
    if deltas is None:
        edits.low_rank[UNET] = LowRank(torch.ones(2, 4), torch.ones(5, 2))
    base = {"model": "someone/model", "tensors": {key: fingerprint(torch.ones(1)) for key in edits.parameters}}
    given = {"concepts": [Concept("cat").to_dict()], "carriers": edits.carriers, "base": base, "strategy": "itd"}
    return Erasure(ErasureConfig(**{**given, "family": "stable-diffusion", **config}), edits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return erasure().save(tmp_path / "saved")


# Where erasures are looked for ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were asked for on the Hub."""
    asked: list[str] = []

    def download(repo_id: str, *_: Any, **__: Any) -> Path:
        asked.append(repo_id)
        raise ArtifactError("asked the Hub")

    monkeypatch.setattr("erasure.hub.download", download)
    return asked


def test_a_local_name_is_never_a_name_of_the_hub(
    tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "erasures").mkdir()
    (tmp_path / "plain").write_text("")
    local = [
        Path("someone/model"), Path("erasures/cat"), "erasures/cat", "./someone/model", "../someone/model", "~/model",
        "~someone/model", "/someone/model", "a/b/c", "someone\\model", "model", ".", "..", "", "plain", "plain/cat",
        str(tmp_path / "x"), "someone/../x", "C:/model", ".hidden/model", "someone/model/", "someone//model",
    ]  # fmt: skip
    for source in local:
        with pytest.raises(ArtifactError):
            Erasure.load(source)
        assert hub == [], source
    for source in ("someone/model", "some-one/mo.del_2"):
        with pytest.raises(ArtifactError, match="asked the Hub"):
            Erasure.load(source)
    assert hub == ["someone/model", "some-one/mo.del_2"]


def test_reading_is_local(folder: Path, tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Erasure.read(folder).name == Erasure.read("saved").name == "cat-itd"
    for gone in ("someone/model", Path("nothing"), "n" * 300, "a\0b"):
        with pytest.raises(ArtifactError):
            Erasure.read(gone)
        with pytest.raises(ArtifactError):
            Erasure.load(Path(gone))
    with pytest.raises(ArtifactError, match="a file: give the folder"):
        Erasure.load(folder / DELTA_FILE)
    assert hub == []


# Writing over what is there ------------------------------------------------------------------------------------------


def test_neighbours_and_links_stay(folder: Path, tmp_path: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "notes.txt").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(folder.name)
    smaller = erasure({TEXT: torch.ones(6)})
    old = os.umask(0o077)
    try:
        smaller.save(link, overwrite=True)
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".git", "README.md", CONFIG_FILE, DELTA_FILE, "notes.txt"]
    )
    assert (folder / ".git" / "HEAD").read_text() == "ref"
    assert (folder / CONFIG_FILE).stat().st_mode & 0o777 == 0o600
    assert Erasure.load(link).low_rank == {}
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("partial")] == []


def test_a_full_disk_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="No space left on device"):
            erasure({TEXT: torch.ones(6)}).save(folder, overwrite=True)
    assert Erasure.load(folder).config == erasure().config
    assert sorted(path.name for path in folder.iterdir()) == sorted(["README.md", CONFIG_FILE, DELTA_FILE, LORA_FILE])


def test_a_folder_in_the_way_of_a_file_is_left_alone(folder: Path) -> None:
    (folder / LORA_FILE).unlink()
    (folder / LORA_FILE).mkdir()
    before = (folder / DELTA_FILE).read_bytes()
    with pytest.raises(ArtifactError, match="is a folder"):
        erasure().save(folder, overwrite=True)
    assert (folder / DELTA_FILE).read_bytes() == before


def test_long_names_make_names_of_folders(tmp_path: Path) -> None:
    made = erasure(concepts=[Concept("van gogh " * 100).to_dict()])
    assert len(made.name) < 150
    assert Erasure.load(made.save(tmp_path / made.name)).name == made.name
