"""`~` is the home folder wherever a user gives a path: what was saved with it is found with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import erasure
from erasure import Concept
from erasure.artifact import Erasure
from erasure.cli.main import main
from erasure.errors import ErasureError
from erasure.eval import evaluate
from erasure.eval.sources import read_prompts
from erasure.exchange.writing import check_out
from erasure.locking.audit import AuditLog, verify_log
from erasure.pipelines import StableDiffusionErasurePipeline
from erasure.sae import load, save
from erasure.sae.model import SAEConfig, SparseAutoencoder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder, and another one to work in, in which nothing called `~` may come about."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []


def test_erasures_and_pipelines(tiny_pipe_factory: Any, home: Path) -> None:
    pipe = StableDiffusionErasurePipeline.from_pipe(tiny_pipe_factory())
    made = erasure.erase(pipe, Concept("cat", anchor="dog"), "uce", attach=False, progress=False)
    assert made.save("~/made") == home / "made"
    assert Erasure.load("~/made").name == Erasure.read("~/made").name == made.name
    pipe.load_erasure("~/made")
    pipe.save_erasure("~/again")
    pipe.save_erased_pipeline("~/beside", fuse=False)
    pipe.save_erased_pipeline("~/fused")
    assert sorted(each.name for each in home.iterdir() if each.name != ".cache") == [
        "again",
        "beside",
        "fused",
        "made",
    ]
    for folder in ("~/beside", "~/fused"):
        assert StableDiffusionErasurePipeline.from_pretrained(folder).unet is not None
        assert erasure.load_pipeline(folder, device="cpu").unet is not None  # type: ignore[attr-defined]
    with pytest.raises(ErasureError, match="there is no erasure at"):
        Erasure.read("~/none")


def test_results_lists_logs_and_autoencoders(tiny_pipe_factory: Any, home: Path) -> None:
    with pytest.raises(ErasureError):
        evaluate(tiny_pipe_factory(), "canvas", ["cat"], out="~/results")
    (home / "list.csv").write_text("prompt\na cat\n")
    assert [row.prompt for row in read_prompts("~/list.csv").rows] == ["a cat"]
    assert check_out("~/a.safetensors", overwrite=False) == home / "a.safetensors"
    AuditLog("~/log").close()
    assert verify_log("~/log").lines == 1
    save(SparseAutoencoder(SAEConfig(d_in=4, d_sae=8, k=2)), "~/sae")
    assert load("~/sae").config.d_sae == 8


@pytest.mark.parametrize("joined", [True, False])
def test_the_command_line(tiny_pipe_folder: Path, home: Path, joined: bool, capsys: Any) -> None:
    def flag(name: str, value: str) -> list[str]:
        return [f"{name}={value}"] if joined else [name, value]

    (home / "model").symlink_to(tiny_pipe_folder)
    command = ["erase", "uce", *flag("--model", "~/model"), "--device", "cpu", "--concept", "cat>dog"]
    assert main([*command, *flag("--out", "~/made")]) == 0
    assert main(["info", "~/made"]) == 0
    drawing = ["generate", *flag("--model", "~/model"), "--device", "cpu", "--prompt", "a cat", "--steps", "1"]
    assert main([*drawing, *flag("--erasure", "~/made"), *flag("--out", "~/images")]) == 0
    with Image.open(next((home / "images").iterdir())) as image:
        assert image.size == (32, 32)
    capsys.readouterr()


def test_other_kinds_of_paths_are_paths(tiny_pipe_factory: Any, home: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(home / "made")

    made = erasure.erase(tiny_pipe_factory(), Concept("cat", anchor="dog"), "uce", attach=False, progress=False)
    made.save("~/made")
    assert Erasure.load(Place()).name == "cat-uce"  # type: ignore[arg-type]
