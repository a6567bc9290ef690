"""Erasures as LoRA files: the same pixels in the stock pipeline, the same edit when read again, refusals that help."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from erasure import Erasure, ErasureManager, bases, erase
from erasure.backbones import backbone_for
from erasure.carriers.edits import Edits, LowRank
from erasure.errors import ArtifactError, OptionError, UnsupportedModelError, WrongBaseError
from erasure.exchange.factors import decomposed
from erasure.exchange.importing import import_file
from erasure.exchange.loaders import LOADERS
from erasure.exchange.lora_files import EXPORT, export_lora
from erasure.interop import paths
from tests.copies import copied

FAMILIES = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux")
STOCK_READS = [
    *((family, to) for family in FAMILIES[:2] for to in ("kohya", "comfyui", "a1111", "diffusers")),
    *((family, "diffusers") for family in FAMILIES[2:]),
]
"""Files that the stock pipeline of a family loads: kohya's names of SD3 are unknown to diffusers, and of those of Flux
it loads some without the name of their network."""


@pytest.fixture(scope="module")
def originals(tiny_models: Any) -> dict[str, Any]:
    return {family: tiny_models[family]() for family in FAMILIES}


@pytest.fixture(scope="module")
def made(originals: dict[str, Any]) -> Callable[..., Erasure]:
    """Makes erasures: `made("flux", "uce")`."""

    def make(family: str, strategy: str = "uce", **options: Any) -> Erasure:
        return erase(originals[family], "cat", strategy, vocabulary=8, attach=False, progress=False, **options)

    return make


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(("family", "to"), STOCK_READS)
def test_the_file_draws_the_same_pixels_in_the_stock_pipeline(
    originals: dict[str, Any], made: Any, family: str, to: str, draw: Any, tmp_path: Path
) -> None:
    pipe, erasure = copied(originals[family]), made(family, saved_as="lora")
    told = export_lora(erasure, to, tmp_path / "cat.safetensors", pipe=pipe)
    assert (told.layers, told.approximated) == (len(erasure.low_rank), 0)
    stock = draw(pipe)
    pipe.load_lora_weights(tmp_path / "cat.safetensors")
    found = draw(pipe)
    pipe.unload_lora_weights()
    ErasureManager(pipe).add(erasure)
    torch.testing.assert_close(found, draw(pipe), rtol=0, atol=1e-5)
    assert (found - stock).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "to", "strategy"),
    [
        (family, to, strategy)
        for family in FAMILIES
        for to in LOADERS
        for strategy in ("uce", "diff_quickfix")
        if family not in LOADERS[to].refused
        and not (to == "diffusers" and strategy != "uce" and family in FAMILIES[2:])
    ],
)
def test_what_is_read_again_is_the_same_edit(
    originals: dict[str, Any], made: Any, family: str, to: str, strategy: str, tmp_path: Path
) -> None:
    pipe = originals[family]
    erasure = made(family, strategy, **({"saved_as": "lora"} if strategy == "uce" else {}))
    export_lora(erasure, to, tmp_path / "cat.safetensors", pipe=pipe)
    read = import_file(tmp_path / "cat.safetensors", pipe)
    assert read.erasure.edits.equals(erasure.edits)
    assert read.form == "lora"
    assert not read.notes
    assert dataclasses.asdict(read.erasure.config) == dataclasses.asdict(erasure.config)
    assert "are the same" in read.base
    read.erasure.save(tmp_path / "again")
    assert Erasure.read(tmp_path / "again").edits.equals(erasure.edits)


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_all_layers_have_one_rank_and_one_alpha(made: Any, originals: Any, family: str, tmp_path: Path) -> None:
    """diffusers gives every layer the most frequent alpha of a file: with several, scales would be wrong."""
    erasure = made(family, saved_as="lora")
    assert len({len(edit.down) for edit in erasure.low_rank.values()}) > 1
    export_lora(erasure, "kohya", tmp_path / "cat.safetensors", pipe=originals[family])
    held = load_file(tmp_path / "cat.safetensors")
    ranks = {len(tensor) for name, tensor in held.items() if name.endswith("lora_down.weight")}
    assert ranks == {float(tensor) for name, tensor in held.items() if name.endswith(".alpha")}
    assert len(ranks) == 1
    assert len(held) == 3 * len(erasure.low_rank)
    assert header(tmp_path / "cat.safetensors")["ss_network_alpha"] == str(ranks.pop())


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_of_what_layers_read_become_exact_factors(
    originals: dict[str, Any], made: Any, family: str, tmp_path: Path
) -> None:
    pipe, erasure = originals[family], made(family, saved_as="map")
    with pytest.raises(UnsupportedModelError, match=r"name the base model \(--model\)|name the model \(--model\)"):
        export_lora(erasure, "kohya", tmp_path / "cat.safetensors")
    export_lora(erasure, "kohya", tmp_path / "cat.safetensors", pipe=pipe)
    read = import_file(tmp_path / "cat.safetensors", pipe).erasure
    for key, edit in erasure.edits.maps.items():
        component, path = key.split("/", 1)
        weight = paths.parameter(getattr(pipe, component), f"{path}.weight")
        factors = read.low_rank[key]
        torch.testing.assert_close(
            factors.up @ factors.down, weight @ edit.up.float() @ edit.down.float(), rtol=1e-4, atol=1e-6
        )


# Full-rank edits -----------------------------------------------------------------------------------------------------


def test_the_factors_are_the_best_of_their_rank() -> None:
    """Against the plain formula: with r ranks the squared singular values behind the first r are left out."""
    delta = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(delta.double())
    for rank in (1, 5, 12):
        factors = decomposed(delta, rank, 0.0)
        missing = (delta - factors.up @ factors.down).double().square().sum()
        assert factors.rank == rank
        assert float(missing) == pytest.approx(float(values[rank:].square().sum()), abs=1e-4)
        assert factors.left_out == pytest.approx(float(values[rank:].square().sum()), abs=1e-9)
    enough = decomposed(delta, None, 0.1)
    assert enough.left_out <= 0.1 * enough.energy
    assert decomposed(delta, enough.rank - 1, 0.1).left_out > 0.1 * enough.energy
    convolution = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    down, up, *_ = decomposed(convolution, 6, 0.0)
    assert (down.shape, up.shape) == ((6, 4, 3, 3), (6, 6, 1, 1))
    torch.testing.assert_close((up.flatten(1) @ down.flatten(1)).view(6, 4, 3, 3), convolution, rtol=0, atol=1e-5)


def own(erasure: Erasure, edits: Edits, pipe: Any) -> Erasure:
    """An erasure with other edits, and what its config says of the base of these."""
    base = bases.base_of(backbone_for(pipe), edits, erasure.concepts)
    return Erasure(dataclasses.replace(erasure.config, base=base), edits)


def full_rank(erasure: Erasure, pipe: Any, *paths_: str) -> Erasure:
    """An erasure whose edits are of full rank, in parameters of a UNet."""
    generator = torch.Generator().manual_seed(3)
    shapes = {path: paths.parameter(pipe.unet, path).shape for path in paths_}
    deltas = {f"unet/{path}": 0.05 * torch.randn(shape, generator=generator) for path, shape in shapes.items()}
    return own(erasure, Edits(deltas=deltas), pipe)


LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
CONVOLUTION = "mid_block.resnets.0.conv1.weight"


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_full_rank_edits_say_what_they_leave_out(
    originals: dict[str, Any], made: Any, to: str, draw: Any, tmp_path: Path
) -> None:
    pipe = copied(originals["stable-diffusion"])
    erasure = full_rank(made("stable-diffusion"), pipe, LINEAR, CONVOLUTION)
    whole = export_lora(erasure, to, tmp_path / "whole.safetensors", pipe=pipe, residual=0.0)
    assert whole.left_out < 1e-9
    stock = draw(pipe)
    pipe.load_lora_weights(tmp_path / "whole.safetensors")
    found = draw(pipe)
    pipe.unload_lora_weights()
    manager = ErasureManager(pipe)
    manager.add(erasure)
    torch.testing.assert_close(found, draw(pipe), rtol=0, atol=1e-4)
    assert (found - stock).abs().max() > 1e-3
    manager.unload()
    told = export_lora(erasure, to, tmp_path / "two.safetensors", pipe=pipe, rank=2)
    read = import_file(tmp_path / "two.safetensors", pipe)
    missing, energy = 0.0, 0.0
    for key, delta in erasure.deltas.items():
        held = read.erasure.deltas.get(key)
        edit = read.erasure.low_rank.get(key.removesuffix(".weight"))
        kept = edit.up @ edit.down if edit is not None else held
        assert kept is not None
        missing += float((delta - kept).double().square().sum())
        energy += float(delta.double().square().sum())
    assert told.left_out == pytest.approx(missing / energy, rel=1e-4)
    assert 0 < told.left_out < told.worst < 1
    assert (told.approximated, told.ranks) == (2, (2, 2))
    assert "SVD" in str(told)
    assert "left out" in read.notes[0]
    noted = json.loads(header(tmp_path / "two.safetensors")[EXPORT])
    assert noted["left_out"] == told.left_out
    assert len(noted["left_out_by_layer"]) == 2


def test_a_measurement_does_not_go_along_with_an_approximation(originals: Any, made: Any, tmp_path: Path) -> None:
    pipe = originals["stable-diffusion"]
    erasure = full_rank(made("stable-diffusion"), pipe, LINEAR)
    erasure.config.evaluation = {"canvas: UA": 1.0}
    export_lora(erasure, "kohya", tmp_path / "cat.safetensors", pipe=pipe)
    assert not import_file(tmp_path / "cat.safetensors", pipe).erasure.config.evaluation
    assert erasure.config.evaluation


def test_biases_and_norms_go_to_comfyui_alone(originals: dict[str, Any], tmp_path: Path) -> None:
    pipe = originals["stable-diffusion"]
    erasure = erase(pipe, "cat", "hirm", steps=2, attach=False, progress=False)
    assert any(delta.ndim == 1 for delta in erasure.deltas.values())
    for to in ("kohya", "a1111", "diffusers"):
        with pytest.raises(UnsupportedModelError, match=r"biases, norms or tables; those of ComfyUI do .*single-file"):
            export_lora(erasure, to, tmp_path / "cat.safetensors", pipe=pipe)
    told = export_lora(erasure, "comfyui", tmp_path / "cat.safetensors", pipe=pipe, residual=0.0)
    held = load_file(tmp_path / "cat.safetensors")
    plain = {name for name in held if name.endswith((".diff", ".diff_b"))}
    assert len(plain) == told.plain > 0
    assert all(name.startswith("text_encoders.clip_l.transformer.text_model.encoder.layers.0.") for name in plain)
    read = import_file(tmp_path / "cat.safetensors", pipe).erasure
    assert set(read.edits.parameters) == {key for key, delta in erasure.deltas.items() if delta.any()}
    for key, delta in read.deltas.items():
        assert torch.equal(delta, erasure.deltas[key])


# Layers that stand in one tensor -------------------------------------------------------------------------------------

FUSED = {
    "flux": ("transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.0.attn.to_v", "norm_out.linear"),
    "stable-diffusion-3": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.norm1_context.linear"),
}


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("together", [False, True])
def test_layers_that_stand_in_one_tensor(
    originals: dict[str, Any], made: Any, family: str, together: bool, tmp_path: Path
) -> None:
    """Alone, with zeros for their neighbours, and with another of the same tensor of another rank."""
    pipe, erasure = originals[family], made(family, saved_as="lora")
    chosen = [*FUSED[family]]
    if together:
        chosen += [
            path.replace("add_k", "add_q").replace("to_q", "to_v").replace("to_v", "to_k") for path in chosen[:2]
        ]
    generator = torch.Generator().manual_seed(5)
    edits = Edits()
    for rank, path in enumerate(dict.fromkeys(chosen), 1):
        out, into = paths.parameter(pipe.transformer, f"{path}.weight").shape
        down, up = (torch.randn(size, generator=generator) for size in ((rank, into), (out, rank)))
        edits.low_rank[f"transformer/{path}"] = LowRank(down, up)
    erasure = own(erasure, edits, pipe)
    export_lora(erasure, "kohya", tmp_path / "cat.safetensors", pipe=pipe)
    assert import_file(tmp_path / "cat.safetensors", pipe).erasure.edits.equals(edits)
    if family == "flux":
        with pytest.raises(UnsupportedModelError, match="whose size the erasure does not say"):
            export_lora(erasure, "kohya", tmp_path / "other.safetensors")


def test_fused_layers_of_flux_draw_the_same_in_the_stock_pipeline(
    originals: dict[str, Any], made: Any, draw: Any, tmp_path: Path
) -> None:
    pipe = copied(originals["flux"])
    generator = torch.Generator().manual_seed(5)
    edits = Edits()
    for rank, part in ((2, "add_k_proj"), (3, "to_v")):
        out, into = paths.parameter(pipe.transformer, f"transformer_blocks.0.attn.{part}.weight").shape
        factors = [torch.randn(size, generator=generator) / 2 for size in ((rank, into), (out, rank))]
        edits.low_rank[f"transformer/transformer_blocks.0.attn.{part}"] = LowRank(*factors)
    erasure = own(made("flux", saved_as="lora"), edits, pipe)
    export_lora(erasure, "kohya", tmp_path / "cat.safetensors", pipe=pipe)
    stock = draw(pipe)
    pipe.load_lora_weights(tmp_path / "cat.safetensors")
    found = draw(pipe)
    pipe.unload_lora_weights()
    ErasureManager(pipe).add(erasure)
    torch.testing.assert_close(found, draw(pipe), rtol=0, atol=1e-5)
    assert (found - stock).abs().max() > 1e-3


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", LOADERS)
def test_hooks_are_refused(originals: dict[str, Any], to: str, tmp_path: Path) -> None:
    erasure = erase(originals["stable-diffusion"], "cat", "sld", attach=False, progress=False)
    with pytest.raises(UnsupportedModelError, match=r"guides the denoiser while the model runs.*fuse=False"):
        export_lora(erasure, to, tmp_path / "cat.safetensors")
    assert not list(tmp_path.iterdir())


def test_one_step_generators_are_refused(made: Any, tmp_path: Path) -> None:
    erasure = made("stable-diffusion", saved_as="lora")
    config = dataclasses.replace(erasure.config, sampling={"steps": 1, "guidance": 1, "level": 625})
    with pytest.raises(UnsupportedModelError, match="one-step generator"):
        export_lora(Erasure(config, erasure.edits), "kohya", tmp_path / "cat.safetensors")


def test_what_a_program_has_no_name_for_is_refused(originals: dict[str, Any], made: Any, tmp_path: Path) -> None:
    t5 = made("flux", "diff_quickfix")
    with pytest.raises(UnsupportedModelError, match=r"text_encoder_2/.*loads no LoRA into T5.*single-file"):
        export_lora(t5, "diffusers", tmp_path / "cat.safetensors")
    for family, told in (("flux", "Forge"), ("stable-diffusion-3", "--to comfyui")):
        with pytest.raises(UnsupportedModelError, match=f"AUTOMATIC1111 cannot load .*{told}"):
            export_lora(made(family, saved_as="lora"), "a1111", tmp_path / "cat.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"name depends on the model, so name the model \(--model\)"):
        export_lora(made("stable-diffusion-xl", saved_as="lora"), "kohya", tmp_path / "cat.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_base_is_checked_and_files_are_kept(
    originals: dict[str, Any], made: Any, tiny_models: Any, tmp_path: Path
):
    erasure, path = made("stable-diffusion", saved_as="lora"), tmp_path / "cat.safetensors"
    with pytest.raises(WrongBaseError, match="are not those that the erasure was made for"):
        export_lora(erasure, "kohya", path, pipe=tiny_models["stable-diffusion"](seed=1))
    path.write_bytes(b"mine")
    with pytest.raises(ArtifactError, match=r"exists.*--overwrite"):
        export_lora(erasure, "kohya", path)
    assert path.read_bytes() == b"mine"
    export_lora(erasure, "kohya", path, overwrite=True)
    assert len(load_file(path)) == 3 * len(erasure.low_rank)
    with pytest.raises(ArtifactError, match=r"ending \.safetensors"):
        export_lora(erasure, "kohya", tmp_path / "cat.pt")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ArtifactError, match="is a folder"):
        export_lora(erasure, "kohya", tmp_path / "folder.safetensors", overwrite=True)
    for bad in ({"rank": 0}, {"residual": 1.0}, {"residual": -0.1}):
        with pytest.raises(OptionError):
            export_lora(erasure, "kohya", tmp_path / "other.safetensors", **bad)
    with pytest.raises(OptionError, match="there is no export to 'forge'"):
        export_lora(erasure, "forge", tmp_path / "other.safetensors")
