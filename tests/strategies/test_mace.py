"""MACE against the plain arithmetic of its paper, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

import erasure
from erasure import Concept
from erasure.backbones import backbone_for
from erasure.errors import ConceptError, OptionError, UnsupportedModelError
from erasure.strategies import get
from erasure.training.images import LEVELS
from erasure.training.loop import Share
from erasure.training.run import Run
from erasure.training.trajectories import rolling_out

CAT, MONET = Concept("cat", anchor="dog"), Concept("monet", kind="style", anchor="painting")
QUICK: dict[str, Any] = {
    "steps": 3, "batch": 2, "rollouts": 1, "rollout_steps": 2, "templates": False, "retain_vocabulary": 8, "lr": 1e-2,
    "tolerance": 0.0,
}  # fmt: skip


def trained(pipe: Any, concepts: Any = (CAT,), **options: Any) -> tuple[Any, Any, Any]:
    """A strategy, a training of it whose LoRAs are not zero, and its first batch."""
    strategy: Any = get("mace").configured(**{**QUICK, **options})
    backbone = backbone_for(pipe)
    task = strategy.task(backbone, backbone.reader, list(concepts), 0, Accelerator(cpu=True))
    with torch.no_grad():
        for number, lora in enumerate(task.loras):
            for up in lora.up:
                up.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    with rolling_out(backbone):
        strategy.fill(task, "test", Accelerator(cpu=True))
        batch = strategy.prepare(task, 0, Share(0, 1))
    return strategy, task, batch


def layers_of(pipe: Any) -> dict[str, Any]:
    """Keys and values of the cross-attention, by path."""
    return {
        path: module for path, module in pipe.unet.named_modules() if path.endswith((".attn2.to_k", ".attn2.to_v"))
    }  # fmt: skip


def solved(inputs: Tensor, outputs: Tensor, kept: Tensor, erase: float, retain: float, scale: float) -> Tensor:
    """The change D of a weight with least `e sum |D f - o|^2 + r sum |D p|^2 + s |D|^2`, by rows stacked as lstsq."""
    eye = torch.eye(inputs.shape[1]).double()
    rows = torch.cat([erase**0.5 * inputs, retain**0.5 * kept, scale**0.5 * eye])
    wanted = torch.cat([erase**0.5 * outputs, outputs.new_zeros(len(kept) + len(eye), outputs.shape[1])])
    return torch.linalg.lstsq(rows, wanted).solution.T


def said(pipe: Any, prompt: str) -> Tensor:
    return pipe.encode_prompt(prompt, pipe.device, 1, False)[0][0].double()


@torch.no_grad()
def test_the_first_closed_form_is_that_of_the_words_beside_the_concept(tiny_pipe_original: Any) -> None:
    """Of the bare name "cat" they are the end token and the padding, which answer to those behind "dog"."""
    strategy, task, _ = trained(tiny_pipe_original)
    beside, replacing = (said(tiny_pipe_original, word)[2:] for word in ("cat", "dog"))
    scale = strategy.scale(torch.cat([beside, replacing, task.preserved]))
    for path, value in zip(task.refined.paths, task.refined.values, strict=True):
        weight = layers_of(tiny_pipe_original)[path.removesuffix(".weight")].weight.double()
        wanted = solved(beside, (replacing - beside) @ weight.T, task.preserved, 10.0, 1.0, scale)
        torch.testing.assert_close(value.double() - weight, wanted, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_loss_is_the_attention_that_a_concept_draws_in_its_place(tiny_pipe_original: Any) -> None:
    """`sum_l |A_l * M|_F^2`, of probabilities formed in the open, with W' and the LoRA in the weights."""
    pipe = tiny_pipe_original
    strategy, task, batch = trained(pipe)
    task.masks = (torch.rand(task.masks.shape, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    with task.loras[0].active():
        found = strategy.attention(task, 0, batch)["erase"]
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.to_q.register_forward_hook(lambda _m, _a, out, name=name: inputs.__setitem__(name, out))
        for name, module in pipe.unet.named_modules() if name.endswith("attn2")
    ]  # fmt: skip
    with task.refined.active(), task.loras[0].active():
        text = torch.stack([said(pipe, prompt).float() for prompt in batch.prompts])
        pipe.unet(batch.x, batch.t, encoder_hidden_states=text)
        keys = {name: pipe.unet.get_submodule(name).to_k(text) for name in inputs}
    for hook in hooks:
        hook.remove()
    total = torch.zeros(len(batch.x))
    masks = task.masks[batch.extra["pictures"]]
    for name, query in inputs.items():
        heads = pipe.unet.get_submodule(name).heads
        q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, keys[name]))
        drawn = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, :, 1]
        side = round(drawn.shape[1] ** 0.5)
        total += (drawn.view(-1, side, side) * F.adaptive_avg_pool2d(masks, side)[:, 0]).square().sum((1, 2))
    assert float(found) == pytest.approx(float(total.mean()), rel=1e-4)


