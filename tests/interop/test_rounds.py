"""Rounds of one encoding: what a later reader finds reaches those that read before it."""

from __future__ import annotations

import pytest
import torch

from erasure.interop import rounds


class Reader:
    """Finds a number in its rows, or is told of it by others."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.knows: list[list[bool]] = []

    def __call__(self, batch: list[list[int]]) -> torch.Tensor:
        own = torch.tensor([[self.number in row] for row in batch])
        opened_by_others = rounds.opened_by_others("numbers", self, len(batch), 1)
        result = own if opened_by_others is None else own | opened_by_others
        rounds.share_opened("numbers", self, result)
        self.knows.append(result[:, 0].tolist())
        return result


def test_what_the_last_finds_the_first_is_told_row_by_row() -> None:
    first, last = Reader(1), Reader(2)
    batch = [[1], [2], [3], [1, 2]]
    assert rounds.together(lambda: [reader(batch)[:, 0].tolist() for reader in (first, last)]) == 2 * [
        [True, True, False, True]
    ]
    assert first.knows == [[True, False, False, True], [True, True, False, True]]


def test_it_runs_once_where_all_find_the_same_or_nobody_shares() -> None:
    runs = []

    def encode() -> None:
        runs.append(0)
        for reader in (Reader(1), Reader(1)):
            reader([[1], [2]])

    rounds.together(encode)
    rounds.together(lambda: runs.append(0))
    assert len(runs) == 2


def test_batches_are_told_apart_by_their_order() -> None:
    """As pipelines do: each reads the prompts, then each the negative prompts."""
    first, last = Reader(1), Reader(2)
    made = rounds.together(lambda: [first([[3]]), last([[3]]), first([[3]]), last([[2]])])
    assert [bool(each) for each in made] == [False, False, True, True]


def test_a_batch_of_another_size_tells_what_is_in_any_row() -> None:
    first, last = Reader(1), Reader(2)
    made = rounds.together(lambda: [first([[1], [3]]), last([[2]])])
    assert [each[:, 0].tolist() for each in made] == [[True, True], [True]]


def test_other_things_and_other_subjects_tell_nothing() -> None:
    reader = Reader(1)

    def encode() -> torch.Tensor:
        rounds.share_opened("numbers", object(), torch.ones(1, 2, dtype=torch.bool))
        rounds.share_opened("letters", object(), torch.ones(1, 1, dtype=torch.bool))
        return reader([[3]])

    assert not rounds.together(encode)
    assert len(reader.knows) == 1


def test_what_is_told_may_bring_up_something_else() -> None:
    """The first of two things is found by all in the second round, the other, which follows from it, in the third."""
    a, b, c = "abc"
    found: list[list[bool]] = []

    def look(subject: str, reader: str, own: bool) -> bool:
        opened_by_others = rounds.opened_by_others(subject, reader, 1, 1)
        result = own or (opened_by_others is not None and bool(opened_by_others))
        rounds.share_opened(subject, reader, torch.tensor([[result]]))
        return result

    def encode() -> None:
        in_b = look("one", b, False)
        found.append([look("one", c, True), in_b, look("two", a, False), look("two", b, in_b)])

    rounds.together(encode)
    assert found == [[True, False, False, False], [True, True, False, True], [True, True, True, True]]


def test_within_another_it_is_a_part_of_that_and_an_error_leaves_nothing_behind() -> None:
    first, last = Reader(1), Reader(2)
    inner = lambda: rounds.together(lambda: first([[3]]))  # noqa: E731
    assert bool(rounds.together(lambda: (inner(), last([[2]]))[0]))
    with pytest.raises(RuntimeError, match="broken"):
        rounds.together(lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    assert rounds.opened_by_others("numbers", first, 1, 1) is None
    rounds.share_opened("numbers", last, torch.ones(1, 1, dtype=torch.bool))
    assert not first([[3]])
