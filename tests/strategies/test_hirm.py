from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from erasure import Concept, ErasureManager, erase, load_pipeline
from erasure.backbones import TextTower, backbone_for
from erasure.errors import OptionError
from erasure.strategies.hirm import HiRM, random_direction

FIRST_BLOCK = {
    f"text_encoder/encoder.layers.0.{part}.{kind}"
    for part in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    )
    for kind in ("weight", "bias")
}


@pytest.fixture
def tower(tiny_pipe_original: Any) -> TextTower:
    return backbone_for(tiny_pipe_original).towers[0]


def plain_forward(encoder: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's text tower in plain arithmetic: the last attention's output projection and the final hidden states."""
    hidden = encoder.embeddings.token_embedding.weight[ids] + encoder.embeddings.position_embedding.weight
    count = ids.shape[1]
    future = torch.full((count, count), float("-inf")).triu(1)
    for block in encoder.encoder.layers:
        attention = block.self_attn
        normed = block.layer_norm1(hidden)
        heads = [
            layer(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        scores = heads[0] @ heads[1].transpose(2, 3) / heads[0].shape[-1] ** 0.5 + future
        mixed = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        projected = mixed @ attention.out_proj.weight.T + attention.out_proj.bias
        hidden = hidden + projected
        inner = block.mlp.fc1(block.layer_norm2(hidden))
        hidden = hidden + block.mlp.fc2(inner * torch.sigmoid(1.702 * inner))
    return projected, encoder.final_layer_norm(hidden)


def test_only_the_first_block_changes(tiny_pipe: Any, tensors_of: Any, changed_tensors: Any) -> None:
    base = tensors_of(tiny_pipe)
    made = erase(tiny_pipe, "cat", "hirm", steps=2, contexts=1, progress=False)
    assert set(made.deltas) == FIRST_BLOCK
    assert made.low_rank == {}
    changed = changed_tensors(base, tiny_pipe)
    assert changed <= FIRST_BLOCK
    # The bias of the keys shifts all scores of a query alike, so its gradient is rounding noise.
    assert changed >= FIRST_BLOCK - {"text_encoder/encoder.layers.0.self_attn.k_proj.bias"}


def test_the_released_loss_in_plain_arithmetic(tower: TextTower) -> None:
    """One step of the preset `released`: the mean of (h - c r / |r|)^2, r uniform, |.| over all tokens and width."""
    settings = {**HiRM.presets["released"], "steps": 1}
    _, loss = HiRM(**settings).fit_tower(tower, [Concept("cat")], 5, lambda share: None)
    ids = tower.tokenize(["cat"]).ids
    with torch.no_grad():
        tapped, _ = plain_forward(tower.module, ids)
    draw = torch.rand(77, 32, generator=torch.Generator().manual_seed(5))
    target = 5000.0 * draw / (draw * draw).sum().sqrt()
    wanted = ((tapped[0] - target) ** 2).sum() / (77 * 32)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)


def test_the_semantic_loss_with_retention_in_plain_arithmetic(tower: TextTower) -> None:
    """The first step's retention term is zero; without the start token; a one-token anchor needs no realignment."""
    concept = Concept("cat", anchor="dog", templates=("a photo of a {}",))
    strategy = HiRM(
        variant="semantic", steps=1, coefficient=2.0, skip_start=True, retain_weight=3.0, retain_vocabulary=2,
        contexts=0, tap="attention",
    )  # fmt: skip
    _, loss = strategy.fit_tower(tower, [concept], 0, lambda share: None)
    with torch.no_grad():
        tapped, _ = plain_forward(tower.module, tower.tokenize(["a photo of a cat", "a photo of a dog"]).ids)
    wanted = ((tapped[0, 1:] - 2.0 * tapped[1, 1:]) ** 2).mean()
    assert loss == pytest.approx(wanted.item(), rel=1e-4)


def test_plain_forward_is_the_towers(tower: TextTower) -> None:
    tokens = tower.tokenize(["a photo of a cat"])
    with torch.no_grad():
        torch.testing.assert_close(
            plain_forward(tower.module, tokens.ids)[1], tower.encode(tokens).states, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_random_directions_and_their_norms(distribution: Any) -> None:
    def make(norm: Any) -> torch.Tensor:
        return random_direction(77, 768, distribution, norm, torch.Generator().manual_seed(0))

    by_token, whole = make("token"), make("tensor")
    torch.testing.assert_close(by_token.norm(dim=1), torch.ones(77))
    assert whole.norm().item() == pytest.approx(1.0, rel=1e-5)
    # A coefficient c with norm="tensor" is about c / sqrt(T) per token, T the number of tokens.
    torch.testing.assert_close(whole.norm(dim=1) * 77**0.5, torch.ones(77), rtol=0.1, atol=0)
    torch.testing.assert_close(5000.0 * whole, 5000.0 / 77**0.5 * by_token, rtol=0.1, atol=1e-9 + 12)
    cosines = by_token @ by_token.T
    off_diagonal = cosines[~torch.eye(77, dtype=torch.bool)]
    if distribution == "uniform":
        assert off_diagonal.min() > 0.6, "uniform on [0, 1) shares one direction"
    else:
        assert off_diagonal.abs().max() < 0.25


def test_skip_start_keeps_the_start_token(tiny_pipe_original: Any, tower: TextTower) -> None:
    def moved(skip: bool) -> float:
        strategy = HiRM(
            variant="random",
            steps=6,
            contexts=0,
            lr=1e-3,
            coefficient=50.0,
            retain_weight=0.0,
            templates=False,
            skip_start=skip,
        )
        changed, _ = strategy.fit_tower(tower, [Concept("cat")], 0, lambda share: None)
        ids = tower.tokenize([""])
        with torch.no_grad():
            before = tower.encode(ids).states[0, 0]
            parameters = {**dict(tower.root.named_parameters())}
            parameters |= {path: parameters[path] + delta.float() for path, delta in changed.items()}
            after = torch.func.functional_call(tower.root, parameters, (ids.ids,)).last_hidden_state[0, 0]
        return float((after - before).norm())

    assert moved(True) < moved(False)


def test_the_start_token_does_not_depend_on_the_prompt(tower: TextTower) -> None:
    with torch.no_grad():
        states = tower.encode(tower.tokenize(["", "a cat", "a picture in ink style"])).states
    torch.testing.assert_close(states[0, 0], states[1, 0])
    torch.testing.assert_close(states[0, 0], states[2, 0])


def test_retention_keeps_other_prompts(tiny_pipe: Any, tower: TextTower) -> None:
    def moved(weight: float) -> float:
        strategy = HiRM(
            variant="random", contexts=0, steps=8, coefficient=5.0, retain_weight=weight, retain_vocabulary=8, lr=2e-3
        )
        concept = Concept("cat", retain=("dog",), templates=("a {}",))
        changed, _ = strategy.fit_tower(tower, [concept], 0, lambda share: None)
        tokens = tower.tokenize(["a dog"])
        parameters = dict(tower.root.named_parameters())
        parameters |= {path: parameters[path] + delta.float() for path, delta in changed.items()}
        with torch.no_grad():
            after = torch.func.functional_call(tower.root, parameters, (tokens.ids,)).last_hidden_state
            return float((after - tower.encode(tokens).states).norm())

    assert moved(20.0) < moved(0.0)


def test_training_lowers_the_loss(tower: TextTower) -> None:
    def loss(steps: int) -> float:
        strategy = HiRM(variant="random", contexts=0, steps=steps, retain_weight=0.0, templates=False)
        return strategy.fit_tower(tower, [Concept("cat")], 0, lambda share: None)[1]

    assert loss(12) < 0.9 * loss(1)


def test_an_unconditional_stock_encoding(tiny_pipe: Any) -> None:
    """`unconditional="stock"`: the empty prompt is encoded as before, every other one is not."""
    backbone = backbone_for(tiny_pipe)
    with torch.no_grad():
        before = backbone.encode(["", "a cat"]).tokens
        made = erase(tiny_pipe, "cat", "hirm", steps=2, contexts=1, unconditional="stock", progress=False)
        after = backbone.encode(["", "a cat"]).tokens
    assert made.config.carriers == ["weights", "activations"]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-6)
    assert (after[1] - before[1]).abs().max() > 1e-4


def test_progress_and_steps(tiny_pipe_original: Any) -> None:
    seen: list[float] = []
    erase(
        tiny_pipe_original, "cat", "hirm", steps=4, contexts=0, retain_vocabulary=0, attach=False, progress=seen.append
    )
    assert seen == [0.25, 0.5, 0.75, 1.0]
    with pytest.raises(OptionError, match="steps"):
        erase(tiny_pipe_original, "cat", "hirm", steps=0, attach=False, progress=False)


def test_the_attention_mask_of_the_pipeline_is_heeded(tiny_pipe: Any) -> None:
    """Encoders with `use_attention_mask` read no padding: loss, target and retention are those of masked prompts."""
    tiny_pipe.text_encoder.config.use_attention_mask = True
    tower = backbone_for(tiny_pipe).towers[0]
    tokens = tower.tokenize(["a photo of a cat", "a photo of a dog"])
    assert tokens.attention_mask is not None
    strategy = HiRM(
        variant="semantic", steps=1, templates=False, contexts=0, retain_weight=0.0, skip_start=False, tap="output"
    )
    changed, loss = strategy.fit_tower(tower, [Concept("cat", anchor="dog")], 0, lambda share: None)
    names = tower.tokenize(["cat", "dog"])
    with torch.no_grad():
        cat, dog = tiny_pipe.text_encoder(names.ids, attention_mask=names.attention_mask).last_hidden_state
        unmasked = tiny_pipe.text_encoder(names.ids).last_hidden_state
    assert loss == pytest.approx(((cat - dog) ** 2).mean().item(), rel=1e-4)
    assert loss != pytest.approx(((unmasked[0] - unmasked[1]) ** 2).mean().item(), rel=1e-2)
    assert any(delta.any() for delta in changed.values())


# The released recipes ------------------------------------------------------------------------------------------------


def uniform_target(prompts: int, width: int, length: float, *, per_token: bool) -> torch.Tensor:
    values = torch.rand(prompts, width, generator=torch.Generator().manual_seed(7))
    return length * values / ((values**2).sum(1, keepdim=True) if per_token else (values**2).sum()).sqrt()


GOLDEN = {
    "released": (50, 1e-4, 5000.0, "tensor"),
    "released-object": (15, 1e-4, 5000.0, "tensor"),
    "released-style": (20, 1e-4, 5000.0, "tensor"),
    "paper-r-object": (25, 5e-5, 500.0, "token"),
    "paper-r-style": (40, 5e-5, 500.0, "token"),
    "paper-r-nudity": (50, 1e-4, 500.0, "token"),
    "paper-s-object": (15, 5e-5, 1.0, "anchor"),
    "paper-s-style": (30, 5e-5, 1.0, "anchor"),
}
"""Steps, learning rate, coefficient and target of each recipe, as papers and released code have them."""


@pytest.fixture(scope="module")
def canvas() -> Any:
    return load_pipeline("canvas-sd", device="cpu")


@pytest.mark.parametrize("preset", GOLDEN)
def test_a_released_recipe_on_the_embedded_model(canvas: Any, preset: str) -> None:
    """The plain arithmetic of the released script with torch's own hooks and optimiser, on the same tensors."""
    steps, lr, coefficient, kind = GOLDEN[preset]
    concept = Concept("cat", anchor="golden ball", synonyms=("dog",))
    made = erase(canvas, concept, "hirm", preset=preset, seed=7, attach=False, progress=False)
    encoder = copy.deepcopy(canvas.text_encoder)
    ids = canvas.tokenizer(["cat, dog", "golden ball"], padding="max_length", return_tensors="pt").input_ids
    trained = {
        name: parameter
        for name, parameter in encoder.named_parameters()
        if name.startswith(("encoder.layers.0.self_attn.", "encoder.layers.0.mlp."))
    }
    stock = {name: parameter.detach().clone() for name, parameter in trained.items()}
    seen: list[torch.Tensor] = []
    encoder.encoder.layers[-1].self_attn.out_proj.register_forward_hook(lambda *parts: seen.append(parts[2]))
    with torch.no_grad():
        encoder(ids)
    target = seen.pop()[1:]
    if kind != "anchor":
        target = uniform_target(*target.shape[1:], coefficient, per_token=kind == "token")[None]
    optimiser = torch.optim.AdamW(trained.values(), lr, (0.9, 0.98), 1e-6, 1e-8)
    for _ in range(steps):
        encoder(ids[:1])
        loss = ((seen.pop() - target) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, parameter in trained.items():
        if name != "encoder.layers.0.self_attn.k_proj.bias":  # its gradient is rounding noise
            wanted, found = parameter.detach() - stock[name], made.edits.deltas[f"text_encoder/{name}"].float()
            assert (found - wanted).norm() < 0.01 * wanted.norm(), name
    assert made.config.cost["text_encoder_loss"] == pytest.approx(loss.item(), rel=1e-3)


# Other text encoders -------------------------------------------------------------------------------------------------


def test_the_loss_is_on_pooled_vectors_too_where_the_denoiser_reads_them(tiny_models: Any) -> None:
    """Of Flux' CLIP, of which nothing else is read: one step in plain arithmetic of torch's own modules."""
    tower = backbone_for(tiny_models["flux"]()).tower("text_encoder")
    concept = Concept("cat", anchor="dog", templates=("a photo of a {}",))
    strategy = HiRM(steps=1, contexts=0, retain_weight=0.0, skip_start=True)
    _, loss = strategy.fit_tower(tower, [concept], 0, lambda share: None)
    ids = tower.tokenize(["a photo of a cat", "a photo of a dog"]).ids
    with torch.no_grad():
        tapped, _ = plain_forward(tower.module, ids)
        cat, dog = tower.module(ids).pooler_output
    wanted = ((tapped[0, 1:] - tapped[1, 1:]) ** 2).mean() + ((cat - dog) ** 2).mean()
    assert loss == pytest.approx(wanted.item(), rel=1e-4)


def test_pooled_vectors_behind_a_projection_go_towards_those_of_the_anchor(tiny_models: Any) -> None:
    pipe = tiny_models["stable-diffusion-xl"]()
    tower = backbone_for(pipe).tower("text_encoder_2")
    tokens = tower.tokenize(["a photo of a cat", "a photo of a dog"])
    strategy = HiRM(steps=30, contexts=0, retain_weight=0.0)
    changed, _ = strategy.fit_tower(tower, [Concept("cat", anchor="dog")], 0, lambda share: None)
    with torch.no_grad():
        before = tower.encode(tokens).pooled
        for path, delta in changed.items():
            tower.root.get_parameter(path).add_(delta.float())
        after = tower.encode(tokens).pooled
    assert before is not None
    assert after is not None
    assert (after[0] - before[1]).norm() < 0.5 * (before[0] - before[1]).norm()


def test_t5_is_moved_at_every_token_and_by_low_rank_changes_if_asked(tiny_models: Any) -> None:
    pipe = tiny_models["flux"]()
    tower = backbone_for(pipe).reader
    assert not tower.causal
    concept = Concept("cat", anchor="dog", templates=("a photo of a {}",))
    whole = HiRM(steps=1, contexts=0, retain_weight=0.0)
    _, loss = whole.fit_tower(tower, [concept], 0, lambda share: None)
    with torch.no_grad():
        cat, dog = tower.encode(tower.tokenize(["a photo of a cat", "a photo of a dog"])).states
    assert loss == pytest.approx(((cat - dog) ** 2).mean().item(), rel=1e-4)
    made = erase(pipe, concept, "hirm", steps=20, rank=4, contexts=0, attach=False, progress=False)
    assert made.deltas == {}
    block = {key for key in made.low_rank if key.startswith(tower.component)}
    parts = ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o")
    paths = {f"layer.0.{part}" for part in parts}
    paths |= {f"layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")}
    assert block == {f"{tower.component}/encoder.block.0.{path}" for path in paths}
    assert all(len(edit.down) == 4 and bool(edit.up.any()) for edit in made.low_rank.values())
    ErasureManager(pipe).add(made)
    with torch.no_grad():
        moved = tower.encode(tower.tokenize(["a photo of a cat"])).states[0]
    assert (moved - dog).norm() < (cat - dog).norm()


def test_the_changes_of_a_large_first_block_are_of_low_rank(tiny_models: Any, monkeypatch: Any) -> None:
    """That of T5-XXL has 193 million parameters, which would be a file of 386 MB."""
    monkeypatch.setattr("erasure.strategies.first_block.LARGE", 1000)
    tower = backbone_for(tiny_models["flux"]()).reader
    changed, _ = HiRM(steps=1, contexts=0).fit_tower(tower, [Concept("cat")], 0, lambda share: None)
    assert {len(edit.down) for edit in changed.values()} == {16}
