"""Sums of edits against plain arithmetic in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasure.carriers.activations import Pinned
from erasure.carriers.edits import Edits, InputMap, LowRank
from erasure.carriers.weights import delta_of
from erasure.errors import UnsupportedModelError
from erasure.strategies.sums import added_up, joined

KEY, WEIGHT = "unet/a.to_k", "unet/a.to_k.weight"


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


BASE = some(6, 8, seed=9)


def pair(rank: int = 2, seed: int = 0, dtype: torch.dtype = torch.float16) -> LowRank:
    return LowRank(some(rank, 8, seed=seed).to(dtype), some(6, rank, seed=seed + 1).to(dtype))


def mapped(seed: int = 0) -> InputMap:
    return InputMap(some(2, 8, seed=seed), 0.1 * some(8, 2, seed=seed), torch.tensor(6))


FORMS = {
    "low rank": lambda seed: Edits(low_rank={KEY: pair(seed=seed)}),
    "whole": lambda seed: Edits(deltas={WEIGHT: some(6, 8, seed=seed).half()}),
    "map": lambda seed: Edits(maps={KEY: mapped(seed)}),
}


@pytest.mark.parametrize("earlier", FORMS)
@pytest.mark.parametrize("later", FORMS)
def test_the_sum_is_the_later_edit_of_what_the_earlier_one_left(earlier: str, later: str) -> None:
    one, two = FORMS[earlier](1), FORMS[later](5)
    erased = BASE + delta_of(one.of("unet")["a.to_k.weight"], BASE)
    wanted = erased + delta_of(two.of("unet")["a.to_k.weight"], erased) - BASE
    made = added_up(one, two, lambda _: BASE, lambda _: erased)
    made.check()
    torch.testing.assert_close(delta_of(made.of("unet")["a.to_k.weight"], BASE), wanted, atol=4e-3, rtol=0)
    if "whole" not in (earlier, later):
        assert set(made.low_rank) == {KEY}


def test_factors_that_say_different_things_stand_side_by_side_bit_for_bit() -> None:
    one, two = pair(2, 1), pair(2, 5)
    made = joined(one, two)
    assert torch.equal(made.down, torch.cat([one.down, two.down]))
    assert torch.equal(made.up, torch.cat([one.up, two.up], 1))


def test_ranks_beyond_need_are_dropped_to_the_precision_of_the_factors() -> None:
    one = pair(5, 1)
    made = joined(one, pair(5, 5))
    assert len(made.down) <= 6, "no layer of six outputs needs more"
    whole = one.up.double() @ one.down.double() + pair(5, 5).up.double() @ pair(5, 5).down.double()
    error = (made.up.double() @ made.down.double() - whole).norm() / whole.norm()
    assert error < 2e-3
    again = joined(one, one)
    assert len(again.down) == 5
    assert again.down.dtype == torch.float16
    fine = joined(pair(5, 1, torch.float32), pair(5, 5))
    assert fine.down.dtype == torch.float32


def test_an_edit_that_takes_the_earlier_one_back_is_no_trouble() -> None:
    one = pair()
    made = joined(one, LowRank(one.down, -one.up))
    assert (made.up.double() @ made.down.double()).abs().max() < 1e-6


def test_what_only_one_of_them_edits_is_as_it_was() -> None:
    one = Edits(low_rank={KEY: pair()})
    two = Edits(maps={"unet/b.to_k": mapped()}, deltas={"text_encoder/c.bias": some(3)})
    made = added_up(one, two, lambda _: BASE, lambda _: BASE)
    assert made.equals(Edits(low_rank=one.low_rank, maps=two.maps, deltas=two.deltas))


def test_a_sum_that_float16_cannot_hold_is_kept_in_float32() -> None:
    large = Edits(deltas={WEIGHT: torch.full((6, 8), 60_000.0).half()})
    total = added_up(large, large, lambda _: BASE, lambda _: BASE).deltas[WEIGHT]
    assert total.dtype == torch.float32
    assert (total == 120_000 - 2 * (60_000 - float(torch.tensor(60_000.0).half()))).all()


def test_pinned_prompts_of_both_are_pinned_once() -> None:
    first = Pinned(torch.tensor([[1, 2]]), some(1, 2, 4), some(1, 3, 2, 4))
    second = Pinned(torch.tensor([[1, 2], [3, 4]]), some(2, 2, 4), some(2, 3, 2, 4))
    one, two = (Edits(pinned={"text_encoder": pin}) for pin in (first, second))
    made = added_up(one, two, lambda _: BASE, lambda _: BASE).pinned["text_encoder"]
    assert made.input_ids.tolist() == [[1, 2], [3, 4]]
    assert torch.equal(made.hidden_states[0], first.hidden_states[0])
    assert torch.equal(made.blocks[1], second.blocks[1])
    assert made.fits()
    old = Edits(pinned={"text_encoder": first._replace(blocks=torch.zeros(0))})
    with pytest.raises(UnsupportedModelError, match="another form"):
        added_up(old, two, lambda _: BASE, lambda _: BASE)
