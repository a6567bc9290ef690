from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from erasure import Erasure, ErasureManager, erase
from erasure.carriers.activations import Pinned
from erasure.carriers.edits import Edits, LowRank
from erasure.carriers.weights import delta_of, fingerprint, same_base
from erasure.errors import (
    ArtifactError,
    AttachError,
    DivergenceError,
    NoMatchingModuleError,
    UnsupportedModelError,
    VerificationError,
    WrongBaseError,
)
from erasure.interop.paths import base_layer, parameter
from erasure.state import ComponentState


class Quantised(nn.Parameter):
    """Stands in for a quantised weight: a subclass that must not be written, as torchao's and bitsandbytes' are."""


def quantise(layer: nn.Linear) -> None:
    layer.weight = Quantised(layer.weight.data, requires_grad=False)


@pytest.fixture(scope="module")
def uce(tiny_pipe_original: Any) -> Erasure:
    return erase(
        tiny_pipe_original, "cat", "uce", vocabulary=8, saved_as="lora", tolerance=0.0, attach=False, progress=False
    )


@pytest.fixture(scope="module")
def hirm(tiny_pipe_original: Any) -> Erasure:
    return erase(
        tiny_pipe_original, "cat", "hirm", steps=2, contexts=0, retain_vocabulary=2, attach=False, progress=False
    )


@pytest.fixture
def manager(tiny_pipe: Any) -> ErasureManager:
    return ErasureManager(tiny_pipe)


def layer_of(pipe: Any, key: str) -> nn.Linear:
    component, path = key.split("/")
    return pipe.components[component].get_submodule(path)


def test_low_rank_equals_its_dense_delta(
    tiny_pipe: Any, tiny_pipe_original: Any, uce: Erasure, tensors_of: Any, changed_tensors: Any
) -> None:
    dense = {f"{key}.weight": delta_of(edit) for key, edit in uce.low_rank.items()}
    ErasureManager(tiny_pipe).add(Erasure(uce.config, Edits(deltas=dense)), "dense", strength=0.7)
    reference = tensors_of(tiny_pipe)
    other = copy.deepcopy(tiny_pipe_original)
    ErasureManager(other).add(uce, "low-rank", strength=0.7)
    assert changed_tensors(reference, other) == set()
    for key, edit in uce.low_rank.items():
        expected = layer_of(tiny_pipe_original, key).weight + 0.7 * edit.up @ edit.down
        torch.testing.assert_close(layer_of(other, key).weight, expected)


def test_full_rank_on_quantised_weights_is_refused(tiny_pipe: Any, hirm: Erasure, manager: ErasureManager) -> None:
    for key in {key.rsplit(".", 1)[0] for key in hirm.deltas}:
        quantise(layer_of(tiny_pipe, key))
    with pytest.raises(UnsupportedModelError, match=r"quantised .* attach the erasure to the unquantised model"):
        manager.add(hirm)
    assert manager.erasures == {}


