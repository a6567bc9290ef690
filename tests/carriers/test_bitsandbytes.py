"""Erasures on layers that bitsandbytes holds in four and eight bits: real ones, which run on a CPU too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import erasure
from erasure import ErasureManager
from erasure.backbones import backbone_for
from erasure.errors import UnsupportedModelError
from erasure.interop import paths

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is installed apart: it slows every import")

FAMILIES = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux")


def packed(layer: nn.Linear, kind: str) -> nn.Module:
    """The same layer with its weight in four bits (nf4) or in eight, as diffusers' quantisers make it."""
    size = (layer.in_features, layer.out_features, layer.bias is not None)
    made: Any
    if kind == "nf4":
        made = bitsandbytes.nn.Linear4bit(*size, quant_type="nf4", compute_dtype=torch.float32)
    else:
        made = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False)


def quantise(pipe: Any, kind: str) -> None:
    """Put packed layers in the place of those through which text enters."""
    for door in backbone_for(pipe).entry_layers():
        parent, _, name = door.path.rpartition(".")
        owner = paths.uncompiled(backbone_for(pipe).denoiser).get_submodule(parent)
        setattr(owner, name, packed(door.module, kind))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_runs_beside_packed_layers(tiny_models: Any, draw: Any, family: str, kind: str) -> None:
    plain = tiny_models[family]()
    options = {"vocabulary": 8, "attach": False, "progress": False, "saved_as": "lora"}
    made = erasure.erase(plain, "cat", "uce", **options)
    pipe = copy.deepcopy(plain)
    quantise(pipe, kind)
    stock, manager = draw(pipe), ErasureManager(pipe)
    weights = {door.key: door.module.weight for door in backbone_for(pipe).entry_layers()}

    manager.add(made)
    assert manager.verify() == len(made.edits)
    assert (draw(pipe) - stock).abs().max() > 1e-3
    for door in backbone_for(pipe).entry_layers():
        assert door.module.weight is weights[door.key], "a quantised weight was replaced"
        x = torch.randn(3, door.module.in_features, generator=torch.Generator().manual_seed(0))
        edited, edit = door.module(x), made.low_rank[door.key]
        added = x @ (edit.up.float() @ edit.down.float()).T
        manager.disable()
        torch.testing.assert_close(edited - door.module(x), added, rtol=1e-4, atol=1e-5)
        manager.enable()

    with pytest.raises(UnsupportedModelError, match="quantised"):
        erasure.erase(pipe, "dog", "uce", **options)
    manager.unload()
    assert torch.equal(draw(pipe), stock)
