from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import Concept, erase, load_pipeline
from erasure.backbones import backbone_for
from erasure.carriers.weights import delta_of
from erasure.errors import DivergenceError
from erasure.strategies import get
from erasure.strategies.closed_form import solve
from erasure.strategies.rece import RECE, derived
from erasure.strategies.uce import UCE
from erasure.text.encodings import Reader

CAT = Concept("cat", anchor="dog", templates=("a {}", "a photo of a {}"))


@pytest.fixture(scope="module")
def canvas() -> Any:
    return load_pipeline("canvas-sd", device="cpu")


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off(made: Tensor, wanted: Tensor) -> float:
    """Relative difference of two tensors."""
    return float((made.double() - wanted).norm() / wanted.norm())


# The derived embedding -----------------------------------------------------------------------------------------------


def objective(
    embedding: Tensor, stock: Sequence[Tensor], edited: Sequence[Tensor], concept: Tensor, weight: float
) -> Tensor:
    """`sum_layers |W' c' - W c|^2 + lambda_d |c'|^2`, as the paper has it."""
    regenerated = sum(((new @ embedding - old @ concept) ** 2).sum() for old, new in zip(stock, edited, strict=True))
    return regenerated + weight * (embedding**2).sum()


@pytest.mark.parametrize("weight", [1e-3, 1e-1, 10.0])
def test_a_derived_embedding_is_the_minimiser_of_the_papers_objective(weight: float) -> None:
    """Its gradient is zero, and a step into any direction costs more."""
    stock = [numbers(5, 8, seed=0), numbers(6, 8, seed=1), numbers(3, 8, seed=2)]
    whole = torch.eye(8, dtype=torch.float64) + 0.5 * numbers(8, 8, seed=3)
    edited, concept = [old @ whole for old in stock], numbers(4, 8, seed=4)
    gram = sum((old.T @ old for old in stock), torch.zeros(8, 8, dtype=torch.float64))
    for own, found in zip(concept, derived(whole, gram, concept, weight), strict=True):
        embedding = found.clone().requires_grad_()
        cost = objective(embedding, stock, edited, own, weight)
        (gradient,) = torch.autograd.grad(cost, embedding)
        assert gradient.norm() < 1e-10 * (1 + found.norm())
        for seed in range(5):
            assert objective(found + 1e-2 * numbers(8, seed=seed), stock, edited, own, weight) > cost


def test_without_an_edit_the_concept_derives_itself() -> None:
    gram, concept = numbers(9, 6, seed=0), numbers(2, 6, seed=1)
    torch.testing.assert_close(derived(torch.eye(6).double(), gram.T @ gram, concept, 1e-12), concept)


def test_its_regulariser_makes_it_short() -> None:
    whole, gram = torch.eye(6).double() - 0.9 * torch.outer(*numbers(2, 6, seed=0)), numbers(9, 6, seed=1)
    lengths = [derived(whole, gram.T @ gram, numbers(3, 6, seed=2), weight).norm() for weight in (1e-3, 1e-1, 1e1)]
    assert lengths[0] > lengths[1] > lengths[2]


# The whole method ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def states(pipe: Any, text: str) -> tuple[Tensor, int]:
    """Encoding of a prompt `(tokens, dim)` float64, and the place of its last token ahead of the end token."""
    mask = pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").attention_mask
    return pipe.encode_prompt(text, pipe.device, 1, False)[0][0].double(), int(mask.sum()) - 2


def edited_layer(
    weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], kept: Sequence[Tensor],
    preserve_scale: float, regularisation: float,
) -> Tensor:  # fmt: skip
    """`(lambda W + sum W c_a c_e^T + s sum W c_p c_p^T) (lambda I + sum c_e c_e^T + s sum c_p c_p^T)^-1`."""
    left, right = regularisation * weight, regularisation * torch.eye(weight.shape[1], dtype=torch.float64)
    for own, anchor in pairs:
        left, right = left + (weight @ anchor.T) @ own, right + own.T @ own
    for own in kept:
        left, right = left + preserve_scale * (weight @ own.T) @ own, right + preserve_scale * own.T @ own
    return left @ torch.linalg.inv(right)