def test_low_rank_on_quantised_weights_runs_beside_the_layers(
    tiny_pipe: Any, tiny_pipe_original: Any, uce: Erasure, other_uce: Erasure, manager: ErasureManager, draw: Any,
    tensors_of: Any, changed_tensors: Any, tmp_path: Any,
) -> None:  # fmt: skip
    def wanted(*erasures: tuple[Erasure, float]) -> torch.Tensor:
        pipe = copy.deepcopy(tiny_pipe_original)
        for index, (made, strength) in enumerate(erasures):
            ErasureManager(pipe).add(made, f"e{index}", strength)
        return draw(pipe)

    for key in uce.low_rank:
        quantise(layer_of(tiny_pipe, key))
    base = tensors_of(tiny_pipe)
    weights = {key: layer_of(tiny_pipe, key).weight for key in uce.low_rank}
    close = {"rtol": 0, "atol": 1e-5}
    manager.add(uce, "cat")
    assert manager.verify() == len(uce.low_rank)
    torch.testing.assert_close(draw(tiny_pipe), wanted((uce, 1.0)), **close)
    manager.set_erasures("cat", 0.5)
    torch.testing.assert_close(draw(tiny_pipe), wanted((uce, 0.5)), **close)
    manager.set_erasures("cat")
    manager.add(other_uce, "dog")
    torch.testing.assert_close(draw(tiny_pipe), wanted((uce, 1.0), (other_uce, 1.0)), **close)
    assert manager.verify() == 2 * len(uce.low_rank)
    with manager.disabled():
        torch.testing.assert_close(draw(tiny_pipe), draw(tiny_pipe_original), **close)
    with pytest.raises(AttachError, match="cannot be fused"):
        manager.fuse("cat")
    with pytest.raises(AttachError, match="runs beside"):
        tiny_pipe.save_pretrained(tmp_path / "corrupt")
    assert not (tmp_path / "corrupt").exists()
    with pytest.raises(UnsupportedModelError, match="quantised"):
        erase(tiny_pipe, "house", "uce", vocabulary=0, progress=False)
    manager.delete("cat")
    torch.testing.assert_close(draw(tiny_pipe), wanted((other_uce, 1.0)), **close)
    manager.unload()
    assert torch.equal(draw(tiny_pipe), draw(tiny_pipe_original))
    for key, weight in weights.items():
        assert layer_of(tiny_pipe, key).weight is weight, "a quantised weight was replaced"
    assert changed_tensors(base, tiny_pipe) == set()


@pytest.fixture(scope="module")
def other_uce(tiny_pipe_original: Any) -> Erasure:
    return erase(
        tiny_pipe_original, "dog", "uce", vocabulary=8, saved_as="lora", tolerance=0.0, attach=False, progress=False
    )


def users_lora(pipe: Any, value: float = 0.5) -> dict[str, torch.Tensor]:
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = base_layer(pipe.unet.get_submodule(path))
    return {
        f"unet.{path}.lora_A.weight": torch.full((1, layer.in_features), value),
        f"unet.{path}.lora_B.weight": torch.full((layer.out_features, 1), value),
    }


def test_what_a_user_does_with_adapters_does_not_reach_edits_beside_quantised_layers(
    tiny_pipe: Any, uce: Erasure, manager: ErasureManager, draw: Any
) -> None:
    for key in uce.low_rank:
        quantise(layer_of(tiny_pipe, key))
    stock = draw(tiny_pipe)
    manager.add(uce, "cat")
    alone = draw(tiny_pipe)
    assert not torch.equal(alone, stock)
    assert torch.equal(draw(tiny_pipe, cross_attention_kwargs={"scale": 0.0}), alone)
    tiny_pipe.load_lora_weights(users_lora(tiny_pipe), adapter_name="mine")
    both = draw(tiny_pipe)
    assert not torch.equal(both, alone)
    torch.testing.assert_close(draw(tiny_pipe, cross_attention_kwargs={"scale": 0.0}), alone, rtol=0, atol=1e-5)
    for change in (lambda: tiny_pipe.set_adapters("mine", 0.0), tiny_pipe.disable_lora):
        change()
        torch.testing.assert_close(draw(tiny_pipe), alone, rtol=0, atol=1e-5)
        assert manager.verify() == len(uce.low_rank)
    tiny_pipe.unload_lora_weights()
    torch.testing.assert_close(draw(tiny_pipe), alone, rtol=0, atol=1e-5)
    assert manager.verify() == len(uce.low_rank)
    manager.unload()
    assert torch.equal(draw(tiny_pipe), stock)


def test_an_adapter_of_a_user_that_was_there_first_stays(
    tiny_pipe: Any, uce: Erasure, manager: ErasureManager, draw: Any
) -> None:
    for key in uce.low_rank:
        quantise(layer_of(tiny_pipe, key))
    tiny_pipe.load_lora_weights(users_lora(tiny_pipe), adapter_name="mine")
    only_mine = draw(tiny_pipe)
    manager.add(uce, "cat")
    assert tiny_pipe.get_active_adapters() == ["mine"]
    assert not torch.equal(draw(tiny_pipe), only_mine)
    manager.unload()
    assert torch.equal(draw(tiny_pipe), only_mine)


