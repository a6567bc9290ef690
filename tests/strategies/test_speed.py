from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from erasure import Concept, erase, load_pipeline
from erasure.backbones import backbone_for
from erasure.carriers.weights import delta_of
from erasure.errors import OptionError
from erasure.strategies.closed_form.null_space import centres, constrained, null_space
from erasure.strategies.speed import SPEED
from erasure.text.encodings import Reader

CAT = Concept("cat", anchor="dog", retain=("car", "fish", "hammer"), templates=("a {}", "a photo of a {}"))


@pytest.fixture(scope="module")
def canvas() -> Any:
    return load_pipeline("canvas-sd", device="cpu")


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projection(kept: Tensor, threshold: float = 1e-9) -> Tensor:
    return null_space(kept.T @ kept / len(kept), threshold)


def off(made: Tensor, wanted: Tensor) -> float:
    """Relative difference of two tensors."""
    return float((made.double() - wanted).norm() / wanted.norm())


# Arithmetic ----------------------------------------------------------------------------------------------------------


def test_the_null_space_is_where_preserved_features_have_nothing() -> None:
    kept = numbers(5, 12, seed=0)
    space = projection(kept)
    assert (space @ kept.T).abs().max() < 1e-12
    torch.testing.assert_close(space @ space, space)
    assert round(float(space.trace())) == 12 - 5


def test_the_threshold_is_the_mean_square_along_a_direction() -> None:
    kept = torch.diag(torch.tensor([2.0, 0.4, 0.2], dtype=torch.float64))
    assert [round(float(projection(kept, threshold).trace())) for threshold in (0.01, 0.02, 0.06, 2.0)] == [0, 1, 2, 3]


@pytest.mark.parametrize("leniency", [0.0, 0.5])
def test_the_solution_is_the_papers(leniency: float) -> None:
    """`W (C_* - C_1) C_1^T P Q M` with features in columns, as the paper and its code write it."""
    weight, erased, replacing, invariant = (numbers(*size, seed=seed) for seed, size in
                                            enumerate([(4, 10), (10, 3), (10, 3), (10, 2)]))  # fmt: skip
    space, s = projection(numbers(4, 10, seed=9)), 0.7
    identity = torch.eye(10, dtype=torch.float64)
    m = torch.linalg.inv(erased @ erased.T @ space + s * identity)
    inner = invariant.T @ space @ m @ invariant + leniency * torch.eye(2, dtype=torch.float64)
    q = identity - m @ invariant @ torch.linalg.inv(inner) @ invariant.T @ space
    wanted = weight @ (replacing - erased) @ erased.T @ space @ q @ m
    right = constrained(erased.T, space, invariant.T, s, leniency)
    torch.testing.assert_close(weight @ (replacing - erased) @ right, wanted)


def test_the_solution_minimises_the_objective_under_its_constraints() -> None:
    """Against gradients: every allowed step from it costs more, and its invariants stay."""
    weight, erased, replacing, invariant = (
        numbers(4, 10, seed=0),
        numbers(3, 10, seed=1),
        numbers(3, 10, seed=2),
        numbers(2, 10, seed=3),
    )
    space, s = projection(numbers(4, 10, seed=9)), 0.7
    change = weight @ (replacing - erased).T @ constrained(erased, space, invariant, s, 0.0)
    torch.testing.assert_close(change @ space, change)
    assert (change @ invariant.T).abs().max() < 1e-10
    step = change.clone().requires_grad_()
    cost = ((erased @ (weight + step).T - replacing @ weight.T) ** 2).sum() + s * (step**2).sum()
    (gradient,) = torch.autograd.grad(cost, step)
    # Steps that keep all: within the null space, and orthogonal to what it holds of the invariants.
    inside = invariant @ space
    allowed = space - inside.T @ torch.linalg.pinv(inside @ inside.T) @ inside
    assert (gradient @ allowed).abs().max() < 1e-10


