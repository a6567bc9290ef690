"""`verify` passes while every erasure is in force, and never while the stock picture is drawn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.carriers.edits import Edits, LowRank
from erasure.errors import AttachError, ErasureError, NoMatchingModuleError, VerificationError, WrongBaseError
from erasure.interop import hooks, paths

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "uce": ("uce", {"vocabulary": 8, "saved_as": "lora", "tolerance": 0.0}),
    "diff_quickfix": ("diff_quickfix", {"vocabulary": 8}),
    "hirm": ("hirm", {"steps": 3, "contexts": 2, "retain_vocabulary": 2, "unconditional": "stock"}),
    "itd": ("itd", {"vocabulary": 8, "steps": 3, "d_sae": 128, "retain_rate": 1.0, "false_positive_rate": 1.0}),
    "esd": ("esd", {"steps": 3, "batch": 2, "retain_batch": 2, "rollout_steps": 2}),
}


@pytest.fixture(scope="module")
def erasures(tiny_pipe_original: Any) -> dict[str, Erasure]:
    import dataclasses

    from erasure.strategies import get

    made = {}
    for kind, (strategy, options) in KINDS.items():
        known = {field.name for field in dataclasses.fields(get(strategy))}
        chosen = {key: value for key, value in options.items() if key in known}
        made[kind] = erasure.erase(
            tiny_pipe_original, Concept("cat", anchor="dog"), strategy, attach=False, progress=False, **chosen
        )
    return made


@pytest.fixture
def attached(tiny_pipe: Any, erasures: dict[str, Erasure]) -> Callable[[str], tuple[Any, ErasureManager]]:
    def attach(kind: str) -> tuple[Any, ErasureManager]:
        manager = ErasureManager(tiny_pipe)
        manager.add(erasures[kind], "cat")
        assert manager.verify() > 0
        return tiny_pipe, manager

    return attach


def negated(made: Erasure) -> dict[str, torch.Tensor]:
    """A LoRA of the erasure's own factors, one of each pair with the other sign."""
    state = made.edits.lora_state_dict()
    return {key: -tensor if ".lora_up." in key else tensor for key, tensor in state.items()}


