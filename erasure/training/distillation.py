"""Score identity distillation (Zhou et al. 2024): a one-step generator and a model of its images, trained in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Conditioning
from erasure.options import NotNegative, Options, ZeroToOne
from erasure.training.generator import OneStepGenerator
from erasure.training.loop import Share
from erasure.training.states import draw, stable_seed
from erasure.training.student import Student
from erasure.training.turns import Descent, Output, Player, Turn

SMALLEST_WEIGHT = 1e-5
"""Smallest mean distance from the teacher by which a row's loss is divided."""


def identity(real: Tensor, fake: Tensor, drawn: Tensor, alpha: float) -> Tensor:
    r"""Compute the generator's score identity loss of each row.

    With $f$ the teacher's clean latents, $g$ those of a model of the generator's images, and $x$ the generated
    latents,

    $$ \sum (f - g) [(f - x) - \alpha (f - g)] / w, \quad w = mean |x - f| $$

    where $w$ is computed for each row without gradients.

    Args:
        real: $f$, `(rows, channels, h, w)`.
        fake: $g$, shaped as `real`.
        drawn: $x$, shaped as `real`.
        alpha: Weight of the squared distance of both models, which is subtracted. At 1 the result is `short_identity`.

    Returns:
        Losses, `(rows,)`.
    """
    return weighted((real - fake) * ((real - drawn) - alpha * (real - fake)), real, drawn)


def short_identity(real: Tensor, fake: Tensor, drawn: Tensor) -> Tensor:
    r"""Compute `identity` for an alpha of 1: $\sum (f - g) (g - x) / w$; see there."""
    return weighted((real - fake) * (fake - drawn), real, drawn)


def weighted(terms: Tensor, real: Tensor, drawn: Tensor) -> Tensor:
    """Divide each row's sum of terms by its mean distance from the teacher; see `identity`."""
    weight = (drawn - real).detach().abs().mean((1, 2, 3)).clamp_min(SMALLEST_WEIGHT)
    return terms.sum((1, 2, 3)) / weight


class SelfSwitchedStudent(Player):
    """A student whose losses switch it on and off themselves, because several networks take part in them.

    Args:
        student: The student.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, run: Callable[[], Output]) -> Output:
        """Call `run` with the network unchanged."""
        return run()


@dataclass(frozen=True, kw_only=True)
class Guiding(Options):
    """Scales of classifier-free guidance; 1 switches it off. Long-short guidance has all of them above 1."""

    teacher: NotNegative = 1.0
    """Guidance scale of the teacher in the generator's loss."""
    fake: NotNegative = 1.0
    """Guidance scale of the fake-score network in the generator's loss."""
    learning: NotNegative = 1.0
    """Guidance scale of the fake-score network in its own loss."""
    dropped: ZeroToOne = 0.1
    """Share of the fake-score network's rows that are trained with the empty prompt, where a scale is not 1."""


class Kind(NamedTuple):
    """Training rows of one kind: of the concept, or of prompts that must survive."""

    name: str
    source: OneStepGenerator
    """Generator's images. A scene can name another prompt, for which the teacher predicts."""
    batch: int
    """Number of rows in each update, over all processes."""
    weight: float
    """Weight in the generator's loss."""
    fake_weight: float
    """Weight in the fake-score network's loss."""


class Drawn(NamedTuple):
    """Generated images for a part of an update."""

    images: Tensor
    """Clean latents, `(rows, channels, h, w)` float32, differentiable where the generator is trained."""
    prompts: list[str | None]
    """Prompts of the images."""
    teachers: list[str | None]
    """Prompts for which the teacher predicts."""
    numbers: list[int]
    """Indices of the images' initial noise."""
    counts: list[int]
    """Number of rows of each kind, in order."""
    copying: bool = False
    """Whether the generator learns from these images to draw as `ScoreDistillation.first` does."""


