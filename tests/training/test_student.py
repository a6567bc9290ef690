"""Students against plain references, and every trap of switching adapters that they cannot fall into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from erasure.errors import NoMatchingModuleError
from erasure.interop import paths
from erasure.training.student import LowRankStudent, Student, SubsetStudent, checkpointed, make_student

LAYERS = [f"mid_block.attentions.0.transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]


@pytest.fixture
def unet(tiny_pipe: Any) -> Any:
    return tiny_pipe.unet


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 32, generator=generator))
    return x, torch.tensor([500, 20]), text


def output(unet: Any) -> Tensor:
    x, t, text = inputs()
    return unet(x, t, encoder_hidden_states=text).sample


def low_rank(unet: Any) -> LowRankStudent:
    student = LowRankStudent(unet, LAYERS, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for up in student.up:
            up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return student


def subset(unet: Any) -> SubsetStudent:
    student = SubsetStudent(unet, [f"{path}.weight" for path in LAYERS])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in student.values:
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return student


KINDS: dict[str, Callable[[Any], Student]] = {"low rank": low_rank, "subset": subset}


@pytest.fixture(params=KINDS)
def student(request: pytest.FixtureRequest, unet: Any) -> Student:
    return KINDS[request.param](unet)


def dense(student: Student) -> dict[str, Tensor]:
    """The student's weights by plain arithmetic, by path of the layer."""
    if isinstance(student, LowRankStudent):
        return {
            path: paths.parameter(student.network, f"{path}.weight") + up @ down
            for path, down, up in zip(student.paths, student.down, student.up, strict=True)
        }
    assert isinstance(student, SubsetStudent)
    return {path.removesuffix(".weight"): v for path, v in zip(student.paths, student.values, strict=True)}


def gradients(student: Student) -> list[Tensor]:
    made = [parameter.grad for parameter in student.parameters()]
    assert all(gradient is not None for gradient in made)
    student.zero_grad()
    return made  # type: ignore[return-value]


def test_the_student_is_the_network_with_the_changed_weights(student: Student, unet: Any) -> None:
    stock = output(unet)
    with student.active():
        found = output(unet)
        with student.active():
            assert torch.equal(output(unet), found), "nested"
        assert torch.equal(output(unet), found)
    assert torch.equal(output(unet), stock)
    changed = {f"{path}.weight": weight for path, weight in dense(student).items()}
    x, t, text = inputs()
    wanted = torch.func.functional_call(unet, changed, (x, t), {"encoder_hidden_states": text}).sample
    torch.testing.assert_close(found, wanted)
    assert (found - stock).abs().max() > 1e-3
    torch.testing.assert_close(student(lambda: output(unet)), found)


def test_a_new_student_is_the_teacher_bit_for_bit(unet: Any) -> None:
    stock = output(unet)
    for made in (LowRankStudent(unet, LAYERS, 4, torch.Generator()), SubsetStudent(unet, ["conv_in.weight"])):
        assert torch.equal(made(lambda: output(unet)), stock)


def test_leaving_by_an_error_leaves_the_teacher(student: Student, unet: Any) -> None:
    stock = output(unet)
    with pytest.raises(KeyboardInterrupt), student.active():
        raise KeyboardInterrupt
    assert torch.equal(output(unet), stock)


def test_a_module_of_the_trainable_tensors_only(student: Student, unet: Any) -> None:
    assert len(list(student.parameters())) == (8 if isinstance(student, LowRankStudent) else 4)
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert not any(module is unet for module in student.modules())


def test_changes_are_what_was_trained(student: Student) -> None:
    stock = {path: paths.parameter(student.network, f"{path}.weight") for path in LAYERS}
    found = {path: up.float() @ down.float() for path, (down, up) in student.low_rank().items()}
    found |= {path.removesuffix(".weight"): delta.float() for path, delta in student.deltas().items()}
    for path, weight in dense(student).items():
        torch.testing.assert_close(found[path], (weight - stock[path]).detach(), rtol=2e-3, atol=2e-3)


def test_a_half_precision_network_trains_float32(tiny_pipe: Any) -> None:
    unet = tiny_pipe.unet.to(torch.bfloat16)
    for make in KINDS.values():
        student = make(unet)
        x, t, text = inputs()
        made = student(lambda x=x, t=t, text=text: unet(x.bfloat16(), t, encoder_hidden_states=text.bfloat16()).sample)
        assert made.dtype == torch.bfloat16
        made.float().square().mean().backward()
        assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients(student))


# The traps -----------------------------------------------------------------------------------------------------------