def test_a_half_quantised_component_is_refused(tiny_pipe: Any, uce: Erasure, manager: ErasureManager) -> None:
    quantise(layer_of(tiny_pipe, next(iter(uce.low_rank))))
    with pytest.raises(AttachError, match="mixes quantised and plain"):
        manager.add(uce)


def test_fused_projections_are_refused(tiny_pipe: Any, uce: Erasure, manager: ErasureManager) -> None:
    tiny_pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(UnsupportedModelError, match=r"unfuse_qkv_projections\(\)"):
        manager.add(uce)
    tiny_pipe.unfuse_qkv_projections(vae=False)
    manager.add(uce)
    tiny_pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(VerificationError, match=r"unfuse_qkv_projections\(\)"):
        manager.verify()


def edits(**changes: Any) -> Edits:
    return Edits(deltas={"text_encoder/final_layer_norm.weight": torch.ones(32), **changes})


def with_edits(made: Erasure, changed: Edits) -> Erasure:
    return Erasure(made.config, changed)


def test_what_does_not_fit_is_refused(
    tiny_pipe: Any, hirm: Erasure, manager: ErasureManager, tensors_of: Any, changed_tensors: Any
) -> None:
    base = tensors_of(tiny_pipe)
    cases = [
        (Edits(), NoMatchingModuleError, "changes nothing"),
        (
            edits(**{"text_encoder/encoder.layers.9.mlp.fc1.weight": torch.ones(1)}),
            NoMatchingModuleError,
            "architecture",
        ),
        (edits(**{"text_encoder/encoder.layers.1.mlp.fc1.weight": torch.ones(3, 3)}), WrongBaseError, "shape"),
        (edits(**{"text_encoder_2/final_layer_norm.weight": torch.ones(32)}), WrongBaseError, "lacks"),
        (edits(**{"unet/conv_in.bias": torch.full((32,), torch.nan)}), DivergenceError, "NaN"),
    ]
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            manager.add(with_edits(hirm, changed))
        assert changed_tensors(base, tiny_pipe) == set()
        assert manager.erasures == {}


def test_an_error_half_way_leaves_nothing(
    tiny_pipe: Any, hirm: Erasure, manager: ErasureManager, tensors_of: Any, changed_tensors: Any, monkeypatch: Any
) -> None:
    base = tensors_of(tiny_pipe)
    both = with_edits(hirm, edits(**{"unet/conv_in.bias": torch.ones(32)}))
    put = ComponentState.install

    def stop_at_the_unet(self: ComponentState, module: Any) -> None:
        put(self, module)
        if self.component == "unet" and self.record.attached:
            raise KeyboardInterrupt

    monkeypatch.setattr(ComponentState, "install", stop_at_the_unet)
    with pytest.raises(KeyboardInterrupt):
        manager.add(both)
    assert changed_tensors(base, tiny_pipe) == set()
    assert manager.erasures == {}


def test_several_components_in_one_erasure(
    tiny_pipe: Any, hirm: Erasure, manager: ErasureManager, tensors_of: Any, changed_tensors: Any
) -> None:
    base = tensors_of(tiny_pipe)
    manager.add(with_edits(hirm, edits(**{"unet/conv_in.bias": torch.ones(32)})), "both")
    assert manager.list_erasures() == {"text_encoder": ["both"], "unet": ["both"]}
    assert changed_tensors(base, tiny_pipe) == {"text_encoder/final_layer_norm.weight", "unet/conv_in.bias"}
    assert torch.equal(tiny_pipe.unet.conv_in.bias, base["unet/conv_in.bias"] + 1)
    manager.unload()
    assert changed_tensors(base, tiny_pipe) == set()


def test_fingerprints() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    digests = fingerprint(weight)
    assert set(digests) == {"float32", "float16", "bfloat16"}
    assert same_base(weight, digests)
    for dtype in (torch.float16, torch.bfloat16):
        assert same_base(weight.to(dtype), digests)
        assert same_base(weight.to(dtype).float(), digests), "loaded in half and cast up"
        assert set(fingerprint(weight.to(dtype))) == {str(dtype).removeprefix("torch.")}
        assert same_base(weight, fingerprint(weight.to(dtype)))
    assert not same_base(weight * (1 + 1e-6), digests), "half precision alone cannot tell these apart"
    assert not same_base(weight.t(), digests)
    assert not same_base(weight, {})


