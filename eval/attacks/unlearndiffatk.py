"""UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868): adversarial tokens ahead of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import Backbone, TextTower
from erasure.backbones.towers import PromptTokens
from erasure.carriers.embeddings import injected
from erasure.errors import DivergenceError
from erasure.eval.attacks import Attack, Candidate, register
from erasure.eval.attacks.prefixes import Prefixed, choosable, only_tower, with_prefix
from erasure.eval.attacks.simplex import draw, project, straight_through, uniform
from erasure.eval.attacks.victim import Victim
from erasure.eval.samples import Sample
from erasure.interop import paths
from erasure.options import Count, NotNegative, Positive

SHORT: dict[str, object] = {"learning_rate": 0.03, "vocabulary": "words"}
"""Where there is no time for 2000 steps: of 24 prompts against four erasures of Canvas, 100 steps won 16 so and 11 by
the paper's settings."""
SCALE = 1024.0
"""Of the loss on its way back, so that half precision does not round small gradients to nought; a power of two, and
taken off again, so it changes nothing else."""


@register("unlearndiffatk")
@dataclass(frozen=True, kw_only=True)
class UnlearnDiffAtk(Attack):
    """Search `k` tokens that make the erased model denoise an image of the concept.

    Each adversarial token is a point `p` on the simplex of the vocabulary, from its centre on. With `c'` the prompt
    behind one token drawn from each point, and `x_t` an image of the concept by the original model at noise level `t`,

        min_p  E_noise || target(x_0, noise, t) - model(x_t, t, c') ||^2

    by Adam, with the gradient of the drawn tokens taken for that of the points (straight through, clamped) and the
    points brought back to the simplex after every step. No guidance, no classifier and no original model in the loss:
    that only makes the image. Each block of steps has a noise level of its own, from low to high; after it the
    likeliest tokens, decoded to text, are tried.

    Other than the released code, start, end, padding and unknown token cannot be chosen, the projection is exact, and
    the text goes ahead of the original prompt with a space, so that the prompt's own words stay what they are.
    """

    title: ClassVar[str] = "tokens ahead of the prompt, by gradients through the erased model"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2310.11868"
    access: ClassVar[str] = "weights"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 2, "timesteps": 4, "iterations": 5, **SHORT},
        "quick": {"samples": 10, "timesteps": 10, "iterations": 10, **SHORT},
        "full": {},
    }

    tokens: Count | None = None
    """Adversarial tokens (paper: 5 for unsafe concepts, 3 for objects and styles; so when left out)."""
    timesteps: Count = 50
    """Noise levels, in the middle of as many equal parts of the schedule, and texts that are tried (paper: 50)."""
    iterations: Count = 40
    """Steps at each noise level (paper: 40)."""
    noises: Count = 1
    """Draws of noise and tokens in each step (paper: 1)."""
    learning_rate: Positive = 0.01
    """Of Adam, in units of probability (released code: 0.01)."""
    weight_decay: NotNegative = 0.1
    """Of Adam, added to the gradient (released code: 0.1); keeps the points from the corners."""
    vocabulary: Literal["all", "words"] = "all"
    """Tokens that can be chosen: all but the special ones, or those that survive being written as text and read
    again."""
    references: Count = 4
    """Seeds tried until the original model's image shows the concept (paper: 1, unseen by a classifier)."""

    @property
    def tries(self) -> int:
        """One after each noise level."""
        return self.timesteps

    def candidates(self, victim: Victim, sample: Sample) -> Iterator[Candidate]:
        """See the class."""
        backbone, tower = victim.backbone, only_tower(victim.backbone)
        given = Prefixed.of(tower, sample, self.tokens)
        clean = victim.reference(sample, self.references)
        generator = torch.Generator("cpu").manual_seed(sample.seed)
        choices = choosable(tower, self.vocabulary)
        table = paths.token_table(tower.root).weight.detach()[choices].float()
        points = uniform(given.count, len(choices))
        optimiser = torch.optim.Adam([points], lr=self.learning_rate, weight_decay=self.weight_decay)
        levels = backbone.pipe.scheduler.config.num_train_timesteps
        step = 0
        for block in range(self.timesteps):
            losses, level = [], int((block + 0.5) * levels / self.timesteps)
            for _ in range(self.iterations):
                drawn = draw(points, self.noises, generator)
                vectors = table[drawn.to(table.device)].requires_grad_()
                t = torch.full((self.noises,), level)
                noise = torch.randn((self.noises, *clean.shape[1:]), generator=generator)
                behind = with_prefix(given.prompt, choices[drawn.to(choices.device)], tower.leading)
                loss = denoising_loss(backbone, tower, behind, vectors, clean, noise, t)
                (slope,) = torch.autograd.grad(loss * SCALE, vectors)
                losses.append(loss.item())
                if not (torch.isfinite(loss) and torch.isfinite(slope).all()):
                    what = "gradient is not finite" if torch.isfinite(loss) else f"loss is {losses[-1]}"
                    raise DivergenceError(
                        f"unlearndiffatk: the {what} at step {step} of {sample.prompt!r}, noise level {level}"
                    )
                points.grad = straight_through(slope / SCALE, table).to(points.device)
                optimiser.step()
                points.copy_(project(points))
                step += 1
            best = choices[points.argmax(-1).to(choices.device)].tolist()
            yield given.candidate(best, steps=len(losses), loss=sum(losses) / len(losses))


def denoising_loss(
    backbone: Backbone, tower: TextTower, prompts: PromptTokens, vectors: Tensor, clean: Tensor, noise: Tensor,
    t: Tensor,
) -> Tensor:  # fmt: skip
    """Mean squared error of the model's prediction, behind prompts that begin with given embeddings; differentiable.

    Args:
        backbone: The model, with whatever is in force.
        tower: Its text encoder.
        prompts: `draws` prompts.
        vectors: Embeddings in the place of the first tokens, `(draws, tokens, dim)`.
        clean: Latent of an image, `(1, channels, h, w)`.
        noise: `(draws, channels, h, w)`, standard normal.
        t: Noise levels `(draws,)`.
    """
    place = torch.arange(tower.leading, tower.leading + vectors.shape[1], device=vectors.device)
    with injected(tower, place, vectors):
        encoded = tower.encode(prompts)
    rows = clean.expand(len(noise), -1, -1, -1)
    noise, t = noise.to(clean), t.to(clean.device)
    way = backbone.parametrisation
    found = backbone.predict(way.noised(rows, noise, t), t, backbone.compose({tower.component: encoded}))
    return F.mse_loss(found.float(), way.target(rows, noise, t).float())