@dataclass(frozen=True, kw_only=True)
class ScoreDistillation:
    """The generator, the fake-score network, and their losses. The frozen network itself is the teacher.

    Both optimiser steps of an update use the same images, which are drawn once.
    """

    kinds: Sequence[Kind]
    generator: Student
    fake: Student
    """Fake-score network: model of the generator's images."""
    alpha: float
    guiding: Guiding
    seed: int
    since: int = 0
    """First update in which the generator is trained by its score identity loss."""
    copying: bool = False
    """Whether the generator learns, in the updates before `since`, to draw from each noise what `first` draws from it
    for the teacher's prompt."""
    first: Student | None = None
    """Generator that is copied; the frozen network when left out."""

    def turns(self, descent: Descent, fake_descent: Descent) -> list[Turn[Drawn]]:
        """Give the optimiser steps of an update: of the fake-score network, then of the generator.

        Args:
            descent: Optimiser settings of the generator.
            fake_descent: Optimiser settings of the fake-score network.
        """
        return [
            Turn(
                name="fake", player=SelfSwitchedStudent(self.fake), losses=self.fake_losses, descent=fake_descent,
                rate="fake_lr",
            ),
            Turn(
                name="generator", player=SelfSwitchedStudent(self.generator), losses=self.losses, descent=descent,
                since=0 if self.copying else self.since, signed=True,
            ),
        ]  # fmt: skip

    def prepare(self, update: int, share: Share) -> Drawn:
        """Draw the images of a part of an update."""
        prompts: list[str | None] = []
        teachers: list[str | None] = []
        numbers: list[int] = []
        counts = []
        for kind in self.kinds:
            index = share.of(draw(len(kind.source), kind.batch, self.seed, kind.name, update))
            for scene in kind.source.scene_of(index):
                prompts.append(scene.prompt)
                teachers.append(scene.asks[0] if scene.asks else scene.prompt)
            numbers += index.tolist()
            counts.append(len(index))
        copying = self.copying and update < self.since
        with torch.set_grad_enabled(copying or update >= self.since):
            images = self.source.draw(prompts, numbers)
        return Drawn(images, prompts, teachers, numbers, counts, copying)

    @property
    def source(self) -> OneStepGenerator:
        """Source that draws rows of all kinds, whose own sources differ only in their prompts."""
        return self.kinds[0].source

    def fake_losses(self, drawn: Drawn) -> dict[str, Tensor]:
        """Compute the fake-score network's squared error, summed over each image, mean over rows of each kind."""
        guiding, parametrisation = self.guiding, self.source.backbone.parametrisation
        x, t, noise = self.source.noised(drawn.images.detach(), drawn.numbers, "fake")
        prompts = list(drawn.prompts)
        if guiding != Guiding(dropped=guiding.dropped):
            prompts = [
                None if stable_seed(self.seed, "dropped", number) % 10_000 < guiding.dropped * 10_000 else prompt
                for prompt, number in zip(prompts, drawn.numbers, strict=True)
            ]
        with self.fake.active():
            found = self.predict(x, t, prompts, guiding.learning)
        target = parametrisation.target(drawn.images.detach(), noise, t)
        return self.terms(
            "fake_", (found - target).square().sum((1, 2, 3)), drawn, [k.fake_weight for k in self.kinds]
        )

    def losses(self, drawn: Drawn) -> dict[str, Tensor]:
        """Compute the generator's loss, see `identity` and `copied`; mean over rows of each kind."""
        if drawn.copying:
            return self.copied(drawn)
        clean = self.source.backbone.parametrisation.clean
        x, t, _ = self.source.noised(drawn.images, drawn.numbers, "real")
        real = clean(self.predict(x, t, drawn.teachers, self.guiding.teacher), x, t)
        with self.fake.active():
            fake = clean(self.predict(x, t, drawn.prompts, self.guiding.fake), x, t)
        if self.alpha == 1:
            rows = short_identity(real, fake, drawn.images)
        else:
            rows = identity(real, fake, drawn.images, self.alpha)
        return self.terms("", rows, drawn, [kind.weight for kind in self.kinds])

    def copied(self, drawn: Drawn) -> dict[str, Tensor]:
        """Compute the squared distance from what `first` draws from the same noise for the teacher's prompts."""
        with torch.no_grad():
            wanted = self.source.draw_as(self.first, drawn.teachers, drawn.numbers)
        rows = (drawn.images - wanted).square().sum((1, 2, 3))
        return self.terms("copied_", rows, drawn, [kind.weight for kind in self.kinds])

    def predict(self, x: Tensor, t: Tensor, prompts: Sequence[str | None], scale: float) -> Tensor:
        """Predict in float32 with the network's current weights and guidance."""
        source, backbone = self.source, self.source.backbone
        x, conditioning = x.to(backbone.dtype), source.prompts(prompts)
        if scale == 1:
            return backbone.predict(x, t, conditioning).float()
        both = Conditioning.cat([conditioning, source.prompts.null(len(x))])
        own, null = backbone.predict(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        return backbone.guided(own, null, scale)

    def terms(self, prefix: str, rows: Tensor, drawn: Drawn, weights: Sequence[float]) -> dict[str, Tensor]:
        """Give the weighted mean over rows of each kind."""
        # Dividing by the number of values does not change Adam's steps, and avoids overflow in half precision.
        parts = (rows / drawn.images[0].numel()).split(drawn.counts)
        named = zip(self.kinds, parts, weights, strict=True)
        return {prefix + kind.name: weight * part.mean() for kind, part, weight in named}
