"""Several prompts' attacks in step: what they ask for at the same time is drawn or searched in one call.

Of a small model most time of a call goes to what does not depend on how many rows it has. Every prompt still goes its
own way: the same tries from the same seeds, and none behind its first success. A row in a batch is rounded otherwise
than alone, by the last bits.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Self, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from erasure.errors import BypassedErasureError
from erasure.eval.attacks.changes import AnotherSampler, AnotherTask, Resumed
from erasure.eval.attempts import Attempt, unchanged
from erasure.eval.samples import Sample

T = TypeVar("T")


class Step(ABC):
    """A step of a search, which can be taken for several prompts at once."""

    @property
    @abstractmethod
    def alike(self) -> Hashable:
        """Equal for steps of one attack that can be taken together."""

    @classmethod
    @abstractmethod
    def together(cls, steps: Sequence[Self]) -> Sequence[object]:
        """Take steps that are alike, and give what the search of each is to be sent."""


class Drawn(NamedTuple):
    """What became of a call."""

    image: Image.Image | BypassedErasureError
    """The image, or why an erasure that was attached with `strict=True` refused the call."""
    recalled: bool = False
    """Whether an earlier attack had drawn it."""


@dataclass(frozen=True)
class Wanted:
    """A call that is to be made; the answer is `Drawn`."""

    sample: Sample
    attempt: Attempt
    stock: bool = False
    """By the original model."""

    @property
    def alike(self) -> Hashable:
        """Equal for calls that can be made as one; of no other where an attempt has what belongs to one row alone."""
        change = self.attempt.change
        if change is not unchanged and not isinstance(change, AnotherSampler | AnotherTask):
            return id(self)
        kinds = [(name, _kind(value)) for name, value in sorted(self.attempt.call.items())]
        if any(kind is None for _, kind in kinds):
            return id(self)
        return self.stock, self.sample.settings, "" if change is unchanged else repr(change), tuple(kinds)


def _kind(value: object) -> Hashable:
    """What arguments of calls that are made as one share; `None` where they cannot be put together."""
    if isinstance(value, Tensor):
        return ("tensor", *value.shape) if len(value) == 1 else None
    if isinstance(value, Resumed):
        return ("resumed", value.step, *value.latents.shape) if len(value.latents) == 1 else None
    if isinstance(value, Image.Image):
        return ("picture", *value.size)
    if isinstance(value, list):
        return "list" if len(value) == 1 else None
    if isinstance(value, str):
        return "text"
    return ("plain", value) if value is None or isinstance(value, int | float) else None


def merged(calls: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Arguments of calls that are alike as those of one call.

    Args:
        calls: As attempts give them, of one sample each.
    """
    return {name: _merged([call[name] for call in calls]) for name in calls[0]}


def _merged(values: Sequence[object]) -> object:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors:
        return torch.cat(tensors)
    resumed = [value for value in values if isinstance(value, Resumed)]
    if resumed:
        return Resumed(resumed[0].step, torch.cat([each.latents for each in resumed]))
    lists = [value for value in values if isinstance(value, list)]
    if lists:
        return [each for value in lists for each in value]
    return list(values) if isinstance(values[0], str | Image.Image) else values[0]


Asked: TypeAlias = Wanted | Step
Course: TypeAlias = Generator[Asked, object, T]
"""The way of one prompt: it asks, is sent the answer, and ends with a result."""


class Ended(NamedTuple, Generic[T]):
    """What a prompt's way ended with."""

    result: T
    seconds: float
    """Its own wall time, and its share of what was done for several at once."""


def in_step(
    courses: Sequence[Course[T]], draw: Callable[[Sequence[Wanted]], Sequence[Drawn]],
    step: Callable[[Sequence[Step]], Sequence[object]],
) -> list[Ended[T]]:  # fmt: skip
    """Go several ways at once, and do together what is asked for at the same time.

    Args:
        courses: The ways.
        draw: Makes calls that are alike.
        step: Takes steps that are alike.
    """
    seconds, results = [0.0] * len(courses), dict[int, T]()
    asked: dict[int, Asked] = {}

    def send(index: int, answer: object) -> None:
        started = time.perf_counter()
        try:
            asked[index] = courses[index].send(answer)
        except StopIteration as end:
            results[index] = end.value
        seconds[index] += time.perf_counter() - started

    try:
        for index in range(len(courses)):
            send(index, None)
        while asked:
            for group in _groups(asked):
                started = time.perf_counter()
                wanted = [asked.pop(index) for index in group]
                calls = [each for each in wanted if isinstance(each, Wanted)]
                answers: Sequence[object] = (
                    draw(calls) if calls else step([each for each in wanted if isinstance(each, Step)])
                )
                for index in group:
                    seconds[index] += (time.perf_counter() - started) / len(group)
                for index, answer in zip(group, answers, strict=True):
                    send(index, answer)
    finally:
        for course in courses:
            course.close()
    return [Ended(results[index], seconds[index]) for index in range(len(courses))]


def _groups(asked: Mapping[int, Asked]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index, each in sorted(asked.items()):
        groups.setdefault((type(each), each.alike), []).append(index)
    return list(groups.values())


def by_itself(search: Generator[Attempt | Step, object, None]) -> Iterator[Attempt]:
    """The attempts of one prompt's search, with its steps taken as they come."""
    answer: object = None
    while True:
        try:
            asked = search.send(answer)
        except StopIteration:
            return
        if isinstance(asked, Attempt):
            answer = None
            yield asked
        else:
            (answer,) = type(asked).together([asked])


@dataclass(frozen=True)
class Slopes(Step):
    """Loss of what a model predicts, and its slopes along vectors that the model is told by.

    The answer is the loss, a scalar, and a tuple of slopes. Rows of a batch know nothing of one another, so the slopes
    of a sum of losses are those of each.
    """

    losses: Callable[[Sequence[tuple[object, ...]]], Sequence[Tensor]]
    """Gives the losses of several prompts, from what is given of each."""
    given: tuple[object, ...]
    by: tuple[Tensor, ...]
    """Vectors along which the slopes are taken."""
    shape: Hashable
    """Equal where `given` of several can stand in one batch."""
    scale: float = 1.0
    """Factor of the loss on its way back, and of the slopes."""

    @property
    def alike(self) -> Hashable:
        """See `Step.alike`."""
        return self.shape, self.scale

    @classmethod
    def together(cls, steps: Sequence[Self]) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """See `Step.together`."""
        with torch.enable_grad():
            losses = steps[0].losses([each.given for each in steps])
            total = losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()
            slopes = iter(torch.autograd.grad(total * steps[0].scale, [v for each in steps for v in each.by]))
        return [
            (loss.detach(), tuple(next(slopes) for _ in each.by)) for loss, each in zip(losses, steps, strict=True)
        ]
