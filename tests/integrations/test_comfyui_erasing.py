"""Erasures in ComfyUI's MODEL and CLIP: the weights that diffusers gets, refusals that help, and verification."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import Erasure, ErasureManager, bases
from erasure.backbones import backbone_for
from erasure.carriers.edits import Edits, LowRank
from erasure.errors import (
    AttachError,
    NoMatchingModuleError,
    UnsupportedModelError,
    VerificationError,
    WrongBaseError,
)
from erasure.interop import paths
from tests.behaviour.cases import fit
from tests.copies import copied
from tests.integrations.stand_ins import ENCODERS, expected, loaded, named

CASES = [
    *(("stable-diffusion", case) for case in ("uce", "uce-map", "hirm", "esd-full", "esd", "diff_quickfix")),
    ("stable-diffusion", "advunlearn"),
    *(("stable-diffusion-xl", case) for case in ("uce", "uce-map", "hirm", "esd-full", "esd")),
    *((family, case) for family in ("stable-diffusion-3", "flux") for case in ("uce", "esd", "esd-full")),
]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tiny_models: Any) -> dict[str, Any]:
    return {family: tiny_models[family]() for family in ENCODERS}


@pytest.fixture(scope="module")
def made(originals: dict[str, Any]) -> Any:
    """Makes erasures, each once: `made("flux", "uce")`."""
    known: dict[tuple[str, str], Erasure] = {}

    def make(family: str, case: str = "uce") -> Erasure:
        if (family, case) not in known:
            known[family, case] = fit(originals[family], case)
        return known[family, case]

    return make


def own(pipe: Any, edits: Edits, erasure: Erasure) -> Erasure:
    """An erasure with other edits, and what its config says of the base of these."""
    base = bases.base_of(backbone_for(pipe), edits, erasure.concepts)
    return Erasure(dataclasses.replace(erasure.config, base=base, carriers=edits.carriers), edits)


def held(model: Any, clip: Any) -> dict[str, Tensor]:
    """Every tensor as it is when the networks run."""
    found = {key: model.patched(key) for key in model.model.held}
    return found | {key: clip.patcher.patched(key) for key in clip.cond_stage_model.held}


def in_diffusers(pipe: Any, *terms: tuple[Erasure, float]) -> dict[str, Tensor]:
    """Every tensor of the pipeline with erasures attached, under ComfyUI's names."""
    pipe = copied(pipe)
    manager = ErasureManager(pipe)
    for number, (erasure, _) in enumerate(terms):
        manager.add(erasure, name=f"e{number}")
    manager.set_erasures([f"e{n}" for n in range(len(terms))], strengths=[strength for _, strength in terms])
    found = expected(pipe)
    return {**found.model, **found.clip}


def apply(nodes: Any, model: Any, erasure: Erasure, strength: float = 1.0, **options: Any) -> Any:
    return nodes["ErasureApply"]().apply(model, erasure, strength, **options)


def check_same(pipe: Any, found: dict[str, Tensor], *terms: tuple[Erasure, float]) -> None:
    wanted, stock = in_diffusers(pipe, *terms), expected(pipe)
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6, msg=key)
    before = {**stock.model, **stock.clip}
    changed = [key for key, tensor in found.items() if (tensor - before[key]).abs().max() > 1e-5]
    assert changed, "the erasure changes something that can be seen"


# The same weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "case"), CASES)
def test_weights_are_those_that_diffusers_gets(
    originals: dict[str, Any], made: Any, nodes: Any, family: str, case: str
) -> None:
    pipe, erasure = originals[family], made(family, case)
    model, clip = loaded(pipe)
    erased, read, report = apply(nodes, model, erasure, 0.75, clip=clip)
    check_same(pipe, held(erased, read), (erasure, 0.75))
    assert not model.patches, "what was given stays as it was"
    assert not clip.patcher.patches
    assert "strength 0.75, base checked" in report
    _, _, verified = nodes["ErasureVerify"]().verify(erased, erasure, 0.75, clip=read)
    assert "in force" in verified


