"""Autoencoders on disk."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure.errors import ArtifactError
from erasure.sae import SparseAutoencoder, load, save

MakeSAE = Callable[..., SparseAutoencoder]


def same(first: SparseAutoencoder, second: SparseAutoencoder) -> bool:
    x = torch.randn(5, 12)
    return torch.equal(first(x), second(x)) and first.config.k == second.config.k


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_round_trip(architecture: str, tmp_path: Path, make_sae: MakeSAE) -> None:
    sae = make_sae(architecture)
    sae.config.metadata.update(hook_name="text_encoder/encoder.layers.2", fvu=0.1)
    save(sae, tmp_path / "sae")
    found = load(tmp_path / "sae")
    assert same(sae, found)
    assert found.config == sae.config
    assert sorted(file.name for file in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_keys_and_shapes_are_those_of_sae_lens(tmp_path: Path, make_sae: MakeSAE) -> None:
    save(make_sae("jumprelu"), tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (12, 40), "W_dec": (40, 12), "b_enc": (40,), "b_dec": (12,), "threshold": (40,),
    }  # fmt: skip
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert {"d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "metadata"} <= set(
        config
    )


def test_half_precision_on_disk(tmp_path: Path, make_sae: MakeSAE) -> None:
    sae = make_sae()
    save(sae, tmp_path, torch.float16)
    assert (load(tmp_path).W_dec - sae.W_dec).abs().max() < 1e-3


def test_reads_sparsify(tmp_path: Path, make_sae: MakeSAE) -> None:
    sae = make_sae()
    tensors = {
        "encoder.weight": sae.W_enc.T.contiguous(), "encoder.bias": sae.b_enc.data,
        "W_dec": sae.W_dec.data, "b_dec": sae.b_dec.data,
    }  # fmt: skip
    save_file(tensors, tmp_path / "sae.safetensors")
    for sizes in ({"num_latents": 40}, {"expansion_factor": 40 / 12, "num_latents": 40}):
        (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 12, "k": 5, **sizes}))
        assert same(sae, load(tmp_path))


def test_reads_openai(tmp_path: Path, make_sae: MakeSAE) -> None:
    sae = make_sae()
    state = {
        "pre_bias": sae.b_dec.data, "latent_bias": sae.b_enc.data, "encoder.weight": sae.W_enc.T.contiguous(),
        "decoder.weight": sae.W_dec.T.contiguous(), "stats_last_nonzero": torch.zeros(40),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"n_dirs_local": 40, "d_model": 12, "k": 5}))
    for stored in (state, {"state_dict": state}):
        torch.save(stored, tmp_path / "state_dict.pth")
        assert same(sae, load(tmp_path))


class Intruder:
    def __reduce__(self):
        return (print, ("never to be run",))


def test_runs_no_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"state_dict": Intruder()}, tmp_path / "state_dict.pth")
    with pytest.raises(ArtifactError):
        load(tmp_path)
    assert "never" not in capsys.readouterr().out


def break_shape(folder: Path) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, "W_dec": tensors["W_dec"][:7].contiguous()}, folder / "sae_weights.safetensors")


def break_tensor(folder: Path) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({k: t for k, t in tensors.items() if k != "b_enc"}, folder / "sae_weights.safetensors")


def break_values(folder: Path) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, "b_enc": tensors["b_enc"] * torch.nan}, folder / "sae_weights.safetensors")


def edit(folder: Path, **changes: object) -> None:
    file = folder / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_shape, "do not belong together"),
        (break_tensor, "b_enc"),
        (break_values, "NaN"),
        (lambda folder: (folder / "cfg.json").unlink(), "cfg.json"),
        (lambda folder: (folder / "cfg.json").write_text("["), "cfg.json"),
        (lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"short"), "cannot be read"),
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "holds no autoencoder"),
        (lambda folder: edit(folder, architecture="gated"), "gated"),
        (lambda folder: edit(folder, normalize_activations="layer_norm"), "normalize_activations"),
        (lambda folder: edit(folder, k=99), "cannot be"),
    ],
)  # fmt: skip
def test_damage_is_a_clear_error(damage, message: str, tmp_path: Path, make_sae: MakeSAE) -> None:
    save(make_sae("jumprelu"), tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path)


HUGE = {"d_in": 30_000, "d_sae": 40_000}


def claim_all(folder: Path) -> None:
    """Config and header agree on 5 GB, the file has none of it."""
    edit(folder, **HUGE)
    shapes = {"W_enc": [30_000, 40_000], "W_dec": [40_000, 30_000], "b_enc": [40_000], "b_dec": [30_000]}
    start, header = 0, {}
    for name, shape in {**shapes, "threshold": [40_000]}.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    content = json.dumps(header).encode()
    (folder / "sae_weights.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (claim_all, "its header tells of"),
        (lambda folder: edit(folder, **HUGE), "do not belong together"),
        (lambda folder: edit(folder, d_in=2**40), "'d_in'"),
        (lambda folder: edit(folder, d_in=-1), "'d_in'"),
        (lambda folder: edit(folder, d_sae="40"), "'d_sae'"),
        (lambda folder: edit(folder, d_sae=40.0), "'d_sae'"),
        (lambda folder: edit(folder, k=True), "'k'"),
        (lambda folder: edit(folder, d_in=0), "cannot be|do not belong"),
        (lambda folder: edit(folder, metadata=[]), "'metadata'"),
        (lambda folder: edit(folder, metadata={"layer": "x"}), "layer"),
        (lambda folder: edit(folder, metadata={"fingerprint": "x"}), "fingerprint"),
        (lambda folder: edit(folder, architecture=["topk"]), "architecture"),
        (lambda folder: (folder / "cfg.json").write_text("[" * 5000), "recursion"),
        (lambda folder: (folder / "cfg.json").write_text('{"d_in": ' + "9" * 5000 + "}"), "cannot be read"),
        (lambda folder: os.truncate(folder / "cfg.json", 2**32), "at most"),
        (lambda folder: os.truncate(folder / "sae_weights.safetensors", 2**33), "cannot be read"),
        (lambda folder: pipe(folder / "cfg.json"), "named pipe"),
        (lambda folder: pipe(folder / "sae_weights.safetensors"), "named pipe"),
    ],
)
def test_claims_are_checked_before_anything_is_allocated(
    damage: Any, message: str, tmp_path: Path, make_sae: MakeSAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(make_sae("jumprelu"), tmp_path)
    damage(tmp_path)
    monkeypatch.setattr("erasure.sae.formats.SparseAutoencoder", None)
    monkeypatch.setattr(torch, "frombuffer", None)
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_openai_claims_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_dirs": 40_000, "d_model": 30_000, "k": 5}))
    zero = torch.zeros(1)
    claimed = {
        "encoder.weight": zero.expand(40_000, 30_000), "decoder.weight": zero.expand(30_000, 40_000),
        "latent_bias": zero.expand(40_000), "pre_bias": zero.expand(30_000),
    }  # fmt: skip
    for stored in (
        claimed,
        {**claimed, "pre_bias": torch.ones(3).to_sparse()},
        [1],
        {"state_dict": 5},
        {"pre_bias": "x"},
    ):
        torch.save(stored, tmp_path / "state_dict.pth")
        with pytest.raises(ArtifactError):
            load(tmp_path)


def test_a_dictionary_is_replaced_as_a_whole(tmp_path: Path, make_sae: MakeSAE) -> None:
    save(make_sae(), tmp_path / "sae", prompts=["a cat"])
    (tmp_path / "sae" / "notes.txt").write_text("mine")
    save(make_sae(d_in=6), tmp_path / "sae")
    assert load(tmp_path / "sae").config.d_in == 6
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == [
        "cfg.json", "notes.txt", "sae_weights.safetensors",
    ]  # fmt: skip


def test_a_damaged_dictionary_of_the_cache_is_made_again(tiny_pipe: Any) -> None:
    from erasure.backbones import text_towers
    from erasure.sae import TrainingOptions, dictionaries

    def make() -> Path:
        options = TrainingOptions(d_sae=16, k=2, steps=2)
        return dictionaries.trained(text_towers(tiny_pipe)[0], 0, ["a cat", "a dog"], options, lambda share: None)

    def files() -> dict[str, bytes]:
        """All but how long the training took."""
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        return found | {"cfg.json": re.sub(rb'"seconds": [\d.e-]+', b"", found["cfg.json"])}

    folder = make()
    whole = files()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (folder / name).write_bytes(b"broken")
        assert make() == folder
        assert files() == whole


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path, make_sae: MakeSAE) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save(make_sae(), tmp_path / "file")