@torch.no_grad()
def test_loras_become_one_change_that_does_what_each_does_at_its_own_features(tiny_pipe_original: Any) -> None:
    strategy, task, _ = trained(tiny_pipe_original, [CAT, MONET])
    made = strategy.edits(task)
    inputs = [said(tiny_pipe_original, word)[1:] for word in ("cat", "monet")]
    scale = strategy.scale(torch.cat([*inputs, task.preserved]))
    for number, (path, layer) in enumerate(layers_of(tiny_pipe_original).items()):
        if number > 1:
            break
        refining = dict(zip(task.refined.paths, task.refined.values, strict=True))[f"{path}.weight"] - layer.weight
        outputs = []
        for own, lora in zip(inputs, task.loras, strict=True):
            at = lora.paths.index(path)
            outputs.append(own @ (refining.double() + (lora.up[at] @ lora.down[at]).double()).T)
        wanted = solved(torch.cat(inputs), torch.cat(outputs), task.preserved, 10.0, 1.0, scale)
        pair = made.low_rank[f"unet/{path}"]
        torch.testing.assert_close(pair.up.double() @ pair.down.double(), wanted, rtol=1e-2, atol=1e-4)


@torch.no_grad()
def test_concepts_have_loras_states_and_masks_of_their_own(tiny_pipe_original: Any) -> None:
    strategy, task, batch = trained(tiny_pipe_original, [CAT, MONET])
    assert batch.prompts == ["cat"] * 2 + ["monet"] * 2
    assert [turn.name for turn in strategy.turns(task, ())] == ["concept_0", "concept_1"]
    assert task.masks.shape == (2, 1, *batch.x.shape[2:])
    assert bool(task.masks[1].all()), "a style is the whole image"
    assert 0 < float(task.masks[0].mean()) < 1
    other = [parameter.clone() for parameter in task.loras[1].parameters()]
    with torch.enable_grad(), task.loras[0].active():
        loss = strategy.attention(task, 0, batch)["erase_0"]
        grads = torch.autograd.grad(loss, list(task.loras[1].parameters()), allow_unused=True)
    assert all(grad is None for grad in grads)
    assert all(torch.equal(a, b) for a, b in zip(other, task.loras[1].parameters(), strict=True))


def test_levels_are_those_where_it_is_decided_what_is_drawn(tiny_pipe_original: Any) -> None:
    strategy, task, _ = trained(tiny_pipe_original, batch=400)
    t = task.concept_states.levels.double()
    wanted = 1 / (1 + torch.exp(-0.05 * (t - 200))) - 1 / (1 + torch.exp(-0.05 * (t - 400)))
    torch.testing.assert_close(strategy.importance(t), wanted)
    numbers = strategy.drawn(task, task.concept_states, 0, 0)
    levels = t[numbers % LEVELS]
    assert float(((levels > 150) & (levels < 450)).double().mean()) > 0.9
    assert float(levels.mean()) == pytest.approx(float((wanted * t).sum() / wanted.sum()), abs=15)


def test_a_training_that_is_stopped_ends_with_the_same_bits(tiny_pipe_original: Any, tmp_path: Path) -> None:
    def make(run: Run | None, progress: Any = False) -> Any:
        concepts = [CAT, MONET]
        return erasure.erase(
            tiny_pipe_original, concepts, "mace", attach=False, progress=progress, run=run, **QUICK
        )  # fmt: skip

    def stop(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    whole, run = make(None), Run(checkpoints=tmp_path, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        make(run, stop)
    resumed = make(run)
    found, wanted = (made.edits.lora_state_dict() for made in (resumed, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert {"loss_erase_0", "loss_erase_1"} <= set(whole.config.cost)


def test_what_makes_no_sense_is_refused(tiny_pipe_original: Any, tiny_models: Any) -> None:
    for name, value in (("retain_batch", 2), ("states", "buffer"), ("group_lasso", 1.0), ("method", "x"), ("rank", 0)):
        with pytest.raises(OptionError, match=f"'{name}'"):
            get("mace").configured(**{name: value})
    with pytest.raises(OptionError, match="'focus'"):
        get("mace").configured(focus=(400.0, 200.0))
    assert get("mace").configured(retain_weight=0.0).ignores_retain() == "retain_weight"
    with pytest.raises(ConceptError, match="mace teaches"):
        erasure.erase(tiny_pipe_original, "house", "mace", attach=False, progress=False, **QUICK)
    with pytest.raises(UnsupportedModelError, match=r"mace needs cross-attention.*one joint attention"):
        erasure.erase(tiny_models["flux"](), CAT, "mace", attach=False, progress=False)