SINGLE = {
    "stable-diffusion": (
        "unet", "mid_block.attentions.0.norm.weight", "mid_block.attentions.0.norm.bias", "conv_in.weight",
        "mid_block.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.bias", "time_embedding.linear_1.weight",
        "up_blocks.0.upsamplers.0.conv.weight", "down_blocks.0.downsamplers.0.conv.weight",
        "up_blocks.1.attentions.1.proj_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight",
    ),
    "stable-diffusion-xl": (
        "unet", "add_embedding.linear_1.weight", "add_embedding.linear_2.bias",
        "up_blocks.0.upsamplers.0.conv.weight", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0.bias",
        "down_blocks.1.attentions.0.proj_in.weight",
    ),
    "stable-diffusion-3": (
        "transformer", "transformer_blocks.0.attn.to_k.weight", "transformer_blocks.0.attn.to_v.weight",
        "transformer_blocks.1.norm1_context.linear.weight", "transformer_blocks.0.attn2.to_q.weight",
        "norm_out.linear.weight", "transformer_blocks.0.ff.net.2.weight", "transformer_blocks.0.attn.to_q.bias",
        "transformer_blocks.0.attn.to_v.bias", "transformer_blocks.1.norm1_context.linear.bias",
    ),
    "flux": (
        "transformer", "transformer_blocks.0.attn.add_v_proj.weight", "transformer_blocks.0.attn.to_q.weight",
        "single_transformer_blocks.0.attn.to_v.weight", "single_transformer_blocks.0.proj_mlp.weight",
        "norm_out.linear.weight", "context_embedder.weight", "single_transformer_blocks.0.attn.to_k.bias",
        "single_transformer_blocks.0.proj_mlp.bias", "norm_out.linear.bias",
    ),
}  # fmt: skip
"""Parameters of the denoiser whose change stands whole in a patch: tensors of all kinds of place and form."""
TEXT = {
    "stable-diffusion": {"text_encoder": ["final_layer_norm.weight", "embeddings.token_embedding.weight"]},
    "stable-diffusion-xl": {"text_encoder_2": ["encoder.layers.1.self_attn.q_proj.bias",
                                               "encoder.layers.2.mlp.fc1.weight"]},
    "stable-diffusion-3": {"text_encoder_3": ["encoder.block.1.layer.0.SelfAttention.o.weight",
                                              "encoder.final_layer_norm.weight"]},
    "flux": {"text_encoder_2": ["encoder.block.0.layer.1.DenseReluDense.wo.weight"],
             "text_encoder": ["encoder.layers.0.layer_norm1.bias"]},
}  # fmt: skip


def changed_at(pipe: Any, erasure: Erasure, keys: list[str]) -> Erasure:
    """An erasure of full-rank edits at given parameters."""
    generator = torch.Generator().manual_seed(3)
    deltas = {}
    for key in keys:
        component, path = key.split("/", 1)
        shape = paths.parameter(getattr(pipe, component), path).shape
        deltas[key] = 0.05 * torch.randn(shape, generator=generator)
    return own(pipe, Edits(deltas=deltas), erasure)


@pytest.mark.parametrize("family", SINGLE)
def test_changes_of_every_kind_of_parameter_are_exact(
    originals: dict[str, Any], made: Any, nodes: Any, family: str
) -> None:
    """Biases, norms, tables, convolutions, and parts of tensors that hold several layers."""
    pipe = originals[family]
    component, *there = SINGLE[family]
    keys = [f"{component}/{path}" for path in there]
    keys += [f"{encoder}/{path}" for encoder, each in TEXT[family].items() for path in each]
    erasure = changed_at(pipe, made(family), keys)
    model, clip = loaded(pipe)
    erased, read, _ = apply(nodes, model, erasure, clip=clip)
    check_same(pipe, held(erased, read), (erasure, 1.0))