def reliable_and_efficient(
    pipe: Any, pairs: Sequence[tuple[str, str]], preserved: Sequence[str],
    first: tuple[float, float], derive: float, rounds: int,
) -> dict[str, Tensor]:  # fmt: skip
    """UCE's first code, then the authors' rounds, layer by layer on whole matrices; the changes by key."""
    layers = {
        f"unet/{name}": module.weight.detach().double()
        for name, module in pipe.unet.named_modules()
        if "attn2" in name and name.endswith(("to_k", "to_v"))
    }
    kept, spans, whole = [states(pipe, text)[0] for text in preserved], [], []
    for own, anchor in pairs:
        (c, last), (a, anchor_last) = states(pipe, own), states(pipe, anchor)
        farthest = max(last, anchor_last)
        spans.append((c[last : len(c) - farthest + last], a[anchor_last : len(a) - farthest + anchor_last]))
        whole.append((c, a))
    edited = {key: edited_layer(weight, spans, kept, *first) for key, weight in layers.items()}
    for _ in range(rounds):
        dim = len(next(iter(layers.values())).T)
        gram, mixed = derive * torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
        for key, weight in layers.items():
            gram, mixed = gram + edited[key].T @ edited[key], mixed + edited[key].T @ weight
        back = [(c @ (torch.linalg.inv(gram) @ mixed).T, a) for c, a in whole]
        edited = {key: edited_layer(weight, back, kept, 0.1, 0.1) for key, weight in edited.items()}
    return {key: edited[key] - weight for key, weight in layers.items()}


@pytest.mark.parametrize(
    ("preset", "concepts", "pairs", "preserved", "first", "derive", "rounds"),
    [
        ("released", Concept("cat", anchor="dog"), [("cat", "dog")], [""], (1.0, 0.5), 1e-3, 1),
        ("released-easy", Concept("fire truck"), [("fire truck", "")], [""], (1.0, 0.5), 1e-1, 1),
        ("released-nudity", Concept("gun", kind="unsafe"), [("gun", "")], [""], (1.0, 0.5), 1e-1, 3),
        ("released-unsafe", Concept("gun", kind="unsafe"), [("gun", "")], [""], (1.0, 0.5), 1e-1, 2),
        (
            "released", Concept("ink", kind="style", retain=("noto", "pixel")), [("ink", "art")],
            ["", "noto", "pixel"], (0.333, 0.5), 1e-3, 1,
        ),
        ("released", Concept("cat", anchor="traffic light"), [("cat", "traffic light")], [""], (1.0, 0.5), 1e-3, 1),
        ("paper", Concept("cat", anchor="dog"), [("cat", "dog")], [""], (0.1, 0.1), 1e-3, 1),
        (
            "paper", [Concept("cat", anchor="dog", retain="car"), Concept("ink", kind="style")],
            [("cat", "dog"), ("ink", "art")], ["", "car"], (0.1, 0.1), 1e-3, 1,
        ),
    ],
    ids=["anchor", "easy", "nudity", "unsafe", "style", "long-anchor", "paper", "two"],
)  # fmt: skip
def test_presets_do_what_the_released_code_does(
    canvas: Any, preset: str, concepts: Any, pairs: Any, preserved: Any, first: Any, derive: float, rounds: int
) -> None:
    made = erase(canvas, concepts, "rece", preset=preset, attach=False, progress=False)
    wanted = reliable_and_efficient(canvas, pairs, preserved, first, derive, rounds)
    edits = {**made.edits.maps, **made.low_rank}
    assert set(edits) == set(wanted)
    weights = {key: canvas.unet.get_submodule(key.split("/")[1]).weight for key in wanted}
    assert max(off(delta_of(edits[key], weights[key]), wanted[key]) for key in wanted) < 1e-4


def test_the_preserved_names_divide_uces_weight_down_to_a_tenth() -> None:
    assert {RECE.configured(name).preserve_scale for name in RECE.presets if name.startswith("released")} == {1.0}
    assert RECE.configured("released").preserve_divided


def door_of(pipe: Any, strategy: UCE, concept: Concept = CAT) -> Any:
    """What a strategy solves for of the layers that read tokens."""
    seen: list[Any] = []

    class Spy(type(strategy)):  # type: ignore[misc]
        def changes(self, door: Any, seed: int) -> Any:
            seen.append(door)
            return super().changes(door, seed)

    values = {name: getattr(strategy, name) for name in strategy.option_names()}
    Spy(**values).fit(backbone_for(pipe), [concept], seed=0, progress=lambda share: None)
    return seen[0]


def cost_of_bringing_back(door: Any, x: Tensor, weight: float) -> float:
    """The least that the paper's objective can be for the concept, with a weight in mean squares of a column."""
    whole = torch.eye(len(x), dtype=torch.float64) + x
    gram = sum(layer.T @ layer for layer in door.weights)
    unit = weight * float(gram.diagonal().mean())
    best = derived(whole, gram, door.erased, unit)
    missed = best @ whole.T - door.erased
    return float(((missed @ gram) * missed).sum() + unit * best.square().sum())


