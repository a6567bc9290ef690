"""LoRA files of erasures in stock pipelines, and erasures on weights that cannot be written, family by family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline

from erasure import Erasure, ErasureManager, erase
from erasure.backbones import backbone_for
from erasure.carriers.edits import Edits, LowRank
from erasure.errors import UnsupportedModelError

STOCK = {
    "flux": FluxPipeline, "stable-diffusion-xl": StableDiffusionXLPipeline,
    "stable-diffusion-3": StableDiffusion3Pipeline,
}  # fmt: skip


@pytest.fixture(scope="module")
def originals(tiny_models: Any) -> dict[str, Any]:
    return {family: tiny_models[family]() for family in STOCK}


def made_for(pipe: Any, strategy: str, **options: Any) -> Erasure:
    return erase(pipe, "cat", strategy, vocabulary=8, attach=False, progress=False, **options)


@pytest.mark.parametrize("family", STOCK)
def test_a_lora_of_ours_draws_the_same_pixels_in_the_stock_pipeline(
    originals: dict[str, Any], family: str, draw: Any, tmp_path: Any
) -> None:
    pipe = copy.deepcopy(originals[family])
    assert type(pipe) is STOCK[family]
    stock, made = draw(pipe), made_for(pipe, "uce", saved_as="lora")
    assert {key.rpartition("/")[2] for key in made.low_rank} >= {
        layer.key.rpartition("/")[2] for layer in backbone_for(pipe).entry_layers() if layer.source == "pooled"
    }
    made.save(tmp_path / "cat")
    assert "load_lora_weights" in (tmp_path / "cat" / "README.md").read_text()
    pipe.load_lora_weights(tmp_path / "cat")
    found = draw(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), stock)
    ErasureManager(pipe).add(made)
    torch.testing.assert_close(found, draw(pipe), rtol=0, atol=1e-5)
    assert (found - stock).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["flux", "stable-diffusion-3"])
def test_what_stock_pipelines_do_not_load_is_not_offered_to_them(
    originals: dict[str, Any], family: str, tmp_path: Any, draw: Any
) -> None:
    """The part in T5 is in a file of ours, and the card says that; the part in CLIP is a LoRA that they load."""
    pipe = copy.deepcopy(originals[family])
    made = made_for(pipe, "diff_quickfix")
    folder = made.save(tmp_path / "cat")
    t5 = backbone_for(pipe).towers[-1].component
    card = (folder / "README.md").read_text()
    assert "load_lora_weights" not in card
    assert f"stock diffusers loads no LoRA into T5, which is the `{t5}` of this model" in card
    again = Erasure.read(folder)
    assert any(key.startswith(f"{t5}/") for key in again.low_rank)
    assert again.edits.equals(made.edits)
    clips = Erasure(made.config, Edits({k: v for k, v in made.low_rank.items() if not k.startswith(t5)}))
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    found = draw(pipe)
    pipe.unload_lora_weights()
    ErasureManager(pipe).add(clips)
    torch.testing.assert_close(found, draw(pipe), rtol=0, atol=1e-5)


@pytest.mark.parametrize("saved_as", ["map", "lora"])
def test_doors_in_eight_bits_have_the_edit_beside_them(originals: dict[str, Any], saved_as: Any, draw: Any) -> None:
    """Weights stored in fp8 and cast in every pass: a door's input is mapped ahead of it, or its output added to."""
    pipe = copy.deepcopy(originals["flux"])
    made = made_for(pipe, "uce", saved_as=saved_as, tolerance=0.0)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stock, manager = draw(pipe), ErasureManager(pipe)
    manager.add(made)
    assert manager.verify() == len(made.edits)
    found = draw(pipe)
    assert (found - stock).abs().max() > 1e-3
    layer = backbone_for(pipe).entry_layers()[0]
    x = torch.randn(3, layer.module.in_features, generator=torch.Generator().manual_seed(0))
    plain = layer.module.weight.float() @ x.T + layer.module.bias.float()[:, None]
    if saved_as == "map":
        edit = made.edits.maps[layer.key]
        plain = plain + layer.module.weight.float() @ edit.up.float() @ edit.down.float() @ x.T
    else:
        plain = plain + made.low_rank[layer.key].up.float() @ made.low_rank[layer.key].down.float() @ x.T
    torch.testing.assert_close(layer.module(x), plain.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        made_for(pipe, "uce")
    manager.unload()
    assert torch.equal(draw(pipe), stock)


def test_a_layer_whose_weight_is_no_tensor_is_named(originals: dict[str, Any]) -> None:
    """As torch's dynamic quantisation has it, and SVDQuant: there is nothing that an edit could go into."""
    made = made_for(originals["flux"], "uce")
    pipe = copy.deepcopy(originals["flux"])
    pipe.transformer.context_embedder = PackedLinear()
    with pytest.raises(UnsupportedModelError, match=r"context_embedder.weight is held by a PackedLinear .* quantised"):
        ErasureManager(pipe).add(made)


class PackedLinear(torch.nn.Module):
    """A layer that gives its weight by a method."""

    def weight(self) -> None:
        """No tensor."""


def test_edits_of_fused_projections_are_refused(originals: dict[str, Any]) -> None:
    """Those of text as well, which Flux fuses apart from those of the picture."""
    pipe = copy.deepcopy(originals["flux"])
    site = backbone_for(pipe).attention_sites()[0]
    key = f"transformer/{site.name}.add_k_proj"
    made = made_for(pipe, "uce")
    out, into = site.module.get_submodule("add_k_proj").weight.shape
    lora = Edits({key: LowRank(torch.ones(1, into), torch.ones(out, 1))})
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match="fused"):
        ErasureManager(pipe).add(Erasure(made.config, lora), check_base=False)
