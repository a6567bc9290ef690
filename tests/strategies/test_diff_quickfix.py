from __future__ import annotations

from typing import Any

import torch

from erasure import Concept, erase
from erasure.backbones import backbone_for
from erasure.carriers.weights import delta_of
from erasure.strategies.diff_quickfix import first_inputs
from erasure.text.words import aligned_prompts

LAYER = "text_encoder/encoder.layers.0.self_attn.out_proj"


def test_edits_one_layer_in_low_rank(tiny_pipe_original: Any) -> None:
    concept = Concept("cat", templates=("{}",))
    made = erase(tiny_pipe_original, concept, "diff_quickfix", preset="released", attach=False, progress=False)
    assert set(made.low_rank) == {LAYER}
    assert made.deltas == {}
    edit = made.low_rank[LAYER]
    assert edit.down.shape[0] == made.config.cost["rank"] <= 32
    assert made.config.protects == "hosted pipeline"


def test_the_layer_gives_for_the_concept_what_it_gives_for_the_anchor(tiny_pipe: Any) -> None:
    concept = Concept("cat", anchor="dog", templates=("a photo of a {}",))
    tower = backbone_for(tiny_pipe).towers[0]
    layer = tower.blocks[0].self_attn.out_proj
    pair = aligned_prompts(tower, concept)[0]
    own, anchor = first_inputs(tower, layer, [pair.prompt, pair.anchor_prompt])
    with torch.no_grad():
        wanted = layer(anchor[pair.positions[pair.start]].float())
        before = layer(own[pair.start].float())
        erase(tiny_pipe, concept, "diff_quickfix", vocabulary=0, regularisation=1e-7, progress=False)
        after = layer(own[pair.start].float())
    assert (after - wanted).norm() < 0.05 * (before - wanted).norm()


def test_first_inputs_are_what_the_layer_reads(tiny_pipe_original: Any) -> None:
    tower = backbone_for(tiny_pipe_original).towers[0]
    attention = tower.blocks[0].self_attn
    seen = first_inputs(tower, attention.out_proj, ["a cat", "a dog"])
    assert seen.shape == (2, 77, 32)
    assert seen.dtype == torch.float64
    with torch.no_grad():
        hidden = tower.root.embeddings(input_ids=tower.tokenize(["a cat", "a dog"]).ids)
        hidden = tower.blocks[0].layer_norm1(hidden)
        # The start token attends to itself only: its value, unmixed.
        torch.testing.assert_close(seen[:, 0].float(), attention.v_proj(hidden)[:, 0])


def test_a_preserved_vocabulary_moves_other_prompts_less(tiny_pipe_original: Any) -> None:
    def moved(**options: Any) -> float:
        concept = Concept("cat", anchor="car")
        made = erase(tiny_pipe_original, concept, "diff_quickfix", attach=False, progress=False, **options)
        tower = backbone_for(tiny_pipe_original).towers[0]
        inputs = first_inputs(tower, tower.blocks[0].self_attn.out_proj, ["a photo of a dog in ink style"])[0]
        return float((inputs.float() @ delta_of(made.low_rank[LAYER]).T).norm())

    assert moved(vocabulary=16) < 0.8 * moved(vocabulary=0)