def test_canonical_paths(tiny_pipe: Any) -> None:
    class Nested(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.text_model = inner

    path = "encoder.layers.0.mlp.fc1.weight"
    assert parameter(Nested(tiny_pipe.text_encoder), path) is tiny_pipe.text_encoder.get_parameter(path)
    with pytest.raises(AttributeError, match="no parameter 'wait'"):
        parameter(tiny_pipe.text_encoder, "encoder.layers.0.mlp.fc1.wait")


def test_state_dicts_round_trip() -> None:
    made = Edits(
        {
            "unet/a.to_k": LowRank(torch.rand(2, 4), torch.rand(3, 2)),
            "text_encoder/b.q": LowRank(torch.rand(1, 4), torch.rand(4, 1)),
        },
        {"text_encoder/c.bias": torch.rand(5)},
    )
    lora = made.lora_state_dict()
    assert set(lora) == {
        "unet.a.to_k.lora_A.weight", "unet.a.to_k.lora_B.weight",
        "text_encoder.text_model.b.q.lora_A.weight", "text_encoder.text_model.b.q.lora_B.weight",
    }  # fmt: skip
    again = Edits.from_state_dicts(made.delta_state_dict(), lora)
    assert set(again.parameters) == set(made.parameters)
    for key, edit in made.low_rank.items():
        assert torch.equal(again.low_rank[key].down, edit.down)
        assert torch.equal(again.low_rank[key].up, edit.up)


@pytest.mark.parametrize(
    ("deltas", "lora", "message"),
    [
        ({}, {"unet.a.lora_A.weight": torch.ones(1, 2)}, "no .lora_B"),
        ({}, {"unet.a.lora_B.weight": torch.ones(1, 2)}, "no \\.lora_A"),
        ({}, {"unet.a.lora_A.weight": torch.ones(1, 2), "unet.a.lora_B.weight": torch.ones(2, 3)}, "do not fit"),
        ({}, {"unet.a.alpha": torch.ones(1)}, "unknown LoRA key"),
        ({"nonsense": torch.ones(1)}, {}, "unknown key"),
        ({"text_encoder/pinned.input_ids": torch.ones(1, 2)}, {}, "incomplete"),
        ({"text_encoder/pinned.hidden_states": torch.ones(1, 2, 3)}, {}, "incomplete"),
        ({"text_encoder/pinned.other": torch.ones(1)}, {}, "incomplete"),
        (
            {
                "text_encoder/pinned.input_ids": torch.ones(2, 2),
                "text_encoder/pinned.hidden_states": torch.ones(1, 2, 3),
            },
            {},
            "do not fit",
        ),
    ],
)
def test_damaged_state_dicts_are_refused(deltas: dict, lora: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Edits.from_state_dicts(deltas, lora)


def test_what_no_pipeline_can_hold_is_refused_on_attaching(
    tiny_pipe: Any, hirm: Erasure, manager: ErasureManager, tensors_of: Any, changed_tensors: Any
) -> None:
    """Found while attaching, not while drawing."""
    base = tensors_of(tiny_pipe)
    width = tiny_pipe.text_encoder.config.hidden_size
    pinned = {"text_encoder": Pinned(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, width + 1))}
    cases: list[tuple[Edits, type[Exception], str]] = [
        (edits(**{"unet/conv_in.bias": torch.ones(32, dtype=torch.int64)}), ArtifactError, "int64, allowed"),
        (edits(**{"unet/conv_in.bias": torch.ones(32).to(torch.float8_e4m3fn)}), ArtifactError, "float8"),
        (edits(**{"unet/../conv_in.bias": torch.ones(32)}), ArtifactError, "names no parameter"),
        (Edits(deltas=edits().deltas, pinned=pinned), WrongBaseError, "width"),
        (edits(**{"vae/decoder.conv_in.bias": torch.ones(32)}), WrongBaseError, "no erasure may"),
    ]
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            manager.add(with_edits(hirm, changed), check_base=False)
        assert changed_tensors(base, tiny_pipe) == set()
        assert manager.erasures == {}