def test_a_teacher_between_forward_and_backward_drops_no_gradient(student: Student, unet: Any) -> None:
    """Whereas switching PEFT's adapters off there drops every gradient, without a word."""
    student(lambda: output(unet)).square().mean().backward()
    wanted = gradients(student)
    loss = student(lambda: output(unet)).square().mean()
    with torch.no_grad():
        output(unet)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(student), wanted, strict=True))

    adapted = with_adapter(unet)
    loss = output(adapted).square().mean()
    adapted.disable_adapters()
    with torch.no_grad():
        output(adapted)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for n, p in adapted.named_parameters() if "lora_" in n)


def test_a_frozen_tensor_stays_frozen(student: Student, unet: Any) -> None:
    """Whereas switching PEFT's adapters on again takes back the user's own `requires_grad`."""
    first, *others = student.parameters()
    first.requires_grad_(False)
    for _ in range(2):
        with student.active():
            output(unet)
        output(unet)
    assert not first.requires_grad
    assert all(parameter.requires_grad for parameter in others)

    adapted = with_adapter(unet)
    frozen = next(p for n, p in adapted.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    adapted.disable_adapters()
    adapted.enable_adapters()
    assert frozen.requires_grad


def test_checkpointing_gives_the_same_gradients_with_a_teacher_in_between(student: Student, unet: Any) -> None:
    """Whereas with PEFT's adapters off during backward the blocks that run again are the teacher's."""
    student(lambda: output(unet)).square().mean().backward()
    wanted = gradients(student)
    with checkpointed(unet, [student]):
        loss = student(lambda: output(unet)).square().mean()
        with torch.no_grad():
            output(unet)
        loss.backward()
    for found, gradient in zip(gradients(student), wanted, strict=True):
        torch.testing.assert_close(found, gradient)
    assert not unet.is_gradient_checkpointing

    adapted = with_adapter(unet)
    adapted.enable_gradient_checkpointing()
    loss = output(adapted).square().mean()
    adapted.disable_adapters()
    with pytest.raises(CheckpointError):
        loss.backward()


def with_adapter(unet: Any) -> Any:
    """The network with a LoRA of PEFT's, as training scripts add it."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights="gaussian"))
    return unet


# Choosing ------------------------------------------------------------------------------------------------------------


def test_nothing_to_train_is_an_error_that_names_what_was_sought(unet: Any) -> None:
    generator = torch.Generator()
    for chosen, rank, kind in (([], 0, "parameter"), ([], 4, "linear layer"), (["conv_in.weight"], 4, "linear layer")):
        with pytest.raises(NoMatchingModuleError, match=rf"no {kind} of UNet2DConditionModel matches method 'x'"):
            make_student(unet, chosen, rank, generator, "method 'x'")
    assert isinstance(make_student(unet, ["conv_in.weight"], 0, generator, "all"), SubsetStudent)
    made = make_student(unet, [f"{LAYERS[0]}.weight", f"{LAYERS[0]}.bias", "conv_in.weight"], 4, generator, "all")
    assert isinstance(made, LowRankStudent)
    assert made.paths == LAYERS[:1]


def test_a_rank_beyond_the_layer_is_cut(unet: Any) -> None:
    made = LowRankStudent(unet, LAYERS[:1], 1000, torch.Generator())
    layer = paths.layer(unet, LAYERS[0])
    assert isinstance(layer, nn.Linear)
    assert made.down[0].shape[0] == min(layer.in_features, layer.out_features)


def test_a_layer_whose_weight_is_packed_has_the_shape_of_what_it_computes() -> None:
    """As quantised layers have it: two numbers in each byte of a column."""

    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 10, bias=False)
            self.values = self.weight.detach().clone()
            self.weight = nn.Parameter(torch.zeros(30, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.values.T

    layer = Packed()
    made = make_student(nn.ModuleDict({"door": layer}), ["door.weight"], 4, torch.Generator().manual_seed(0), "all")
    assert isinstance(made, LowRankStudent)
    assert (made.down[0].shape, made.up[0].shape) == ((4, 6), (10, 4))
    with torch.no_grad():
        made.up[0].fill_(0.5)
    x = torch.randn(3, 6)
    torch.testing.assert_close(made(lambda: layer(x)), x @ (layer.values + made.up[0] @ made.down[0]).T)


def test_layers_that_were_pruned_are_left_out(unet: Any) -> None:
    made = low_rank(unet)
    with torch.no_grad():
        made.up[1].zero_()
    assert set(made.low_rank()) == set(LAYERS) - {LAYERS[1]}
