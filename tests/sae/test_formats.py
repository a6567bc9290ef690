"""Autoencoders on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

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


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path, make_sae: MakeSAE) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save(make_sae(), tmp_path / "file")