def test_invariants_that_depend_on_one_another_or_are_preserved_already_are_kept_too() -> None:
    """The matrix that the paper inverts is singular then."""
    kept, erased, first = numbers(4, 10, seed=0), numbers(3, 10, seed=1), numbers(1, 10, seed=2)
    right = constrained(erased, projection(kept), torch.cat([first, 2 * first, kept[:1]]), 0.7, 0.0)
    torch.testing.assert_close(right, constrained(erased, projection(kept), first, 0.7, 0.0), rtol=1e-8, atol=1e-10)


def test_centres_are_those_of_k_means() -> None:
    """From the same beginnings scipy finds the same."""
    points = torch.cat([numbers(9, 3, seed=seed) * 0.3 + 4 * numbers(1, 3, seed=50 + seed) for seed in range(3)])
    found = centres(points, 3)
    wanted, _ = kmeans2(points.numpy(), found.numpy(), minit="matrix")
    torch.testing.assert_close(found, torch.from_numpy(wanted))
    torch.testing.assert_close(centres(points[:2], 3), points[:2])
    torch.testing.assert_close(centres(points[:1].expand(5, 3), 3).unique(dim=0), points[:1])


@pytest.mark.parametrize(("influence", "directions"), [(True, 1), (False, 1), (True, 2)])
def test_preserved_features_are_filtered_and_augmented_as_the_paper_says(influence: bool, directions: int) -> None:
    """Against copies that are made one by one."""
    weight, free, kept = numbers(6, 8, seed=0), numbers(8, 8, seed=1), numbers(20, 8, seed=2)
    method = SPEED(influence=influence, augmentations=4, augmented_directions=directions)
    found = method.refined(weight, free, kept, 0.5, torch.Generator().manual_seed(7))
    shift = weight @ free
    if influence:
        moved = torch.stack([(shift @ c).norm() for c in kept])
        kept = kept[moved > moved.mean()]
        assert 0 < len(kept) < 20
    least = torch.linalg.svd(weight).Vh[6 - directions : 6]
    noise = torch.randn(len(kept), 4, directions, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    copies = torch.stack([c + 0.5 * (s @ least) for c, row in zip(kept, noise, strict=True) for s in row])
    moved = torch.stack([(shift @ c).norm() for c in copies])
    refined = torch.cat([kept, copies[moved > moved.mean()]])
    torch.testing.assert_close(found, refined.T @ refined / len(refined))


# The whole method ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def states(pipe: Any, text: str) -> tuple[Tensor, int]:
    """Encoding of a prompt `(tokens, dim)` float64, and the place of its last token ahead of the end token."""
    mask = pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").attention_mask
    return pipe.encode_prompt(text, pipe.device, 1, False)[0][0].double(), int(mask.sum()) - 2


def released(
    pipe: Any, targets: Sequence[str], anchors: Sequence[str], retain: Sequence[str], invariant: Tensor,
    threshold: float, s: float, leniency: float, *, averaged: bool, every_token: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """The released code without filter and noise, layer by layer; the changes by key."""
    sums = []
    for target, anchor in zip(targets, anchors, strict=True):
        (c, last), (a, anchor_last) = states(pipe, target), states(pipe, anchor)
        c, a = (c[1:], a[1:]) if every_token else (c[[last]], a[[anchor_last]])
        sums.append((c.T @ c, a.T @ c))
    own, mixed = (torch.stack(parts).sum(0) / (len(sums) if averaged else 1) for parts in zip(*sums, strict=True))
    kept = (
        torch.stack([states(pipe, text)[0][states(pipe, text)[1]] for text in retain])
        if retain
        else states(pipe, "")[0][1:]
    )
    u, values, _ = torch.linalg.svd(kept.T @ kept / len(kept))
    space = u[:, values < threshold] @ u[:, values < threshold].T
    identity, k2 = torch.eye(len(space), dtype=torch.float64), invariant.T
    m = torch.linalg.inv(own @ space + s * identity)
    inner = k2.T @ space @ m @ k2 + leniency * torch.eye(len(invariant), dtype=torch.float64)
    q = identity - m @ k2 @ torch.linalg.inv(inner) @ k2.T @ space
    return {
        f"unet/{name}": module.weight.detach().double() @ (mixed - own) @ space @ q @ m
        for name, module in pipe.unet.named_modules()
        if "attn2" in name and name.endswith("to_v")
    }


@pytest.mark.parametrize(
    ("preset", "concepts", "targets", "anchors", "retain", "numbers_of_code"),
    [
        ("released", Concept("cat", anchor="", retain=("car", "gun")), ["cat"], [""], ["car", "gun"], (0.1, 1.0, 0.0)),
        ("released", Concept("ink", kind="style", retain="noto"), ["ink"], ["art"], ["noto"], (0.1, 1.0, 0.0)),
        (
            "released-many", [Concept("cat", anchor="dog", retain="car"), Concept("gun", anchor="dog", retain="car")],
            ["cat", "gun"], ["dog", "dog"], ["car"], (1e-4, 0.05, 0.0),
        ),
        (
            "paper-many", [Concept("cat", anchor="dog", retain="car"), Concept("gun", anchor="dog", retain="car")],
            ["cat", "gun"], ["dog", "dog"], ["car"], (1e-4, 0.05, 0.0),
        ),
        ("released-nudity", Concept("gun", kind="unsafe"), ["gun"], [""], [], (0.1, 0.7, 0.5)),
    ],
    ids=["instance", "style", "many", "added-up", "nudity"],
)  # fmt: skip
def test_presets_do_what_the_released_code_does(
    canvas: Any, preset: str, concepts: Any, targets: Any, anchors: Any, retain: Any, numbers_of_code: Any
) -> None:
    empty = states(canvas, "")[0]
    invariant = torch.cat([empty[:1], centres(empty[1:], 3)])
    wanted = released(
        canvas, targets, anchors, retain, invariant, *numbers_of_code,
        averaged=preset.startswith("released"), every_token=preset.endswith("nudity"),
    )  # fmt: skip
    made = erase(
        canvas, concepts, "speed", preset=preset, influence=False, augmentations=0, attach=False, progress=False
    )
    assert set(made.low_rank) == set(wanted)
    assert max(off(delta_of(made.low_rank[key]), wanted[key]) for key in wanted) < 1e-4


def test_what_is_preserved_stays_and_the_concept_becomes_its_anchor(canvas: Any) -> None:
    """Preserved features and invariants to a millionth; with next to no s, the concept's become the anchor's."""
    method = SPEED(tokens="last", vocabulary=0, threshold=1e-9, influence=False, augmentations=0, tolerance=0.0,
                   layers="both")  # fmt: skip
    backbone, reader = backbone_for(canvas), Reader(backbone_for(canvas), 1)
    erased, replacing = method.erased_features(reader, "tokens", [CAT])
    kept, empty = method.preserved_features(reader, "tokens", [CAT], 0), states(canvas, "")[0]
    invariant = torch.cat([empty[:1], centres(empty[1:], 3)])
    made = method.fit(backbone, [CAT], seed=0, progress=lambda share: None).edits
    whole = constrained(erased, projection(kept, 1e-9), invariant, 1e-9, 0.0)
    for layer in backbone.entry_layers():
        weight, still = layer.module.weight.detach().double(), torch.cat([kept, invariant])
        change = delta_of(made.low_rank[layer.key]).double()
        assert (still @ change.T).norm() < 1e-6 * (still @ weight.T).norm()
        change = weight @ (replacing - erased).T @ whole
        assert (still @ change.T).norm() < 1e-6 * (still @ weight.T).norm()
        assert off(erased @ (weight + change).T, replacing @ weight.T) < 1e-4


def test_its_rank_is_at_most_the_number_of_erased_features(canvas: Any) -> None:
    concepts = [CAT, Concept("gun", anchor="car", templates=("a {}",))]
    fit = SPEED(tokens="last", vocabulary=0, tolerance=0.0).fit(backbone_for(canvas), concepts, seed=0, progress=print)
    assert fit.log == {"rank": 3.0, "erased_features": 3.0}
    assert {len(pair.down) for pair in fit.edits.low_rank.values()} == {3}


def test_values_or_keys_are_changed_as_asked(tiny_models: Any) -> None:
    """A transformer's layer ahead of all attention has no such half."""

    def edited(family: str, layers: Any) -> set[str]:
        backbone = backbone_for(tiny_models[family]())
        method = SPEED(layers=layers, vocabulary=0, threshold=10.0)
        made = method.fit(backbone, [CAT], seed=0, progress=lambda share: None).edits
        return {key.split(".")[-1] for key in made.low_rank if "add_embedding" not in key}

    assert edited("stable-diffusion", "values") == {"to_v"}
    assert edited("stable-diffusion", "keys") == {"to_k"}
    assert edited("stable-diffusion", "both") == {"to_k", "to_v"}
    assert edited("flux", "values") == edited("flux", "keys") != set()


@pytest.mark.parametrize("family", ["stable-diffusion-xl", "stable-diffusion-3", "flux"])
def test_every_door_of_a_family_is_changed_in_the_null_space_of_its_own_features(
    tiny_models: Any, family: str
) -> None:
    backbone = backbone_for(tiny_models[family]())
    method = SPEED(vocabulary=0, tolerance=0.0, influence=False, augmentations=0, threshold=1e-3, layers="both")
    made = method.fit(backbone, [CAT], seed=0, progress=lambda share: None).edits.low_rank
    assert set(made) == {layer.key for layer in backbone.entry_layers()}
    reader = Reader(backbone, 1)
    for layer in backbone.entry_layers():
        kept = method.preserved_features(reader, layer.source, [CAT], 0)
        erased, replacing = method.erased_features(reader, layer.source, [CAT])
        weight = layer.module.weight.detach()[:, layer.columns].double()
        change = delta_of(made[layer.key]).double()
        assert (change[:, layer.columns].norm() / change.norm()) > 1 - 1e-6, "other columns stay"
        change = change[:, layer.columns]
        unit = float(torch.cat([erased, replacing, kept]).square().mean())
        # What is left of preserved features in the null space is at most the threshold along each direction.
        u, values, _ = torch.linalg.svd(kept.T @ kept / len(kept))
        taken = u[:, values >= 1e-3 * unit]
        assert (change @ taken).norm() < 1e-5 * change.norm()
        nearer = (erased @ (weight + change).T - replacing @ weight.T).norm()
        assert nearer < (erased @ weight.T - replacing @ weight.T).norm()


def test_without_retain_lists_or_vocabulary_the_empty_prompt_is_preserved(canvas: Any) -> None:
    concept = Concept("cat", anchor="dog")
    made = erase(canvas, concept, "speed", preset="released", threshold=1e-4, attach=False, progress=False)
    rest = states(canvas, "")[0][1:]
    for key, pair in made.low_rank.items():
        weight = canvas.unet.get_submodule(key.removeprefix("unet/")).weight.double()
        assert (rest @ delta_of(pair).double().T).norm() < 2e-2 * (rest @ weight.T).norm()


def test_no_direction_that_is_left_free_is_refused(canvas: Any) -> None:
    with pytest.raises(OptionError, match=r"'threshold' is 1e-12; allowed: a larger one: preserved features leave no"):
        erase(canvas, CAT, "speed", threshold=1e-12, vocabulary=12, attach=False, progress=False)


def test_the_same_seed_draws_the_same_noise(canvas: Any) -> None:
    def made(seed: int) -> Tensor:
        method = SPEED(tokens="last", vocabulary=0, tolerance=0.0)
        pairs = method.fit(backbone_for(canvas), [CAT], seed=seed, progress=lambda share: None).edits.low_rank
        return torch.cat([pair.down.flatten() for pair in pairs.values()])

    one = made(3)
    assert torch.equal(one, made(3))
    assert not torch.equal(one, made(4))