def test_bringing_the_concept_back_costs_more_after_every_round(canvas: Any) -> None:
    """By an embedding that is derived from the weights after the last round; see `derived_regularisation`."""
    quick, weight = {"vocabulary": 30}, 1e-3
    door = door_of(canvas, UCE(**quick))
    methods = [UCE(**quick), *(RECE(rounds=rounds, derived_regularisation=weight, **quick) for rounds in (1, 3))]
    uce, one, three = (cost_of_bringing_back(door, method.map_of(door), weight) for method in methods)
    assert 1.1 * uce < one
    assert 1.5 * one < three


def test_what_is_erased_stays_erased_in_the_rounds(canvas: Any) -> None:
    """The paper's rounds forget what UCE has done."""
    quick = {"vocabulary": 30, "rounds": 3}
    door = door_of(canvas, UCE(vocabulary=30))

    def left(x: Tensor) -> float:
        after = door.erased @ (torch.eye(len(x), dtype=torch.float64) + x).T
        return float((after - door.replacing).norm() / (door.erased - door.replacing).norm())

    kept, forgotten = (left(RECE(keep_erased=keep, **quick).map_of(door)) for keep in (True, False))
    assert kept < 1.5 * left(UCE().map_of(door))
    assert 4 * kept < forgotten


@pytest.mark.parametrize(
    ("family", "source"), [("stable-diffusion-xl", "pooled"), ("stable-diffusion-3", "tokens"), ("flux", "pooled")]
)
def test_every_door_of_a_family_is_solved_for(tiny_models: Any, family: str, source: str) -> None:
    """Against UCE's closed form and one round in plain arithmetic on whole matrices."""
    pipe = tiny_models[family]()
    backbone = backbone_for(pipe)
    method = RECE(vocabulary=0, tolerance=0.0, saved_as="lora")
    made = method.fit(backbone, [CAT], seed=0, progress=lambda share: None).edits
    assert set(made.low_rank) == {layer.key for layer in backbone.entry_layers()}
    reader, layers = Reader(backbone, 1), [layer for layer in backbone.entry_layers() if layer.source == source]
    erased, replacing = method.erased_features(reader, source, [CAT])  # type: ignore[arg-type]
    preserved = method.preserved_features(reader, source, [CAT], 0)  # type: ignore[arg-type]
    unit = float(torch.cat([erased, replacing, preserved]).square().mean())
    stock = [layer.module.weight.detach()[:, layer.columns].double() for layer in layers]
    edited = [weight + weight @ solve(erased, replacing, preserved, 10.0, 1.0, 0.5 * unit) for weight in stock]
    dim = erased.shape[1]
    column = sum(float((weight**2).sum()) for weight in stock) / dim
    gram = method.derived_regularisation * column * torch.eye(dim).double() + sum(new.T @ new for new in edited)
    mixed = sum(new.T @ old for new, old in zip(edited, stock, strict=True))
    back = torch.linalg.solve(gram, mixed @ erased.T).T
    update = solve(torch.cat([back, erased]), torch.cat([replacing, erased]), preserved, 10.0, 1.0, 0.5 * unit)
    for layer, old, new in zip(layers, stock, edited, strict=True):
        pair = made.low_rank[layer.key]
        change = (pair.up.double() @ pair.down.double())[:, layer.columns]
        assert off(change, new + new @ update - old) < 1e-4


def test_weights_that_are_not_numbers_are_refused(tiny_pipe: Any) -> None:
    weight = backbone_for(tiny_pipe).entry_layers()[1].module.weight
    with torch.no_grad():
        weight[0, 0] = torch.nan
        with pytest.raises(DivergenceError, match=r"unet/.*to_v holds NaN or infinity"):
            get("rece")(vocabulary=0).fit(backbone_for(tiny_pipe), [CAT], seed=0, progress=lambda share: None)
        weight.zero_()
        encoder = tiny_pipe.text_encoder
        getattr(encoder, "text_model", encoder).final_layer_norm.weight.fill_(torch.inf)
        with pytest.raises(DivergenceError, match=r"text encoders give NaN or infinity \(tokens"):
            get("uce")(vocabulary=0).fit(backbone_for(tiny_pipe), [CAT], seed=0, progress=lambda share: None)


def test_a_weight_of_nothing_ignores_retain_lists() -> None:
    assert RECE().ignores_retain() == ""
    assert RECE(round_preserve_scale=0.0).ignores_retain() == "round_preserve_scale"
