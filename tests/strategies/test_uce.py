from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.optimize import lsq_linear

from erasure import Concept, erase, load_pipeline
from erasure.backbones import backbone_for
from erasure.carriers.edits import LowRank
from erasure.carriers.weights import delta_of
from erasure.errors import DivergenceError
from erasure.strategies.closed_form import compress, factors, shortened_map, solve
from erasure.strategies.closed_form.least_squares import solved
from erasure.strategies.closed_form.shortened import _rounded
from erasure.strategies.uce import UCE
from erasure.text.encodings import Reader
from erasure.text.words import aligned_prompts


def features(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_solve_is_the_least_squares_solution() -> None:
    """Against scipy on the stacked rows of the objective, one row of W' at a time."""
    erased, replacing, preserved = features(3, 6, 0), features(3, 6, 1), features(4, 6, 2)
    weight = features(5, 6, 3)
    erase_scale, preserve_scale, regularisation = 2.0, 0.5, 0.3
    solved = weight + weight @ solve(erased, replacing, preserved, erase_scale, preserve_scale, regularisation)
    inputs = torch.cat(
        [erase_scale**0.5 * erased, preserve_scale**0.5 * preserved, regularisation**0.5 * torch.eye(6).double()]
    )
    outputs = torch.cat(
        [
            erase_scale**0.5 * replacing @ weight.T,
            preserve_scale**0.5 * preserved @ weight.T,
            regularisation**0.5 * weight.T,
        ]
    )
    for row in range(5):
        wanted = lsq_linear(inputs.numpy(), outputs[:, row].numpy(), tol=1e-14).x
        torch.testing.assert_close(solved[row], torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)


def test_rank_is_at_most_the_number_of_erased_features() -> None:
    update = solve(features(3, 16, 0), features(3, 16, 1), features(9, 16, 2), 1.0, 1.0, 0.5)
    assert torch.linalg.matrix_rank(update) == 3
    left, right = factors(update)
    assert left.shape == (16, 3)
    assert right.shape == (3, 16)
    torch.testing.assert_close(left @ right, update, rtol=1e-9, atol=1e-12)


def test_a_vanishing_lambda_maps_erased_onto_anchor_and_keeps_the_rest() -> None:
    erased, replacing, preserved = features(2, 12, 0), features(2, 12, 1), features(5, 12, 2)
    update = solve(erased, replacing, preserved, 1.0, 1.0, 1e-10)
    torch.testing.assert_close(erased + erased @ update.T, replacing, rtol=0, atol=1e-7)
    torch.testing.assert_close(preserved @ update.T, torch.zeros(5, 12).double(), rtol=0, atol=1e-7)


def test_factors_refuse_nan() -> None:
    with pytest.raises(DivergenceError):
        factors(torch.full((3, 3), torch.nan))


def test_nothing_to_change_gives_rank_one_of_zeros() -> None:
    left, right = factors(torch.zeros(4, 4, dtype=torch.float64))
    assert left.shape == (4, 1)
    assert not left.any()
    assert right.shape == (1, 4)


def test_compress_keeps_the_product() -> None:
    edit = compress(LowRank(features(7, 9, 0), features(3, 7, 1)))
    assert edit.down.shape == (3, 9)
    assert edit.down.dtype == torch.float32
    torch.testing.assert_close(delta_of(edit), (features(3, 7, 1) @ features(7, 9, 0)).float())


def test_edits_keys_and_values_of_cross_attention_only(tiny_pipe_original: Any) -> None:
    made = erase(tiny_pipe_original, "cat", "uce", vocabulary=0, saved_as="lora", attach=False, progress=False)
    unet = tiny_pipe_original.unet
    expected = {f"unet/{name}" for name, _ in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert set(made.low_rank) == expected
    assert made.deltas == {}
    for key, edit in made.low_rank.items():
        layer = unet.get_submodule(key.removeprefix("unet/"))
        assert delta_of(edit).shape == layer.weight.shape


def test_biases_stay(tiny_pipe: Any) -> None:
    layers = [module.attn2 for module in tiny_pipe.unet.modules() if hasattr(module, "attn2")]
    for attention in layers:
        for part in (attention.to_k, attention.to_v):
            part.bias = torch.nn.Parameter(torch.full((part.out_features,), 0.25))
    plain = erase(tiny_pipe, "cat", "uce", vocabulary=0, attach=False, progress=False)
    assert all(path.endswith(".weight") for path in plain.edits.parameters)
    erase(tiny_pipe, "cat", "uce", vocabulary=0, progress=False)
    assert all((part.bias == 0.25).all() for attention in layers for part in (attention.to_k, attention.to_v))


def test_the_edited_layer_sees_the_anchor(tiny_pipe: Any) -> None:
    """With a small lambda and nothing preserved, keys of the concept's last token become those of the anchor's."""
    concept = Concept("cat", anchor="dog", templates=("a photo of a {}",))
    backbone = backbone_for(tiny_pipe)
    pair = aligned_prompts(backbone.towers[0], concept)[0]
    with torch.no_grad():
        states = backbone.encode([pair.prompt, pair.anchor_prompt]).tokens
        layer = backbone.entry_layers()[0].module
        anchor_key = layer(states[1, pair.positions[pair.start]])
        before = layer(states[0, pair.start])
        erase(
            tiny_pipe, concept, "uce", preset="released", templates=True, regularisation=1e-6, preserve_scale=0.0,
            progress=False,
        )  # fmt: skip
        after = layer(states[0, pair.start])
    assert (after - anchor_key).norm() < 1e-2 * (before - anchor_key).norm()


def test_a_preserved_concept_changes_less(tiny_pipe_original: Any) -> None:
    def moved(retain: tuple[str, ...]) -> float:
        concept = Concept("cat", anchor="car", retain=retain)
        made = erase(
            tiny_pipe_original, concept, "uce", vocabulary=0, saved_as="lora", attach=False, progress=False
        )  # fmt: skip
        backbone = backbone_for(tiny_pipe_original)
        with torch.no_grad():
            states = backbone.encode(["a photo of a dog"]).tokens[0]
        return float((states @ delta_of(next(iter(made.low_rank.values()))).T).norm())

    assert moved(("dog",)) < 0.6 * moved(())


def test_several_concepts_share_one_solve(tiny_pipe_original: Any) -> None:
    backbone = backbone_for(tiny_pipe_original)
    concepts = [Concept("cat", templates=("a {}",)), Concept("dog", templates=("a {}",))]
    strategy = UCE(tokens="last", vocabulary=0)
    erased, replacing = strategy.erased_features(Reader(backbone, 1), "tokens", concepts)
    assert erased.shape == replacing.shape == (2, 32)
    fit = strategy.fit(backbone, concepts, seed=0, progress=lambda share: None)
    assert fit.log["erased_features"] == 2
    assert fit.log["rank"] <= 2
    assert all(edit.down.shape[0] <= 2 for edit in fit.edits.maps.values())


def test_fused_projections_are_refused(tiny_pipe: Any) -> None:
    tiny_pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        erase(tiny_pipe, "cat", "uce", vocabulary=0, progress=False)


# Size ----------------------------------------------------------------------------------------------------------------


def error(wanted: torch.Tensor, found: torch.Tensor, features: torch.Tensor) -> float:
    """Relative difference of two changes of a layer over features."""
    return float(((found.double() - wanted) @ features.T).norm() / (wanted @ features.T).norm())


@pytest.mark.parametrize("saved_as", ["map", "lora"])
def test_a_shortened_edit_stays_within_its_tolerance_in_every_layer(saved_as: Any) -> None:
    pipe = load_pipeline("canvas-sd", device="cpu")
    backbone, concept = backbone_for(pipe), Concept("cat", anchor="dog", retain="car")
    whole, short = UCE(tolerance=0.0, vocabulary=60), UCE(saved_as=saved_as, vocabulary=60)
    reader = Reader(backbone, 1)
    erased, replacing = whole.erased_features(reader, "tokens", [concept])
    preserved = whole.preserved_features(reader, "tokens", [concept], 0)
    unit = torch.cat([erased, replacing, preserved]).square().mean()
    weight = whole.regularisation * float(unit)
    update = solve(erased, replacing, preserved, whole.erase_scale, whole.preserve_scale, weight)
    fit = short.fit(backbone, [concept], seed=0, progress=lambda share: None)
    features = torch.cat([erased, replacing, preserved])
    edits = fit.edits.maps or fit.edits.low_rank
    ranks, rank = {len(edit.down) for edit in edits.values()}, int(torch.linalg.matrix_rank(update))
    assert max(ranks) < 0.5 * rank
    for layer in backbone.entry_layers():
        weight = layer.module.weight.detach().double()
        assert edits[layer.key].down.dtype == torch.float16
        found = delta_of(edits[layer.key], weight)
        assert error(weight @ update, found, features) <= 1.001e-3
        # What is erased is what the edit is for.
        assert error(weight @ update, found, erased) <= 1e-3


def test_a_file_of_stable_diffusions_size_is_below_a_megabyte() -> None:
    """One matrix for 32 layers: 367 features of CLIP's width that are no combinations of a few."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.linspace(0, -9, 367, dtype=torch.float64).exp()[:, None]
    erased = torch.randn(367, 768, generator=generator, dtype=torch.float64) * smooth
    replacing = erased.flip(1)
    preserved = torch.randn(1000, 768, generator=generator, dtype=torch.float64)
    left, right = factors(solve(erased, replacing, preserved, 10.0, 1.0, 0.5))
    weights = [torch.randn(size, 768, generator=generator, dtype=torch.float64) for size in (320, 640)]
    features = torch.cat([erased, replacing, preserved])
    up, down = shortened_map(left, right, weights, features, 1e-3)
    assert up.dtype == down.dtype == torch.float16
    assert up.nbytes + down.nbytes < 1e6
    for weight in weights:
        whole = weight @ left @ right
        assert error(whole, weight @ up.double() @ down.double(), features) <= 1.001e-3


def test_a_lora_is_written_while_it_is_small(monkeypatch: pytest.MonkeyPatch, tiny_pipe_original: Any) -> None:
    """Other programs read that; one map for all layers is what stays small at Stable Diffusion's size."""
    made = erase(tiny_pipe_original, "cat", "uce", vocabulary=0, attach=False, progress=False)
    assert made.edits.low_rank
    assert not made.edits.maps
    size = sum(edit.down.nbytes + edit.up.nbytes for edit in made.edits.low_rank.values())
    monkeypatch.setattr("erasure.strategies.uce.LARGEST_LORA", size // 2 - 1)
    two = erase(tiny_pipe_original, ["cat", "dog"], "uce", vocabulary=0, attach=False, progress=False)
    assert two.edits.maps
    assert not two.edits.low_rank


def test_rounding_an_edit_spares_what_is_preserved() -> None:
    """Rounded value by value to float16, the same factors miss more."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    erased = torch.randn(20, 40, generator=generator, dtype=torch.float64) @ basis
    preserved = torch.randn(400, 40, generator=generator, dtype=torch.float64) @ basis
    left, right = factors(solve(erased, erased.flip(0), preserved, 1.0, 1.0, 0.01))
    features = torch.cat([erased, preserved])
    whole = left @ right
    up, down = _rounded(left, right, features.T @ features, torch.float16)
    assert up.dtype == down.dtype == torch.float16
    naive = left.half().double() @ right.half().double()
    assert error(whole, up.double() @ down.double(), features) < 0.8 * error(whole, naive, features)


# Pooled vectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "saved_as"),
    [("stable-diffusion-xl", "map"), ("stable-diffusion-xl", "lora"), ("stable-diffusion-3", "lora"), ("flux", "map")],
)
def test_pooled_vectors_are_erased_where_they_enter_and_nothing_else_is(
    tiny_models: Any, family: str, saved_as: Any
) -> None:
    """Against the closed form in plain arithmetic. SDXL's layer reads codes of sizes behind the pooled vector."""
    pipe = tiny_models[family]()
    backbone, concept = backbone_for(pipe), Concept("cat", anchor="dog")
    (entry,) = (layer for layer in backbone.entry_layers() if layer.source == "pooled")
    made = erase(
        pipe, concept, "uce", vocabulary=0, tolerance=0.0, saved_as=saved_as, attach=False, progress=False
    )  # fmt: skip
    with torch.no_grad():
        texts = [template.format(words) for words in ("cat", "dog") for template in concept.phrasings()]
        pooled = torch.stack([backbone.encode([text]).pooled[0].double() for text in [*texts, ""]])  # type: ignore[index]
    half = len(texts) // 2
    erased, anchors, empty = pooled[:half], pooled[half:-1], pooled[-1]
    unit, width = pooled.square().mean() * torch.eye(len(empty), dtype=torch.float64), len(empty)
    gram = 10 * erased.T @ erased + torch.outer(empty, empty) + 0.5 * unit
    weight = entry.module.weight.double()
    wanted = torch.zeros_like(weight)
    wanted[:, :width] = weight[:, :width] @ (10 * (anchors - erased).T @ erased @ torch.linalg.inv(gram))
    if saved_as == "map":
        edit = made.edits.maps[entry.key]
        found = weight @ edit.up.double() @ edit.down.double()
    else:
        pair = made.low_rank[entry.key]
        found = pair.up.double() @ pair.down.double()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert (found[:, width:] == 0).all()
    # The tokens have a change of their own, in every layer that reads them; biases have none.
    assert set(made.edits.parameters) == {f"{layer.key}.weight" for layer in backbone.entry_layers()}


@pytest.mark.parametrize("factor", [0.1, 30.0])
def test_lambda_is_in_units_of_the_features(tiny_models: Any, factor: float) -> None:
    """T5s whose states are of other sizes, read by a layer that undoes it, have the same edit in effect."""
    concept = Concept("cat", anchor="dog")

    def moved(scale: float, **options: Any) -> torch.Tensor:
        pipe = tiny_models["flux"]()
        pipe.text_encoder_2.encoder.final_layer_norm.weight.mul_(scale)
        backbone = backbone_for(pipe)
        layer = backbone.entry_layers()[0]
        layer.module.weight.div_(scale)
        with torch.no_grad():
            states = backbone.encode(["a cat"]).tokens
            before = layer.module(states)
            erase(pipe, concept, "uce", vocabulary=0, tolerance=0.0, progress=False, **options)
            return layer.module(states) - before

    stock = moved(1.0)
    torch.testing.assert_close(moved(factor), stock, rtol=1e-3, atol=1e-4 * float(stock.abs().max()))
    apart = (moved(factor, relative=False) - moved(1.0, relative=False)).abs().max()
    assert apart > 1e-3 * stock.abs().max()


def test_every_token_of_t5_is_erased(tiny_models: Any) -> None:
    """Also those ahead of the concept, which see it, and the padding; a few places stand for long padding."""
    backbone = backbone_for(tiny_models["flux"]())
    concept = Concept("cat", anchor="dog", templates=("a photo of a {}",))
    tower = backbone.reader
    assert not tower.causal
    words = len(tower.prompt_ids("a photo of a cat"))
    erased, replacing = UCE().erased_features(Reader(backbone, 1), "tokens", [concept])
    assert len(erased) == words + 16 < tower.max_length
    with torch.no_grad():
        cat, dog = (backbone.encode([f"a photo of a {word}"]).tokens[0].double() for word in ("cat", "dog"))
    torch.testing.assert_close(erased[:words], cat[:words])
    torch.testing.assert_close(replacing[:words], dog[:words])
    assert ((erased - replacing).norm(dim=1) > 1e-4).all(), "every token differs from the anchor's"
    torch.testing.assert_close(erased[[words, -1]], cat[[words, -1]])


def test_a_system_without_a_single_solution_is_said() -> None:
    with pytest.raises(DivergenceError, match=r"its matrix is singular\. Raise regularisation"):
        solved(torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64))
