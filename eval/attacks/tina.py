"""TINA: text-free inversion of a picture of the concept into the noise that the erased model draws it from."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from erasure.backbones import Backbone, Conditioning, backbone_for
from erasure.errors import DivergenceError
from erasure.eval.attacks import Access, ControlledAttack, register
from erasure.eval.attacks.changes import AnotherSampler
from erasure.eval.attacks.sampler import guided
from erasure.eval.attacks.together import Step, by_itself
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.options import Count, CountOrZero, Positive

SMALLEST = 1e-3
"""Share of a step's latents in the next ones from which on the equation is divided by it."""


@register("tina")
@dataclass(frozen=True, kw_only=True)
class Tina(ControlledAttack):
    r"""Find the noise from which the erased model draws a picture of the concept without any words.

    A deterministic step of the sampler is $x' = a x + b\, \epsilon(x, t, \emptyset)$, of DDIM as of Euler's method on
    a flow. It is undone from the clean picture up, level by level: $x$ begins as $(x' - b\, \epsilon(x', t)) / a$
    (DDIM inversion) and is then moved, as the fixed point that it should be, to the least

        | (x' - b e(x, t)) / a - x |^2

    by AdamW. The noise at the end is handed to the erased model, which draws from it by the same sampler, with the
    empty prompt and without guidance. What no text reaches an erasure of the text cannot keep back: this asks whether
    the knowledge is gone from the denoiser.

    The control inverts a picture of the original model that does not show the concept.
    """

    title: ClassVar[str] = "the noise of a picture of the concept, without words"
    paper: ClassVar[str] = "TINA, CVPR 2026"
    access: ClassVar[Access] = "weights"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "steps": 4, "iterations": 2},
        "quick": {"samples": 10, "steps": 20, "iterations": 5, "learning_rate": 0.01},
        "full": {},
    }

    steps: Count = 50
    """Noise levels (paper: 50)."""
    iterations: CountOrZero = 25
    """Steps of AdamW at each level (paper: 25); 0 leaves DDIM inversion."""
    learning_rate: Positive = 1e-3
    """Of AdamW (paper: 1e-3)."""
    references: Count = 4
    """Seeds tried until the original model's picture shows the concept, or for the control does not."""

    @property
    def tries(self) -> int:
        """One."""
        return 1

    def lacks(self, backbone: Backbone) -> str:
        """See `Attack.lacks`."""
        return backbone.lacks("trajectories")

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        return by_itself(self.search(victim, sample))

    def search(self, victim: Victim, sample: Sample) -> Generator[Attempt | Step, object, None]:
        """See `Attack.search`."""
        own = victim.backbone
        clean = victim.start(sample, self.references, without=self.control).latent
        config = own.rollout_scheduler()
        options = {name: value for name, value in config.config.items() if not name.startswith("_")}
        sampler = AnotherSampler(type(config).__name__, options)
        size = sample.height, sample.width
        with sampler(victim.pipe) as pipe:
            backbone = backbone_for(pipe, size=size)
            with torch.no_grad():
                told = backbone.encode([""])
            levels = backbone.timesteps(self.steps)
        x, losses = clean.float(), []
        for number, t in enumerate(levels.flip(0)):
            x, loss = cast("tuple[Tensor, float]", (yield Undoing(self, victim, sampler, size, told, x, t)))
            losses.append(loss)
            if not torch.isfinite(x).all():
                raise DivergenceError(
                    f"tina: latents that are not finite at level {number} of {self.steps} of {sample.prompt!r}"
                )
        call = {
            "prompt": "", **guided(own, sample, 1.0), "negative_prompt": None, "num_inference_steps": self.steps,
            "latents": own.latents.packed(x.to(own.dtype)),
        }  # fmt: skip
        yield Attempt(call, sampler, steps=self.steps * self.iterations, loss=sum(losses) / len(losses))


@dataclass(frozen=True)
class Undoing(Step):
    """A step of the sampler that is undone; the answer is the latents that it leads from, and the error left."""

    method: Tina
    victim: Victim
    sampler: AnotherSampler
    size: tuple[int, int]
    """Height and width of the picture."""
    told: Conditioning
    after: Tensor
    """Latents behind the step, `(1, channels, h, w)` float32."""
    t: Tensor
    """Level of the step."""

    @property
    def alike(self) -> Hashable:
        """See `Step.alike`."""
        return float(self.t), self.size

    @classmethod
    def together(cls, steps: Sequence[Self]) -> list[tuple[Tensor, float]]:
        """See `Step.together`."""
        first, method = steps[0], steps[0].method
        # Others draw between two steps, so that the sampler is put on for each.
        with first.sampler(first.victim.pipe) as pipe:
            backbone = backbone_for(pipe, size=first.size)
            backbone.timesteps(method.steps)
            told, after = first.told.repeated(len(steps)), torch.cat([step.after for step in steps])
            x, errors = undone(backbone, told, after, first.t, method.iterations, method.learning_rate)
        return list(zip(x.split(1), errors.tolist(), strict=True))


def undone(
    backbone: Backbone, told: Conditioning, after: Tensor, t: Tensor, iterations: int, learning_rate: float
) -> tuple[Tensor, Tensor]:
    """The latents that a step of the sampler leads from, and the mean squared errors that are left, `(rows,)`.

    Args:
        backbone: The model, with a sampler of first order and without memory.
        told: What the denoiser is told.
        after: Latents behind the step, `(rows, channels, h, w)` float32.
        t: Level of the step.
        iterations: Steps of AdamW.
        learning_rate: Of these.
    """
    kept, moved = shares(backbone, t)
    scale = kept if abs(kept) > SMALLEST else 1.0

    def predicted(x: Tensor) -> Tensor:
        return backbone.predict(backbone.model_input(x.to(backbone.dtype), t), t, told).float()

    def error(x: Tensor) -> Tensor:
        return (((after - moved * predicted(x)) - kept * x) / scale).square().flatten(1).mean(1)

    with torch.no_grad():
        x = (after - moved * predicted(after)) / scale
    with torch.enable_grad():
        x.requires_grad_()
        optimiser = torch.optim.AdamW([x], lr=learning_rate)
        for _ in range(iterations):
            (x.grad,) = torch.autograd.grad(error(x).sum(), x)
            optimiser.step()
    x = x.detach()
    with torch.no_grad():
        return x, error(x)


@torch.no_grad()
def shares(backbone: Backbone, t: Tensor) -> tuple[float, float]:
    """`a` and `b` of a step `x' = a x + b e` of the sampler at a level."""
    one = torch.ones(1, 1, 1, 1)
    nothing = torch.zeros_like(one)
    return float(backbone.step(nothing, t, one)), float(backbone.step(one, t, nothing))
