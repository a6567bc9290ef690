"""Score distillation (Zhou et al. 2024): a generator of one step, and a model of what it draws, in turns."""

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
"""Mean distance from the teacher below which a row weighs no more."""


def identity(real: Tensor, fake: Tensor, drawn: Tensor, alpha: float) -> Tensor:
    r"""What a generator lowers to draw as a teacher does, of each row.

    With $f$ the teacher's clean latents, $g$ those of a model of what the generator draws, and $x$ what it has drawn,

    $$ \sum (f - g) [(f - x) - \alpha (f - g)] / w, \quad w = mean |x - f| $$

    where $w$ is of each row, and no gradient passes it.

    Args:
        real: $f$, `(rows, channels, h, w)`.
        fake: $g$, shaped as `real`.
        drawn: $x$, shaped as `real`.
        alpha: Weight at which the squared distance of both models is taken off. At 1 it is `short_identity`.

    Returns:
        `(rows,)`.
    """
    return weighted((real - fake) * ((real - drawn) - alpha * (real - fake)), real, drawn)


def short_identity(real: Tensor, fake: Tensor, drawn: Tensor) -> Tensor:
    r"""What `identity` is at an alpha of 1: $\sum (f - g) (g - x) / w$; see there."""
    return weighted((real - fake) * (fake - drawn), real, drawn)


def weighted(terms: Tensor, real: Tensor, drawn: Tensor) -> Tensor:
    """The sum of each row's terms over the mean distance of what was drawn from the teacher; see `identity`."""
    weight = (drawn - real).detach().abs().mean((1, 2, 3)).clamp_min(SMALLEST_WEIGHT)
    return terms.sum((1, 2, 3)) / weight


class Apart(Player):
    """A student whose losses say themselves when the network is the student: others take part in them as well.

    Args:
        student: What learns.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, run: Callable[[], Output]) -> Output:
        """What `run` gives while the network is as it was."""
        return run()


@dataclass(frozen=True, kw_only=True)
class Guiding(Options):
    """Scales of classifier-free guidance, 1 for none. Long and short guidance has all of them above 1."""

    teacher: NotNegative = 1.0
    """Of the teacher, while the generator learns."""
    fake: NotNegative = 1.0
    """Of the model of what is drawn, while the generator learns."""
    learning: NotNegative = 1.0
    """Of the model of what is drawn, while itself learns."""
    dropped: ZeroToOne = 0.1
    """Share of the rows without their prompt while that model learns, where any scale is not 1."""


class Kind(NamedTuple):
    """Rows of one kind in every update."""

    name: str
    source: OneStepGenerator
    """Scenes ask what the teacher draws in the place of their prompt, or ask nothing."""
    batch: int
    """Rows in each update, over all processes."""
    weight: float
    """Of the generator's loss."""
    fake_weight: float
    """Of the other model's loss."""


class Drawn(NamedTuple):
    """What the generator has drawn for a part of an update."""

    images: Tensor
    """`(rows, channels, h, w)` in float32, differentiable where the generator learns."""
    prompts: list[str | None]
    """What was drawn."""
    teachers: list[str | None]
    """What the teacher is asked."""
    numbers: list[int]
    """Say from which noise."""
    counts: list[int]
    """Rows of each kind, one after the other."""


@dataclass(frozen=True, kw_only=True)
class ScoreDistillation:
    """Both players and their losses. The network itself is the teacher; no copy of it is made.

    What the generator draws in an update is what both turns learn from: it is drawn once.
    """

    kinds: Sequence[Kind]
    generator: Student
    fake: Student
    """The model of what the generator draws."""
    alpha: float
    guiding: Guiding
    seed: int
    since: int = 0
    """First update in which the generator learns."""

    def turns(self, descent: Descent, fake_descent: Descent) -> list[Turn[Drawn]]:
        """Whose turn it is in every update: the model of what is drawn, then the generator.

        Args:
            descent: How the generator is trained.
            fake_descent: How the other is.
        """
        return [
            Turn(
                name="fake", player=Apart(self.fake), losses=self.fake_losses, descent=fake_descent, rate="fake_lr"
            ),
            Turn(
                name="generator", player=Apart(self.generator), losses=self.losses, descent=descent,
                since=self.since, signed=True,
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
        with torch.set_grad_enabled(update >= self.since):
            images = self.source.draw(prompts, numbers)
        return Drawn(images, prompts, teachers, numbers, counts)

    @property
    def source(self) -> OneStepGenerator:
        """Draws rows of all kinds, whose sources differ in their scenes alone."""
        return self.kinds[0].source

    def fake_losses(self, drawn: Drawn) -> dict[str, Tensor]:
        """Squared error of the model of what is drawn, summed over each image; the mean over rows of each kind."""
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
        """The generator's loss, see `identity`; the mean over rows of each kind."""
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

    def predict(self, x: Tensor, t: Tensor, prompts: Sequence[str | None], scale: float) -> Tensor:
        """Predictions in float32 of what the network is now, guided."""
        source, backbone = self.source, self.source.backbone
        x, told = x.to(backbone.dtype), source.prompts(prompts)
        if scale == 1:
            return backbone.predict(x, t, told).float()
        both = Conditioning.cat([told, source.prompts.null(len(x))])
        own, null = backbone.predict(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        return backbone.guided(own, null, scale)

    def terms(self, prefix: str, rows: Tensor, drawn: Drawn, weights: Sequence[float]) -> dict[str, Tensor]:
        """The weighted mean over rows of each kind."""
        # Adam does not notice that sums are divided by the number of values, and half precision does not overflow.
        parts = (rows / drawn.images[0].numel()).split(drawn.counts)
        named = zip(self.kinds, parts, weights, strict=True)
        return {prefix + kind.name: weight * part.mean() for kind, part, weight in named}
