"""`erasure export` and `erasure import`: files go out and come back, and bad ones leave everything as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erasure import Erasure
from erasure.cli.main import main


@pytest.fixture(scope="module")
def cat(tiny_pipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erasure of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("erasures") / "cat"
    options = ["--vocabulary", "8", "--saved-as", "lora"]
    assert not main(
        ["erase", "uce", "--model", str(tiny_pipe_folder), "--concept", "cat", *options, "--out", str(folder)]
    )
    return folder


def run_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


@pytest.mark.parametrize("to", ["kohya", "comfyui", "a1111", "diffusers"])
def test_there_and_back(to: str, cat: Path, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "cat.safetensors"
    told = run_json(["export", str(cat), "--to", to, "--out", str(out)], capsys)
    assert (told["to"], told["approximated"], told["file"]) == (to, 0, str(out))
    assert told["layers"] == len(Erasure.read(cat).low_rank)
    back = ["import", str(out), "--model", str(tiny_pipe_folder), "--out", str(tmp_path / "back")]
    read = run_json(back, capsys)
    assert read["form"] == "lora"
    assert "the model is tiny-sd" in read["base"]
    assert Erasure.read(tmp_path / "back").edits.equals(Erasure.read(cat).edits)
    assert main([*back, "--overwrite"]) == 0
    assert "cat-uce: 8 edits" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "back")]) == 0


def test_import_says_what_it_takes_for_an_object(
    cat: Path, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "cat.safetensors"
    assert main(["export", str(cat), "--to", "diffusers", "--out", str(out)]) == 0
    back = ["import", str(out), "--model", str(tiny_pipe_folder), "--out", str(tmp_path / "back"), "--overwrite"]
    for given, times in ((["--concept", "Van Gogh"], 1), (["--concept", "Van Gogh", "--kind", "style"], 0)):
        capsys.readouterr()
        assert main([*back, *given]) == 0
        assert capsys.readouterr().err.count("taken for an object") == times
    assert main([*back, "--concept", "van_gogh"]) == 0
    assert capsys.readouterr().err.count("is taken for 'van gogh'") == 1


def test_a_checkpoint(cat: Path, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "erased.safetensors"
    arguments = ["export", str(cat), "--to", "single-file", "--model", str(tiny_pipe_folder), "--out", str(out)]
    told = run_json(arguments, capsys)
    assert told["components"] == ["unet", "vae", "text_encoder"]
    assert len(load_file(out)) == told["tensors"]
    assert main([*arguments, "--overwrite", "--dtype", "float16"]) == 0
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float16}
    assert "million values" in capsys.readouterr().out


def test_a_checkpoint_is_a_model_of_every_command(
    cat: Path, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The Hub is not asked where --config names a model of its kind; what is drawn is what the erasure draws."""
    monkeypatch.chdir(tmp_path)
    model, config = ["--model", "erased.safetensors"], ["--config", str(tiny_pipe_folder)]
    base = ["--model", str(tiny_pipe_folder)]
    assert main(["export", str(cat), "--to", "single-file", *base, "--out", "erased.safetensors"]) == 0
    drawing = ["generate", "--prompt", "a cat", "--steps", "1"]
    first = run_json([*drawing, *model, *config, "--out", "first"], capsys)["images"][0]["file"]
    second = run_json([*drawing, *base, "--erasure", str(cat), "--out", "second"], capsys)["images"][0]["file"]
    assert Image.open(first).tobytes() == Image.open(second).tobytes()
    erasing = ["erase", "uce", "--concept", "dog", "--vocabulary", "8", "--saved-as", "lora"]
    assert main([*erasing, *model, *config, "--out", "dog"]) == 0
    assert main(["export", "dog", "--to", "kohya", *model, *config, "--out", "dog.safetensors"]) == 0
    assert main(["import", "dog.safetensors", *model, *config, "--out", "again"]) == 0
    assert Erasure.read("again").edits.equals(Erasure.read("dog").edits)
    Path("prompts.txt").write_text("a cat\na dog\n")
    training = ["sae", "train", "--prompts", "prompts.txt", "--steps", "1", "--d-sae", "64", "--k", "4"]
    assert main([*training, *model, *config, "--out", "sae"]) == 0
    capsys.readouterr()
    for words in ([*drawing, "--out", "third"], [*training, "--out", "other"]):
        assert main([*words, *base, *config]) == 2
        assert "is for single-file checkpoints" in capsys.readouterr().err


def test_weights_of_others(tiny_pipe_folder: Path, tiny_pipe_original: Any, tmp_path: Path, capsys: Any) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    stock = tiny_pipe_original.unet.state_dict()[name]
    save_file({name: stock + 0.01 * torch.ones_like(stock)}, tmp_path / "esd.safetensors")
    arguments = ["import", str(tmp_path / "esd.safetensors"), "--model", str(tiny_pipe_folder)]
    more = ["--concept", "Van Gogh", "--kind", "style", "--anchor", "painting", "--out", str(tmp_path / "van-gogh")]
    read = run_json([*arguments, *more], capsys)
    assert (read["name"], read["form"], read["tensors"]) == ("van-gogh-imported", "weights", 1)
    made = Erasure.read(tmp_path / "van-gogh")
    assert made.concepts[0].kind == "style"
    assert made.concepts[0].anchor == "painting"
    assert made.config.strategy_config["file"] == "esd.safetensors"
    assert len(str(made.config.strategy_config["sha256"])) == 64


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["export", "CAT", "--to", "single-file", "--out", "o.safetensors"], "name it with --model"),
        (["export", "CAT", "--to", "forge", "--out", "o.safetensors"], "kohya"),
        (["export", "CAT", "--to", "kohya", "--out", "there.safetensors"], "exists"),
        (["export", "CAT", "--to", "kohya", "--out", "o.pt"], "ending .safetensors"),
        (["export", "nowhere", "--to", "kohya", "--out", "o.safetensors"], "neither a folder"),
        (["export", "CAT", "--to", "kohya", "--out", "o.safetensors", "--rank", "0"], "rank 0"),
        (["import", "there.safetensors", "--model", "MODEL", "--concept", "cat"], "cannot be read"),
        (["import", "there.safetensors", "--model", "MODEL", "--concept", "cat", "--out", "CAT"], "not empty"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(
    arguments: list[str], told: str, cat: Path, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    before = {path.name: path.read_bytes() for path in cat.iterdir()}
    names = {"CAT": str(cat), "MODEL": str(tiny_pipe_folder)}
    assert main([names.get(word, word) for word in arguments]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    assert {path.name: path.read_bytes() for path in cat.iterdir()} == before
