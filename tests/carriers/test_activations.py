from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HookRegistry
from diffusers.hooks import ModelHook

from erasure.backbones import TextTower, backbone_for
from erasure.carriers.activations import Pinned, PinnedPrompts, pin_of


@pytest.fixture
def tower(tiny_pipe: Any) -> TextTower:
    return backbone_for(tiny_pipe).towers[0]


def pin(tower: TextTower, prompt: str, value: float) -> Pinned:
    ids = tower.tokenize([prompt]).ids
    return Pinned(ids, torch.full((1, 77, 32), value))


@torch.no_grad()
def encode(tower: TextTower, *prompts: str) -> torch.Tensor:
    return tower.encode(tower.tokenize(prompts)).states


def test_pinned_prompts_and_no_others(tower: TextTower) -> None:
    before = encode(tower, "a cat", "", "a dog")
    PinnedPrompts.write(tower.module, [pin(tower, "", 0.5), pin(tower, "a dog", 2.0)])
    after = encode(tower, "a cat", "", "a dog")
    assert torch.equal(after[0], before[0])
    assert (after[1] == 0.5).all()
    assert (after[2] == 2.0).all()
    assert torch.equal(encode(tower, "a cat")[0], encode(tower, "a cat", "a cat")[1])


def test_removal_leaves_the_module_as_it_was(tower: TextTower) -> None:
    before = encode(tower, "")
    PinnedPrompts.write(tower.module, [pin(tower, "", 0.5)])
    PinnedPrompts.write(tower.module, [pin(tower, "", 0.75)])
    assert (encode(tower, "") == 0.75).all()
    PinnedPrompts.write(tower.module, [])
    assert torch.equal(encode(tower, ""), before)
    assert "erasure" not in str(tower.root.final_layer_norm._diffusers_hook.hooks)


def test_nothing_to_pin_leaves_no_trace(tower: TextTower, tiny_pipe: Any) -> None:
    PinnedPrompts.write(tower.module, [])
    PinnedPrompts.write(tiny_pipe.unet, [])
    assert not hasattr(tower.root.final_layer_norm, "_diffusers_hook")
    assert PinnedPrompts.is_written(tiny_pipe.unet, [])


def test_is_written_wants_exactly_these_pins(tower: TextTower) -> None:
    ours, others = pin(tower, "", 0.5), pin(tower, "", 0.75)
    assert PinnedPrompts.is_written(tower.module, [])
    assert not PinnedPrompts.is_written(tower.module, [ours])
    PinnedPrompts.write(tower.module, [ours])
    assert PinnedPrompts.is_written(tower.module, [ours])
    assert not PinnedPrompts.is_written(tower.module, [others])
    assert not PinnedPrompts.is_written(tower.module, [ours, others])
    assert not PinnedPrompts.is_written(tower.module, [])
    tower.root.final_layer_norm._diffusers_hook.remove_hook("erasure_pinned_write")
    assert not PinnedPrompts.is_written(tower.module, [ours])


def test_gradients_pass(tower: TextTower) -> None:
    """White-box attacks must be able to see through it."""
    PinnedPrompts.write(tower.module, [pin(tower, "", 0.5)])
    weight = tower.root.final_layer_norm.weight.requires_grad_()
    tower.encode(tower.tokenize(["a cat"])).states.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_hidden_states_before_the_last_are_stock(tower: TextTower) -> None:
    tokens = tower.tokenize([""])
    with torch.no_grad():
        before = tower.module(tokens.ids, output_hidden_states=True).hidden_states
        PinnedPrompts.write(tower.module, [pin(tower, "", 0.5)])
        after = tower.module(tokens.ids, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(after.hidden_states, before, strict=True))
    assert (after.last_hidden_state == 0.5).all()


@pytest.fixture
def skipping(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Encodes as the stock pipeline does with `clip_skip`; newer versions of transformers lack what it asks for."""
    monkeypatch.setattr(type(tiny_pipe.text_encoder), "text_model", property(lambda self: self), raising=False)
    return lambda prompts, skip: tiny_pipe.encode_prompt(prompts, "cpu", 1, False, clip_skip=skip)[0]


@torch.no_grad()
def test_pinned_prompts_stay_where_blocks_are_left_out(tiny_pipe: Any, tower: TextTower, skipping: Any) -> None:
    """Every block gives what was pinned for the empty prompt, and for other prompts what the changed model does."""
    prompts, skips = ["", "a cat", ""], [None, *range(1, len(tower.blocks))]
    stock = [skipping(prompts, skip) for skip in skips]
    pinned = pin_of(tower, [""])
    tower.blocks[0].self_attn.q_proj.weight.mul_(-2)
    changed = [skipping(prompts, skip) for skip in skips]
    PinnedPrompts.write(tower.module, [pinned])
    for skip, was, is_now in zip(skips, stock, changed, strict=True):
        found = skipping(prompts, skip)
        assert not torch.equal(is_now[0], was[0])
        for row in (0, 2):
            torch.testing.assert_close(found[row], was[row], rtol=0, atol=1e-6)
        assert torch.equal(found[1], is_now[1])
    PinnedPrompts.write(tower.module, [])
    assert all(torch.equal(skipping(prompts, skip), was) for skip, was in zip(skips, changed, strict=True))
    assert "erasure_pinned" not in str([getattr(b, "_diffusers_hook", "") for b in tower.blocks])


def test_one_hook_gone_is_noticed(tower: TextTower) -> None:
    pins = [pin_of(tower, [""])]
    PinnedPrompts.write(tower.module, pins)
    assert PinnedPrompts.is_written(tower.module, pins)
    tower.blocks[0]._diffusers_hook.remove_hook("erasure_pinned_write")
    assert not PinnedPrompts.is_written(tower.module, pins)


def test_beside_another_hook(tower: TextTower) -> None:
    """A hook that is put on top and ours that is taken from under it: both go their own way."""

    class Double(ModelHook):
        def post_forward(self, module: Any, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    before = encode(tower, "")
    PinnedPrompts.write(tower.module, [pin(tower, "", 0.5)])
    HookRegistry.check_if_exists_or_initialize(tower.root.final_layer_norm).register_hook(Double(), "double")
    assert (encode(tower, "") == 1.0).all()
    PinnedPrompts.write(tower.module, [])
    assert torch.equal(encode(tower, ""), before * 2)
