"""What is put on a Hub comes down byte for byte; what goes wrong is said in words that help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

from erasure import Concept, Erasure, ErasureConfig
from erasure.artifact import CARD_FILE, CONFIG_FILE, DELTA_FILE, FILES, LORA_FILE
from erasure.carriers.edits import Edits, LowRank
from erasure.cli.main import main
from erasure.errors import ArtifactError

from .server import TOKEN, Hub, serving

NAME = "someone/no-cats"
MEASURED = {
    "canvas: UA": [0.99, 0.95, 1.0], "canvas: UA before": [0.1, 0.0, 0.2], "canvas: FID": 12.5,
    "canvas: size": "quick", "canvas: seed": 7, "canvas: date": "2026-11-27",
}  # fmt: skip


@pytest.fixture
def made() -> Erasure:
    edits = Edits(deltas={"text_encoder/encoder.layers.0.mlp.fc1.bias": torch.ones(6)})
    edits.low_rank["unet/mid_block.attn2.to_k"] = LowRank(torch.randn(2, 400), torch.randn(500, 2))
    base = {"model": "someone/model", "tensors": {key: {"float32": "0" * 64} for key in edits.parameters}}
    concepts = [Concept("cat", anchor="dog").to_dict()]
    config = ErasureConfig("uce", concepts, "stable-diffusion", base=base, carriers=edits.carriers,
                           evaluation=dict(MEASURED))  # fmt: skip
    return Erasure(config, edits)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Hub, str]]:
    with serving() as (hub, place):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, place)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", place)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Of small files too something has arrived when a download breaks off.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)
        # Its own storage, which the Hub falls back from to LFS.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub, place


@pytest.fixture
def hub(address: tuple[Hub, str]) -> Hub:
    return address[0]


def test_comes_down_as_it_went_up_and_revisions_stay(hub: Hub, made: Erasure, tmp_path: Path) -> None:
    first = made.push_to_hub(NAME, token=TOKEN)
    assert first.address.endswith(f"/{NAME}/commit/{first.revision}")
    files = hub.repositories[NAME].commits[first.revision]
    assert set(FILES) <= set(files)
    fetched, revision = Erasure.pull(NAME, tmp_path / "here")
    assert revision == first.revision
    assert {file.name: file.read_bytes() for file in (tmp_path / "here").iterdir()} == {
        name: files[name] for name in FILES
    }
    assert fetched.fingerprint == made.fingerprint == Erasure.load(tmp_path / "here").fingerprint
    made.config.evaluation["canvas: UA"] = [0.5, 0.4, 0.6]
    second = made.push_to_hub(NAME, token=TOKEN)
    assert second.revision != first.revision
    assert Erasure.load(NAME).config.evaluation["canvas: UA"] == [0.5, 0.4, 0.6]
    pinned = Erasure.load(NAME, revision=first.revision)
    assert pinned.config.evaluation["canvas: UA"] == [0.99, 0.95, 1.0]
    # What is there already is not sent again.
    assert [method for method, path, _ in hub.asked if path.startswith("/store/")] == ["PUT", "PUT"]


def test_the_card_has_what_was_measured(hub: Hub, made: Erasure) -> None:
    put = made.push_to_hub(NAME, token=TOKEN, collection="someone/erasures-1234", private=True)
    card = hub.repositories[NAME].commits[put.revision][CARD_FILE].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "someone/model"
    assert front["base_model_relation"] == "adapter"
    assert front["tags"] == ["diffusers", "concept-erasure", "stable-diffusion", "uce"]
    (index,) = front["model-index"]
    assert index["name"] == made.name
    metrics = [metric for result in index["results"] for metric in result["metrics"]]
    assert [(metric["name"], metric["value"]) for metric in metrics] == [("UA", 0.99), ("FID", 12.5)]
    assert metrics[0]["args"] == {"low": 0.95, "high": 1.0}
    assert {(result["task"]["type"], result["dataset"]["name"]) for result in index["results"]} == {
        ("text-to-image", "canvas")
    }
    assert hub.collections["someone/erasures-1234"] == [NAME]
    assert hub.repositories[NAME].private


def test_branches_are_made_and_fetched(hub: Hub, made: Erasure) -> None:
    made.push_to_hub(NAME, token=TOKEN)
    branch = made.push_to_hub(NAME, token=TOKEN, revision="v2", card="# My own card\n")
    again = made.push_to_hub(NAME, token=TOKEN, revision="v2", card="# My own card\n")
    assert hub.repositories[NAME].branches["v2"] == again.revision
    assert hub.repositories[NAME].commits[branch.revision][CARD_FILE] == b"# My own card\n"
    assert Erasure.load(NAME, revision="v2").fingerprint == made.fingerprint


@pytest.mark.parametrize("file", [LORA_FILE, CONFIG_FILE])
def test_a_download_that_breaks_off_goes_on_where_it_was(hub: Hub, made: Erasure, file: str) -> None:
    put = made.push_to_hub(NAME, token=TOKEN)
    size = len(hub.repositories[NAME].commits[put.revision][file])
    hub.cut[file] = size // 2
    assert Erasure.load(NAME).fingerprint == made.fingerprint
    spans = hub.ranges(file)
    assert len(spans) == 2
    assert 0 < int(spans[1].removeprefix("bytes=").removesuffix("-")) <= size // 2


def test_a_download_that_failed_goes_on_at_the_next_try(hub: Hub, made: Erasure, tmp_path: Path) -> None:
    made.push_to_hub(NAME, token=TOKEN)
    hub.broken.add(DELTA_FILE)
    with pytest.raises(ArtifactError, match="503"):
        Erasure.pull(NAME, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    hub.broken.clear()
    assert Erasure.pull(NAME, tmp_path / "here")[0].fingerprint == made.fingerprint


def test_what_goes_wrong_is_said(hub: Hub, made: Erasure, tmp_path: Path, monkeypatch: Any) -> None:
    for token in ("hf_another", None):
        with pytest.raises(ArtifactError, match=r"\(401\): the token is missing, wrong or expired.*hf auth login"):
            made.push_to_hub(NAME, token=token)
    assert not hub.repositories
    with pytest.raises(ArtifactError, match=r"\(404\): there is no such repository, or it is private"):
        Erasure.load("someone/nothing", token=TOKEN)
    with pytest.raises(ArtifactError, match=r"\(401\)"):
        Erasure.load("someone/nothing", token="hf_another")
    made.push_to_hub(NAME, token=TOKEN, private=True)
    with pytest.raises(ArtifactError, match=r"\(404\).*or it is private"):
        Erasure.load(NAME)
    with pytest.raises(ArtifactError, match="no revision 'v9' of it: name a branch, a tag or a whole commit"):
        Erasure.load(NAME, token=TOKEN, revision="v9")
    with pytest.raises(ArtifactError, match=r"\(404\)"):
        made.push_to_hub(NAME, token=TOKEN, collection="someone/none-1")
    with pytest.raises(ArtifactError, match="neither a folder nor the name"):
        made.push_to_hub("no/such/name", token=TOKEN)
    hub.status = 403
    with pytest.raises(ArtifactError, match=r"\(403\): this user may not do that"):
        made.push_to_hub(NAME, token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match="the Hub does not"):
        Erasure.load("someone/else")


def test_what_is_no_erasure_is_not_written(hub: Hub, made: Erasure, tmp_path: Path) -> None:
    put = made.push_to_hub(NAME, token=TOKEN)
    repository = hub.repositories[NAME]
    held = repository.commits[put.revision]
    repository.commit("main", {LORA_FILE: held[LORA_FILE][:-40]})
    with pytest.raises(ArtifactError):
        Erasure.pull(NAME, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ArtifactError, match="not empty"):
        Erasure.pull(NAME, tmp_path / "full", revision=put.revision)


def test_the_commands(hub: Hub, made: Erasure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.save(tmp_path / "cat")
    (folder / CARD_FILE).write_text("# Mine\n")
    assert main(["push", str(folder), NAME, "--token", TOKEN, "--keep-card", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert hub.repositories[NAME].commits[told["revision"]][CARD_FILE] == b"# Mine\n"
    assert main(["push", str(folder), NAME, "--token", TOKEN]) == 0
    assert told["revision"] not in capsys.readouterr().out
    words = ["pull", NAME, "--revision", told["revision"], "--out", str(tmp_path / "pulled")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["revision"] == told["revision"]
    assert (tmp_path / "pulled" / CARD_FILE).read_text() == "# Mine\n"
    assert main(words) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "nothing"), NAME]) == 2
    assert "is no erasure" in capsys.readouterr().err
    assert main(["push", str(folder), NAME, "--token", "hf_another"]) == 2
    assert "the token is missing, wrong or expired" in capsys.readouterr().err


def test_the_address_is_that_of_the_environment(address: tuple[Hub, str], made: Erasure, tmp_path: Path) -> None:
    made.push_to_hub(NAME, token=TOKEN)
    own = {"HF_ENDPOINT": address[1], "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-m", "erasure", "pull", NAME, "--out", str(tmp_path / "pulled")]
    ended = subprocess.run(words, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert Erasure.read(tmp_path / "pulled").fingerprint == made.fingerprint