@pytest.mark.parametrize("kind", ["uce", "diff_quickfix", "esd"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_lora_that_takes_the_edit_back(kind: str, merged: bool, attached: Any, erasures: Any, draw: Any) -> None:
    pipe, manager = attached(kind)
    erased = draw(pipe)
    pipe.load_lora_weights(negated(erasures[kind]), adapter_name="thief")
    assert not torch.equal(draw(pipe), erased)
    if merged:
        pipe.fuse_lora()
    with pytest.raises(VerificationError, match="takes the edit back"):
        manager.verify()
    if merged:
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert manager.verify() > 0


@pytest.mark.parametrize("kind", ["uce", "hirm"])
def test_an_erasure_that_takes_another_back(kind: str, attached: Any, erasures: Any) -> None:
    manager = attached(kind)[1]
    made = erasures[kind]
    manager.add(made, "twice")
    assert manager.verify() > 0, "the same again takes nothing back"
    low_rank = {key: LowRank(edit.down, -2 * edit.up) for key, edit in made.low_rank.items()}
    deltas = {key: -2 * delta for key, delta in made.deltas.items()}
    manager.add(Erasure(made.config, Edits(low_rank=low_rank, deltas=deltas)), "thief")
    with pytest.raises(VerificationError, match="takes the edit back"):
        manager.verify()
    manager.delete("thief")
    assert manager.verify() > 0


def test_a_strength_that_is_no_factor_is_refused_everywhere(attached: Any, erasures: Any) -> None:
    manager = attached("uce")[1]
    for strength in (-1.0, -1e-9, float("inf"), -float("inf"), float("nan"), "much", None, 1 + 1j):
        with pytest.raises(AttachError, match="no strength"):
            manager.add(erasures["uce"], "twice", strength)
        if strength is not None:  # there it means 1
            for given in (strength, [strength]):
                if isinstance(given, str):
                    continue
                with pytest.raises(AttachError, match="no strength"):
                    manager.set_erasures("cat", given)
        assert manager.strengths == {"cat": 1.0}
    assert manager.verify() > 0


@pytest.mark.parametrize("strength", [0.0, 1e-30, 0.1])
def test_a_strength_that_draws_the_stock_picture_fails(strength: float, attached: Any) -> None:
    _, manager = attached("uce")
    manager.set_erasures("cat", strength)
    with pytest.raises(VerificationError, match="with strength"):
        manager.verify()
    if strength == 0.1:
        assert manager.verify(least_strength=0.05) > 0
    manager.set_erasures("cat", 0.8)
    assert manager.verify() > 0


def hooked(pipe: Any) -> list[nn.Module]:
    """Every module of the text encoder that carries a hook of an edit."""
    names = ("erasure_features_edit", "erasure_pinned_write")
    found = [part for part in pipe.text_encoder.modules() for name in names if hooks.find_hook(part, name) is not None]
    assert found
    return found


def reset(module: nn.Module) -> None:
    del module.forward


def replace_by_the_class_own(module: nn.Module) -> None:
    module.forward = type(module).forward.__get__(module)  # type: ignore[method-assign]


def unregister(module: nn.Module) -> None:
    for name in list(module._diffusers_hook.hooks):
        module._diffusers_hook.remove_hook(name)


@pytest.mark.parametrize("kind", ["itd", "hirm"])
@pytest.mark.parametrize("change", [reset, replace_by_the_class_own, unregister])
def test_hooks_that_no_longer_run(kind: str, change: Callable[[nn.Module], None], attached: Any) -> None:
    pipe, manager = attached(kind)
    for module in hooked(pipe):
        change(module)
    with pytest.raises(VerificationError):
        manager.verify()


def test_edits_beside_quantised_layers_that_no_longer_run(tiny_pipe: Any, erasures: Any) -> None:
    class Quantised(nn.Parameter):
        pass

    layers = [tiny_pipe.unet.get_submodule(key.split("/")[1]) for key in erasures["uce"].low_rank]
    for layer in layers:
        layer.weight = Quantised(layer.weight.data, requires_grad=False)
    manager = ErasureManager(tiny_pipe)
    manager.add(erasures["uce"], "cat")
    assert manager.verify() == len(layers)
    replace_by_the_class_own(layers[0])
    reset(layers[1])
    with pytest.raises(VerificationError, match="beside"):
        manager.verify()


def overwrite(block: Any) -> None:
    with torch.no_grad():
        block.mlp.fc1.weight[0, 0] += 1e-3


def quantise_dynamically(block: Any) -> None:
    block.mlp = torch.ao.quantization.quantize_dynamic(block.mlp, {nn.Linear}, dtype=torch.qint8)


def to_meta(block: Any) -> None:
    block.mlp.fc1.to("meta")


def to_float8(block: Any) -> None:
    block.mlp.fc1.weight.data = block.mlp.fc1.weight.data.to(torch.float8_e4m3fn)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [overwrite, quantise_dynamically, to_meta, to_float8])
@pytest.mark.parametrize("kind", ["itd", "hirm"])
def test_what_an_edit_reads_or_writes_was_changed(kind: str, change: Callable[[Any], None], attached: Any) -> None:
    pipe, manager = attached(kind)
    layers = pipe.text_encoder.encoder.layers
    edits = manager.erasures["cat"].edits
    keys = [*edits.features, *(key for key in edits.parameters if key.endswith("mlp.fc1.weight"))]
    change(layers[int(keys[0].split(".")[2])])
    with pytest.raises(VerificationError):
        manager.verify()
    if change is not overwrite and kind == "hirm":
        with pytest.raises(ErasureError):
            manager.unload()
        assert manager.active_erasures() == ["cat"]


@pytest.mark.parametrize("kind", ["uce", "esd"])
def test_another_models_text_encoder(kind: str, tiny_pipe_factory: Any, attached: Any, erasures: Any) -> None:
    other = tiny_pipe_factory(seed=7)
    pipe, manager = attached(kind)
    own, pipe.text_encoder = pipe.text_encoder, other.text_encoder
    with pytest.raises(VerificationError, match="text encoder"):
        manager.verify()
    pipe.text_encoder = own
    assert manager.verify() > 0
    manager.unload()
    pipe.text_encoder = other.text_encoder
    with pytest.raises(WrongBaseError, match="text_encoder"):
        manager.add(erasures[kind], "cat")
    manager.add(erasures[kind], "cat", check_base=False)


def test_the_text_encoder_is_known_in_any_precision_and_with_learned_tokens(
    tiny_pipe: Any, erasures: Any, teach: Any
) -> None:
    teach(tiny_pipe, "cat", "dog")
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        pipe = copy.deepcopy(tiny_pipe).to(dtype)
        ErasureManager(pipe).add(erasures["uce"], "cat")


def test_an_erasure_of_zeros_is_refused(tiny_pipe: Any, erasures: Any, tmp_path: Any) -> None:
    made = erasures["uce"]
    zeros = {key: LowRank(torch.zeros_like(e.down), e.up) for key, e in made.low_rank.items()}
    nothing = Erasure(made.config, Edits(low_rank=zeros))
    with pytest.raises(NoMatchingModuleError, match="zero"):
        ErasureManager(tiny_pipe).add(nothing, "cat")
    deltas = {"unet/conv_in.bias": torch.zeros(32)}
    with pytest.raises(NoMatchingModuleError, match="zero"):
        ErasureManager(tiny_pipe).add(Erasure(made.config, Edits(deltas=deltas)), "cat")


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "route",
    [
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_casts_in_any_order_neither_fail_nor_lock(kind: str, route: Any, attached: Any, tensors_of: Any) -> None:
    pipe, manager = attached(kind)
    manager.unload()
    base = tensors_of(pipe)
    manager = attached(kind)[1]
    for dtype in route:
        pipe.to(dtype)
        assert manager.verify() > 0
    manager.disable()
    manager.enable()
    assert manager.verify() > 0
    manager.unload()
    for key in manager.erasures or erasures_keys(base):
        component, path = key.split("/")
        found = paths.parameter(pipe.components[component], path)
        torch.testing.assert_close(found.float(), base[key].float(), atol=2e-2, rtol=2e-2)


def erasures_keys(base: dict[str, Any]) -> list[str]:
    return [key for key in base if key.startswith("unet/mid_block.attentions") and key.endswith("to_k.weight")]


def test_what_rescales_activations_or_cuts_attention_does_not_fail(attached: Any) -> None:
    pipe, manager = attached("uce")
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert manager.verify() > 0
    manager.disable()
    manager.enable()
    pipe.disable_freeu()
    pipe.enable_attention_slicing()
    assert manager.verify() > 0


def test_a_cast_chain_that_hides_the_stock_weights_is_found(tiny_pipe: Any, erasures: Any) -> None:
    """Rounding must not be mistaken for an edit: the stock weights, rounded, are near the edited ones too."""
    made = erasures["esd"]
    manager = ErasureManager(tiny_pipe)
    stock = {key: layer_weight(tiny_pipe, key).detach().clone() for key in made.low_rank}
    manager.add(made, "cat")
    tiny_pipe.to(torch.bfloat16)
    assert manager.verify() > 0
    for key, weight in stock.items():
        layer_weight(tiny_pipe, key).data.copy_(weight)
    with pytest.raises(VerificationError, match="something else changed it"):
        manager.verify()


def layer_weight(pipe: Any, key: str) -> torch.Tensor:
    component, path = key.split("/")
    return paths.parameter(pipe.components[component], path + ".weight")


def test_a_switch_back_is_compared_with_the_first_answer(tiny_pipe: Any, tiny_pipe_factory: Any) -> None:
    """Another text encoder is found although erasures were switched off and on with it."""
    made = erasure.erase(tiny_pipe, "cat", "uce", vocabulary=0, progress=False)
    manager = erasure.ErasureManager(tiny_pipe)
    manager.disable()
    tiny_pipe.text_encoder = tiny_pipe_factory(seed=1).text_encoder
    manager.enable()
    with pytest.raises(VerificationError, match="text encoder"):
        manager.verify()
    manager.delete(made.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_shift_of_a_whole_tensor_is_no_rounding(dtype: torch.dtype, tiny_pipe: Any) -> None:
    erasure.erase(tiny_pipe, "cat", "uce", vocabulary=0, progress=False)
    manager = ErasureManager(tiny_pipe)
    tiny_pipe.to(dtype)
    assert manager.verify()
    edited = manager._states()["unet"].record.written
    path = next(path for path in edited.terms if path.endswith("to_k.weight"))
    weight = paths.parameter(tiny_pipe.unet, path)
    with torch.no_grad():
        weight.add_(0.1 * weight.abs().max())
    with pytest.raises(VerificationError, match="something else changed it"):
        manager.verify()