def test_a_low_rank_and_a_full_edit_share_a_tensor(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    pipe = originals["flux"]
    queries, values = (f"transformer/transformer_blocks.0.attn.{name}" for name in ("to_q", "to_v"))
    generator = torch.Generator().manual_seed(1)
    low_rank = LowRank(*(0.3 * torch.randn(shape, generator=generator) for shape in ((2, 32), (32, 2))))
    whole = 0.1 * torch.randn(32, 32, generator=generator)
    edits = Edits(low_rank={queries: low_rank}, deltas={f"{values}.weight": whole})
    erasure = own(pipe, edits, made("flux"))
    model, clip = loaded(pipe)
    erased, read, _ = apply(nodes, model, erasure, clip=clip)
    check_same(pipe, held(erased, read), (erasure, 1.0))


def test_two_erasures_add_up(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    pipe, first, second = (
        originals["stable-diffusion"],
        made("stable-diffusion", "uce"),
        made("stable-diffusion", "hirm"),
    )
    model, clip = loaded(pipe)
    model, clip, _ = apply(nodes, model, first, 1.0, clip=clip)
    model, clip, _ = apply(nodes, model, second, 0.5, clip=clip)
    check_same(pipe, held(model, clip), (first, 1.0), (second, 0.5))
    verify = nodes["ErasureVerify"]()
    verify.verify(model, first, 1.0, clip=clip)
    verify.verify(model, second, 0.5, clip=clip)


def test_the_same_model_in_half_precision_is_the_same_base(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    pipe, erasure = originals["stable-diffusion"], made("stable-diffusion")
    model, clip = loaded(pipe, torch.float16)
    erased, read, _ = apply(nodes, model, erasure, clip=clip)
    nodes["ErasureVerify"]().verify(erased, erasure, 1.0, clip=read)
    wanted = in_diffusers(pipe, (erasure, 1.0))
    for key, tensor in held(erased, read).items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-3, atol=1e-3)


def test_an_edit_of_the_denoiser_needs_no_clip(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    model, _ = loaded(originals["stable-diffusion"])
    erased, read, report = apply(nodes, model, made("stable-diffusion"))
    assert read is None
    assert erased.patches
    assert "text encoders are unknown" in report


def test_strength_zero_gives_back_what_came(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    model, clip = loaded(originals["stable-diffusion"])
    erased, read, report = apply(nodes, model, made("stable-diffusion"), 0.0, clip=clip)
    assert (erased, read) == (model, clip)
    assert "nothing is erased" in report


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("sld", "guides the denoiser"), ("safree", "filters prompts"), ("spm", "behind"), ("itd", "edits features"),
        ("hirm-pinned", "pins prompts"),
    ],
)  # fmt: skip
def test_what_acts_while_the_model_runs_is_refused(
    originals: dict[str, Any], made: Any, nodes: Any, case: str, reason: str
) -> None:
    model, clip = loaded(originals["stable-diffusion"])
    erasure = made("stable-diffusion", case)
    assert erasure.edits.beyond_weights
    with pytest.raises(UnsupportedModelError, match="while the model runs, and patches of a model in ComfyUI") as told:
        apply(nodes, model, erasure, clip=clip)
    assert "pipe.load_erasure" in str(told.value)
    assert erasure.edits.beyond_weights in str(told.value)


def test_one_step_generators_and_chroma_are_refused(
    originals: dict[str, Any], made: Any, nodes: Any, tiny_models: Any
) -> None:
    model, clip = loaded(originals["stable-diffusion"])
    config = made("stable-diffusion").config
    one_step = dataclasses.replace(config, sampling={"steps": 1, "guidance": 1, "level": 625})
    with pytest.raises(UnsupportedModelError, match="one-step generator"):
        apply(nodes, model, Erasure(one_step, made("stable-diffusion").edits), clip=clip)
    with pytest.raises(UnsupportedModelError, match="of chroma: the names"):
        apply(nodes, model, Erasure(dataclasses.replace(config, family="chroma"), made("stable-diffusion").edits))


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), "much"])
def test_a_strength_that_is_none_is_refused(originals: dict[str, Any], made: Any, nodes: Any, strength: Any) -> None:
    model, clip = loaded(originals["stable-diffusion"])
    with pytest.raises(AttachError, match="is no strength"):
        apply(nodes, model, made("stable-diffusion"), strength, clip=clip)


def test_other_weights_are_refused(tiny_models: Any, made: Any, nodes: Any) -> None:
    model, clip = loaded(tiny_models["stable-diffusion"](seed=5))
    erasure = made("stable-diffusion")
    with pytest.raises(WrongBaseError, match=r"\d+ of \d+ tensors are not those .* switch check_base off"):
        apply(nodes, model, erasure, clip=clip)
    assert not model.patches
    erased, _, report = apply(nodes, model, erasure, clip=clip, check_base=False)
    assert erased.patches
    assert "base not checked" in report


