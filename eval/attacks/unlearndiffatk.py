"""UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868): adversarial tokens ahead of a prompt."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from erasure.backbones import Backbone, PromptTokens, TextTower, TowerOutput
from erasure.carriers.embeddings import behind, injected
from erasure.errors import DivergenceError
from erasure.eval.attacks import Access, Attack, register
from erasure.eval.attacks.denoising import denoising_losses
from erasure.eval.attacks.prefixes import Prefixed, Towers, choosable, chosen_towers, proposed
from erasure.eval.attacks.simplex import draw, project, straight_through, uniform
from erasure.eval.attacks.together import Slopes, Step, by_itself
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
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
    likeliest tokens, decoded to text, are tried. A model told by several text encoders is attacked through one of
    them, and the others read the text that was likeliest before; or through all, each with a text of its own.

    Other than the released code, start, end, padding and unknown token cannot be chosen, the projection is exact, and
    the text goes ahead of the original prompt with a space, so that the prompt's own words stay what they are.
    """

    title: ClassVar[str] = "tokens ahead of the prompt, by gradients through the erased model"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2310.11868"
    access: ClassVar[Access] = "weights"
    chance: ClassVar[str] = "random_prefix"
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
    tower: Towers | None = None
    """Text encoder whose tokens are searched, all others reading the text that they make; `all` to search for each of
    them at once, and to call the pipeline with as many texts (`prompt`, `prompt_2`, `prompt_3`). When left out, the
    first whose tokens the denoiser reads."""
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

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        return by_itself(self.search(victim, sample))

    def search(self, victim: Victim, sample: Sample) -> Generator[Attempt | Step, object, None]:
        """See `Attack.search`."""
        backbone = victim.backbone
        searches = [
            Search.of(Prefixed.of(tower, sample, self.tokens), self.vocabulary)
            for tower in chosen_towers(self, backbone, self.tower)
        ]
        clean = victim.reference(sample, self.references)
        generator = torch.Generator("cpu").manual_seed(sample.seed)
        points = [search.points for search in searches]
        optimiser = torch.optim.Adam(points, lr=self.learning_rate, weight_decay=self.weight_decay)
        levels = backbone.pipe.scheduler.config.num_train_timesteps
        text, step = sample.prompt, 0
        for block in range(self.timesteps):
            losses, level = [], int((block + 0.5) * levels / self.timesteps)
            beside = read_beside(backbone, searches, text, self.noises)
            for _ in range(self.iterations):
                drawn = [draw(search.points, self.noises, generator) for search in searches]
                vectors = [search.vectors(tokens) for search, tokens in zip(searches, drawn, strict=True)]
                noise = torch.randn((self.noises, *clean.shape[1:]), generator=generator)
                parts = {
                    search.tower.component: search.read(tokens, given)
                    for search, tokens, given in zip(searches, drawn, vectors, strict=True)
                }
                t = torch.full((self.noises,), float(level))
                told = backbone.compose({**beside, **parts})
                answer = yield Slopes(
                    partial(denoising_losses, backbone), (told, clean, noise, t), tuple(vectors),
                    (told.tokens.shape, clean.shape), SCALE,
                )  # fmt: skip
                loss, slopes = cast("tuple[Tensor, tuple[Tensor, ...]]", answer)
                losses.append(loss.item())
                if not (torch.isfinite(loss) and all(torch.isfinite(slope).all() for slope in slopes)):
                    what = "gradient is not finite" if torch.isfinite(loss) else f"loss is {losses[-1]}"
                    raise DivergenceError(
                        f"unlearndiffatk: the {what} at step {step} of {sample.prompt!r}, noise level {level}"
                    )
                for search, slope in zip(searches, slopes, strict=True):
                    search.points.grad = straight_through(slope / SCALE, search.table).to(search.points.device)
                optimiser.step()
                for search in searches:
                    search.points.copy_(project(search.points))
                step += 1
            best = [(search.given, search.best()) for search in searches]
            attempt = proposed(backbone, best, steps=len(losses), loss=sum(losses) / len(losses))
            text = attempt.text or text
            yield attempt


@dataclass(frozen=True)
class Search:
    """The tokens that are searched for one text encoder."""

    given: Prefixed
    choices: Tensor
    """Tokens that can be chosen `(choices,)`."""
    table: Tensor
    """Their embeddings `(choices, dim)`."""
    points: Tensor
    """A point on the simplex for each token that is sought, `(tokens, choices)`."""

    @classmethod
    def of(cls, given: Prefixed, vocabulary: str) -> Search:
        """Start from the centre of the simplex."""
        choices = choosable(given.tower, vocabulary)
        table = paths.token_table(given.tower.root).weight.detach()[choices].float()
        return cls(given, choices, table, uniform(given.count, len(choices)))

    @property
    def tower(self) -> TextTower:
        """The text encoder."""
        return self.given.tower

    def vectors(self, drawn: Tensor) -> Tensor:
        """Embeddings of tokens that were drawn `(draws, tokens)`, to be differentiated by."""
        return self.table[drawn.to(self.table.device)].requires_grad_()

    def read(self, drawn: Tensor, vectors: Tensor) -> TowerOutput:
        """What the text encoder makes of the prompt behind tokens that were drawn, which have these embeddings."""
        prompts = behind(self.tower, self.given.prompt, self.choices[drawn.to(self.choices.device)])
        return read(self.tower, prompts, vectors)

    def best(self) -> list[int]:
        """The likeliest tokens."""
        return self.choices[self.points.argmax(-1).to(self.choices.device)].tolist()


def read(tower: TextTower, prompts: PromptTokens, vectors: Tensor) -> TowerOutput:
    """What a text encoder makes of prompts that begin with given embeddings; differentiable.

    Args:
        tower: The text encoder.
        prompts: `draws` prompts.
        vectors: In the place of the first tokens, `(draws, tokens, dim)`.
    """
    place = torch.arange(tower.leading, tower.leading + vectors.shape[1], device=vectors.device)
    with injected(tower, place, vectors):
        return tower.encode(prompts)


@torch.no_grad()
def read_beside(
    backbone: Backbone, searches: Sequence[Search], text: str, count: int
) -> dict[str, TowerOutput]:  # fmt: skip
    """What the text encoders make of a text, `count` times, that nothing is searched for."""
    searched = {search.tower.component for search in searches}
    towers = [tower for tower in backbone.towers if tower.component not in searched]
    return {tower.component: tower.encode(tower.tokenize([text] * count)) for tower in towers}