def test_one_other_weight_is_seen(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    model, clip = loaded(originals["stable-diffusion"])
    place = next(key for key in model.model.held if key.endswith("attn2.to_k.weight"))
    model.model.held[place] = model.model.held[place] + 1e-3
    with pytest.raises(WrongBaseError, match=r"1 of \d+ tensors"):
        apply(nodes, model, made("stable-diffusion"), clip=clip)


def test_other_text_encoders_are_refused(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    """What the denoiser is told to forget stands in its text encoder's own language."""
    model, clip = loaded(originals["stable-diffusion"])
    for key in clip.cond_stage_model.held:
        if "mlp.fc1.weight" in key:
            clip.cond_stage_model.held[key] = clip.cond_stage_model.held[key].flip(0)
    with pytest.raises(WrongBaseError, match="fitted to another text_encoder than this CLIP has"):
        apply(nodes, model, made("stable-diffusion"), clip=clip)
    assert apply(nodes, model, made("stable-diffusion"), clip=clip, check_base=False)[0].patches


def test_learned_tokens_behind_the_vocabulary_do_not_make_another_base(originals: Any, made: Any, nodes: Any) -> None:
    model, clip = loaded(originals["stable-diffusion"])
    table = "clip_l.transformer.text_model.embeddings.token_embedding.weight"
    clip.cond_stage_model.held[table] = torch.cat([clip.cond_stage_model.held[table], torch.ones(2, 32)])
    assert apply(nodes, model, made("stable-diffusion"), clip=clip)[0].patches


def test_the_last_block_of_clip_h_may_be_there(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    """ComfyUI has the last block of the text encoder of Stable Diffusion 2.x, which pipelines leave out."""
    model, clip = loaded(originals["stable-diffusion"])
    network = clip.cond_stage_model
    network.held = {key.replace("clip_l.", "clip_h."): tensor for key, tensor in network.held.items()}
    for key in [key for key in network.held if ".layers.3." in key]:
        network.held[key.replace(".layers.3.", ".layers.4.")] = torch.rand_like(network.held[key])
    assert apply(nodes, model, made("stable-diffusion"), clip=clip)[0].patches
    network.held["clip_h.transformer.text_model.encoder.layers.1.mlp.fc1.weight"] += 1
    with pytest.raises(WrongBaseError, match="fitted to another text_encoder"):
        apply(nodes, model, made("stable-diffusion"), clip=clip)


@pytest.mark.parametrize("family", [family for family in ENCODERS if family != "stable-diffusion"])
def test_a_model_of_another_family_is_refused(originals: dict[str, Any], made: Any, nodes: Any, family: str) -> None:
    for erased, other in (("stable-diffusion", family), (family, "stable-diffusion")):
        model, clip = loaded(originals[other])
        with pytest.raises(WrongBaseError, match=r"was made for|fitted to another"):
            apply(nodes, model, made(erased), clip=clip, check_base=False)
        assert not model.patches


def test_text_encoder_edits_need_clip(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    model, _ = loaded(originals["stable-diffusion"])
    with pytest.raises(NoMatchingModuleError, match="no CLIP is connected"):
        apply(nodes, model, made("stable-diffusion", "hirm"))
    with pytest.raises(NoMatchingModuleError, match="no CLIP is connected"):
        nodes["ErasureVerify"]().verify(model, made("stable-diffusion", "hirm"), 1.0)


def test_a_text_encoder_that_was_not_loaded_is_missed(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    pipe = originals["stable-diffusion-3"]
    model, clip = loaded(pipe)
    held_ = clip.cond_stage_model.held
    clip.cond_stage_model.held = {key: tensor for key, tensor in held_.items() if not key.startswith("t5xxl")}
    with pytest.raises(WrongBaseError, match="another text_encoder_3"):
        apply(nodes, model, made("stable-diffusion-3"), clip=clip)
    key = "text_encoder_3/encoder.block.1.layer.0.SelfAttention.o.weight"
    with pytest.raises(WrongBaseError, match="which this model does not have"):
        apply(nodes, model, changed_at(pipe, made("stable-diffusion-3"), [key]), clip=clip)


def test_a_name_that_comfyui_does_not_know_is_an_error(
    originals: dict[str, Any], made: Any, nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would load the other layers, and pass over this one with a line in its log."""
    lora = sys.modules["comfy.lora"]
    known = lora.model_lora_keys_unet  # type: ignore[attr-defined]

    def fewer(model: Any, names: Any) -> Any:
        found = known(model, names)
        return {name: key for name, key in found.items() if "up_blocks_1" not in name or "to_k" not in name}

    monkeypatch.setattr(lora, "model_lora_keys_unet", fewer)
    model, clip = loaded(originals["stable-diffusion"])
    with pytest.raises(WrongBaseError, match="does not know in this model and would pass over"):
        apply(nodes, model, made("stable-diffusion"), clip=clip)
    assert not model.patches


@pytest.mark.parametrize("fault", ["loader", "patcher"])
def test_a_patch_that_is_not_taken_is_an_error(
    originals: dict[str, Any], made: Any, nodes: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    model, clip = loaded(originals["stable-diffusion"])
    lora, kind = sys.modules["comfy.lora"], type(model)
    load, add = lora.load_lora, kind.add_patches  # type: ignore[attr-defined]
    if fault == "loader":
        monkeypatch.setattr(lora, "load_lora", lambda *args: dict(list(load(*args).items())[1:]))
    else:
        monkeypatch.setattr(kind, "add_patches", lambda self, patches, strength: add(self, patches, strength)[1:])
    with pytest.raises(VerificationError, match=r"took \d+ of \d+ patches"):
        apply(nodes, model, made("stable-diffusion"), clip=clip)


def test_a_tensor_of_another_shape_is_an_error(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    """ComfyUI would pass over it with a line in its log when it draws."""
    model, clip = loaded(originals["stable-diffusion"])
    place = next(key for key in model.model.held if key.endswith("attn2.to_v.weight"))
    model.model.held[place] = torch.cat([model.model.held[place]] * 2)
    with pytest.raises(WrongBaseError, match=r"has the shape \(\d+, \d+\) here"):
        apply(nodes, model, made("stable-diffusion"), clip=clip, check_base=False)


# Verification --------------------------------------------------------------------------------------------------------


def test_verification_finds_what_is_not_erased(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    erasure, verify = made("stable-diffusion"), nodes["ErasureVerify"]().verify
    model, clip = loaded(originals["stable-diffusion"])
    with pytest.raises(VerificationError, match=r"is not in force: .* holds 0.00"):
        verify(model, erasure, 1.0, clip=clip)
    weaker, _, _ = apply(nodes, model, erasure, 0.5, clip=clip)
    with pytest.raises(VerificationError, match=r"holds 0.50 of the edit, expected 1"):
        verify(weaker, erasure, 1.0, clip=clip)
    verify(weaker, erasure, 0.5, clip=clip)
    with pytest.raises(VerificationError, match="a strength of 0 is none"):
        verify(weaker, erasure, 0.0, clip=clip)


def test_verification_sees_the_text_encoder(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    """The patched MODEL with the stock CLIP is a workflow that was wired wrong."""
    model, clip = loaded(originals["stable-diffusion"])
    erasure = made("stable-diffusion", "hirm")
    erased, read, _ = apply(nodes, model, erasure, clip=clip)
    nodes["ErasureVerify"]().verify(erased, erasure, 1.0, clip=read)
    with pytest.raises(VerificationError, match="is not in force"):
        nodes["ErasureVerify"]().verify(erased, erasure, 1.0, clip=clip)


@pytest.mark.parametrize("later", ["set", "back", "nan"])
def test_verification_sees_patches_that_take_an_erasure_back(
    originals: dict[str, Any], made: Any, nodes: Any, later: str
) -> None:
    model, clip = loaded(originals["stable-diffusion"])
    erasure = made("stable-diffusion")
    erased, _, _ = apply(nodes, model, erasure, clip=clip)
    target = next(iter(erased.patches))
    base = erased.model.held[target]
    if later == "back":
        erased.add_patches({target: erased.patches[target][0][1]}, -0.5)
    else:
        erased.add_patches({target: ("set", base if later == "set" else torch.full_like(base, float("nan")))})
    with pytest.raises(VerificationError, match=f"is not in force: {target} holds"):
        nodes["ErasureVerify"]().verify(erased, erasure, 1.0, clip=clip)


def test_another_lora_beside_it_is_fine(originals: dict[str, Any], made: Any, nodes: Any) -> None:
    model, clip = loaded(originals["stable-diffusion"])
    erasure = made("stable-diffusion")
    erased, _, _ = apply(nodes, model, erasure, clip=clip)
    generator = torch.Generator().manual_seed(0)
    for target in list(erased.patches):
        shape = erased.model.held[target].shape
        erased.add_patches({target: ("diff", 1e-4 * torch.randn(shape, generator=generator))})
    model_, clip_, report = nodes["ErasureVerify"]().verify(erased, erasure, 1.0, clip=clip)
    assert (model_, clip_) == (erased, clip)
    assert "in force in" in report


def test_names_of_tensors_are_all_different(originals: dict[str, Any], pack: ModuleType) -> None:
    """The stand-in keeps every tensor, so that comparisons see all of them."""
    for family, pipe in originals.items():
        parts = [backbone_for(pipe).denoiser_component, *ENCODERS[family]]
        total = sum(len(named(pipe, part)) for part in parts)
        found = expected(pipe)
        assert total == len({**found.model, **found.clip})
